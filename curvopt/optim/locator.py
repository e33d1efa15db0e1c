"""Where an optimizer's parameters stand in its model, to find them again when a framework has put others there."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.distributed import is_sharded, placed_like, reshard, world_size
from curvopt.lora import find_lora_pairs
from curvopt.lora.pairs import LARGEST_RANK
from curvopt.optim.checking import warn


class ParameterLocator:
    """The module and attribute of each parameter in some param groups.

    ``fully_shard`` replaces every parameter by a DTensor, ``prepare`` of an engine may do so long after the optimizer
    was made, and the old parameters never get a gradient again.

    Args:
        model: the module to look in; None: nothing can be found again.
        groups: the param groups.
        whole: the groups are meant to hold all that trains in the model.
    """

    def __init__(self, model: nn.Module | None, groups: list[dict[str, Any]], whole: bool = False) -> None:
        self._mine = mine = {p for g in groups for p in g["params"]}
        self._model, self._whole = model, whole
        self._at: dict[Tensor, tuple[nn.Module, str]] = {}
        for module in model.modules() if model is not None else ():
            for name, p in module._parameters.items():
                if p is not None and p in mine:
                    self._at.setdefault(p, (module, name))
        self._first = next(iter(self._at), None)
        self._warned = False
        # one parameter by the name of its module, which is that of its adapter: module, and where it is in the model
        self._samples: dict[str, tuple[Tensor, nn.Module, nn.Module]] = {}
        for parent in model.modules() if model is not None else ():
            for name, module in parent.named_children():
                for p in module._parameters.values():
                    if p is not None and p in mine:
                        self._samples.setdefault(name, (p, module, parent))

    def moved(self, idle: Iterator[Tensor]) -> bool:
        """Whether another parameter stands where the first one stood, or one of ``idle``.

        Those with gradients are where they were: asking for one of them all is enough to see a model replaced whole.
        """
        return (self._first is not None and self.now_at(self._first) is not self._first) or any(
            self.now_at(p) is not p for p in idle
        )

    def orphans(self) -> bool:
        """Whether a parameter still has a gradient, though its module has left the model.

        Nothing resets the gradients of an adapter that PEFT has deleted, so that it seems to train on. Adapters go
        whole: one parameter of each tells.
        """
        return any(
            p.grad is not None and parent._modules.get(name) is not module
            for name, (p, module, parent) in self._samples.items()
        )

    def adopt(self, groups: list[dict[str, Any]], state: dict[Tensor, Any], sides: Sequence[Any]) -> bool:
        """Put what stands in the model now into the groups, in place of what stood there; its state goes with it.

        A parameter of another shape (PEFT made the adapter anew) starts without state. Zero gradients go along too:
        torch's distributed checkpointing makes state by a step on such.

        Returns:
            Whether the groups have the parameters of all ``sides``, which are brought up to date.
        """
        reshard(self._model)
        mine = {p for g in groups for p in g["params"]}
        for g in groups:
            for i, p in enumerate(g["params"]):
                now = self.now_at(p)
                if now is p or now in mine:
                    continue
                g["params"][i] = now
                kept = state.pop(p, None)
                if kept is not None and now.shape == p.shape:
                    moments = {key: placed_like(now, v) for key, v in kept.items() if key.startswith("exp_avg")}
                    state[now] = {**kept, **moments}
                if p.grad is not None and now.grad is None and not p.grad.any():
                    now.grad = torch.zeros_like(now)
        mine = {p for g in groups for p in g["params"]}
        for side in (side for side in sides if side.pair.exists):
            side.param = side.pair.A if side.name == "A" else side.pair.B
        return all(side.param in mine for side in sides)

    def look_after(self, any_gradient: bool) -> None:
        """Warn, once, of gradients that train nothing.

        To be called where other parameters have gradients than at the step before, or none has any.

        Args:
            any_gradient: whether a parameter of the groups has a gradient.
        """
        if self._warned:
            return
        # anew: adapters can be added to the model at any time
        named = self._model.named_parameters() if self._model is not None and self._whole else ()
        outside = [name for name, p in named if p.grad is not None and p not in self._mine]
        if outside:
            self._warn(
                f"{len(outside)} parameters have gradients but are in no param group, so they do not train "
                f"({', '.join(outside[:3])}{', ...' if len(outside) > 3 else ''}): when the optimizer was made, they "
                "were frozen or not there. Add them with add_param_group, or make the optimizer anew"
            )
        elif self._model is None and not any_gradient and world_size() > 1:
            self._warn(
                "no parameter has a gradient. If fully_shard came after the optimizer it has replaced them all: pass "
                "the model instead of its parameters, or make the optimizer afterwards"
            )

    def _warn(self, text: str) -> None:
        self._warned = True
        warn(text)

    def now_at(self, p: Tensor) -> Tensor:
        """Return the parameter that stands where ``p`` stood; ``p`` if none does, or while FSDP2 has it unsharded."""
        at = self._at.get(p)
        now = None if at is None else at[0]._parameters.get(at[1])
        if now is None or now is p:
            return p
        return p if is_sharded(p) and not is_sharded(now) else now


def trainable(model: nn.Module, adapter: str | None) -> list[Tensor]:
    """Return what to optimize in a module: the chosen pairs' parameters, and all else that requires a gradient.

    Pairs are included even while frozen, with all else that their adapters train (DoRA's magnitudes, saved modules,
    biases), so that switching adapters later needs no new optimizer.
    """
    chosen: set[Tensor] = {p for pair in find_lora_pairs(model, adapter) for p in (pair.A, pair.B)}
    others = {p for pair in find_lora_pairs(model) for p in (pair.A, pair.B)} - chosen
    chosen |= _resting(model, adapter)
    params: list[Tensor] = [p for p in model.parameters() if p in chosen or (p.requires_grad and p not in others)]
    if not params:
        raise ValueError(f"params must be a module with trainable parameters, got 'a {type(model).__name__}'")
    return params


def _resting(model: nn.Module, adapter: str | None) -> set[Tensor]:
    """Return what PEFT's adapters train besides A and B, active now or not; of all adapters if ``adapter`` is None."""
    found: set[Tensor] = set()
    given = getattr(model, "peft_config", None)
    configs = given if isinstance(given, dict) else None
    for module in model.modules() if configs is not None else ():
        kept = vars(module)["_modules"].get("modules_to_save")
        held = [kept] if isinstance(kept, nn.ModuleDict) else []
        names = getattr(type(module), "adapter_layer_names", ())
        held += [getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)]
        for container in held:
            for name, p in container.named_parameters():
                if adapter is None or name.partition(".")[0] == adapter:
                    found.add(p)
        if not names:
            continue
        biases = {getattr(c, "bias", "none") for key, c in (configs or {}).items() if adapter in (None, key)}
        bias = getattr(module, "bias", None)
        if biases & {"all", "lora_only"} and isinstance(bias, Tensor):
            found.add(bias)
    for key, config in (configs or {}).items():
        if getattr(config, "bias", "none") == "all" and adapter in (None, key):
            found |= {p for name, p in model.named_parameters() if name.endswith("bias")}
    return found


def describe_names(groups: list[dict[str, Any]]) -> str:
    """One line on the names among the parameters, for the error "no pair found"."""
    names = [name for g in groups for name in g.get("param_names", ())]
    if not names:
        return "the parameters have no names, so A and B cannot be told apart"
    return f"among {len(names)} named parameters ({', '.join(names[:3])}, ...) none are named like lora_A and lora_B"


def describe_shapes(groups: list[dict[str, Any]]) -> str:
    """One line on the shapes of the parameters, for the error "no pair found"."""
    shapes = [str(tuple(p.shape)) for g in groups for p in g["params"]]
    shown = ", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else "")
    return f"no tensor has a dimension of at most {LARGEST_RANK} that is less than half of the other, got {shown}"
