"""Ideas that GritKFAC did not keep, each a few lines over it, so that the ablations can measure them."""

from typing import Any

import torch
from curvopt.optim.stacks import Stack
from torch import Tensor

from curvopt import GritKFAC
from curvopt.functional.inverse import eigenbasis
from curvopt.lora import LoraPair


class OwnBasis(GritKFAC):
    """GritKFAC whose basis is made here instead, every so many steps, the moments turning with it."""

    every = 1

    def basis(self, stack: Stack) -> Tensor:
        """Return the new basis ``[L, r, r]``."""
        raise NotImplementedError

    def _update(self, stacks: Any, found_inf: Any) -> None:
        for stack in stacks:
            if stack.group["clock"] % self.every == 0:
                old = stack.state["basis"]
                new = self.basis(stack)
                stack.carry(new.mT @ old)
                old.copy_(new)
        super()._update(stacks, found_inf)


class AmortisedBasis(OwnBasis):
    """One step of orthogonal iteration instead of an eigendecomposition: Q ← QR(S Q)."""

    def basis(self, stack: Stack) -> Tensor:
        """Return the Q of S Q; what is empty keeps its basis."""
        S, Q = stack.state["factor"], stack.state["basis"]
        new = torch.linalg.qr(S.double() @ Q.double()).Q.to(Q.dtype)
        return torch.where((S.diagonal(dim1=-2, dim2=-1).sum(-1) > 0)[:, None, None], new, Q)


class TwoSpeeds(OwnBasis):
    """The basis of the sum of two averages of the factor: the usual one, and one ten times as slow."""

    every, slow = 10, 0.995

    def basis(self, stack: Stack) -> Tensor:
        """Return the eigenbasis of the sum."""
        return eigenbasis(stack.state["factor"] + self._slow(stack), previous=stack.state["basis"])[0]

    def _slow(self, stack: Stack) -> Tensor:
        """Average the average once more; bias-corrected like any."""
        kept = self.__dict__.setdefault("_kept", {})
        S = stack.state["factor"]
        slow, t = kept.get(id(S), (torch.zeros_like(S), 0))
        weight = (1 - self.slow**self.every) / (1 - self.slow ** (self.every * (t + 1)))
        kept[id(S)] = slow.lerp(S, weight), t + 1
        return kept[id(S)][0]


class Rescaled(GritKFAC):
    """GritKFAC whose steps are lengthened and shortened afterwards, pair by pair and side by side."""

    def factors(self, pair: LoraPair, steps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the steps of A and B are multiplied by; ``steps`` are in the shapes of A and B."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step, then rescale it; no weight decay is assumed."""
        before = {pair: {"A": pair.A.detach().clone(), "B": pair.B.detach().clone()} for pair in self.pairs}
        loss = super().step(closure)
        for pair, old in before.items():
            now = {"A": pair.A, "B": pair.B}
            steps = {side: now[side] - old[side] for side in now}
            for side, c in self.factors(pair, steps).items():
                now[side].copy_(old[side] + c * steps[side])
        return loss


class TrustRatios(Rescaled):
    """LAMB's idea (arXiv 1904.00962) by pair: steps in proportion to ‖(A, B)‖ over that of the step, at most 4 : 1."""

    def factors(self, pair: LoraPair, steps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the pair's ratio against the average over all pairs so far."""
        ratio = (pair.A.norm() ** 2 + pair.B.norm() ** 2).sqrt() / (
            steps["A"].norm() ** 2 + steps["B"].norm() ** 2
        ).sqrt().clamp(min=1e-12)
        mean = self.__dict__.get("_mean", ratio.log())
        self.__dict__["_mean"] = mean.lerp(ratio.log(), 0.01)
        c = (ratio.log() - mean).exp().clamp(0.5, 2.0)
        return {"A": c, "B": c}


class BalancedCosts(Rescaled):
    """A's rate against B's from the factors: both steps get the same cost under the K-FAC quadratic, at most 4 : 1.

    tr(S_d δA X δAᵀ) with X ≈ I tr S_u / ‖A‖², and tr(S_u δBᵀ Γ δB) with Γ ≈ I tr S_d / ‖B‖²: rank-space traces alone.
    """

    def factors(self, pair: LoraPair, steps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return √(ratio) and its inverse; ones while B = 0."""
        S_u, S_d = self.state[pair.B]["factor"], self.state[pair.A]["factor"]
        cost_A = torch.trace(S_d @ steps["A"] @ steps["A"].T) * torch.trace(S_u) / pair.A.square().sum()
        cost_B = torch.trace(S_u @ steps["B"].T @ steps["B"]) * torch.trace(S_d) / pair.B.square().sum()
        c = torch.nan_to_num((cost_B / cost_A) ** 0.25, nan=1.0, posinf=1.0).clamp(0.5, 2.0)
        return {"A": c, "B": 1 / c}
