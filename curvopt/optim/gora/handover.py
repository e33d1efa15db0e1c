"""GoRAInit's search for lr₀, and what it does once another optimizer is in charge."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.distributed import all_reduce_sums, world_size
from curvopt.functional.ranks import RankPlan
from curvopt.lora import LoraPair, resize_pair
from curvopt.optim.base import RankSpaceOptimizer
from curvopt.optim.gora.calibration import KEYS, write_start

if TYPE_CHECKING:
    from curvopt.optim.gora.optimizer import GoRAInit

# ------------------------------------------------------------------------------------------------ lr₀ by trial


def best_of(
    grid: Sequence[float],
    starts: Mapping[LoraPair, Tensor],
    closure: Callable[[], Any],
    group: dist.ProcessGroup | None,
) -> float:
    """Return the lr₀ of ``grid`` with the least loss, averaged over processes; the smallest if none is finite.

    Every trial sees the same random numbers, and leaves them as they were.
    """
    losses = []
    for init_lr in grid:
        for pair, start in starts.items():
            write_start(pair, start, init_lr)
        with torch.enable_grad(), torch.random.fork_rng():
            losses.append(torch.as_tensor(closure()).detach().double().reshape(()))
    found = torch.stack(losses)
    all_reduce_sums([found], group)
    found = torch.where(found.isfinite(), found, torch.inf) / world_size(group)
    return grid[int(found.argmin())]


# ------------------------------------------------------------------------------------------------ the delegate


def build(then: Callable[[Any], torch.optim.Optimizer] | None, model: Any) -> torch.optim.Optimizer | None:
    """Return what ``then`` makes of the model.

    Raises:
        TypeError: it is no optimizer.
    """
    if then is None:
        return None
    with torch.enable_grad():
        made = then(model)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"then must return a torch Optimizer, got {type(made).__name__}")
    return made


def delegate_step(own: "GoRAInit", closure: Callable[[], Any] | None) -> Any:
    """Let the delegate step at its own rates times what schedules have made of ours.

    Its groups hold their own rates again afterwards, so that both may be edited and nothing piles up.
    """
    delegate = own.delegate
    if delegate is None:
        raise RuntimeError("the calibration is over: build an optimizer for the model, or give then=")
    rates = [g["lr"] for g in delegate.param_groups]
    passed = [word for word in ("grad_scale", "found_inf") if hasattr(own, word)]
    for word in passed:
        setattr(delegate, word, getattr(own, word))
    try:
        for g, factor in zip(delegate.param_groups, _factors(own), strict=True):
            g["lr"] = g["lr"] if isinstance(factor, float) and factor == 1.0 else g["lr"] * factor
        return delegate.step() if closure is None else delegate.step(closure)
    finally:
        for g, rate in zip(delegate.param_groups, rates, strict=True):
            g["lr"] = rate
        for word in passed:
            delattr(delegate, word)


def _factors(own: "GoRAInit") -> list[Any]:
    """Return lr over its reference for each group of the delegate: that of our group with its first parameter."""
    home = {p: g for g in own.param_groups for p in g["params"]}
    theirs = [] if own.delegate is None else own.delegate.param_groups
    groups = [next((home[p] for p in g["params"] if p in home), own.param_groups[0]) for g in theirs]
    return [g["lr"] / g.get("reference_lr", own.defaults["lr"]) for g in groups]


# ------------------------------------------------------------------------------------------------ loading


def load(own: "GoRAInit", state_dict: dict[str, Any]) -> None:
    """See `GoRAInit.load_state_dict`."""
    extra = state_dict.get("gora", {"plan": None, "delegate": None})
    plan = None if extra["plan"] is None else RankPlan(**extra["plan"])
    if plan is None and own.ready:
        raise ValueError("state_dict is of a calibration that is not over, but this optimizer has handed over already")
    names = {pair.name for pair in own.pairs}
    unknown = [] if plan is None else [name for name in plan.ranks if name not in names]
    if unknown:
        raise ValueError(f"state_dict does not fit: its plan has a rank for {unknown[0]!r}, which is no pair here")
    # torch would cast the sums to the dtype of B, and our shape check knows Adam's state alone
    states = state_dict["state"]
    light = {i: {k: v for k, v in state.items() if k not in KEYS} for i, state in states.items()}
    if not own.ready:
        own._calibration.forget()
        own.state.clear()
    RankSpaceOptimizer.load_state_dict(own, {**state_dict, "state": light})
    indices = [i for g in state_dict["param_groups"] for i in g["params"]]
    params = [p for g in own.param_groups for p in g["params"]]
    if plan is None:
        for i, p in zip(indices, params, strict=True):
            kept = {k: v for k, v in states.get(i, {}).items() if k in KEYS}
            device = "cpu" if own.param_groups[0]["offload"] else p.device
            for key, value in kept.items():
                own.state[p][key] = value.to(device if key == "gradient" else p.device, copy=True)
        own._calibration.load(own.state, own.param_groups[0]["staged"])
        return
    _restore(own, plan)
    if extra["delegate"] is not None:
        if own.delegate is None:
            raise ValueError("state_dict has the state of a delegate: give then=")
        own.delegate.load_state_dict(copy.copy(extra["delegate"]))


def _restore(own: "GoRAInit", plan: RankPlan) -> None:
    """Bring an optimizer that has not calibrated to where another one was."""
    g = own.param_groups[0]
    if own.ready and own.plan != plan:
        raise ValueError("state_dict does not fit: its plan is not the one in force here")
    if own.ready:
        return
    for pair in own.pairs:
        if g["resize"] and pair.name in plan.ranks and plan.ranks[pair.name] != pair.rank:
            resize_pair(pair, plan.ranks[pair.name], keep_scaling=g["keep_scaling"])
    own._close(plan)
    own._delegate = build(own._then, own._model)
