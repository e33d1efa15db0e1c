"""What is done to all matrices of a bucket besides an update: a look for non-finite numbers, Gram matrices, maps.

    bad:  any |x| = ∞ or NaN                      grams:  G = X Xᵀ, rank first
    maps:  X ← M X  or  m ← M m, v ← (M ∘ M) v,  then rows i ≥ k exactly zero

Each is one launch over the bucket's tables (two for Gram matrices of more than one program); the arithmetic is
float32, with a relative error of some 1e-7 · √r.

Hazards. Never autotune: maps work in place. A tile holds all of the rank, so a map reads what it needs before it
writes. Rows i ≥ k are selected away, not multiplied: they vanish whatever they hold. A NaN that M mixes into a row
below k stays there. Several programs may find something non-finite: the flag is set by an atomic maximum.
"""

import triton
import triton.language as tl

from .update_tiles import EXP_AVG, EXP_AVG_SQ, FIXED, LENGTH, META, PARAM, SIDE_OF, _dot, _entries, _places, _slice


@triton.jit
def _nonfinite(runs, gradients, sizes, flag, GT: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Flag ← 1 if run ``runs[pid]`` = (tensor, block of consecutive elements) holds anything that is not finite."""
    tensor = tl.load(runs + 2 * tl.program_id(0))
    g_ptr = tl.load(gradients + tensor).to(tl.pointer_type(GT))
    size = tl.load(sizes + tensor)
    if ALIGN:
        g_ptr, size = tl.multiple_of(g_ptr, 16), tl.multiple_of(size, 16)
    e = tl.multiple_of(tl.load(runs + 2 * tl.program_id(0) + 1) * BLOCK, BLOCK) + tl.arange(0, BLOCK)
    x = tl.load(g_ptr + e, mask=e < size, other=0.0).to(tl.float32)
    _raise(flag, tl.sum(tl.where(tl.abs(x) < float("inf"), 0, 1), 0))


@triton.jit
def _raise(flag, bad):
    """Flag ← 1 if ``bad`` is more than 0."""
    if bad > 0:
        # by the bits of 1.0, which are ordered as the numbers are
        tl.atomic_max(flag.to(tl.pointer_type(tl.int32), bitcast=True), 0x3F800000, sem="relaxed")


@triton.jit
def _summed(
    X, begin, D, SIDE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Return X Xᵀ of T tiles from column ``begin`` on."""
    G = tl.zeros([RP, RP], tl.float32)
    for n in range(T):
        at, inside, _ = _places(begin + n * BD, D, SIDE, R, RP, BD)
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        G = _dot(tl.trans(x), x, G, PREC)
    return G


@triton.jit
def _grams(
    parts, addresses, meta, grams,
    STRIDE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, XT: tl.constexpr,
    PREC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """grams[pid] ← X Xᵀ of ``parts[pid]`` = (tensor, block of T tiles); ``addresses[STRIDE · tensor]`` is X."""
    pid = tl.program_id(0)
    tensor = tl.load(parts + 2 * pid)
    begin = tl.multiple_of(tl.load(parts + 2 * pid + 1) * (T * BD), BD)
    X = tl.load(addresses + tensor * STRIDE).to(tl.pointer_type(XT))
    D = tl.load(meta + tensor * META + LENGTH)
    if ALIGN:
        X, D = tl.multiple_of(X, 16), tl.multiple_of(D, 16)
    i, j = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    to = grams + pid.to(tl.int64) * (R * R) + i * R + j
    inside = (i < R) & (j < R)
    if tl.load(meta + tensor * META + SIDE_OF) == 1:
        tl.store(to, _summed(X, begin, D, 1, T, R, RP, BD, PREC), mask=inside)
    else:
        tl.store(to, _summed(X, begin, D, 2, T, R, RP, BD, PREC), mask=inside)


@triton.jit
def _mapped(
    X, M, k, d0, D, SIDE: tl.constexpr, SQUARED: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr,
    XT: tl.constexpr, PREC: tl.constexpr, HAS_M: tl.constexpr, HAS_K: tl.constexpr,
):  # fmt: skip
    """Map one tile in place, by M or by M ∘ M (SQUARED), and clear the rows from k on.

    In slices of at most 32 of the inner dimension, as `update_tiles._apply`; a slice is read anew from memory.
    """
    C: tl.constexpr = RP if RP < 64 else 32
    at, inside, i = _places(d0, D, SIDE, R, RP, BD)
    if HAS_M:
        Y = tl.zeros([BD, RP], tl.float32)
        for n in range(RP // C):
            part, held, _ = _slice(d0, D, n * C, SIDE, R, C, BD)
            x = tl.load(X + part, mask=held, other=0.0).to(tl.float32)
            m = _entries(M, n * C + tl.arange(0, C)[:, None], tl.arange(0, RP)[None, :], True, R)
            Y = _dot(x, m * m if SQUARED else m, Y, PREC)
        tl.debug_barrier()  # other warps read what this one writes
    else:
        Y = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_K:
        Y = tl.where(i < k, Y, 0.0)
    tl.store(X + at, Y.to(XT), mask=inside)


@triton.jit
def _map_both(
    at, M, k, d0, D, SIDE: tl.constexpr, MOMENTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr,
    XT: tl.constexpr, PREC: tl.constexpr, HAS_M: tl.constexpr, HAS_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Map the parameter of a matrix, or both of its moments."""
    if ALIGN:
        D = tl.multiple_of(D, 16)
    X = tl.load(at + (EXP_AVG if MOMENTS else PARAM)).to(tl.pointer_type(XT))
    if ALIGN:
        X = tl.multiple_of(X, 16)
    _mapped(X, M, k, d0, D, SIDE, False, R, RP, BD, XT, PREC, HAS_M, HAS_K)
    if MOMENTS:
        V = tl.load(at + EXP_AVG_SQ).to(tl.pointer_type(XT))
        if ALIGN:
            V = tl.multiple_of(V, 16)
        _mapped(V, M, k, d0, D, SIDE, True, R, RP, BD, XT, PREC, HAS_M, HAS_K)


@triton.jit
def _transform(
    tiles, fixed, meta, M, ranks, found_inf,
    MOMENTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, XT: tl.constexpr,
    PREC: tl.constexpr, HAS_M: tl.constexpr, HAS_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Map tile ``tiles[pid]`` = (tensor, block) of the parameters or of both moments; ``M`` [tensors, R, R]."""
    tensor = tl.load(tiles + 2 * tl.program_id(0))
    d0 = tl.multiple_of(tl.load(tiles + 2 * tl.program_id(0) + 1) * BD, BD)
    at, info = fixed + tensor * FIXED, meta + tensor * META
    k = R
    if HAS_K:
        k = tl.load(ranks + tensor).to(tl.int32)
    own, D = M + tensor.to(tl.int64) * (R * R), tl.load(info + LENGTH)
    if tl.load(found_inf).to(tl.float32) == 0:
        if tl.load(info + SIDE_OF) == 1:
            _map_both(at, own, k, d0, D, 1, MOMENTS, R, RP, BD, XT, PREC, HAS_M, HAS_K, ALIGN)
        else:
            _map_both(at, own, k, d0, D, 2, MOMENTS, R, RP, BD, XT, PREC, HAS_M, HAS_K, ALIGN)
