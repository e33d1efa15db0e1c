"""Eigenbasis of factors by parallel Jacobi rotations, all pairs of a rank in one launch.

With XOR as the round-robin schedule, step m = 1 … RP−1 pairs every index i with i ⊕ m: RP/2 disjoint rotations at
once, every pair once per sweep. A rotation annihilates the entry of its pair:

    τ = (a_qq − a_pp) / 2a_pq,   t = sign(τ) / (|τ| + √(1 + τ²)),   c = 1/√(1 + t²),   s = t c,   h = s/(1 + c),
    A ← J A Jᵀ,   W ← J W,       row_i ← row_i − s_i (row_{i⊕m} + h_i row_i)      (c = 1 − s h).

t is odd in τ, so both ends of a pair compute the same rotation from their own side; and the rounding of this form is
proportional to s, so that the thousands of small late rotations do not wear W's orthogonality down. Sweeps stop for a
group of matrices once every entry met in one was below about ε √(a_pp a_qq) (relative, so that small eigenvalues of a
graded factor get accurate vectors too), at the latest after SWEEPS.

Hazards. Only float32: float64 factors fall back. Eigenvectors are unique up to sign, and not at all among equal
eigenvalues: compare residuals and subspaces, never entries. Rows are gathered through shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .inverse import _alive, _normalise, _offsets, _rank
from .inverse import supports as _supports

SWEEPS = 15
REGISTER_RANK = 64  # above it, rotations are kept in memory for want of registers


@triton.jit
def _rotate(X, s, h, partner, AXIS: tl.constexpr, G: tl.constexpr, RP: tl.constexpr):
    """Return the rotated rows (AXIS 1) or columns (AXIS 2) of a stack."""
    if AXIS == 1:
        other = tl.gather(X, tl.broadcast_to(partner[None, :, None], (G, RP, RP)), 1)
        turned = X - s[:, :, None] * (other + h[:, :, None] * X)
    else:
        other = tl.gather(X, tl.broadcast_to(partner[None, None, :], (G, RP, RP)), 2)
        turned = X - s[:, None, :] * (other + h[:, None, :] * X)
    return turned


@triton.jit
def _angles(own, other, entry, scale, upward_on_tie):
    """Return s, h of every row's rotation and the largest relative entry of each matrix."""
    size = tl.abs(entry) / (tl.sqrt(tl.abs(own) * tl.abs(other)) + scale)
    rotate = tl.abs(entry) > 1e-30
    tau = (other - own) / tl.where(rotate, 2.0 * entry, 1.0)
    upward = (tau > 0) | ((tau == 0) & upward_on_tie)
    root = tl.sqrt(1.0 + tau * tau)
    t = tl.where(upward, 1.0, -1.0) / (tl.abs(tau) + root)
    t = tl.where(rotate, t, 0.0)
    c = 1.0 / tl.sqrt(1.0 + t * t)
    s = t * c
    return s, s / (1.0 + c), tl.max(size, 1)


@triton.jit
def _sweep(A, W, scale, G: tl.constexpr, RP: tl.constexpr):
    """Return A, W after one rotation of every pair, and the largest relative entry met on the way."""
    i = tl.arange(0, RP)
    rows, cols = i[None, :, None], i[None, None, :]
    worst = tl.zeros([G], tl.float32)
    for m in range(1, RP):
        partner = i ^ m
        own = tl.sum(tl.where(rows == cols, A, 0.0), 2)
        entry = tl.sum(tl.where((rows ^ m) == cols, A, 0.0), 2)
        index = tl.broadcast_to(partner[None, :], (G, RP))
        # rounding breaks the symmetry of A; both ends must see the same entry
        entry = 0.5 * (entry + tl.gather(entry, index, 1))
        s, h, size = _angles(own, tl.gather(own, index, 1), entry, scale, (i < partner)[None, :])
        worst = tl.maximum(worst, size)
        A = _rotate(_rotate(A, s, h, partner, 1, G, RP), s, h, partner, 2, G, RP)
        A = tl.where((rows ^ m) == cols, 0.0, A)
        W = _rotate(W, s, h, partner, 1, G, RP)
    return A, W, worst


@triton.jit
def _rotate_memory(X, s, h, m, AXIS: tl.constexpr, RP: tl.constexpr):
    """Rotate rows or columns of one matrix in memory; everything is read before anything is written."""
    i, j = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    own = tl.load(X + i * RP + j)
    if AXIS == 0:
        turned = own - s[:, None] * (tl.load(X + (i ^ m) * RP + j) + h[:, None] * own)
    else:
        turned = own - s[None, :] * (tl.load(X + i * RP + (j ^ m)) + h[None, :] * own)
        turned = tl.where((i ^ m) == j, 0.0, turned)
    tl.debug_barrier()
    tl.store(X + i * RP + j, turned)
    tl.debug_barrier()


@triton.jit
def _sweep_memory(A, W, scale, RP: tl.constexpr):
    """Do what `_sweep` does, on one matrix whose A and W are in memory (L1-sized), for want of registers."""
    i = tl.arange(0, RP)
    worst = tl.zeros([1], tl.float32)
    for m in range(1, RP):
        partner = i ^ m
        own, other = tl.load(A + i * (RP + 1)), tl.load(A + partner * (RP + 1))
        entry = 0.5 * (tl.load(A + i * RP + partner) + tl.load(A + partner * RP + i))
        s, h, size = _angles(own[None, :], other[None, :], entry[None, :], scale, (i < partner)[None, :])
        worst = tl.maximum(worst, size)
        s, h = tl.reshape(s, (RP,)), tl.reshape(h, (RP,))
        tl.debug_barrier()
        _rotate_memory(A, s, h, m, 0, RP)
        _rotate_memory(A, s, h, m, 1, RP)
        _rotate_memory(W, s, h, m, 0, RP)
    return worst


@triton.jit
def _jacobi(
    S, k, previous, work, out, values, L,
    HAS_K: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, G: tl.constexpr, SWEEPS: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """out, values ← eigenvectors (columns) and eigenvalues of Ŝ, in descending order, dead directions last.

    IN_MEMORY (with G = 1) keeps A and W in ``work`` [L, 2, RP, RP].
    """
    i = tl.arange(0, RP)
    rows, cols = i[None, :, None], i[None, None, :]
    l, start, at, inside = _offsets(L, R, RP, G)
    rank = _rank(k, l, L, HAS_K, R)
    A, usable, empty = _normalise(S + start, at, inside, rank, R, RP)
    W = tl.where(rows == cols, 1.0, 0.0) + tl.zeros([G, RP, RP], tl.float32)
    # entries below ε · 1e-3 of the mean eigenvalue are noise of a rank-deficient factor
    scale, tolerance = 1e-3, 2e-7
    going = 1
    if IN_MEMORY:
        A_at = work + tl.program_id(0).to(tl.int64) * (2 * RP * RP)
        W_at = A_at + RP * RP
        inner = rows * RP + cols
        tl.store(A_at + inner, A)
        tl.store(W_at + inner, W)
        tl.debug_barrier()
        for _ in range(SWEEPS):
            if going > 0:
                worst = _sweep_memory(A_at, W_at, scale, RP)
                going = tl.where(tl.max(worst, 0) > tolerance, 1, 0)
        found = tl.load(A_at + i * (RP + 1))[None, :]
        W = tl.load(W_at + inner)
    else:
        for _ in range(SWEEPS):
            if going > 0:
                A, W, worst = _sweep(A, W, scale, G, RP)
                going = tl.where(tl.max(worst, 0) > tolerance, 1, 0)
        found = tl.sum(tl.where(rows == cols, A, 0.0), 2)
    found = tl.maximum(found, 0.0)
    alive = _alive(rank, RP)
    live = alive[:, :, None] & alive[:, None, :]
    unit = tl.where(rows == cols, 1.0, 0.0) + tl.zeros([G, RP, RP], tl.float32)
    # dead directions sort below everything, in their own order; ties keep theirs
    key = tl.where(alive, found, -1.0 - i[None, :].to(tl.float32))
    ahead = (key[:, None, :] > key[:, :, None]) | ((key[:, None, :] == key[:, :, None]) & (cols < rows))
    place = tl.sum(ahead.to(tl.int32), 2)
    known = tl.where(alive & usable[:, None], found, 0.0)
    line = tl.arange(0, G)[:, None] * R + place
    tl.store(values + tl.program_id(0).to(tl.int64) * (G * R) + line, known, mask=(l < L)[:, None] & (i < R)[None, :])
    # row i of W is an eigenvector: it becomes column place[i]
    W = tl.where(live, W, unit)
    keep = usable[:, None, None] & (tl.abs(W) < float("inf"))
    place = tl.where(usable[:, None], place, i[None, :])
    at = tl.arange(0, G)[:, None, None] * (R * R) + cols * R + place[:, :, None]
    inside = (l < L)[:, None, None] & (rows < R) & (cols < R)
    if HAS_PREVIOUS:
        old = tl.load(previous + start + at, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(empty[:, None, None], unit, old)
    tl.store(out + start + at, tl.where(keep, W, unit), mask=inside)


def supports(S: Tensor, k: Tensor | None = None, previous: Tensor | None = None) -> bool:
    """Return whether `eigenbasis` takes these arguments."""
    return _supports(S, 1.0, k, previous)


def eigenbasis(S: Tensor, k: Tensor | None = None, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return Q ``[L, r, r]`` and eigenvalues of Ŝ ``[L, r]`` (float32); arguments and failures as the reference."""
    L, r = S.shape[0], S.shape[-1]
    rp = launch.padded(r, 4)
    c = launch.config("eigenbasis", rp)
    assert c is not None, "refused by supports()"
    out, values = torch.empty_like(S), S.new_empty(L, r)
    work = S.new_empty(L, 2, rp, rp) if rp > REGISTER_RANK else out
    launch.run(
        _jacobi, (triton.cdiv(L, c.group),),
        S, S if k is None else k, S if previous is None else previous, work, out, values, L,
        HAS_K=k is not None, HAS_PREVIOUS=previous is not None, R=r, RP=rp, G=c.group,
        SWEEPS=SWEEPS, IN_MEMORY=rp > REGISTER_RANK, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out, values
