"""What is timed of each op: the kernel, the torch reference, and the best formulation in plain torch."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from curvopt import kernels
from curvopt.functional.outer import cosine_rows
from curvopt.functional.update import Hyper, Slab
from curvopt.ops import REFERENCE

Work = tuple[str, str, int, Callable[[], Any]]  # op, implementation, bytes it must move, what to time


def factors(L: int, r: int, device: str) -> Tensor:
    """Return power-law second moments."""
    x = torch.randn(L, 4 * r, r, device=device) / torch.arange(1, r + 1, device=device)
    return (x.mT @ x).contiguous()


def bucket(shapes: list[tuple[int, int, int]], r: int, device: str) -> list[Slab]:
    """Return slabs of one bucket; a shape is (matrices, d, dimension of the rank)."""
    step, hyper, made = torch.zeros((), device=device), Hyper(1e-4, 0.9, 0.999, 1e-8, 0.01), []
    for L, d, side in shapes:
        p, g, m = (torch.randn((L, r, d) if side == 1 else (L, d, r), device=device) for _ in range(3))
        Q = torch.linalg.qr(torch.randn(L, r, r)).Q.contiguous().to(device)
        made.append(Slab(list(p.unbind()), list(g.unbind()), m, m.square(), step, side, Q, hyper))
    return made


def planned(rule: str, slabs: list[Slab]) -> Any:
    """Return the plan of a bucket with its gradients loaded."""
    plan = kernels.UpdatePlan(rule, slabs)
    plan.load([g for s in slabs for g in s.grads])
    return plan


def inverses(L: int, r: int, device: str) -> Iterator[Work]:
    """Factors of both sides of all pairs."""
    S, moved = factors(2 * L, r, device), 2 * 2 * L * r * r * 4
    eye = torch.eye(r, device=device)

    def cholesky() -> Tensor:
        scale = r / S.diagonal(dim1=1, dim2=2).sum(-1)
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(S * scale[:, None, None] + 1e-2 * eye)[0])

    def by_eigh() -> Tensor:
        values, Q = torch.linalg.eigh(S)
        return (Q * (values.clamp(min=0) + 1e-2).rsqrt().unsqueeze(-2)) @ Q.mT

    for op, best in (("damped_inverse", cholesky), ("damped_inverse_root", by_eigh)):
        yield op, "kernel", moved, lambda op=op: kernels.OPS[op](S, 1e-2)
        yield op, "reference", moved, lambda op=op: REFERENCE[op](S, 1e-2)
        yield op, "torch", moved, best
    yield "eigenbasis", "kernel", moved, lambda: kernels.OPS["eigenbasis"](S)
    yield "eigenbasis", "reference", moved, lambda: REFERENCE["eigenbasis"](S)
    yield "eigenbasis", "torch", moved, lambda: torch.linalg.eigh(S)


def updates(L: int, r: int, d: int, device: str) -> Iterator[Work]:
    """One step over all pairs; the best of torch is its fused AdamW, which preconditions nothing."""
    given, found = bucket([(L, d, 1), (L, d, 2)], r, device), torch.zeros((), device=device)
    numbers, plans = 2 * L * r * d, dict[str, Any]()
    params = [torch.nn.Parameter(p.clone()) for s in given for p in s.params]
    for p, g in zip(params, [g for s in given for g in s.grads], strict=True):
        p.grad = g.clone()
    adamw = torch.optim.AdamW(params, lr=1e-4, fused=True)
    # momentum reads m again and writes in a second launch; polar hands its step to one
    bytes_per_number = {"polar": 36, "adam": 28, "eigen": 28, "whiten": 28, "momentum": 36}
    yield "update", "torch fused AdamW", 28 * numbers, adamw.step
    for rule, each in bytes_per_number.items():
        op, moved = f"{rule}_update", each * numbers
        yield op, "plan", moved, lambda rule=rule: planned_step(plans, rule, given, found)
        yield op, "reference", moved, lambda op=op: REFERENCE[op](given, found)


def planned_step(plans: dict[str, Any], rule: str, slabs: list[Slab], found: Tensor) -> None:
    """Step through the plan of a rule, made at the first call."""
    if rule not in plans:
        plans[rule] = planned(rule, slabs)
    plans[rule].step(found)


def whole(L: int, r: int, d: int, device: str) -> Iterator[Work]:
    """What else is done to all matrices of a bucket."""
    given, flag = bucket([(L, d, 1), (L, d, 2)], r, device), torch.zeros((), device=device)
    plan = functools.cache(lambda: planned("eigen", given))  # made when it is first timed: there may be no kernels
    M, k = torch.randn(2 * L, r, r, device=device) / r, torch.full((2 * L,), r, device=device)
    grads, numbers = [g for s in given for g in s.grads], 2 * L * r * d
    none = torch.zeros((), device=device)
    yield "nonfinite_", "plan", 4 * numbers, lambda: plan().nonfinite_(flag)
    yield "nonfinite_", "torch", 4 * numbers, lambda: torch.stack(torch._foreach_norm(grads)).isfinite().all()
    yield "grams", "plan", 4 * numbers, lambda: plan().grams("gradients")
    yield "grams", "torch", 4 * numbers, lambda: [g @ g.mT if g.shape[0] == r else g.mT @ g for g in grads]
    yield "transform_ params", "plan", 8 * numbers, lambda: plan().transform_("params", M, k, none)
    yield "transform_ moments", "plan", 16 * numbers, lambda: plan().transform_("moments", M, k, none)
    m = [s.exp_avg for s in given]
    both = [(M[:L] @ m[0], m[1] @ M[L:].mT)]
    yield "transform_ params", "torch", 8 * numbers, lambda: both.__setitem__(0, (M[:L] @ m[0], m[1] @ M[L:].mT))


def whole_step(L: int, r: int, k: int, device: str) -> Callable[[], Any]:
    """Return the default step of 2 L matrices with outer factors: products, map, "polar"."""
    shapes = [(L // 2, d, side) for d in (4096, 14336) for side in (1, 2)]
    given, none = bucket(shapes, r, device), torch.zeros((), device=device)
    for s in given:
        d = s.exp_avg.shape[3 - s.rank_dim]
        V = cosine_rows(k, d).float().to(device).expand(L // 2, k, d)
        s.basis, s.matrix = (V if s.rank_dim == 1 else V.mT).contiguous(), None
    width = torch.cat([torch.full((L // 2,), float(s.exp_avg.shape[3 - s.rank_dim])) for s in given]).to(device)
    mu = torch.ones(2 * L, k, device=device)
    trace, plan = mu.sum(1) + 1, planned("polar", given)
    kept = [given]  # a plan has addresses alone

    def step() -> None:
        assert kept
        M, _, _ = kernels.OPS["outer_map"](plan.outer_products(), mu, trace, width, 0.95, 0.1, none)
        plan.take_outer(M)
        plan.step(none)

    return step


def outer(L: int, r: int, k: int, d: int, device: str) -> Iterator[Work]:
    """The outer factors of all pairs, k directions each: products, map, and a step through it under "polar"."""
    given, none = bucket([(L, d, 1), (L, d, 2)], r, device), torch.zeros((), device=device)
    V = cosine_rows(k, d).float().to(device).expand(L, k, d).contiguous()
    for s in given:
        s.basis, s.matrix = (V if s.rank_dim == 1 else V.mT.contiguous()), None
    G = torch.cat([torch.stack(s.grads if s.rank_dim == 1 else [g.mT for g in s.grads]) for s in given])
    products = torch.cat((G @ G.mT, G @ torch.cat((V, V)).mT), 2).contiguous()
    mu = torch.ones(2 * L, k, device=device)
    width = torch.full((2 * L,), float(d), device=device)
    numbers = (products, mu, mu.sum(1) + 1, width, 0.95, 0.1, none)
    plan = functools.cache(lambda: planned("polar", given))
    M = REFERENCE["outer_map"](*numbers)[0]
    small, wide = 4 * 2 * L * (r * (r + k) + (r + k) ** 2), 4 * 2 * L * d

    def step() -> None:
        plan().take_outer(M)
        plan().step(none)

    yield "outer_products", "plan", wide * (r + k), lambda: plan().outer_products()
    yield "outer_products", "torch", wide * (r + k), lambda: [G[:L] @ V.mT, G[L:] @ V.mT, G @ G.mT]
    yield "outer_map", "kernel", small, lambda: kernels.OPS["outer_map"](*numbers)
    yield "outer_map", "reference", small, lambda: REFERENCE["outer_map"](*numbers)
    # beside the 36 of "polar" V is read and written
    yield "polar_update, outer factors", "plan", wide * (9 * r + 2 * k), step


def moments(r: int, tokens: int, device: str) -> Iterator[Work]:
    """The Gram matrices of one block of seven linears: u and d of each."""
    zs = [torch.randn(tokens, r, device=device, dtype=torch.bfloat16) for _ in range(14)]
    sums, index = torch.zeros(14, r, r, device=device), list(range(14))
    moved = sum(z.numel() * 2 for z in zs)
    yield "gram_add_", "kernel", moved, lambda: kernels.OPS["gram_add_"](sums, index, zs)
    yield "gram_add_", "reference", moved, lambda: REFERENCE["gram_add_"](sums, index, zs)
    yield "gram_add_", "torch", moved, lambda: [z.mT @ z for z in zs]
    S, S_new = factors(14, r, device), factors(14, r, device)
    t = torch.ones(14, dtype=torch.int64, device=device)
    for name in ("kernel", "reference"):
        yield "ema_", name, 3 * S.numel() * 4, lambda name=name: _ops(name)["ema_"](S, S_new, t, 0.95)
    yield "ema_", "torch", 3 * S.numel() * 4, lambda: S.lerp_(S_new, 0.05)


def _ops(name: str) -> Any:
    return kernels.OPS if name == "kernel" else REFERENCE


def all_of(L: int, r: int, d: int, tokens: int, device: str) -> Iterator[Work]:
    """Everything at one rank."""
    yield from inverses(L, r, device)
    yield from updates(L, r, d, device)
    yield from whole(L, r, d, device)
    yield from outer(L, r, 16, d, device)
    yield from moments(r, tokens, device)
