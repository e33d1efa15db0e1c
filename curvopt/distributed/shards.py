"""Tensors that are split over processes: telling them, and working on matrices that are split along their rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(t: Any) -> "TypeGuard[DTensor]":
    """Whether ``t`` is a DTensor, replicated or split. Plain tensors are told by their type, without an import."""
    if type(t) in (Tensor, nn.Parameter):
        return False
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def local(t: Any) -> Any:
    """Return what this process holds of ``t``, sharing its memory; under no_grad. ``t`` itself if it is plain."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Any) -> Any:
    """Return all of ``t`` in every process that shares it, detached; ``t`` itself, detached, if it is plain.

    All of these processes must call.
    """
    held: Any = t.detach()
    return held.full_tensor() if is_sharded(t) else held


def placed_like(p: Tensor, value: Tensor, of_first: bool = False) -> Tensor:
    """Return a whole tensor placed as ``p`` is; as it is where ``p`` is plain.

    Args:
        p: a parameter.
        value: of its shape. The same in every process, and then nothing is sent, unless ``of_first``.
        of_first: take that of the first process of the mesh.
    """
    if not is_sharded(p) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    source = 0 if of_first else None
    placed: Tensor = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=source)
    return placed


def used_directions(params: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """Return for each tensor ``[r]`` booleans, which slices along its dimension have an entry that is not zero.

    All processes that share the tensors must call; they get the same.
    """
    found = []
    for p, dim in zip(params, dims, strict=True):
        held = (local(p.detach()) != 0).movedim(dim, 0).flatten(1).any(1)
        shards = shards_of(p, dim, "a tensor")
        if shards is not None:
            used = held.new_zeros(p.shape[dim], dtype=torch.float32)
            used.narrow(0, shards.first(dim), len(held)).copy_(held)
            shards.sum_(used)
            held = used > 0
        found.append(held)
    return found


def reshard(model: nn.Module | None) -> None:
    """Let FSDP2 put its sharded parameters in place, where the unsharded ones of the last forward still are."""
    if model is None or not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def groups_of(params: Iterable[Tensor]) -> list[Any]:
    """Return the process groups over which any of ``params`` is split, in order of appearance."""
    found: list[Any] = []
    for p in params:
        if is_sharded(p):
            split = [p.device_mesh.get_group(i) for i, at in enumerate(p.placements) if not at.is_replicate()]
            found += [group for group in split if not any(group is other for other in found)]
    return found


@dataclass(frozen=True)
class Shards:
    """How a matrix parameter is split over processes, and where its state and its arithmetic are.

    The arithmetic mixes along the rank only. A matrix split along another dimension is worked on as it lies; one that
    is split along its rank is worked on split along its other dimension, where its state is too.

    Attributes:
        mesh: the device mesh.
        placements: of the parameter.
        shape: of the whole parameter.
        split: the dimension of the parameter that is split; None if every process holds all of it.
        work: the dimension that is split in the state; equal to ``split`` unless that is the rank.
        mesh_dim: the mesh dimension it is split over; 0 if none.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]
    split: int | None
    work: int | None
    mesh_dim: int

    @property
    def sharded_on_rank(self) -> bool:
        """Whether the parameter is split along its rank."""
        return self.split != self.work

    @property
    def group(self) -> Any:
        """The processes that share one matrix; None if each has all of it."""
        return None if self.split is None else self.mesh.get_group(self.mesh_dim)

    @property
    def work_shape(self) -> tuple[int, ...]:
        """Shape of this process's piece of the state."""
        if self.work is None:
            return self.shape
        me = self.mesh.get_local_rank(self.mesh_dim)
        return tuple(self._cuts(i)[me] if i == self.work else n for i, n in enumerate(self.shape))

    @property
    def offset(self) -> int:
        """Where this process's piece of the state begins along ``work``."""
        return 0 if self.work is None else self._begin(self.work)

    def first(self, dim: int) -> int:
        """Return where this process's piece of the parameter begins along a dimension."""
        return self._begin(dim) if dim == self.split else 0

    def _begin(self, dim: int) -> int:
        return sum(self._cuts(dim)[: self.mesh.get_local_rank(self.mesh_dim)])

    def _cuts(self, dim: int) -> list[int]:
        """Return how many entries along ``dim`` each process has, as ``torch.chunk`` deals them out."""
        n, parts = self.shape[dim], self.mesh.size(self.mesh_dim)
        size = -(-n // parts)
        return [max(0, min(size, n - i * size)) for i in range(parts)]

    def load(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return parameters or gradients as a stack ``[L, *work_shape]``."""
        return self._exchange(torch.stack([self._aligned(t) for t in tensors]), self.split, self.work)

    def unload(self, X: Tensor) -> Tensor:
        """Return a stack ``[L, *work_shape]`` split as the parameters are: the inverse of `load`."""
        return self._exchange(X, self.work, self.split)

    def piece(self, whole: Tensor) -> Tensor:
        """Return this process's ``work_shape`` of a tensor shaped like the parameter, whole or however sharded."""
        if is_sharded(whole):
            return local(whole.redistribute(self.mesh, self._working()))
        return whole if self.work is None else whole.narrow(self.work, self.offset, self.work_shape[self.work])

    def new_piece(self, p: Tensor) -> Tensor:
        """Return an uninitialised ``work_shape`` with the dtype of ``p``, on its device."""
        return torch.empty(self.work_shape, dtype=p.dtype, device=p.device)

    def wrap(self, piece: Tensor) -> Tensor:
        """Return ``work_shape`` as the DTensor it is a piece of, sharing memory."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        whole: Tensor = DTensor.from_local(
            piece.view(self.work_shape), self.mesh, self._working(),
            shape=torch.Size(self.shape), stride=stride, run_check=False,
        )  # fmt: skip
        return whole

    def columns(self, X: Tensor) -> Tensor:
        """Return this process's columns of ``[L, all columns]``: what all matrices have beside the rank, flattened."""
        if self.work is None:
            return X
        each = X.shape[1] // self.shape[self.work]
        return X.narrow(1, self.offset * each, self.work_shape[self.work] * each)

    def sum_(self, X: Tensor) -> None:
        """Sum a small tensor over the processes that share the matrices."""
        if self.group is not None:
            dist.all_reduce(X, group=self.group)

    def _working(self) -> list[Any]:
        from torch.distributed.tensor import Shard

        return [Shard(self.work) if self.work is not None and at.is_shard() else at for at in self.placements]

    def _aligned(self, t: Tensor) -> Tensor:
        if is_sharded(t) and t.placements != self.placements:
            t = t.redistribute(self.mesh, self.placements)
        return local(t)

    def _exchange(self, X: Tensor, held: int | None, wanted: int | None) -> Tensor:
        """Return a stack that is split along ``held`` split along ``wanted`` instead, in one all-to-all."""
        if held is None or wanted is None or held == wanted:
            return X
        me = self.mesh.get_local_rank(self.mesh_dim)
        pieces = X.split(self._cuts(wanted), dim=1 + wanted)
        shape = list(pieces[me].shape)
        shapes = [[*shape[: 1 + held], n, *shape[2 + held :]] for n in self._cuts(held)]
        sizes = [torch.Size(s).numel() for s in shapes]
        sent, got = torch.cat([p.reshape(-1) for p in pieces]), X.new_empty(sum(sizes))
        dist.all_to_all_single(got, sent, sizes, [p.numel() for p in pieces], group=self.group)
        return torch.cat([g.view(s) for g, s in zip(got.split(sizes), shapes, strict=True)], dim=1 + held)


def shards_of(p: Tensor, rank_dim: int, name: str) -> Shards | None:
    """Return how ``p`` is split; None for a plain tensor.

    Args:
        p: a parameter.
        rank_dim: its dimension that is the rank.
        name: what to call it in an error.

    Raises:
        ValueError: it is split more than once, or in a way other than whole slices of one dimension.
    """
    if not is_sharded(p):
        return None
    from torch.distributed.tensor import Replicate, Shard

    placements: tuple[Any, ...] = tuple(p.placements)
    split = [i for i, at in enumerate(placements) if not isinstance(at, Replicate)]
    if len(split) > 1 or any(type(placements[i]) is not Shard for i in split):
        raise ValueError(
            f"{name} must be split over one mesh dimension by one Shard, as fully_shard does, and replicated over the "
            f"others, got placements {placements}"
        )
    mesh, shape = p.device_mesh, tuple(p.shape)
    if not split:
        return Shards(mesh, placements, shape, None, None, 0)
    dim, work = placements[split[0]].dim % p.ndim, 1 if rank_dim == 0 else 0
    if dim not in (rank_dim, work):
        raise ValueError(f"{name} is split along dimension {dim}; it must be one of the first two")
    return Shards(mesh, placements, shape, dim, work, split[0])
