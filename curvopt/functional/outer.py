"""Outer factors of low rank: the half of K-FAC that is as wide as the layer, at the cost of the adapter.

K-FAC takes the Fisher matrix of A ``(r, d_in)`` to be S_x ⊗ S_d and that of B ``(d_out, r)`` to be S_u ⊗ S_g. S_d and
S_u are r×r; S_x = E[x xᵀ] and S_g = E[g gᵀ] are d×d, the *outer* factors. As Shampoo does, they are estimated by the
gradients themselves, which need no hook: S_x ∝ E[∇Aᵀ∇A] and S_g ∝ E[∇B ∇Bᵀ]. Only the shape of a factor acts, so with
G the gradient rank first, ``(r, d)``, n = r its rows, and β the decay of the average,

    S ← β S + (1−β) GᵀG / n,      S ≈ Vᵀ diag(μ) V + ρ (I − VᵀV),      ρ = (tr S − Σμ) / (d − k),

V ``(k, d)`` with orthonormal rows. S̃ = S / mean diag S + λI, and the gradient is preconditioned before Adam sees it:

    G S̃^(-1/2) √(1+λ) = c G + P diag(w) V,   P = G Vᵀ,   c = √((1+λ)/(ρ̃+λ)),   w = √((1+λ)/(μ̃+λ)) − c.

The factor √(1+λ) leaves G alone where S is a multiple of I, and as λ → ∞.

V follows S by one step of block power iteration on S + σI per step, orthonormalised by Cholesky:

    Y = V (S + σI) = (β diag(μ) + σ) V + (1−β)/n Pᵀ G,     L Lᵀ = Y Yᵀ,     V ← L⁻¹ Y,     σ = λ mean diag S.

The shift leaves the eigenvectors where they are, and keeps Y of full rank while S is that of a few gradients.

Everything beside two passes over G and V is of size r + k. With the products ``[G Gᵀ | G Vᵀ]`` ``(r, r + k)`` at hand,
both results are linear in what is there, with coefficients M ``(r + k, r + k)``, applied by `through`:

    V' = M₂₁ G + M₂₂ V,      G' = c G + M₁₂ V',      M₁₁ = c I.

The derivation is ours; the iteration is that of SOAP (arXiv 2409.11321) in r + k dimensions. VVᵀ is taken to be I:
deviations shrink by at least β squared at every step that sees gradients, because Y weighs V by β μ.
"""

import math

import torch
from torch import Tensor

from curvopt.functional import left


def cosine_rows(k: int, d: int) -> Tensor:
    """Return k orthonormal rows of length d, ``(k, d)`` float64: a start of V without random numbers. k ≤ d.

    They are the first rows of the cosine transform DCT-IV, V_ij = √(2/d) cos(π (i+½)(j+½) / d).
    """
    i = torch.arange(k, dtype=torch.float64)[:, None] + 0.5
    j = torch.arange(d, dtype=torch.float64) + 0.5
    return torch.cos(math.pi / d * i * j) * math.sqrt(2 / d)


def outer_map(
    products: Tensor,
    mu: Tensor,
    trace: Tensor,
    d: Tensor,
    decay: float | Tensor,
    damping: float | Tensor,
    found_inf: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance T outer factors by one gradient each, and return what preconditions these gradients.

    Where a factor is empty, because no gradient has been other than zero yet, the gradient is left as it is. Where the
    products are not finite, or ``found_inf`` is set, everything is.

    Args:
        products: ``[T, r, r + k]``: G Gᵀ and G Vᵀ side by side, in float32 or float64.
        mu: ``[T, k]`` eigenvalues of S along V, in the same dtype.
        trace: ``[T]`` of S.
        d: ``[T]`` number of columns of G, ``d ≥ k``.
        decay: β in [0, 1), or a 0-d tensor.
        damping: λ > 0; a 0-d tensor is read on its device.
        found_inf: 0-d float; non-zero: nothing changes.

    Returns:
        M ``[T, r + k, r + k]``, with which `through` makes G S̃^(-1/2) √(1+λ) and the new V; the new μ; the new traces.
    """
    r = products.shape[1]
    k = products.shape[2] - r
    new_trace = decay * trace + (1 - decay) * products[:, :, :r].diagonal(dim1=1, dim2=2).mean(1)
    t = torch.where(new_trace > 0, new_trace, 1.0)
    # the trace is the unit from here on: squares of small gradients' squares would underflow
    unit, mu_old = t.sqrt()[:, None, None], mu / t[:, None]
    products = products / torch.cat((unit.square().expand(-1, 1, r), unit.expand(-1, 1, k)), 2)
    H, P = products.split([r, k], dim=2)
    rest = ((trace / t - mu_old.sum(1)) / (d - k).clamp(min=1)).clamp(min=0)
    share = (1 - decay) / r
    D = decay * mu_old + (damping / d)[:, None]
    # Y = share Pᵀ G + D V, its Gram matrix, and V' = L⁻¹ Y = take G + keep V
    gram = P.mT @ torch.baddbmm(P * D[:, None, :], H, P * (0.5 * share)) * share
    gram = gram + gram.mT
    gram.diagonal(dim1=1, dim2=2).add_(D.square())
    L, _ = torch.linalg.cholesky_ex(gram)
    both = torch.linalg.solve_triangular(L, torch.cat((share * P.mT, torch.diag_embed(D)), 2), upper=False)
    take, keep = both.split([r, k], dim=2)
    P_new = products @ both.mT  # G V'ᵀ
    turned = torch.baddbmm(keep, take, P).square_()  # (V' Vᵀ)²
    kept = (turned @ mu_old[:, :, None])[:, :, 0] + rest[:, None] * (1 - turned.sum(2)).clamp(min=0)
    mu_new = decay * kept + share * P_new.square().sum(1)
    # S̃ has a mean eigenvalue of 1 + λ
    rho = ((1 - mu_new.sum(1)) / (d - k).clamp(min=1)).clamp(min=0)
    c = ((1 + damping) / (rho * d + damping)).sqrt()
    w = ((1 + damping) / (mu_new * d[:, None] + damping)).sqrt() - c[:, None]
    scaled = c[:, None, None] * torch.eye(r, dtype=c.dtype, device=c.device)
    M = torch.cat((torch.cat((scaled, unit * P_new * w[:, None, :]), 2), torch.cat((take / unit, keep), 2)), 1)
    # what is not finite in the products or in their Cholesky factor is in every sum that it enters
    good = (new_trace > 0) & torch.isfinite(new_trace + mu_new.sum(1)) & (found_inf == 0)
    return (
        torch.where(good[:, None, None], M, torch.eye(r + k, dtype=M.dtype, device=M.device)),
        torch.where(good[:, None], mu_new * t[:, None], mu),
        torch.where(good, new_trace, trace),
    )


def through(
    M: Tensor, G: Tensor, V: Tensor, rank_dim: int = 1, out: Tensor | None = None, out_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return c G + M₁₂ V' and V' = M₂₁ G + M₂₂ V, rank first, in ``out`` and ``out_V`` if given.

    Args:
        M: ``[T, r + k, r + k]`` of `outer_map`, in the dtype of the others.
        G: ``[T, r, d]`` gradients, or ``[T, d, r]`` with ``rank_dim`` 2.
        V: ``[T, k, d]`` or ``[T, d, k]``.
        rank_dim: the dimension of G that is the rank.
        out: what takes the first result, G itself or none of the others.
        out_V: what takes the second, none of the others.
    """
    r = G.shape[rank_dim]
    new = left(M[:, r:, :r], G, rank_dim, out=out_V)
    _add_left(new, M[:, r:, r:], V, rank_dim)
    scaled = torch.mul(M[:, :1, :1], G, out=out)
    return _add_left(scaled, M[:, :r, r:], new, rank_dim), new


def _add_left(Y: Tensor, M: Tensor, X: Tensor, rank_dim: int) -> Tensor:
    """Do Y += M X, rank first; each storage by its own call, as transposed results go matrix by matrix on the CPU."""
    return Y.baddbmm_(M, X) if rank_dim == 1 else Y.baddbmm_(X, M.mT)
