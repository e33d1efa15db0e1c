"""A buffer to work in, so that the pages of a step are not faulted in again."""

import torch
from torch import Tensor


class Scratch:
    """One buffer that all stacks of a device work in, one after the other."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, X: Tensor | list[Tensor]) -> Tensor | None:
        """Return a buffer shaped like ``X``; None off the CPU, where torch's allocator keeps memory itself."""
        if isinstance(X, list) or X.device.type != "cpu":
            return None
        flat = self._flat.get((X.device, X.dtype))
        if flat is None or flat.numel() < X.numel():
            flat = self._flat[X.device, X.dtype] = X.new_empty(X.numel())
        return flat[: X.numel()].view(X.shape)
