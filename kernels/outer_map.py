"""The algebra of the outer factors, all matrices in one launch: `curvopt.functional.outer.outer_map` on the device.

One program a matrix. What is of size r + k stays in memory, where the map is made in place of its intermediate
results, and one product after the other is read from there, with a barrier after every write:

    [H' | P'] = [G Gᵀ / t | G Vᵀ / √t];    HP = H' P';    Γ = D² + s (D X + X D) + s² P'ᵀ HP,   X = P'ᵀP'
    U = L₁⁻¹ of Γ = L₁ Δ L₁ᵀ  (in registers);    keep = Δ^(-1/2) U D,    take = s Δ^(-1/2) U P'ᵀ
    P'' = H' takeᵀ + P' keepᵀ;    μ, ρ, c, w as the reference;    M = [c I | √t P'' w; take/√t | keep]

The triangular inverse is found by elimination without pivoting, of which Γ, positive definite, has no need: U grows in
the place of the entries that are eliminated. A pivot that is not positive makes a root that is not finite, and the map
is then the identity, as for all that is not finite.

Hazards. Only float32, and at most MAX_DIRECTIONS directions. The map, its eigenvalues and its trace are new tensors:
nothing is changed in place. Entries of a matrix are read by other threads than wrote them: no write without a barrier
before what reads it.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .inverse import damps

MAX_DIRECTIONS = 64  # beyond them the elimination does not fit a program's registers


@triton.jit
def _matrix(X, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, i, j):
    """Return entries (i, j) of a matrix in memory with these strides; zero outside."""
    return tl.load(X + i * row + j * col, mask=(i < ROWS) & (j < COLS), other=0.0)


@triton.jit
def _times(
    Z, A, a_row, a_col, B, b_row, b_col,
    I: tl.constexpr, N: tl.constexpr, J: tl.constexpr, IP: tl.constexpr, NP: tl.constexpr, JP: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Return Z + A B, A ``(I, N)`` and B ``(N, J)`` in memory with these strides, padded; slices of 32 of N."""
    C: tl.constexpr = 16 if NP == 16 else 32
    i, c, j = tl.arange(0, IP)[:, None], tl.arange(0, C), tl.arange(0, JP)[None, :]
    for n in range(NP // C):
        a = _matrix(A, a_row, a_col, I, N, i, (n * C + c)[None, :])
        b = _matrix(B, b_row, b_col, N, J, (n * C + c)[:, None], j)
        Z = tl.dot(a, b, Z, input_precision=PREC)
    return Z


@triton.jit
def _eliminated(M, K: tl.constexpr, KP: tl.constexpr):
    """Return Δ on the diagonal and U, of which the diagonal is one, below: U M Uᵀ = Δ."""
    i = tl.arange(0, KP)
    rows, cols = i[:, None], i[None, :]
    for n in range(K - 1):
        row = tl.sum(tl.where(rows == n, M, 0.0), 0)
        col = tl.sum(tl.where(cols == n, M, 0.0), 1)
        pivot = tl.sum(tl.where(i == n, row, 0.0), 0)
        factor = tl.where(i > n, col / pivot, 0.0)
        # what stands left of the pivot is U's so far; the pivot's own column takes the new entries of U
        M = tl.where((cols == n) & (rows > n), -factor[:, None], M - tl.where(cols == n, 0.0, factor[:, None] * row))
    return M


@triton.jit
def _outer_map(
    products, mu, trace, width, found_inf, decay, damping, maps, new_mu, new_trace,
    R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr, DECAY_ON_DEVICE: tl.constexpr,
    DAMPING_ON_DEVICE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Make the map of one matrix: ``products`` [T, R, R + K], ``maps`` [T, R + K, R + K]."""
    N: tl.constexpr = R + K
    tensor = tl.program_id(0)
    H = products + tensor.to(tl.int64) * (R * N)
    P = H + R
    M11 = maps + tensor.to(tl.int64) * (N * N)
    M12, M21, M22 = M11 + R, M11 + R * N, M11 + R * N + R
    beta = tl.load(decay).to(tl.float32) if DECAY_ON_DEVICE else decay
    lam = tl.load(damping).to(tl.float32) if DAMPING_ON_DEVICE else damping
    d = tl.load(width + tensor).to(tl.float32)
    r, k = tl.arange(0, RP), tl.arange(0, KP)
    ri, ki, rj, kj = r[:, None], k[:, None], r[None, :], k[None, :]

    old_trace = tl.load(trace + tensor)
    diagonal = tl.load(H + r * (N + 1), mask=r < R, other=0.0)
    total = beta * old_trace + (1.0 - beta) * (tl.sum(diagonal, 0) / R)
    t = tl.where(total > 0, total, 1.0)
    root = tl.sqrt(t)
    old_mu = tl.load(mu + tensor * K + k, mask=k < K, other=0.0)
    before = old_mu / t
    few = tl.maximum(d - K, 1.0)
    rest = tl.maximum((old_trace / t - tl.sum(before, 0)) / few, 0.0)
    share = (1.0 - beta) / R
    D = beta * before + lam / d

    # P' in M12's place, then Γ; what is beside the diagonal of Γ outside of K is zero
    p = _matrix(P, N, 1, R, K, ri, kj) / root
    tl.store(M12 + ri * N + kj, p, mask=(ri < R) & (kj < K))
    h = _matrix(H, N, 1, R, R, ri, rj) / t
    tl.store(M11 + ri * N + rj, h, mask=(ri < R) & (rj < R))
    tl.debug_barrier()
    half = _times(tl.zeros([RP, KP], tl.float32), M11, N, 1, M12, N, 1, R, R, K, RP, RP, KP, PREC)
    half = half * (0.5 * share) + p * D[None, :]
    tl.store(M21 + kj * N + ri, half, mask=(ri < R) & (kj < K))  # the other way round: there is room for k×r
    tl.debug_barrier()
    gram = _times(tl.zeros([KP, KP], tl.float32), M12, 1, N, M21, 1, N, K, R, K, KP, RP, KP, PREC) * share
    gram = gram + tl.trans(gram)
    gram = tl.where(ki == kj, gram + (D * D)[:, None], gram)
    U = _eliminated(tl.where((ki < K) & (kj < K), gram, tl.where(ki == kj, 1.0, 0.0)), K, KP)
    pivots = tl.sum(tl.where(ki == kj, U, 0.0), 1)
    keep = tl.where(ki > kj, U, tl.where(ki == kj, 1.0, 0.0)) / tl.sqrt(pivots)[:, None]
    tl.store(M22 + ki * N + kj, keep, mask=(ki < K) & (kj < K))
    tl.debug_barrier()
    take = share * _times(tl.zeros([KP, RP], tl.float32), M22, N, 1, M12, 1, N, K, K, R, KP, KP, RP, PREC)
    keep = keep * D[None, :]
    tl.debug_barrier()
    tl.store(M21 + ki * N + rj, take, mask=(ki < K) & (rj < R))
    tl.store(M22 + ki * N + kj, keep, mask=(ki < K) & (kj < K))
    tl.debug_barrier()

    turned = _times(keep, M21, N, 1, M12, N, 1, K, R, K, KP, RP, KP, PREC)
    turned = turned * turned
    kept = tl.sum(turned * before[None, :], 1) + rest * tl.maximum(1.0 - tl.sum(turned, 1), 0.0)
    fresh = _times(tl.zeros([RP, KP], tl.float32), M11, N, 1, M21, 1, N, R, R, K, RP, RP, KP, PREC)
    fresh = _times(fresh, M12, N, 1, M22, 1, N, R, K, K, RP, KP, KP, PREC)  # G V'ᵀ
    values = tl.where(k < K, beta * kept + share * tl.sum(fresh * fresh, 0), 0.0)
    rho = tl.maximum((1.0 - tl.sum(values, 0)) / few, 0.0)
    c = tl.sqrt((1.0 + lam) / (rho * d + lam))
    w = tl.sqrt((1.0 + lam) / (values * d + lam)) - c
    finite = tl.abs(total + tl.sum(values, 0)) < float("inf")
    good = finite & (total > 0) & (tl.load(found_inf).to(tl.float32) == 0)
    tl.debug_barrier()
    tl.store(M11 + ri * N + rj, tl.where(ri == rj, tl.where(good, c, 1.0), 0.0), mask=(ri < R) & (rj < R))
    tl.store(M12 + ri * N + kj, tl.where(good, root * fresh * w[None, :], 0.0), mask=(ri < R) & (kj < K))
    tl.store(M21 + ki * N + rj, tl.where(good, take / root, 0.0), mask=(ki < K) & (rj < R))
    tl.store(M22 + ki * N + kj, tl.where(good, keep, tl.where(ki == kj, 1.0, 0.0)), mask=(ki < K) & (kj < K))
    tl.store(new_mu + tensor * K + k, tl.where(good, values * t, old_mu), mask=k < K)
    tl.store(new_trace + tensor, tl.where(good, total, old_trace))


def outer_map(
    products: Tensor,
    mu: Tensor,
    trace: Tensor,
    d: Tensor,
    decay: float | Tensor,
    damping: float | Tensor,
    found_inf: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the reference returns; tensors β and λ are read on the device."""
    T, r, n = products.shape
    made = products.new_empty(T, n, n), torch.empty_like(mu), torch.empty_like(trace)
    launch.run(
        _outer_map, (T,), products, mu, trace, d, found_inf, decay, damping, *made,
        DECAY_ON_DEVICE=isinstance(decay, Tensor), DAMPING_ON_DEVICE=isinstance(damping, Tensor),
        **_constants(r, n - r, launch.here()),
    )  # fmt: skip
    return made


@lru_cache(maxsize=64)
def _constants(r: int, k: int, target: str) -> dict[str, Any]:
    """Return what the kernel takes of these widths and the configuration of a target."""
    rp, kp = launch.padded(r, 16), launch.padded(k, 16)
    c = launch.shipped("outer_map", max(rp, kp))
    widths = {"R": r, "K": k, "RP": rp, "KP": kp}
    return {**widths, "PREC": c.precision, "num_warps": c.warps, "num_stages": c.stages}


def supports(
    products: Tensor,
    mu: Tensor,
    trace: Tensor,
    d: Tensor,
    decay: float | Tensor,
    damping: float | Tensor,
    found_inf: Tensor,
) -> bool:
    """Return whether the kernel takes these arguments."""
    T, r, n = products.shape
    given = [products, mu, trace, d]
    fits = launch.config("outer_map", launch.padded(max(r, n - r), 16)) is not None
    fits = fits and mu.shape == (T, n - r) and 1 <= r <= launch.MAX_RANK and 1 <= n - r <= MAX_DIRECTIONS and T > 0
    fits = fits and launch.plain(given, (torch.float32,)) and damps(damping, products.device)
    return bool(fits and found_inf.device == products.device and launch.reads(decay, products.device))
