"""What the update rules do on the device; `update` launches it.

With M the rule's matrix, everything rank first, and γ = maximize ? −∇ : ∇:

    z = M₁ γ;   m ← β₁ m + (1−β₁) z;   v ← β₂ v + (1−β₂) z²;   δ = −(lr/c₁) m / (√v/√c₂ + ε);   p ← p (1 − lr·wd) + M₂ δ

with M₁, M₂ = P, I (adam); Qᵀ, Q (eigen); R, R (whiten). momentum takes z = γ and −P m ‖δ‖/‖P m‖ for the step: a first
launch writes moments and partial norms, a second one, in which every tile adds its matrix' partials up in the same
order, the parameters. rows is Adam with δ_i = −p_i (lr/c₁) m / (√v/√c₂ + ε/p_i) in direction i, p_i being
MatryoshkaLoRA's diagonal. polar only takes p ← p (1 − lr·wd) + M δ here, M and δ are made by `polar`. In front runs one
program that advances the steps and turns ``hyper`` into ``scalars``.

Hazards. Never autotune: the kernels work in place and a tuner replays them. Learning rates, steps and found_inf are
read on the device. Matrices are addressed by int64 pointers, inside a matrix by int32. Pointers lose alignment, and
the hints are given only where it holds. Masks on the contiguous axis are constants or multiples of 16, and dead lanes
are selected away, not multiplied: 0 · NaN is NaN.
"""

import triton
import triton.language as tl

ADAM, EIGEN, WHITEN, MOMENTS, GRAFT, ROWS, POLAR = range(7)  # values of MODE
COLUMNS = 9  # of ``scalars``


@triton.jit
def _prepare(hyper, lr_at, step_at, found_inf, scalars, NS, BLOCK: tl.constexpr):
    """Advance the steps; scalars ← (live, lr/c₁, 1/√c₂, 1 − lr·wd, ε, β₁, β₂, sign, t), float32, per slab.

    ``hyper`` is (lr, log β₁, log β₂, β₁, β₂, ε, wd, sign) in float64: 1 − β^t cancels in float32.
    """
    s = tl.arange(0, BLOCK)
    mask = s < NS
    live = tl.load(found_inf).to(tl.float32) == 0
    step_ptr = tl.load(step_at + s, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(step_ptr, mask=mask, other=0.0) + tl.where(live, 1.0, 0.0)
    lr_ptr = tl.load(lr_at + s, mask=mask, other=0)
    given = mask & (lr_ptr != 0)
    on_device = tl.load(lr_ptr.to(tl.pointer_type(tl.float32)), mask=given, other=0.0).to(tl.float64)
    lr = tl.where(given, on_device, tl.load(hyper + 8 * s, mask=mask, other=0.0))
    log1 = tl.load(hyper + 8 * s + 1, mask=mask, other=-1.0)
    log2 = tl.load(hyper + 8 * s + 2, mask=mask, other=-1.0)
    count = tl.maximum(t, 1.0).to(tl.float64)
    c1, c2 = 1.0 - tl.exp(count * log1), 1.0 - tl.exp(count * log2)
    wd = tl.load(hyper + 8 * s + 6, mask=mask, other=0.0)
    tl.store(step_ptr, t, mask=mask)
    row = scalars + 9 * s
    tl.store(row, tl.where(live, 1.0, 0.0) + tl.zeros([BLOCK], tl.float32), mask=mask)
    tl.store(row + 1, (lr / c1).to(tl.float32), mask=mask)
    tl.store(row + 2, (1.0 / tl.sqrt(c2)).to(tl.float32), mask=mask)
    tl.store(row + 3, (1.0 - lr * wd).to(tl.float32), mask=mask)
    tl.store(row + 4, tl.load(hyper + 8 * s + 5, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(row + 5, tl.load(hyper + 8 * s + 3, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(row + 6, tl.load(hyper + 8 * s + 4, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(row + 7, tl.load(hyper + 8 * s + 7, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(row + 8, t, mask=mask)


@triton.jit
def _entries(M, i, j, TRANSPOSED: tl.constexpr, R: tl.constexpr):
    """Return entries (i, j) of M or Mᵀ, padded with the identity; the identity for a null pointer."""
    inside = (i < R) & (j < R) & (M.to(tl.int64) != 0)
    at = j * R + i if TRANSPOSED else i * R + j
    return tl.load(M + at, mask=inside, other=0.0) + tl.where((i == j) & ~inside, 1.0, 0.0)


@triton.jit
def _apply(
    M, X, TRANSPOSED: tl.constexpr, SIDE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Return M X (or Mᵀ X) on the rank side of a tile: from the left for A, from the right for B.

    In slices of at most 32 of the inner dimension: a whole 128×128 operand does not fit the registers.
    """
    C: tl.constexpr = RP if RP < 64 else 32
    i, c = tl.arange(0, RP), tl.arange(0, C)
    if SIDE == 1:
        Y = tl.zeros([RP, BD], tl.float32)
        for n in range(RP // C):
            slices = tl.reshape(X, (RP // C, C, BD))
            part = tl.sum(tl.where(tl.arange(0, RP // C)[:, None, None] == n, slices, 0.0), 0) if C < RP else X
            Y = tl.dot(_entries(M, i[:, None], n * C + c[None, :], TRANSPOSED, R), part, Y, input_precision=PREC)
    else:
        Y = tl.zeros([BD, RP], tl.float32)
        for n in range(RP // C):
            slices = tl.reshape(X, (BD, RP // C, C))
            part = tl.sum(tl.where(tl.arange(0, RP // C)[None, :, None] == n, slices, 0.0), 1) if C < RP else X
            Y = tl.dot(part, _entries(M, n * C + c[:, None], i[None, :], not TRANSPOSED, R), Y, input_precision=PREC)
    return Y


@triton.jit
def _round(x, seed, at, PT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Return x in the parameter's dtype; for bfloat16 optionally up with the probability of the part cut off."""
    if STOCHASTIC:
        bits = x.to(tl.int32, bitcast=True)
        noise = tl.randint(seed, at).to(tl.int32, bitcast=True) & 0xFFFF
        rounded = ((bits + noise) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)
    return x.to(PT)


@triton.jit
def _moments(m_ptr, v_ptr, at, inside, alive, z, b1, b2, ST: tl.constexpr):
    """Advance both moments with z, in memory; return them as float32."""
    m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.where(alive, m + (1.0 - b1) * (z - m), 0.0)
    v = tl.where(alive, b2 * v + (1.0 - b2) * z * z, 0.0)
    tl.store(m_ptr + at, m.to(ST), mask=inside)
    tl.store(v_ptr + at, v.to(ST), mask=inside)
    return m, v


@triton.jit
def _tile(
    p_ptr, g_ptr, m_ptr, v_ptr, M, k_ptr, scalars, partials, first, tiles, seed, steps, d0, D,
    SIDE: tl.constexpr, MODE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, NP: tl.constexpr,
    PT: tl.constexpr, ST: tl.constexpr, PREC: tl.constexpr, HAS_M: tl.constexpr, HAS_K: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update one tile: [RP, BD] of an A (SIDE 1), [BD, RP] of a B (SIDE 2)."""
    if SIDE == 1:
        i, j = tl.arange(0, RP)[:, None], d0 + tl.arange(0, BD)[None, :]
        at = i * D + j
    else:
        i, j = tl.arange(0, RP)[None, :], d0 + tl.arange(0, BD)[:, None]
        at = j * R + i
    inside = (i < R) & (j < D)
    alive = inside
    if HAS_K:
        k = R
        if k_ptr.to(tl.int64) != 0:
            k = tl.load(k_ptr).to(tl.int32)
        alive = inside & (i < k)
    share = 1.0
    if MODE == 5 and HAS_M:
        # a null pointer is a rate of one; where the rate is zero nothing lives
        share = tl.load(M + i, mask=(i < R) & (M.to(tl.int64) != 0), other=1.0)
        alive = alive & (share > 0)
        share = tl.where(share > 0, share, 1.0)
    rate, root, keep = tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    eps, b1, b2 = tl.load(scalars + 4), tl.load(scalars + 5), tl.load(scalars + 6)
    pid = tl.program_id(0)
    if MODE == 4:
        m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        step = -tl.where(alive, m, 0.0)
        if HAS_M:
            step = _apply(M, step, False, SIDE, R, RP, BD, PREC)
        q = tl.arange(0, NP)
        graft = tl.sum(tl.load(partials + 2 * (first + q), mask=q < tiles, other=0.0), 0)
        length = tl.sum(tl.load(partials + 2 * (first + q) + 1, mask=q < tiles, other=0.0), 0)
        step = step * tl.where(length > 0, tl.sqrt(graft) / tl.sqrt(tl.where(length > 0, length, 1.0)), 0.0)
    elif MODE == 6:
        to = i * (tiles * BD) + j if SIDE == 1 else at
        step = -rate * tl.load(steps + first.to(tl.int64) * (R * BD) + to, mask=inside, other=0.0).to(tl.float32)
        step = _apply(M, tl.where(alive, step, 0.0), False, SIDE, R, RP, BD, PREC)
    else:
        z = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scalars + 7)
        z = tl.where(alive, z, 0.0)
        if HAS_M and MODE < 3:
            z = _apply(M, z, MODE == 1, SIDE, R, RP, BD, PREC)
        m, v = _moments(m_ptr, v_ptr, at, inside, alive, z, b1, b2, ST)
        step = -rate * share * m / (tl.sqrt(v) * root + eps / share)
        step = tl.where(alive, step, 0.0)
        if HAS_M and (MODE == 1 or MODE == 2):
            step = _apply(M, step, False, SIDE, R, RP, BD, PREC)
    if MODE == 3:
        direction = tl.where(alive, m.to(ST).to(tl.float32), 0.0)
        if HAS_M:
            direction = _apply(M, direction, False, SIDE, R, RP, BD, PREC)
        direction = tl.where(alive, direction, 0.0)
        tl.store(partials + 2 * pid, tl.sum(tl.sum(step * step, 1), 0))
        tl.store(partials + 2 * pid + 1, tl.sum(tl.sum(direction * direction, 1), 0))
    else:
        p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.where(alive, p * keep + step, 0.0)
        tl.store(p_ptr + at, _round(p, seed, at, PT, STOCHASTIC), mask=inside)


@triton.jit
def _update(
    tiles, pointers, meta, scalars, partials, seed, steps,
    MODE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, NP: tl.constexpr,
    PT: tl.constexpr, GT: tl.constexpr, ST: tl.constexpr, PREC: tl.constexpr,
    HAS_M: tl.constexpr, HAS_K: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Run `_tile` for tile ``tiles[pid]`` = (tensor, block).

    ``pointers[tensor]`` = (p, g, m, v, M, k), null for no M or k; ``meta[tensor]`` = (d, side, slab, first
    tile, tiles). For polar ``partials`` are the matrices [tensors, R, R], and ``steps`` what `polar._advance` left.
    """
    pid = tl.program_id(0)
    tensor = tl.load(tiles + 2 * pid)
    d0 = tl.load(tiles + 2 * pid + 1) * BD
    at, info = pointers + 6 * tensor, meta + 5 * tensor
    p_ptr = tl.load(at).to(tl.pointer_type(PT))
    g_ptr = tl.load(at + 1).to(tl.pointer_type(GT))
    m_ptr = tl.load(at + 2).to(tl.pointer_type(ST))
    v_ptr = tl.load(at + 3).to(tl.pointer_type(ST))
    # made in between, or in a fixed place
    M = partials + tensor.to(tl.int64) * (R * R) if MODE == 6 else tl.load(at + 4).to(tl.pointer_type(tl.float32))
    k_ptr = tl.load(at + 5).to(tl.pointer_type(tl.int64))
    D = tl.load(info)
    d0 = tl.multiple_of(d0, BD)
    if ALIGN:
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        D = tl.multiple_of(D, 16)
    mine = scalars + 9 * tl.load(info + 2)
    first, count = tl.load(info + 3), tl.load(info + 4)
    noise = 0
    if STOCHASTIC:
        noise = tl.load(seed) + tensor.to(tl.int64) * 1000003 + tl.load(mine + 8).to(tl.int64) * 7919
    if tl.load(mine) != 0:
        # two calls, not one with a runtime side: the tiles of A and B have different shapes
        if tl.load(info + 1) == 1:
            _tile(
                p_ptr, g_ptr, m_ptr, v_ptr, M, k_ptr, mine, partials, first, count, noise, steps, d0, D,
                1, MODE, R, RP, BD, NP, PT, ST, PREC, HAS_M, HAS_K, STOCHASTIC,
            )  # fmt: skip
        else:
            _tile(
                p_ptr, g_ptr, m_ptr, v_ptr, M, k_ptr, mine, partials, first, count, noise, steps, d0, D,
                2, MODE, R, RP, BD, NP, PT, ST, PREC, HAS_M, HAS_K, STOCHASTIC,
            )  # fmt: skip
