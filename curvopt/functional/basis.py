"""Changes of basis in rank space, and the transformation of factors and moments to the new basis.

A gauge change A → T A, B → B T⁻¹ leaves ΔW = s B A alone and maps, rank first,

    A → T A,      ∇A → T⁻ᵀ ∇A,      S_d → T⁻ᵀ S_d T⁻¹,
    Bᵀ → T⁻ᵀ Bᵀ,  ∇Bᵀ → T ∇Bᵀ,      S_u → T S_u Tᵀ.

First moments of gradients map as gradients do, second moments by the squared entries of that map (exact when the
entries of a column are uncorrelated).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from curvopt.functional import left, live_rows, trace
from curvopt.functional.inverse import eigenbasis, normalised


class Gauge(NamedTuple):
    """A change of basis of L pairs, and the energies that order it.

    Attributes:
        T: ``[L, r, r]`` float64, acts on A; the identity where nothing may change.
        T_inv: ``[L, r, r]`` float64, its inverse.
        sigma: ``[L, r]`` float64 in descending order, zero on dead directions; the same in every gauge.
    """

    T: Tensor
    T_inv: Tensor
    sigma: Tensor


def balanced(
    S_u: Tensor,
    S_d: Tensor,
    damping: float = 1e-6,
    k: Tensor | None = None,
    max_condition: float = 1e4,
    keep_scale: bool = True,
) -> Gauge:
    """Return the gauge in which both factors are the same diagonal: T S_u Tᵀ = T⁻ᵀ S_d T⁻¹ = diag(σ₁ ≥ … ≥ σ_r).

    Balanced truncation of linear systems, in rank space. With S_u = L Lᵀ and Lᵀ S_d L = U Σ² Uᵀ,
    T = Σ^(1/2) Uᵀ L⁻¹. The σ_i² are the eigenvalues of S_u S_d, the same in every gauge; under the K-FAC quadratic,
    dropping direction i raises the loss by σ_i²/2, so the leading directions are the best adapter of their rank (our
    derivation).

    Both factors are first regularised to S + damping · tr(S)/k · I, for which the equality is exact; ``sigma`` are
    theirs. A pair with an empty or broken factor keeps its basis. Where T is worse conditioned than
    ``max_condition``, its orthogonal part is taken instead.

    Args:
        S_u: ``[L, r, r]`` second moments of u.
        S_d: ``[L, r, r]`` second moments of d.
        damping: relative regularisation, ≥ 0.
        k: ``[L]`` live ranks, or None.
        max_condition: largest condition number of T.
        keep_scale: False leaves out of T the factor (tr S_d/tr S_u)^¼, which depends on the scale of the loss and
            moves length from A to B: the two factors are then the same diagonal up to a scalar, with the same σ.
    """
    r, device, wide = S_u.shape[-1], S_u.device, torch.float64
    eye = torch.eye(r, dtype=wide, device=device)
    alive = torch.ones(S_u.shape[:2], dtype=torch.bool, device=device) if k is None else live_rows(k, r)
    block = alive[:, :, None] & alive[:, None, :]
    U_hat, fine_u = normalised(S_u, k)
    D_hat, fine_d = normalised(S_d, k)
    ridge = torch.full((r,), damping, dtype=wide, device=device)
    L, info = torch.linalg.cholesky_ex(U_hat + torch.diag_embed(torch.where(alive, ridge, 1.0)))
    usable = (fine_u & fine_d & (info == 0))[:, None, None]
    L = torch.where(usable, L, eye)
    # dead directions sort last, in their own order: below zero, and distinct
    below = -1 - torch.arange(r, dtype=wide, device=device)
    D = torch.where(usable, D_hat, eye) + torch.diag_embed(torch.where(alive, ridge, below))
    values, U = torch.linalg.eigh(_sym(L.mT @ D @ L))
    sigma = torch.where(alive, values.flip(-1).clamp(min=0), 0.0).sqrt()
    U = U.flip(-1)
    # T at unit scale: of the normalised factors
    root = torch.where(sigma > 0, sigma, 1.0).sqrt()
    T = torch.where(block & usable, root[:, :, None] * torch.linalg.solve_triangular(L.mT, U, upper=True).mT, eye)
    W, values, Vh = torch.linalg.svd(T)
    poor = (values[:, 0] > max_condition * values[:, -1])[:, None, None]
    T_inv = torch.where(poor, (W @ Vh).mT, Vh.mT @ (W / values.unsqueeze(-2)).mT)
    T = torch.where(poor, W @ Vh, T)
    # back to the scale of S: σ carries √(scale_u scale_d), T carries (scale_d / scale_u)^¼
    scale_u, scale_d = (torch.where(usable[:, 0, 0], trace(S.to(wide)), 1.0) / alive.sum(-1) for S in (S_u, S_d))
    ratio = (scale_d / scale_u).pow(0.25)[:, None, None]
    c = torch.where(block & usable & ~poor, ratio, 1.0) if keep_scale else torch.ones_like(ratio)
    return Gauge(T * c, T_inv / c, sigma * (scale_u * scale_d).sqrt()[:, None] * usable[:, :, 0])


def projectors(S_u: Tensor, S_d: Tensor, k: Tensor, two_sided: bool) -> tuple[Tensor, Tensor]:
    """Return GRIT's published projectors V_k V_kᵀ for A and B (arXiv 2601.00231, reprojection).

    A ← V_a V_aᵀ A and B ← B V_g V_gᵀ with V_a, V_g the leading eigenvectors of S_u and S_d (two-sided), or V_a for
    both (one-sided). Two different projectors change ΔW abruptly; kept for reproduction.

    Args:
        S_u: ``[L, r, r]`` second moments of u.
        S_d: ``[L, r, r]`` second moments of d.
        k: ``[L]`` directions to keep.
        two_sided: whether B has a basis of its own. A pair whose S_d is empty or broken falls back to one side.

    Returns:
        P_a and P_g, ``[L, r, r]``, symmetric, in the dtype of ``S_u``.
    """
    keep = live_rows(k, S_u.shape[-1])
    V_a, _ = eigenbasis(S_u)
    P_a = (V_a * keep[:, None, :]) @ V_a.mT
    if not two_sided:
        return P_a, P_a
    V_g, _ = eigenbasis(S_d, previous=V_a)
    _, usable = normalised(S_d)
    V_g = torch.where(usable[:, None, None], V_g, V_a)
    return P_a, (V_g * keep[:, None, :]) @ V_g.mT


def asymmetry(P_A: Tensor, P_B: Tensor) -> Tensor:
    """Return how far a loss is from depending on A and B through B A alone, by its gradients; 0 if it does.

    With G = ∂L/∂(B A), ∇A = Bᵀ G and ∇B = G Aᵀ, so that ∇A Aᵀ = Bᵀ ∇B: to first order, no change of basis changes the
    loss. One A for two layers, a mixer, a gate or a nonlinearity between A and B break the equality (our derivation).

    Args:
        P_A: ``[L, r, r]``, ∇A Aᵀ.
        P_B: ``[L, r, r]``, Bᵀ ∇B.

    Returns:
        ``[L]``, ‖∇A Aᵀ − Bᵀ ∇B‖_F over the larger of the two norms: of the order of the gradients' rounding, or of one;
        infinity where nothing is known, since both are zero or one is not finite.
    """
    larger = torch.maximum(torch.linalg.matrix_norm(P_A), torch.linalg.matrix_norm(P_B))
    known = (larger > 0) & larger.isfinite()
    return torch.where(known, torch.linalg.matrix_norm(P_A - P_B) / torch.where(known, larger, 1.0), torch.inf)


def congruence(M: Tensor, S: Tensor) -> Tensor:
    """Return M S Mᵀ, symmetric, computed in the wider dtype and given in that of ``S``."""
    M = M.to(torch.promote_types(M.dtype, S.dtype))
    return _sym(M @ S.to(M.dtype) @ M.mT).to(S.dtype)


def carry_first(M: Tensor, exp_avg: Tensor, rank_dim: int) -> Tensor:
    """Return first moments of gradients that map by M ``[L, r, r]``: M m."""
    return left(M.to(exp_avg.dtype), exp_avg, rank_dim)


def carry_second(M: Tensor, exp_avg_sq: Tensor, rank_dim: int) -> Tensor:
    """Return second moments of gradients that map by M ``[L, r, r]``: (M ∘ M) v; never negative."""
    return left(M.square().to(exp_avg_sq.dtype), exp_avg_sq, rank_dim)


def _sym(S: Tensor) -> Tensor:
    return (S + S.mT) / 2
