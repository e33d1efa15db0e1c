"""Functions of damped factors, over [L, r, r] stacks: inverse, inverse root, eigenbasis.

Damping is relative: everything is a function of Ŝ + λI with Ŝ = S · k/tr(S), whose mean eigenvalue is one, so
the result has unit scale whatever the scale of S (losses are token means: S_d may be 1e-10).

What failure means, decided here once. An *empty* factor (zero trace, as S_d has while B = 0) gives the identity:
the plain update, never 1/λ. A *broken* one (not finite, negative trace, not positive definite even with damping)
keeps ``previous`` where it is given, else gives the identity. Nothing raises and nothing waits for the device;
callers count failures with `broken`.

All is computed in float64: the condition is at most k/λ + 1, so a Cholesky of a genuine second moment cannot fail,
and r×r work is negligible on the host. (The kernels work in float32 and are held to these functions.)
"""

import torch
from torch import Tensor

from curvopt.functional import live_rows
from curvopt.functional.moments import trace

# a genuine second moment in float32 may have eigenvalues this far below zero, times r, of a mean of one
SLACK = 1e-6


def empty(S: Tensor, k: Tensor | None = None) -> Tensor:
    """Return ``[L]`` booleans: factors with nothing in their live block yet (trace exactly zero)."""
    if k is None:
        return trace(S) == 0
    return torch.where(live_rows(k, S.shape[-1]), S.diagonal(dim1=-2, dim2=-1), 0.0).sum(-1) == 0


def broken(S: Tensor) -> Tensor:
    """Return ``[L]`` booleans: factors that are not finite, or whose trace is negative."""
    return ~(S.isfinite().all(-1).all(-1) & (trace(S) >= 0))


def normalised(S: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return Ŝ = S · k/tr(S) on the live block in float64, symmetric, and which factors are usable.

    Args:
        S: ``[L, r, r]`` second moments.
        k: ``[L]`` live ranks, or None.

    Returns:
        Ŝ ``[L, r, r]`` (zero on dead rows and columns; the identity where S is empty or broken) and ``[L]`` booleans.
    """
    r = S.shape[-1]
    S = S.double()
    S = (S + S.mT) / 2
    rank = torch.full((S.shape[0],), r, device=S.device) if k is None else k
    if k is not None:
        alive = live_rows(k, r)
        S = torch.where(alive[:, :, None] & alive[:, None, :], S, 0.0)
    # by the largest entry first: a subnormal trace would overflow its reciprocal
    size = S.abs().amax((-2, -1), keepdim=True)
    S = S / torch.where((size > 0) & size.isfinite(), size, 1.0)
    usable = ~(empty(S) | broken(S))
    S_hat = S * (rank / torch.where(usable, trace(S), 1.0))[:, None, None]
    return torch.where(usable[:, None, None], S_hat, torch.eye(r, dtype=S.dtype, device=S.device)), usable


def damped_inverse(
    S: Tensor, damping: float | Tensor, k: Tensor | None = None, previous: Tensor | None = None
) -> Tensor:
    """Return (Ŝ + λI)⁻¹ by Cholesky.

    Args:
        S: ``[L, r, r]`` second moments.
        damping: λ > 0, relative to the mean eigenvalue; a 0-d tensor is not read on the host.
        k: ``[L]`` live ranks, or None; the inverse is the identity on dead directions.
        previous: ``[L, r, r]`` results to keep where a factor is broken, or None for the identity.

    Returns:
        ``[L, r, r]``, symmetric, in the dtype of ``S``.
    """
    S_hat, usable = normalised(S, k)
    M = S_hat + torch.diag_embed(_shift(S_hat, damping, 1.0, k))
    L, info = torch.linalg.cholesky_ex(M)
    P = torch.cholesky_inverse(L)
    return _settle(P, S, usable & (info == 0), k, previous)


def damped_inverse_root(
    S: Tensor, damping: float | Tensor, k: Tensor | None = None, previous: Tensor | None = None
) -> Tensor:
    """Return (Ŝ + λI)^(-1/2), symmetric; arguments and failures as `damped_inverse`."""
    S_hat, usable = normalised(S, k)
    M = S_hat + torch.diag_embed(_shift(S_hat, damping, 1.0, k))
    values, Q = torch.linalg.eigh(M)
    positive = values[:, 0] > 0
    R = (Q * values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt().unsqueeze(-2)) @ Q.mT
    return _settle(R, S, usable & positive, k, previous)


def eigenbasis(S: Tensor, k: Tensor | None = None, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return orthonormal eigenvectors, largest eigenvalue first, dead directions last and untouched.

    Args:
        S: ``[L, r, r]`` second moments.
        k: ``[L]`` live ranks, or None.
        previous: ``[L, r, r]`` bases to keep where a factor is broken, or None for the identity.

    Returns:
        Q ``[L, r, r]`` (columns are eigenvectors) in the dtype of ``S``, and eigenvalues of Ŝ ``[L, r]`` in
        descending order, zero on dead directions.
    """
    r = S.shape[-1]
    S_hat, usable = normalised(S, k)
    # dead directions get distinct values below the spectrum, so that they sort last and in their own order
    below = -1 - torch.linalg.matrix_norm(S_hat)[:, None] - torch.arange(r, device=S.device)
    values, Q = torch.linalg.eigh(S_hat + torch.diag_embed(_shift(S_hat, 0.0, below, k)))
    values, Q = values.flip(-1), Q.flip(-1)
    alive = torch.ones_like(values, dtype=torch.bool) if k is None else live_rows(k, r)
    usable = usable & (torch.where(alive, values, torch.inf).amin(-1) >= -SLACK * r)
    if k is not None:
        eye = torch.eye(r, dtype=Q.dtype, device=Q.device)
        Q = torch.where(alive[:, :, None] & alive[:, None, :], Q, torch.where(alive[:, None, :], 0.0, eye))
    return _settle(Q, S, usable, k, previous), torch.where(alive & usable[:, None], values, 0.0).clamp(min=0)


def _shift(S_hat: Tensor, live: float | Tensor, dead: float | Tensor, k: Tensor | None) -> Tensor:
    """Return the diagonal ``[L, r]`` to add: ``live`` on live directions and ``dead`` on dead ones."""
    like = {"dtype": S_hat.dtype, "device": S_hat.device}
    alive = torch.as_tensor(live, **like)
    if k is None:
        return alive.expand(S_hat.shape[:-1])
    return torch.where(live_rows(k, S_hat.shape[-1]), alive, torch.as_tensor(dead, **like))


def _settle(M: Tensor, S: Tensor, good: Tensor, k: Tensor | None, previous: Tensor | None) -> Tensor:
    """Return ``M`` where ``good``; elsewhere the identity if S is empty, else ``previous`` or the identity."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    fallback = eye if previous is None else torch.where(empty(S, k)[:, None, None], eye, previous.to(S.dtype))
    return torch.where(good[:, None, None] & M.isfinite(), M.to(S.dtype), fallback)
