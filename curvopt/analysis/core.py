"""One pair as r×r matrices: everything the analysis asks of ΔW = s B A, without ever forming it.

With the QR factors Aᵀ = Q_A R_A and B = Q_B R_B, ΔW = s Q_B (R_B R_Aᵀ) Q_Aᵀ: the singular values of ΔW are those of
the r×r core C = s R_B R_Aᵀ, and its singular vectors are Q_B U and Q_A V with C = U diag(ς) Vᵀ.

The second moments of the whole layer, E[xxᵀ] and E[ggᵀ], are known only through S_u = A E[xxᵀ] Aᵀ and
S_d = s² Bᵀ E[ggᵀ] B. Put in the QR factors: S_u = R_Aᵀ (Q_Aᵀ E[xxᵀ] Q_A) R_A, hence

    X = Q_Aᵀ E[xxᵀ] Q_A = R_A⁻ᵀ S_u R_A⁻¹,      G = s² Q_Bᵀ E[ggᵀ] Q_B = R_B⁻ᵀ S_d R_B⁻¹

are the layer's two K-FAC factors, compressed exactly to the row space of A and the column space of B, in orthonormal
coordinates. Angles between V and eigenvectors of X are therefore true angles in R^(d_in), and none of this depends on
the gauge (A, B) → (TA, BT⁻¹).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.functional.basis import balanced
from curvopt.lora import Capture, LoraPair, find_lora_pairs
from curvopt.optim import GritKFAC, PairedOptimizer
from curvopt.optim.grit.curvature import source_of
from curvopt.optim.grit.diagnostics import live_rank

# by pair name: S_u and S_d, (r, r)
Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Core:
    """The r×r matrices of a pair between its QR factors; float64, on the live directions.

    Attributes:
        name: the pair's name.
        rank: live directions k.
        full_rank: r of the tensors.
        C: core of ΔW, (k, k).
        X: compressed E[xxᵀ], (k, k); None without curvature.
        G: compressed s² E[ggᵀ], (k, k); None without curvature.
        energy: σ_i² in descending order, (k,); None without curvature.
    """

    name: str
    rank: int
    full_rank: int
    C: Tensor
    X: Tensor | None = None
    G: Tensor | None = None
    energy: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether ΔW has only finite numbers."""
        return bool(self.C.isfinite().all())


def core(pair: LoraPair, rank: int | None = None, moments: tuple[Tensor, Tensor] | None = None) -> Core:
    """Return the core of a pair.

    Args:
        pair: the pair as it is now.
        rank: live directions; None for all.
        moments: S_u and S_d, (r, r), any float dtype; None if they are not known.
    """
    k = pair.rank if rank is None else rank
    A = _matrix(pair, "A")[:k]
    B = _matrix(pair, "B")[:, :k]
    return core_of(pair.name, A, B, pair.scaling, moments, pair.rank)


def core_of(
    name: str,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    moments: tuple[Tensor, Tensor] | None = None,
    full_rank: int | None = None,
) -> Core:
    """Return the core of two matrices: ``A`` (k, d_in), ``B`` (d_out, k); ``moments`` may have more than k rows."""
    k = A.shape[0]
    full = k if full_rank is None else full_rank
    if not bool(A.isfinite().all() & B.isfinite().all()):
        return Core(name, k, full, torch.full((k, k), torch.nan, dtype=torch.float64))
    R_A = torch.linalg.qr(A.double().mT)[1].cpu()
    R_B = torch.linalg.qr(B.double())[1].cpu()
    C = scaling * R_B @ R_A.mT
    if C.shape != (k, k):  # wider than a layer: pad, so that there are k singular values, some of them zero
        C = nn.functional.pad(C, (0, k - C.shape[1], 0, k - C.shape[0]))
    X = G = energy = None
    if moments is not None:
        S_u, S_d = (S.detach().double().cpu()[:k, :k] for S in moments)
        energy = balanced(S_u[None], S_d[None]).sigma[0].square()
        energy = energy if bool(energy.isfinite().all()) and float(energy.sum()) > 0 else None
    if energy is not None and R_A.shape == R_B.shape == (k, k):
        X, G = _compressed(S_u, R_A), _compressed(S_d, R_B)
    return Core(name, k, full, C, X, G, energy)


def cores(where: Any, factors: Factors | None = None) -> list[Core]:
    """Return the core of every pair of a model or an optimizer; the factors are the optimizer's unless given.

    An optimizer may be wrapped by Accelerate, or a GoRAInit that has handed over to one that knows pairs.
    """
    where = paired(where)
    known = factors if factors is not None else known_factors(where)
    optimizer = where if isinstance(where, PairedOptimizer) else None
    return [
        core(p, live_rank(optimizer, p) if optimizer is not None else None, known.get(p.name)) for p in pairs_of(where)
    ]


def layers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer and those in it, the one at work last.

    Inside accelerate's wrapper there is one, and so there is behind a GoRAInit that has handed over.
    """
    found = [optimizer]
    while True:
        inner = getattr(found[-1], "optimizer", None) or getattr(found[-1], "delegate", None)
        if not isinstance(inner, torch.optim.Optimizer) or inner is found[-1]:
            return found
        found.append(inner)


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer at work: inside accelerate's wrapper, or that to which a GoRAInit has handed over."""
    return layers(optimizer)[-1]


def paired(where: Any) -> Any:
    """Return what of an optimizer knows the pairs: the innermost of curvopt's in it; anything else as it is.

    A GoRAInit that has handed over to a plain optimizer knows them, and the plain optimizer does not.
    """
    inside = layers(where) if isinstance(where, torch.optim.Optimizer) else []
    return next((o for o in reversed(inside) if isinstance(o, PairedOptimizer)), where)


def pairs_of(where: Any) -> list[LoraPair]:
    """Return the pairs of a model, of an optimizer of ours, or of a list of them.

    Raises:
        TypeError: ``where`` is none of these.
    """
    if isinstance(where, PairedOptimizer):
        return where.pairs
    if isinstance(where, nn.Module):
        return find_lora_pairs(where)
    if isinstance(where, (list, tuple)) and all(isinstance(p, LoraPair) for p in where):
        return list(where)
    raise TypeError(
        f"expected a module, an optimizer of curvopt or a list of LoraPair, got {type(where).__name__}; "
        "a plain torch optimizer knows no pairs, pass its model"
    )


def known_factors(where: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return S_u and S_d by pair name, as the optimizer has observed them.

    Pairs with a factor missing are left out, and so are those under ``statistics="weight"``: A Aᵀ and BᵀB depend on
    no data.
    """
    if not isinstance(where, GritKFAC):
        return {}
    of_data = {side.pair.name for side in where.sides if source_of(side).data}
    known = {name: S for name, S in where.factors().items() if name in of_data}
    return {name: (S.S_u, S.S_d) for name, S in known.items() if S.S_u is not None and S.S_d is not None}


def observe(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], adapter: str | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure S_u and S_d of every pair on some batches; for models trained by another optimizer, or on other data.

    Existing gradients and the parameters are not changed.

    Args:
        model: the model, in the mode (train or eval) to measure in.
        batches: any objects that ``loss`` accepts.
        loss: gives the mean loss of a batch, as training does.
        adapter: only this adapter's pairs.

    Returns:
        S_u = Σ uᵀu/N and S_d = N Σ dᵀd, averaged over the batches, by pair name.

    Raises:
        ValueError: no pair was reached by any batch.
    """
    pairs = find_lora_pairs(model, adapter)
    params = [p for pair in pairs for p in (pair.A, pair.B) if p.requires_grad]
    if not params:
        raise ValueError("model must have a LoRA pair with a parameter that requires a gradient, found none")
    capture = Capture(pairs, at_once=True)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    capture.attach()
    try:
        for batch in batches:
            torch.autograd.grad(loss(model, batch), params, allow_unused=True)
            for pair, sums in capture.pop().items():
                seen.setdefault(pair.name, []).append((sums.uu.double() / sums.n, sums.dd.double() * sums.n))
    finally:
        capture.remove()
    if not seen:
        raise ValueError("batches reached no LoRA pair: there were none, or the forward calls no adapter module")
    return {name: _mean(found) for name, found in seen.items()}


def layer_of(name: str) -> tuple[int | None, str]:
    """Return the layer number and the projection in a pair's name: ("model.layers.3.mlp.up_proj") → 3, up_proj.

    The first number in the path is the layer, the last word that is not a number the projection.
    """
    words = name.partition(":")[0].split(".")
    numbers = [int(word) for word in words if word.isdigit()]
    names = [word for word in words if not word.isdigit()]
    return (numbers[0] if numbers else None), (names[-1] if names else name)


def _matrix(pair: LoraPair, side: str) -> Tensor:
    """Return A as (r, d_in) or B as (d_out, r); a sharded parameter is gathered (every process must ask)."""
    p: Any = (pair.A if side == "A" else pair.B).detach()
    p = p.full_tensor() if hasattr(p, "full_tensor") else p
    X = pair.matrix(side, p)
    rank_dim = pair.dim_A if side == "A" else pair.dim_B
    usual = 0 if side == "A" else 1
    return X if rank_dim == usual else X.mT


def _compressed(S: Tensor, R: Tensor) -> Tensor:
    P = torch.linalg.pinv(R, rtol=1e-12)
    M = P.mT @ S @ P
    return (M + M.mT) / 2


def _mean(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([u for u, _ in found]).mean(0), torch.stack([d for _, d in found]).mean(0)
