"""Slabs, and a step of kernel and oracle over copies of them."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from curvopt.kernels import launch, tables

from curvopt import kernels
from curvopt.functional.update import RULES, Hyper, Slab

EPS = 6e-8
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ZERO = 0.0


def slab(L, r, d, side, param=F32, state=F32, matrix=True, seed=0, **hyper):
    g = torch.Generator().manual_seed(seed)
    shape = (L, r, d) if side == 1 else (L, d, r)
    draw = lambda: torch.randn(shape, generator=g)  # noqa: E731
    Q, _ = torch.linalg.qr(torch.randn(L, r, r, generator=g))
    given = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, **hyper}
    return Slab(
        params=list(draw().to(param).unbind()),
        grads=draw(),
        exp_avg=(0.1 * draw()).to(state),
        exp_avg_sq=(0.1 + draw().square()).to(state),  # m / √v is ill-conditioned near zero
        step=torch.tensor(3.0),
        rank_dim=side,
        matrix=Q.contiguous() if matrix else None,
        hyper=Hyper(**given),
    )


def moved(s, device, dtype=None):
    """A copy on the device; with ``dtype``, the floating-point oracle's."""
    c = copy.copy(s)
    cast = lambda t: t.detach().to(device, dtype, copy=True)  # noqa: E731
    c.params = [cast(p) for p in s.params]
    for name in ("grads", "exp_avg", "exp_avg_sq", "matrix", "basis"):
        setattr(c, name, None if getattr(s, name) is None else cast(getattr(s, name)))
    c.step = s.step.to(device, copy=True)
    c.k = None if s.k is None else s.k.to(device)
    c.damping = s.damping.to(device) if isinstance(s.damping, torch.Tensor) else s.damping
    if isinstance(s.hyper.lr, torch.Tensor):
        c.hyper = replace(s.hyper, lr=s.hyper.lr.to(device))
    return c


def tensors(s):
    return [*s.params, *s.exp_avg, *s.exp_avg_sq]


def bucket(slabs, device):
    """Copies on the device that share their step, as slabs of one bucket do."""
    ours = [moved(s, device) for s in slabs]
    for s in ours:
        s.step = ours[0].step
    return ours


def gradients(slabs):
    return [g for s in slabs for g in s.grads]


def both(rule, slabs, device, found=ZERO):
    """Run the kernel and the float64 oracle on copies; every slab has a step of its own."""
    ours, exact = [moved(s, device) for s in slabs], [moved(s, "cpu", torch.float64) for s in slabs]
    inf = torch.tensor(found, device=device)
    assert kernels.supports(f"{rule}_update", ours, inf)
    kernels.OPS[f"{rule}_update"](ours, inf)
    RULES[rule](exact, torch.tensor(found))
    return ours, exact


def planned(rule, slabs, device, found=ZERO):
    """As `both`, through one plan for all slabs."""
    ours, exact = bucket(slabs, device), [moved(s, "cpu", torch.float64) for s in slabs]
    assert kernels.plan_supports(rule, ours)
    plan = kernels.UpdatePlan(rule, ours)
    assert plan.load(gradients(ours))
    plan.step(torch.tensor(found, device=device))
    RULES[rule](exact, torch.tensor(found))
    return ours, exact


def check(ours, exact):
    for s, e in zip(ours, exact, strict=True):
        assert s.step.item() == e.step.item()
        for got, want in zip(tensors(s), tensors(e), strict=True):
            # two products of inner length r, each entry of order one to three, and one rounding to the stored dtype
            # (a full unit in the interpreter, which cuts bfloat16 off instead of rounding)
            unit = {F32: 40 * EPS, BF16: 2.0**-7, F16: 2.0**-10}[got.dtype]
            torch.testing.assert_close(got.cpu().double(), want, rtol=unit, atol=unit + 1e-4 * EPS)


@contextmanager
def launches():
    """Note the launches inside, as (name of the kernel, grid, constants)."""
    seen, run = [], launch.run

    def noted(kernel, grid, *args, **constants):
        seen.append((kernel.__name__, grid, constants))
        run(kernel, grid, *args, **constants)

    with mock.patch.object(launch, "run", noted):
        yield seen


@contextmanager
def uploads():
    """Note what is uploaded inside."""
    seen, upload = [], tables.upload

    def noted(values, *rest):
        seen.append(values)
        return upload(values, *rest)

    with mock.patch.object(tables, "upload", noted):
        yield seen
