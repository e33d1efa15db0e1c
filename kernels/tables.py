"""Small integer tables on the device, which their owner keeps: addresses, tiles, sizes.

A captured CUDA graph reads the very memory of the tables it was captured with. So nothing is uploaded during a capture,
and whoever owns a table that a capture has read keeps it.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Return whether the current stream of this device records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values`` as a tensor on the device; the host does not wait for the copy.

    Raises:
        RuntimeError: during a CUDA graph capture. The copy would be replayed from host memory that is long gone.
    """
    if capturing(device):
        raise RuntimeError(
            "addresses or constants changed during a CUDA graph capture; take an eager step with the same tensors first"
        )
    table = torch.tensor(values, dtype=dtype)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


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
