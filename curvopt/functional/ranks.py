"""How many directions are worth keeping: energy rule, hysteresis, entropy rank, and a budget shared out by layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor


def energy_rank(energy: Tensor, threshold: float, min_rank: int = 1, k: Tensor | None = None) -> Tensor:
    """Return the smallest rank that holds a share ``threshold`` of the energy.

    ``energy`` is σ² for the balanced basis (GRIT's eigenvalues of S_u for the published one); the rule is
    Σ_{i≤k} energy_i ≥ τ Σ energy_i, clamped to [min_rank, k].

    Args:
        energy: ``[L, r]``, non-negative, in descending order.
        threshold: τ in (0, 1].
        min_rank: lower clamp; where fewer directions are live, that many.
        k: ``[L]`` live ranks (upper clamp), or None for r.

    Returns:
        ``[L]`` int64. Where there is no energy at all: the upper clamp, since nothing is known.
    """
    r = energy.shape[-1]
    top = torch.full(energy.shape[:-1], r, device=energy.device) if k is None else k.long()
    total = energy.sum(-1)
    # the last direction that still adds something is enough, also where rounding leaves the sum below total
    cumulative = energy.cumsum(-1)
    target = torch.minimum(threshold * total, cumulative[..., -1])
    asked = (cumulative < target.unsqueeze(-1)).sum(-1) + 1
    asked = torch.minimum(asked.clamp(min=min_rank), top)
    return torch.where(total > 0, asked, top)


def entropy_rank(energy: Tensor) -> Tensor:
    """Return exp(H(p)) with p = energy / Σ energy: between 1 and r, r for a flat spectrum, 0 without energy.

    Args:
        energy: ``[..., r]``, non-negative.
    """
    total = energy.sum(-1, keepdim=True)
    p = energy / torch.where(total > 0, total, 1.0)
    H = -torch.xlogy(p, p).sum(-1)
    return torch.where(total.squeeze(-1) > 0, H.exp(), 0.0)


def hysteresis(k: Tensor, asked: Tensor, pending: Tensor, room: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the next rank, such that a single noisy spectrum does not remove a direction.

    The rank goes down only when the rule asked for fewer directions in two checks in a row, and then to the larger
    of the two. It goes up by one when the rule keeps all live directions and there is ``room`` for another.

    Args:
        k: ``[L]`` live ranks.
        asked: ``[L]`` ranks the energy rule asks for now, at most ``k``.
        pending: ``[L]`` what it asked for at the last check if that was below ``k``, else 0.
        room: ``[L]`` booleans: whether the spectrum is still heavy at its end (`heavy_tail`).
        r: full rank of the tensors.

    Returns:
        The new ``k`` and the new ``pending``, both ``[L]``.
    """
    down = (asked < k) & (pending > 0)
    up = (asked >= k) & room & (k < r)
    new_k = torch.where(down, torch.maximum(asked, pending), torch.where(up, k + 1, k))
    new_pending = torch.where((asked < k) & ~down, asked, torch.zeros_like(pending))
    return new_k, new_pending


def heavy_tail(energy: Tensor, threshold: float, k: Tensor) -> Tensor:
    """Return ``[L]`` booleans: the last live direction alone holds more than twice what the rule may drop, 2(1 − τ)."""
    last = energy.gather(-1, (k.long() - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return last > 2 * (1 - threshold) * energy.sum(-1)


# -------------------------------------------------------------------------------------------- sharing out a budget

BUDGET_WEIGHTS: dict[str, Callable[[float], float]] = {"linear": float, "sqrt": math.sqrt, "log1p": math.log1p}
BudgetWeight = Literal["linear", "sqrt", "log1p"]  # the keys of BUDGET_WEIGHTS
Allocation = Literal["exact", "paper", "uniform", "spectrum"]
ALLOCATIONS = get_args(Allocation)


@dataclass(frozen=True)
class RankPlan:
    """Which layer gets which rank; plain data, and a table when it is printed.

    Attributes:
        ranks: by name.
        importances: by name, as measured.
        budget: what uniform ranks would cost, Σ rank · f(d_in + d_out): parameters if the weight is linear.
        spent: what the ranks of this plan cost, in the same unit.
        spectra: by name, σ_i² of the layer's mean gradient in whitened coordinates, descending; empty if not measured.
    """

    ranks: dict[str, int]
    importances: dict[str, float]
    budget: float
    spent: float
    spectra: dict[str, list[float]] = field(default_factory=dict)

    def gain(self, ranks: Mapping[str, int] | None = None) -> float:
        """Return the share Σ_l Σ_{i≤r_l} σ²_li / Σ σ² that ranks hold; under K-FAC's quadratic, of the loss to gain.

        Args:
            ranks: by name; those of the plan if None.

        Raises:
            ValueError: the spectra were not measured.
        """
        if not self.spectra:
            raise ValueError("spectra must be measured to tell the gain: use GoRAInit.plan_only, or a start from them")
        chosen = self.ranks if ranks is None else ranks
        held = math.fsum(math.fsum(energy[: chosen[name]]) for name, energy in self.spectra.items())
        total = math.fsum(math.fsum(energy) for energy in self.spectra.values())
        return held / total if total > 0 else 0.0

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict a layer: name, rank, share of the importances, and share of its σ² that the rank holds."""
        total = math.fsum(self.importances.values())
        found = []
        for name, rank in self.ranks.items():
            energy = self.spectra.get(name, [])
            whole = math.fsum(energy)
            found.append({
                "name": name, "rank": rank, "importance": self.importances[name] / total if total > 0 else 0.0,
                "gain": math.fsum(energy[:rank]) / whole if whole > 0 else None,
            })  # fmt: skip
        return found

    def summary(self) -> str:
        """Return one line: how many layers, the least and largest rank, and the budget."""
        least, most = min(self.ranks.values(), default=0), max(self.ranks.values(), default=0)
        return f"{len(self.ranks)} layers, ranks {least} to {most}, {self.spent:g} of a budget of {self.budget:g}"

    def __str__(self) -> str:
        width = max([5, *map(len, self.ranks)])
        lines = [f"{'layer':{width}}  rank  importance   gain"]
        for row in self.rows():
            gain = "" if row["gain"] is None else f"{row['gain']:.3f}"
            lines.append(f"{row['name']:{width}}  {row['rank']:4d}  {row['importance']:10.4f}  {gain:>5}")
        return "\n".join([*lines, self.summary()])


def allocate(
    importances: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int | Mapping[str, int],
    min_rank: int,
    max_rank: int,
    allocation: str = "exact",
    budget_weight: str = "linear",
    limits: Mapping[str, int] | None = None,
    spectra: Mapping[str, Sequence[float]] | None = None,
    groups: Mapping[str, str] | None = None,
) -> RankPlan:
    """Share the parameters of uniform ranks out by importance (GoRA, arXiv 2502.12171), or by spectra.

    A rank of layer l costs f(d_in + d_out), and its share of the budget is I_l / Σ I. ``"paper"`` is the official
    rounding: the share is rounded to a whole number, divided by the cost without remainder, and clamped; what clamps
    and rounding leave over or overdraw stays so. ``"exact"`` keeps the shares proportional within the clamps and hands
    what rounding leaves to the largest remainders: what is unspent buys no further rank of any layer below its clamp.
    ``"uniform"`` gives every layer its ``rank``. ``"spectrum"`` (our derivation) looks at no importance: it buys the
    directions with the largest σ² for their cost. Σ_l Σ_{i≤r_l} σ²_li is then the largest that the budget allows within
    the clamps where all layers cost the same, and falls short of it by less than one direction where they do not.

    Args:
        importances: I_l ≥ 0 by name. All zero: uniform.
        shapes: ``(d_in, d_out)`` by name.
        rank: the uniform rank whose cost is the budget, or ranks by name.
        min_rank: lower clamp.
        max_rank: upper clamp.
        allocation: ``"exact"``, ``"paper"``, ``"uniform"`` or ``"spectrum"``.
        budget_weight: f: ``"linear"``, ``"sqrt"`` or ``"log1p"``.
        limits: a further upper clamp by name, before which the lower one yields too; min(d_in, d_out) where absent.
        spectra: σ_i² ≥ 0 by name, descending; ``"spectrum"`` needs them, others keep them for `RankPlan.gain`.
        groups: a label by name: layers compete only with those of their label, for the budget of these. None: one.

    Returns:
        The plan, in the order of ``importances``; equal input gives equal plans, ties go by name.

    Raises:
        ValueError: an importance is negative or not finite, spectra are missing, or the clamps cannot meet the budget
            (with ``"exact"`` and ``"spectrum"``).
    """
    for name, value in importances.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"importance of {name} must be a finite number ≥ 0, got {value!r}")
    if allocation == "spectrum" and spectra is None:
        raise ValueError("spectra must be given for allocation='spectrum', got None")
    cost = {name: BUDGET_WEIGHTS[budget_weight](sum(shapes[name])) for name in importances}
    top = {name: min(max_rank, (limits or {}).get(name, min(shapes[name]))) for name in importances}
    low = {name: min(min_rank, top[name]) for name in importances}
    given = dict.fromkeys(importances, rank) if isinstance(rank, int) else {name: rank[name] for name in importances}
    ranks: dict[str, int] = {}
    for label in dict.fromkeys((groups or {}).get(name, "") for name in importances):
        names = [name for name in importances if (groups or {}).get(name, "") == label]
        own, budget = {name: importances[name] for name in names}, math.fsum(given[name] * cost[name] for name in names)
        if allocation == "uniform":
            ranks |= {name: min(given[name], (limits or {}).get(name, min(shapes[name]))) for name in names}
        elif allocation == "paper":
            ranks |= _official(own, cost, low, top, given, budget)
        else:
            least, most = (math.fsum(cost[name] * clamp[name] for name in names) for clamp in (low, top))
            slack, asked = 1e-9 * budget, rank if isinstance(rank, int) else f"{given} (those of the adapters)"
            if least > budget + slack or most < budget - slack:
                raise ValueError(
                    f"rank={asked} asks for a budget of {budget:g}, but min_rank={min_rank} and max_rank={max_rank} "
                    f"(and the shapes of the layers{f' of {label!r}' if label else ''}) allow {least:g} to {most:g}"
                )
            if spectra is not None and allocation == "spectrum":
                ranks |= _water_filling({name: spectra[name] for name in names}, cost, low, top, budget)
            else:
                ranks |= _largest_remainders(_shares(own, cost, low, top, budget), cost, top, budget)
    ranks = {name: ranks[name] for name in importances}
    spent = math.fsum(cost[name] * r for name, r in ranks.items())
    found = {name: [float(x) for x in spectra[name]] for name in importances} if spectra is not None else {}
    return RankPlan(ranks, dict(importances), math.fsum(given[name] * cost[name] for name in cost), spent, found)


def _official(
    importances: Mapping[str, float],
    cost: Mapping[str, float],
    low: Mapping[str, int],
    top: Mapping[str, int],
    given: Mapping[str, int],
    budget: float,
) -> dict[str, int]:
    """Return ranks by the official rounding."""
    total = math.fsum(importances.values())
    share = {
        name: value / total if total > 0 else cost[name] * given[name] / budget for name, value in importances.items()
    }
    asked = {name: int(round(budget * share[name]) // cost[name]) for name in importances}
    return {name: min(max(asked[name], low[name]), top[name]) for name in importances}


def _water_filling(
    spectra: Mapping[str, Sequence[float]],
    cost: Mapping[str, float],
    low: Mapping[str, int],
    top: Mapping[str, int],
    budget: float,
) -> dict[str, int]:
    """Buy directions above the lower clamp by σ² for their cost, ties by index and name, while the budget lasts."""
    ranks = {name: low[name] for name in spectra}
    left = budget * (1 + 1e-12) - math.fsum(cost[name] * r for name, r in ranks.items())
    offers = [
        (-(energy[i] if i < len(energy) else 0.0) / cost[name], i, name)
        for name, energy in spectra.items()
        for i in range(low[name], top[name])
    ]
    for _, i, name in sorted(offers):
        if ranks[name] == i and cost[name] <= left:
            ranks[name], left = i + 1, left - cost[name]
    return ranks


def _shares(
    importances: Mapping[str, float],
    cost: Mapping[str, float],
    low: Mapping[str, int],
    top: Mapping[str, int],
    budget: float,
) -> dict[str, float]:
    """Return real ranks clamp(t I_l / cost_l) with the t that spends the budget.

    Where all that is important is full, the rest is for the layers without importance, the same rank for each.
    """
    peak = max(importances.values(), default=0.0)
    weight = {name: value / peak / cost[name] if peak > 0 else 0.0 for name, value in importances.items()}
    full = math.fsum(cost[name] * (top[name] if weight[name] > 0 else low[name]) for name in weight)
    if full < budget:
        # t is beyond all bounds: those fill up, and a level t of ranks is looked for among the others
        low = {name: top[name] if weight[name] > 0 else low[name] for name in weight}
        weight = {name: 0.0 if weight[name] > 0 else 1.0 for name in weight}

    def ranks_at(t: float) -> dict[str, float]:
        return {name: min(max(t * weight[name], low[name]), top[name]) for name in weight}

    below, above = 0.0, max((top[name] / w for name, w in weight.items() if w > 0), default=0.0)
    while below < (middle := (below + above) / 2) < above:
        if math.fsum(cost[name] * r for name, r in ranks_at(middle).items()) > budget:
            above = middle
        else:
            below = middle
    return ranks_at(above)


def _largest_remainders(
    ideal: Mapping[str, float], cost: Mapping[str, float], top: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Round down, then add one by one in the order of what was cut off (ties by name) while the budget lasts."""
    ranks = {name: math.floor(x + 1e-9) for name, x in ideal.items()}
    order = sorted(ideal, key=lambda name: (-round(ideal[name] - ranks[name], 9), name))
    left = budget * (1 + 1e-12) - math.fsum(cost[name] * r for name, r in ranks.items())
    gave = True
    while gave:
        gave = False
        for name in order:
            if ranks[name] < top[name] and cost[name] <= left:
                ranks[name], left, gave = ranks[name] + 1, left - cost[name], True
    return ranks
