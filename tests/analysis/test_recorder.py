"""The recorder: what is written is what is read, whatever happens to the process and the file in between."""

import json
import math
import sys
import types

import models
import pytest
import torch
from grit_kit import rank_side

from curvopt import GoRAInit
from curvopt.analysis import Recorder, drift, spectra


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "run.jsonl"


def run(path, steps, every=1, begin=1, **settings):
    model = models.llama()
    optimizer = rank_side(model, lr=1e-2, **settings)
    recorder = Recorder(path, every)
    for step in range(begin, begin + steps):
        (loss,) = models.fit(model, optimizer, 1, begin=step)
        recorder.record(optimizer, step, loss=loss)
    return model, optimizer


def test_a_record_is_what_the_analysis_says(path):
    _, optimizer = run(path, 3)
    last = Recorder.read(path)[-1]
    assert last["step"] == 3 and last["optimizer"] == "GritKFAC" and last["skipped_updates"] == 0
    now = drift(optimizer)
    # written with six digits
    for key in ("norm", "r_eff", "rho_align", "pi_proj"):
        assert last["drift"][key] == pytest.approx(getattr(now, key), rel=1e-5)
    for s in spectra(optimizer):
        entry = last["pairs"][s.name]
        assert entry["energy"] == pytest.approx(s.energy, rel=1e-5) and entry["rank"] == s.rank
        assert entry["singular"] == pytest.approx(s.singular, rel=1e-5, abs=1e-12)
        assert (entry["layer"], entry["projection"]) == (s.layer, s.projection)


def test_every_line_is_strict_json(path):
    run(path, 2)
    assert len(lines(path)) == 2
    for line in lines(path):
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_only_due_steps(path):
    run(path, 7, every=3)
    assert [r["step"] for r in Recorder.read(path)] == [3, 6]


def test_steps_are_the_optimizers_own_or_counted(path):
    model = models.mlp()
    optimizer = rank_side(model)
    models.fit(model, optimizer, 5)
    Recorder(path).record(optimizer)
    assert Recorder.read(path)[-1]["step"] == 5
    counting = Recorder(path)
    assert counting.record(None, loss=1.0)
    assert Recorder.read(path)[-1]["step"] == 6


def test_records_of_one_step_are_one(path):
    recorder = Recorder(path)
    recorder.record(None, 4, loss=2.0)
    recorder.record(None, 4, retain_loss=torch.tensor(1.5, requires_grad=True))
    (record,) = Recorder.read(path)
    assert (record["loss"], record["retain_loss"]) == (2.0, 1.5)


def test_a_resumed_run_replaces_what_it_repeats(path):
    """Ten steps, then again from the checkpoint at step 6: what was written after 6 did not happen."""
    for step in range(1, 11):
        Recorder(path).record(None, step, loss=float(step))
    for step in range(7, 9):
        Recorder(path).record(None, step, loss=-1.0)
    found = Recorder.read(path)
    assert [r["step"] for r in found] == list(range(1, 9))
    assert [r["loss"] for r in found[-3:]] == [6.0, -1.0, -1.0]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_that_was_cut_off(path, cut):
    recorder = Recorder(path)
    for step in (1, 2):
        recorder.record(None, step, loss=0.5)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = 2 if cut == 1 else 1  # of cut 1, only the end of the line is missing
    assert [r["step"] for r in Recorder.read(path)] == [1, 2][:kept]
    Recorder(path).record(None, 3, loss=0.25)
    assert [r["step"] for r in Recorder.read(path)] == [*[1, 2][:kept], 3]
    assert all(json.loads(line) for line in lines(path))


def test_a_long_line_that_was_cut_off(path):
    """Longer than the part of the file that is read at once."""
    Recorder(path).record(None, 1, loss=0.5)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "pairs": {"' + "x" * 200_000)
    recorder = Recorder(path)
    recorder.record(None)
    assert [r["step"] for r in Recorder.read(path)] == [1, 2] and len(lines(path)) == 2


def test_a_broken_line_in_the_middle_is_named(path):
    Recorder(path).record(None, 1)
    path.write_bytes(b"not json\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"run\.jsonl, line 1"):
        Recorder.read(path)


def test_not_finite_is_none(path):
    Recorder(path).record(None, 1, loss=math.nan, other=math.inf)
    assert Recorder.read(path)[0]["loss"] is None and Recorder.read(path)[0]["other"] is None


def test_a_plain_optimizer_with_its_model(path):
    model = models.llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    models.fit(model, optimizer, 2)
    Recorder(path, model=model).record(optimizer, 1)
    Recorder(path).record(optimizer, 2)
    first, second = Recorder.read(path)
    assert first["optimizer"] == "AdamW" and first["drift"]["norm"] > 0 and first["drift"]["pi_proj"] is None
    assert "pairs" not in second


def test_accelerates_wrapper_is_looked_through(path):
    accelerate = pytest.importorskip("accelerate")
    _, optimizer = run(path, 2)
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    Recorder(path).record(wrapped)
    bare, through = Recorder.read(path)[-1], json.loads(lines(path)[-2])
    assert bare["step"] == 2 and bare["pairs"].keys() == {pair.name for pair in optimizer.pairs}
    for key in ("optimizer", "skipped_updates", "drift", "pairs"):
        assert bare[key] == through[key]
    assert drift(wrapped) == drift(optimizer) and spectra(wrapped) == spectra(optimizer)


def handed_over(then, steps=4):
    """A GoRAInit that calibrated in two steps and has given the others to what ``then`` returns."""
    model = models.llama()
    optimizer = GoRAInit(model, calibration_steps=2, then=then)
    models.fit(model, optimizer, steps)
    return model, optimizer


def test_a_record_of_what_gora_has_handed_over_to(path):
    model, optimizer = handed_over(lambda model: rank_side(model, lr=1e-2))
    optimizer.zero_grad()
    (models.loss(model, 0) * math.inf).backward()
    optimizer.step()
    recorder = Recorder(path)
    recorder.record(optimizer, 1)
    recorder.record(optimizer.delegate, 2)
    outside, inside = Recorder.read(path)
    assert outside["optimizer"] == "GritKFAC" and outside["skipped_updates"] == 1
    assert all(pair["energy"] is not None for pair in outside["pairs"].values())
    for key in ("optimizer", "skipped_updates", "drift", "pairs"):
        assert outside[key] == inside[key]
    assert drift(optimizer) == drift(optimizer.delegate)


def test_gora_knows_the_pairs_of_a_plain_optimizer(path):
    model, optimizer = handed_over(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    Recorder(path).record(optimizer, 1)
    (record,) = Recorder.read(path)
    assert record["optimizer"] == "AdamW" and "skipped_updates" not in record
    assert record["drift"]["norm"] == pytest.approx(drift(model).norm, rel=1e-5) and len(record["pairs"]) == 14


def test_steps_are_counted_on_over_the_hand_over(path):
    """The delegate counts from 1: were that the step, reading the file would drop the calibration."""
    model = models.llama()
    optimizer = GoRAInit(model, calibration_steps=3, then=lambda model: rank_side(model, lr=1e-2))
    recorder = Recorder(path)
    for i in range(5):
        models.fit(model, optimizer, 1, begin=i)
        recorder.record(optimizer)
    assert [(r["step"], r["optimizer"]) for r in Recorder.read(path)] == [
        (1, "GoRAInit"), (2, "GoRAInit"), (3, "GritKFAC"), (4, "GritKFAC"), (5, "GritKFAC"),
    ]  # fmt: skip


def test_scalars_alone(path):
    model, optimizer = models.mlp(), None
    optimizer = rank_side(model)
    Recorder(path, spectra=False).record(optimizer, 1, loss=1.0)
    (record,) = Recorder.read(path)
    assert "pairs" not in record and record["skipped_updates"] == 0


def test_recording_changes_nothing(path):
    model, optimizer = run(path, 2)
    before = models.snapshot(model, optimizer)
    Recorder(path).record(optimizer, 3)
    models.assert_same(before, models.snapshot(model, optimizer))


def test_one_that_does_not_write(path):
    """It says what is due as the one that writes does, and leaves the file as it is."""
    model, optimizer = run(path, 3)
    before = path.read_bytes()
    path.write_bytes(before[:-5])  # as if the other process were writing
    silent = Recorder(path, 2, write=False)
    assert [silent.record(optimizer, step, loss=1.0) for step in (3, 4)] == [False, True]
    models.fit(model, optimizer, 1, begin=3)
    assert silent.record(optimizer) and path.read_bytes() == before[:-5]
    assert Recorder(path, 2).record(optimizer) and Recorder.read(path)[-1]["step"] == 4
    with pytest.raises(ValueError, match=r"step must be an integer where write=False .*, got None"):
        silent.record(None, loss=1.0)
    with pytest.raises(ValueError, match="write must be True or False, got 1"):
        Recorder(path, write=1)
    other = path.parent / "other" / "run.jsonl"
    with Recorder(other, tensorboard=path.parent / "events", write=False) as recorder:
        assert recorder.record(optimizer, 1)
    assert [file.name for file in path.parent.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_bad_every(path, every):
    with pytest.raises(ValueError, match="every"):
        Recorder(path, every)


@pytest.mark.parametrize(("name", "value"), [("pairs", 1.0), ("step_", None), ("loss", [1, 2]), ("loss", "low")])
def test_bad_scalars(path, name, value):
    with pytest.raises(ValueError, match=name):
        Recorder(path).record(None, 1, **{name: value})
    assert not path.exists()


# ------------------------------------------------------------------------------------------- TensorBoard


class Writer:
    """Stands for torch's SummaryWriter."""

    def __init__(self, folder):
        self.folder, self.told, self.closed = folder, {}, False

    def add_scalar(self, name, value, step):
        self.told[name, step] = value

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_gets_scalars_drift_and_ranks(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    model = models.llama()
    optimizer = rank_side(model, lr=1e-2)
    models.fit(model, optimizer, 2)
    with Recorder(path, tensorboard=tmp_path) as recorder:
        recorder.record(optimizer, 2, loss=0.5)
        told = recorder._writer.told
    assert recorder._writer.closed and recorder._writer.folder == str(tmp_path)
    assert told["loss", 2] == 0.5 and told["rank/q_proj", 2] == 4
    assert told["drift/norm", 2] == pytest.approx(drift(optimizer).norm)


def test_tensorboard_that_is_not_installed(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="tensorboard"):
        Recorder(path, tensorboard=tmp_path)


def test_torchs_own_writer(path, tmp_path):
    pytest.importorskip("tensorboard")
    with Recorder(path, tensorboard=tmp_path / "events") as recorder:
        recorder.record(None, 1, loss=0.5)
    assert list((tmp_path / "events").iterdir())
