"""GritKFAC's factors as its state has them and as autograd does, and runs with ranks on the move."""

import copy

import models
import torch
from torch import Tensor

from curvopt import GritKFAC

RULES = ("polar", "eigen", "adam", "whiten", "momentum")
BASES = ("eigen",)  # its moments live in a basis
STATISTICS = ("activation", "gradient", "weight")
# two orders of summation of some hundred float64 products
EXACT = {"rtol": 1e-11, "atol": 1e-14}
WIDE = {"width": 12, "r": 6}


def rank_side(*args, **settings):
    """GritKFAC with the r×r factors alone, observed by activations at every step, at the betas of torch's AdamW."""
    own = {"statistics": "activation", "outer_rank": 0, "betas": (0.9, 0.999), "factor_every": 1}
    return GritKFAC(*args, **{**own, **settings})


def observed_backward(model, i, rows=6):
    """Run one backward pass and return, layer by layer, explicit uᵀu / N and N dᵀd from autograd."""
    for layer in model.layers:
        layer.watch = []
    value = models.loss(model, i, rows)
    us = [layer.watch[0] for layer in model.layers]
    ds = torch.autograd.grad(value, us, retain_graph=True)
    model.zero_grad()
    for layer in model.layers:
        layer.watch = None
    seen = []
    for u, d in zip(us, ds, strict=True):
        u, d = u.detach().flatten(0, -2), d.flatten(0, -2)
        seen.append((u.T @ u / len(u), len(u) * d.T @ d))
    return value, seen


def factors(optimizer, pair) -> tuple[Tensor, Tensor]:
    """(S_u, S_d) whichever side keeps which."""
    a, b = (optimizer.state[p]["factor"].clone() for p in (pair.A, pair.B))
    return (b, a) if optimizer.param_groups[0]["sides"] == "kfac" else (a, b)


def fork(model, optimizer, fresh, **edits):
    """Return (model, optimizer) that stand where these stand, with some settings changed from here on."""
    twin = models.copied_into(model, fresh)
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names")}
    other = rank_side(twin, **settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.param_groups[0].update(edits)
    return twin, other


def stepped(dtype=torch.float64, begin=3, **settings):
    """Train to just before a reprojection, then take that step with and without it: the two ends of one step."""
    model = models.mlp(dtype, **WIDE)
    optimizer = rank_side(model, lr=1e-2, inverse_every=2, min_rank=1, **settings)
    models.fit(model, optimizer, begin)
    twin, other = fork(model, optimizer, models.mlp(dtype, **WIDE))
    optimizer.param_groups[0]["reproject_every"] = begin + 1
    models.fit(model, optimizer, 1, begin)
    models.fit(twin, other, 1, begin)
    return model, optimizer, twin, other


def delta(pair) -> Tensor:
    return pair.B.detach() @ pair.A.detach()


def cut(rule="eigen", dtype=torch.float64, steps=12, build=models.mlp, **settings):
    """A model of which directions have been masked, and its optimizer; from here on ranks stay."""
    model = build(dtype, **WIDE) if build is models.mlp else build(dtype)
    settings = {"reproject_every": 3, "rank_threshold": 0.7, "min_rank": 1, "weight_decay": 0.1, **settings}
    optimizer = rank_side(model, lr=1e-2, update=rule, inverse_every=2, **settings)
    models.fit(model, optimizer, steps)
    optimizer.param_groups[0]["reproject_every"] = 0
    return model, optimizer


def masked_are_zero(optimizer) -> int:
    """Assert that dead rows, columns and moments are exactly zero; return how many directions are dead."""
    dead = 0
    for pair in optimizer.pairs[:3]:
        k = optimizer.ranks()[pair.name]
        dead += pair.rank - k
        for X in (pair.A, *(optimizer.state[pair.A][key] for key in ("exp_avg", "exp_avg_sq"))):
            assert (X[k:] == 0).all() and (X[:k] != 0).any()
        for X in (pair.B, *(optimizer.state[pair.B][key] for key in ("exp_avg", "exp_avg_sq"))):
            assert (X[:, k:] == 0).all() and (X[:, :k] != 0).any()
        for p in (pair.A, pair.B):
            S = optimizer.state[p]["factor"]
            assert (S[k:] == 0).all() and (S[:, k:] == 0).all()
    return dead
