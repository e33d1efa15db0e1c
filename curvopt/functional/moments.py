"""Second moments in rank space: S ← S + w (zᵀz/N − S), with w so that S is always the bias-corrected average."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvopt.functional import compute_dtype


def gram(z: Tensor) -> Tensor:
    """Return zᵀz of the rows of ``z`` ``(N, r)`` as ``(r, r)``, summed in float32 (float64 for float64 input)."""
    z = z.to(compute_dtype(z.dtype))
    return z.mT @ z


def gram_many(
    zs: Sequence[Tensor],
    counts: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Return scale_m Σ_n w_n z_n z_nᵀ over the leading rows of each of M matrices, ``[M, r, r]``.

    Args:
        zs: M matrices ``(N_m, r)`` of one dtype, summed in float32 (float64 for float64).
        counts: ``[M]`` int64, how many leading rows of each count, or None for all; what the others hold is ignored.
        weights: M vectors ``(N_m,)`` of the rows' weights, or None for ones.
        scale: ``[M]``, or None for ones.
    """
    grams = []
    for m, z in enumerate(zs):
        z = z.to(compute_dtype(z.dtype))
        if counts is not None:
            z = torch.where(torch.arange(len(z), device=z.device)[:, None] < counts[m], z, 0.0)
        y = z if weights is None else z * weights[m].to(z.dtype)[:, None]
        grams.append(y.mT @ z)
    G = torch.stack(grams)
    return G if scale is None else G * scale.to(G.dtype)[:, None, None]


def gram_add_(
    sums: Tensor,
    index: Sequence[int],
    zs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    sign: float = 1.0,
) -> Tensor:
    """Do sums[index[m]] += sign · Σ_n w_n z_n z_nᵀ for M matrices, in place.

    Args:
        sums: ``[S, r, r]`` in the compute dtype of the rows.
        index: M distinct places in ``sums``.
        zs: M matrices ``(N_m, r)`` of one dtype.
        weights: M vectors ``(N_m,)`` of the rows' weights, or None for ones.
        sign: what every product is multiplied with.

    Returns:
        ``sums``.
    """
    for m, (place, z) in enumerate(zip(index, zs, strict=True)):
        z = z.to(sums.dtype)
        y = z if weights is None else z * weights[m].to(z.dtype)[:, None]
        sums[place].addmm_(y.mT, z, alpha=sign)
    return sums


def ema_weight(t: Tensor, decay: float) -> Tensor:
    """Return the weight w_t of the newest of ``t`` observations in a bias-corrected exponential average.

    An average ``m_t = β m + (1−β) x_t`` started at zero and divided by ``1 − β^t`` obeys
    ``m̂_t = m̂_{t−1} + w_t (x_t − m̂_{t−1})`` with ``w_t = (1−β)/(1−β^t)``. Its limit β → 1 is ``1/t``, the
    running mean that never forgets (as published by GRIT), so ``decay=1`` means that.

    Args:
        t: number of observations including the newest, any shape, at least 1.
        decay: β in [0, 1].
    """
    t = t.double()
    if decay == 1:
        return 1 / t
    return (1 - decay) / (1 - torch.pow(torch.full_like(t, decay), t))


def ema_(S: Tensor, S_new: Tensor, t: Tensor, decay: float, found_inf: Tensor | None = None) -> Tensor:
    """Take one observation per pair into the bias-corrected averages, in place.

    A pair whose observation is not finite, and every pair when ``found_inf`` is set, is left as it was.

    Args:
        S: ``[L, r, r]`` averages, updated in place.
        S_new: ``[L, r, r]`` observations.
        t: ``[L]`` observations taken so far, incremented in place for the pairs that took one.
        decay: β in [0, 1]; 1 is the running mean.
        found_inf: 0-d, non-zero to take nothing.

    Returns:
        ``[L]`` booleans: which pairs took their observation.
    """
    took = S_new.isfinite().all(-1).all(-1)
    if found_inf is not None:
        took = took & (found_inf == 0)
    t.add_(took)
    w = torch.where(took, ema_weight(t.clamp(min=1), decay), 0.0).to(S.dtype)[:, None, None]
    S.lerp_(torch.where(took[:, None, None], S_new, S), w)
    return took
