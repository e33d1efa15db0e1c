"""What PEFT can do to a model during training, and quantized bases."""

import loopkit
import loopkit_frameworks as frameworks
import models
import pytest
import torch
from grit_kit import rank_side
from peft import LoraConfig

optimizers = pytest.mark.parametrize("make", loopkit.OPTIMIZERS, ids=lambda make: make.__name__)


def test_the_quantized_base_is_quantized():
    layer = frameworks.base(frameworks.nf4).base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit" and layer.base_layer.weight.dtype == torch.uint8
    plain = frameworks.base(frameworks.nf4_and_back).base_model.model.model.layers[0].self_attn.q_proj
    assert plain.base_layer.weight.dtype == torch.float32 and len(plain.base_layer.weight.unique()) > 16


@optimizers
def test_int8_base_of_torchao(make):
    """The adapters of an int8 base train as those of a plain base with its values."""
    torchao = pytest.importorskip("torchao.quantization")

    def build(back):
        model = frameworks.base(lambda linear: linear).unload()
        torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
        if back:
            for module in model.model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight = torch.nn.Parameter(module.weight.dequantize())
        model = frameworks.get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        return model

    ends = []
    for back in (False, True):
        torch.manual_seed(1)
        model = build(back)
        optimizer = make(model)
        models.fit(model, optimizer, 6)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})
    # torchao scales the output where the plain layer has scaled the weight; float32, grown by Adam's division
    models.assert_near(*ends, rtol=1e-3, atol=1e-4)


@optimizers
def test_an_adapter_added_later_is_trained_once_it_is_added_to_the_groups(make):
    model = models.llama(torch.float64, start="random")
    optimizer = make(model)
    models.fit(model, optimizer, 2)
    model.add_adapter("late", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    model.set_adapter("late")
    optimizer.add_param_group({"params": [p for name, p in model.named_parameters() if ".late." in name]})
    assert sum(pair.adapter == "late" for pair in optimizer.pairs) == 14
    before = models.snapshot(model)
    models.fit(model, optimizer, 2, 2)
    moved = models.differences(before, models.snapshot(model))
    assert moved and all(".late." in name for name in moved)


@optimizers
def test_a_deleted_adapter_is_forgotten(make):
    model = models.llama(torch.float64, adapters=("default", "other"), start="random")
    optimizer = make(model)
    models.fit(model, optimizer, 2)
    model.delete_adapter("other")
    model.set_adapter("default")
    models.fit(model, optimizer, 2, 2)
    alone = models.llama(torch.float64, adapters=("default", "other"), start="random")
    models.fit(alone, make(alone), 4)
    for name, p in model.named_parameters():
        assert torch.equal(p, alone.get_parameter(name)), name


def test_two_adapters_active_at_once_are_both_trained():
    model = models.llama(torch.float64, adapters=("default", "other"), start="random")
    model.base_model.set_adapter(["default", "other"])
    optimizer = rank_side(model, lr=1e-2)
    models.fit(model, optimizer, 3)
    assert {pair["rows"] for pair in optimizer.diagnostics()["pairs"].values()} == {3 * 20.0}
    assert len(optimizer.diagnostics()["pairs"]) == 28


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_factor_frozen_in_flight(side):
    """From then on it keeps its bits, and its partner goes on."""
    model = models.mlp()
    optimizer = rank_side(model, lr=1e-2)
    models.fit(model, optimizer, 3)
    for pair in optimizer.pairs:
        getattr(pair, side).requires_grad_(False)
    frozen = [getattr(pair, side).detach().clone() for pair in optimizer.pairs]
    moving = optimizer.pairs[0].B if side == "A" else optimizer.pairs[0].A
    before = moving.detach().clone()
    models.fit(model, optimizer, 3, 3)
    assert all(torch.equal(getattr(pair, side), p) for pair, p in zip(optimizer.pairs, frozen, strict=True))
    assert not torch.equal(moving, before)
