"""FSDP2 off the straight way: accidents, refusals, other orders of events; what is sent; the examples of the docs."""

import os
import re
from pathlib import Path

import models
import processes
import pytest
import torch
import torch.distributed as dist
from processes import ALL, grit, odd, odd32, odd64, plain
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from curvopt import GritKFAC
from curvopt.lora import resize_adapter

STEPS = range(10)
TEXT = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```py\n(.*?)```", TEXT, flags=re.DOTALL)
BYTES = {
    "activation": {"statistics": "activation", "inverse_every": 2, "factor_every": 2},
    "weight": {"statistics": "weight", "update": "momentum"},
    "gradient": {"statistics": "gradient", "outer_rank": 0, "factor_every": 3},
    "reprojected": {"reproject_every": 2, "rank_threshold": 0.9, "min_rank": 1},
    "nested": {"nested_ranks": (1, 2), "reproject_every": 2},
}


def broken_step(world):
    """One process of the world gets a NaN in one step, and another one in the next."""
    model, optimizer = plain(world, odd64, **ALL)
    share = (world.rank, world.size)
    processes.fit(model, optimizer, range(2), *share)
    seen = [processes.snapshot(model, optimizer)]
    for i in (2, 3):
        optimizer.zero_grad()
        processes.loss(model, i, *share).backward()
        if world.rank == (world.size - 1 if i == 2 else 0):  # after the backward, so that nobody else has seen it
            model.first.lora_B.weight.grad.to_local().fill_(torch.nan)
        optimizer.step()
        seen.append(processes.snapshot(model, optimizer))
    skipped = optimizer.diagnostics()["skipped_updates"]
    processes.fit(model, optimizer, range(4, 6), *share)
    return [*seen, processes.snapshot(model, optimizer)], skipped


def bytes_sent(world, patch, kwargs):
    """Return what each of some steps sent, and what the optimizer says a step sends."""
    model, optimizer = plain(world, odd32, **kwargs)
    return processes.bytes_by_step(model, optimizer, world, patch), optimizer.diagnostics()["bytes_sent"]


def refused(world, everybody):
    """Return the messages of what is not supported, and whether the refusals left everything as it was."""
    model, optimizer = plain(world, odd64)
    processes.fit(model, optimizer, range(1), world.rank, world.size)
    before = processes.snapshot(model)
    messages = []
    optimizer.state[optimizer.pairs[0].A]["rank"].fill_(2)
    for call in (optimizer.compact, lambda: resize_adapter(model, {"first": 2})):
        with pytest.raises(ValueError, match="first cannot be resized: its factors are sharded") as error:
            call()
        messages.append(str(error.value))
    twice = odd64()
    twice.first.lora_A.weight = nn.Parameter(
        distribute_tensor(twice.first.lora_A.weight, everybody, [Shard(0), Shard(1)])
    )
    twice.first.lora_A.weight.grad = torch.zeros_like(twice.first.lora_A.weight)
    with pytest.raises(ValueError, match="A of first must be split over one mesh dimension"):
        GritKFAC(twice, require_pairs=False).step()
    models.assert_same(before, processes.snapshot(model))


def accumulated(world):
    """Two backward passes a step, the first without communication."""
    model, optimizer = plain(world, odd64, **ALL)
    for i in STEPS:
        optimizer.zero_grad()
        for turn in range(2):
            model.set_requires_gradient_sync(turn == 1)
            (processes.loss(model, i, 2 * world.rank + turn, 2 * world.size) / 2).backward()
        optimizer.step()
    return processes.snapshot(model)


def midway(world):
    """Four steps without sharding, each process on all rows, the others with it."""
    model = odd64()
    optimizer = grit(model, **ALL)
    processes.fit(model, optimizer, STEPS[:4])
    processes.shard(model, world.mesh)
    processes.fit(model, optimizer, STEPS[4:], world.rank, world.size)
    return processes.snapshot(model)


def handed_over(world):
    """A library has emptied the param groups before sharding, and filled them again afterwards."""
    model = odd64()
    optimizer = grit(model, **ALL)
    names = {p: name for name, p in model.named_parameters()}
    held = [[names[p] for p in g["params"]] for g in optimizer.param_groups]
    for g in optimizer.param_groups:
        g["params"] = [torch.empty(1) for _ in g["params"]]
    processes.shard(model, world.mesh)
    for g, group in zip(optimizer.param_groups, held, strict=True):
        g["params"] = [model.get_parameter(name) for name in group]
    processes.fit(model, optimizer, STEPS, world.rank, world.size)
    return processes.snapshot(model)


def lost(world):
    """Parameters without their model, replaced by sharding: nobody can find the new ones."""
    model = odd64()
    optimizer = grit(model.named_parameters())
    processes.shard(model, world.mesh)
    processes.loss(model, 0, world.rank, world.size).backward()
    with pytest.warns(UserWarning, match="fully_shard"):
        optimizer.step()


def halves(world=None):
    """bfloat16 with masks, on gradients that are the same everywhere: sums of pieces would round otherwise."""
    model = odd(torch.bfloat16)
    if world is not None:
        processes.shard(model, world.mesh)
    group = None if world is None else world.statistics
    optimizer = grit(
        model, statistics="gradient", outer_rank=0, betas=(0.9, 0.999), process_group=group,
        **{**ALL, "rank_threshold": 0.5},
    )  # fmt: skip
    for i in STEPS:
        g = torch.Generator().manual_seed(i)
        grads = {p: torch.randn(p.shape, generator=g).to(p.dtype) for p in model.parameters()}
        for pair in optimizer.pairs:  # those of some W: a pair whose gradients no product B A can have keeps its basis
            A, B = (p.full_tensor() if hasattr(p, "placements") else p for p in (pair.A.detach(), pair.B.detach()))
            W = torch.randn(B.shape[0], A.shape[1], generator=g).to(A.dtype)
            grads[pair.A], grads[pair.B] = B.T @ W, W @ A.T
        for p, grad in grads.items():
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if hasattr(p, "placements") else grad
        optimizer.step()
    return processes.snapshot(model), optimizer.ranks()


def bare(world=None):
    """Sharded tensors without names, each LoRA matrix by its shape."""
    model = models.mlp(width=10, r=4)
    if world is not None:
        processes.shard(model, world.mesh)
    optimizer = GritKFAC([p for p in model.parameters() if p.requires_grad], lr=3e-3, low_rank="shape")
    processes.fit(model, optimizer, STEPS, *(() if world is None else (world.rank, world.size)))
    return processes.snapshot(model, optimizer), len(optimizer.sides)


def documented(folder):
    """Run the examples of the docs in every process; return what they left."""
    os.chdir(folder)
    ids = models.llama_ids(0)[:, :8]
    batches = [{"input_ids": ids, "labels": ids}] * 3
    left = []
    start = {"GritKFAC": GritKFAC, "batches": batches, "model": models.llama()}
    for source in EXAMPLES[:2]:
        namespace = {**start, "model": models.llama(), "fresh_model": models.llama()}
        exec(source, namespace)
        left.append(processes.snapshot(namespace["model"]))
    for source in EXAMPLES[2:4]:  # they go on with the sharded model
        exec(source, namespace)
    calibrated = {**start, "model": models.llama()}
    exec(EXAMPLES[4], calibrated)
    assert calibrated["optimizer"].ready and calibrated["optimizer"].delegate is not None
    left.append(processes.snapshot(namespace["fresh_model"]))
    return [{name: t for name, t in snapshot.items() if "lora_" in name} for snapshot in left]


def job(worlds, everybody, folder):
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for size, world in worlds.items():
            found["broken", size] = broken_step(world)
            for name, kwargs in BYTES.items():
                found["bytes", name, size] = bytes_sent(world, patch, kwargs)
            found["halves", size] = halves(world)
            found["bare", size] = bare(world)
    four = worlds[4]
    found |= {way.__name__: way(four) for way in (accumulated, midway, handed_over)}
    found["documented"] = documented(folder)
    lost(four)
    refused(four, everybody)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return processes.run(job, folder / "run", str(folder))


sizes = pytest.mark.parametrize("size", processes.SIZES)


@pytest.mark.parametrize("way", [accumulated, midway, handed_over])
def test_other_orders_of_events(found, way):
    model = odd64()
    processes.fit(model, grit(model, **ALL), STEPS)
    want = models.snapshot(model)
    for process in found:
        models.assert_near(process[way.__name__], want, rtol=1e-8, atol=1e-10)


@sizes
def test_bfloat16_with_masks(found, size):
    want, ranks = halves()
    assert all(live < full for live, full in zip(ranks.values(), (6, 6, 5, 6), strict=True))  # all are masked
    for process in found[:size]:
        got, live = process["halves", size]
        assert live == ranks
        models.assert_near(got, want, rtol=2**-7, atol=2**-10)  # sums in another order tip a rounding now and then


@sizes
def test_tensors_without_names(found, size):
    want, sides = bare()
    for process in found[:size]:
        got, own = process["bare", size]
        assert own == sides == 7  # B of the third layer is (6 × 3)
        models.assert_near(got, want, rtol=1e-8, atol=1e-10)


def test_examples_of_the_docs(found):
    """Every way trains the same: batches are the same in all processes."""
    assert len(EXAMPLES) == 5
    model = models.llama()
    before = models.snapshot(model)
    optimizer = GritKFAC(model, lr=5e-3)
    for _ in range(3):
        optimizer.zero_grad()
        ids = models.llama_ids(0)[:, :8]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = {name: p for name, p in models.snapshot(model).items() if not torch.equal(p, before[name])}
    for process in found:
        for left in process["documented"]:
            assert left.keys() == moved.keys()
            for name, p in moved.items():
                # three steps of length lr from B = 0, where many gradients are rounding alone
                assert (left[name] - p).abs().mean() < 0.02 * (p - before[name]).abs().mean(), name


@sizes
def test_one_process_s_nan_stops_all(found, size):
    for process in found[:size]:
        (before, nan, scaler, later), skipped = process["broken", size]
        models.assert_same(before, nan, ignore=("skipped", "cadence"))
        models.assert_same(before, scaler, ignore=("skipped", "cadence"))
        assert skipped == 2
        assert all(t.isfinite().all() for t in later.values()) and models.differences(before, later) != []


@sizes
@pytest.mark.parametrize("name", BYTES)
def test_bytes_sent(found, name, size):
    every = {"factor_every": 10, "reproject_every": 0, **BYTES[name]}
    for process in found[:size]:
        counts, said = process["bytes", name, size]
        for i, count in enumerate(counts):
            reprojects = every["reproject_every"] and (i + 1) % every["reproject_every"] == 0
            observes = i % every["factor_every"] == 0
            assert count == said["update"] + observes * said["statistics"] + bool(reprojects) * said["reprojection"]


def test_bytes_of_an_exchange_in_numbers(found):
    """Four processes, A of (6 × 10) twice and (5 × 10) once: the first has rows 2, 2, 2 and columns 3, 3, 3."""
    for rank, process in enumerate(found):
        _, said = process["bytes", "gradient", 4]
        columns, rows = (3, 3, 3, 1)[rank], ((2, 2, 2, 0)[rank], (2, 2, 1, 0)[rank])
        there = 2 * rows[0] * (10 - columns) + rows[1] * (10 - columns)
        back = 2 * columns * (6 - rows[0]) + columns * (5 - rows[1])
        grams = 2 * (2 * 36 + 25)  # of three steps of A and as many of B, for "polar"
        assert said["update"] == 4 * (there + back + grams) + 4
        # lower triangles of three factors for A and as many for B
        assert said["statistics"] == 2 * 4 * (2 * 21 + 15)
