"""One factory behind all plugins: names, strings, weight decay, and models whose LoRA layers are computed elsewhere."""

import logging
import types

import models
import pytest
import torch
from peft import LoraConfig
from situations_kit import build, steps, weights
from torch import nn
from torch.nn import functional as F

from curvopt import GritKFAC, MatryoshkaScaledAdam, find_lora_pairs
from curvopt.integrations import build_optimizer
from curvopt.integrations.factory import fused_lora


def test_names_and_strings():
    optimizer = build_optimizer(models.llama(), "grit", lr="1e-2", betas="0.8,0.9", inverse_every="3", update="eigen")
    (group,) = optimizer.param_groups
    assert type(optimizer) is GritKFAC and len(optimizer.pairs) == 14
    assert (group["lr"], group["betas"], group["inverse_every"]) == (1e-2, (0.8, 0.9), 3)
    assert type(build_optimizer(models.llama(), "matryoshka", ranks="1,2,4")) is MatryoshkaScaledAdam
    assert build_optimizer(models.llama(), MatryoshkaScaledAdam, ranks=[1, 4]).nested_ranks().popitem()[1] == (1, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"optimizer": "adam"}, "optimizer must be one of 'grit', 'matryoshka', got 'adam'"),
     ({"lr": "-1"}, "lr must be a number"), ({"update": "sign"}, "update must be 'polar' or 'eigen'"),
     ({"damping": "much"}, "damping must be a number"), ({"dampening": "1"}, "did you mean damping")],
)  # fmt: skip
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(models.llama(), **kwargs)


def test_weight_decay_spares_norms_and_biases():
    optimizer = build_optimizer(models.mlp(), weight_decay="0.1")
    decays, plain = optimizer.param_groups
    assert (decays["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in plain["params"]} == {1} and all(p.ndim >= 2 for p in decays["params"])


# ------------------------------------------------------------------------------------------ several adapters

TWO = {"dora": {"use_dora": True}, "saved modules": {"modules_to_save": ["4"]}}


def two_adapters(**kwargs):
    """A model with the adapters "default", which is active, and "other"."""
    model = build(**kwargs)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **kwargs))
    return model.double()


def in_groups(model, optimizer):
    """Return the names of what the optimizer holds."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if p in held}


def moved(model, optimizer):
    """Return the names of what three steps change."""
    before = weights(model)
    steps(model, optimizer, 3)
    return {name for name, p in weights(model).items() if not p.equal(before[name])}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", TWO)
def test_a_resting_adapter_trains_whole_once_it_is_active(kind, weight_decay):
    model = two_adapters(**TWO[kind])
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=weight_decay)
    assert in_groups(model, optimizer) == in_groups(model, GritKFAC(model, lr=1e-2))
    model.set_adapter("other")
    active = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("other" in name and "lora_A" not in name and "lora_B" not in name for name in active)
    assert moved(model, optimizer) == active


def test_only_the_chosen_one_of_two_active_adapters_trains():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    optimizer = build_optimizer(model, lr=1e-2, adapter="default")
    assert moved(model, optimizer) == {name for name in weights(model) if ".default." in name}
    control = two_adapters()
    control.base_model.set_adapter(["default", "other"])
    both = build_optimizer(control, lr=1e-2)
    assert moved(control, both) == {name for name in weights(control) if "lora_" in name}


# ------------------------------------------------------------------------------ kernels that never call lora_A


def apply_lora_mlp_swiglu(self, x):
    """An MLP block as a fused kernel has it: the products with A and B are its own, lora_A is not called."""

    def adapted(layer, x):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.base_layer(x) + layer.scaling["default"] * F.linear(F.linear(x, a), b)

    return adapted(self.down_proj, F.silu(adapted(self.gate_proj, x)) * adapted(self.up_proj, x))


def fused():
    """A Llama with adapters on its MLPs, which are computed by the function above."""
    model = models.llama(torch.float64, target_modules=["gate_proj", "up_proj", "down_proj"], start="random")
    for module in model.modules():
        if hasattr(module, "gate_proj"):
            module.forward = types.MethodType(apply_lora_mlp_swiglu, module)
    return model


def test_fused_kernels_are_seen_and_gradients_used_instead(caplog):
    model = fused()
    assert "mlp.forward is apply_lora_mlp_swiglu" in fused_lora(model)
    with caplog.at_level(logging.WARNING):
        optimizer = build_optimizer(model, lr=1e-2, update="eigen", inverse_every="2")
    assert optimizer.param_groups[0]["statistics"] == "gradient"
    assert "apply_lora_mlp_swiglu" in caplog.text and 'statistics="gradient"' in caplog.text
    models.fit(model, optimizer, 3)
    report = optimizer.diagnostics()["pairs"].values()
    assert all(pair["statistics"] == "gradient" and pair["A"]["condition"] > 1 for pair in report)

    plain = models.llama(torch.float64, target_modules=["gate_proj", "up_proj", "down_proj"], start="random")
    assert fused_lora(plain) == ""
    by_hand = GritKFAC(plain, lr=1e-2, update="eigen", inverse_every=2, statistics="gradient")
    models.fit(plain, by_hand, 3)
    models.assert_near(models.snapshot(plain), models.snapshot(model), 1e-8, 1e-10)


@pytest.mark.parametrize(
    ("options", "statistics"),
    [
        ({}, "none"), ({"update": "polar", "reproject_every": "0"}, "none"), ({"reproject_every": "5"}, "gradient"),
        ({"rank_threshold": "0.9"}, "gradient"), ({"update": "whiten"}, "gradient"),
        ({"update": "whiten", "statistics": "weight"}, "weight"), ({"statistics": "gradient"}, "gradient"),
    ],
)  # fmt: skip
def test_gradients_are_used_where_factors_are_read(options, statistics, caplog):
    """The default reads none: it is what it is without fused kernels."""
    optimizer = build_optimizer(fused(), min_rank=1, **options)
    assert optimizer.param_groups[0]["statistics"] == statistics and not optimizer.watching
    warned = statistics == "gradient" and "statistics" not in options
    assert ("hooks on lora_A would see nothing" in caplog.text) == warned


def test_control_hooks_on_fused_layers_stay_silent():
    model = fused()
    optimizer = build_optimizer(model, lr=1e-2, statistics="activation")  # what is said outright is done
    with pytest.warns(UserWarning):
        models.fit(model, optimizer, 3)
    assert all(pair["rows"] == 0 for pair in optimizer.diagnostics()["pairs"].values())


def test_a_layer_that_unsloth_has_compiled_is_seen():
    """unsloth_zoo 2026.10 puts a function of this name in place of the forward of PEFT's classes."""

    class Compiled(models.LoraLinear):
        def unsloth_forward(self, x):
            return models.LoraLinear.forward(self, x)

        forward = unsloth_forward

    model = nn.Sequential(Compiled(8, 8, 4))
    assert fused_lora(model) == "0 is computed by unsloth"
    assert build_optimizer(model, update="eigen").param_groups[0]["statistics"] == "gradient"
    assert build_optimizer(models.mlp(), update="eigen").param_groups[0]["statistics"] == "activation"


def test_optimizers_without_statistics_are_left_alone(caplog):
    build_optimizer(fused(), "matryoshka")
    assert caplog.text == "" and len(find_lora_pairs(fused())) == 6
