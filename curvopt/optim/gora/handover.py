"""GoRAInit's search for lr₀, and what it does once another optimizer is in charge."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvopt.distributed import all_reduce_sums, reshard, world_size
from curvopt.functional.ranks import RankPlan
from curvopt.lora import LoraPair, find_lora_pairs, resize_pair
from curvopt.lora.hooks import Watch
from curvopt.optim.gora.calibration import KEYS, write_start

# ------------------------------------------------------------------------------------------------ lr₀ by trial


def best_of(
    grid: Sequence[float],
    starts: Mapping[LoraPair, Tensor],
    closure: Callable[[], Any],
    group: dist.ProcessGroup | None,
    model: nn.Module | None,
) -> float:
    """Return the lr₀ of ``grid`` with the least loss, averaged over processes; the smallest if none is finite.

    Every trial sees the same random numbers, and leaves them as they were.
    """
    losses = []
    for init_lr in grid:
        reshard(model)
        for pair, start in starts.items():
            write_start(pair, start, init_lr)
        with torch.enable_grad(), torch.random.fork_rng():
            losses.append(torch.as_tensor(closure()).detach().double().reshape(()))
    found = torch.stack(losses)
    all_reduce_sums([found], group)
    found = torch.where(found.isfinite(), found, torch.inf) / world_size(group)
    reshard(model)
    return grid[int(found.argmin())]


# ------------------------------------------------------------------------------------------------ the delegate

# keys of our groups that say nothing to the delegate, whatever it calls its own settings
OURS = frozenset({
    "params", "param_names", "lr", "reference_lr", "initial_lr", "rank", "min_rank", "max_rank", "calibration_steps",
    "init_lr", "importance", "start", "allocation", "budget_weight", "compare", "convergence", "offload",
    "keep_scaling", "resize", "reset",
})  # fmt: skip


def build(then: Callable[[Any], torch.optim.Optimizer] | None, model: Any) -> torch.optim.Optimizer | None:
    """Return what ``then`` makes of the model.

    Raises:
        TypeError: it is not an optimizer.
    """
    if then is None:
        return None
    with torch.enable_grad():
        made = then(model)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"then must return a torch Optimizer, got {type(made).__name__}")
    return made


def loraplus(model: Any, lr: float, ratio: float) -> torch.optim.Optimizer:
    """Return AdamW without decay whose B matrices learn ``ratio`` times as fast as everything else (LoRA+)."""
    fast = {pair.B for pair in find_lora_pairs(model)}
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p not in fast], "lr": lr},
        {"params": [p for p in params if p in fast], "lr": lr * ratio},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, weight_decay=0.0)


def delegate_step(
    delegate: torch.optim.Optimizer | None, own: torch.optim.Optimizer, closure: Callable[[], Any] | None
) -> Any:
    """Let the delegate step at its own rates times what schedules have made of our optimizer's.

    Its groups hold their own rates again afterwards, so that both may be edited and nothing piles up.
    """
    if delegate is None:
        raise RuntimeError("the calibration is over: build an optimizer for the model, or give then=")
    rates = [g["lr"] for g in delegate.param_groups]
    try:
        for g, home in zip(delegate.param_groups, homes(delegate, own), strict=True):
            factor = home["lr"] / home.get("reference_lr", own.defaults["lr"])
            g["lr"] = g["lr"] if isinstance(factor, float) and factor == 1.0 else g["lr"] * factor
        return delegate.step() if closure is None else delegate.step(closure)
    finally:
        for g, rate in zip(delegate.param_groups, rates, strict=True):
            g["lr"] = rate


def homes(delegate: torch.optim.Optimizer, own: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return for each group of the delegate our group with its first parameter; our first one if there is none."""
    home = {p: g for g in own.param_groups for p in g["params"]}
    return [next((home[p] for p in g["params"] if p in home), own.param_groups[0]) for g in delegate.param_groups]


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a group may concern the delegate: all but our own settings, rates and parameters."""
    return {key: value for key, value in group.items() if key not in OURS}


def pass_on(
    delegate: torch.optim.Optimizer, own: torch.optim.Optimizer, before: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Write what was edited in our groups into the delegate's, as far as these have such a setting.

    ``betas`` of a scheduler that cycles momentum reach ``momentum`` where the delegate has that instead.

    Args:
        delegate: the optimizer at work.
        own: the one whose groups users and schedulers hold.
        before: `settings` of our groups as they were when they were last passed on.

    Returns:
        `settings` of our groups now.
    """
    known = {id(g): was for g, was in zip(own.param_groups, before, strict=False)}
    for g, home in zip(delegate.param_groups, homes(delegate, own), strict=True):
        was = known.get(id(home), {})
        for key, value in settings(home).items():
            if key in was and (was[key] is value or was[key] == value):
                continue
            if key in g:
                g[key] = value
            elif key == "betas" and "momentum" in g:
                g["momentum"] = value[0]
    return [settings(g) for g in own.param_groups]


# ------------------------------------------------------------------------------------------------ loading


def resize(pairs: Sequence[LoraPair], plan: RankPlan, g: Mapping[str, Any]) -> None:
    """Bring adapters that were not calibrated to the ranks of a plan, if the settings say that shapes may change."""
    for pair in pairs if g["resize"] else ():
        if plan.ranks.get(pair.name, pair.rank) != pair.rank:
            resize_pair(pair, plan.ranks[pair.name], keep_scaling=g["keep_scaling"])


class RankGuard(Watch):
    """Stands on the module of B while the calibration runs: says what to do with a checkpoint of other ranks."""

    def __call__(self, module: Any, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Look at what is about to be loaded.

        Raises:
            ValueError: B has another rank there.
        """
        owner, pair = self.alive()
        if owner is None or pair is None:
            return
        came = state_dict.get(prefix + pair.keys[1][-1])
        if isinstance(came, Tensor) and came.ndim == pair.B.ndim and came.shape[pair.dim_B] != pair.rank:
            raise ValueError(
                f"the checkpoint's adapter of {pair.name} must have the rank of the model's, {pair.rank}, got "
                f"{came.shape[pair.dim_B]}, as after a hand-over of GoRAInit. Build the model from the checkpoint, "
                "PeftModel.from_pretrained(base, checkpoint, is_trainable=True), and GoRAInit on it; or calibrate with "
                "resize=False"
            )


def watch_loading(own: torch.optim.Optimizer, pairs: Sequence[LoraPair]) -> list[Any]:
    """Put `RankGuard` on the modules of all B; returns the handles."""
    found = []
    for pair in pairs:
        module = pair.owner("B")
        if isinstance(module, nn.Module) and not isinstance(module, nn.ParameterDict | nn.ModuleDict):
            hook = RankGuard(weakref.ref(own), weakref.ref(pair))
            found.append(module.register_load_state_dict_pre_hook(hook))
    return found


@dataclass
class Saved:
    """A state_dict of GoRAInit, taken apart.

    Attributes:
        plan: ranks, if the calibration was over.
        delegate: the delegate's state_dict, if there was one.
        groups: torch's part, without what was summed.
        sums: what was summed under each parameter, in order.
        steps: calibration steps taken.
    """

    plan: RankPlan | None
    delegate: dict[str, Any] | None
    groups: dict[str, Any]
    sums: list[dict[str, Tensor]]
    steps: int


def take_apart(state_dict: dict[str, Any], pairs: Sequence[LoraPair], plan: RankPlan | None) -> Saved:
    """Return the parts of a state_dict.

    Args:
        state_dict: what is to be loaded.
        pairs: of the optimizer that loads it.
        plan: the one in force there; None while it calibrates.

    Raises:
        ValueError: its calibration is not over but ours is, or its plan does not fit.
    """
    extra = state_dict.get("gora", {"plan": None, "delegate": None})
    theirs = None if extra["plan"] is None else RankPlan(**extra["plan"])
    if theirs is None and plan is not None:
        raise ValueError("state_dict is of a calibration that is not over, but this optimizer has handed over already")
    names = {pair.name for pair in pairs}
    unknown = [] if theirs is None else [name for name in theirs.ranks if name not in names]
    if unknown:
        raise ValueError(f"state_dict does not fit: its plan has a rank for {unknown[0]!r}, which is not a pair here")
    if plan not in (None, theirs):
        raise ValueError("state_dict does not fit: its plan is not the one in force here")
    # torch would cast the sums to the dtype of B, and our shape check knows Adam's state alone
    states = state_dict["state"]
    light = {i: {k: v for k, v in state.items() if k not in KEYS} for i, state in states.items()}
    # before 0.2 the number of steps stood in the groups
    groups = [{k: v for k, v in g.items() if k not in ("clock", "staged")} for g in state_dict["param_groups"]]
    steps = extra.get("steps", state_dict["param_groups"][0].get("clock", 0))
    indices = [i for g in state_dict["param_groups"] for i in g["params"]]
    sums = [{k: v for k, v in states.get(i, {}).items() if k in KEYS} for i in indices]
    return Saved(theirs, extra["delegate"], {**state_dict, "state": light, "param_groups": groups}, sums, steps)
