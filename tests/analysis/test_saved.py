"""``python -m curvopt.doctor``: what it says of saved runs, its exit codes, and its one-line complaints."""

import json
import math
import subprocess
import sys

import models
import pytest
import torch
from grit_kit import rank_side
from safetensors.torch import load_file, save_file

from curvopt import GoRAInit, GritKFAC, MatryoshkaScaledAdam
from curvopt.analysis import inspect_saved, spectra
from curvopt.doctor import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT, on saving


def trained(steps=3, model=None, named=False, **settings):
    model = models.llama() if model is None else model
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad] if named else model
    optimizer = rank_side(params, **{"lr": 1e-2, "model": model if named else None, **settings})
    models.fit(model, optimizer, steps)
    return model, optimizer


@pytest.fixture
def folder(tmp_path):
    """A trainer's checkpoint folder: adapter and optimizer."""
    model, optimizer = trained()
    model.save_pretrained(tmp_path / "run")
    torch.save(optimizer.state_dict(), tmp_path / "run" / "optimizer.pt")
    return tmp_path / "run", model, optimizer


def change(folder, alter):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    alter(tensors)
    save_file(tensors, file)


# ------------------------------------------------------------------------------------------------- adapters


def test_a_healthy_folder(folder, capsys):
    path, model, _ = folder
    assert main([str(path)]) == 0
    out, err = capsys.readouterr()
    assert "healthy" in out and "steps 3" in out and not err
    report = inspect_saved(path)
    assert report.findings == []
    # the file says what the live model says; PEFT's names inside the base model
    live = {s.name.removeprefix("base_model.model."): s for s in spectra(model)}
    saved = {name: p for name, p in report.pairs.items() if "norm" in p}
    assert saved.keys() == live.keys()
    for name, s in live.items():
        assert saved[name]["norm"] == pytest.approx(math.sqrt(sum(x * x for x in s.singular)), rel=1e-6)
        assert saved[name]["update_rank"] == pytest.approx(s.update_rank, rel=1e-6)
    assert report.facts["skipped_updates"] == 0


def test_json_is_the_whole_report(folder, capsys):
    assert main([str(folder[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"].keys() == inspect_saved(folder[0]).pairs.keys()


def test_masked_directions_are_seen_in_the_file(tmp_path):
    model, optimizer = trained(5, reproject_every=1, rank_threshold=0.5, min_rank=1)
    model.save_pretrained(tmp_path)
    ranks = {name.removeprefix("base_model.model."): k for name, k in optimizer.ranks().items()}
    assert {name: p["rank"] for name, p in inspect_saved(tmp_path).pairs.items()} == ranks
    assert min(ranks.values()) < 4


def test_an_untrained_adapter_needs_attention(tmp_path, capsys):
    models.llama().save_pretrained(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert "zero update" in capsys.readouterr().out


def test_a_damaged_adapter(folder):
    path = folder[0]
    change(path, lambda t: t.pop(next(n for n in t if "lora_B" in n)))
    change(path, lambda t: next(v for n, v in t.items() if "layers.1" in n).fill_(math.nan))
    report = inspect_saved(path)
    assert report.kinds() == {"unpaired layers", "non-finite parameters"} and not report.healthy


def test_scaling_follows_alpha_patterns_and_rslora(tmp_path):
    plain, stabilised = {}, {}
    for name, own in (("plain", {"alpha_pattern": {"q_proj": 40}}), ("rs", {"use_rslora": True})):
        model = models.llama(start="random", **own)
        model.save_pretrained(tmp_path / name)
        live = {s.name.removeprefix("base_model.model."): s.singular for s in spectra(model)}
        for pair, facts in inspect_saved(tmp_path / name).pairs.items():
            assert facts["norm"] == pytest.approx(math.sqrt(sum(x * x for x in live[pair])), rel=1e-6)
        (plain if name == "plain" else stabilised).update(live)
    q = next(n for n in plain if "q_proj" in n)
    assert plain[q][0] == pytest.approx(stabilised[q][0] * (40 / 4) / (8 / math.sqrt(4)), rel=1e-6)


# ------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("key", [None, "optimizer", "nested"])
def test_an_optimizer_with_names_is_read_by_pair(tmp_path, key):
    _, optimizer = trained(named=True)
    state = optimizer.state_dict()
    held = {None: state, "optimizer": {"optimizer": state, "step": 3}, "nested": {"a": {"b": state}}}[key]
    torch.save(held, tmp_path / "run.pt")
    report = inspect_saved(tmp_path / "run.pt")
    assert report.healthy and report.facts["steps"] == 3
    known = optimizer.diagnostics()["pairs"]
    assert {f"base_model.model.{name}" for name in report.pairs} == known.keys()
    for name, facts in report.pairs.items():
        live = known[f"base_model.model.{name}"]
        assert facts["effective_rank"] == pytest.approx(live["effective_rank"], rel=1e-6)
        assert facts["A"] == live["A"] and facts["B"] == live["B"] and facts["rank"] == live["rank"]


def test_an_optimizer_without_names_is_read_by_parameter(tmp_path):
    _, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    report = inspect_saved(tmp_path / "run.pt")
    assert report.healthy and len(report.pairs) == 2 * len(optimizer.pairs)
    assert all(name.startswith("parameter.") for name in report.pairs)


@pytest.mark.parametrize("named", [True, False])
def test_the_state_of_the_default_has_outer_factors(tmp_path, named, capsys):
    model = models.llama()
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad] if named else model
    optimizer = GritKFAC(params, lr=1e-2)
    models.fit(model, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    report = inspect_saved(tmp_path / "run.pt")
    assert report.findings == [] and report.facts["steps"] == 3
    known = optimizer.diagnostics()["pairs"].values()
    shares = [pair["outer"][side] for pair in known for side in "AB"]
    assert [share for pair in report.pairs.values() for share in pair["outer"].values()] == shares and min(shares) > 0
    assert {(pair["rank"], pair["full_rank"]) for pair in report.pairs.values()} == {(4, 4)}
    assert not any("A" in pair or "effective_rank" in pair for pair in report.pairs.values())  # on the rank side
    assert main([str(tmp_path / "run.pt")]) == 0
    assert "outer share" in capsys.readouterr().out


def test_both_kinds_of_factors_are_read(tmp_path):
    model = models.llama()
    optimizer = GritKFAC(((n, p) for n, p in model.named_parameters() if p.requires_grad), statistics="gradient")
    models.fit(model, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    known = optimizer.diagnostics()["pairs"]
    for name, pair in inspect_saved(tmp_path / "run.pt").pairs.items():
        live = known[f"base_model.model.{name}"]
        assert {key: pair[key] for key in ("outer", "A", "B", "rows")} == {
            key: live[key] for key in ("outer", "A", "B", "rows")
        }


@pytest.mark.parametrize(
    ("build", "steps", "reason"),
    [
        (lambda model: GritKFAC(model, outer_rank=0), 2, "its settings ask for none: outer_rank=0"),
        (GritKFAC, 0, "it has taken no step"),
        (lambda model: GoRAInit(model, calibration_steps=4), 2, "a GoRAInit that has not handed over"),
        (MatryoshkaScaledAdam, 2, "it is not the state of a GritKFAC"),
    ],
)
def test_why_a_state_has_no_factors(tmp_path, build, steps, reason):
    model = models.llama()
    optimizer = build(model)
    models.fit(model, optimizer, steps)
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    (finding,) = inspect_saved(tmp_path / "run.pt").findings
    assert finding.kind == "no curvature" and reason in finding.todo


@pytest.mark.parametrize("key", [None, "optimizer"])
def test_the_state_of_what_gora_has_handed_over_to(tmp_path, key):
    model = models.llama()
    optimizer = GoRAInit(model, calibration_steps=2, then=lambda model: GritKFAC(model, lr=1e-2))
    models.fit(model, optimizer, 5)
    for name, state in (("outside", optimizer.state_dict()), ("inside", optimizer.delegate.state_dict())):
        torch.save(state if key is None else {key: state}, tmp_path / f"{name}.pt")
    outside, inside = (inspect_saved(tmp_path / f"{name}.pt") for name in ("outside", "inside"))
    assert outside.facts == inside.facts and outside.pairs == inside.pairs and outside.findings == inside.findings
    assert outside.facts["steps"] == 3 and outside.facts["state_bytes"] > 0 and len(outside.pairs) == 28


def test_findings_of_a_saved_optimizer(tmp_path):
    model, optimizer = trained(4, update="adam", damping=1e3, rank_threshold=0.9, reproject_every=0)
    optimizer.zero_grad()
    (models.loss(model, 0) * math.inf).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    expected = {"scalar preconditioner", "settings: threshold without reprojection", "skipped updates"}
    assert inspect_saved(tmp_path / "run.pt").kinds() == expected


def test_silent_hooks_show_in_the_state(tmp_path):
    model = models.mlp()
    model.first.bypass = True
    optimizer = rank_side(model, lr=1e-2)
    models.fit(model, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    (finding,) = [f for f in inspect_saved(tmp_path / "run.pt").findings if f.kind == "silent hooks"]
    assert len(finding.pairs) == 2


def test_another_optimizers_state(tmp_path):
    model = models.llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    models.fit(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    report = inspect_saved(tmp_path / "run.pt")
    assert report.kinds() == {"no curvature"} and report.healthy and report.facts["steps"] == 2


# ------------------------------------------------------------------------------------------------- complaints


def spoil(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "adapter_config.json").write_text("{no json")
    save_file({"x": torch.ones(2)}, tmp_path / "config" / "adapter_model.safetensors")
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    torch.save(models.mlp(), tmp_path / "module.pt")


COMPLAINTS = {
    "none": "no such file",
    "empty": "adapter_config.json",
    "half": "adapter_model.safetensors",
    "config": "no JSON",
    "text.pt": "cannot be read",
    "other.pt": "neither",
    "module.pt": "weights_only",
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_bad_input_is_one_line_and_exit_2(name, tmp_path, capsys):
    spoil(tmp_path)
    assert main([str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("curvopt.doctor: ")
    assert COMPLAINTS[name] in err and name in err


def test_in_a_process_of_its_own(folder):
    done = subprocess.run(
        [sys.executable, "-m", "curvopt.doctor", str(folder[0])], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "") and "healthy" in done.stdout
