"""torch.distributed.checkpoint: written by two processes, read by one, two and four, which go on as if nothing was."""

import copy

import models
import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from curvopt import GritKFAC

# masks have fallen and the next observation, matrices and reprojection are still to come when it is written
CUT, END = 5, 10
ARGUMENTS = {"inverse_every": 3, "reproject_every": 4, "rank_threshold": 0.9, "min_rank": 1, "weight_decay": 0.1}
WRAPPERS = ("fsdp", "ddp")
WHOLE = StateDictOptions(full_state_dict=True)


def build():
    model = models.mlp(width=10, r=6)
    model.idle.requires_grad_(False)  # DCP wants state of whatever could have a gradient
    return model


def start(world, wrapper, before=False):
    """Return a fresh model, wrapped, and its optimizer, made before or after; without a world, of one process."""
    model = build()
    with torch.no_grad():  # what is loaded must all come from the checkpoint
        for p in model.parameters():
            p.add_(0.0 if world is None else 0.1)
    wrap = {"fsdp": lambda m: processes.shard(m, world.mesh), "ddp": lambda m: processes.ddp(m, world)}.get(wrapper)
    model = wrap(model) if wrap and not before else model
    optimizer = GritKFAC(model, lr=3e-3, process_group=world and world.group, **ARGUMENTS)
    return (wrap(model) if wrap and before else model), optimizer


def read(model, optimizer, folder, group=None):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optim": optimizer_state}, checkpoint_id=folder, process_group=group)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def go_on(world, wrapper, folder, before=False):
    """Read a checkpoint and train to the end."""
    model, optimizer = start(world, wrapper, before)
    read(model, optimizer, folder, world and world.group)
    loaded = processes.snapshot(model, optimizer)
    processes.fit(model, optimizer, range(CUT, END), *((world.rank, world.size) if world else ()))
    return loaded, processes.snapshot(model, optimizer), list(optimizer.ranks().values())


def job(worlds, everybody, folder):
    two, four = worlds[2], worlds[4]
    half = dist.get_rank() // 2  # each half writes a checkpoint of its own; all read the first one's
    found = {}
    for wrapper in WRAPPERS:
        model, optimizer = start(two, wrapper)
        set_model_state_dict(model, build().state_dict(), options=WHOLE)
        processes.fit(model, optimizer, range(CUT), two.rank, two.size)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optim": optimizer_state}
        dcp.save(state, checkpoint_id=f"{folder}/{wrapper}{half}", process_group=two.group)
        found["saved", wrapper] = processes.snapshot(model, optimizer)
        full = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=WHOLE))
        processes.fit(model, optimizer, range(CUT, END), two.rank, two.size)
        found["went on", wrapper] = processes.snapshot(model, optimizer), list(optimizer.ranks().values())
        set_optimizer_state_dict(model, optimizer, full, options=WHOLE)  # back in time
        found["full", wrapper] = full if dist.get_rank() == 0 else None, processes.snapshot(model, optimizer)
        dist.barrier()
        at = f"{folder}/{wrapper}0"
        found["read", wrapper, 2] = go_on(two, wrapper, at)
        found["read", wrapper, 4] = go_on(four, wrapper, at)
        found["read before", wrapper, 4] = go_on(four, wrapper, at, before=True)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def found(folder):
    return processes.run(job, folder / "run", str(folder))


wrappers = pytest.mark.parametrize("wrapper", WRAPPERS)


def assert_near(one, two):
    """Other processes sum in another order: rounding of float64, grown over the steps."""
    models.assert_near(one, two, rtol=1e-8, atol=1e-10)


@wrappers
def test_two_processes_go_on_to_the_bit(found, wrapper):
    for process in found[:2]:
        loaded, end, ranks = process["read", wrapper, 2]
        models.assert_same(loaded, process["saved", wrapper])
        models.assert_same(end, process["went on", wrapper][0])
        assert ranks == process["went on", wrapper][1]
        assert min(ranks) < 5  # there was something to lose


@wrappers
@pytest.mark.parametrize("when", ["read", "read before"])
def test_four_processes_go_on_from_two(found, wrapper, when):
    for process in found:
        loaded, end, ranks = process[when, wrapper, 4]
        models.assert_same(loaded, found[0]["saved", wrapper])
        want, want_ranks = found[0]["went on", wrapper]
        assert_near(end, want)
        assert ranks == want_ranks


@wrappers
def test_one_process_goes_on_from_two(found, folder, wrapper):
    loaded, end, ranks = go_on(None, None, f"{folder}/{wrapper}0")
    models.assert_same(loaded, found[0]["saved", wrapper])
    want, want_ranks = found[0]["went on", wrapper]
    assert_near(end, want)
    assert ranks == want_ranks


@wrappers
def test_a_full_state_dict_is_whole_and_goes_back(found, wrapper):
    full, back = found[0]["full", wrapper]
    saved = found[0]["saved", wrapper]
    state = {f"{name}/{key}": value for name, entry in full["state"].items() for key, value in entry.items()}
    models.assert_same(state, {name: t for name, t in saved.items() if "/" in name})
    models.assert_same({k: v for k, v in back.items() if "/" in k}, {k: v for k, v in saved.items() if "/" in k})


def test_a_run_without_a_break_is_the_one_that_was_never_distributed(found):
    model = build()
    optimizer = GritKFAC(model, lr=3e-3, **ARGUMENTS)
    processes.fit(model, optimizer, range(END))
    for wrapper in WRAPPERS:
        assert_near(found[0]["went on", wrapper][0], models.snapshot(model, optimizer))
