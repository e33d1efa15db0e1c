"""torch's OptimizerInfo of each of our classes, and small problems for it.

The entries say what torch's tests ask of one: valid arguments, invalid ones with what they raise, what is supported.
The parameters are plain tensors in no pair (``require_pairs=False``), and where it matters those of an adapter.
"""

import copy

import models
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.testing._internal import common_optimizers as common

from curvopt import GritKFAC, MatryoshkaScaledAdam

ADAMW = [
    ({}, "default"),
    ({"lr": 0.01}, "non-default lr"),
    ({"lr": torch.tensor(0.001)}, "tensor lr"),
    ({"weight_decay": 0.1}, "weight decay"),
    ({"weight_decay": 0.1, "maximize": True}, "maximize"),
    ({"betas": (0.8, 0.9), "eps": 1e-6}, "betas and eps"),
]
OWN = {
    GritKFAC: [
        *(({"update": rule, "statistics": "gradient", "inverse_every": 2}, rule) for rule in ("adam", "whiten")),
        ({"update": "momentum", "warmup_steps": 2}, "momentum with warm-up"),
        ({"reproject_every": 2, "rank_threshold": 0.9, "min_rank": 1}, "moving ranks"),
        ({"capturable": True}, "capturable"),
    ],
    MatryoshkaScaledAdam: [
        ({"nesting": "dylora"}, "dylora"),
        ({"scale": "sqrt"}, "sqrt"),
        ({"ranks": (1, 3, 4)}, "ranks"),
    ],
}
WRONG = [
    ({"lr": -1.0}, "lr must be a number ≥ 0, got -1.0"),
    ({"betas": (1.0, 0.0)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.0\)"),
    ({"eps": -1e-3}, "eps must be a number ≥ 0"),
    ({"weight_decay": -1.0}, "weight_decay must be a number ≥ 0, got -1.0"),
    ({"lr": torch.tensor([0.001, 0.001])}, "lr must be"),
    ({"backend": "fpga"}, "backend"),
]
WRONG_OWN = {
    GritKFAC: [({"update": "newton"}, "update must be one of"), ({"damping": 0.0}, "damping must be a number > 0")],
    MatryoshkaScaledAdam: [({"scale": "cube"}, "scale must be"), ({"nesting": "doll"}, "nesting must be")],
}


def entry(cls):
    """Return torch's description of one of our classes."""

    def inputs(device, dtype=None):
        return [common.OptimizerInput(params=None, kwargs=kwargs, desc=desc) for kwargs, desc in ADAMW + OWN[cls]]

    def errors(device, dtype):
        theirs = common.get_error_inputs_for_all_optims(device, dtype)
        kept = [e for e in theirs if "Tensor lr" not in e.error_regex]  # ours is in WRONG, in our words
        return kept + [
            common.ErrorOptimizerInput(
                common.OptimizerInput(params=None, kwargs=kwargs, desc=words), error_type=ValueError, error_regex=words
            )
            for kwargs, words in WRONG + WRONG_OWN[cls]
        ]

    return common.OptimizerInfo(
        cls, optim_inputs_func=inputs, optim_error_inputs_func=errors, supported_impls=(), supports_complex=False,
        not_og_supported_flags=(), has_capturable_arg=cls is GritKFAC,
        scheduler_inputs=(
            [lambda o: StepLR(o, gamma=0.9, step_size=10), lambda o: ReduceLROnPlateau(o)],
            [lambda o: LinearLR(o, start_factor=0.4, total_iters=4), lambda o: ExponentialLR(o, gamma=0.9)],
        ),
    )  # fmt: skip


INFOS = [entry(cls) for cls in OWN]
infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
inputs = pytest.mark.parametrize(
    ("info", "given"),
    [
        pytest.param(info, given, id=f"{info.name}-{given.desc}")
        for info in INFOS
        for given in info.optim_inputs_func(device="cpu")
    ],
)


def build(info, params, kwargs=None, **more):
    """Return an optimizer of parameters that need be in no pair."""
    return info.optim_cls(params, **{**copy.deepcopy(kwargs or {}), "require_pairs": False, **more})


def linear(dtype=torch.float64):
    """A weight, a bias and a convex problem in them: two columns, one target."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=dtype))
    bias = nn.Parameter(torch.randn(6, generator=generator, dtype=dtype))
    x = torch.randn(4, generator=generator, dtype=dtype)
    return [weight, bias], lambda: (weight.mv(x) + bias).square().sum()


def adapted(kwargs, info, dtype=torch.float64):
    """The same for the parameters of a small model with adapters."""
    model = models.mlp(dtype)
    return model, info.optim_cls(model, **copy.deepcopy(kwargs))


def minimize(optimizer, loss, steps, sign=1.0):
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        values.append(value.item() * sign)
    return values
