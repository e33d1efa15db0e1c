"""The doctor's findings about pairs and parameters: unpaired, stale, replaced, forgotten, not finite."""

import copy
import math

import models
import pytest
import torch
from doctor_kit import found, trained
from grit_kit import rank_side
from peft import LoraConfig, get_peft_model
from torch import nn

from curvopt.analysis import doctor

# ------------------------------------------------------------------------------------------------- pairs


def test_no_pairs():
    model = nn.Linear(4, 4)
    optimizer = rank_side(model, require_pairs=False)
    finding = found(doctor(model, optimizer), "no pairs")
    assert finding.severity == "error" and "lora_A" in finding.what and "pass the model" in finding.todo


def test_unpaired_layers_and_why():
    torch.manual_seed(0)
    base = nn.ModuleDict({"fc": nn.Linear(8, 8), "attn": nn.MultiheadAttention(8, 2)})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["fc", "attn"]))
    finding = found(doctor(model, rank_side(model)), "unpaired layers")
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
    optimizer = torch.optim.AdamW(own) if kind == "adamw" else rank_side(own, statistics="gradient")
    assert "stale parameters" not in doctor(model, optimizer).kinds()
    name = replace(model)
    finding = found(doctor(model, optimizer), "stale parameters")
    assert finding.severity == "error" and finding.pairs == (name,) and "1 of" in finding.what


def test_the_optimizer_of_a_copy():
    model = models.llama()
    optimizer = rank_side(model)
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
    optimizer = rank_side([{"params": pairs}], model=model)
    finding = found(doctor(model, optimizer), "forgotten parameters")
    assert finding.severity == "warning" and "head.weight" in finding.pairs


def test_non_finite_parameters(healthy):
    model, optimizer = copy.deepcopy(healthy)
    pair = optimizer.pairs[3]
    with torch.no_grad():
        pair.A[0, 0] = math.nan
    finding = found(doctor(model, optimizer), "non-finite parameters")
    assert finding.severity == "error" and finding.pairs == (pair.name,)
