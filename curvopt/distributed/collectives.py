"""Batched all-reduces."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.distributed.shards import local
from curvopt.functional import any_nonfinite

COUNT = 2**12  # row counts travel as two digits of this base: exact in float32 over as many processes


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of processes of ``group`` (the default group if None); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def process_index(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in ``group`` (the default group if None); 0 without torch.distributed."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sums(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum ``tensors`` over the processes of ``group`` in place, in one collective per device and dtype.

    Every process must pass the same number of tensors of the same shapes in the same order. The payload is
    ``Σ numel · itemsize`` bytes.
    """
    if world_size(group) == 1:
        return
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        buckets.setdefault((t.device, t.dtype), []).append(t)
    for bucket in buckets.values():
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        torch._foreach_copy_(
            bucket, [f.view_as(t) for f, t in zip(flat.split([t.numel() for t in bucket]), bucket, strict=True)]
        )


def all_reduce_grams(
    grams: Sequence[Tensor], group: dist.ProcessGroup | None = None, counts: Tensor | None = None
) -> Any:
    """Sum symmetric matrices over the processes of ``group`` in place, and row counts with them.

    Only their lower triangles travel: 224 pairs with two factors of rank 16 are 0.25 MB in float32.

    Args:
        grams: ``[..., r, r]`` symmetric to rounding; afterwards symmetric to the bit.
        group: the processes; None for the default group.
        counts: ``[P]`` float64 on the device of the first matrix, summed too: whole numbers exactly, below 2³⁶.

    Returns:
        The summed counts; None without ``counts``.
    """
    if world_size(group) == 1:
        return counts
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for G in grams:
        buckets.setdefault((G.shape, G.device, G.dtype), []).append(G)
    stacks = [torch.stack(bucket) for bucket in buckets.values()]
    corners = [torch.tril_indices(X.shape[-1], X.shape[-1], device=X.device).unbind() for X in stacks]
    packed = [X[..., i, j] for X, (i, j) in zip(stacks, corners, strict=True)]
    digits = []
    if counts is not None:
        digits = [torch.stack([counts % COUNT, torch.floor(counts / COUNT)]).to(grams[0].dtype)]
    all_reduce_sums([*packed, *digits], group)
    for bucket, X, (i, j), flat in zip(buckets.values(), stacks, corners, packed, strict=True):
        X[..., i, j] = flat
        X[..., j, i] = flat
        torch._foreach_copy_(bucket, X.unbind())
    if counts is None:
        return None
    low, high = digits[0].double()
    return low + high * COUNT


def agreed(
    flags: dict[torch.device, Tensor], grads: Sequence[Tensor | None], groups: Sequence[Any]
) -> dict[torch.device, Tensor]:
    """Return flags of non-finite gradients, 0-d float32 by device, that are 1 on all devices and processes if on any.

    Args:
        flags: by device, 1 if a gradient that was looked at already is not finite.
        grads: further gradients to look at, plain or sharded.
        groups: every process of these must call, with a flag, whether it has gradients or not.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for X in map(local, grads):
        if X is not None:
            by_device.setdefault(X.device, []).extend([X.detach()] if X.numel() > 0 else [])
    for device, tensors in by_device.items():
        found = any_nonfinite(tensors).float() if tensors else torch.zeros((), device=device)
        flags[device] = torch.maximum(flags[device], found) if device in flags else found
    if not flags:
        return {}
    if len(flags) > 1:
        for device in flags:
            flags[device] = torch.stack([f.to(device) for f in flags.values()]).amax()
    if groups:
        flag = next(iter(flags.values()))
        for group in groups:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        flags = {device: flag.to(device) for device in flags}
    return flags
