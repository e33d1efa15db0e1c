"""Sums over processes, and DDP on two and four of them against one process with all the rows."""

import contextlib
from functools import partial

import models
import processes
import pytest
import torch
import torch.distributed as dist
from gora_models import published

from curvopt import GritKFAC, MatryoshkaScaledAdam
from curvopt.distributed import all_reduce_grams, all_reduce_sums, local, world_size

STEPS = range(10)
ROUNDING = 1e-4
ALL = {"factor_every": 1, "inverse_every": 3, "reproject_every": 4, "rank_threshold": 0.9, "min_rank": 1,
       "weight_decay": 0.1}  # fmt: skip
UNEVEN = {2: (1, 7), 4: (1, 2, 2, 3)}


def mlp32():
    return models.mlp(torch.float32)


def llama32():
    return models.llama(start="random")


def grit(model, group=None, **kwargs):
    return GritKFAC(model, lr=3e-3, process_group=group, **kwargs)


def nested(model, group=None):
    return MatryoshkaScaledAdam(model, lr=3e-3, nesting="dylora")


def calibrated(model, group=None):
    """Calibrate on four batches, at other ranks than were built, and go on with GritKFAC."""
    return published(
        model, rank=2, min_rank=1, max_rank=3, calibration_steps=4, resize=False, process_group=group,
        then=lambda m: grit(m, group),
    )  # fmt: skip


def zero64():
    model = models.mlp(start="zero")
    model.idle.requires_grad_(False)  # GoRAInit insists on a gradient
    return model


# name → (model, optimizer); eps: where a gradient is rounding alone, Adam makes a step of lr of it
SCENARIOS = {
    **{f"{rule}-32": (mlp32, partial(grit, update=rule, inverse_every=3))
       for rule in ("polar", "eigen", "adam", "whiten", "momentum")},
    "llama-32": (llama32, partial(grit, update="whiten", eps=1e-4, inverse_every=3)),
    "all-64": (models.mlp, partial(grit, **ALL)),
    "gradient-64": (models.mlp, partial(grit, statistics="gradient", **ALL)),
    "weight-64": (models.mlp, partial(grit, statistics="weight", update="momentum", **ALL)),
    "paper-64": (models.mlp, partial(grit, sides="paper", update="adam", **{**ALL, "reprojection": "paper"})),
    "calibrated-64": (zero64, calibrated),
    "nested-64": (zero64, nested),
}  # fmt: skip


def train(world, build, make, cuts=None, turns=1, group=None):
    """Train under DDP; with ``turns`` the rows of a process come in so many backward passes, one synchronised."""
    model = processes.ddp(build(), world)
    optimizer = make(model, group=group or world.group)
    for i in STEPS:
        optimizer.zero_grad()
        for turn in range(turns):
            share = (world.rank, world.size, cuts) if turns == 1 else (world.rank * turns + turn, world.size * turns)
            with contextlib.nullcontext() if turn == turns - 1 else model.no_sync():
                (processes.loss(model, i, *share) / turns).backward()
        optimizer.step()
    return summary(model, optimizer)


def summary(model, optimizer):
    """Return parameters and state, and ranks, by names as without DDP."""
    ranks = optimizer.ranks() if hasattr(optimizer, "ranks") else {}
    return processes.snapshot(model, optimizer), {name.removeprefix("module."): k for name, k in ranks.items()}


def broken_step(world):
    """The loss of one process is NaN, once."""
    model = processes.ddp(models.mlp(), world)
    optimizer = GritKFAC(model, lr=3e-3, process_group=world.group, **ALL)
    processes.fit(model, optimizer, range(2), world.rank, world.size)
    before = processes.snapshot(model, optimizer)
    optimizer.zero_grad()
    (processes.loss(model, 2, world.rank, world.size) * (torch.nan if world.rank == 1 else 1)).backward()
    optimizer.step()
    after, skipped = processes.snapshot(model, optimizer), optimizer.diagnostics()["skipped_updates"]
    processes.fit(model, optimizer, range(3, 5), world.rank, world.size)
    return before, after, skipped, processes.snapshot(model, optimizer)


def by_adam(model):
    return MatryoshkaScaledAdam(model, lr=3e-3, nesting="stratified", full_share=0.5, warmup_steps=0, reorder_every=3)


def by_grit(model):
    return GritKFAC(model, lr=3e-3, nested_ranks=(1, 2), full_share=0.5, mask_warmup=0, reproject_every=3)


def strata(world, make):
    """Train with stratified masks; return the state and, by step, the ranks of this process's samples."""
    model = processes.ddp(models.mlp(), world)
    optimizer = make(model)
    ranks = []
    for i in STEPS:
        optimizer.zero_grad()
        model.module.first.watch = []
        processes.loss(model, i, world.rank, world.size).backward()
        used = model.module.first.watch[0].detach().ne(0).any(1)  # (samples, r)
        ranks.append([int(row.nonzero().max()) + 1 for row in used])
        optimizer.step()
    return processes.snapshot(model, optimizer), ranks


def bytes_sent(world, patch):
    """Return what each step sent and what the optimizer says a step sends."""
    model = processes.ddp(models.llama(start="random"), world)
    optimizer = GritKFAC(model, lr=3e-3, statistics="activation", process_group=world.group, factor_every=2)
    return processes.bytes_by_step(model, optimizer, world, patch), optimizer.diagnostics()["bytes_sent"]


def bystanders(world):
    """Only the first process runs the model, the others have zeros; return rows and factors by side."""
    model = models.mlp()
    optimizer = GritKFAC(model, statistics="activation", factor_every=1, process_group=world.group)
    for i in range(3):
        model.zero_grad()  # which the optimizer does not see
        if world.rank == 0:
            models.loss(model, i).backward()
        for p in (p for p in model.parameters() if p.requires_grad):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.broadcast(p.grad, group=world.group, group_src=0)
        optimizer.step()
    return [[optimizer.state[s.param][key] for s in optimizer.sides] for key in ("rows", "factor")]


def sums(world):
    """Return what the collectives made of known numbers."""
    me = world.rank + 1
    tensors = [torch.full((2, 2), float(me)), torch.arange(3.0), torch.ones(2, dtype=torch.float64) * me]
    all_reduce_sums(tensors, world.group)
    grams = [torch.tensor([[1.0, 2.0], [2.0, 3.0]]) * me, torch.eye(3).expand(2, 3, 3) * me, torch.eye(2) * me]
    counts = all_reduce_grams(grams, world.group, torch.tensor([5.0, 2**24 + 1, 2**33 + 3.0], dtype=torch.float64))
    return tensors, grams, counts


def job(worlds, everybody):
    found = {"world": (world_size(), world_size(worlds[2].group))}
    mine = dist.new_subgroups(1)[0]
    with pytest.MonkeyPatch.context() as patch:
        for size, world in worlds.items():
            found["sums", size] = sums(world)
            for name, scenario in SCENARIOS.items():
                found[name, size] = train(world, *scenario)
            found["accumulated", size] = train(world, *SCENARIOS["all-64"], turns=2)
            found["uneven", size] = train(world, *SCENARIOS["all-64"], cuts=UNEVEN[size])
            found["apart", size] = train(world, *SCENARIOS["eigen-32"], group=mine)
            found["broken", size] = broken_step(world)
            for make in (by_adam, by_grit):
                found[make.__name__, size] = strata(world, make)
            found["bytes", size] = bytes_sent(world, patch)
            found["bystanders", size] = bystanders(world)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.run(job, tmp_path_factory.mktemp("ddp") / "run")


def alone(build, make, cuts=(8,)):
    """One process, whose loss is the mean of the losses of the shares, as DDP has it."""
    model = build()
    optimizer = make(model)
    for i in STEPS:
        optimizer.zero_grad()
        sum(processes.loss(model, i, j, len(cuts), cuts) / len(cuts) for j in range(len(cuts))).backward()
        optimizer.step()
    return summary(model, optimizer)


@pytest.fixture(scope="module")
def expected():
    return {name: alone(*scenario) for name, scenario in SCENARIOS.items()}


def parameters(snapshot):
    return {name: t for name, t in snapshot.items() if "/" not in name}


sizes = pytest.mark.parametrize("size", processes.SIZES)


@sizes
def test_sums_are_summed_by_device_and_dtype(found, size):
    total = size * (size + 1) / 2
    for process in found[:size]:
        (a, b, c), (one, two, three), counts = process["sums", size]
        assert torch.equal(a, torch.full((2, 2), total)) and torch.equal(b, size * torch.arange(3.0))
        assert torch.equal(c, total * torch.ones(2, dtype=torch.float64))
        assert torch.equal(one, total * torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
        assert torch.equal(two, total * torch.eye(3).expand(2, 3, 3)) and torch.equal(three, total * torch.eye(2))
        # whole numbers that float32 does not hold
        assert counts.tolist() == [size * 5, size * (2**24 + 1), size * (2**33 + 3)]
        assert process["world"] == (4, 2) and world_size() == 1
    plain = torch.ones(2)
    assert local(plain) is plain


@sizes
@pytest.mark.parametrize("name", [*SCENARIOS, "accumulated", "uneven", "broken"])
def test_processes_agree_to_the_bit(found, name, size):
    first, *others = (process[name, size] for process in found[:size])
    for other in others:
        models.assert_same(first[0], other[0])
        if name == "broken":
            models.assert_same(first[-1], other[-1])
        else:
            assert first[1] == other[1]


@sizes
@pytest.mark.parametrize("name", SCENARIOS)
def test_processes_are_one_with_all_rows(found, expected, name, size):
    (got, live), (want, ranks) = found[0][name, size], expected[name]
    assert got.keys() == want.keys()
    if name.endswith("-32"):
        # rounding of the averaged gradients in float32, through the roots of the outer factors: a thirtieth of a step
        models.assert_near(parameters(got), parameters(want), rtol=1e-6, atol=ROUNDING)
    else:  # float64: rounding in another order, grown over the steps by divisions by √v̂
        models.assert_near(got, want, rtol=1e-8, atol=1e-10)
    assert live == ranks


@sizes
@pytest.mark.parametrize("make", ["by_adam", "by_grit"])
def test_strata_are_spread_over_processes(found, make, size):
    """Parameters agree to the bit though masks differ; all samples together have the shares, 8/3, 4/3 and 4 of 8."""
    runs = [process[make, size] for process in found[:size]]
    for other in runs[1:]:
        models.assert_same(runs[0][0], other[0])
        assert other[1] != runs[0][1]
    for step in list(STEPS)[1:]:
        together = [k for _, ranks in runs for k in ranks[step]]
        assert len(together) == 8 and together.count(4) == 4
        assert 2 <= together.count(1) <= 3 and 1 <= together.count(2) <= 2


@sizes
def test_statistics_of_one_process_alone_are_not_enough(found, expected, size):
    runs = [parameters(process["apart", size][0]) for process in found[:size]]
    want = parameters(expected["eigen-32"][0])
    assert max((runs[0][name] - want[name]).abs().max() for name in want) > 10 * ROUNDING
    assert models.differences(runs[0], runs[1]) != []  # replicas drift apart


@sizes
def test_bystanders_take_what_others_have_seen_once(found, size):
    model = models.mlp()
    optimizer = GritKFAC(model, statistics="activation", factor_every=1)
    for i in range(3):
        optimizer.zero_grad()
        models.loss(model, i).backward()
        optimizer.step()
    seen = {p: state["rows"] for p, state in optimizer.state.items() if "rows" in state}
    for process in found[:size]:
        rows, factors = process["bystanders", size]
        for side, n, S in zip(optimizer.sides, rows, factors, strict=True):
            assert n == seen.get(side.param, 0)
            if n and side.name == "B":  # that of A has d, which counts as the gradient of a mean over processes
                torch.testing.assert_close(S, optimizer.state[side.param]["factor"], rtol=1e-8, atol=1e-10)


@sizes
def test_accumulation_without_synchronisation(found, expected, size):
    (got, live), (want, ranks) = found[0]["accumulated", size], expected["all-64"]
    models.assert_near(got, want, rtol=1e-8, atol=1e-10)
    assert live == ranks


@sizes
def test_uneven_shares_weigh_as_their_loss_does(found, expected, size):
    (got, live), (want, ranks) = found[0]["uneven", size], alone(*SCENARIOS["all-64"], cuts=UNEVEN[size])
    models.assert_near(got, want, rtol=1e-8, atol=1e-10)
    assert live == ranks
    # and that is another loss than the mean over all rows
    even = parameters(expected["all-64"][0])
    assert max((p - even[name]).abs().max() for name, p in parameters(got).items()) > 1e-4


@sizes
def test_a_nan_in_one_process_stops_all(found, size):
    for process in found[:size]:
        before, after, skipped, later = process["broken", size]
        models.assert_same(before, after, ignore=("skipped", "cadence"))
        assert skipped == 1
        assert all(t.isfinite().all() for t in later.values()) and models.differences(parameters(before), later) != []


@sizes
def test_bytes_sent(found, size):
    for process in found[:size]:
        counts, said = process["bytes", size]
        # 14 pairs of rank 4 in float32: the lower triangles of S_u and S_d, and the count of rows in two digits
        assert said == {"update": 0, "statistics": 14 * (2 * 10 + 2) * 4, "reprojection": 0}
        assert counts == [said["statistics"], 0, said["statistics"], 0]
