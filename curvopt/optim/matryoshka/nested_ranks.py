"""What nested ranks mean for one pair: its own ranks and P, and what of the settings is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from curvopt.distributed import used_directions
from curvopt.functional.nested import (
    SCALES,
    diagonal,
    powers_of_two,
    prefix,
    sampled_diagonal,
    sampled_rank,
)
from curvopt.lora import LoraPair
from curvopt.optim import nesting
from curvopt.optim.base import PairedOptimizer, Side
from curvopt.optim.checking import check, is_whole

Nesting = Literal["matryoshka", "dylora", "lora", "stratified"]
NESTINGS = get_args(Nesting)
# what the groups that hold a pair's A and B must agree on
SHARED = ("ranks", "scale", "nesting", "full_share", "warmup_steps", "reorder_every")


@dataclass(eq=False)
class NestedRanks:
    """The nested ranks of one pair, under the settings of its group.

    Attributes:
        pair: the pair.
        group: the param group.
        ranks: its trained ranks, ascending: the group's up to r.
        scale: the group's s(ρ); with the ranks as they were when the group was last read.
        scaling: s of the module's s B Ã, divided out of Ã.
        drawn: DyLoRA's ρ that the module holds; None: the largest.
    """

    pair: LoraPair
    group: dict[str, Any]
    ranks: tuple[int, ...]
    scale: str
    scaling: float
    drawn: int | None = None

    @property
    def sampled(self) -> bool:
        """Whether the module holds one drawn rank at a time."""
        return bool(self.group["nesting"] == "dylora")

    @property
    def masked(self) -> bool:
        """Whether samples are masked, and the module holds A itself."""
        return bool(self.group["nesting"] == "stratified")

    @property
    def P(self) -> tuple[float, ...]:
        """P of what the module holds now."""
        r, scale = self.pair.rank, self.scale
        if self.masked:
            return (self.scaling,) * r
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
        r, scale = self.pair.rank, self.scale
        if self.masked:
            return sampled_diagonal(rank, r)
        if full:
            return tuple(p / self.scaling for p in sampled_diagonal(rank, r, scale))
        P = sampled_diagonal(self.ranks[-1], r, scale) if self.sampled else self.P
        return prefix(P, rank, scale)

    def check_unused(self, A: Tensor | None = None) -> None:
        """Raise a ValueError if directions above the largest rank take part in ΔW; ``A`` if the module lacks some."""
        pair = self.pair
        A, B = used_directions((pair.A if A is None else A, pair.B), (pair.dim_A, pair.dim_B))
        used = (A & B)[self.ranks[-1] :]
        allowed = f"up to {pair.rank} where that many directions are in use ({pair.name})"
        check("ranks", self.ranks, not used.any(), allowed)

    def row_rates(self, name: str) -> tuple[float, ...] | None:
        """Return the learning rate of each direction of a side, or None for all ones: B, and A itself."""
        return None if name == "B" or self.sampled or self.masked else self.rates


def nests(sides: Sequence[Side], draw: float | None) -> dict[LoraPair, NestedRanks]:
    """Return the nested ranks of every pair, at the rank that was drawn last by the uniform number ``draw``."""
    made: dict[LoraPair, NestedRanks] = {}
    for s in sides:
        if s.pair not in made:
            ranks = own_ranks(s.group, s.pair.rank)
            nest = made[s.pair] = NestedRanks(s.pair, s.group, ranks, s.group["scale"], s.pair.scaling)
            if nest.sampled and draw is not None and ranks:
                nest.draw(draw)
    return made


def own_ranks(g: dict[str, Any], r: int) -> tuple[int, ...]:
    """Return the ranks that a pair of rank r is trained at; empty if none of the group's fits."""
    if g["nesting"] == "lora":
        return (r,)
    if g["nesting"] == "stratified":
        return nesting.sample_ranks(g["ranks"], r)
    return powers_of_two(r) if g["ranks"] is None else tuple(k for k in g["ranks"] if k <= r)


def check_group(g: dict[str, Any]) -> None:
    """Raise a ValueError for settings that no pair could have."""
    for name, allowed in (("scale", SCALES), ("nesting", NESTINGS)):
        check(name, g[name], g[name] in allowed, f"one of {', '.join(map(repr, allowed))}")
    nesting.check_ranks(g, "ranks")
    nesting.check_schedule(g, "warmup_steps")
    every = g["reorder_every"]
    check("reorder_every", every, is_whole(every) and every >= 0, "an integer ≥ 0")
    plain = g["nesting"] != "stratified" or g["scale"] == "none"
    check("scale", g["scale"], plain, "'none' for nesting='stratified': samples keep the scaling of the module")


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
        if g["nesting"] in ("matryoshka", "dylora"):  # a bias would not be cut with the rows of A
            check(f"nesting of {pair.name}", g["nesting"], not pair.biased, f"'lora' ({pair.bound})")
        if g["nesting"] == "stratified":
            nesting.check_maskable(pair, "nesting", g["nesting"], "another than 'stratified'")
    nesting.check_largest(sides, "ranks")


def diagnose(optimizer: PairedOptimizer, nests: Mapping[LoraPair, NestedRanks]) -> dict[str, Any]:
    """Return what there is to say of an optimizer and its pairs; reads the device."""
    skipped = [float(s["skipped"]) for s in optimizer.state.values() if "skipped" in s]
    return {
        "skipped_updates": int(max(skipped, default=0)),
        "backend": optimizer.ops.backend,
        "fallbacks": sorted(optimizer.ops.fallbacks),
        "pairs": {
            pair.name: {"rank": pair.rank, "ranks": nest.ranks, "P": nest.P, "scaling": nest.scaling}
            for pair, nest in nests.items()
            if pair.exists
        },
    }


def scaled_rows(X: Tensor, factors: Sequence[float], dim: int) -> Tensor:
    """Return X with direction i of dimension ``dim`` times ``factors[i]``; 0 where that is 0."""
    shape = [1] * X.ndim
    shape[dim] = len(factors)
    wide = torch.float64 if X.dtype == torch.float64 else torch.float32
    f = torch.tensor(factors, dtype=wide, device=X.device).view(shape)
    return torch.where(f == 0, torch.zeros((), dtype=wide, device=X.device), X.detach().to(wide) * f).to(X.dtype)
