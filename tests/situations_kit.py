"""The small PEFT model that the situations of other people's programs are played on."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

X = torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(32) % 3


def build(b=0.1, **kwargs):
    """Two adapted layers of three, in float64; the entries of B have standard deviation ``b``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **kwargs)).double()
    for name, p in model.named_parameters():
        if "lora_B" in name and name.endswith("weight"):
            nn.init.normal_(p, std=b) if b else nn.init.zeros_(p)
    return model


def loss(model, x=X):
    return nn.functional.cross_entropy(model(x), Y[: len(x)])


def steps(model, optimizer, n=1):
    for _ in range(n):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def factor(optimizer, i=0, side="A"):
    return optimizer.state[getattr(optimizer.pairs[i], side)]["factor"]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
