"""Small tables on the device: pointers, tiles, constants. Uploaded when they change, and kept for captured graphs.

A table is keyed by what it was made from, so an unchanged step uploads nothing. A captured CUDA graph reads the very
memory of the tables it was captured with: whatever is used during a capture is kept for good, and must have been
uploaded by an eager step before, since a copy from pageable memory cannot be captured.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LIMIT = 256
_recent: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_captured: dict[tuple[Any, ...], Tensor] = {}


@dataclass(frozen=True)
class Bucket:
    """Matrices of equal rank and dtypes, which share launches.

    Attributes:
        r: their rank.
        lengths: the other dimension of each.
        block: length of the tiles they are cut into.
        first: number of each one's first tile.
        counts: how many tiles each has.
        pointers: on the device, where each and what belongs to it is; columns as the kernels say.
        meta: on the device, what else there is to know of each, likewise.
        aligned: whether all rows of all matrices begin at multiples of 16 bytes.
    """

    r: int
    lengths: tuple[int, ...]
    block: int
    first: list[int]
    counts: list[int]
    pointers: Tensor
    meta: Tensor
    aligned: bool


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device, key: tuple[Any, ...] = ()) -> Tensor:
    """Return ``values`` as a tensor on the device, the same one for the same key (``values`` itself if not given).

    Raises:
        RuntimeError: during a capture, for a table that no eager step has uploaded.
    """
    name = (dtype, device, key or tuple(values))
    return _keep(name, lambda: _upload(torch.tensor(values, dtype=dtype), device))


def scratch(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a zeroed buffer that belongs to one user by name and size; users leave counters at zero."""
    return _keep((name, size, dtype, device), lambda: torch.zeros(size, dtype=dtype, device=device))


def _keep(name: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    if name in _captured:
        return _captured[name]
    table = _recent.get(name)
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if table is None:
        if capturing:
            raise RuntimeError(
                "a kernel met pointers or constants for the first time during CUDA graph capture; take an eager step "
                "with the same tensors first, and give lr as a tensor"
            )
        table = _recent[name] = make()
    _recent.move_to_end(name)
    if capturing:
        _captured[name] = table
    while len(_recent) > LIMIT:
        _recent.popitem(last=False)
    return table


def _upload(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def tiling(lengths: tuple[int, ...], block: int) -> tuple[list[int], list[int]]:
    """Cut lengths into blocks: return a flat list of (tensor, block number), and each tensor's first tile."""
    tiles: list[int] = []
    first: list[int] = []
    for tensor, length in enumerate(lengths):
        first.append(len(tiles) // 2)
        for b in range(-(-length // block)):
            tiles += (tensor, b)
    return tiles, first


def addresses(X: Tensor) -> list[int]:
    """Return the addresses of ``X[0]``, ``X[1]``, … of a contiguous stack."""
    base, stride = X.data_ptr(), X.stride(0) * X.element_size()
    return [base + l * stride for l in range(X.shape[0])]
