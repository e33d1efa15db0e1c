"""The coefficients of `root`: the quintics whose composition takes an interval to one, on the host and on a device."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from . import tables

LEAST_ON_DEVICE = 1e-4  # of a damping that is a tensor
TOLERANCE = 3e-8  # of the polynomial; rounding adds more


class Coefficients:
    """The coefficients of a rank on the device, for one λ at a time.

    Attributes:
        values: ``[stages, 3]`` float32 on the device.
        damping: λ as the kernels take it, a number or a tensor.
        on_device: whether it is a tensor, which only the device reads.
    """

    def __init__(self, r: int, device: torch.device) -> None:
        self.values: Tensor
        self.damping: float | Tensor = 0.0
        self.on_device = False
        self._r, self._device = r, device
        self._least = 0.0
        self._stages = 0
        self._captured: list[Tensor] = []

    def follow(self, damping: float | Tensor) -> int:
        """Take λ, upload its coefficients if they are not there, and return how many stages they are."""
        self.on_device = isinstance(damping, Tensor)
        self.damping = damping if isinstance(damping, Tensor) else float(damping)
        least = LEAST_ON_DEVICE if isinstance(damping, Tensor) else float(damping)
        if least != self._least:
            r = self._r
            flat = [x for stage in stages(least / (r + least * math.sqrt(r)), TOLERANCE) for x in stage]
            self.values = tables.upload(flat, torch.float32, self._device)
            self._least, self._stages = least, len(flat) // 3
        if tables.capturing(self._device) and not any(self.values is kept for kept in self._captured):
            self._captured.append(self.values)
        return self._stages


@lru_cache(maxsize=256)
def stages(smallest: float, tolerance: float) -> tuple[tuple[float, float, float], ...]:
    """Return (a, b, c) of the quintics whose composition takes √x to one on [smallest, 1], to ``tolerance``."""
    low, high = math.sqrt(min(smallest, 1.0)), 1.0
    found: list[tuple[float, float, float]] = []
    while not found or max(1 - low, high - 1) > tolerance:
        a, b, c, error = _quintic(low, high)
        found.append((a, b, c))
        low, high = 1 - error, 1 + error
    return tuple(found)


def _quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """Return the odd quintic closest to one on an interval, and how close: Remez' exchange of four points.

    On the last few parts in a thousand the equations are ill-conditioned; Taylor's polynomial is as good there.
    """
    if low > 0.999 * high:
        s, d = (low + high) / 2, (high - low) / (high + low)
        return 15 / 8 / s, -10 / 8 / s**3, 3 / 8 / s**5, 2.5 * d**3 + 4e-16
    points, signs = [low, (3 * low + high) / 4, (low + 3 * high) / 4, high], torch.tensor([1.0, -1.0, 1.0, -1.0])
    a, b, c, error = 0.0, 0.0, 0.0, 0.0
    for _ in range(20):  # converges quadratically
        x = torch.tensor(points, dtype=torch.float64)
        before, rows = error, torch.stack([x, x**3, x**5, signs.double()], 1)
        a, b, c, error = torch.linalg.solve(rows, torch.ones_like(x)).tolist()
        if abs(error - before) < 1e-15:
            break
        # where the derivative a + 3bx² + 5cx⁴ vanishes
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        points[1:3] = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c, abs(error)
