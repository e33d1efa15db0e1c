"""Every op once on small inputs against the reference it is given; used by ``python -m curvopt.kernels`` on a GPU."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import OPS


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
    grads: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    rank_dim: int
    matrix: Tensor | None
    spare: Tensor | None = None
    hyper: _Hyper = field(default_factory=_Hyper)


def run(reference: Mapping[str, Callable[..., Any]], device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Yield (op, largest error relative to the largest entry, allowed error) for every op."""
    L, r, d = 6, 16, 96
    g = torch.Generator().manual_seed(0)
    x = torch.randn(L, 4 * r, r, generator=g) / torch.arange(1, r + 1)
    S = (x.mT @ x).contiguous().to(device)
    k = torch.full((L,), r, device=device)
    for name in ("damped_inverse", "damped_inverse_root"):
        yield name, _error(OPS[name](S, 1e-2, k), reference[name](S.double(), 1e-2, k)), 1e-4
    Q, _ = OPS["eigenbasis"](S, k)
    rotated = Q.double().mT @ S.double() @ Q.double()
    yield "eigenbasis", _error(torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), rotated), 1e-5
    for name in ("adam_update", "eigen_update", "whiten_update", "momentum_update"):
        ours, theirs = ([_slab(side, L, r, d, device) for side in (1, 2)] for _ in range(2))
        for op, slabs in ((OPS[name], ours), (reference[name], theirs)):
            op(slabs, torch.zeros((), device=device))
        pairs = zip(ours, theirs, strict=True)
        yield name, max(_error(torch.stack(a.params), torch.stack(b.params)) for a, b in pairs), 1e-5
    z = x[0].contiguous().to(device)
    yield "gram", _error(OPS["gram"](z), reference["gram"](z.double())), 1e-5
    for name, extra in (("truncate_", (k // 2, 2)), ("scale_rows_", (torch.arange(r, device=device) + 0.5, 2))):
        X = torch.randn(L, d, r, generator=g).to(device)
        yield name, _error(OPS[name](X.clone(), *extra), reference[name](X.clone(), *extra)), 1e-6
    ours_S, theirs_S = S.clone(), S.clone()
    for op, T in ((OPS["ema_"], ours_S), (reference["ema_"], theirs_S)):
        op(T, 2 * S, torch.full((L,), 3, device=device), 0.9)
    yield "ema_", _error(ours_S, theirs_S), 1e-6


def _slab(side: int, L: int, r: int, d: int, device: torch.device) -> _Slab:
    g = torch.Generator().manual_seed(side)
    shape = (L, r, d) if side == 1 else (L, d, r)
    p, grad, m = (torch.randn(shape, generator=g).to(device) for _ in range(3))
    Q = torch.linalg.qr(torch.randn(L, r, r, generator=g)).Q.contiguous().to(device)
    return _Slab(list(p.unbind()), grad, m, m.square(), torch.tensor(3.0, device=device), side, Q)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
