"""The curvature factors of GritKFAC for reading: copies, by pair, in the layout of the mathematics."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvopt.distributed import whole
from curvopt.optim.base import PairedOptimizer, Side
from curvopt.optim.bucket import BASIS


class PairFactors(NamedTuple):
    """The rank-side factors of one pair.

    Attributes:
        S_u: average of uᵀu / N, u = x Aᵀ, ``(r, r)`` in float32 or float64; zeros before the first observation. None
            if no trained side of the pair is preconditioned by it.
        S_d: average of N dᵀd, d = ∂L/∂u, likewise.
    """

    S_u: Tensor | None
    S_d: Tensor | None


@dataclass(frozen=True)
class OuterFactor:
    """The outer factor of one LoRA matrix: S ≈ Vᵀ diag(μ) V + ρ (I − VᵀV); see `curvopt.functional.outer`.

    S is the average of ∇Aᵀ∇A / r for A, of ∇B ∇Bᵀ / r for B, without bias correction: after t steps its weights sum
    to 1 − βᵗ. Only its shape acts.

    Attributes:
        basis: V, ``(k, d)``, orthonormal rows up to rounding, in the dtype of the parameter.
        eigenvalues: μ, ``(k,)`` in float32 or float64, in no particular order.
        rest: ρ, 0-d: the mean eigenvalue of the d − k other directions; 0 if there are none.
    """

    basis: Tensor
    eigenvalues: Tensor
    rest: Tensor

    def dense(self) -> Tensor:
        """Return S as a matrix, ``(d, d)`` float64: for looking at small layers."""
        V, d = self.basis.double(), self.basis.shape[1]
        eye = torch.eye(d, dtype=V.dtype, device=V.device)
        return self.rest.double() * eye + V.mT @ ((self.eigenvalues - self.rest).double()[:, None] * V)


def rank_factors(optimizer: PairedOptimizer) -> dict[str, PairFactors]:
    """Return S_u and S_d by pair name; pairs of which neither is kept are left out."""
    found: dict[str, dict[str, Tensor]] = {}
    for side in optimizer.sides:
        factor = optimizer.state.get(side.param, {}).get("factor")
        if factor is not None:
            found.setdefault(side.pair.name, {})[side.moment()] = factor.clone()
    return {name: PairFactors(S.get("u"), S.get("d")) for name, S in found.items()}


def outer_factors(optimizer: PairedOptimizer) -> dict[str, dict[str, OuterFactor]]:
    """Return the outer factors by pair name and side, ``"A"`` or ``"B"``; those that are not kept are left out."""
    found: dict[str, dict[str, OuterFactor]] = {}
    for side in optimizer.sides:
        state = optimizer.state.get(side.param, {})
        if BASIS in state:
            found.setdefault(side.pair.name, {})[side.name] = _outer(side, state)
    return found


def _outer(side: Side, state: dict[str, Any]) -> OuterFactor:
    V = side.matrix(whole(state[BASIS]))  # a collective
    V = V if side.rank_dim == 1 else V.mT
    k, d = V.shape
    mu = state["outer_eigenvalues"].clone()
    rest = ((state["outer_trace"] - mu.sum()) / max(d - k, 1)).clamp(min=0) * (d > k)
    return OuterFactor(V.clone(memory_format=torch.contiguous_format), mu, rest)
