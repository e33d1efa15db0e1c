"""LLaMA-Factory v1: importing this module registers the optimizers "grit" and "matryoshka".

.. code-block:: yaml

    optim_config:
      name: grit
      lr: 5e-3            # LLaMA-Factory does not hand its learning_rate to plugins
      reproject_every: 20

Written against LLaMA-Factory 0.9.5, which imports no plugins from outside by itself: import this module before its
launcher is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
from torch import nn
from torch.optim import Optimizer

from curvopt.integrations.factory import OPTIMIZERS, build_optimizer


def build(model: nn.Module, optim_config: Mapping[str, Any]) -> Optimizer:
    """Return the optimizer of a model.

    Args:
        model: The model, sharded or not.
        optim_config: ``name``, ``lr`` (or ``learning_rate``) and the optimizer's other arguments.

    Raises:
        ValueError: No learning rate, or what `build_optimizer` raises.
    """
    options = {("lr" if key == "learning_rate" else key): value for key, value in optim_config.items()}
    name = options.pop("name")
    if "lr" not in options:
        raise ValueError(f"lr must be in the optim_config of {name}, got {dict(optim_config)!r}")
    return build_optimizer(model, name, **options)


for _name in OPTIMIZERS:
    OptimizerPlugin(_name).register()(build)
