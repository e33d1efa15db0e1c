"""Masked rank truncation and row scaling in place, any mix of ranks and shapes in one launch.

    truncate:  X_i ← 0 for i ≥ k        scale:  X_i ← scale_i X_i         (i: the direction, on either side)

Matrices are cut into runs of BLOCK consecutive elements; element e is direction e // d of an A and e mod r of a B. So
every access is contiguous whatever the rank, and no rank is a compile-time constant.

Hazards. Never autotune: in place. A dead element is overwritten, not multiplied: 0 · NaN is NaN. Matrices are
addressed by int64 pointers, inside a matrix by int32. A run without dead elements is neither read nor written. What
`supports` refuses falls back: float64, wrapper subclasses, non-contiguous stacks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables
from .update import TYPES


@triton.jit
def _rows(
    tiles, pointers, meta, BLOCK: tl.constexpr, T: tl.constexpr, SCALE: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Truncate or scale run ``tiles[pid]`` = (matrix, block).

    ``pointers[matrix]`` = (X, k or scale), ``meta[matrix]`` = (r, d, rank_dim).
    """
    matrix = tl.load(tiles + 2 * tl.program_id(0))
    begin = tl.multiple_of(tl.load(tiles + 2 * tl.program_id(0) + 1) * BLOCK, BLOCK)
    X = tl.load(pointers + 2 * matrix).to(tl.pointer_type(T))
    r, d = tl.load(meta + 3 * matrix), tl.load(meta + 3 * matrix + 1)
    size = r * d
    if ALIGN:
        X = tl.multiple_of(X, 16)
        size = tl.multiple_of(size, 16)
    e = begin + tl.arange(0, BLOCK)
    inside = e < size
    direction = e // d
    if tl.load(meta + 3 * matrix + 2) == 2:
        direction = e % r
    if SCALE:
        factors = tl.load(pointers + 2 * matrix + 1).to(tl.pointer_type(tl.float32))
        # rounded to the parameter's dtype first, as the reference does
        factor = tl.load(factors + direction, mask=inside, other=0.0).to(T).to(tl.float32)
        x = tl.load(X + e, mask=inside, other=0.0).to(tl.float32)
        tl.store(X + e, (x * factor).to(T), mask=inside)
    else:
        k = tl.load(tl.load(pointers + 2 * matrix + 1).to(tl.pointer_type(tl.int64))).to(tl.int32)
        dead = inside & (direction >= k)
        if tl.sum(dead.to(tl.int32), 0) > 0:
            x = tl.load(X + e, mask=inside, other=0.0)
            tl.store(X + e, tl.where(dead, tl.zeros([BLOCK], T), x), mask=inside)


def truncate_(X: Tensor, k: Tensor, rank_dim: int) -> Tensor:
    """Set directions ``i ≥ k`` of a stack to exactly zero, whatever they held (NaN too)."""
    truncate_many_([(X, k, rank_dim)])
    return X


def scale_rows_(X: Tensor, scale: Tensor, rank_dim: int) -> Tensor:
    """Multiply direction i of matrix l by ``scale[l, i]`` in place; ``scale`` is ``[L, r]`` or ``[r]``."""
    scale_many_([(X, scale, rank_dim)])
    return X


def truncate_many_(stacks: Sequence[tuple[Tensor, Tensor, int]]) -> None:
    """Truncate stacks ``(X, k, rank_dim)`` of any shapes and one dtype in one launch."""
    _launch([X for X, _, _ in stacks], [tables.addresses(k) for _, k, _ in stacks], [n for *_, n in stacks], False)


def scale_many_(stacks: Sequence[tuple[Tensor, Tensor, int]]) -> None:
    """Scale stacks ``(X, scale, rank_dim)`` of any shapes and one dtype in one launch."""
    addresses = []
    for X, scale, _ in stacks:
        one = scale.dim() == 1
        addresses.append([scale.data_ptr()] * X.shape[0] if one else tables.addresses(scale))
    _launch([X for X, _, _ in stacks], addresses, [n for *_, n in stacks], True)


def supports_truncate(X: Tensor, k: Tensor, rank_dim: int) -> bool:
    """Return whether `truncate_` takes these arguments."""
    return _fits(X) and launch.plain([k], (torch.int64,)) and k.device == X.device


def supports_scale(X: Tensor, scale: Tensor, rank_dim: int) -> bool:
    """Return whether `scale_rows_` takes these arguments."""
    r = X.shape[rank_dim]
    shaped = scale.shape in ((r,), (X.shape[0], r))
    return _fits(X) and shaped and launch.plain([scale], (torch.float32,)) and scale.device == X.device


def _fits(X: Tensor) -> bool:
    return X.dim() == 3 and X.numel() > 0 and X[0].numel() < 2**31 and launch.plain([X])


def _launch(stacks: Sequence[Tensor], operands: Sequence[list[int]], rank_dims: Sequence[int], scale: bool) -> None:
    c = launch.config("rows", 0)
    assert c is not None
    device = stacks[0].device
    pointers: list[int] = []
    meta: list[int] = []
    sizes: list[int] = []
    for X, own, rank_dim in zip(stacks, operands, rank_dims, strict=True):
        for x, operand in zip(tables.addresses(X), own, strict=True):
            pointers += (x, operand)
            meta += (X.shape[rank_dim], X.shape[3 - rank_dim], rank_dim)
            sizes.append(X[0].numel())
    tiles, _ = tables.tiling(tuple(sizes), c.block)
    _rows[(len(tiles) // 2,)](
        tables.on_device(tiles, torch.int32, device, key=("tiles", tuple(sizes), c.block)),
        tables.on_device(pointers, torch.int64, device),
        tables.on_device(meta, torch.int32, device),
        BLOCK=c.block, T=TYPES[stacks[0].dtype], SCALE=scale,
        ALIGN=all(x % 16 == 0 for x in pointers[::2]) and all(n % 16 == 0 for n in sizes),
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
