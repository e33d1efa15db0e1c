"""Slabs of random parameters, the matrices of each rule, and one step of it on drawn gradients."""

import pytest
import torch
from strategies import generator

from curvopt.functional import compute_dtype
from curvopt.functional.inverse import damped_inverse, damped_inverse_root, eigenbasis
from curvopt.functional.update import RULES, Hyper, Slab

HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
FINE, FOUND = torch.tensor(0.0), torch.tensor(1.0)
MATRICES = {
    "polar": lambda S: torch.eye(S.shape[-1], dtype=S.dtype).expand_as(S),  # it has none, and must not read this one
    "adam": lambda S: damped_inverse(S, 0.1),
    "eigen": lambda S: eigenbasis(S)[0],
    "whiten": lambda S: damped_inverse_root(S, 0.1),
    "momentum": lambda S: damped_inverse(S, 0.1),
}
all_rules = pytest.mark.parametrize("rule", RULES)


def make_slab(L, r, d, rank_dim, dtype, hyper=HYPER, matrix=None, seed=0):
    """A slab of random parameters with empty moments; gradients are to be set."""
    shape = (r, d) if rank_dim == 1 else (d, r)
    params = [torch.randn(shape, generator=generator(seed + i), dtype=torch.float64).to(dtype) for i in range(L)]
    moments = [torch.zeros(L, *shape, dtype=dtype) for _ in range(2)]
    return Slab(params, torch.empty(0), *moments, torch.tensor(0.0), rank_dim, matrix, hyper)


def draw(slab, g):
    """Gradients for one step, of the scale of token means, a matrix each."""
    return [0.01 * torch.randn(p.shape, generator=g).to(p.dtype) for p in slab.params]


def take(rule, slab, grads, found_inf=FINE):
    wide = compute_dtype(slab.params[0].dtype)
    slab.grads = torch.stack([g.to(wide) for g in grads])
    RULES[rule]([slab], found_inf)


def schedule(i):
    return 1e-2 * (1 - i / 20)
