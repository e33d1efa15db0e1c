"""What crosses processes: the r×r sums, in one flat all-reduce."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of processes of ``group`` (the default group if None); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sums(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum ``tensors`` over the processes of ``group`` in place, in one collective per device and dtype.

    Every process must pass the same number of tensors of the same shapes in the same order. Sends
    ``Σ numel · itemsize`` bytes per process, ring overhead aside: 224 pairs of rank 16 are 0.46 MB in float32.
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
