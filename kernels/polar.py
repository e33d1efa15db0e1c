"""The first half of "polar": moments, the step's shape u, and the Gram matrices of u.

Everything rank first, γ = maximize ? −∇ : ∇, and the step of Adam δ = −(lr/c₁) u:

    m ← β₁ m + (1−β₁) γ;   v ← β₂ v + (1−β₂) γ²;   u = m / (√v/√c₂ + ε);   G = u uᵀ;
    R = (Ĝ + λI)^(-1/2);   c = √(tr G / tr(R G R)), 1 for G = 0;   M = c R;   p ← p (1 − lr·wd) + M δ

`_advance` and `_total` do the first line, `root._equalise` the second but
for the parameters, and `update_tiles` (POLAR) those. R and c do not depend on the scale of G, so u takes the place of
δ: of order one whatever the learning rate, it neither underflows squared nor in bfloat16.

What moves, in bytes an element of float32: `_advance` reads g, m, v and writes m, v, u (24), the last launch reads u
and p and writes p (12): 36. Reading m and v back in place of u moves as much and needs no buffer, but a second moment
that underflows as it is stored in float16 would come back as zero and the step as m/ε. u is as wide as the parameter
(float32 for float16, whose range it may exceed). The Gram matrix of a tile is r/block times as large as the tile: a
program sums it over ``group`` tiles before it writes r² numbers, 8r/(group · block) bytes an element, there and back.

The sums are taken in the order of tiles, without atomics. After ``found_inf`` nothing is written by `_advance`, and
what stands in the buffers gives some M that the last launch does not apply.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables
from .update_tiles import (
    BETA2,
    EPS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST,
    FIXED,
    LENGTH,
    LERP,
    LIVE,
    META,
    REST2,
    ROOT,
    SIDE_OF,
    SIGN,
    TILES,
    _dot,
    _gradient,
    _live_rank,
    _moments,
    _outer_of,
    _places,
)


@triton.jit
def _part(
    g_ptr, m_ptr, v_ptr, V, maps, k, scalars, steps, gram, begin, D, width,
    SIDE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, ST: tl.constexpr, UT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Advance T tiles of a matrix from column ``begin`` on; write their u, rows ``width`` apart, and ``gram``."""
    # before the loop: loads are not moved out of it, since what it stores might be what they read
    root, eps, sign = tl.load(scalars + ROOT), tl.load(scalars + EPS), tl.load(scalars + SIGN)
    lerp, b2, rest2 = tl.load(scalars + LERP), tl.load(scalars + BETA2), tl.load(scalars + REST2)
    G = tl.zeros([RP, RP], tl.float32)
    for n in range(T):
        d0 = begin + n * BD
        at, inside, i = _places(d0, D, SIDE, R, RP, BD)
        to, _, _ = _places(d0, width, SIDE, R, RP, BD)
        alive = inside & (i < k)
        z = _gradient(g_ptr, V, maps, d0, D, SIDE, R, K, RP, KP, BD, ST, PREC) * sign
        z = tl.where(alive, z, 0.0)
        m, v = _moments(m_ptr, v_ptr, at, inside, alive, z, lerp, b2, rest2, ST)
        u = tl.where(alive, m / (tl.sqrt(v) * root + eps), 0.0)
        tl.store(steps + to, u.to(UT), mask=inside)
        G = _dot(tl.trans(u), u, G, PREC)
    i, j = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    tl.store(gram + i * R + j, G, mask=(i < R) & (j < R))


@triton.jit
def _advance(
    parts, fixed, gradients, bases, maps, meta, scalars, steps, grams,
    T: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, UB: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, GT: tl.constexpr, ST: tl.constexpr, UT: tl.constexpr, PREC: tl.constexpr,
    HAS_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Run `_part` for ``parts[pid]`` = (tensor, block of T tiles); tables as for `update_tiles._update`.

    ``steps`` holds the u of all matrices in their own layouts, each from tile ``FIRST`` of UB columns on and as long as
    its tiles; ``grams`` [parts, R, R].
    """
    pid = tl.program_id(0)
    tensor = tl.load(parts + 2 * pid)
    begin = tl.multiple_of(tl.load(parts + 2 * pid + 1) * (T * BD), BD)
    at, info = fixed + tensor * FIXED, meta + tensor * META
    g_ptr = tl.load(gradients + tensor).to(tl.pointer_type(GT))
    m_ptr = tl.load(at + EXP_AVG).to(tl.pointer_type(ST))
    v_ptr = tl.load(at + EXP_AVG_SQ).to(tl.pointer_type(ST))
    k = R
    if HAS_K:
        k = _live_rank(fixed, tensor, R)
    D = tl.load(info + LENGTH)
    if ALIGN:
        g_ptr, D = tl.multiple_of(g_ptr, 16), tl.multiple_of(D, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
    V, map_ = _outer_of(bases, maps, tensor, R, K, ST, ALIGN)
    own = steps + tl.load(info + FIRST).to(tl.int64) * (R * UB)
    width = tl.load(info + TILES) * UB
    gram = grams + pid.to(tl.int64) * (R * R)
    if tl.load(scalars + LIVE) != 0:
        if tl.load(info + SIDE_OF) == 1:
            _part(
                g_ptr, m_ptr, v_ptr, V, map_, k, scalars, own, gram, begin, D, width,
                1, T, R, RP, BD, K, KP, ST, UT, PREC,
            )  # fmt: skip
        else:
            _part(
                g_ptr, m_ptr, v_ptr, V, map_, k, scalars, own, gram, begin, D, width,
                2, T, R, RP, BD, K, KP, ST, UT, PREC,
            )  # fmt: skip


@triton.jit
def _total(grams, ranges, out, NP: tl.constexpr, RR: tl.constexpr, BLOCK: tl.constexpr):
    """Out[tensor] ← the sum of its Gram matrices, in order; ``ranges[tensor]`` = (first, how many), at most NP."""
    tensor = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, count = tl.load(ranges + 2 * tensor), tl.load(ranges + 2 * tensor + 1)
    total = tl.zeros([BLOCK], tl.float32)
    few = tl.arange(0, 8)[:, None]  # at once, so that their loads do not wait for each other
    for n in range(0, NP, 8):
        part = grams + (first + n + few).to(tl.int64) * RR
        total += tl.sum(tl.load(part + e[None, :], mask=(e < RR)[None, :] & (n + few < count), other=0.0), 0)
    tl.store(out + tensor.to(tl.int64) * RR + e, total, mask=e < RR)


class Parts:
    """How sums over columns are cut: a program takes ``group`` tiles of a matrix, and the programs' sums are added.

    Args:
        lengths: columns of every matrix.
        block: columns of a tile.
        group: tiles of a program.
        numbers: how many numbers a matrix sums up.
        device: where the tables are.

    Attributes:
        count: how many programs.
        table: what `_advance` and its like take for ``parts``.
    """

    def __init__(self, lengths: tuple[int, ...], block: int, group: int, numbers: int, device: torch.device) -> None:
        span = group * block
        parts, first = tables.tiling(lengths, span)
        counts = [-(-n // span) for n in lengths]
        self.count, self._tensors, self._numbers = len(parts) // 2, len(counts), numbers
        self.table = tables.upload(parts, torch.int32, device)
        self._most, self._adding = launch.padded(max(counts), 1), launch.shipped("total", 0)
        ranges = [x for pair in zip(first, counts, strict=True) for x in pair]
        self._ranges = tables.upload(ranges, torch.int32, device)

    def sums(self, parts: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the sums ``[T, ...]`` of what the programs left ``[count, ...]``, in ``out``; or as they are."""
        if self.count == self._tensors:
            return parts
        c, n = self._adding, self._numbers
        out = parts.new_empty(self._tensors, *parts.shape[1:]) if out is None else out
        launch.run(
            _total, (self._tensors, triton.cdiv(n, c.block)), parts, self._ranges, out,
            NP=self._most, RR=n, BLOCK=c.block, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        return out
