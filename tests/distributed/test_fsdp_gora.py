"""GoRAInit under FSDP2, on two and four processes, against one process without it."""

from functools import partial

import models
import processes
import pytest
import torch
import torch.distributed as dist
from gora_models import published
from torch.distributed._composable.replicate_with_fsdp import replicate  # there is no public way to it yet
from torch.distributed.tensor import Shard

from curvopt import GoRAInit, GritKFAC

SMALL = {"rank": 3, "min_rank": 1, "max_rank": 5, "calibration_steps": 4, "resize": False}
STEPS = range(6)


def zero64():
    """Ranks and widths that four processes cannot share equally; a rank of 5 in all layers that train."""
    model = models.mlp(width=10, r=6, start="zero")
    model.idle.requires_grad_(False)  # GoRAInit insists on a gradient
    return model


def mixed64():
    """An embedding whose A is zero, as PEFT makes it, a convolution, a linear map; the DoRA layer is left as it is."""
    model = models.mixed()
    torch.nn.init.zeros_(model.front["embed"].lora_embedding_A["default"])
    return model


def llama64():
    return models.llama(torch.float64, r=6)


MIXED = {"rank": 2, "max_rank": 4, "reset": True}
# name → (model, arguments)
SCENARIOS = {
    "gora": (zero64, {}),
    "clipped": (zero64, {}),
    "accumulated": (zero64, {}),
    "unsynchronised": (zero64, {}),
    "before": (zero64, {}),
    "auto": (zero64, {"init_lr": "auto"}),
    "settled": (zero64, {"importance": "frobenius", "convergence": 1e9, "offload": True}),
    "grad_b": (zero64, {"importance": "grad_b"}),
    "whitened": (zero64, {"start": "whitened", "allocation": "spectrum"}),
    "whitened-random": (zero64, {"start": "whitened-random", "importance": "frobenius"}),
    "mixed": (mixed64, MIXED),
    "mixed-whitened": (mixed64, {**MIXED, "start": "whitened"}),
    "llama": (llama64, {"rank": 2}),
}


BOTH = ("gora", "accumulated", "unsynchronised", "grad_b", "whitened", "mixed")
RUNS = [(name, size) for name in SCENARIOS for size in processes.SIZES if size == 2 or name in BOTH]


def calibrated(model, kwargs, group=None):
    """Calibrate, then train with GritKFAC."""
    then = partial(GritKFAC, lr=3e-3, factor_every=1, reproject_every=2, eps=1e-6, process_group=group)
    return published(model, **{**SMALL, **kwargs}, process_group=group, then=then)


def fit(name, model, optimizer, rank=0, size=1):
    """Train as the name of the scenario says; with an own draw of torch's generator in each process."""
    torch.manual_seed(rank)
    turns = 2 if name in ("accumulated", "unsynchronised") else 1
    for i in STEPS:
        optimizer.zero_grad()

        def backward(i=i):
            for turn in range(turns):
                if name == "unsynchronised" and hasattr(model, "set_requires_gradient_sync"):
                    model.set_requires_gradient_sync(turn == turns - 1)
                value = processes.loss(model, i, turns * rank + turn, turns * size) / turns
                value.backward()
            return value.detach()

        if name == "auto":
            optimizer.step(backward)
            continue
        backward()
        if name == "clipped":  # far below the norm, and other than it in every step
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e-3 * (i + 1))
        optimizer.step()


def sharded(world, name, wrap=None):
    """Run a scenario under FSDP2; return the weights, the plan, and what was left out."""
    build, kwargs = SCENARIOS[name]
    wrap = wrap or (lambda model: processes.shard(model, world.mesh))
    model = build()
    if name != "before":
        wrap(model)
    optimizer = calibrated(model, kwargs, world.statistics)
    if name == "before":
        wrap(model)
    fit(name, model, optimizer, world.rank, world.size)
    return processes.snapshot(model), optimizer.plan, optimizer.diagnostics()


def refused(world):
    """Shapes cannot change; what can be done instead is said, before anything has changed."""
    model = zero64()
    processes.shard(model, world.mesh)
    before = processes.snapshot(model)
    with pytest.raises(ValueError, match=r"resize must be False where parameters are sharded.*calibrate first"):
        published(model, **{**SMALL, "resize": True})
    late = zero64()
    optimizer = published(late, **{**SMALL, "resize": True})
    processes.shard(late, world.mesh)
    processes.loss(late, 0, world.rank, world.size).backward()
    with pytest.raises(ValueError, match="resize must be False where parameters are sharded"):
        optimizer.step()
    models.assert_same(before, processes.snapshot(model))
    models.assert_same(before, processes.snapshot(late))


def planned(model, *share):
    """Return the ranks that a calibration would give to a model."""
    plan = GoRAInit.plan_only(
        model, lambda i: processes.loss(model, i, *share), range(3), allocation="exact", rank=3, min_rank=1, max_rank=5
    )
    return plan.ranks


def last(p):
    """Split the last dimension where FSDP2 can: then it is lora_B that is split along its rank."""
    return Shard(p.ndim - 1 if p.shape[-1] % 2 == 0 else 0)


def job(worlds, everybody):
    two, four = worlds[2], worlds[4]
    found = {(name, size): sharded(worlds[size], name) for name, size in RUNS}
    for name in ("gora", "whitened"):
        found["columns", name] = sharded(
            two, name, lambda m: processes.shard(m, two.mesh, shard_placement_fn=last)
        )  # fmt: skip
        found["hybrid", name] = sharded(four, name, lambda m: processes.shard(m, everybody))
        found["replicated", name] = sharded(two, name, lambda m: replicate(m, mesh=two.mesh))
    model = zero64()
    processes.shard(model, four.mesh)
    found["planned"] = planned(model, four.rank, four.size)
    refused(four)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.run(job, tmp_path_factory.mktemp("gora") / "run")


@pytest.fixture(scope="module")
def alone():
    """One process with all the rows, for each scenario when it is first asked for."""
    cache = {}

    def get(name):
        if name not in cache:
            build, kwargs = SCENARIOS[name]
            model = build()
            if name == "before":  # the batch before the parameters were replaced does not count
                cache[name] = one_late(model, kwargs)
            else:
                optimizer = calibrated(model, kwargs)
                fit(name, model, optimizer)
                cache[name] = models.snapshot(model), optimizer.plan
        return cache[name]

    return get


def one_late(model, kwargs):
    optimizer = calibrated(model, kwargs)
    processes.fit(model, optimizer, STEPS[1:])
    return models.snapshot(model), optimizer.plan


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_sharded_processes_are_one(found, alone, name, size):
    for process in found[:size]:
        assert_agrees(process[name, size], alone(name))


@pytest.mark.parametrize("name", ["gora", "whitened"])
@pytest.mark.parametrize("way", ["columns", "hybrid", "replicated"])
def test_other_ways_of_sharding(found, alone, way, name):
    for process in found:
        assert_agrees(process[way, name], alone(name))


def assert_agrees(run, expected):
    (got, plan, told), (want, want_plan) = run, expected
    assert told["ready"] and told["dropped"] == 0 and plan.ranks == want_plan.ranks
    assert plan.importances == pytest.approx(want_plan.importances, rel=1e-8)
    # sums in another order, through the inverses of A Aᵀ and decompositions
    models.assert_near(got, want, rtol=1e-7, atol=1e-9)


def test_scenarios_differ(alone):
    """Control: clipping, another start and a batch that does not count are seen in the result."""
    plain = alone("gora")[0]
    for name in ("before", "auto", "grad_b", "whitened", "whitened-random"):
        assert models.differences(plain, alone(name)[0]) != [], name
    assert len(set(alone("gora")[1].ranks.values())) > 1  # and ranks differ, so that there are directions to mask
    clipped, importances = (list(alone(name)[1].importances.values()) for name in ("clipped", "gora"))
    assert all(small < 0.1 * big for small, big in zip(clipped, importances, strict=True))


def test_processes_agree_to_the_bit(found):
    processes.assert_agree_to_the_bit(found, SCENARIOS)


def test_plan_only(found):
    model = zero64()
    assert all(process["planned"] == planned(model) for process in found)
