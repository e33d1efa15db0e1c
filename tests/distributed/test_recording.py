"""Records of sharded runs: every process reads, since that gathers the parameters, and one of them writes."""

from pathlib import Path

import processes
import pytest
import torch.distributed as dist
from processes import grit, odd64, plain
from transformers import TrainerState

from curvopt.analysis import Recorder
from curvopt.integrations.transformers import CurvatureCallback

SETTINGS = {"statistics": "activation", "outer_rank": 0}
STEPS = 4


def record(model, optimizer, folder, first, share=()):
    """Train some steps, recorded by the callback every second one and by hand; return which were said to be due."""
    state = TrainerState(is_world_process_zero=first)
    given = {"model": model, "optimizer": optimizer}
    callback = CurvatureCallback(path=folder / "callback.jsonl", every=2)
    callback.on_train_begin(None, state, None, **given)
    recorder = Recorder(folder / "hand.jsonl", 3, write=first)
    due = []
    for i in range(STEPS):
        processes.fit(model, optimizer, range(i, i + 1), *share)
        state.global_step = i + 1
        callback.on_step_end(None, state, None, **given)
        due.append(recorder.record(optimizer, loss=i))
    callback.on_train_end(None, state, None, **given)
    return due


def job(worlds, everybody, folder):
    found = {}
    for size, world in worlds.items():
        own = Path(folder, f"{size} processes, {dist.get_rank()}")
        model, optimizer = plain(world, odd64, **SETTINGS)
        due = record(model, optimizer, own, world.rank == 0, (world.rank, world.size))
        found[size] = world.rank, due, own
        dist.barrier(world.group)  # had one process read alone, its gathering would meet this of the others
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    return processes.run(job, folder / "run", str(folder))


@pytest.mark.parametrize("size", processes.SIZES)
def test_all_read_and_the_first_writes(size, found):
    for rank, due, own in (process[size] for process in found):
        assert due == [False, False, True, False]
        assert own.exists() == (rank == 0)
    files = sorted(file.name for _, _, own in (process[size] for process in found) for file in own.glob("*"))
    assert files == sorted(["callback.jsonl", "hand.jsonl"] * (4 // size))


@pytest.mark.parametrize("size", processes.SIZES)
def test_the_record_is_that_of_one_process(size, found, tmp_path):
    model = odd64()
    assert record(model, grit(model, **SETTINGS), tmp_path, True) == [False, False, True, False]
    for name, at in (("callback.jsonl", [2, 4]), ("hand.jsonl", [3])):
        alone = Recorder.read(tmp_path / name)
        sharded = Recorder.read(found[0][size][2] / name)
        assert [r["step"] for r in alone] == [r["step"] for r in sharded] == at
        for one, many in zip(alone, sharded, strict=True):
            assert many["drift"] == pytest.approx(one["drift"], rel=1e-5) and many["drift"]["pi_proj"] is not None
            assert one["pairs"].keys() == many["pairs"].keys()
            assert any(facts["energy"] for facts in one["pairs"].values())
            for pair, facts in one["pairs"].items():
                for key in ("energy", "singular", "norm"):
                    value = facts[key]  # the layer that nothing calls has no energy
                    expected = None if value is None else pytest.approx(value, rel=1e-5, abs=1e-9)
                    assert many["pairs"][pair][key] == expected
