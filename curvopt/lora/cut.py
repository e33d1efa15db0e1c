"""Smaller ranks of an adapter trained by any optimizer: in which basis directions are ordered, and how many are kept.

Keeping the leading ρ directions of B A depends on the basis in rank space. In the stored basis the order is meaningful
only after training for it (`MatryoshkaScaledAdam`, GritKFAC's balanced reprojection). Two other bases order the
directions of any adapter and leave ΔW unchanged: the singular vectors of B A, in which the leading directions are the
best adapter of their rank in the Frobenius norm; and the balanced basis, in which they are the best under the K-FAC
quadratic, given the factors S_u and S_d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from curvopt.distributed import reshard
from curvopt.functional import basis as gauge
from curvopt.functional.nested import product_svd
from curvopt.functional.ranks import energy_rank
from curvopt.lora.pair import LoraPair
from curvopt.lora.pairs import find_lora_pairs
from curvopt.lora.resize import by_pair, check_cut

Basis = Literal["stored", "svd", "balanced"]
Ranks = Mapping[str, int] | int | None
Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class OrderedPair:
    """The matrices of a pair in an ordered basis, laid out and typed like its parameters.

    Attributes:
        A: Like the parameter A.
        B: Like the parameter B; B A is that of the parameters, to a rounding of their dtype.
        energy: (r,) float64, what dropping each direction costs, in descending order: σ² of B A ("svd"), or twice the
            rise of the loss under the K-FAC quadratic ("balanced"). None for "stored", where it is not known.
    """

    A: Tensor
    B: Tensor
    energy: Tensor | None = None


def order_pair(pair: LoraPair, basis: Basis, factors: tuple[Tensor, Tensor] | None = None) -> OrderedPair:
    """Return copies of a pair's matrices in an ordered basis; computed in float64, never at the size of W.

    Args:
        pair: The pair, of any kind.
        basis: ``"stored"``: as they are; ``"svd"``; or ``"balanced"``, which needs factors.
        factors: S_u and S_d, (r, r) each.

    Raises:
        ValueError: If the matrices are sharded, or A has a bias, which no change of basis carries.
    """
    check_cut(pair, pair.rank)
    if basis == "stored":
        return OrderedPair(pair.A.detach(), pair.B.detach())
    if pair.bound:
        raise ValueError(f"basis={basis!r}: {pair.bound} ({pair.name}); basis='stored' keeps it")
    A, B = (_rank_first(pair, side).to(torch.float64) for side in "AB")
    if basis == "svd":
        A, B_last, sigma = product_svd(A, B.mT)
        B = B_last.mT
    else:
        assert factors is not None, "checked by `basis_of`"
        S_u, S_d = (S.detach().to(A)[None] for S in factors)
        T, T_inv, sigmas = gauge.balanced(S_u, S_d, max_condition=math.inf)
        A, B, sigma = T[0] @ A, T_inv[0].mT @ B, sigmas[0]
    return OrderedPair(_laid_out(pair, "A", A), _laid_out(pair, "B", B), sigma.square())


def _rank_first(pair: LoraPair, side: str) -> Tensor:
    X = pair.matrix(side, (pair.A if side == "A" else pair.B).detach())
    return X.mT if (pair.dim_A if side == "A" else pair.dim_B) == 1 else X


def _laid_out(pair: LoraPair, side: str, X: Tensor) -> Tensor:
    """Return a matrix with the rank first as a tensor like the parameter."""
    new = torch.empty_like((pair.A if side == "A" else pair.B).detach())
    pair.matrix(side, new).copy_(X.mT if (pair.dim_A if side == "A" else pair.dim_B) == 1 else X)
    return new


def ordered(pairs: Sequence[LoraPair], basis: Any, factors: Any, adapter: str | None) -> dict[LoraPair, OrderedPair]:
    """Return `order_pair` of each pair.

    Raises:
        TypeError: If `factors` is not a mapping.
        ValueError: If the basis is unknown, factors are given for another, or one is missing or of another rank.
    """
    if basis not in get_args(Basis):
        raise ValueError(f"basis must be one of {', '.join(map(repr, get_args(Basis)))}, got {basis!r}")
    if (factors is not None) != (basis == "balanced"):
        word = "missing" if factors is None else "given"
        raise ValueError(f"factors must be given for basis='balanced' and for it alone, are {word} for {basis!r}")
    if factors is None:
        return {pair: order_pair(pair, basis) for pair in pairs}
    if not isinstance(factors, Mapping):
        raise TypeError(f"factors must be a mapping of pair names to (S_u, S_d), got {type(factors).__name__}")
    found = by_pair(list(pairs), factors, adapter)
    for pair in pairs:
        given = found.get(pair)
        if given is None:
            hint = "" if factors else " (GritKFAC keeps factors with statistics='activation', not by default)"
            raise ValueError(f"factors must have all pairs, {pair.name} is missing{hint}")
        if len(given) != 2 or any(S.shape != (pair.rank, pair.rank) for S in given):
            shapes = [tuple(S.shape) for S in given]
            raise ValueError(f"factors of {pair.name} must be two of shape {(pair.rank, pair.rank)}, got {shapes}")
    return {pair: order_pair(pair, basis, found[pair]) for pair in pairs}


def kept_ranks(pairs: Sequence[LoraPair], ranks: Ranks, adapter: str | None) -> dict[LoraPair, int]:
    """Return the rank of each pair that is kept: its own, one number for all that have more, or by name.

    Raises:
        TypeError: If a rank is not an integer.
        ValueError: If a name is unknown, a rank below 1 or above the pair's own, or a pair cannot be cut.
    """
    if ranks is not None and (not isinstance(ranks, (int, Mapping)) or isinstance(ranks, bool)):
        raise TypeError(f"ranks must be an int or a mapping, got {type(ranks).__name__}")
    kept = {pair: pair.rank for pair in pairs}
    if isinstance(ranks, Mapping):
        kept.update(by_pair(list(pairs), ranks, adapter))
    elif ranks is not None:
        kept = {pair: min(ranks, pair.rank) for pair in pairs}
    for pair, rank in kept.items():
        check_cut(pair, rank)
        if rank > pair.rank:
            raise ValueError(f"ranks: {pair.name} has rank {pair.rank}, {rank} cannot be cut from it")
    return kept


def ranks_by_energy(made: Mapping[LoraPair, OrderedPair], energy: Any) -> dict[LoraPair, int]:
    """Return the smallest rank of each pair that keeps a share of its energy; all of it for a pair without any.

    Raises:
        TypeError: If `energy` is not a number.
        ValueError: If it is not in (0, 1], or the basis is the stored one.
    """
    if not isinstance(energy, (int, float)) or isinstance(energy, bool):
        raise TypeError(f"energy must be a number, got {type(energy).__name__}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy!r}")
    ranks = {}
    for pair, own in made.items():
        if own.energy is None:
            raise ValueError(f"energy={energy!r} needs basis='svd' or basis='balanced', got 'stored'")
        ranks[pair] = int(energy_rank(own.energy[None], energy)[0])
    return ranks


@contextmanager
def truncated(
    model: nn.Module,
    ranks: Ranks = None,
    *,
    energy: float | None = None,
    basis: Basis = "svd",
    factors: Factors | None = None,
    adapter: str | None = None,
) -> Iterator[dict[str, int]]:
    """Return a context in which the model's adapter is cut to smaller ranks; afterwards it is restored bit for bit.

    Works for adapters of any library, trained by any optimizer. Shapes are kept: directions left out are zero.

    Args:
        model: The model with the adapters.
        ranks: One rank for all pairs that have more, or {pair name: rank}; pairs that are not named keep theirs.
        energy: Instead of ranks: the share of its energy that each pair keeps, in (0, 1]; see `OrderedPair`.
        basis: The basis whose leading directions are kept: ``"svd"`` of B A, ``"balanced"``, or ``"stored"``.
        factors: For ``"balanced"``: {pair name: (S_u, S_d)}, (r, r) each, of all pairs.
        adapter: Only this PEFT adapter; None for all pairs of the model.

    Yields:
        {pair name: rank}.

    Raises:
        TypeError: As `curvopt.lora.export_adapter` does.
        ValueError: As it does; or the model does not compute with the adapter, which is merged into the base weights,
            disabled or not active.
    """
    reshard(model)  # so that sharded matrices are seen as such, and refused
    pairs = find_lora_pairs(model, adapter)
    check_at_work(pairs)
    made, kept = cut(pairs, ranks, energy, basis, factors, adapter)
    held = {pair: (pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs}
    try:
        with torch.no_grad():
            for pair, own in made.items():
                for parameter, new, dim in ((pair.A, own.A, pair.dim_A), (pair.B, own.B, pair.dim_B)):
                    parameter.copy_(new)
                    parameter.narrow(dim, kept[pair], pair.rank - kept[pair]).zero_()
        yield {pair.name: rank for pair, rank in kept.items()}
    finally:
        with torch.no_grad():
            for pair, (A, B) in held.items():
                pair.A.copy_(A)
                pair.B.copy_(B)


def check_at_work(pairs: Sequence[LoraPair]) -> None:
    """Raise a ValueError if the model does not compute with the pairs; some may rest while other adapters work."""
    idle = {pair: pair.idle for pair in pairs}
    resting = [pair for pair in pairs if idle[pair]]
    found = [pair for pair in resting if idle[pair] != "inactive"] or (resting if len(resting) == len(pairs) else [])
    if found:
        remedy = {
            "merged": "call unmerge_adapter() of the PeftModel first",
            "disabled": "leave disable_adapter(), or call enable_adapters()",
            "inactive": f"call set_adapter({found[0].adapter!r}) first",
        }[idle[found[0]]]
        raise ValueError(
            f"{found[0].name} is {idle[found[0]]}: cutting it would change nothing that the model computes; {remedy}"
        )


def cut(
    pairs: Sequence[LoraPair], ranks: Ranks, energy: float | None, basis: Any, factors: Any, adapter: str | None
) -> tuple[dict[LoraPair, OrderedPair], dict[LoraPair, int]]:
    """Return every pair in an ordered basis, and how many of its directions are kept; see `truncated`."""
    if ranks is not None and energy is not None:
        raise ValueError(f"ranks and energy cannot both be given, got {ranks!r} and {energy!r}")
    kept = kept_ranks(pairs, ranks, adapter)
    made = ordered(pairs, basis, factors, adapter)
    return made, (kept if energy is None else ranks_by_energy(made, energy))
