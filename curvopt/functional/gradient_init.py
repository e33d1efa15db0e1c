"""GoRA (arXiv 2502.12171): importance of a layer from its gradient, and B₀ along the compressed gradient.

Ḡ is the mean gradient ``(d_out, d_in)`` of the loss by the frozen base weight W, over a few batches and with B = 0.
With B = 0 autograd's ∂L/∂B is s Ḡ Aᵀ exactly, so M = Ḡ Aᵀ, all that B₀ needs, is known with or without Ḡ.
"""

import torch
from torch import Tensor

OVERSAMPLING = 8  # Halko, Martinsson, Tropp (arXiv 0909.4061): 5 to 10 columns more than the rank that counts
DAMPING = 1e-6  # relative to the mean eigenvalue; tenfold more at every failure


def mean_abs(W: Tensor, G: Tensor) -> Tensor:
    """Return mean |W ⊙ Ḡ|, GoRA's published importance, 0-d in the dtype of ``G``."""
    return (W.to(G.dtype) * G).abs().mean()


def frobenius(G: Tensor) -> Tensor:
    """Return ‖Ḡ‖_F, 0-d."""
    return torch.linalg.vector_norm(G)


def nuclear(G: Tensor, rank: int = 32, power: int = 2, generator: torch.Generator | None = None) -> Tensor:
    """Return the sum of the ``rank`` largest singular values of Ḡ by a randomized range finder, 0-d.

    Never more than the nuclear norm, and equal to it (to rounding) where Ḡ has no higher rank.

    Args:
        G: ``(d_out, d_in)``.
        rank: how many singular values count.
        power: power iterations, each with an orthonormalisation.
        generator: source of the test matrix, on its own device; torch's global one if None.
    """
    columns = min(rank + OVERSAMPLING, *G.shape)
    if columns == min(G.shape):
        return torch.linalg.svdvals(G)[:rank].sum()
    where = G.device if generator is None else generator.device
    test = torch.randn(G.shape[1], columns, generator=generator, dtype=G.dtype, device=where).to(G.device)
    Q = torch.linalg.qr(G @ test).Q
    for _ in range(power):
        Q = torch.linalg.qr(G @ torch.linalg.qr(G.mT @ Q).Q).Q
    return torch.linalg.svdvals(Q.mT @ G)[:rank].sum()


def step_size(init_lr: float, r: int, d_in: int) -> float:
    """Return ξ = lr₀ √(d_in/r): the first forward uses W − ξ Ḡ, projected onto the row space of A.

    GoRA's γ = lr₀ R/√(r/d_in), with s = α/R, is this: s (γ/α) = ξ.
    """
    return init_lr * (d_in / r) ** 0.5


def compressed_start(M: Tensor, A: Tensor, scaling: float, size: float) -> Tensor:
    """Return B₀ = −(ξ/s) M (A Aᵀ)⁻¹, for which s B₀ A = −ξ Ḡ P with P the projector onto the row space of A.

    Among all B, s B A is then nearest to −ξ Ḡ in the Frobenius norm. By Cholesky, in float64 (the matrix is r×r); a
    matrix that is not positive definite is damped, tenfold more until it is.

    Args:
        M: ``(d_out, r)``, Ḡ Aᵀ.
        A: ``(r, d_in)``.
        scaling: s, not zero.
        size: ξ ≥ 0; see `step_size`.

    Returns:
        ``(d_out, r)`` float64; zero where A is zero.
    """
    A = A.double()
    K = A @ A.mT
    mean = K.diagonal().mean()
    L, info = torch.linalg.cholesky_ex(K)
    # a rounding-error pivot is a failure too: it would put noise of size 1/pivot into B₀
    floor = torch.finfo(torch.float64).eps * len(K) * mean
    damping = 0.0
    while mean > 0 and (int(info) or bool((L.diagonal().square() <= floor).any())):
        damping = max(DAMPING, 10 * damping)
        L, info = torch.linalg.cholesky_ex(K + damping * mean * torch.eye(len(K), dtype=K.dtype, device=K.device))
    if not mean > 0:
        return torch.zeros_like(M, dtype=torch.float64)
    return -(size / scaling) * torch.cholesky_solve(M.double().mT, L).mT
