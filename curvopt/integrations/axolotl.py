"""Axolotl: a plugin that makes its trainers use GritKFAC or MatryoshkaScaledAdam.

.. code-block:: yaml

    plugins:
      - curvopt.integrations.axolotl.CurvoptPlugin
    learning_rate: 5e-3
    curvopt:              # may be left out
      optimizer: grit     # or matryoshka
      reproject_every: 20
      rank_threshold: 0.99

Learning rate, betas, ε and weight decay come from Axolotl's own settings (see `OptimizerFactory`). With Axolotl's LoRA
kernels (``lora_mlp_kernel``, ``lora_qkv_kernel``, ``lora_o_kernel``, ``lora_embedding_kernel``) the optimizer takes
statistics, where it reads any, from gradients, since those kernels never call ``lora_A``. Written against Axolotl 0.19.
"""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import nn
from torch.optim import Optimizer

from curvopt.integrations.factory import OPTIMIZERS, without_hooks
from curvopt.integrations.options import parse_options
from curvopt.integrations.transformers import OptimizerFactory

log = logging.getLogger(__name__)

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class CurvoptArgs(BaseModel):
    """What the plugin adds to Axolotl's settings: one section with the optimizer's name and its arguments."""

    curvopt: dict[str, Any] | None = None


class AxolotlFactory(OptimizerFactory):
    """An `OptimizerFactory` for both ways of calling one: Axolotl hands over its arguments, transformers does not."""

    def __call__(self, model: nn.Module, args: Any = None, *, training: Any = None, **kwargs: Any) -> Optimizer:
        """Return the optimizer of a model; ``training`` are the arguments for callers that give none."""
        return super().__call__(model, training if args is None else args, **kwargs)


class CurvoptPlugin(BasePlugin):
    """Gives the trainer a factory for its optimizer, after it was created and before it trains."""

    def get_input_args(self) -> str:
        """Return the dotted name of the settings that Axolotl is to accept."""
        return f"{__name__}.{CurvoptArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Set the trainer's ``optimizer_cls_and_kwargs``.

        Args:
            cfg: Axolotl's settings.
            trainer: A transformers Trainer.
        """
        options = dict(cfg.get("curvopt") or {})
        name = options.pop("optimizer", "grit")
        kernels = [kernel for kernel in KERNELS if cfg.get(kernel)]
        if kernels and name in OPTIMIZERS:
            options = parse_options(options, OPTIMIZERS[name])
            options = without_hooks(options, OPTIMIZERS[name], f"{', '.join(kernels)} never call lora_A")
        if trainer.optimizer is not None:
            log.warning("the trainer's %s is replaced by that of curvopt", type(trainer.optimizer).__name__)
            trainer.optimizer = None
        trainer.optimizer_cls_and_kwargs = (AxolotlFactory, {"training": trainer.args, "optimizer": name, **options})
