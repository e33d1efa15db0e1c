"""What the plugins of all trainers share: creating an optimizer from a model and options."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from curvopt import GritKFAC, MatryoshkaScaledAdam
from curvopt.integrations.options import parse_options
from curvopt.optim.grit.settings import ADVANCED, complete
from curvopt.optim.locator import trainable

log = logging.getLogger(__name__)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"grit": GritKFAC, "matryoshka": MatryoshkaScaledAdam}
"""The names by which plugins know the optimizers."""


def build_optimizer(
    model: nn.Module, optimizer: str | Callable[..., Optimizer] = "grit", **options: Any
) -> Optimizer:  # fmt: skip
    """Build an optimizer for a model with adapters.

    It trains what it would train if it were given the model: also adapters that are not active now, and with
    ``adapter=`` only those of that name.

    Weight decay acts on matrices: adapters and saved modules, but no biases and norms. If a library computes LoRA
    layers in kernels of its own that never call ``lora_A`` (see `fused_lora`), hooks would not fire: if the options
    ask for something that uses factors, GritKFAC then gets ``statistics="gradient"`` unless they set it themselves.

    Args:
        model: The model, before a trainer wraps it.
        optimizer: ``"grit"``, ``"matryoshka"``, or a class that is called with param groups and ``model=``.
        options: Its arguments; strings are parsed by `parse_options`.

    Raises:
        ValueError: An unknown name, an option that the optimizer does not have or that is out of range, or a model
            without adapters.
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(map(repr, OPTIMIZERS))}, got {optimizer!r}")
        optimizer = OPTIMIZERS[optimizer]
    options = parse_options(options, optimizer)
    reason = fused_lora(model)
    if reason:
        options = without_hooks(options, optimizer, reason)
    params = trainable(model, options.get("adapter"))  # what the optimizer itself would take of the model
    if not options.get("weight_decay"):
        return optimizer(params, model=model, **options)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return optimizer([g for g in groups if g["params"]], model=model, **options)


def without_hooks(options: Mapping[str, Any], optimizer: Callable[..., Any], reason: str) -> dict[str, Any]:
    """Return options under which an optimizer does not depend on hooks, unless they ask for that themselves.

    ``statistics="gradient"`` where factors would be observed by hooks, and a warning in the log; else they stay as they
    are: the default of GritKFAC reads no factors on the rank side.

    Args:
        options: Arguments of the optimizer, parsed.
        optimizer: Its class.
        reason: What keeps hooks from seeing anything, for the log.
    """
    said = dict(options)
    parameters = inspect.signature(optimizer).parameters
    deciding = ("statistics", "update", "reproject_every", "rank_threshold")
    if "statistics" not in said and parameters.keys() >= set(deciding):
        group = {**ADVANCED, **{name: parameters[name].default for name in deciding}, **said}
        complete(group)
        if group["statistics"] == "activation":
            log.warning('%s: hooks on lora_A would see nothing, so statistics="gradient" is used', reason)
            said["statistics"] = "gradient"
    return said


def fused_lora(model: nn.Module) -> str:
    """Say what computes LoRA layers of a model without calling ``lora_A``; empty if nothing is known to.

    Axolotl and unsloth put functions called ``apply_lora_…`` on attention and MLP modules, and unsloth replaces the
    forward of PEFT's layers by one called ``unsloth_forward``.
    """
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            name = getattr(value, "__name__", "") if callable(value) else ""
            if name.startswith("apply_lora"):
                return f"{path}.{attribute} is {name} of {getattr(value, '__module__', None) or 'an unknown module'}"
        if getattr(type(module).forward, "__name__", "") == "unsloth_forward":
            return f"{path} is computed by unsloth"
    return ""
