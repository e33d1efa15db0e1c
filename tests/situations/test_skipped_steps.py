"""Periodic work that falls on a step with non-finite gradients, of which the host may learn only before the next."""

import models
import pytest
import torch

from curvopt import GritKFAC
from curvopt.optim import bucket


@pytest.fixture(params=[True, False], ids=["at hand", "on its way"])
def flags(request, monkeypatch):
    """Flags are read at once, as on the CPU, or before the next step, as on a device."""
    monkeypatch.setattr(bucket, "_at_hand", lambda flag: request.param)


def run(optimizer, model, steps, spoilt, after=None):
    """Train, and return what ``after`` gives after every step; step ``spoilt`` has a gradient that is not finite."""
    seen = []
    for i in range(1, steps + 1):
        optimizer.zero_grad()
        models.loss(model, i).backward()
        if i == spoilt:
            model.first.lora_A.weight.grad[0, 0] = torch.nan
        optimizer.step()
        seen.append(None if after is None else after(i))
    return seen


def test_an_observation_is_made_up_at_the_next_step(flags):
    model = models.mlp()
    optimizer = GritKFAC(model, statistics="activation", factor_every=3)
    seen = run(optimizer, model, 8, 4, lambda i: int(optimizer.state[model.first.lora_B.weight]["observed"]))
    assert seen == [1, 1, 1, 1, 2, 2, 3, 3]


def test_matrices_are_made_up_at_the_next_step_with_or_without_new_groups(flags):
    """A group that is added in between makes the buckets anew."""
    for added in (False, True):
        model = models.mlp()
        pairs = [p for layer in model.layers for p in (layer.lora_A.weight, layer.lora_B.weight)]
        optimizer = GritKFAC([{"params": pairs}], model=model, update="eigen", statistics="gradient", inverse_every=5)

        def turned(i, optimizer=optimizer, model=model, added=added):
            if added and i == 1:
                optimizer.add_param_group({"params": list(model.head.parameters())})
            Q = optimizer.state[model.first.lora_A.weight]["basis"]
            return not torch.equal(Q, torch.eye(len(Q), dtype=Q.dtype))

        assert run(optimizer, model, 3, 1, turned) == [False, True, True]


def test_what_is_saved_knows_of_the_skipped_step(flags):
    model = models.mlp()
    optimizer = GritKFAC(model, update="eigen", statistics="gradient", inverse_every=5)
    run(optimizer, model, 1, 1)
    cadence = [s["cadence"].tolist() for s in optimizer.state_dict()["state"].values() if "cadence" in s]
    # one step with gradients, and no matrices yet
    assert cadence and all(c[0] == 1 and c[2] == 0 for c in cadence)


def test_a_run_is_the_same_whenever_flags_arrive(monkeypatch):
    ends = []
    for at_hand in (True, False):
        monkeypatch.setattr(bucket, "_at_hand", lambda flag, at_hand=at_hand: at_hand)
        model = models.mlp()
        settings = {"factor_every": 2, "inverse_every": 3, "reproject_every": 4, "rank_threshold": 0.9, "min_rank": 1}
        optimizer = GritKFAC(model, lr=1e-2, update="eigen", statistics="gradient", **settings)
        run(optimizer, model, 13, 4)
        optimizer.state_dict()
        ends.append(models.snapshot(model, optimizer))
    models.assert_same(*ends)
