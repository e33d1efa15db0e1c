"""A step never reads the device: no value of a tensor becomes a Python number, a branch or a shape on the hot path."""

import models
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from curvopt import GritKFAC
from curvopt.functional.update import RULES

aten = torch.ops.aten
# what makes a device wait: reading a number, or asking for a shape that depends on values
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal, aten.unique_dim}


class NoReads(TorchDispatchMode):
    """Raises where an op would read a value on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READS:
            raise AssertionError(f"{func} reads the device")
        return func(*args, **(kwargs or {}))


def grads_of(model, seed):
    g = torch.Generator().manual_seed(seed)
    (model(torch.randn(16, 7, dtype=torch.float64, generator=g)) ** 2).mean().backward()


SETTINGS = [
    *({"update": rule, "statistics": s} for rule in RULES for s in ("activation", "gradient", "weight")),
    {"sides": "paper", "factor_decay": 1.0},
    {"reproject_every": 2, "rank_threshold": 0.9, "min_rank": 1},
    {"reproject_every": 2, "reprojection": "paper", "rank_threshold": 0.9, "min_rank": 1},
    {"lr": torch.tensor(1e-2), "damping": torch.tensor(0.1, dtype=torch.float64), "update": "adam"},
    {"lr": torch.tensor(1e-2), "damping": torch.tensor(0.1, dtype=torch.float64), "update": "whiten"},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_step_reads_nothing(setting):
    model = models.single()
    optimizer = GritKFAC(model, capturable=True, inverse_every=2, **{"lr": 1e-2, **setting})
    for step in range(5):
        optimizer.zero_grad()
        with NoReads():
            grads_of(model, step)
        if step == 3:
            optimizer.pairs[0].A.grad.fill_(torch.nan)
        if step == 0:
            optimizer.step()  # state is made here
            continue
        with NoReads():
            optimizer.step()
    assert optimizer.diagnostics()["skipped_updates"] == 1


def test_the_mode_sees_a_read():
    with pytest.raises(AssertionError, match="reads the device"), NoReads():
        float(torch.ones(1))
