"""What GritKFAC's hyper-parameters may be, group by group and pair by pair."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch.distributed as dist
from typing_extensions import TypedDict

from curvopt.functional.update import RULES
from curvopt.ops import Backend
from curvopt.optim.base import Side
from curvopt.optim.checking import check, is_number, is_whole
from curvopt.optim.grit.curvature import SOURCES

# the choices, for editors and type checkers; the registries of rules and sources decide at run time
Update = Literal["polar", "eigen", "adam", "whiten", "momentum"]
Statistics = Literal["auto", "activation", "gradient", "weight", "none"]
Sides = Literal["kfac", "paper"]
Reprojection = Literal["balanced", "paper", "paper-one-sided"]
LowRank = Literal["names", "shape"]

SIDES = get_args(Sides)
REPROJECTIONS = (*get_args(Reprojection), None)
LOW_RANK = get_args(LowRank)
FACTORLESS = tuple(rule.name for rule in RULES.values() if rule.key is None)  # update rules without a rank-side matrix
MIN_RANK = 4

# what the groups that hold a pair's A and B must agree on
SHARED = ("outer_rank", "sides", "update", "damping", "factor_decay", "factor_every", "inverse_every",
          "warmup_steps", "reprojection", "reproject_every", "rank_threshold", "min_rank", "statistics")  # fmt: skip


class AdvancedSettings(TypedDict, total=False):
    """Keyword arguments of `GritKFAC` that most runs leave alone.

    They are passed like any other keyword. Those up to ``reprojection`` are param-group settings, as ``lr`` is; the
    others are given once.

    Attributes:
        sides: ``"kfac"`` (default): S_d preconditions A and S_u preconditions B, the K-FAC factors of the two maps;
            ``"paper"``: the other way round, as GRIT publishes it.
        factor_decay: EMA decay β of the factors, in [0, 1], bias-corrected; 1 is GRIT's running mean, which never
            forgets. Default 0.95.
        factor_every: steps between two observations of S_u and S_d, ≥ 1; the hooks are idle in between. Default 1.
        inverse_every: steps between two computations of the eigenbases, inverses or roots of S_u and S_d, ≥ 1.
            Default 10.
        warmup_steps: number of plain AdamW steps at the start, while the factors fill. Default 0.
        reprojection: ``"balanced"`` (default, our derivation): leaves ΔW unchanged and orders the directions by
            energy; ``"paper"`` (two-sided) and ``"paper-one-sided"``: GRIT's projections; None: none.
        adapter: name of the PEFT adapter whose pairs are trained; None (default) for all.
        backend: ``"auto"`` (default), ``"torch"`` or ``"triton"``; see `curvopt.ops`.
        require_pairs: True (default): raise if no pair is found. False: everything then gets AdamW.
        process_group: the processes to sum statistics over; None (default): the default group, if there is one.
    """

    sides: Sides
    factor_decay: float
    factor_every: int
    inverse_every: int
    warmup_steps: int
    reprojection: Reprojection | None
    adapter: str | None
    backend: Backend
    require_pairs: bool
    process_group: dist.ProcessGroup | None


ADVANCED: AdvancedSettings = {
    "sides": "kfac",
    "factor_decay": 0.95,
    "factor_every": 1,
    "inverse_every": 10,
    "warmup_steps": 0,
    "reprojection": "balanced",
    "adapter": None,
    "backend": "auto",
    "require_pairs": True,
    "process_group": None,
}


def with_defaults(advanced: Mapping[str, Any], others: Iterable[str]) -> dict[str, Any]:
    """Return all advanced settings, those that were not given at their defaults.

    Raises:
        TypeError: an argument that `GritKFAC` does not have; ``others`` are the names in its signature.
    """
    for name in advanced.keys() - ADVANCED.keys():
        near = difflib.get_close_matches(name, [*ADVANCED, *others], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"GritKFAC got an unexpected keyword argument {name!r}{hint}")
    return {**ADVANCED, **advanced}


# steps between reprojections where a threshold of the rank asks for them and nobody says how many
REPROJECT_EVERY = 25


def complete(g: dict[str, Any]) -> None:
    """Decide what depends on what else is asked for: factors are kept where something reads them, and only there."""
    if g["reproject_every"] is None:
        g["reproject_every"] = 0 if g["rank_threshold"] is None else REPROJECT_EVERY
    if g["statistics"] == "auto":
        rule = RULES.get(g["update"])
        read = g["reproject_every"] != 0 or (rule is not None and rule.key is not None)
        g["statistics"] = "activation" if read else "none"


def check_group(g: dict[str, Any]) -> None:
    """Raise a ValueError for the first hyper-parameter out of range."""
    choices = {"statistics": tuple(SOURCES), "sides": SIDES, "update": tuple(RULES), "reprojection": REPROJECTIONS}
    for name, allowed in choices.items():
        check(name, g[name], g[name] in allowed, f"one of {', '.join(map(repr, allowed))}")
    check("damping", g["damping"], is_number(g["damping"]) and g["damping"] > 0, "a number > 0")
    decay = g["factor_decay"]
    check("factor_decay", decay, is_number(decay) and 0 <= decay <= 1, "a number in [0, 1]")
    for name, least in (
        ("factor_every", 1), ("inverse_every", 1), ("warmup_steps", 0), ("reproject_every", 0), ("min_rank", 1),
        ("outer_rank", 0),
    ):  # fmt: skip
        check(name, g[name], is_whole(g[name]) and g[name] >= least, f"an integer ≥ {least}")
    if SOURCES[g["statistics"]].observe is None:  # nothing to make a matrix or a gauge of
        need = f'with statistics="none" one of {", ".join(map(repr, FACTORLESS))}: the other rules act through a factor'
        check("update", g["update"], g["update"] in FACTORLESS, need)
        check("reproject_every", g["reproject_every"], g["reproject_every"] == 0, '0 with statistics="none"')
    tau = g["rank_threshold"]
    check("rank_threshold", tau, tau is None or (is_number(tau) and 0 < tau <= 1), "None or a number in (0, 1]")


def check_alone(g: dict[str, Any]) -> None:
    """Raise a ValueError if a group asks for what a matrix without its partner cannot have."""
    because = 'with low_rank="shape": tensors without names have no partner'
    check("update", g["update"], g["update"] in FACTORLESS, f"one of {', '.join(map(repr, FACTORLESS))} {because}")
    check("rank_threshold", g["rank_threshold"], g["rank_threshold"] is None, f"None {because}")
    check("reproject_every", g["reproject_every"], g["reproject_every"] == 0, f"0 {because}")
    check("statistics", g["statistics"], SOURCES[g["statistics"]].observe is None, f"'none' {because}")


def check_edit(before: dict[str, Any], g: dict[str, Any], stepped: bool) -> None:
    """Raise a ValueError if a group was edited after a step in what its state was made for."""
    for name in ("update", "sides", "statistics", "outer_rank"):
        same = not stepped or before[name] == g[name]
        check(name, g[name], same, f"what it was at the first step, {before[name]!r}: the state depends on it")


def check_pairs(sides: Sequence[Side]) -> None:
    """Raise a ValueError for a pair whose two groups disagree, or whose rank is below ``min_rank``.

    The default of ``min_rank`` does not bind while ranks are not adapted, so that small adapters need no argument.
    """
    first: dict[object, Side] = {}
    for side in sides:
        g, other = side.group, first.setdefault(side.pair, side).group
        for name in SHARED:
            same = g[name] == other[name]
            check(f"{name} of {side.pair.name}", (other[name], g[name]), same, "the same in the groups of its A and B")
        binds = g["rank_threshold"] is not None or g["min_rank"] != MIN_RANK
        fits = not binds or g["min_rank"] <= side.pair.rank
        check("min_rank", g["min_rank"], fits, f"at most the rank of every pair ({side.pair.name}: {side.pair.rank})")
