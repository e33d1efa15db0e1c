"""What "polar" does before its step is applied: moments, the step's shape u, and the r×r matrix that acts on it.

With Q the rule's matrix (or I), everything rank first, γ = maximize ? −∇ : ∇, and the step of Adam δ = −(lr/c₁) u:

    z = Qᵀ γ;   m ← β₁ m + (1−β₁) z;   v ← β₂ v + (1−β₂) z²;   u = m / (√v/√c₂ + ε);   G = u uᵀ;
    R = (Ĝ + λI)^(-1/2);   c = √(tr G / tr(R G R)), 1 for G = 0;   M = c Q R;   p ← p (1 − lr·wd) + M δ

Matrices that are not ``known`` take M = Q.

`_advance` does the first line, `_total`, the inverse root and `_compose` the r×r part of the second, and `update_tiles`
(POLAR) the last. R and c do not depend on the scale of G, so u takes the place of δ: of order one whatever the
learning rate, it neither underflows squared nor in bfloat16.

What moves, in bytes an element of float32: `_advance` reads g, m, v and writes m, v, u (24), the last launch reads u
and p and writes p (12): 36. Reading m and v back in place of u moves as much and needs no buffer, but a second moment
that underflows as it is stored in float16 would come back as zero and the step as m/ε. u is as wide as the parameter
(float32 for float16, whose range it may exceed). The Gram matrix of a tile is r/block times as large as the tile: a
program sums it over ``group`` tiles before it writes r² numbers, 8r/(group · block) bytes an element, there and back.

The sums are taken in the order of tiles, without atomics. After ``found_inf`` nothing is written by `_advance`, and
what stands in the buffers gives some M that the last launch does not apply.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables
from .inverse import damped_inverse_root
from .update_tiles import _apply, _moments

WIDTHS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}  # of u


@triton.jit
def _part(
    g_ptr, m_ptr, v_ptr, Q, k_ptr, scalars, steps, gram, begin, D, width,
    SIDE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr,
    ST: tl.constexpr, UT: tl.constexpr, PREC: tl.constexpr, HAS_M: tl.constexpr, HAS_K: tl.constexpr,
):  # fmt: skip
    """Advance T tiles of a matrix from column ``begin`` on; write their u, rows ``width`` apart, and ``gram``."""
    root, eps, sign = tl.load(scalars + 2), tl.load(scalars + 4), tl.load(scalars + 7)
    b1, b2 = tl.load(scalars + 5), tl.load(scalars + 6)
    k = R
    if HAS_K:
        given = k_ptr.to(tl.int64) != 0
        if given:
            k = tl.load(k_ptr).to(tl.int32)
    G = tl.zeros([RP, RP], tl.float32)
    for n in range(T):
        d0 = begin + n * BD
        if SIDE == 1:
            i, j = tl.arange(0, RP)[:, None], d0 + tl.arange(0, BD)[None, :]
            at, to = i * D + j, i * width + j
        else:
            i, j = tl.arange(0, RP)[None, :], d0 + tl.arange(0, BD)[:, None]
            at, to = j * R + i, j * R + i
        inside = (i < R) & (j < D)
        alive = inside & (i < k)
        z = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32) * sign
        z = tl.where(alive, z, 0.0)
        if HAS_M:
            z = _apply(Q, z, True, SIDE, R, RP, BD, PREC)
        m, v = _moments(m_ptr, v_ptr, at, inside, alive, z, b1, b2, ST)
        u = tl.where(alive, m / (tl.sqrt(v) * root + eps), 0.0)
        tl.store(steps + to, u.to(UT), mask=inside)
        if SIDE == 1:
            G = tl.dot(u, tl.trans(u), G, input_precision=PREC)
        else:
            G = tl.dot(tl.trans(u), u, G, input_precision=PREC)
    i, j = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    tl.store(gram + i * R + j, G, mask=(i < R) & (j < R))


@triton.jit
def _advance(
    parts, pointers, meta, scalars, steps, grams,
    T: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, UB: tl.constexpr,
    GT: tl.constexpr, ST: tl.constexpr, UT: tl.constexpr, PREC: tl.constexpr,
    HAS_M: tl.constexpr, HAS_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Run `_part` for ``parts[pid]`` = (tensor, block of T tiles); ``pointers`` and ``meta`` as for `_update`.

    ``steps`` holds the u of all matrices in their own layouts, each from tile ``first`` of UB columns on and as long as
    its tiles; ``grams`` [parts, R, R].
    """
    pid = tl.program_id(0)
    tensor = tl.load(parts + 2 * pid)
    begin = tl.multiple_of(tl.load(parts + 2 * pid + 1) * (T * BD), BD)
    at, info = pointers + 6 * tensor, meta + 5 * tensor
    g_ptr = tl.load(at + 1).to(tl.pointer_type(GT))
    m_ptr = tl.load(at + 2).to(tl.pointer_type(ST))
    v_ptr = tl.load(at + 3).to(tl.pointer_type(ST))
    Q = tl.load(at + 4).to(tl.pointer_type(tl.float32))
    k_ptr = tl.load(at + 5).to(tl.pointer_type(tl.int64))
    D = tl.load(info)
    if ALIGN:
        g_ptr, D = tl.multiple_of(g_ptr, 16), tl.multiple_of(D, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
    mine = scalars + 9 * tl.load(info + 2)
    own = steps + tl.load(info + 3).to(tl.int64) * (R * UB)
    width = tl.load(info + 4) * UB
    gram = grams + pid.to(tl.int64) * (R * R)
    if tl.load(mine) != 0:
        if tl.load(info + 1) == 1:
            _part(
                g_ptr, m_ptr, v_ptr, Q, k_ptr, mine, own, gram, begin, D, width,
                1, T, R, RP, BD, ST, UT, PREC, HAS_M, HAS_K,
            )  # fmt: skip
        else:
            _part(
                g_ptr, m_ptr, v_ptr, Q, k_ptr, mine, own, gram, begin, D, width,
                2, T, R, RP, BD, ST, UT, PREC, HAS_M, HAS_K,
            )  # fmt: skip


@triton.jit
def _total(grams, ranges, out, NP: tl.constexpr, RR: tl.constexpr, BLOCK: tl.constexpr):
    """Out[tensor] ← the sum of its Gram matrices, in order; ``ranges[tensor]`` = (first, how many), at most NP."""
    tensor = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, count = tl.load(ranges + 2 * tensor), tl.load(ranges + 2 * tensor + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(NP):
        part = grams + (first + n).to(tl.int64) * RR
        total += tl.load(part + e, mask=(e < RR) & (n < count), other=0.0)
    tl.store(out + tensor.to(tl.int64) * RR + e, total, mask=e < RR)


@triton.jit
def _compose(
    grams, roots, known, pointers, out,
    R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, HAS_KNOWN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Out ← √(tr G / tr(R G R)) Q R for every matrix, or Q if it is not ``known``; R from ``roots``."""
    tensor = tl.program_id(0)
    good = tl.load(known + tensor) != 0 if HAS_KNOWN else True
    start = tensor.to(tl.int64) * (R * R)
    G, root = grams + start, roots + start
    Q = tl.load(pointers + 6 * tensor + 4).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, RP)[:, None]
    before, after = 0.0, 0.0
    for n in range(RP // BD):
        j = n * BD + tl.arange(0, BD)[None, :]
        inside = (i < R) & (j < R)
        g = tl.load(G + i * R + j, mask=inside, other=0.0)
        rows = tl.load(root + i * R + j, mask=inside, other=0.0)
        before += tl.sum(tl.sum(tl.where(i == j, g, 0.0), 1), 0)
        after += tl.sum(tl.sum(_apply(root, g, False, 1, R, RP, BD, PREC) * rows, 1), 0)
    c = tl.where(good & (after > 0), tl.sqrt(before / tl.where(after > 0, after, 1.0)), 1.0)
    for n in range(RP // BD):
        j = n * BD + tl.arange(0, BD)[None, :]
        inside = (i < R) & (j < R)
        rows = tl.load(root + i * R + j, mask=inside, other=0.0)
        rows = tl.where(good, rows, tl.where(i == j, 1.0, 0.0))
        tl.store(out + start + i * R + j, c * _apply(Q, rows, False, 1, R, RP, BD, PREC), mask=inside)


def advance(
    b: tables.Bucket,
    scalars: Tensor,
    steps: Tensor,
    damping: float | Tensor,
    k: Tensor | None,
    known: Tensor | None,
    types: Sequence[Any],
    has_m: bool,
) -> Tensor:
    """Advance the moments of a bucket, write u into ``steps``, and return the matrices M ``[tensors, r, r]``.

    Args:
        b: the matrices; tables as `update_tiles._update` reads them.
        scalars: what `update_tiles._prepare` made.
        steps: room for the tiles of all matrices.
        damping: λ.
        k: ``[tensors]`` live ranks, or None.
        known: ``[tensors]`` booleans, where M is not just Q, or None.
        types: dtypes of gradients and states, as triton calls them.
        has_m: whether any slab has a matrix.
    """
    device, rp, NT = scalars.device, launch.padded(b.r, 16), len(b.lengths)
    c, small = launch.config("polar", rp), launch.config("compose", rp)
    assert c is not None and small is not None, "shipped wherever updates are"
    group = min(c.group, launch.padded(-(-max(b.lengths) // c.block), 1))
    parts, first = tables.tiling(b.lengths, group * c.block)
    grams = torch.empty(len(parts) // 2, b.r, b.r, dtype=torch.float32, device=device)
    _advance[(len(grams),)](
        tables.on_device(parts, torch.int32, device, key=("tiles", b.lengths, group * c.block)),
        b.pointers, b.meta, scalars, steps, grams,
        T=group, R=b.r, RP=rp, BD=c.block, UB=b.block, GT=types[0], ST=types[1],
        UT=WIDTHS[steps.dtype], PREC=c.precision, HAS_M=has_m, HAS_K=k is not None, ALIGN=b.aligned,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    if len(grams) > NT:
        grams = _sums(grams, first, b, group * c.block)
    roots, out = damped_inverse_root(grams, damping, k), torch.empty_like(grams)
    _compose[(NT,)](
        grams, roots, roots if known is None else known.view(torch.int8), b.pointers, out,
        R=b.r, RP=rp, BD=small.block, HAS_KNOWN=known is not None, PREC=small.precision,
        num_warps=small.warps, num_stages=small.stages,
    )  # fmt: skip
    return out


def _sums(grams: Tensor, first: list[int], b: tables.Bucket, span: int) -> Tensor:
    """Return the sums ``[tensors, r, r]`` of the Gram matrices of spans of columns."""
    c = launch.config("total", 0)
    assert c is not None
    counts = [-(-n // span) for n in b.lengths]
    ranges = [x for pair in zip(first, counts, strict=True) for x in pair]
    out = grams.new_empty(len(counts), b.r, b.r)
    _total[(len(counts), triton.cdiv(b.r * b.r, c.block))](
        grams, tables.on_device(ranges, torch.int32, grams.device, key=("ranges", b.lengths, span)), out,
        NP=launch.padded(max(counts), 1), RR=b.r * b.r, BLOCK=c.block, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
