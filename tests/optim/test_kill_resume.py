"""A run killed after any step goes on as if nothing had happened, for every optimizer, and for real with SIGKILL."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import loopkit
import models
import pytest
import torch
from gora_models import published

from curvopt import GritKFAC
from curvopt.lora import resize_adapter

optimizers = pytest.mark.parametrize("make", loopkit.OPTIMIZERS, ids=lambda make: make.__name__)
DTYPES = [torch.float32, torch.bfloat16]
WIDE = {"width": 12, "r": 6}
MOVING = {"lr": 1e-2, "inverse_every": 3, "factor_every": 2, "reproject_every": 2, "rank_threshold": 0.8, "min_rank": 1}
STEPS = 9


def started(make, dtype, seed=0):
    model = models.mlp(dtype, seed=seed, **WIDE)
    return model, make(model)


def full(model, optimizer):
    """Everything there is, also of the optimizer that GoRAInit has handed over to."""
    return loopkit.Run(model, optimizer, lambda *_: None).snapshot()


def carried(make, model, optimizer, dtype):
    """A new model and optimizer from what a file kept; the optimizer first, since GoRAInit changes ranks."""
    saved = models.round_trip([model.state_dict(), optimizer.state_dict()])
    fresh, other = started(make, dtype, seed=99)
    other.load_state_dict(saved[1])
    fresh.load_state_dict(saved[0])
    return fresh, other


@optimizers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_killed_after_any_step(make, dtype):
    """In the calibration, at the handover, between and right after reprojections, with directions masked."""
    model, optimizer = started(make, dtype)
    runs = []
    for i in range(STEPS):
        models.fit(model, optimizer, 1, i)
        for fresh, other in runs:
            models.fit(fresh, other, 1, i)
        runs.append(carried(make, model, optimizer, dtype))
    end = full(model, optimizer)
    for fresh, other in runs:
        models.assert_same(full(fresh, other), end)
    assert models.differences(models.snapshot(models.mlp(dtype, **WIDE)), models.snapshot(model)) != []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_killed_in_a_calibration_that_changes_ranks(dtype):
    """GoRAInit with real resizing, then GritKFAC with masks: a new process has only the first shapes."""

    def make(model):
        loopkit.freeze_idle(model)
        return published(
            model, rank=3, min_rank=1, max_rank=6, calibration_steps=3, reset=True,
            then=lambda m: GritKFAC(m, **MOVING), generator=torch.Generator().manual_seed(5),
        )  # fmt: skip

    test_killed_after_any_step(make, dtype)


def test_killed_between_the_backward_passes_of_an_accumulation():
    """What is not in a checkpoint is the half-seen batch: gradients and sums of a step that never came."""
    make = loopkit.OPTIMIZERS[0]
    model, optimizer = started(make, torch.float64)
    models.fit(model, optimizer, 4)
    twin, same = carried(make, model, optimizer, torch.float64)
    models.loss(model, 70).backward()
    fresh, other = carried(make, model, optimizer, torch.float64)
    for m, o in ((twin, same), (fresh, other)):
        models.fit(m, o, 4, 4)
    models.assert_same(full(twin, same), full(fresh, other))


# ---------------------------------------------------------------------------------------------- for real

CHILD = """
    import sys, time
    import loopkit, models, torch
    index, folder, until = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    make = loopkit.OPTIMIZERS[index]
    model = models.mlp(torch.float32, width=12, r=6)
    optimizer = make(model)
    begin = 0
    try:
        saved = torch.load(folder + "/checkpoint", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begin = saved["step"]
    except FileNotFoundError:
        pass
    import os
    for i in range(begin, 7):
        models.fit(model, optimizer, 1, i)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": i + 1}
        torch.save(state, folder + "/next")
        os.replace(folder + "/next", folder + "/checkpoint")
        if i + 1 == until:
            print("saved", flush=True)
            time.sleep(600)
    print("done", flush=True)
"""


def child(index: int, folder: Path, until: int) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(index), str(folder), str(until)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_a_killed_process(tmp_path):
    """SIGKILL after a checkpoint; a new process goes on from the file."""
    first = child(0, tmp_path, 3)
    try:
        assert first.stdout.readline().strip() == "saved"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    second = child(0, tmp_path, -1)
    out, _ = second.communicate(timeout=120)
    assert out.strip() == "done" and second.returncode == 0
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    model, optimizer = started(loopkit.OPTIMIZERS[0], torch.float32)
    models.fit(model, optimizer, 7)
    mine = optimizer.state_dict()
    assert {int(s["cadence"][0]) for s in saved["optimizer"]["state"].values() if "cadence" in s} == {7}
    for index, state in mine["state"].items():
        assert all(torch.equal(value, saved["optimizer"]["state"][index][key]) for key, value in state.items())
    assert all(torch.equal(p, saved["model"][name]) for name, p in model.state_dict().items())


# ---------------------------------------------------------------------------------------------- compacted, and older


def compacted():
    make = loopkit.Make(GritKFAC, MOVING)
    model, optimizer = started(make, torch.float64)
    models.fit(model, optimizer, 8)
    ranks = optimizer.compact()
    assert min(ranks.values()) < 5
    return make, model, optimizer, ranks


def test_a_compacted_checkpoint_loads_after_reranking():
    make, model, optimizer, ranks = compacted()
    fresh = models.mlp(torch.float64, seed=99, **WIDE)
    resize_adapter(fresh, ranks)
    fresh.load_state_dict(models.round_trip(model.state_dict()))
    other = make(fresh)
    other.load_state_dict(models.round_trip(optimizer.state_dict()))
    models.fit(model, optimizer, 5, 8)
    models.fit(fresh, other, 5, 8)
    models.assert_same(models.snapshot(fresh, other), models.snapshot(model, optimizer))


def test_a_compacted_checkpoint_in_a_model_of_first_ranks_fails_with_one_clear_line():
    make, _, optimizer, _ = compacted()
    fresh, other = started(make, torch.float64)
    models.fit(fresh, other, 2)
    before = full(fresh, other)
    with pytest.raises(ValueError, match=r"parameter \d+ has shape .* its saved state .*resize_adapter") as error:
        other.load_state_dict(models.round_trip(optimizer.state_dict()))
    assert "\n" not in str(error.value)
    models.assert_same(full(fresh, other), before)


@optimizers
def test_a_file_without_any_one_key_still_loads(make):
    """What a later version adds, an older file lacks: every key of state and group but torch's own, one at a time."""
    model, optimizer = started(make, torch.float64)
    models.fit(model, optimizer, 5)
    saved = models.round_trip(optimizer.state_dict())
    keys = {key for state in saved["state"].values() for key in state} - {"step", "exp_avg", "exp_avg_sq"}
    groups = set(saved["param_groups"][0]) - {"params"}
    for kind, names in (("state", keys), ("param_groups", groups)):
        for name in sorted(names):
            old = copy.deepcopy(saved)
            for part in old["state"].values() if kind == "state" else old["param_groups"]:
                part.pop(name, None)
            fresh, other = started(make, torch.float64)
            other.load_state_dict(old)
            fresh.load_state_dict(model.state_dict())
            models.fit(fresh, other, 2, 5)
            assert all(p.isfinite().all() for p in fresh.parameters()), name
