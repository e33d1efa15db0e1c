"""Second moments of rank space: Gram matrices of rows, many in one launch, and their averages.

    G_m = Σ_n w_n z_n z_nᵀ over the first ``count`` rows:   out_m ← scale_m G_m   or   sums[index_m] += sign · G_m
    S ← S + w (S_new − S),   t ← t + 1,   w = (1−β)/(1−β^t)

Program (m, s) sums slice s of the rows of matrix m and stores the partial sum; the last one of a matrix to finish adds
the slices up, always in the same order: no floating-point atomics, so the result does not depend on timing. Narrow rows
are packed: for r in (4, 8, 16, 32), 64/r rows make one row of a 64×64 product, whose diagonal r×r blocks are added up:
it wastes multiplications and gets full-width loads and matrix units instead.

Hazards. Rows at and after ``count`` may hold anything: they are selected away. 16-bit rows are multiplied as they are
and summed in float32; float32 rows, and all rows with weights, go by tf32x3 or ieee, never plain tf32. The interpreter
multiplies the bits of bfloat16, hence UP. Offsets are int64. `supports` refuses float64, rank > 128, wrapper
subclasses, and what the table does not ship. Addresses are uploaded at every call: not to be captured.
"""

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables

PACKED = {4: 16, 8: 8, 16: 4, 32: 2}


@triton.jit
def _partial(
    z, weights, count, begin, end,
    R: tl.constexpr, P: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    WEIGHTED: tl.constexpr, UP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Return the W×W Gram matrix of packed rows ``begin`` to ``end``, each P rows of z side by side."""
    n, c = tl.arange(0, BN), tl.arange(0, W)
    G = tl.zeros([W, W], tl.float32)
    for n0 in range(begin, end, BN):
        row = n0 + n
        token = row[:, None] * P + c[None, :] // R
        inside = (row < end)[:, None] & (c < P * R)[None, :]
        if P > 1:  # the last packed row need not be full
            inside = inside & (token < count)
        at = row.to(tl.int64)[:, None] * (P * R) + c[None, :]
        x = tl.load(z + at, mask=inside, other=0.0)
        if P == 1:  # changes nothing but the plan: without it float32 rows are not copied asynchronously
            x = tl.where(token < count, x, tl.zeros([BN, W], x.dtype))
        y = x
        if WEIGHTED or UP:
            x = x.to(tl.float32)
            y = x
        if WEIGHTED:
            y = x * tl.load(weights + token, mask=inside, other=0.0)
        G = tl.dot(tl.trans(x), y, G, input_precision=PREC)
    return G


@triton.jit
def _take(S, G, t_ptr, took_ptr, found_inf, rest, rest_low, log_decay, log_decay_low, i, j, R: tl.constexpr):
    """S ← S + w (G − S) if G is finite and found_inf is not set; what `ema_` of the reference does to one pair.

    1 − β and log β come as sums of two float32 numbers, since 1 − β^t cancels; log 0 as −1e30.
    """
    inside = (i < R) & (j < R)
    G = tl.where(inside, G, 0.0)
    bad = tl.sum(tl.sum(tl.where(tl.abs(G) < float("inf"), 0, 1), 1), 0)
    took = (bad == 0) & (tl.load(found_inf).to(tl.float32) == 0)
    t = tl.load(t_ptr) + took.to(tl.int32)
    tl.debug_barrier()  # every thread has read t before one writes it
    tl.store(t_ptr, t)
    tl.store(took_ptr, took.to(tl.int8))
    # in float64; exactly 1 the first time
    one = tl.zeros([1, 1], tl.float64) + 1.0
    count = tl.maximum(one * t.to(tl.float64), 1.0)
    log = one * log_decay + one * log_decay_low
    limit = log == 0
    w = (one * rest + one * rest_low) / (1.0 - tl.exp(tl.where(limit, -1.0, count * log)))
    w = tl.where(limit, 1.0 / count, w)
    w = tl.where(count == 1, 1.0, w).to(tl.float32)
    w = tl.where(took, w, 0.0)
    old = tl.load(S + i * R + j, mask=inside, other=0.0)
    new = tl.where(took, G, old)
    # lerp from the nearer end, as torch does: exactly G for w = 1
    mixed = tl.where(w < 0.5, old + w * (new - old), new - (new - old) * (1.0 - w))
    tl.store(S + i * R + j, mixed, mask=inside)


@triton.jit
def _gram(
    jobs, counts, scale, sign, work, counters, out,
    R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    T: tl.constexpr, WEIGHTED: tl.constexpr, COUNTED: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr,
    ALIGN: tl.constexpr, UP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Sum slice ``program_id(1)`` of matrix ``program_id(0)``; the last slice writes its place in ``out``, or adds.

    ``jobs`` [M, 4] is (address, rows, address of weights, place in ``out``).
    """
    matrix, slice = tl.program_id(0), tl.program_id(1)
    job = jobs + 4 * matrix
    z = tl.load(job).to(tl.pointer_type(T))
    if ALIGN:
        z = tl.multiple_of(z, 16)
    count = tl.load(job + 1).to(tl.int32)
    if COUNTED:
        count = tl.load(counts + matrix).to(tl.int32)
    w = tl.load(job + 2).to(tl.pointer_type(tl.float32))
    packed = (count + P - 1) // P
    share = (packed + SPLIT * BN - 1) // (SPLIT * BN) * BN
    begin = slice * share
    end = tl.minimum(begin + share, packed)
    G = _partial(z, w, count, begin, end, R, P, W, BN, WEIGHTED, UP, PREC)
    a, b = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    mine = work + matrix.to(tl.int64) * (SPLIT * W * W)
    tl.store(mine + slice * (W * W) + a * W + b, G)
    # every thread's part is written before the count says so, and the count is seen before any part is read
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + matrix, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLIT - 1:
        tl.debug_barrier()
        i, j = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
        inside = (i < R) & (j < R)
        total = tl.zeros([RP, RP], tl.float32)
        for n in range(SPLIT * P):
            at = (n // P) * (W * W) + (n % P) * (R * W + R) + i * W + j
            total += tl.load(mine + at, mask=inside, other=0.0, cache_modifier=".cg")
        if SCALED:
            total = total * tl.load(scale + matrix)
        to = out + tl.load(job + 3) * (R * R) + i * R + j
        if ADD:
            total = tl.load(to, mask=inside, other=0.0) + sign * total
        tl.store(to, total, mask=inside)


@triton.jit
def _average(
    S, S_new, t, took, found_inf, rest, rest_low, log_decay, log_decay_low, R: tl.constexpr, RP: tl.constexpr
):  # fmt: skip
    """Take one given observation per pair."""
    l = tl.program_id(0)
    i, j = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    start = l.to(tl.int64) * (R * R)
    G = tl.load(S_new + start + i * R + j, mask=(i < R) & (j < R), other=0.0)
    _take(S + start, G, t + l, took + l, found_inf, rest, rest_low, log_decay, log_decay_low, i, j, R)


def gram(z: Tensor) -> Tensor:
    """Return zᵀz of the rows of ``z`` ``(N, r)`` as ``(r, r)``, summed in float32."""
    return gram_many([z])[0]


def gram_many(
    zs: Sequence[Tensor],
    counts: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Return ``[M, r, r]``: scale_m Σ_n w_n z_n z_nᵀ of M matrices of one rank and dtype, in one launch.

    Args:
        zs: M matrices ``(N_m, r)``.
        counts: ``[M]`` int64, how many leading rows of each are valid, or None for all.
        weights: M vectors ``(N_m,)`` float32 of token weights, or None.
        scale: ``[M]`` float32, or None.
    """
    r = zs[0].shape[1]
    out = zs[0].new_empty(len(zs), r, r, dtype=torch.float32)
    _launch_gram(zs, range(len(zs)), out, counts, weights, scale, None)
    return out


def gram_add_(
    sums: Tensor,
    index: Sequence[int],
    zs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    sign: float = 1.0,
) -> Tensor:
    """Do sums[index[m]] += sign · Σ_n w_n z_n z_nᵀ for M matrices of one rank and dtype, in one launch.

    Args:
        sums: ``[S, r, r]`` float32, changed in place and returned.
        index: M distinct places in ``sums``.
        zs: M matrices ``(N_m, r)``.
        weights: M vectors ``(N_m,)`` float32 of token weights, or None.
        sign: what every product is multiplied with.
    """
    _launch_gram(zs, index, sums, None, weights, None, float(sign))
    return sums


def ema_(S: Tensor, S_new: Tensor, t: Tensor, decay: float, found_inf: Tensor | None = None) -> Tensor:
    """Take one observation per pair into the bias-corrected averages, in place; arguments as the reference."""
    L, r = S.shape[0], S.shape[-1]
    took = S.new_empty(L, dtype=torch.bool)
    rp = launch.padded(r, 4)
    c = launch.config("average", rp)
    assert c is not None
    log = math.log(decay) if decay > 0 else -1e30
    launch.run(
        _average, (L,), S, S_new, t, took.view(torch.int8), S.new_zeros(()) if found_inf is None else found_inf,
        *launch.split(1.0 - decay), *launch.split(log), R=r, RP=rp, num_warps=c.warps,
    )  # fmt: skip
    return took


def supports_gram(z: Tensor) -> bool:
    """Return whether `gram` takes this matrix."""
    return supports_gram_many([z])


def supports_gram_many(
    zs: Sequence[Tensor],
    counts: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
    scale: Tensor | None = None,
) -> bool:
    """Return whether `gram_many` takes these arguments."""
    shapes = set(map(attrgetter("shape"), zs))
    fits = all(len(s) == 2 and 0 < s[1] <= launch.MAX_RANK and 0 < s.numel() < 2**31 for s in shapes)
    alike = fits and len({s[1] for s in shapes}) == 1 and len(set(map(attrgetter("dtype"), zs))) == 1
    others = [*(weights or ()), *([] if scale is None else [scale])]
    return (
        alike
        and launch.plain(zs)
        and _config(zs[0], weights is not None) is not None
        and (not others or (launch.plain(others, (torch.float32,)) and others[0].device == zs[0].device))
        and (counts is None or (launch.plain([counts], (torch.int64,)) and counts.device == zs[0].device))
    )


def supports_gram_add(
    sums: Tensor,
    index: Sequence[int],
    zs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    sign: float = 1.0,
) -> bool:
    """Return whether `gram_add_` takes these arguments."""
    return (
        supports_gram_many(zs, None, weights)
        and sums.dim() == 3
        and sums.shape[1:] == (zs[0].shape[1], zs[0].shape[1])
        and launch.plain([sums], (torch.float32,))
        and sums.device == zs[0].device
        and len(set(index)) == len(zs)
        and min(index) >= 0
        and max(index) < sums.shape[0]
    )


def supports_ema(
    S: Tensor, S_new: Tensor, t: Tensor, decay: float = 0.0, found_inf: Tensor | None = None
) -> bool:  # fmt: skip
    """Return whether `ema_` takes these arguments."""
    fits = S.dim() == 3 and S.numel() > 0 and S.shape == S_new.shape and S.shape[-1] <= launch.MAX_RANK
    others = t.device == S.device and (found_inf is None or found_inf.device == S.device)
    return fits and others and t.is_contiguous() and launch.plain([S, S_new], (torch.float32,))


def _config(z: Tensor, weighted: bool) -> launch.Config | None:
    """Return the configuration for rows like these; weights make products of float32 of them."""
    op = "gram32" if weighted or z.dtype == torch.float32 else "gram16"
    return launch.config(op, launch.padded(z.shape[1], 16))


def _launch_gram(
    zs: Sequence[Tensor],
    index: Sequence[int],
    out: Tensor,
    counts: Tensor | None,
    weights: Sequence[Tensor] | None,
    scale: Tensor | None,
    sign: float | None,
) -> None:
    """Write the Gram matrices to their places in ``out``, or, with a sign, add them there."""
    z, M, r = zs[0], len(zs), zs[0].shape[1]
    c = _config(z, weights is not None)
    assert c is not None, "refused by supports_gram()"
    narrow = z.dtype != torch.float32 and weights is None
    pack = PACKED.get(r, 1) if narrow else 1
    width = max(16, launch.padded(pack * r, 16))
    longest = max(z.shape[0] for z in zs)
    # enough programs to fill a device, each with a few tiles to pipeline
    split = max(1, min(512 // M, longest // pack // (4 * c.block), 32))
    work = z.new_empty(M * split * width * width, dtype=torch.float32)
    counters = torch.zeros(M, dtype=torch.int32, device=z.device)
    heavy = [0] * M if weights is None else [w.data_ptr() for w in weights]
    jobs = [x for z, w, place in zip(zs, heavy, index, strict=True) for x in (z.data_ptr(), z.shape[0], w, place)]
    launch.run(
        _gram, (M, split), tables.upload(jobs, torch.int64, z.device), out if counts is None else counts,
        out if scale is None else scale, 1.0 if sign is None else sign, work, counters, out,
        R=r, RP=launch.padded(r, 16), P=pack, W=width, BN=c.block, SPLIT=split, T=launch.TYPES[z.dtype],
        WEIGHTED=weights is not None, COUNTED=counts is not None, SCALED=scale is not None, ADD=sign is not None,
        ALIGN=all(x % 16 == 0 for x in jobs[::4]), UP=launch.interpreting(), PREC=c.precision,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
