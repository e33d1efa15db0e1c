"""Functions of damped factors, over [L, r, r] stacks: inverse, inverse root, eigenbasis.

Damping is relative: everything is a function of Ŝ + λI with Ŝ = S · k/tr(S), whose mean eigenvalue is one, so
the result has unit scale whatever the scale of S (losses are token means: S_d may be 1e-10).

Failures are handled here, once. An *empty* factor (zero trace, as S_d has while B = 0) gives the identity:
the plain update, never 1/λ. A *broken* one (not finite, negative trace, not positive definite even with damping)
keeps ``previous`` where it is given, else gives the identity. Nothing raises, and nothing synchronises with the device;
callers count failures with `broken`.

Inverse and eigenbasis are computed in float64: the condition is at most k/λ + 1, so a Cholesky of a genuine second
moment cannot fail. (The kernels work in float32 and are held to these functions.)

The inverse root takes no eigenvalues but a fixed number of r×r products, four a stage (three in the first, two in the
last) and one for the check. With M = (Ŝ + λI)/F, F its Frobenius norm, R ← M and Q ← I:

    W = bR + cR²;   Q ← Q(aI + W),   R ← (aI + W) R (aI + W);      (Ŝ + λI)^(-1/2) ≈ Q/√F

s(a + bs² + cs⁴) is, stage by stage, the odd quintic closest to one on the interval of the values s = √(eigenvalue of R)
that the stage before left; their composition is the best there is (arXiv 2505.16932). tr(Ŝ) = k ≤ r bounds the
spectrum of M by [λ/(r + λ√r), 1] beforehand, so (a, b, c) depend on r and λ alone. Relative errors measured against
float64 eigenvalues, the larger of log-spaced spectra and power-law covariances, 16 matrices each:

=====  ================  ================  ================  ================  ================
 r     λ = 1             0.1               0.01              1e-3              1e-6
=====  ================  ================  ================  ================  ================
  4    3: 2e-7           4: 5e-7           5: 5e-6           5: 3e-5           8: 2e-4
 16    3: 2e-7           4: 6e-7           5: 5e-6           6: 2e-5           8: 3e-4
 64    4: 4e-7           5: 2e-6           5: 8e-6           6: 2e-5           9: 8e-5
128    4: 5e-7           5: 3e-6           6: 2e-5           7: 5e-5           9: 1e-4
=====  ================  ================  ================  ================  ================

(stages: error) in float32; in float64 it takes up to three stages more and gives 3e-15 to 1e-12. float32 eigenvalues
give larger errors nearly everywhere (1e-6 to 3e-3). What is lost is the rounding of M, amplified by r/λ, the condition
that the coefficients are made for, also where a factor's own is smaller. So float32 factors are computed on in float32
for λ ≥ `SINGLE`, and in float64 below, where a root is rare.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from curvopt.functional import live_rows, trace

# a genuine second moment in float32 may have eigenvalues this far below zero, times r, of a mean of one
SLACK = 1e-6
SINGLE = 1e-2  # least λ for which the root of a float32 factor is computed in float32
LEAST = 1e-4  # λ that a damping on the device is taken to be at least
CHUNK = 2**16  # elements of a stack of matrices whose products stay in a CPU's cache


def empty(S: Tensor, k: Tensor | None = None) -> Tensor:
    """Return ``[L]`` booleans: factors with nothing in their live block yet (trace exactly zero)."""
    if k is None:
        return trace(S) == 0
    return torch.where(live_rows(k, S.shape[-1]), S.diagonal(dim1=-2, dim2=-1), 0.0).sum(-1) == 0


def broken(S: Tensor) -> Tensor:
    """Return ``[L]`` booleans: factors that are not finite, or whose trace is negative."""
    return ~(S.isfinite().all(-1).all(-1) & (trace(S) >= 0))


def normalised(S: Tensor, k: Tensor | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return Ŝ = S · k/tr(S) on the live block, symmetric, and which factors are usable.

    Args:
        S: ``[L, r, r]`` second moments.
        k: ``[L]`` live ranks, or None.
        dtype: what to compute in.

    Returns:
        Ŝ ``[L, r, r]`` (zero on dead rows and columns; the identity where S is empty or broken) and ``[L]`` booleans.
    """
    r = S.shape[-1]
    S = S.to(dtype) / 2  # first: a sum may overflow
    S = S + S.mT
    rank = torch.full((S.shape[0],), r, device=S.device) if k is None else k
    if k is not None:
        alive = live_rows(k, r)
        S = torch.where(alive[:, :, None] & alive[:, None, :], S, 0.0)
    # by the largest entry first: a subnormal trace would overflow its reciprocal; it is not finite if any entry is not
    size = S.abs().amax((-2, -1))
    finite = size.isfinite()
    S.div_(torch.where((size > 0) & finite, size, 1.0)[:, None, None])
    total = trace(S)
    usable = finite & (total > 0)
    S.mul_((rank / torch.where(usable, total, 1.0)).to(dtype)[:, None, None])
    return torch.where(usable[:, None, None], S, torch.eye(r, dtype=S.dtype, device=S.device)), usable


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
    """Return (Ŝ + λI)^(-1/2), symmetric; arguments and failures as `damped_inverse`.

    "Not positive definite" is seen by the trace of X(Ŝ + λI)X, from which an eigenvalue takes one or more if it is
    negative. One between zero and some λ/100 counts as negative too, and between that and λ, which only a factor that
    is not a second moment has, the root comes out too small. A ``damping`` that is a tensor must be at least `LEAST`.
    """
    least = LEAST if isinstance(damping, Tensor) else float(damping)
    single = S.dtype != torch.float64 and not isinstance(damping, Tensor) and least >= SINGLE
    dtype = torch.float32 if single else torch.float64
    r = S.shape[-1]
    S_hat, usable = normalised(S, k, dtype)
    S_hat.diagonal(dim1=1, dim2=2).add_(_shift(S_hat, damping, 0.0, k))
    F = torch.linalg.vector_norm(S_hat, dim=(1, 2), keepdim=True).clamp(min=1)
    if k is not None:
        S_hat.diagonal(dim1=1, dim2=2).add_(_shift(S_hat, 0.0, 1.0, k))  # any value inside of the interval
    M = S_hat.div_(F)
    coefficients = stages(least / (r + least * math.sqrt(r)), 3e-8 if single else 1e-14)
    pieces = [_inverse_root(m, coefficients) for m in M.split(max(1, CHUNK // r**2) if S.is_cpu else max(1, len(S)))]
    Q, whole = (torch.cat(p) if len(p) > 1 else p[0] for p in zip(*pieces, strict=True))
    X = (Q + Q.mT).mul_(0.5 * F.rsqrt())
    return _settle(X, S, usable & ((whole - r).abs() < 0.5), k, previous)


def _inverse_root(M: Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> tuple[Tensor, Tensor]:
    """Return Q ≈ M^(-1/2) ``[L, r, r]``, symmetric to rounding, and tr(QMQ) ``[L]``."""
    R, W, Y = M, torch.empty_like(M), torch.empty_like(M)
    Q = other = spare = M
    for n, (a, b, c) in enumerate(coefficients):
        torch.baddbmm(R, R, R, beta=b, alpha=c, out=W)  # bR + cR²
        if n == 0:
            Q, other, spare = W.clone(), torch.empty_like(M), torch.empty_like(M)
            Q.diagonal(dim1=1, dim2=2).add_(a)
        else:
            Q, other = torch.baddbmm(Q, Q, W, beta=a, out=other), Q  # Q(aI + W)
        if n + 1 < len(coefficients):
            torch.baddbmm(R, R, W, beta=a, out=Y)
            R = torch.baddbmm(Y, Y, W, beta=a, out=spare)
    return Q, torch.bmm(Q, M, out=Y).mul_(Q).sum((1, 2))


@lru_cache(maxsize=256)
def stages(smallest: float, tolerance: float) -> tuple[tuple[float, float, float], ...]:
    """Return (a, b, c) of the quintics s(a + bs² + cs⁴) whose composition takes [√smallest, 1] to one.

    Args:
        smallest: the least eigenvalue that may occur, of a largest of one.
        tolerance: how far from one the last may leave a value.
    """
    low, high = math.sqrt(min(smallest, 1.0)), 1.0
    found: list[tuple[float, float, float]] = []
    while not found or max(1 - low, high - 1) > tolerance:
        a, b, c, error = _quintic(low, high)
        found.append((a, b, c))
        low, high = 1 - error, 1 + error
    return tuple(found)


def _quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """Return the odd quintic closest to one on an interval, and how close: Remez' exchange of four points.

    On the last few parts in a thousand the equations are ill-conditioned; Taylor's polynomial is as good there.
    """
    if low > 0.999 * high:
        s, d = (low + high) / 2, (high - low) / (high + low)
        return 15 / 8 / s, -10 / 8 / s**3, 3 / 8 / s**5, 2.5 * d**3 + 4e-16
    points, signs = [low, (3 * low + high) / 4, (low + 3 * high) / 4, high], [1.0, -1.0, 1.0, -1.0]
    a, b, c, error = 0.0, 0.0, 0.0, 0.0
    for _ in range(20):  # converges quadratically
        x, before = torch.tensor(points, dtype=torch.float64), error
        rows = torch.stack([x, x**3, x**5, torch.tensor(signs, dtype=torch.float64)], 1)
        a, b, c, error = torch.linalg.solve(rows, torch.ones_like(x)).tolist()
        if abs(error - before) < 1e-15:
            break
        # where the derivative a + 3bs² + 5cs⁴ vanishes
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        points[1:3] = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c, abs(error)


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
    alive, rest = _scalar(live, S_hat), _scalar(dead, S_hat)
    return alive.expand(S_hat.shape[:-1]) if k is None else torch.where(live_rows(k, S_hat.shape[-1]), alive, rest)


def _scalar(x: float | Tensor, like: Tensor) -> Tensor:
    """Return a number as a tensor, made on the device: an upload cannot be captured."""
    return x.to(like) if isinstance(x, Tensor) else torch.full((), x, dtype=like.dtype, device=like.device)


def _settle(M: Tensor, S: Tensor, good: Tensor, k: Tensor | None, previous: Tensor | None) -> Tensor:
    """Return ``M`` where it is good and finite, else the identity if S is empty, else ``previous`` or the identity."""
    M = M.to(S.dtype)
    good = good & M.sum((-2, -1)).isfinite()
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    if k is not None:  # exactly the identity on dead directions
        alive = live_rows(k, S.shape[-1])
        M = torch.where(alive[:, :, None] & alive[:, None, :], M, eye)
    fallback = eye if previous is None else torch.where(empty(S, k)[:, None, None], eye, previous.to(S.dtype))
    return torch.where(good[:, None, None], M, fallback)
