"""ms-swift: importing this module adds the optimizers "grit" and "matryoshka".

.. code-block:: shell

    FILE=$(python -c "import importlib.util as u; print(u.find_spec('curvopt.integrations.ms_swift').origin)")
    swift sft --external_plugins $FILE --optimizer grit --optim_args "reproject_every=20,rank_threshold=0.99" ...

Learning rate, betas, ε and weight decay come from the training arguments. Written against ms-swift 4.6.
"""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map
from torch.optim import Optimizer

from curvopt.integrations.factory import OPTIMIZERS
from curvopt.integrations.options import parse_options
from curvopt.integrations.transformers import OptimizerFactory


class CurvoptCallback(OptimizerCallback):
    """Creates the optimizer that ``--optimizer`` names, with the arguments of ``--optim_args``."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Return the optimizer of the trainer's model, or of the one that was handed over."""
        model = self.trainer.model if model is None else model
        cls = OPTIMIZERS[self.args.optimizer]
        options = parse_options(getattr(self.args, "optim_args", None) or "", cls)
        return OptimizerFactory()(model, self.args, optimizer=cls, **options)


for _name in OPTIMIZERS:
    optimizers_map[_name] = CurvoptCallback
