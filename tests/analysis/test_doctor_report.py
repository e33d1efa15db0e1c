"""The doctor finds nothing in healthy runs; the facts and the text of its report; wrong input."""

import json

import models
import pytest
import torch
from doctor_kit import trained
from grit_kit import rank_side
from torch import nn

from curvopt.analysis import doctor
from curvopt.analysis.checks import check_curvature
from curvopt.analysis.doctor import state_bytes

# ------------------------------------------------------------------------------------------------- healthy runs


def test_a_healthy_run_has_no_finding(healthy):
    report = doctor(*healthy)
    assert report.findings == [] and report.healthy
    assert "healthy: nothing found" in str(report)


@pytest.mark.parametrize(
    "settings",
    [
        {"reproject_every": 2, "rank_threshold": 0.8, "min_rank": 1},
        {"statistics": "gradient"},
        {"statistics": "weight", "update": "adam"},
        {"update": "whiten"},
        {"warmup_steps": 3},
        {"statistics": "gradient", "params": "named"},
    ],
    ids=str,
)
def test_other_healthy_settings(settings):
    model, named = models.llama(), settings.get("params") == "named"
    own = {key: value for key, value in settings.items() if key != "params"}
    optimizer = rank_side(model.named_parameters() if named else model, lr=1e-2, **own)
    models.fit(model, optimizer, 4)
    assert doctor(model, optimizer).findings == []


def test_before_and_after_the_first_step():
    """A has no curvature before B has moved; that is how LoRA begins, and nothing to report."""
    for steps in (0, 1):
        assert doctor(*trained(steps)).findings == []


def test_facts_of_a_healthy_run(healthy):
    model, optimizer = healthy
    report = doctor(model, optimizer)
    known = optimizer.diagnostics()
    assert report.facts["steps"] == 4 and report.facts["pairs"] == len(optimizer.pairs) == len(report.pairs)
    assert report.facts["state_bytes"] == state_bytes(optimizer)
    for pair in optimizer.pairs:
        facts = report.pairs[pair.name]
        dense = pair.scaling * (pair.B @ pair.A).detach()
        assert facts["norm"] == pytest.approx(float(dense.norm()), rel=1e-5)  # fp32 parameters
        # both spectra come from the same factors; theirs in shares
        assert facts["effective_rank"] == pytest.approx(known["pairs"][pair.name]["effective_rank"], rel=1e-6)
        shares = [e / sum(facts["energy"]) for e in facts["energy"]]
        assert shares == pytest.approx(known["pairs"][pair.name]["energy"], rel=1e-6)
        assert facts["A"]["condition"] >= 1 and 0 <= facts["B"]["scalar_distance"] <= 1
    text = str(report)
    assert "q_proj" in text and "state bytes" in text
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["healthy"] is True and again["pairs"].keys() == report.pairs.keys()


def test_state_bytes_are_counted_once():
    _, optimizer = trained(2)
    storages = [v.untyped_storage() for s in optimizer.state.values() for v in s.values()]
    assert state_bytes(optimizer) == sum({s.data_ptr(): s.nbytes() for s in storages}.values())  # rows fill their stack
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(3))])
    for p in plain.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    plain.step()
    assert state_bytes(plain) == 2 * 13 * 4 + 2 * 4


def test_looking_changes_nothing(healthy):
    model, optimizer = healthy
    before = models.snapshot(model, optimizer)
    doctor(model, optimizer)
    models.assert_same(before, models.snapshot(model, optimizer))


# ------------------------------------------------------------------------------------------------- text and input


def test_text_names_the_advice_and_shortens_long_lists():
    facts = {
        f"layers.{i}.fc": {"rank": 4, "A": {"condition": 1e9, "scalar_distance": 1.0, "failed": False}}
        for i in range(9)
    }
    (finding,) = check_curvature(facts, 5)
    assert "and 6 more" in str(finding) and "→" in str(finding) and len(finding.pairs) == 9


def test_accelerates_wrapper_is_looked_through(healthy):
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare(healthy[1])
    assert doctor(healthy[0], wrapped).subject.startswith("GritKFAC")


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"model": 3}, TypeError, "model"),
        ({"optimizer": "adam"}, TypeError, "optimizer"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm"),
    ],
)
def test_bad_input(healthy, change, error, word):
    arguments = {"model": healthy[0], "optimizer": healthy[1], **change}
    with pytest.raises(error, match=word):
        doctor(arguments.pop("model"), arguments.pop("optimizer"), **arguments)
