"""Processes on loopback: the flat all-reduce, and two processes under DDP against one with both batches."""

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from curvopt import GritKFAC
from curvopt.distributed import all_reduce_sums, world_size

STEPS = 6


def batch_loss(model, rank=None):
    """Mean loss over the rows of one process, or over all rows."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(8, 7, dtype=torch.float64, generator=g)
    y = torch.randn(8, 5, dtype=torch.float64, generator=g)
    rows = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return (model(x[rows]) - y[rows]).square().sum(-1).mean()


def worker(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        sums = [torch.full((2, 2), float(rank + 1)), torch.arange(3.0), torch.ones(2, dtype=torch.float64) * rank]
        all_reduce_sums(sums)
        model = DistributedDataParallel(models.single())
        optimizer = GritKFAC(model, lr=1e-2, inverse_every=2, reproject_every=3, rank_threshold=0.9, min_rank=1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            batch_loss(model, rank).backward()
            optimizer.step()
        results[rank] = (sums, models.snapshot(model.module, optimizer), world_size())
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(worker, (str(tmp_path_factory.mktemp("gloo") / "store"), found), nprocs=2)
        return dict(found)


def test_sums_are_summed_by_device_and_dtype(results):
    for sums, _, size in results.values():
        assert size == 2 and world_size() == 1
        assert torch.equal(sums[0], torch.full((2, 2), 3.0)) and torch.equal(sums[1], 2 * torch.arange(3.0))
        assert torch.equal(sums[2], torch.ones(2, dtype=torch.float64))


def test_processes_agree_to_the_bit(results):
    models.assert_same(results[0][1], results[1][1])


def test_two_processes_are_one_with_both_batches(results):
    model = models.single()
    optimizer = GritKFAC(model, lr=1e-2, inverse_every=2, reproject_every=3, rank_threshold=0.9, min_rank=1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        batch_loss(model).backward()
        optimizer.step()
    one = models.snapshot(model, optimizer)
    assert one.keys() == results[0][1].keys()
    for name, tensor in results[0][1].items():
        # float64 and a handful of Adam steps: differences of summation order, divided by √v̂
        torch.testing.assert_close(tensor, one[name], rtol=1e-8, atol=1e-10, msg=name)
