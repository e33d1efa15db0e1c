"""What GritKFAC's hyper-parameters may be, group by group and pair by pair."""

from collections.abc import Sequence
from typing import Any

from curvopt.functional.update import RULES
from curvopt.optim.base import Side
from curvopt.optim.checking import check, is_number, is_whole
from curvopt.optim.grit.curvature import SOURCES

SIDES = ("kfac", "paper")
REPROJECTIONS = ("balanced", "paper", "paper-one-sided", None)
LOW_RANK = ("names", "shape")
MIN_RANK = 4

# what the groups that hold a pair's A and B must agree on
SHARED = ("outer_rank", "sides", "update", "damping", "factor_decay", "factor_every", "inverse_every",
          "warmup_steps", "reprojection", "reproject_every", "rank_threshold", "min_rank", "statistics")  # fmt: skip


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
        able = [rule.name for rule in RULES.values() if rule.key is None]
        need = f'with statistics="none" one of {", ".join(map(repr, able))}: the other rules act through a factor'
        check("update", g["update"], g["update"] in able, need)
        check("reproject_every", g["reproject_every"], g["reproject_every"] == 0, '0 with statistics="none"')
    tau = g["rank_threshold"]
    check("rank_threshold", tau, tau is None or (is_number(tau) and 0 < tau <= 1), "None or a number in (0, 1]")


def check_alone(g: dict[str, Any]) -> None:
    """Raise a ValueError if a group asks for what a matrix without its partner cannot have."""
    able = [rule.name for rule in RULES.values() if rule.key is None]
    because = 'with low_rank="shape": tensors without names have no partner'
    check("update", g["update"], g["update"] in able, f"one of {', '.join(map(repr, able))} {because}")
    check("rank_threshold", g["rank_threshold"], g["rank_threshold"] is None, f"None {because}")
    check("reproject_every", g["reproject_every"], g["reproject_every"] == 0, f"0 {because}")
    check("statistics", g["statistics"], SOURCES[g["statistics"]].observe is None, f"'none' {because}")


def check_edit(before: dict[str, Any], g: dict[str, Any], stepped: bool) -> None:
    """Raise a ValueError if a group was edited after a step in what its state was made for."""
    for name in ("update", "sides", "statistics", "outer_rank"):
        same = not stepped or before[name] == g[name]
        check(name, g[name], same, f"what it was at the first step, {before[name]!r}: the state is made for it")


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
