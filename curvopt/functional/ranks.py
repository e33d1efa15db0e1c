"""How many directions are worth keeping: energy rule, hysteresis, entropy rank, and a budget shared out by layer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
    """Decide the next rank so that one noisy spectrum does not cut a direction.

    The rank goes down only when the rule asked for fewer directions in two checks in a row, and then to the larger
    of the two. It goes up by one when the rule wants all live directions and there is ``room`` for another.

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
ALLOCATIONS = ("exact", "paper")


@dataclass(frozen=True)
class RankPlan:
    """Which layer gets which rank.

    Attributes:
        ranks: by name.
        importances: by name, as measured.
        budget: what uniform ranks would cost, Σ rank · f(d_in + d_out): parameters if the weight is linear.
        spent: what the ranks of this plan cost, in the same unit.
    """

    ranks: dict[str, int]
    importances: dict[str, float]
    budget: float
    spent: float

    def __str__(self) -> str:
        least, most = min(self.ranks.values(), default=0), max(self.ranks.values(), default=0)
        return f"{len(self.ranks)} layers, ranks {least} to {most}, {self.spent:g} of a budget of {self.budget:g}"


def allocate(
    importances: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    min_rank: int,
    max_rank: int,
    allocation: str = "exact",
    budget_weight: str = "linear",
    limits: Mapping[str, int] | None = None,
) -> RankPlan:
    """Share the parameters of uniform ranks out by importance (GoRA, arXiv 2502.12171).

    A rank of layer l costs f(d_in + d_out), and its share of the budget is I_l / Σ I. ``"paper"`` is the official
    rounding: the share is rounded to a whole number, divided by the cost without remainder, and clamped; what clamps
    and rounding leave over or overdraw stays so. ``"exact"`` keeps the shares proportional within the clamps and hands
    what rounding leaves to the largest remainders: what is unspent buys no further rank of any layer below its clamp.

    Args:
        importances: I_l ≥ 0 by name. All zero: uniform.
        shapes: ``(d_in, d_out)`` by name.
        rank: the uniform rank whose cost is the budget.
        min_rank: lower clamp.
        max_rank: upper clamp.
        allocation: ``"exact"`` or ``"paper"``.
        budget_weight: f: ``"linear"``, ``"sqrt"`` or ``"log1p"``.
        limits: a further upper clamp by name, before which the lower one yields too; min(d_in, d_out) where absent.

    Returns:
        The plan, in the order of ``importances``; equal input gives equal plans, ties go by name.

    Raises:
        ValueError: an importance is negative or not finite, or ``"exact"`` and the clamps cannot meet the budget.
    """
    for name, value in importances.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"importance of {name} must be a finite number ≥ 0, got {value!r}")
    names = list(importances)
    cost = {name: BUDGET_WEIGHTS[budget_weight](sum(shapes[name])) for name in names}
    top = {name: min(max_rank, (limits or {}).get(name, min(shapes[name]))) for name in names}
    low = {name: min(min_rank, top[name]) for name in names}
    budget = rank * math.fsum(cost.values())
    if allocation == "paper":
        total = math.fsum(importances.values())
        share = {name: importances[name] / total if total > 0 else cost[name] * rank / budget for name in names}
        asked = {name: int(round(budget * share[name]) // cost[name]) for name in names}
        ranks = {name: min(max(asked[name], low[name]), top[name]) for name in names}
    else:
        least, most = (math.fsum(cost[name] * clamp[name] for name in names) for clamp in (low, top))
        slack = 1e-9 * budget
        if least > budget + slack or most < budget - slack:
            raise ValueError(
                f"rank={rank} asks for a budget of {budget:g}, but min_rank={min_rank} and max_rank={max_rank} "
                f"(and the shapes of the layers) allow {least:g} to {most:g}"
            )
        ideal = _shares(importances, cost, low, top, budget)
        ranks = _largest_remainders(ideal, cost, top, budget)
    spent = math.fsum(cost[name] * ranks[name] for name in names)
    return RankPlan(ranks, dict(importances), budget, spent)


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
