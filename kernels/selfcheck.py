"""Every op on a small problem against the reference it is given: what a device must show before its kernels are used.

`agrees` is what ``backend="auto"`` asks once per op, rank and dtype; `run` does all ops.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import OPS, UpdatePlan

log = logging.getLogger(__name__)
Op = Callable[..., Any]
# two roundings of 16-bit parameters may differ by a unit; r×r functions in float32 by cond · 1e-8, updates by products
PLAN = "plan"
ALLOWED = {"damped_inverse": 5e-4, "damped_inverse_root": 5e-4, "eigenbasis": 1e-4}


def run(reference: Mapping[str, Op], device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Yield (op, largest error relative to the largest entry, allowed error) for every op at rank 16 in float32."""
    for name in (*OPS, PLAN):
        yield name, error(name, reference.get(name), 16, torch.float32, device), allowed(name, torch.float32)


@cache
def agrees(name: str, reference: Op | None, r: int, dtype: torch.dtype, device: torch.device, k: int = 0) -> bool:
    """Return whether the kernel compiles, runs and gives what ``reference`` gives; once per process and arguments.

    The problem of an update, and of their map, has ``k`` directions of outer factors. ``name`` may also be `PLAN`: what
    a plan does besides its steps (``nonfinite_``, ``outer_products``, ``grams``, ``transform_``). Its reference is in
    here.
    """
    try:
        found = error(name, reference, r, dtype, device, k)
    except Exception:  # whatever the compiler or the driver throws, the reference still works
        log.exception("kernel %s at rank %d (%s) does not run on %s", name, r, dtype, device)
        return False
    if not found <= allowed(name, dtype):
        log.error("kernel %s at rank %d (%s) is wrong on %s: error %.1e", name, r, dtype, device, found)
        return False
    return True


def allowed(name: str, dtype: torch.dtype) -> float:
    """Return the error that is still agreement."""
    return ALLOWED.get(name, 1e-4) if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def error(name: str, reference: Op | None, r: int, dtype: torch.dtype, device: torch.device, k: int = 0) -> float:
    """Return the largest difference of kernel and reference on the op's problem, relative to the largest entry."""
    if name == PLAN:
        got, want = (part.double() for part in _plan(r, dtype, device, k))
    else:
        assert reference is not None
        got, want = (outcome(name, op, r, dtype, device, k).double() for op in (OPS[name], reference))
    return float((got - want).abs().max() / want.abs().max())


def outcome(name: str, op: Op, r: int, dtype: torch.dtype, device: torch.device, k_outer: int = 0) -> Tensor:
    """Run ``op`` on its problem and return what it made; the same problem every time."""
    g = torch.Generator().manual_seed(0)
    L, d = 6, 96
    rows = torch.randn(L, 4 * r, r, generator=g) / torch.arange(1, r + 1)
    S = (rows.mT @ rows / (4 * r)).contiguous().to(device)
    k = torch.full((L,), max(1, r - 1), device=device)
    made: Tensor
    if name in ("damped_inverse", "damped_inverse_root"):
        made = op(S, 1e-2, k)
        return made
    if name == "eigenbasis":
        Q = op(S, k)[0].double()
        live = Q[:, :, : int(k[0])]
        return live.mT @ S.double() @ live  # eigenvectors are free in sign; what they do to S is not
    if name == "outer_map":
        k_outer = k_outer or r
        rows = torch.randn(L, 4 * (r + k_outer), r + k_outer, generator=g) / torch.arange(1, r + k_outer + 1)
        G, V = rows.mT[:, :r], torch.linalg.qr(rows)[0].mT[:, r:]
        products = torch.cat((G @ G.mT, G @ V.mT), 2).contiguous().to(device)
        mu, none = torch.ones(L, k_outer, device=device), torch.zeros((), device=device)
        given = (products, mu, mu.sum(1) + 1, torch.full((L,), float(rows.shape[1]), device=device), 0.9, 0.1, none)
        return torch.cat([x.flatten() for x in op(*given)])
    if name == "ema_":
        op(S, 2 * S, torch.full((L,), 3, device=device), 0.9)
        return S
    if name == "gram_add_":
        made = op(S, [4, 1], [z.contiguous() for z in rows[:2].to(device, dtype)], None, -1.0)
        return made
    if name.startswith("gram"):
        zs = [z.contiguous() for z in rows.to(device, dtype)]
        made = op(zs[0] if name == "gram" else zs)
        return made
    slabs = [_slab(side, L, r, max(d, 2 * k_outer), dtype, device, k_outer) for side in (1, 2)]
    op(slabs, torch.zeros((), device=device))
    # with the moments, since of what a gradient went through little is seen in the parameters
    changed = [X for s in slabs for X in (torch.stack(s.params), s.exp_avg, s.exp_avg_sq, s.basis) if X is not None]
    return torch.cat([X.float().flatten() for X in changed])


def _plan(r: int, dtype: torch.dtype, device: torch.device, k_outer: int) -> tuple[Tensor, Tensor]:
    """Return what the ops on whole buckets make of a problem, and what torch makes of it, each as one vector."""
    d = max(96, 2 * k_outer)
    slabs = [_slab(side, 3, r, d, dtype, device, k_outer) for side in (1, 2)]
    slabs[1].step = slabs[0].step
    plan = UpdatePlan("eigen", slabs)
    grads = [g for s in slabs for g in s.grads]
    flags = torch.zeros(2, device=device)
    plan.load(grads)
    sums = [plan.grams("gradients"), plan.grams("params")]
    plan.nonfinite_(flags[0])
    if k_outer:
        sums.append(plan.outer_products())
    M = torch.cat([s.matrix for s in slabs if s.matrix is not None])
    k = torch.full((len(grads),), max(1, r - 1), device=device)

    def ours() -> list[Tensor]:
        return [t for s in slabs for t in (*s.params, *s.exp_avg, *s.exp_avg_sq)]

    def first(X: Tensor, s: _Slab) -> Tensor:
        return X.float() if s.rank_dim == 1 else X.float().mT

    want = [torch.tensor([0.0, 1.0], device=device)]
    for of in (grads, [p for s in slabs for p in s.params]):
        X = torch.stack([first(x, slabs[n // 3]) for n, x in enumerate(of)])
        want.append((X @ X.mT).flatten() / d)  # sums of d products, to the size of the rest
    if k_outer:
        G, V = (torch.cat([first(x, s) for s in slabs for x in getattr(s, of)]) for of in ("grads", "basis"))
        G, V = G.view(-1, r, d), V.view(-1, k_outer, d)
        want.append(torch.cat((G @ G.mT, G @ V.mT), 2).flatten() / d)
    live = torch.arange(r, device=device)[:, None] < k[0]
    for n, s in enumerate(slabs):
        own = M[3 * n : 3 * n + 3]
        for T, stack in ((own, s.params), (own, s.exp_avg), (own.square(), s.exp_avg_sq)):
            for t, x in zip(T, stack, strict=True):
                mapped = torch.where(live, t @ first(x, s), 0.0)
                want.append((mapped if s.rank_dim == 1 else mapped.mT).to(dtype).float().flatten())
    none = torch.zeros((), device=device)
    for of_ in ("params", "moments"):
        plan.transform_(of_, M, k, none)
    grads[-1][0, 0] = float("inf")
    plan.nonfinite_(flags[1])
    got = [flags, *(G.flatten() / d for G in sums), *(t.float().flatten() for t in ours())]
    return torch.cat(got), torch.cat(want)


@dataclass
class _Hyper:
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    maximize: bool = False


@dataclass
class _Slab:
    params: list[Tensor]
    grads: list[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    rank_dim: int
    matrix: Tensor | None
    rates: tuple[float, ...] | None
    spare: Tensor | None = None
    delta: Tensor | None = None
    reduce: None = None
    damping: float = 0.1
    k: Tensor | None = None
    basis: Tensor | None = None
    outer: Tensor | None = None
    spare_basis: Tensor | None = None
    views: list[Any] = field(default_factory=list)
    hyper: _Hyper = field(default_factory=_Hyper)


def _slab(side: int, L: int, r: int, d: int, dtype: torch.dtype, device: torch.device, k: int = 0) -> _Slab:
    g = torch.Generator().manual_seed(side)
    shape = (L, r, d) if side == 1 else (L, d, r)
    p, grad, m = (torch.randn(shape, generator=g).to(device) for _ in range(3))
    Q = torch.linalg.qr(torch.randn(L, r, r, generator=g)).Q.contiguous().to(device)
    rates = tuple(float(1 + i % 3) for i in range(r))
    step = torch.tensor(3.0, device=device)
    p, m, v = p.to(dtype), m.to(dtype), (0.1 + m.square()).to(dtype)
    made = _Slab(list(p.unbind()), list(grad.to(dtype).unbind()), m, v, step, side, Q, rates)
    if k:
        V = torch.linalg.qr(torch.randn(L, d, k, generator=g)).Q
        made.basis = (V.mT if side == 1 else V).contiguous().to(device, dtype)
        M = 0.3 * torch.randn(L, r + k, r + k, generator=g) / (r + k) ** 0.5
        M[:, :r, :r] = 1.5 * torch.eye(r)
        made.outer = M.to(device)
    return made
