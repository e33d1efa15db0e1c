"""For trainers that import a class by its path and pass it bare tensors: sd-scripts, musubi-tuner, torchtune recipes.

.. code-block:: shell

    --optimizer_type curvopt.integrations.by_shape.GritKFAC --optimizer_args outer_rank=8 "betas=0.9,0.99"

A bare tensor has neither a name nor a module: ``low_rank="shape"`` trains each LoRA matrix by itself. If the options
are not strings, use `curvopt.GritKFAC` with that argument; it is the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

import curvopt
from curvopt.integrations.options import parse_options


class GritKFAC(curvopt.GritKFAC):
    """`curvopt.GritKFAC` with ``low_rank="shape"``, whose options may be strings.

    Args:
        params: Tensors, or param groups of tensors (any iterables).
        lr: Learning rate.
        options: The other arguments of `curvopt.GritKFAC`; strings are parsed by `curvopt.integrations.parse_options`.

    Raises:
        ValueError: No tensor has the shape of a LoRA matrix, or an option that is unknown or out of range.
    """

    def __init__(self, params: ParamsT, lr: float | Tensor | str = 1e-3, **options: Any) -> None:
        options = parse_options({"low_rank": "shape", "lr": lr, **options}, curvopt.GritKFAC)
        super().__init__(params, **options)
