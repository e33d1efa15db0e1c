"""What GritKFAC's hyper-parameters may be, group by group and pair by pair."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from typing_extensions import TypedDict

from curvopt.functional.update import RULES
from curvopt.ops import Backend
from curvopt.optim import nesting
from curvopt.optim.base import Side
from curvopt.optim.checking import check, is_number, is_whole
from curvopt.optim.grit.curvature import PUBLISHED, SOURCES

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
          "warmup_steps", "reprojection", "reproject_every", "rank_threshold", "min_rank", "statistics",
          "nested_ranks", "full_share", "mask_warmup")  # fmt: skip


class AdvancedSettings(TypedDict, total=False):
    """Keyword arguments of `GritKFAC` that most runs leave alone.

    They are passed like any other keyword. Those up to ``mask_warmup`` are param-group settings, as ``lr`` is;
    the others are given once.

    Attributes:
        sides: ``"kfac"`` (default): S_d preconditions A and S_u preconditions B, the K-FAC factors of the two maps;
            ``"paper"``: the other way round, as GRIT publishes it.
        factor_decay: decay β of the averages of all factors in a step, in [0, 1]; of S_u and S_d, observed every
            n steps, it is βⁿ from one observation to the next. 1 is GRIT's running mean, which never forgets. Default
            0.95.
        factor_every: steps between two observations of S_u and S_d, ≥ 1; the hooks are idle in between. Default 10: as
            good as every step for all update rules; ranks come out a little lower.
        inverse_every: steps between two computations of the eigenbases, inverses or roots of S_u and S_d, ≥ 1.
            Default 10.
        warmup_steps: number of plain AdamW steps at the start, while the factors fill. Default 0.
        reprojection: ``"balanced"`` (default, our derivation): leaves ΔW unchanged and orders the directions by
            energy, or, where no factors are kept, by the singular values of B A; ``"paper"`` (two-sided) and
            ``"paper-one-sided"``: GRIT's projections; None: none.
        nested_ranks: ranks, ascending, at which the leading directions are to serve as adapters of their own; a pair's
            own rank r is always one of them, and those above it are ignored for the pair. In training, each sample of
            a batch computes at one of them, as ``nesting="stratified"`` of `curvopt.MatryoshkaScaledAdam` does. The
            directions are sorted every 10 steps, unless ``reproject_every`` says otherwise: by the singular values of
            B A or, where ``statistics`` or the rule keep factors, in the balanced basis. None (default): no masks.
        full_share: nested ranks: share of the samples at rank r, in (0, 1]; the others are at the smaller ranks, in
            proportion to 1/ρ. Default 0.5.
        mask_warmup: nested ranks: steps before the first masks, ≥ 0. Default 25.
        adapter: name of the PEFT adapter whose pairs are trained; None (default) for all.
        backend: ``"auto"`` (default), ``"torch"`` or ``"triton"``; see `curvopt.ops`.
        require_pairs: True (default): raise if no pair is found. False: everything then gets AdamW.
        process_group: the processes to sum statistics over; None (default): the default group, if there is one.
        generator: nested ranks: a CPU generator for the masks, whose state is saved in ``state_dict``; None (default):
            one seeded with 0. It must be seeded alike in all processes; their masks differ nevertheless.
    """

    sides: Sides
    factor_decay: float
    factor_every: int
    inverse_every: int
    warmup_steps: int
    reprojection: Reprojection | None
    nested_ranks: Sequence[int] | None
    full_share: float
    mask_warmup: int
    adapter: str | None
    backend: Backend
    require_pairs: bool
    process_group: dist.ProcessGroup | None
    generator: torch.Generator | None


ADVANCED: AdvancedSettings = {
    "sides": "kfac",
    "factor_decay": 0.95,
    "factor_every": 10,
    "inverse_every": 10,
    "warmup_steps": 0,
    "reprojection": "balanced",
    "nested_ranks": None,
    "full_share": nesting.FULL_SHARE,
    "mask_warmup": nesting.WARMUP,
    "adapter": None,
    "backend": "auto",
    "require_pairs": True,
    "process_group": None,
    "generator": None,
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
    """Decide what depends on what else is asked for: factors are kept where something reads them, and only there.

    Nested ranks are put in order without factors, by the singular values of B A.
    """
    nested, adaptive = g["nested_ranks"] is not None, g["rank_threshold"] is not None
    if g["reproject_every"] is None:
        g["reproject_every"] = nesting.REORDER_EVERY if nested else REPROJECT_EVERY if adaptive else 0
    if g["statistics"] == "auto":
        rule = RULES.get(g["update"])
        read = (g["reproject_every"] != 0 and not nested) or (rule is not None and rule.key is not None)
        g["statistics"] = "activation" if read else "none"


def check_group(g: dict[str, Any]) -> None:
    """Raise a ValueError for the first hyper-parameter out of range."""
    choices = {"statistics": tuple(SOURCES), "sides": SIDES, "update": tuple(RULES), "reprojection": REPROJECTIONS}
    for name, allowed in choices.items():
        check(name, g[name], g[name] in allowed, f"one of {', '.join(map(repr, allowed))}")
    damping = g["damping"]
    fits = is_number(damping) and damping > 0 and getattr(damping, "ndim", 0) == 0
    check("damping", damping, fits, "a number > 0, or a 0-d tensor")
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
        fits = g["reproject_every"] == 0 or (g["reprojection"] in ("balanced", None) and g["rank_threshold"] is None)
        need = '0 with statistics="none", but for reprojection="balanced" without rank_threshold'
        check("reproject_every", g["reproject_every"], fits, need)
    tau = g["rank_threshold"]
    check("rank_threshold", tau, tau is None or (is_number(tau) and 0 < tau <= 1), "None or a number in (0, 1]")
    nesting.check_ranks(g, "nested_ranks")
    nesting.check_schedule(g, "mask_warmup")
    if g["nested_ranks"] is not None:
        check("rank_threshold", tau, tau is None, "None with nested_ranks: masks lower the energies it would read")
        fits = g["reprojection"] in ("balanced", None)
        check("reprojection", g["reprojection"], fits, "'balanced' or None with nested_ranks: others change ΔW")
        check("capturable", g["capturable"], not g["capturable"], "False with nested_ranks: a replay draws no masks")


def check_alone(g: dict[str, Any]) -> None:
    """Raise a ValueError if a group asks for what a matrix without its partner cannot have."""
    because = 'with low_rank="shape": tensors without names have no partner'
    check("update", g["update"], g["update"] in FACTORLESS, f"one of {', '.join(map(repr, FACTORLESS))} {because}")
    for name in ("rank_threshold", "nested_ranks"):
        check(name, g[name], g[name] is None, f"None {because}")
    check("reproject_every", g["reproject_every"], g["reproject_every"] == 0, f"0 {because}")
    check("statistics", g["statistics"], SOURCES[g["statistics"]].observe is None, f"'none' {because}")


def check_edit(before: dict[str, Any], g: dict[str, Any], stepped: bool, published: bool) -> None:
    """Raise a ValueError if a group was edited after a step in what its state was made for.

    ``published`` says whether the reprojection is what it was, or the state was made for GRIT's own too.
    """
    for name in ("update", "sides", "statistics", "outer_rank"):
        same = not stepped or before[name] == g[name]
        check(name, g[name], same, f"what it was at the first step, {before[name]!r}: the state depends on it")
    was, now = before["nested_ranks"], g["nested_ranks"]
    same = not stepped or (was is None) == (now is None)
    check("nested_ranks", now, same, f"{'None' if was is None else 'other ranks'}, as at the first step")
    now = g["reprojection"]
    same = not stepped or published or now not in PUBLISHED
    check("reprojection", now, same, f"none of {PUBLISHED}, as at the first step: the state depends on it")


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
        if g["nested_ranks"] is not None:
            nesting.check_maskable(side.pair, "nested_ranks", g["nested_ranks"], "None")
    nesting.check_largest(sides, "nested_ranks")
