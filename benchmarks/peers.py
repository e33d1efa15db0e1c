"""Two published optimizers for LoRA pairs, written from their formulas: LoRA-Muon and LoRA-RITE.

Both see a pair through W = Y Xᵀ with X = Aᵀ ``(d_in, r)`` and Y = B ``(d_out, r)``; a step of X uses Y alone as its
metric, and the other way round. An inverse (root) of a Gram matrix leaves out what is zero to rounding, so that A rests
while B = 0.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Pairs = Iterable[tuple[Tensor, Tensor]]  # A (r, d_in), B (d_out, r)
CUTOFF = 1e-12  # eigenvalues of a float32 Gram matrix below this share of the largest are rounding


def inverse_root(S: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """Return the pseudo-inverse of (S + shift I)^(1/2) for a positive semi-definite S ``(r, r)``."""
    if not S.isfinite().all():  # a run that diverges; eigh would raise
        return torch.full_like(S, torch.nan)
    values, vectors = torch.linalg.eigh(S.double())
    values = values.clamp(min=0) + shift
    kept = values > CUTOFF * values[-1]
    root = torch.where(kept, values, 1).rsqrt() * kept
    return ((vectors * root) @ vectors.T).to(S.dtype)


def msign(X: Tensor) -> Tensor:
    """Return U Vᵀ of the singular value decomposition X = U Σ Vᵀ, zero singular values left out; X is ``(d, r)``."""
    return X @ inverse_root(X.T @ X)


class _Pairwise(torch.optim.Optimizer):
    """Steps A and B of each pair; a subclass gives the direction of one of them."""

    def __init__(self, pairs: Pairs, defaults: dict[str, Any]) -> None:
        super().__init__([p for pair in pairs for p in pair], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step of every pair."""
        for group in self.param_groups:
            params = group["params"]
            for A, B in zip(params[::2], params[1::2], strict=True):
                X, Y = A.detach().T.clone(), B.detach().clone()
                A.sub_(group["lr"] * self.direction(A, A.grad.T, Y, group).T)
                B.sub_(group["lr"] * self.direction(B, B.grad, X, group))

    def direction(self, p: Tensor, g: Tensor, Y: Tensor, group: dict[str, Any]) -> Tensor:
        """Return what is subtracted for learning rate 1.

        Args:
            p: the parameter, key of the state.
            g: its gradient as ``(d, r)``.
            Y: the other matrix of the pair as ``(d', r)``.
            group: hyper-parameters.
        """
        raise NotImplementedError


class LoraMuon(_Pairwise):
    """LoRA-Muon (arXiv 2606.12921): the spectral-norm step of W = Y Xᵀ, half of it by each matrix.

    M ← β M + (1−β) ∇,  ΔX = −(η/2) msign(M R) R,  R = (YᵀY)^(-1/2). So Y ΔXᵀ has singular values η/2. No weight decay.
    msign is exact, where Muon iterates.

    Args:
        pairs: (A, B) of each pair.
        lr: η, a length in W over the adapter's scaling.
        momentum: β.
    """

    def __init__(self, pairs: Pairs, lr: float, momentum: float = 0.95) -> None:
        super().__init__(pairs, {"lr": lr, "momentum": momentum})

    def direction(self, p: Tensor, g: Tensor, Y: Tensor, group: dict[str, Any]) -> Tensor:
        """Return ½ msign(M R) R."""
        state = self.state[p]
        M = state.setdefault("M", torch.zeros_like(g))
        M.lerp_(g, 1 - group["momentum"])
        R = inverse_root(Y.T @ Y)
        return 0.5 * msign(M @ R) @ R


class LoraRite(_Pairwise):
    """LoRA-RITE (arXiv 2410.20625): matrix Adam on the gradient in the orthonormal basis of the other matrix.

    With Y = U R (polar), ḡ = ∇ R⁻¹ and P = Uᵀ U_old, which carries the moments into the new basis:

        V ← β₂ P V Pᵀ + (1−β₂) ḡᵀḡ/d,   ρ ← β₂ (ρ + d_λ(V, P V Pᵀ)),   S̄ = ḡ (V + ρ I)^(-1/2),
        M ← β₁ M Pᵀ + (1−β₁) S̄,   ΔX = −η M R⁻¹,

    averages corrected for their start as in Adam. d_λ(V, V'), the mass that P lets escape, is the smaller of the
    largest fall of an eigenvalue and the fall of the trace. (The paper states V and ρ as sums; averages, and the mean
    over rows, are its authors' code, where ρ = 0 by default. No clipping.)

    Args:
        pairs: (A, B) of each pair.
        lr: η.
        betas: β₁, β₂.
        escape: whether ρ counts.
    """

    def __init__(self, pairs: Pairs, lr: float, betas: tuple[float, float] = (0.9, 0.999), escape: bool = True) -> None:
        super().__init__(pairs, {"lr": lr, "betas": betas, "escape": escape})

    def direction(self, p: Tensor, g: Tensor, Y: Tensor, group: dict[str, Any]) -> Tensor:
        """Return M R⁻¹."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        R = inverse_root(Y.T @ Y)  # R⁻¹ of the text
        U = Y @ R
        if not state:
            r = g.shape[1]
            state |= {"step": 0, "M": torch.zeros_like(g), "V": g.new_zeros(r, r), "rho": g.new_zeros(()), "U": U}
        P = U.T @ state["U"]
        moved = P @ state["V"] @ P.T
        escaped = _escaped(state["V"], moved) if group["escape"] else 0.0
        unmagnified = g @ R
        state["step"] += 1
        state["V"] = beta2 * moved + (1 - beta2) * unmagnified.T @ unmagnified / len(g)
        state["rho"] = beta2 * (state["rho"] + escaped)
        corrected = 1 - beta2 ** state["step"]
        S = unmagnified @ inverse_root(state["V"] / corrected, state["rho"] / corrected)
        state["M"] = beta1 * state["M"] @ P.T + (1 - beta1) * S
        state["U"] = U
        return state["M"] @ R / (1 - beta1 ** state["step"])


def _escaped(V: Tensor, moved: Tensor) -> Tensor:
    if not V.isfinite().all():
        return V.new_tensor(torch.nan)
    falls = torch.linalg.eigvalsh(V) - torch.linalg.eigvalsh(moved)
    return torch.minimum(falls.max(), falls.sum()).clamp(min=0)
