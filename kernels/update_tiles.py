"""What the update rules do on the device; `plan` launches it.

With M the rule's matrix, everything rank first, and γ = maximize ? −∇ : ∇:

    z = M₁ γ;   m ← β₁ m + (1−β₁) z;   v ← β₂ v + (1−β₂) z²;   δ = −(lr/c₁) m / (√v/√c₂ + ε);   p ← p (1 − lr·wd) + M₂ δ

with M₁, M₂ = P, I (ADAM); Qᵀ, Q (EIGEN); R, R (WHITEN). "momentum" takes z = γ and −P m ‖δ‖/‖P m‖ for the step: a first
launch (MOMENTS) writes moments and partial norms, a second one (GRAFT), in which every tile adds its matrix' partials
up in the same order, the parameters. ROWS is Adam with δ_i = −q_i (lr/c₁) m / (√v/√c₂ + ε/q_i) in direction i, q_i
being MatryoshkaLoRA's diagonal. POLAR only takes p ← p (1 − lr·wd) + M δ here; M and δ are made by `polar` and `root`.
In front runs one program that advances the step and computes what the tiles multiply with. With outer factors, what
reads the gradient takes what `_gradient` makes of it.

A tile is columns first, ``[BD, RP]``, whatever its storage: one way through for A and B, whose addresses alone differ,
and products whose first dimension is the tile's.

Hazards. Never autotune: the kernels work in place and a tuner replays them. Learning rates, steps and found_inf are
read on the device. Matrices are addressed by int64 pointers, inside a matrix by int32. Pointers lose alignment, and
the hints are given only where it holds. Masks on the contiguous axis are constants or multiples of 16, and dead lanes
are selected away, not multiplied: 0 · NaN is NaN.
"""

import triton
import triton.language as tl

# values of MODE; up to WHITEN the gradient goes through the matrix
ADAM = tl.constexpr(0)
EIGEN = tl.constexpr(1)
WHITEN = tl.constexpr(2)
MOMENTS = tl.constexpr(3)
GRAFT = tl.constexpr(4)
ROWS = tl.constexpr(5)
POLAR = tl.constexpr(6)

# columns of the table of fixed addresses, a row a matrix
PARAM = tl.constexpr(0)
EXP_AVG = tl.constexpr(1)
EXP_AVG_SQ = tl.constexpr(2)
MATRIX = tl.constexpr(3)  # the rule's matrix, or the rates of ROWS; null for the identity
RANK = tl.constexpr(4)  # int64 live rank; null for all
FIXED = tl.constexpr(5)  # how many

# columns of ``meta``, a row a matrix
LENGTH = tl.constexpr(0)  # the dimension that is not the rank
SIDE_OF = tl.constexpr(1)  # 1: (r, d), 2: (d, r)
FIRST = tl.constexpr(2)  # its first tile
TILES = tl.constexpr(3)
META = tl.constexpr(4)

# places in ``scalars``
LIVE = tl.constexpr(0)
RATE = tl.constexpr(1)  # lr / c₁
ROOT = tl.constexpr(2)  # 1 / √c₂
KEEP = tl.constexpr(3)  # 1 − lr · wd
EPS = tl.constexpr(4)
LERP = tl.constexpr(5)  # 1 − β₁
BETA2 = tl.constexpr(6)
REST2 = tl.constexpr(7)  # 1 − β₂
SIGN = tl.constexpr(8)
SCALARS = tl.constexpr(9)


@triton.jit
def _prepare(
    step, found_inf, scalars, lr, log1, log1_low, log2, log2_low, lerp, beta2, rest2, eps, decay, sign,
    LR_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Advance the step and fill ``scalars``, unless ``found_inf`` is set.

    log βᵢ come as sums of two float32 numbers, since c = 1 − exp(t log β) cancels; 1 − β rounded once, for the same
    reason. One warp: the step is read and written by the same threads.
    """
    live = tl.load(found_inf).to(tl.float32) == 0
    t = tl.load(step) + tl.where(live, 1.0, 0.0)
    tl.store(step, t)
    one = tl.zeros([1], tl.float64) + 1.0
    count = one * tl.maximum(t, 1.0).to(tl.float64)
    c1 = 1.0 - tl.exp(count * (one * log1 + one * log1_low))
    c2 = 1.0 - tl.exp(count * (one * log2 + one * log2_low))
    rate = one * (tl.load(lr).to(tl.float64) if LR_ON_DEVICE else lr)
    at = scalars + tl.arange(0, 1)
    unit = tl.zeros([1], tl.float32)
    tl.store(at + LIVE, unit + tl.where(live, 1.0, 0.0))
    tl.store(at + RATE, (rate / c1).to(tl.float32))
    tl.store(at + ROOT, (1.0 / tl.sqrt(c2)).to(tl.float32))
    tl.store(at + KEEP, (1.0 - rate * decay).to(tl.float32))
    tl.store(at + EPS, unit + eps)
    tl.store(at + LERP, unit + lerp)
    tl.store(at + BETA2, unit + beta2)
    tl.store(at + REST2, unit + rest2)
    tl.store(at + SIGN, unit + sign)


@triton.jit
def _entries(M, i, j, TRANSPOSED: tl.constexpr, R: tl.constexpr):
    """Return entries (i, j) of M or Mᵀ, padded with the identity; the identity for a null pointer."""
    inside = (i < R) & (j < R) & (M.to(tl.int64) != 0)
    at = j * R + i if TRANSPOSED else i * R + j
    return tl.load(M + at, mask=inside, other=0.0) + tl.where((i == j) & ~inside, 1.0, 0.0)


@triton.jit
def _dot(a, b, acc, PREC: tl.constexpr):
    """Return acc + a b of float32 operands; "tf32x3" in three products of the 11 bits that matrix units take of each.

    x = hi + lo: what is lost is lo lo and the end of lo, 2⁻²⁰ of a product. `tl.dot` offers the same, but sees to it
    that infinities stay such, which takes a third of the instructions of a step; here they may become NaN.
    """
    if PREC == "tf32x3":
        MASK: tl.constexpr = -8192  # without the last 13 of 23 bits
        a_hi = (a.to(tl.int32, bitcast=True) & MASK).to(tl.float32, bitcast=True)
        b_hi = (b.to(tl.int32, bitcast=True) & MASK).to(tl.float32, bitcast=True)
        acc = tl.dot(a_hi, b - b_hi, acc, input_precision="tf32")
        acc = tl.dot(a - a_hi, b_hi, acc, input_precision="tf32")
        acc = tl.dot(a_hi, b_hi, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision=PREC)
    return acc


@triton.jit
def _slice(d0, D, first, SIDE: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """Return the places ``[BD, C]`` of columns d0 and on of rows ``first`` and on of N, what is inside, and the rows.

    ``SIDE`` 1: (N, D) in memory, 2: (D, N).
    """
    i, j = first + tl.arange(0, C)[None, :], d0 + tl.arange(0, BD)[:, None]
    return i * D + j if SIDE == 1 else j * N + i, (i < N) & (j < D), i


@triton.jit
def _places(d0, D, SIDE: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr):
    """Return `_slice` of all N rows, padded to NP."""
    return _slice(d0, D, 0, SIDE, N, NP, BD)


@triton.jit
def _apply(M, X, TRANSPOSED: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
    """Return M x (or Mᵀ x) for every column x of a tile.

    In slices of at most 32 of the inner dimension: a whole 128×128 operand does not fit the registers.
    """
    C: tl.constexpr = RP if RP < 64 else 32
    i, c = tl.arange(0, RP), tl.arange(0, C)
    Y = tl.zeros([BD, RP], tl.float32)
    for n in range(RP // C):
        m = _entries(M, n * C + c[:, None], i[None, :], not TRANSPOSED, R)
        Y = _dot(_part_of(X, n, RP, C, BD), m, Y, PREC)
    return Y


@triton.jit
def _part_of(X, n, NP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """Return rows n C and on, C of NP, of a tile."""
    if C == NP:
        return X
    parts = tl.reshape(X, (BD, NP // C, C))
    return tl.sum(tl.where(tl.arange(0, NP // C)[None, :, None] == n, parts, 0.0), 1)


@triton.jit
def _live_rank(fixed, tensor, R: tl.constexpr):
    """Return the live rank of a matrix."""
    k = R
    at = tl.load(fixed + tensor * FIXED + RANK).to(tl.pointer_type(tl.int64))
    if at.to(tl.int64) != 0:
        k = tl.load(at).to(tl.int32)
    return k


@triton.jit
def _added(
    Y, M, X, d0, D,
    SIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RP: tl.constexpr, CP: tl.constexpr,
    WIDE: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Return Y + M x for every column x of a tile of X: M ``(ROWS, COLS)`` in rows of WIDE, padded to RP and CP.

    In slices of at most 32 of the inner dimension, read from memory as they are needed.
    """
    C: tl.constexpr = CP if CP < 64 else 32
    i = tl.arange(0, RP)[None, :]
    for n in range(CP // C):
        at, inside, _ = _slice(d0, D, n * C, SIDE, COLS, C, BD)
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        q = n * C + tl.arange(0, C)[:, None]
        m = tl.load(M + i * WIDE + q, mask=(i < ROWS) & (q < COLS), other=0.0)
        Y = _dot(x, m, Y, PREC)
    return Y


@triton.jit
def _gradient(
    G, V, M, d0, D,
    SIDE: tl.constexpr, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr,
    VT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Return a tile of the gradient; with outer factors (K > 0) V ← M₂₁ G + M₂₂ V in place, and c G + M₁₂ V.

    A program has these columns of G and V to itself, and reads all it needs of V before it writes.
    """
    at, inside, i = _places(d0, D, SIDE, R, RP, BD)
    g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
    if K > 0:
        N: tl.constexpr = R + K
        C: tl.constexpr = KP if KP < 64 else 32
        v = _added(tl.zeros([BD, KP], tl.float32), M + R * N, G, d0, D, SIDE, K, R, KP, RP, N, BD, PREC)
        v = _added(v, M + R * N + R, V, d0, D, SIDE, K, K, KP, KP, N, BD, PREC)
        tl.debug_barrier()  # other warps read what this one writes
        to, inside, _ = _places(d0, D, SIDE, K, KP, BD)
        tl.store(V + to, v.to(VT), mask=inside)
        g = g * tl.load(M)
        for n in range(KP // C):
            q = n * C + tl.arange(0, C)[:, None]
            m = tl.load(M + R + i * N + q, mask=(i < R) & (q < K), other=0.0)
            g = _dot(_part_of(v, n, KP, C, BD), m, g, PREC)
    return g


@triton.jit
def _outer_of(bases, maps, tensor, R: tl.constexpr, K: tl.constexpr, VT: tl.constexpr, ALIGN: tl.constexpr):
    """Return where a matrix' basis is, and its M of the outer factors: ``maps`` [tensors, R + K, R + K]; if K > 0."""
    V = bases
    if K > 0:
        V = tl.load(bases + tensor).to(tl.pointer_type(VT))
        if ALIGN:
            V = tl.multiple_of(V, 16)
    return V, maps + tensor.to(tl.int64) * ((R + K) * (R + K))


@triton.jit
def _moments(m_ptr, v_ptr, at, inside, alive, z, lerp, b2, rest2, ST: tl.constexpr):
    """Advance both moments with z, in memory; return them as float32."""
    m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.where(alive, m + lerp * (z - m), 0.0)
    v = tl.where(alive, b2 * v + rest2 * z * z, 0.0)
    tl.store(m_ptr + at, m.to(ST), mask=inside)
    tl.store(v_ptr + at, v.to(ST), mask=inside)
    return m, v


@triton.jit
def _tile(
    p_ptr, g_ptr, m_ptr, v_ptr, V, maps, M, k, scalars, partials, first, tiles, steps, d0, D,
    SIDE: tl.constexpr, MODE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, NP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, PT: tl.constexpr, ST: tl.constexpr, PREC: tl.constexpr, HAS_M: tl.constexpr,
    HAS_K: tl.constexpr,
):  # fmt: skip
    """Update one tile."""
    at, inside, i = _places(d0, D, SIDE, R, RP, BD)
    alive = inside
    if HAS_K:
        alive = inside & (i < k)
    share = 1.0
    if MODE == ROWS and HAS_M:
        # a null pointer is a rate of one; where the rate is zero the direction is cleared
        share = tl.load(M + i, mask=(i < R) & (M.to(tl.int64) != 0), other=1.0)
        alive = alive & (share > 0)
        share = tl.where(share > 0, share, 1.0)
    rate, root, keep = tl.load(scalars + RATE), tl.load(scalars + ROOT), tl.load(scalars + KEEP)
    eps = tl.load(scalars + EPS)
    pid = tl.program_id(0)
    if MODE == GRAFT:
        m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        step = -tl.where(alive, m, 0.0)
        if HAS_M:
            step = _apply(M, step, False, R, RP, BD, PREC)
        q = tl.arange(0, NP)
        graft = tl.sum(tl.load(partials + 2 * (first + q), mask=q < tiles, other=0.0), 0)
        length = tl.sum(tl.load(partials + 2 * (first + q) + 1, mask=q < tiles, other=0.0), 0)
        step = step * tl.where(length > 0, tl.sqrt(graft) / tl.sqrt(tl.where(length > 0, length, 1.0)), 0.0)
    elif MODE == POLAR:
        to, _, _ = _places(d0, tiles * BD, SIDE, R, RP, BD)
        step = -rate * tl.load(steps + first.to(tl.int64) * (R * BD) + to, mask=inside, other=0.0).to(tl.float32)
        step = _apply(M, tl.where(alive, step, 0.0), False, R, RP, BD, PREC)
    else:
        z = _gradient(g_ptr, V, maps, d0, D, SIDE, R, K, RP, KP, BD, ST, PREC) * tl.load(scalars + SIGN)
        z = tl.where(alive, z, 0.0)
        if HAS_M and MODE <= WHITEN:
            z = _apply(M, z, MODE == EIGEN, R, RP, BD, PREC)
        lerp, b2, rest2 = tl.load(scalars + LERP), tl.load(scalars + BETA2), tl.load(scalars + REST2)
        m, v = _moments(m_ptr, v_ptr, at, inside, alive, z, lerp, b2, rest2, ST)
        step = -rate * share * m / (tl.sqrt(v) * root + eps / share)
        step = tl.where(alive, step, 0.0)
        if HAS_M and MODE <= WHITEN and MODE != ADAM:
            step = _apply(M, step, False, R, RP, BD, PREC)
    if MODE == MOMENTS:
        direction = tl.where(alive, m.to(ST).to(tl.float32), 0.0)
        if HAS_M:
            direction = _apply(M, direction, False, R, RP, BD, PREC)
        direction = tl.where(alive, direction, 0.0)
        tl.store(partials + 2 * pid, tl.sum(tl.sum(step * step, 1), 0))
        tl.store(partials + 2 * pid + 1, tl.sum(tl.sum(direction * direction, 1), 0))
    else:
        p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.where(alive, p * keep + step, 0.0)
        tl.store(p_ptr + at, p.to(PT), mask=inside)


@triton.jit
def _update(
    tiles, fixed, gradients, bases, maps, meta, scalars, partials, steps,
    MODE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, NP: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, PT: tl.constexpr, GT: tl.constexpr, ST: tl.constexpr, PREC: tl.constexpr,
    HAS_M: tl.constexpr, HAS_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Run `_tile` for tile ``tiles[pid]`` = (tensor, block).

    ``fixed``, ``meta`` as their columns above; ``gradients[tensor]`` the address of ∇; ``bases`` and ``maps`` as for
    `outer`, where K > 0. For POLAR ``partials`` are the matrices [tensors, R, R], and ``steps`` what `polar._advance`
    left.
    """
    pid = tl.program_id(0)
    tensor = tl.load(tiles + 2 * pid)
    d0 = tl.multiple_of(tl.load(tiles + 2 * pid + 1) * BD, BD)
    at, info = fixed + tensor * FIXED, meta + tensor * META
    p_ptr = tl.load(at + PARAM).to(tl.pointer_type(PT))
    g_ptr = tl.load(gradients + tensor).to(tl.pointer_type(GT))
    m_ptr = tl.load(at + EXP_AVG).to(tl.pointer_type(ST))
    v_ptr = tl.load(at + EXP_AVG_SQ).to(tl.pointer_type(ST))
    # made in between, or in a fixed place
    if MODE == POLAR:
        M = partials + tensor.to(tl.int64) * (R * R)
    else:
        M = tl.load(at + MATRIX).to(tl.pointer_type(tl.float32))
    k = R
    if HAS_K:
        k = _live_rank(fixed, tensor, R)
    D = tl.load(info + LENGTH)
    if ALIGN:
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        D = tl.multiple_of(D, 16)
    V, own = _outer_of(bases, maps, tensor, R, K, ST, ALIGN)
    first, count = tl.load(info + FIRST), tl.load(info + TILES)
    if tl.load(scalars + LIVE) != 0:
        # two calls, not one with a runtime side: which entries are neighbours must be known
        if tl.load(info + SIDE_OF) == 1:
            _tile(
                p_ptr, g_ptr, m_ptr, v_ptr, V, own, M, k, scalars, partials, first, count, steps, d0, D,
                1, MODE, R, RP, BD, NP, K, KP, PT, ST, PREC, HAS_M, HAS_K,
            )  # fmt: skip
        else:
            _tile(
                p_ptr, g_ptr, m_ptr, v_ptr, V, own, M, k, scalars, partials, first, count, steps, d0, D,
                2, MODE, R, RP, BD, NP, K, KP, PT, ST, PREC, HAS_M, HAS_K,
            )  # fmt: skip
