"""Processes with unlike numbers of batches: ``Join([model, optimizer])`` steps along, and ends in one state."""

import models
import pytest
import torch
from processes import run
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from curvopt import GritKFAC

COUNTS = {"one less": (5, 4), "none at all": (3, 0)}
SETTINGS = {
    "every step": {},
    "now and then": {"factor_every": 2, "inverse_every": 3, "reproject_every": 2},
    "no statistics": {"statistics": "gradient"},
}


def uneven(worlds, mesh):
    """Train in halves of two processes; even after the uneven epoch, since states must agree for that."""
    world, found = worlds[2], {}
    for name, counts in COUNTS.items():
        for kind, settings in SETTINGS.items():
            model = models.mlp()
            model.idle.requires_grad_(False)
            wrapped = DistributedDataParallel(model, process_group=world.group)
            optimizer = GritKFAC(model, lr=1e-2, process_group=world.group, **settings)
            with Join([wrapped, optimizer]):
                for i in range(counts[world.rank]):
                    optimizer.zero_grad()
                    x, y = models.batch(model, 10 * i + world.rank)
                    torch.nn.functional.cross_entropy(wrapped(x).flatten(0, 1), y.flatten()).backward()
                    if kind == "now and then" and i == 2:  # a step that is skipped stays due for all
                        model.first.lora_A.weight.grad.fill_(torch.nan)
                    optimizer.step()
            joined = models.snapshot(model, optimizer)
            for i in range(50, 53):
                optimizer.zero_grad()
                x, y = models.batch(model, 10 * i + world.rank)
                torch.nn.functional.cross_entropy(wrapped(x).flatten(0, 1), y.flatten()).backward()
                optimizer.step()
            found[name, kind] = joined, models.snapshot(model, optimizer), optimizer.diagnostics()["steps"]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(uneven, tmp_path_factory.mktemp("uneven"))


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", COUNTS)
def test_all_end_in_one_state(results, name, kind):
    """And stay in it while they train on: replicas that drifted apart would be the silent failure."""
    (joined, after, n), (joined_1, after_1, n_1) = (results[rank][name, kind] for rank in (0, 1))
    assert n == n_1 == COUNTS[name][0] + 3
    models.assert_same(joined, joined_1)
    models.assert_same(after, after_1)
    assert any(not torch.equal(joined[key], after[key]) for key in joined)
