"""Inverse and inverse root of damped factors, all pairs of a rank in one launch.

Both are rational functions of Ŝ = S · k/tr(S): the inverse has one pole, (Ŝ + λI)⁻¹, and the inverse root a
quadrature of poles, all with positive weights (Hale, Higham & Trefethen 2008, with A = Ŝ + λI):

    A^(-1/2) = (2/π) ∫₀^∞ (A + t²)⁻¹ dt ≈ Σ_q w_q (A + t_q²)⁻¹,

the midpoint rule after t = √λ · sc(v | 1 − λ/(r+λ)). The spectrum of A lies in [λ, r + λ] because tr(Ŝ) = k ≤ r, so
the nodes are known on the host and nothing is read back. Each pole is inverted by Gauss-Jordan elimination in
registers; without pivoting, which a positive definite matrix does not need, its pivots are those of LDLᵀ: all
positive exactly when the matrix is positive definite, which is how "broken" is seen.

Hazards. Only float32: float64 factors fall back. Offsets are int64. Failures as the reference decides them: empty →
identity, broken → previous or identity. The forward error is about condition · 1e-8, the condition at most r/λ + 1.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables

INTEGERS = (torch.int64, torch.int32)
LEAST_DAMPING = 1e-6  # below it a float32 elimination may break down where the float64 reference does not
LEAST_ON_DEVICE = 1e-4  # of a damping that is a tensor
REGISTER_RANK = 64  # above it, sums and rotations are kept in memory for want of registers


@triton.jit
def _offsets(L, R: tl.constexpr, RP: tl.constexpr, G: tl.constexpr):
    """Return this program's matrices ``l``, where they start (int64), the int32 offsets from there, and the mask."""
    l = tl.program_id(0) * G + tl.arange(0, G)
    i = tl.arange(0, RP)
    inside = (l < L)[:, None, None] & (i < R)[None, :, None] & (i < R)[None, None, :]
    start = tl.program_id(0).to(tl.int64) * (G * R * R)
    own = tl.arange(0, G)[:, None, None] * (R * R)
    return l, start, own + i[None, :, None] * R + i[None, None, :], inside


@triton.jit
def _alive(k, l, L, HAS_K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """Return which directions of matrices ``l`` are live [G, RP]."""
    rank = tl.where(l < L, R, 0)
    if HAS_K:
        rank = tl.minimum(tl.load(k + l, mask=l < L, other=0).to(tl.int32), rank)
    return tl.arange(0, RP)[None, :] < rank[:, None]


@triton.jit
def _normalise(S, at, inside, l, L, k, HAS_K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """Return Ŝ on the live block (the identity elsewhere and where unusable), usable, and empty."""
    i = tl.arange(0, RP)
    X = 0.5 * tl.load(S + at, mask=inside, other=0.0)
    X = X + tl.permute(X, (0, 2, 1))
    eye = (i[:, None] == i[None, :])[None, :, :]
    alive = _alive(k, l, L, HAS_K, R, RP)
    rank = tl.sum(alive.to(tl.int32), 1)
    live = alive[:, :, None] & alive[:, None, :]
    X = tl.where(live, X, 0.0)
    empty = tl.sum(tl.sum(tl.where(eye, X, 0.0), 2), 1) == 0
    bad = tl.sum(tl.sum(tl.where(tl.abs(X) < float("inf"), 0, 1), 2), 1)
    # by the largest diagonal entry first: the sum of a trace must not overflow, nor its reciprocal
    top = tl.max(tl.max(tl.where(eye, tl.abs(X), 0.0), 2), 1)
    X = X / tl.where((bad == 0) & (top > 0), top, 1.0)[:, None, None]
    trace = tl.sum(tl.sum(tl.where(eye, X, 0.0), 2), 1)
    usable = (bad == 0) & (trace > 0)
    X = X * (rank / tl.where(usable, trace, 1.0))[:, None, None]
    X = tl.where(live & usable[:, None, None], X, tl.where(eye, 1.0, 0.0))
    return X, usable, empty


@triton.jit
def _gauss_jordan(M, R: tl.constexpr, RP: tl.constexpr):
    """Return M⁻¹ of a stack and whether every pivot was positive."""
    i = tl.arange(0, RP)
    rows, cols = i[None, :, None], i[None, None, :]
    positive = tl.max(tl.max(M, 2), 1) > 0
    for j in range(R):
        on_row, on_col = rows == j, cols == j
        row = tl.sum(tl.where(on_row, M, 0.0), 1)
        col = tl.sum(tl.where(on_col, M, 0.0), 2)
        pivot = tl.sum(tl.where(i[None, :] == j, row, 0.0), 1)
        positive = positive & (pivot > 0)
        row = row * (1.0 / pivot)[:, None]
        # on the pivot's row and column the old entries are replaced, not updated
        rest = tl.where(on_row | on_col, 0.0, M) - tl.where(on_row, 0.0, col[:, :, None]) * tl.where(
            on_col, (1.0 / pivot)[:, None, None], row[:, None, :]
        )
        M = tl.where(on_row, tl.where(on_col, (1.0 / pivot)[:, None, None], row[:, None, :]), rest)
    return M, positive


@triton.jit
def _rational(
    S, k, previous, poles, out, L,
    HAS_K: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """Out ← Σ_q w_q (Ŝ + s_q I)⁻¹ with ``poles`` = (s, w) [Q, 2]; the first pole decides what is positive definite.

    IN_MEMORY keeps the sum in ``out`` where registers have no room for it.
    """
    i = tl.arange(0, RP)
    l, start, at, inside = _offsets(L, R, RP, G)
    S, out, previous = S + start, out + start, previous + start
    X, usable, empty = _normalise(S, at, inside, l, L, k, HAS_K, R, RP)
    eye = (i[:, None] == i[None, :])[None, :, :]
    total = tl.zeros([G, RP, RP], tl.float32)
    good = usable
    for q in range(Q):
        shift, weight = tl.load(poles + 2 * q), tl.load(poles + 2 * q + 1)
        Y, positive = _gauss_jordan(tl.where(eye, X + shift, X), R, RP)
        good = good & (positive | (q > 0))
        Y = tl.where(weight > 0, weight * Y, 0.0)
        if IN_MEMORY:
            tl.store(out + at, Y + tl.load(out + at, mask=inside & (q > 0), other=0.0), mask=inside)
        else:
            total += Y
    if IN_MEMORY:
        total = tl.load(out + at, mask=inside, other=0.0)
    total = 0.5 * (total + tl.permute(total, (0, 2, 1)))
    unit = tl.where(eye, 1.0, 0.0) + tl.zeros([G, RP, RP], tl.float32)
    alive = _alive(k, l, L, HAS_K, R, RP)
    live = alive[:, :, None] & alive[:, None, :]
    total = tl.where(live, total, unit)
    if HAS_PREVIOUS:
        old = tl.load(previous + at, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(empty[:, None, None], unit, old)
    keep = good[:, None, None] & (tl.abs(total) < float("inf"))
    tl.store(out + at, tl.where(keep, total, unit), mask=inside)


def damped_inverse(
    S: Tensor, damping: float | Tensor, k: Tensor | None = None, previous: Tensor | None = None
) -> Tensor:
    """Return (Ŝ + λI)⁻¹ ``[L, r, r]``; arguments and failures as the reference."""
    return _launch(S, damping, ((0.0, 1.0),), k, previous)


def damped_inverse_root(
    S: Tensor, damping: float | Tensor, k: Tensor | None = None, previous: Tensor | None = None
) -> Tensor:
    """Return (Ŝ + λI)^(-1/2) ``[L, r, r]``; arguments and failures as the reference.

    A tensor λ is not read on the host: the nodes are then those of all of [`LEAST_ON_DEVICE`, 1], about twice as many.
    """
    least, largest = (LEAST_ON_DEVICE, 1.0) if isinstance(damping, Tensor) else (damping, damping)
    return _launch(S, damping, ((0.0, 0.0), *quadrature(least, S.shape[-1] + largest)), k, previous)


def supports(S: Tensor, damping: float | Tensor = 1.0, k: Tensor | None = None, previous: Tensor | None = None) -> bool:
    """Return whether the kernels here take these arguments."""
    matrices = [S] if previous is None else [S, previous]
    fits = S.dim() == 3 and 1 <= S.shape[-1] <= launch.MAX_RANK and S.numel() > 0
    fits = fits and damps(damping, S.device) and (k is None or _counts(k, S))
    return fits and launch.plain(matrices, (torch.float32,))


def damps(damping: float | Tensor, device: torch.device) -> bool:
    """Return whether the kernels on this device take this damping."""
    if isinstance(damping, Tensor):
        return damping.device == device and damping.numel() == 1
    return damping >= LEAST_DAMPING


def _counts(k: Tensor, S: Tensor) -> bool:
    return launch.plain([k], INTEGERS) and k.device == S.device


def _launch(
    S: Tensor,
    damping: float | Tensor,
    poles: tuple[tuple[float, float], ...],
    k: Tensor | None,
    previous: Tensor | None,
) -> Tensor:
    """Launch with poles (s, w) of Ŝ + λI."""
    L, r = S.shape[0], S.shape[-1]
    rp = launch.padded(r, 4)
    c = launch.config("rational", rp)
    out = torch.empty_like(S)
    shift = 0.0 if isinstance(damping, Tensor) else damping
    table = tables.on_device([x for s, w in poles for x in (shift + s, w)], torch.float32, S.device)
    if isinstance(damping, Tensor):
        table = table.clone()
        table[::2] += damping.to(torch.float32)
    _rational[(triton.cdiv(L, c.group),)](
        S, S if k is None else k, S if previous is None else previous, table, out, L,
        HAS_K=k is not None, HAS_PREVIOUS=previous is not None, R=r, RP=rp, G=c.group, Q=len(poles),
        IN_MEMORY=rp > REGISTER_RANK and len(poles) > 1, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out


@lru_cache(maxsize=256)
def quadrature(smallest: float, largest: float, tolerance: float = 1e-7) -> tuple[tuple[float, float], ...]:
    """Return pairs (t², w) with x^(-1/2) ≈ Σ w/(x + t²) on [smallest, largest] to a relative ``tolerance``.

    The error falls as exp(−2π²n/(ln κ + 3)) in the number of nodes n.
    """
    kappa = max(largest / smallest, 1.0 + 1e-6)
    n = math.ceil((math.log(1 / tolerance) + 1.5) * (math.log(kappa) + 3) / (2 * math.pi**2))
    m = 1 - 1 / kappa
    K = math.pi / (2 * _agm(1.0, math.sqrt(1 - m)))
    nodes = []
    for q in range(n):
        sn, cn, dn = _jacobi((q + 0.5) * K / n, m)
        weight = 2 / math.pi * K / n * math.sqrt(smallest) * dn / cn**2
        nodes.append((smallest * (sn / cn) ** 2, weight))
    return tuple(nodes)


def _agm(a: float, b: float) -> float:
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a


def _jacobi(v: float, m: float) -> tuple[float, float, float]:
    """Return sn, cn, dn of argument ``v`` and parameter ``m`` in (0, 1), by descending Landen transformations."""
    a, c, b = [1.0], [math.sqrt(m)], math.sqrt(1 - m)
    while abs(c[-1]) > 1e-15 and len(a) < 40:
        mean, half = (a[-1] + b) / 2, (a[-1] - b) / 2
        b = math.sqrt(a[-1] * b)
        a.append(mean)
        c.append(half)
    phi = 2.0 ** (len(a) - 1) * a[-1] * v
    for n in range(len(a) - 1, 0, -1):
        phi = (math.asin(c[n] / a[n] * math.sin(phi)) + phi) / 2
    sn, cn = math.sin(phi), math.cos(phi)
    return sn, cn, math.sqrt(1 - m * sn * sn)
