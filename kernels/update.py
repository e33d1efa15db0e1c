"""The update rules over any slabs: the reference's signature, for callers that keep no plan.

Slabs are sorted into buckets, and every bucket is planned, loaded and stepped once. Making a plan costs more than a
step: who takes more than one keeps an `UpdatePlan`. Slabs that share ``step`` are one update: it advances once.
Beyond the reference's arguments a slab of any rule may have ``k``, ``[L]`` int64 live ranks: the other directions of
the parameter and both moments become exactly zero. What `supports` refuses falls back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .buckets import MODES, bucket_of, has, plan_supports
from .plan import UpdatePlan

Update = Callable[[Sequence[Any], Tensor], None]


def _op(rule: str) -> tuple[Update, Callable[..., bool]]:
    def update(slabs: Sequence[Any], found_inf: Tensor) -> None:
        for bucket in _buckets(rule, slabs):
            plan = UpdatePlan(rule, bucket)
            plan.load([g for s in bucket for g in s.grads])
            if has(bucket[0], "basis"):
                plan.take_outer(torch.cat([s.outer for s in bucket]))
            plan.step(found_inf)

    def supports(slabs: Sequence[Any], found_inf: Tensor) -> bool:
        return (
            bool(slabs)
            and found_inf.dtype.is_floating_point
            and all(s.exp_avg.device == found_inf.device and plan_supports(rule, [s]) for s in slabs)
        )

    return update, supports


def _buckets(rule: str, slabs: Sequence[Any]) -> list[list[Any]]:
    found: dict[tuple[Any, ...], list[Any]] = {}
    for s in slabs:
        found.setdefault(bucket_of(rule, s), []).append(s)
    return list(found.values())


OPS: dict[str, tuple[Update, Callable[..., bool]]] = {f"{rule}_update": _op(rule) for rule in MODES}
