"""Spectra: over which directions a pair's curvature and its update are spread, and over how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from curvopt.analysis.core import Core, Factors, cores, layer_of
from curvopt.functional.ranks import entropy_rank


@dataclass(frozen=True)
class Spectrum:
    """Energies of one pair, plain numbers.

    Attributes:
        name: the pair's name.
        layer: the layer number its name tells, or None.
        projection: the last word of its name: q_proj, up_proj, ...
        rank: live directions.
        full_rank: rank of the tensors.
        energy: σ_i², eigenvalues of S_u S_d, descending (dropping direction i raises the loss by half of it); None if
            unknown.
        singular: singular values of ΔW = s B A, descending; None if a parameter is not finite.
    """

    name: str
    layer: int | None
    projection: str
    rank: int
    full_rank: int
    energy: list[float] | None
    singular: list[float] | None

    @property
    def effective_rank(self) -> float | None:
        """Entropy rank of the curvature's energy; None if it is unknown."""
        return None if self.energy is None else effective_rank(self.energy)

    @property
    def update_rank(self) -> float | None:
        """Entropy rank of ΔW, from its squared singular values; 0 while ΔW is zero."""
        return None if self.singular is None else effective_rank([x * x for x in self.singular])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and both ranks."""
        return {**asdict(self), "effective_rank": self.effective_rank, "update_rank": self.update_rank}


def spectra(where: Any, factors: Factors | None = None) -> list[Spectrum]:
    """Return the spectrum of every pair; synchronises with the device.

    Args:
        where: a module, an optimizer of curvopt, or a list of pairs.
        factors: S_u and S_d by pair name (`observe`); None for those of the optimizer.
    """
    return [spectrum(c) for c in cores(where, factors)]


def spectrum(c: Core) -> Spectrum:
    """Return the spectrum of one core."""
    layer, projection = layer_of(c.name)
    energy = None if c.energy is None else c.energy.tolist()
    singular = torch.linalg.svdvals(c.C).tolist() if c.finite else None
    return Spectrum(c.name, layer, projection, c.rank, c.full_rank, energy, singular)


def effective_rank(energy: Tensor | Sequence[float], *, normalised: bool = False) -> float:
    """Return exp(H(p)), p = energy / Σ energy: how many directions the energy is spread over.

    Args:
        energy: non-negative, (r,): σ_i² of a balanced pair, or squared singular values.
        normalised: divide by r: between 1/r and 1.

    Returns:
        Between 1 and r; 0 without any energy.

    Raises:
        ValueError: empty, negative or not finite.
    """
    values = torch.as_tensor(energy, dtype=torch.float64)
    if values.ndim != 1 or values.numel() == 0 or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"energy must be one row of finite numbers ≥ 0, got {energy!r}")
    rank = float(entropy_rank(values / values.max() if values.max() > 0 else values))  # sums of 1e308 overflow
    return rank / values.numel() if normalised else rank


def cumulative(energy: Sequence[float]) -> list[float]:
    """Return the shares of the energy that the first 1, 2, ..., r directions hold; zeros without any energy."""
    total = sum(energy)
    return [part / total if total > 0 else 0.0 for part in accumulate(energy)]
