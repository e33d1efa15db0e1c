"""Inverses of damped factors, all pairs of a rank in one launch.

(Ŝ + λI)⁻¹ with Ŝ = S · k/tr(S), by Gauss-Jordan elimination in registers. Without pivoting, which a positive definite
matrix does not need, its pivots are those of LDLᵀ: all positive exactly when the matrix is positive definite, which is
how "broken" is seen.

Hazards. Only float32: float64 factors fall back. Offsets are int64. Failures as the reference decides them: empty →
identity, broken → previous or identity. The forward error is about condition · 1e-8, the condition at most r/λ + 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

INTEGERS = (torch.int64, torch.int32)
LEAST_DAMPING = 1e-6  # below it float32 may lose the damping to the rounding of Ŝ, where the float64 reference does not


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
def _rank(k, l, L, HAS_K: tl.constexpr, R: tl.constexpr):
    """Return the live ranks [G] of matrices ``l``."""
    rank = tl.where(l < L, R, 0)
    if HAS_K:
        rank = tl.minimum(tl.load(k + l, mask=l < L, other=0).to(tl.int32), rank)
    return rank


@triton.jit
def _alive(rank, RP: tl.constexpr):
    """Return which directions are live [G, RP]."""
    return tl.arange(0, RP)[None, :] < rank[:, None]


@triton.jit
def _normalise(S, at, inside, rank, R: tl.constexpr, RP: tl.constexpr):
    """Return Ŝ on the live block (the identity elsewhere and where unusable), usable, and empty."""
    i = tl.arange(0, RP)
    X = 0.5 * tl.load(S + at, mask=inside, other=0.0)
    X = X + tl.permute(X, (0, 2, 1))
    eye = (i[:, None] == i[None, :])[None, :, :]
    alive = _alive(rank, RP)
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
def _inverse(
    S, k, previous, damping, out, L,
    HAS_K: tl.constexpr, HAS_PREVIOUS: tl.constexpr, ON_DEVICE: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Out ← (Ŝ + λI)⁻¹ of G matrices a program; λ a number, or (ON_DEVICE) a pointer to one."""
    i = tl.arange(0, RP)
    l, start, at, inside = _offsets(L, R, RP, G)
    rank = _rank(k, l, L, HAS_K, R)
    X, usable, empty = _normalise(S + start, at, inside, rank, R, RP)
    eye = (i[:, None] == i[None, :])[None, :, :]
    shift = tl.load(damping).to(tl.float32) if ON_DEVICE else damping
    Y, positive = _gauss_jordan(tl.where(eye, X + shift, X), R, RP)
    Y = 0.5 * (Y + tl.permute(Y, (0, 2, 1)))
    unit = tl.where(eye, 1.0, 0.0) + tl.zeros([G, RP, RP], tl.float32)
    alive = _alive(rank, RP)
    Y = tl.where(alive[:, :, None] & alive[:, None, :], Y, unit)
    if HAS_PREVIOUS:
        old = tl.load(previous + start + at, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(empty[:, None, None], unit, old)
    keep = (usable & positive)[:, None, None] & (tl.abs(Y) < float("inf"))
    tl.store(out + start + at, tl.where(keep, Y, unit), mask=inside)


def damped_inverse(
    S: Tensor, damping: float | Tensor, k: Tensor | None = None, previous: Tensor | None = None
) -> Tensor:
    """Return (Ŝ + λI)⁻¹ ``[L, r, r]``; arguments and failures as the reference."""
    L, r = S.shape[0], S.shape[-1]
    rp = launch.padded(r, 4)
    c = launch.config("inverse", rp)
    assert c is not None, "refused by supports()"
    out = torch.empty_like(S)
    on_device = isinstance(damping, Tensor)
    launch.run(
        _inverse, (triton.cdiv(L, c.group),), S, S if k is None else k, S if previous is None else previous,
        damping if on_device else float(damping), out, L,
        HAS_K=k is not None, HAS_PREVIOUS=previous is not None, ON_DEVICE=on_device, R=r, RP=rp, G=c.group,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out


def supports(S: Tensor, damping: float | Tensor = 1.0, k: Tensor | None = None, previous: Tensor | None = None) -> bool:
    """Return whether the kernels here take these arguments."""
    matrices = [S] if previous is None else [S, previous]
    fits = S.dim() == 3 and 1 <= S.shape[-1] <= launch.MAX_RANK and S.numel() > 0
    fits = fits and damps(damping, S.device) and (k is None or _counts(k, S))
    return fits and launch.plain(matrices, (torch.float32,))


def damps(damping: float | Tensor, device: torch.device) -> bool:
    """Return whether the kernels on this device take this damping."""
    return launch.reads(damping, device) and (isinstance(damping, Tensor) or damping >= LEAST_DAMPING)


def _counts(k: Tensor, S: Tensor) -> bool:
    return launch.plain([k], INTEGERS) and k.device == S.device
