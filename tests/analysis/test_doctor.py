"""Every finding of the doctor provoked, and none of them in a healthy run."""

import copy
import json
import math
import types

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from curvopt import GoRAInit, GritKFAC, MatryoshkaScaledAdam
from curvopt.analysis import doctor
from curvopt.analysis.checks import check_curvature
from curvopt.analysis.doctor import state_bytes


def trained(steps=4, model=None, **settings):
    """A run of a few steps, and its optimizer."""
    model = models.llama() if model is None else model
    optimizer = GritKFAC(model, **{"lr": 1e-2, **settings})
    models.fit(model, optimizer, steps)
    return model, optimizer


def found(report, kind):
    """The one finding of a kind."""
    (finding,) = [f for f in report.findings if f.kind == kind]
    return finding


@pytest.fixture(scope="module")
def healthy():
    return trained()


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
    optimizer = GritKFAC(model.named_parameters() if named else model, lr=1e-2, **own)
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
    held = {id(v): v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values()}
    assert state_bytes(optimizer) <= sum(held.values())
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


# ------------------------------------------------------------------------------------------------- pairs


def test_no_pairs():
    model = nn.Linear(4, 4)
    optimizer = GritKFAC(model, require_pairs=False)
    finding = found(doctor(model, optimizer), "no pairs")
    assert finding.severity == "error" and "lora_A" in finding.what and "pass the model" in finding.todo


def test_unpaired_layers_and_why():
    torch.manual_seed(0)
    base = nn.ModuleDict({"fc": nn.Linear(8, 8), "attn": nn.MultiheadAttention(8, 2)})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["fc", "attn"]))
    finding = found(doctor(model, GritKFAC(model)), "unpaired layers")
    assert finding.severity == "warning" and "MultiheadAttention" in finding.what
    assert any("attn" in name for name in finding.pairs)


def test_plain_torch_optimizer():
    model = models.llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    models.fit(model, optimizer, 3)
    report = doctor(model, optimizer)
    assert report.kinds() == {"no curvature"} and report.healthy
    assert found(report, "no curvature").severity == "note"
    assert report.facts["steps"] == 3 and report.facts["norm"] > 0
    assert all(p["update_rank"] > 0 and p["energy"] is None for p in report.pairs.values())


# ------------------------------------------------------------------------------------------------- parameters


def replace(model):
    """Put a new parameter where an adapter's B was, as a cast or sharding does; return its name."""
    layer = model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    return next(name for name, p in model.named_parameters() if p is layer.weight)


@pytest.mark.parametrize("kind", ["adamw", "grit by names"])
def test_stale_parameters(kind):
    model = models.llama()
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own) if kind == "adamw" else GritKFAC(own, statistics="gradient")
    assert "stale parameters" not in doctor(model, optimizer).kinds()
    name = replace(model)
    finding = found(doctor(model, optimizer), "stale parameters")
    assert finding.severity == "error" and finding.pairs == (name,) and "1 of" in finding.what


def test_the_optimizer_of_a_copy():
    model = models.llama()
    optimizer = GritKFAC(model)
    finding = found(doctor(copy.deepcopy(model), optimizer), "stale parameters")
    assert finding.severity == "error" and len(finding.pairs) == 2 * len(optimizer.pairs)


def test_replaced_parameters_that_the_next_step_follows():
    model, optimizer = trained(2)
    name = replace(model)
    report = doctor(model, optimizer)
    assert report.kinds() == {"replaced parameters"} and report.healthy
    assert found(report, "replaced parameters").pairs == (name,)
    models.fit(model, optimizer, 2, begin=2)
    assert doctor(model, optimizer).findings == []


def test_forgotten_parameters():
    model = models.mlp()
    pairs = [p for layer in model.layers for p in (layer.lora_A.weight, layer.lora_B.weight)]
    optimizer = GritKFAC([{"params": pairs}], model=model)
    finding = found(doctor(model, optimizer), "forgotten parameters")
    assert finding.severity == "warning" and "head.weight" in finding.pairs


def test_non_finite_parameters(healthy):
    model, optimizer = copy.deepcopy(healthy)
    pair = optimizer.pairs[3]
    with torch.no_grad():
        pair.A[0, 0] = math.nan
    finding = found(doctor(model, optimizer), "non-finite parameters")
    assert finding.severity == "error" and finding.pairs == (pair.name,)


# ------------------------------------------------------------------------------------------------- curvature


def fuse(layer):
    """Give a PEFT layer a forward that calls none of its adapter modules."""

    def forward(self, x):
        A, B = self.lora_A["default"].weight, self.lora_B["default"].weight
        return self.base_layer(x) + self.scaling["default"] * F.linear(F.linear(x, A), B)

    layer.forward = types.MethodType(forward, layer)


@pytest.mark.filterwarnings("ignore:.*never seen")
def test_silent_hooks():
    model = models.llama()
    fuse(model.base_model.model.model.layers[0].self_attn.q_proj)
    report = doctor(*trained(3, model))
    assert report.kinds() == {"silent hooks"}
    finding = found(report, "silent hooks")
    assert finding.severity == "warning" and 'statistics="gradient"' in finding.todo
    assert [name.split(".")[-1] for name in finding.pairs] == ["q_proj"]


def test_removed_hooks(healthy):
    model, optimizer = trained(2)
    optimizer.remove_hooks()
    assert doctor(model, optimizer).kinds() == {"hooks removed"}


def test_gradient_statistics_where_there_is_no_module():
    model = models.mixed()
    optimizer = GritKFAC(model, lr=1e-2)
    models.fit(model, optimizer, 3)
    notes = [f for f in doctor(model, optimizer).findings if f.kind == "gradient statistics"]
    assert {f.severity for f in notes} == {"note"}
    assert any("embedding" in f.what for f in notes) and any("Dora" in f.what for f in notes)


def test_scalar_preconditioner():
    report = doctor(*trained(4, update="adam", damping=1e3))
    assert report.kinds() == {"scalar preconditioner"}
    finding = found(report, "scalar preconditioner")
    assert len(finding.pairs) == 2 * len(report.pairs) and "lower damping" in finding.todo


def test_rank_one():
    report = doctor(*trained(3, models.llama(r=1)))
    assert report.kinds() == {"rank one"} and report.healthy


def test_ill_conditioned_factors():
    """Two equal rows of A give equal columns of u: S_u is singular but for the damping."""
    for damping, expected in ((1e-9, {"ill-conditioned factors"}), (1e-2, set())):
        model = models.llama(torch.float64)
        A = model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight
        with torch.no_grad():
            A[1] = A[0]
        report = doctor(*trained(3, model, update="adam", damping=damping))
        assert report.kinds() == expected
        assert not expected or found(report, *expected).pairs[0].endswith("up_proj.A")


def test_broken_factors(healthy):
    model, optimizer = copy.deepcopy(healthy)
    pair = optimizer.pairs[0]
    optimizer.state[pair.A]["factor"].fill_(math.inf)
    finding = found(doctor(model, optimizer), "broken factors")
    assert finding.severity == "error" and finding.pairs == (f"{pair.name}.A",)


# ------------------------------------------------------------------------------------------------- steps


def test_skipped_updates():
    model, optimizer = trained(3)
    for severity in ("warning", "error"):
        for _ in range(1 if severity == "warning" else 4):
            optimizer.zero_grad()
            (models.loss(model, 0) * math.inf).backward()
            optimizer.step()
        finding = found(doctor(model, optimizer), "skipped updates")
        assert finding.severity == severity
    assert "5 of 8 steps" in finding.what


def test_pairs_without_gradients():
    model = models.mlp()
    optimizer = GritKFAC(model, lr=1e-2)
    models.fit(model, optimizer, 3)
    report = doctor(model, optimizer)
    assert report.kinds() == {"no gradient"} and found(report, "no gradient").pairs == ("idle",)
    for p in model.idle.parameters():
        p.requires_grad_(False)
    assert doctor(model, optimizer).findings == []  # frozen on purpose


def test_zero_update():
    model = models.llama()
    model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.requires_grad_(False)
    report = doctor(*trained(3, model))
    assert [name.split(".")[-1] for name in found(report, "zero update").pairs] == ["up_proj"]


# ------------------------------------------------------------------------------------------------- settings

FIGHTS = {
    "settings: threshold without reprojection": {"rank_threshold": 0.9},
    "settings: reprojection off": {"reproject_every": 2, "reprojection": None},
    "settings: no rank to give up": {"reproject_every": 2, "rank_threshold": 0.9, "min_rank": 4},
    "settings: matrices without news": {"factor_every": 10, "inverse_every": 2},
}


@pytest.mark.parametrize("kind", FIGHTS)
def test_settings_that_fight(kind):
    assert doctor(*trained(0, **FIGHTS[kind])).kinds() == {kind}


def test_clipping_before_nested_ranks():
    model = models.llama()
    optimizer = MatryoshkaScaledAdam(model, lr=1e-2)
    models.fit(model, optimizer, 2)
    kind = "settings: clipping before nested ranks"
    assert doctor(model, optimizer).kinds() == doctor(model, optimizer, max_grad_norm=0).kinds() == set()
    assert doctor(model, optimizer, max_grad_norm=1.0).kinds() == {kind}
    nn.utils.clip_grad_norm_(model.parameters(), 1e-1)  # the gradients of the last step, as a loop would leave them
    assert "norm 0.1" in found(doctor(model, optimizer), kind).what
    assert doctor(model, optimizer, max_grad_norm=0).findings == []


def test_clipping_is_fine_for_others(healthy):
    assert doctor(*healthy, max_grad_norm=1.0).findings == []


def test_gora_before_and_after_it_hands_over():
    model = models.llama()
    optimizer = GoRAInit(
        model, calibration_steps=2, rank=4, min_rank=2, max_rank=8, then=lambda m: GritKFAC(m, lr=1e-3)
    )
    models.fit(model, optimizer, 1)
    report = doctor(model, optimizer)
    assert report.kinds() == {"calibrating"} and report.healthy
    models.fit(model, optimizer, 4, begin=1)
    report = doctor(model, optimizer)
    assert report.subject.startswith("GritKFAC") and report.healthy


def test_gora_without_anything_to_hand_over_to():
    model = models.llama()
    optimizer = GoRAInit(model, calibration_steps=1, rank=4, min_rank=2, max_rank=8)
    models.fit(model, optimizer, 1)
    assert found(doctor(model, optimizer), "calibrated").severity == "error"


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
