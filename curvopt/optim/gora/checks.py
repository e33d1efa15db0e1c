"""What GoRAInit's arguments may be, group by group, and which adapters it can take."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from curvopt.distributed import is_sharded, used_directions
from curvopt.functional.ranks import ALLOCATIONS, BUDGET_WEIGHTS
from curvopt.lora import LoraPair
from curvopt.lora.gradients import has_base_weight, layer_shape
from curvopt.lora.resize import check_resize
from curvopt.optim.checking import check, is_number, is_whole, warn
from curvopt.optim.gora.calibration import COMPARED, IMPORTANCES, STARTS, largest_rank, plan_for, role, stays

# one budget for all groups, so they must agree on everything but the learning rate
SHARED = ("rank", "min_rank", "max_rank", "calibration_steps", "init_lr", "importance", "allocation", "budget_weight",
          "convergence", "offload", "keep_scaling", "resize", "reset", "start", "compare")  # fmt: skip

# what hooks, sketches and sums are made for
FIXED = ("rank", "min_rank", "max_rank", "importance", "allocation", "offload", "resize", "start")


def check_group(g: dict[str, Any]) -> None:
    """Raise a ValueError for the first hyper-parameter out of range."""
    lr, reference = g["lr"], g["reference_lr"]
    check("lr", lr, is_number(lr) and (isinstance(lr, Tensor) or lr >= 0), "a number ≥ 0")
    above = is_number(reference) and (isinstance(reference, Tensor) or reference > 0)
    check("lr", reference, above, "a number > 0: it is what schedules are relative to")
    choices = {
        "importance": IMPORTANCES, "start": STARTS, "compare": COMPARED, "allocation": ALLOCATIONS,
        "budget_weight": tuple(BUDGET_WEIGHTS),
    }  # fmt: skip
    for name, allowed in choices.items():
        check(name, g[name], g[name] in allowed, f"one of {', '.join(map(repr, allowed))}")
    steps = g["calibration_steps"]
    check("calibration_steps", steps, is_whole(steps) and steps >= 1, "an integer ≥ 1")
    for name in ("rank", "min_rank", "max_rank"):
        check(name, g[name], g[name] is None or (is_whole(g[name]) and g[name] >= 1), "an integer ≥ 1, or None")
        free = g[name] is None or name == "rank" or g["allocation"] != "uniform"
        check(name, g[name], free, "None with allocation='uniform', which gives every layer its rank")
    rank, least, most, ranked = g["rank"], g["min_rank"], g["max_rank"], g["allocation"] in ("exact", "paper")
    check("min_rank", least, None in (least, most) or least <= most, f"at most max_rank ({most})")
    within = rank is None or (least or rank) <= rank <= (most or rank)
    check("rank", rank, within, f"between min_rank ({least}) and max_rank ({most})")
    mixed = g["importance"] == "grad_b" and (g["start"] != "gora" or g["allocation"] == "spectrum") and ranked
    mixed = mixed or (g["importance"] == "grad_b" and g["allocation"] == "spectrum")
    unmixed = "'mean_abs', 'frobenius' or 'nuclear' with a whitened start or allocation='spectrum'"
    check("importance", g["importance"], not mixed, unmixed)
    sketch = g["start"] == "whitened" or g["allocation"] == "spectrum"
    enough = not sketch or g["calibration_steps"] >= 2
    check("calibration_steps", g["calibration_steps"], enough, "at least 2: the first batch measures R_x and R_g alone")
    init_lr = g["init_lr"]
    check("init_lr", init_lr, init_lr == "auto" or (_plain(init_lr) and init_lr >= 0), "a number ≥ 0 or 'auto'")
    limit = g["convergence"]
    check("convergence", limit, limit is None or (_plain(limit) and limit > 0), "None or a number > 0")
    for name in ("offload", "keep_scaling", "resize", "reset"):
        check(name, g[name], isinstance(g[name], bool), "True or False")


def _plain(value: Any) -> bool:
    return is_number(value) and not isinstance(value, Tensor)


def check_edit(before: Mapping[str, Any], g: Mapping[str, Any]) -> None:
    """Raise a ValueError if a group was edited in what the calibration was made for."""
    for name in FIXED:
        allowed = f"what it was when the optimizer was made, {before[name]!r}: the calibration depends on it"
        check(name, g[name], before[name] == g[name], allowed)


def check_groups_agree(groups: Sequence[dict[str, Any]]) -> None:
    """Raise a ValueError where two groups differ in what there is one of."""
    for name in SHARED:
        for g in groups[1:]:
            check(name, (groups[0][name], g[name]), groups[0][name] == g[name], "the same in all groups")


def check_pairs(g: dict[str, Any], model: Any, pairs: Sequence[LoraPair]) -> None:
    """Raise a ValueError if some adapter cannot be calibrated, or their shapes do not allow the budget."""
    check("params", type(model).__name__, bool(pairs), "a model with a plain pair whose B is trainable")
    wrapped = isinstance(model, DistributedDataParallel)
    allowed = "False around DistributedDataParallel, which keeps the shapes; or calibrate first and wrap afterwards"
    check("resize", g["resize"], not (g["resize"] and wrapped), allowed)
    sharded = any(is_sharded(p) for pair in pairs for p in (pair.A, pair.B))
    allowed = (
        "False where parameters are sharded (fully_shard), of adapters that are built with max_rank directions; or "
        "calibrate first and shard then"
    )
    check("resize", g["resize"], not (g["resize"] and sharded), allowed)
    for pair in pairs:
        named = pair.module is not None or (g["importance"] == "grad_b" and g["start"] == "gora")
        allowed = f"'grad_b' with start='gora' where parameters come without their model ({pair.name})"
        check("importance", g["importance"], named, allowed)
        weighed = g["importance"] == "mean_abs" and g["allocation"] in ("exact", "paper")
        seen = not weighed or has_base_weight(pair)
        allowed = f"'frobenius', 'nuclear' or 'grad_b' where no base weight is found ({pair.name})"
        check("importance", g["importance"], seen, allowed)
        if g["resize"] and not stays(g, pair):
            check_resize(pair, pair.rank)
    if g["allocation"] in ("exact", "spectrum"):
        plan_for(pairs, [1.0] * len(pairs), g, {pair.name: [] for pair in pairs})


def warn_of_roles(g: dict[str, Any], pairs: Sequence[LoraPair]) -> None:
    """Warn of a budget that is shared out by importances of layers that do not compare."""
    roles = sorted({role(pair) for pair in pairs})
    if g["allocation"] in ("exact", "paper") and g["compare"] == "all" and len(roles) > 1:
        warn(
            f"allocation={g['allocation']!r} compares importances of layers of {len(roles)} roles "
            f"({', '.join(map(repr, roles[:3]))}{', ...' if len(roles) > 3 else ''}): on all text tasks of the "
            "project's benchmarks such ranks raised the final loss. Use allocation='uniform', or compare='role', or "
            "adapt one role alone, as published"
        )


def check_start(g: dict[str, Any], pairs: Sequence[LoraPair]) -> list[LoraPair]:
    """Return the pairs whose B A is not zero; reads the device. ValueError if they must be zero, or are too small."""
    for pair in pairs:
        kept = g["importance"] == "grad_b" or not g["resize"]
        most = min(largest_rank(g, [pair]), *layer_shape(pair))
        allowed = f"at most the rank built if importance is 'grad_b' or resize is False ({pair.name}: {pair.rank})"
        name = "rank" if g["allocation"] == "uniform" else "max_rank"
        check(name, most, not kept or most <= pair.rank, allowed)
        check(f"scaling of {pair.name}", pair.scaling, pair.scaling != 0, "a number other than 0")
    A = used_directions([pair.A for pair in pairs], [pair.dim_A for pair in pairs])
    B = used_directions([pair.B for pair in pairs], [pair.dim_B for pair in pairs])
    full = torch.stack([(a.any() & b.any()).to(pairs[0].B.device) for a, b in zip(A, B, strict=True)]).tolist()
    changed = [pair for pair, both in zip(pairs, full, strict=True) if both]
    if changed and not g["reset"]:
        raise ValueError(
            f"B must be zero when the calibration begins, but it is not in {len(changed)} pairs "
            f"({', '.join(pair.name for pair in changed[:3])}); reset=True sets it to zero"
        )
    return changed
