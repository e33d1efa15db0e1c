"""Which slabs are one bucket, and which buckets the kernels take."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import inverse, launch
from .update_tiles import ADAM, EIGEN, GRAFT, MOMENTS, POLAR, ROWS, WHITEN

# rule -> the modes of its launches over the tiles
MODES = {
    "polar": (POLAR,),
    "eigen": (EIGEN,),
    "adam": (ADAM,),
    "whiten": (WHITEN,),
    "momentum": (MOMENTS, GRAFT),
    "row": (ROWS,),
}


def plan_supports(rule: str, slabs: Sequence[Any]) -> bool:
    """Return whether an `UpdatePlan` takes this bucket.

    It refuses slabs that differ in rank, dtypes, device, step, hyper-parameters or λ; float64, wrapper subclasses,
    non-contiguous tensors, pieces of matrices that other processes hold the rest of (``reduce``), ranks above 128.
    """
    if rule not in MODES or not slabs:
        return False
    device = slabs[0].exp_avg.device
    return (
        launch.runs_on(device)
        and len({bucket_of(rule, s) for s in slabs}) == 1
        and all(_fits(rule, s, device) for s in slabs)
    )


def bucket_of(rule: str, s: Any) -> tuple[Any, ...]:
    """Return what slabs must share to be one bucket."""
    h = s.hyper
    damping = _same(s.damping) if rule == "polar" else None
    hyper = (_same(h.lr), h.beta1, h.beta2, h.eps, h.weight_decay, h.maximize)
    dtypes = (s.params[0].dtype, s.grads[0].dtype, s.exp_avg.dtype, s.exp_avg_sq.dtype)
    k = s.basis.shape[s.rank_dim] if has(s, "basis") else 0
    return (s.exp_avg.shape[s.rank_dim], k, dtypes, s.exp_avg.device, s.step.data_ptr(), hyper, damping)


def _same(number: float | Tensor) -> tuple[bool, float]:
    """Return what is equal for numbers that are known to be equal on the host."""
    return (True, number.data_ptr()) if isinstance(number, Tensor) else (False, float(number))


def _fits(rule: str, s: Any, device: torch.device) -> bool:
    r, L = s.exp_avg.shape[s.rank_dim], len(s.params)
    widest = max(r, s.basis.shape[s.rank_dim]) if has(s, "basis") else r
    small = [s.step, *([s.matrix] if has(s, "matrix") else [])]
    ranks = [s.k] if has(s, "k") else []
    bases = [s.basis] if has(s, "basis") else []
    tensors = [*s.params, *s.grads, s.exp_avg, s.exp_avg_sq, *bases]
    return (
        not has(s, "reduce")  # pieces of matrices: their norms need the other processes
        and 0 < r <= launch.MAX_RANK
        and _shipped(rule, r, min(widest, launch.MAX_RANK), bool(bases))
        and 0 < s.exp_avg[0].numel() < 2**31
        and s.exp_avg.dtype == s.exp_avg_sq.dtype
        and all(t.device == device for t in (s.exp_avg, *small, *ranks))
        and all(p.dtype == s.params[0].dtype for p in s.params)
        and all(x.shape == s.exp_avg.shape[1:] for x in (*s.params, *s.grads))
        and len(s.grads) == L == s.exp_avg.shape[0]
        and launch.plain(tensors)
        and launch.plain(small, (torch.float32,))
        and (not ranks or launch.plain(ranks, (torch.int64,)))
        and all(_spans(s, V) for V in bases)
        and (not on_device(s.hyper.lr) or _scalar(s.hyper.lr, device))
        and (rule != "polar" or inverse.damps(s.damping, device))
    )  # fmt: skip


def _shipped(rule: str, r: int, widest: int, outer: bool) -> bool:
    """Return whether this device has all kernels of a plan."""
    wide = launch.padded(widest, 16)
    needs = [("update", wide), ("polar", wide), ("nonfinite", 0), ("total", 0)]
    needs += [("root", launch.padded(r, 16))] if rule == "polar" else []
    needs += [("outer", wide)] if outer else []
    return all(launch.config(op, rp) is not None for op, rp in needs)


def _spans(s: Any, V: Tensor) -> bool:
    """Return whether V has at most as many directions as the kernels take, of the length of the matrices."""
    across = 3 - s.rank_dim
    return (
        len(V) == len(s.params)
        and V.shape[across] == s.exp_avg.shape[across]
        and V.dtype == s.exp_avg.dtype
        and 0 < V.shape[s.rank_dim] <= launch.MAX_RANK
    )


def on_device(lr: float | Tensor) -> bool:
    """Return whether a learning rate is read by the kernel; a CPU tensor is read on the host."""
    return isinstance(lr, Tensor) and launch.runs_on(lr.device)


def _scalar(lr: Tensor, device: torch.device) -> bool:
    return lr.device == device and launch.plain([lr], (torch.float32,))


def has(s: Any, name: str) -> bool:
    """Return whether a slab has something of this name; slabs of "row" lack some."""
    return getattr(s, name, None) is not None
