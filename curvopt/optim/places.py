"""Where an optimizer's parameters stand in its model, to find them again when a framework has put others there."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvopt.distributed import is_sharded, world_size
from curvopt.lora import find_lora_pairs
from curvopt.optim.stacks import Side


class Places:
    """The module and attribute of each parameter in some param groups.

    ``fully_shard`` replaces every parameter by a DTensor, ``prepare`` of an engine may do so long after the optimizer
    was made, and the old parameters never get a gradient again.

    Args:
        model: the module to look in; None: nothing can be found again.
        groups: the param groups.
    """

    def __init__(self, model: nn.Module | None, groups: list[dict[str, Any]]) -> None:
        mine = {p for g in groups for p in g["params"]}
        self._model = model
        self._at: dict[Tensor, tuple[nn.Module, str]] = {}
        for module in model.modules() if model is not None else ():
            for name, p in module._parameters.items():
                if p in mine:
                    self._at.setdefault(p, (module, name))
        self._first = next(iter(self._at), None)
        self._warned = False

    def moved(self, idle: Iterator[Tensor]) -> bool:
        """Whether another parameter stands where the first one stood, or one of ``idle``.

        Those with gradients are where they were: asking for one of them all is enough to see a model replaced whole.
        """
        return (self._first is not None and self._now(self._first) is not self._first) or any(
            self._now(p) is not p for p in idle
        )

    def adopt(self, groups: list[dict[str, Any]], state: dict[Tensor, Any], sides: Sequence[Side]) -> bool:
        """Put what stands in the model now into the groups, in place of what stood there; its state goes with it.

        A parameter of another shape (PEFT made the adapter anew) starts without state. Zero gradients go along too:
        torch's distributed checkpointing makes state by a step on such.

        Returns:
            Whether the groups have the parameters of all ``sides``, which are brought up to date.
        """
        self._reshard()
        mine = {p for g in groups for p in g["params"]}
        for g in groups:
            for i, p in enumerate(g["params"]):
                now = self._now(p)
                if now is p or now in mine:
                    continue
                g["params"][i] = now
                kept = state.pop(p, None)
                if kept is not None and now.shape == p.shape:
                    moments = {key: _placed_like(now, v) for key, v in kept.items() if key.startswith("exp_avg")}
                    state[now] = {**kept, **moments}
                if p.grad is not None and now.grad is None and not p.grad.any():
                    now.grad = torch.zeros_like(now)
        mine = {p for g in groups for p in g["params"]}
        for side in sides:
            side.param = side.pair.A if side.name == "A" else side.pair.B
        return all(side.param in mine for side in sides)

    def look_after(self, grads: Sequence[Tensor | None]) -> None:
        """Warn, once, if no gradient is there and none will ever be found: the parameters may have been replaced."""
        if self._model is not None or self._warned or any(g is not None for g in grads) or world_size() == 1:
            return
        self._warned = True
        warnings.warn(
            "no parameter has a gradient. If fully_shard came after the optimizer it has replaced them all: pass the "
            "model instead of its parameters, or make the optimizer afterwards",
            UserWarning,
            stacklevel=5,
        )

    def _now(self, p: Tensor) -> Tensor:
        """Return the parameter that stands where ``p`` stood; ``p`` if none does, or while FSDP2 has it unsharded."""
        at = self._at.get(p)
        now = None if at is None else at[0]._parameters.get(at[1])
        return p if now is None or (is_sharded(p) and not is_sharded(now)) else now

    def _reshard(self) -> None:
        """Let FSDP2 put its sharded parameters in place, where the unsharded ones still are."""
        if self._model is None or not (dist.is_available() and dist.is_initialized()):
            return
        from torch.distributed.fsdp import FSDPModule

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _placed_like(p: Tensor, value: Tensor) -> Tensor:
    """Return state of the whole of ``p`` as a DTensor where ``p`` is one now."""
    if not is_sharded(p) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    whole: Tensor = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    return whole


def trainable(model: nn.Module, adapter: str | None) -> list[Tensor]:
    """Return what to optimize in a module: the chosen pairs' parameters, and all else that requires a gradient.

    Pairs are included even while frozen, so that switching adapters later needs no new optimizer.
    """
    chosen = {p for pair in find_lora_pairs(model, adapter) for p in (pair.A, pair.B)}
    others = {p for pair in find_lora_pairs(model) for p in (pair.A, pair.B)} - chosen
    params = [p for p in model.parameters() if p in chosen or (p.requires_grad and p not in others)]
    if not params:
        raise ValueError(f"params must be a module with trainable parameters, got 'a {type(model).__name__}'")
    return params


def describe_names(groups: list[dict[str, Any]]) -> str:
    """One line on the names among the parameters, for the error "no pair found"."""
    names = [name for g in groups for name in g.get("param_names", ())]
    if not names:
        return "the parameters have no names, so A and B cannot be told apart"
    return f"among {len(names)} named parameters ({', '.join(names[:3])}, ...) none are named like lora_A and lora_B"
