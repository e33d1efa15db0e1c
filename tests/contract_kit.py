"""The optimizers that keep the contract of torch.optim.AdamW, for tests of all of them."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from curvopt import GritKFAC, MatryoshkaScaledAdam


@dataclass
class Case:
    """One optimizer class and what a call of it needs beside params and AdamW's own arguments."""

    cls: type
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
        return self.cls(params, **{"lr": 1e-2, **self.kwargs, **kwargs})


CASES = [
    Case(GritKFAC, {"inverse_every": 3}),
    Case(MatryoshkaScaledAdam),
]

optimizers = pytest.mark.parametrize("make", CASES, ids=lambda case: case.cls.__name__)
