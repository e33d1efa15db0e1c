"""Fewer rows than the rank: some directions of the rank side never have a gradient but for rounding."""

import pytest
import torch
from torch import nn

from curvopt import GritKFAC

RANK, ROWS = 8, 3


def changes(update, scale):
    """ΔW of both layers after 20 steps in float32, with A of the first layer ``scale`` times as large."""
    torch.manual_seed(0)
    model = nn.Sequential(Pair(24, 32), nn.Tanh(), Pair(32, 16))
    x, y = torch.randn(ROWS, 24), torch.randn(ROWS, 16)
    with torch.no_grad():
        model[0].lora_A.weight.mul_(scale)
    params = [p for n, p in model.named_parameters() if "lora" in n]
    betas = (0.7, 0.99)
    if update is None:
        optimizer = torch.optim.AdamW(params, lr=1e-2, betas=betas, weight_decay=0.0)
    else:
        optimizer = GritKFAC(model, lr=1e-2, betas=betas, update=update)
    for _ in range(20):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
    return [(pair.lora_B.weight @ pair.lora_A.weight).detach() for pair in (model[0], model[2])]


def sensitivity(update):
    pairs = zip(changes(update, 1 + 1e-7), changes(update, 1.0), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


class Pair(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(d_in, RANK, bias=False), nn.Linear(RANK, d_out, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("update", ["polar", "adam"])
def test_a_change_by_rounding_stays_a_change_by_rounding(update):
    """A start that differs by 1e-7: AdamW ends 1e-6 apart, and these, through a Cholesky factor, below 1e-3."""
    assert sensitivity(None) < 1e-5
    assert sensitivity(update) < 1e-3


def test_eigen_is_the_rule_that_follows_rounding():
    """What its docstring says: along eigenvectors without a gradient it takes full steps of Adam along rounding."""
    assert sensitivity("eigen") > 1e-2
