"""The doctor's findings about curvature, steps and settings."""

import copy
import math
import types

import models
import pytest
import torch
from doctor_kit import found, trained
from gora_models import published
from grit_kit import rank_side
from torch import nn
from torch.nn import functional as F

from curvopt import MatryoshkaScaledAdam
from curvopt.analysis import doctor

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


def test_removed_hooks():
    model, optimizer = trained(2)
    optimizer.remove_hooks()
    assert doctor(model, optimizer).kinds() == {"hooks removed"}


def test_gradient_statistics_where_there_is_no_module():
    model = models.mixed()
    optimizer = rank_side(model, lr=1e-2)
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
    optimizer = rank_side(model, lr=1e-2)
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
    "settings: threshold without reprojection": {"rank_threshold": 0.9, "reproject_every": 0},
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
    optimizer = published(
        model, calibration_steps=2, rank=4, min_rank=2, max_rank=8, then=lambda m: rank_side(m, lr=1e-3)
    )
    models.fit(model, optimizer, 1)
    report = doctor(model, optimizer)
    assert report.kinds() == {"calibrating"} and report.healthy
    models.fit(model, optimizer, 4, begin=1)
    report = doctor(model, optimizer)
    assert report.subject.startswith("GritKFAC") and report.healthy


def test_gora_without_anything_to_hand_over_to():
    model = models.llama()
    optimizer = published(model, calibration_steps=1, rank=4, min_rank=2, max_rank=8)
    models.fit(model, optimizer, 1)
    assert found(doctor(model, optimizer), "calibrated").severity == "error"
