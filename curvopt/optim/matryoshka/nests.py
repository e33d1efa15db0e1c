"""What nested ranks mean for one pair: its own ranks and P, and what of the settings is refused."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt.functional.nested import (
    SCALES,
    diagonal,
    powers_of_two,
    prefix,
    sampled_diagonal,
    sampled_rank,
)
from curvopt.lora import LoraPair
from curvopt.optim.base import RankSpaceOptimizer
from curvopt.optim.checking import check, is_whole
from curvopt.optim.stacks import Side

NESTINGS = ("matryoshka", "dylora", "lora")
SHARED = ("ranks", "scale", "nesting")  # what the groups that hold a pair's A and B must agree on


@dataclass(eq=False)
class Nest:
    """The nested ranks of one pair, under the settings of its group.

    Attributes:
        pair: the pair.
        group: the param group.
        ranks: its trained ranks, ascending: the group's up to r.
        scaling: s of the module's s B Ã, divided out of Ã.
        drawn: DyLoRA's ρ that the module holds; None: the largest.
    """

    pair: LoraPair
    group: dict[str, Any]
    ranks: tuple[int, ...]
    scaling: float
    drawn: int | None = None

    @property
    def sampled(self) -> bool:
        """Whether the module holds one drawn rank at a time."""
        return bool(self.group["nesting"] == "dylora")

    @property
    def P(self) -> tuple[float, ...]:
        """P of what the module holds now."""
        r, scale = self.pair.rank, self.group["scale"]
        if self.sampled:
            return sampled_diagonal(self.drawn or self.ranks[-1], r, scale)
        return diagonal(self.ranks, r, scale)

    @property
    def rates(self) -> tuple[float, ...]:
        """Q = P / s, row by row: Ã = Q A."""
        return tuple(p / self.scaling for p in self.P)

    def draw(self, u: float) -> None:
        """Take the rank that a uniform number in [0, 1) picks."""
        self.drawn = sampled_rank(self.ranks, u)

    def prefix(self, rank: int, full: bool) -> tuple[float, ...]:
        """Return the factors that take the rows of Ã (or, if ``full``, of A itself) to the adapter of one rank."""
        r, scale = self.pair.rank, self.group["scale"]
        if full:
            return tuple(p / self.scaling for p in sampled_diagonal(rank, r, scale))
        P = sampled_diagonal(self.ranks[-1], r, scale) if self.sampled else self.P
        return prefix(P, rank, scale)

    def check_unused(self) -> None:
        """Raise a ValueError if directions above the largest rank take part in ΔW."""
        pair, top = self.pair, self.ranks[-1]
        rest = pair.rank - top
        A, B = pair.A.detach().narrow(pair.dim_A, top, rest), pair.B.detach().narrow(pair.dim_B, top, rest)
        used = A.movedim(pair.dim_A, 0).flatten(1).any(1) & B.movedim(pair.dim_B, 0).flatten(1).any(1)
        allowed = f"up to {pair.rank} where that many directions are in use ({pair.name})"
        check("ranks", self.ranks, not used.any(), allowed)

    def row_rates(self, name: str) -> tuple[float, ...] | None:
        """Return the learning rate of each direction of a side, or None for all ones: B, and A kept in the state."""
        return None if name == "B" or self.sampled else self.rates


@dataclass(eq=False)
class RowSide(Side):
    """A side that stacks only with sides of equal rates.

    Attributes:
        nest: that of its pair.
    """

    nest: Nest | None = None

    def key(self) -> tuple[Any, ...]:
        """Return what sides must share to be stacked."""
        return (*super().key(), self.nest.row_rates(self.name) if self.nest is not None else None)


def nests(sides: Sequence[Side]) -> dict[LoraPair, Nest]:
    """Return the nest of every pair, at the rank that its group has drawn."""
    made: dict[LoraPair, Nest] = {}
    for s in sides:
        if s.pair not in made:
            ranks = own_ranks(s.group, s.pair.rank)
            nest = made[s.pair] = Nest(s.pair, s.group, ranks, s.pair.scaling)
            if nest.sampled and s.group["draw"] is not None and ranks:
                nest.draw(s.group["draw"])
    return made


def own_ranks(g: dict[str, Any], r: int) -> tuple[int, ...]:
    """Return the ranks that a pair of rank r is trained at; empty if none of the group's fits."""
    if g["nesting"] == "lora":
        return (r,)
    return powers_of_two(r) if g["ranks"] is None else tuple(k for k in g["ranks"] if k <= r)


def noted(groups: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the settings that nests are made of, by group."""
    return [(None if g["ranks"] is None else tuple(g["ranks"]), g["scale"], g["nesting"]) for g in groups]


def check_group(g: dict[str, Any]) -> None:
    """Raise a ValueError for settings that no pair could have."""
    for name, allowed in (("scale", SCALES), ("nesting", NESTINGS)):
        check(name, g[name], g[name] in allowed, f"one of {', '.join(map(repr, allowed))}")
    ranks = g["ranks"]
    listed = isinstance(ranks, (list, tuple)) and len(ranks) > 0
    whole = listed and all(is_whole(k) and k >= 1 for k in ranks)
    ascending = whole and all(a < b for a, b in itertools.pairwise(ranks))
    check("ranks", ranks, ranks is None or ascending, "None or ascending integers ≥ 1")


def check_pairs(sides: Sequence[Side]) -> None:
    """Raise a ValueError for groups of a pair that disagree, for ranks that fit no pair, and for a pair none fits."""
    first: dict[LoraPair, Side] = {}
    for side in sides:
        g, other, pair = side.group, first.setdefault(side.pair, side).group, side.pair
        for name in SHARED:
            same = g[name] == other[name]
            check(f"{name} of {pair.name}", (other[name], g[name]), same, "the same in the groups of its A and B")
        fits = bool(own_ranks(g, pair.rank))
        check("ranks", g["ranks"], fits, f"such that one is at most {pair.rank}, the rank of {pair.name}")
        check(f"scaling of {pair.name}", pair.scaling, pair.scaling > 0, "above 0")
    for g in {id(side.group): side.group for side in sides}.values():
        most = max(side.pair.rank for side in sides if side.group is g)
        fits = g["ranks"] is None or g["ranks"][-1] <= most
        check("ranks", g["ranks"], fits, f"at most {most}, the largest rank of a pair")


def check_unclaimed(sides: Sequence[Side], others: Iterable[Sequence[Side]]) -> None:
    """Raise a ValueError if one of ``others``, sides of living optimizers, has a parameter of ``sides``."""
    mine = {id(s.param): s.pair.name for s in sides}
    taken = [mine[id(s.param)] for other in others for s in other if id(s.param) in mine]
    if taken:
        raise ValueError(
            f"params must be of no other MatryoshkaScaledAdam, lest A be scaled twice, but {taken[0]!r} is of one that "
            "is alive: delete it, or call its release()"
        )


def check_edited(before: list[tuple[Any, ...]], now: list[tuple[Any, ...]]) -> None:
    """Raise a ValueError if a group's nesting is not what it was."""
    for old, new in zip(before, now, strict=True):
        check("nesting", new[-1], old[-1] == new[-1], f"what it was when the optimizer was made, {old[-1]!r}")


def diagnose(optimizer: RankSpaceOptimizer, nests: Mapping[LoraPair, Nest]) -> dict[str, Any]:
    """Return what there is to say of an optimizer and its pairs; reads the device."""
    skipped = [float(s["skipped"]) for s in optimizer.state.values() if "skipped" in s]
    return {
        "skipped_updates": int(max(skipped, default=0)),
        "backend": optimizer._ops.backend,
        "fallbacks": sorted(optimizer._ops.fallbacks),
        "pairs": {
            pair.name: {"rank": pair.rank, "ranks": nest.ranks, "P": nest.P, "scaling": nest.scaling}
            for pair, nest in nests.items()
        },
    }


def given(grad: Tensor | None) -> Tensor:
    """Return the gradient of a live side."""
    if grad is None:
        raise RuntimeError("a stack has gradients for all of its sides or for none")
    return grad


def trace(grads: Sequence[Tensor | None]) -> Tensor:
    """Return one number for each gradient, finite only if all of the gradient is, and in one read of it."""
    found = [given(g) for g in grads]
    if found[0].is_cuda:
        return torch.stack(torch._foreach_norm(found, float("inf")))
    if found[0].dtype in (torch.float16, torch.bfloat16):
        return torch.stack([g.sum(dtype=torch.float32) for g in found])
    return torch.stack([g.sum() for g in found])


def scaled_rows(X: Tensor, factors: Sequence[float], dim: int) -> Tensor:
    """Return X with direction i of dimension ``dim`` times ``factors[i]``; 0 where that is 0."""
    shape = [1] * X.ndim
    shape[dim] = len(factors)
    wide = torch.float64 if X.dtype == torch.float64 else torch.float32
    f = torch.tensor(factors, dtype=wide, device=X.device).view(shape)
    return torch.where(f == 0, torch.zeros((), dtype=wide, device=X.device), X.detach().to(wide) * f).to(X.dtype)
