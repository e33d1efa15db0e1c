"""MatryoshkaScaledAdam under FSDP2, on two and four processes, against one process without it."""

import models
import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._composable.replicate_with_fsdp import replicate  # there is no public way to it yet
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import Shard

from curvopt import MatryoshkaScaledAdam
from curvopt.lora import export_adapter
from curvopt.lora import truncated as cut

STEPS = range(6)
CUT, END = 4, 7
DECAY = {"weight_decay": 0.1}
STRATA = {"nesting": "stratified", "full_share": 0.5, "warmup_steps": 1, "reorder_every": 3}


def zero64():
    """A rank and a width that four processes cannot share equally."""
    return models.mlp(width=10, r=6, start="zero")


def used64():
    return models.mlp(width=10, r=6)


def llama32():
    return models.llama(r=6)


# name → (model, arguments, whether the optimizer is made before sharding)
SCENARIOS = {
    "matryoshka": (zero64, DECAY, False),
    "matryoshka-scaled": (used64, {"scale": "rank", **DECAY}, True),
    "dylora": (zero64, {"nesting": "dylora", **DECAY}, False),
    "dylora-before": (used64, {"nesting": "dylora", "scale": "sqrt"}, True),
    "unmasked": (used64, {**STRATA, "full_share": 1.0}, False),
    "mixed-dylora": (models.mixed, {"nesting": "dylora"}, False),
    "llama-32": (llama32, {"eps": 1e-4}, False),
}


BOTH = ("matryoshka-scaled", "dylora", "unmasked", "mixed-dylora")
RUNS = [(name, size) for name in SCENARIOS for size in processes.SIZES if size == 2 or name in BOTH]


def nested(build, kwargs, before=False, wrap=None):
    """Return a model and its optimizer, sharded by ``wrap`` in between or first."""
    model = build()
    if wrap is not None and not before:
        wrap(model)
    optimizer = MatryoshkaScaledAdam(model, lr=3e-3, **kwargs)
    if wrap is not None and before:
        wrap(model)
    return model, optimizer


def at_ranks(model, optimizer):
    """Return the weights at each rank that was trained, and at one that was not, and those afterwards."""
    found = []
    for rank in (2, 3):
        with optimizer.truncated(rank, strict=False, keep_P=rank == 2), torch.no_grad():
            processes.loss(model, 0)  # leaves the root's matrices unsharded
            with optimizer.truncated(1, strict=False):
                processes.loss(model, 0)
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
            found.append({name: p for name, p in processes.snapshot(model).items() if "lora_" in name})
    return [*found, processes.snapshot(model)]


def sharded(world, build, kwargs, before=False, wrap=None):
    """Train under FSDP2 and return what it came to, with the placements of the state."""
    wrap = wrap or (lambda model: processes.shard(model, world.mesh))
    model, optimizer = nested(build, kwargs, before, wrap)
    processes.fit(model, optimizer, STEPS[:4], world.rank, world.size)
    roll_back(model)
    processes.fit(model, optimizer, STEPS[4:], world.rank, world.size)
    placed = {
        f"{name}/{key}": str(getattr(value, "placements", ""))
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }
    return processes.snapshot(model, optimizer), at_ranks(model, optimizer), placed


def roll_back(model):
    """Put other weights into one adapter from outside."""
    layer = getattr(model, "first", None)
    if layer is not None:
        with torch.no_grad():
            layer.lora_A.weight.mul_(1.5)


def last(p):
    """Split the last dimension where FSDP2 can: then it is lora_B that is split along its rank."""
    return Shard(p.ndim - 1 if p.shape[-1] % 2 == 0 else 0)


def strata(world, wrap):
    """Train with masks that each process draws for its own samples."""
    model = wrap(zero64())
    optimizer = MatryoshkaScaledAdam(model, lr=3e-3, **STRATA)
    for i in STEPS[:5]:  # two micro-batches, with masks of their own
        optimizer.zero_grad()
        for turn in range(2):
            (processes.loss(model, i, 2 * world.rank + turn, 2 * world.size) / 2).backward()
        optimizer.step()
    return processes.snapshot(model, optimizer)


def halves(world=None):
    """bfloat16 on gradients that are the same everywhere: sums of pieces would round otherwise."""
    model = zero64().bfloat16()
    if world is not None:
        processes.shard(model, world.mesh)
    optimizer = MatryoshkaScaledAdam(model, lr=3e-3, weight_decay=0.1)
    for i in STEPS:
        g = torch.Generator().manual_seed(i)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.grad = processes.placed(torch.randn(p.shape, generator=g).to(p.dtype), p)
        optimizer.step()
    return processes.snapshot(model)


# ---------------------------------------------------------------------------------------------- checkpoints

SAVED = {"dylora": {"nesting": "dylora", **DECAY}, "stratified": STRATA, "matryoshka": DECAY}


def start(world, kwargs):
    """Return a model whose weights must all come from a checkpoint, and its optimizer."""
    model = zero64()
    model.idle.requires_grad_(False)  # DCP wants state of whatever could have a gradient
    if world is not None:
        processes.shard(model, world.mesh)
    return model, MatryoshkaScaledAdam(model, lr=3e-3, **kwargs)


def go_on(world, kwargs, folder):
    """Read a checkpoint and train to the end."""
    model, optimizer = start(world, kwargs)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=folder, process_group=world and world.group)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    loaded = processes.snapshot(model, optimizer)
    processes.fit(model, optimizer, range(CUT, END), *((world.rank, world.size) if world else ()))
    return loaded, processes.snapshot(model, optimizer)


def saved(worlds, folder):
    """Write checkpoints of two processes, go on, and go on from them with two and with four."""
    two, found = worlds[2], {}
    half = dist.get_rank() // 2  # each half writes its own
    for name, kwargs in SAVED.items():
        model, optimizer = start(two, kwargs)
        processes.fit(model, optimizer, range(CUT), two.rank, two.size)
        weights, state = get_state_dict(model, optimizer)
        dcp.save(
            {"model": weights, "optim": state}, checkpoint_id=f"{folder}/{name}{half}", process_group=two.group
        )  # fmt: skip
        found["saved", name] = processes.snapshot(model, optimizer)
        processes.fit(model, optimizer, range(CUT, END), two.rank, two.size)
        found["went on", name] = processes.snapshot(model, optimizer)
        dist.barrier()
        found["read", name, 2] = go_on(two, kwargs, f"{folder}/{name}{half}")
        found["read", name, 4] = go_on(worlds[4], kwargs, f"{folder}/{name}0")
    return found


def refused(world, folder):
    """What needs whole matrices says so; gathered, it works."""
    model, optimizer = nested(llama32, {}, wrap=lambda m: processes.shard(m, world.mesh))
    processes.fit(model, optimizer, STEPS[:2], world.rank, world.size)
    before = processes.snapshot(model)
    with pytest.raises(ValueError, match=r"weight is sharded.*gather its weights"):
        optimizer.export(f"{folder}/refused", 2)
    with pytest.raises(ValueError, match="is sharded"):
        export_adapter(model, f"{folder}/refused")
    with torch.no_grad():
        processes.loss(model, 0)
    with pytest.raises(ValueError, match=r"sharded\. Load the full state_dict"), cut(model, 2):
        pass
    models.assert_same(before, processes.snapshot(model))
    whole = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(model, options=whole)
    fresh = llama32()
    set_model_state_dict(fresh, weights, options=whole) if dist.get_rank() == 0 else None
    if dist.get_rank() == 0:
        export_adapter(fresh, f"{folder}/gathered", ranks=2)


def job(worlds, everybody, folder):
    two, four = worlds[2], worlds[4]
    found = {(name, size): sharded(worlds[size], *SCENARIOS[name]) for name, size in RUNS}
    for name in ("matryoshka", "dylora"):
        found["columns", name] = sharded(
            two, *SCENARIOS[name], wrap=lambda m: processes.shard(m, two.mesh, shard_placement_fn=last)
        )
        found["hybrid", name] = sharded(four, *SCENARIOS[name], wrap=lambda m: processes.shard(m, everybody))
        found["replicated", name] = sharded(two, *SCENARIOS[name], wrap=lambda m: replicate(m, mesh=two.mesh))
    for size, world in worlds.items():
        found["strata", size] = (
            strata(world, lambda m, world=world: processes.shard(m, world.mesh)),
            strata(world, lambda m, world=world: processes.ddp(m, world)),
        )
        found["halves", size] = halves(world)
    found |= saved(worlds, folder)
    refused(four, folder)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nested")


@pytest.fixture(scope="module")
def found(folder):
    return processes.run(job, folder / "run", str(folder))


@pytest.fixture(scope="module")
def alone():
    """One process with all the rows, for each scenario when it is first asked for."""
    cache = {}

    def get(name):
        if name not in cache:
            build, kwargs, _ = SCENARIOS[name]
            model, optimizer = nested(build, kwargs)
            processes.fit(model, optimizer, STEPS[:4])
            roll_back(model)
            processes.fit(model, optimizer, STEPS[4:])
            cache[name] = models.snapshot(model, optimizer), at_ranks(model, optimizer)
        return cache[name]

    return get


sizes = pytest.mark.parametrize("size", processes.SIZES)


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_sharded_processes_are_one(found, alone, name, size):
    for process in found[:size]:
        assert_agrees(process[name, size], alone(name), exact=not name.endswith("-32"))


@pytest.mark.parametrize("name", ["matryoshka", "dylora"])
@pytest.mark.parametrize("way", ["columns", "hybrid", "replicated"])
def test_other_ways_of_sharding(found, alone, way, name):
    for process in found:
        assert_agrees(
            process[way, name], alone(name), exact=True, placement="Replicate" if way == "replicated" else "Shard"
        )


def assert_agrees(run, expected, exact, placement="Shard"):
    """Assert that a sharded run is the one of a single process, at every rank, and that its state is sharded."""
    (got, ranks, placed), (want, want_ranks) = run, expected
    # rounding in another order, grown over the steps by divisions by √v̂; in float32 a thousandth of a step of 3e-3
    near = {"rtol": 1e-8, "atol": 1e-10} if exact else {"rtol": 1e-5, "atol": 3e-6}
    if exact:
        models.assert_near(got, want, **near)
    else:
        models.assert_near(*({k: v for k, v in snapshot.items() if "/" not in k} for snapshot in (got, want)), **near)
    for one, other in zip(ranks, want_ranks, strict=True):
        models.assert_near(one, other, **near)
    models.assert_same(ranks[-1], {name: t for name, t in got.items() if "/" not in name})  # truncation leaves no trace
    assert models.differences(ranks[0], {name: got[name] for name in ranks[0]}) != []  # and is not nothing
    wide = {name: at for name, at in placed.items() if "/exp_avg" in name or name.endswith("/full")}
    assert wide and all(placement in at for at in wide.values())
    assert all(at == "" for name, at in placed.items() if name not in wide)


def test_processes_agree_to_the_bit(found):
    processes.assert_agree_to_the_bit(found, SCENARIOS)


@sizes
def test_masks_are_those_of_ddp(found, size):
    """Samples are masked by process, so the oracle is the same processes without sharding."""
    for process in found[:size]:
        models.assert_near(*process["strata", size], rtol=1e-8, atol=1e-10)


@sizes
def test_bfloat16(found, size):
    want = halves()
    for process in found[:size]:
        # the update is rounded once on its way between the layouts, which may tip the rounding of the parameter
        models.assert_near(process["halves", size], want, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize("name", SAVED)
def test_two_processes_go_on_to_the_bit(found, name):
    for process in found:
        loaded, end = process["read", name, 2]
        models.assert_same(loaded, process["saved", name])
        models.assert_same(end, process["went on", name])


# in four processes the masks of "stratified" are other ones
@pytest.mark.parametrize("name", [name for name in SAVED if name != "stratified"])
def test_one_process_and_four_go_on_from_two(found, folder, name):
    want = found[0]["went on", name]
    alone = go_on(None, SAVED[name], f"{folder}/{name}0")
    for loaded, end in (alone, *(process["read", name, 4] for process in found)):
        models.assert_same(loaded, found[0]["saved", name])
        models.assert_near(end, want, rtol=1e-8, atol=1e-10)
