"""Bare tensors, as sd-scripts and torchtune's recipes hand them over, with options that may be strings."""

import importlib

import models
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvopt
from curvopt.integrations.by_shape import GritKFAC


class Network(nn.Module):
    """LoRA modules beside a frozen model, as sd-scripts' networks.lora keeps them: lora_down, lora_up, alpha."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1).double(), nn.Linear(8, 5).double()
        self.requires_grad_(False)
        self.loras = nn.ModuleList()
        for down, up in (
            (nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.Conv2d(2, 8, 1, bias=False)),
            (nn.Linear(8, 2, bias=False), nn.Linear(2, 5, bias=False)),
        ):
            lora = nn.Module()
            lora.lora_down, lora.lora_up = down.double(), up.double()
            lora.register_buffer("alpha", torch.tensor(2.0))
            nn.init.normal_(up.weight, std=0.1)
            self.loras.append(lora)

    def forward(self, x):
        conv, fc = self.loras
        x = self.conv(x) + conv.lora_up(conv.lora_down(x))
        x = torch.tanh(x).mean((2, 3))
        return self.fc(x) + fc.lora_up(fc.lora_down(x))

    def loss(self, i):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=g)
        return F.cross_entropy(self(x), torch.randint(5, (6,), generator=g))

    def groups(self, plus):
        """Groups of bare tensors, views of dictionaries; with LoRA+ the ups stand apart at a rate of their own."""
        named = dict(self.loras.named_parameters())
        if not plus:
            return [{"params": named.values(), "lr": 1e-2}]
        ups = {name: p for name, p in named.items() if "lora_up" in name}
        downs = {name: p for name, p in named.items() if "lora_up" not in name}
        return [{"params": downs.values(), "lr": 1e-2}, {"params": ups.values(), "lr": 4e-2}]


@pytest.mark.parametrize("plus", [False, True])
def test_it_trains_as_by_name(plus):
    """As sd-scripts calls it: the class by its dotted path, groups, lr and options that may be strings."""
    ends = []
    for how in ("shape", "name"):
        network = Network()
        if how == "shape":
            path, _, name = "curvopt.integrations.by_shape.GritKFAC".rpartition(".")
            cls = getattr(importlib.import_module(path), name)
            optimizer = cls(network.groups(plus), lr=1e-2, outer_rank="4", betas="0.8,0.9")
            assert len(optimizer.sides) == 4 and optimizer.pairs == []
        else:
            named = list(network.loras.named_parameters())
            groups = [
                {"params": [entry for entry in named if (not plus) or ("lora_up" in entry[0]) == up], "lr": lr}
                for up, lr in ((False, 1e-2), (True, 4e-2))[: 1 + plus]
            ]
            optimizer = curvopt.GritKFAC(groups, outer_rank=4, betas=(0.8, 0.9))
            assert len(optimizer.pairs) == 2
        models.fit(network, optimizer, 6)
        ends.append(models.snapshot(network, optimizer))
    models.assert_same(*ends)


@pytest.mark.parametrize("plus", [False, True])
def test_control_in_its_warm_up_it_is_adamw(plus):
    ends = []
    for cls, kwargs in ((GritKFAC, {"warmup_steps": 100, "betas": (0.9, 0.999)}), (torch.optim.AdamW, {})):
        network = Network()
        models.fit(network, cls(network.groups(plus), lr=1e-2, weight_decay=0.1, **kwargs), 5)
        ends.append(models.snapshot(network))
    models.assert_near(*ends, 1e-10, 1e-12)
    other = Network()
    models.fit(other, GritKFAC(other.groups(plus), lr=1e-2, weight_decay=0.1), 5)
    assert models.differences(models.snapshot(other), ends[1]) != []


def test_strings_are_parsed_and_errors_clear():
    network = Network()
    options = {"lr": "1e-2", "betas": "0.8,0.9", "rank_threshold": "None", "maximize": "True", "low_rank": "shape"}
    group = GritKFAC(network.groups(False), **options).param_groups[0]
    assert (group["betas"], group["lr"], group["rank_threshold"], group["maximize"]) == ((0.8, 0.9), 1e-2, None, True)
    with pytest.raises(ValueError, match="damping must be a number"):
        GritKFAC(network.groups(False), damping="some")
    with pytest.raises(ValueError, match="maximize must be True or False, got 'maybe'"):
        GritKFAC(network.groups(False), maximize="maybe")
    with pytest.raises(ValueError, match="update must be one of 'polar'"):
        GritKFAC(network.groups(False), update="eigen")
    with pytest.raises(ValueError, match="no LoRA pair found: no tensor has a dimension of at most 128"):
        GritKFAC([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5, 7))])


def test_model_parameters_in_a_row():
    """As torchtune's recipes do: `optimizer_class(model.parameters(), **kwargs)`, frozen weights among them."""
    model = models.mlp(width=8, r=3)
    optimizer = GritKFAC(model.parameters(), lr=1e-2)
    wanted = {p for pair in curvopt.find_lora_pairs(model) for p in (pair.A, pair.B)}
    assert {side.param for side in optimizer.sides} == wanted and len(wanted) == 8
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(1 for _ in model.parameters())
    before = models.snapshot(model)
    models.fit(model, optimizer, 4)
    moved = set(models.differences(before, models.snapshot(model)))
    assert {name for name in before if "lora" in name and not name.startswith("idle")} <= moved
    assert not any("base" in name for name in moved)


def test_resume():
    network = Network()
    optimizer = GritKFAC(network.groups(True), lr=1e-2)
    models.fit(network, optimizer, 3)
    fresh = models.copied_into(network, Network())
    other = GritKFAC(fresh.groups(True), lr=1e-2)
    other.load_state_dict(models.round_trip(optimizer.state_dict()))
    models.fit(network, optimizer, 3, 3), models.fit(fresh, other, 3, 3)
    models.assert_same(models.snapshot(network, optimizer), models.snapshot(fresh, other))
