"""Two processes on loopback, each with its own batches and its own A: one plan, one A, one B."""

import models
import pytest
import torch
import torch.multiprocessing as mp
from gora_models import SETTINGS, SMALL, build, published, train, worker


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(worker, (str(tmp_path_factory.mktemp("gloo") / "store"), found), nprocs=2)
        return dict(found)


@pytest.mark.parametrize("name", SETTINGS)
def test_processes_agree_to_the_bit(results, name):
    assert results[name, 0][0] == results[name, 1][0]
    models.assert_same(results[name, 0][1], results[name, 1][1])


def test_two_processes_are_one_with_all_rows(results):
    model, _ = build("llama")
    torch.manual_seed(0)
    optimizer = published(model, **SMALL)
    train(optimizer, model, slice(None))
    plan, weights = results["mean_abs", 0]
    assert plan.ranks == optimizer.plan.ranks
    # float64 but for Llama's norms; A Aᵀ of the widest adapters has a condition number of 1e4
    models.assert_near(weights, models.snapshot(model), rtol=1e-4, atol=1e-8)
