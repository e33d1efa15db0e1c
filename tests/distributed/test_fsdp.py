"""FSDP2 on two and four processes against one process without it: the same parameters, the same state."""

import models
import processes
import pytest
import torch.distributed as dist
from processes import ALL, made, odd32, odd64
from torch.distributed._composable.replicate_with_fsdp import replicate  # there is no public way to it yet
from torch.distributed.tensor import Shard

STEPS = range(10)


def llama32():
    return models.llama(r=6, start="random")


def mixed64():
    return models.mixed()


# name → (model, arguments of GritKFAC, whether the optimizer is made before sharding)
# eps of the Llama: where a gradient is rounding alone, Adam makes a step of lr of it
SCENARIOS = {
    **{f"{rule}-32": (odd32, {"update": rule, "inverse_every": 3}, False)
       for rule in ("polar", "eigen", "adam", "whiten", "momentum")},
    "llama-32": (llama32, {"update": "adam", "eps": 1e-4, "inverse_every": 3}, False),
    "llama-before-32": (llama32, {"update": "momentum", "eps": 1e-4, "inverse_every": 3}, True),
    **{f"{rule}-64": (odd64, {"update": rule, **ALL}, False)
       for rule in ("polar", "eigen", "adam", "whiten", "momentum")},
    "before-64": (odd64, ALL, True),
    "gradient-64": (odd64, {"statistics": "gradient", **ALL}, False),
    "weight-64": (odd64, {"statistics": "weight", "update": "adam", **ALL}, False),
    "paper-64": (odd64, {"sides": "paper", "update": "adam", **ALL, "reprojection": "paper"}, False),
    # masks are other ones in every process; the order of the directions is by weights, or by factors
    "nested-64": (odd64, {"nested_ranks": (1, 2), "full_share": 1.0, "reproject_every": 2}, False),
    "nested-factors-64": (
        odd64, {"nested_ranks": (1, 2), "full_share": 1.0, "reproject_every": 2, "statistics": "activation",
                "factor_every": 1}, True,
    ),
    "mixed-64": (mixed64, ALL, False),
    "mixed-weight-64": (mixed64, {"statistics": "weight", "update": "momentum", **ALL}, True),
}  # fmt: skip


def sharded(world, build, kwargs, before=False, wrap=None):
    """Train under FSDP2 and return what it came to, with the placements of the state."""
    wrap = wrap or (lambda model: processes.shard(model, world.mesh))
    model, optimizer = made(build, {**kwargs, "process_group": world.statistics}, before, wrap)
    processes.fit(model, optimizer, STEPS, world.rank, world.size)
    placed = {
        f"{name}/{key}": str(getattr(value, "placements", ""))
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }
    return processes.snapshot(model, optimizer), optimizer.ranks(), placed


def last(p):
    """Split the last dimension where FSDP2 can: then it is lora_B that is split along its rank."""
    return Shard(p.ndim - 1 if p.shape[-1] % 2 == 0 else 0)


def job(worlds, everybody):
    found = {(name, size): sharded(worlds[size], *SCENARIOS[name]) for size in processes.SIZES for name in SCENARIOS}
    two, four = worlds[2], worlds[4]
    name = "momentum-64"
    found["columns"] = sharded(
        two, *SCENARIOS[name], wrap=lambda m: processes.shard(m, two.mesh, shard_placement_fn=last)
    )
    found["hybrid"] = sharded(four, *SCENARIOS[name], wrap=lambda m: processes.shard(m, everybody))
    found["replicated"] = sharded(two, *SCENARIOS[name], wrap=lambda m: replicate(m, mesh=two.mesh))
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.run(job, tmp_path_factory.mktemp("fsdp") / "run")


@pytest.fixture(scope="module")
def alone():
    """One process with all the rows, for each scenario when it is first asked for."""
    cache = {}

    def get(name):
        if name not in cache:
            build, kwargs, _ = SCENARIOS[name]
            model, optimizer = made(build, kwargs, True, lambda model: model)
            processes.fit(model, optimizer, STEPS)
            cache[name] = models.snapshot(model, optimizer), optimizer.ranks()
        return cache[name]

    return get


sizes = pytest.mark.parametrize("size", processes.SIZES)


@sizes
@pytest.mark.parametrize("name", SCENARIOS)
def test_sharded_processes_are_one(found, alone, name, size):
    for process in found[:size]:
        assert_agrees(process[name, size], alone(name), exact=name.endswith("-64"))


@pytest.mark.parametrize("way", ["columns", "hybrid", "replicated"])
def test_other_ways_of_sharding(found, alone, way):
    for process in found:
        assert_agrees(process[way], alone("momentum-64"), True, "Replicate" if way == "replicated" else "Shard")


def assert_agrees(run, expected, exact, placement="Shard"):
    """Assert that a sharded run is the one of a single process, and that its moments are sharded."""
    (got, live, placed), (want, ranks) = run, expected
    assert got.keys() == want.keys() and live == ranks
    if exact:  # parameters and all state; rounding in another order, grown over the steps by divisions by √v̂
        models.assert_near(got, want, rtol=1e-8, atol=1e-10)
    else:
        params = [{k: v for k, v in snapshot.items() if "/" not in k} for snapshot in (got, want)]
        # rounding of sums over pieces in float32, through the roots of the outer factors: a hundredth of a step of 1e-2
        models.assert_near(*params, rtol=1e-6, atol=1e-4)
    moments = {name: at for name, at in placed.items() if "/exp_avg" in name or "/outer_basis" in name}
    assert moments and all(placement in at for at in moments.values())
    assert all(at == "" for name, at in placed.items() if name not in moments)


def test_processes_agree_to_the_bit(found):
    processes.assert_agree_to_the_bit(found, SCENARIOS)
