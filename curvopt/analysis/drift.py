"""Drift: how far a run has moved, along which directions, and how much of that a lower rank would keep."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from curvopt.analysis.core import Core, Factors, cores
from curvopt.analysis.spectra import effective_rank
from curvopt.optim.checking import check, is_number


@dataclass(frozen=True)
class PairDrift:
    """How one pair has moved. See `drift` for the definitions; None where something is unknown or undefined."""

    name: str
    rank: int
    leading: int
    norm: float | None
    r_eff: float | None
    rho_align: float | None
    pi_proj: float | None
    angles_in: list[float] | None
    angles_out: list[float] | None


@dataclass(frozen=True)
class Drift:
    """How a model has moved.

    Attributes:
        norm: ‖ΔW‖_F of all pairs together.
        r_eff: mean over the pairs that have it, as the next two.
        rho_align: overlap of the update with the leading Fisher directions, in [0, 1].
        rho_chance: what a random update would score: the mean of k/r.
        pi_proj: share of the update's energy that the leading directions keep, in [0, 1].
        pairs: each pair.
    """

    norm: float
    r_eff: float | None
    rho_align: float | None
    rho_chance: float | None
    pi_proj: float | None
    pairs: list[PairDrift]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts."""
        return asdict(self)

    def __str__(self) -> str:
        told = {"|ΔW|": self.norm, "r_eff": self.r_eff, "ρ_align": self.rho_align, "π_proj": self.pi_proj}
        line = ", ".join(f"{word} {'unknown' if value is None else f'{value:.4g}'}" for word, value in told.items())
        return f"{line} ({len(self.pairs)} pairs)"


def drift(where: Any, factors: Factors | None = None, *, leading: float = 0.25) -> Drift:
    r"""Measure ΔW = s B A against the Fisher matrix of each pair; synchronises with the device. See also `observe`.

    - ``norm``: ‖ΔW‖_F = s √tr(BᵀB · A Aᵀ), from r×r Gram products.
    - ``r_eff``: entropy rank of the squared singular values of ΔW, over r.
    - ``angles_in``: principal angles between the span of the k leading right singular vectors of ΔW (Q_A V_k) and that
      of the k leading eigenvectors of E[xxᵀ] compressed to the row space of A (of X, brought to R^d_in by Q_A).
      ``angles_out``: the same on the left, with s² E[ggᵀ]. In radians, ascending. They do not depend on the gauge.
    - ``rho_align``: mean cos² of all 2k angles; 1 if the update lies along the Fisher's leading directions, k/r for
      a random one.
    - ``pi_proj``: Σ_{i≤k} σ_i² / Σ σ_i², what reprojection to rank k keeps of the update's energy tr(ΔWᵀ E[ggᵀ] ΔW
      E[xxᵀ]). In the balanced gauge ΔW = s Σ b_i a_iᵀ with a_iᵀ E[xxᵀ] a_j = s² b_iᵀ E[ggᵀ] b_j = σ_i δ_ij: the terms
      are orthogonal in this metric and have energy σ_i² each.

    Args:
        where: a module, an optimizer of curvopt, or a list of pairs.
        factors: S_u and S_d by pair name (`curvopt.analysis.observe`); None for those of the optimizer. Without any,
            only ``norm`` and ``r_eff`` are known.
        leading: k as a share of the rank in use, in (0, 1]; at least one direction.

    Raises:
        TypeError: ``where`` has no pairs.
        ValueError: ``leading`` out of range.
    """
    check("leading", leading, is_number(leading) and 0 < leading <= 1, "a number in (0, 1]")
    return gathered([pair_drift(c, leading) for c in cores(where, factors)])


def gathered(pairs: list[PairDrift]) -> Drift:
    """Return the whole of some pairs."""
    aligned = [p for p in pairs if p.rho_align is not None]
    return Drift(
        norm=math.sqrt(sum(p.norm**2 for p in pairs if p.norm is not None)),
        r_eff=_mean([p.r_eff for p in pairs]),
        rho_align=_mean([p.rho_align for p in aligned]),
        rho_chance=_mean([p.leading / p.rank for p in aligned]),
        pi_proj=_mean([p.pi_proj for p in pairs]),
        pairs=pairs,
    )


def pair_drift(c: Core, leading: float = 0.25) -> PairDrift:
    """Return the drift of one core; ``leading`` as in `drift`."""
    k = max(1, math.ceil(leading * c.rank - 1e-9))
    pi = None if c.energy is None else float(c.energy[:k].sum() / c.energy.sum())
    if not c.finite:
        return PairDrift(c.name, c.rank, k, None, None, None, pi, None, None)
    U, singular, Vh = torch.linalg.svd(c.C)
    norm = float(torch.linalg.vector_norm(singular))
    if norm == 0:  # no direction yet
        return PairDrift(c.name, c.rank, k, 0.0, None, None, pi, None, None)
    r_eff = effective_rank(singular.square(), normalised=True)
    if c.X is None or c.G is None:
        return PairDrift(c.name, c.rank, k, norm, r_eff, None, pi, None, None)
    into = principal_angles(Vh[:k].mT, _leading(c.X, k))
    out = principal_angles(U[:, :k], _leading(c.G, k))
    rho = float(torch.cat((into, out)).cos().square().mean())
    return PairDrift(c.name, c.rank, k, norm, r_eff, rho, pi, into.tolist(), out.tolist())


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """Return the principal angles of two subspaces in radians, ascending.

    Cosines above √½ come from their sines (Björck and Golub 1973): an arc cosine near 1 has lost half of its digits.

    Args:
        U: (d, k), orthonormal columns.
        V: (d, k), orthonormal columns.

    Returns:
        (k,), in [0, π/2].
    """
    cosines = torch.linalg.svdvals(U.mT @ V).clamp(max=1)
    sines = torch.linalg.svdvals(V - U @ (U.mT @ V)).clamp(max=1).flip(-1)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def _leading(S: Tensor, k: int) -> Tensor:
    return torch.linalg.eigh(S)[1].flip(-1)[:, :k]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
