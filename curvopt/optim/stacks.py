"""Matrices of equal shape kept as one stack: state is a stacked tensor, and what ``optimizer.state`` holds are views.

Batched work needs stacks; checkpoints, users and torch want one tensor per parameter. Both are true at once here:
``state[p]["exp_avg"]`` is row i of the stack's ``exp_avg``, so in-place reads and writes through either agree. Where
parameters are DTensors the stack holds this process's pieces, and what ``optimizer.state`` holds are DTensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from curvopt.distributed import Shards, local, shards_of
from curvopt.functional import compute_dtype
from curvopt.functional.basis import carry_first, carry_second
from curvopt.functional.truncate import truncate_
from curvopt.functional.update import Hyper, Slab, apply_delta
from curvopt.lora import LoraPair


@dataclass(eq=False)
class Side:
    """One factor of one pair, as it stands in the optimizer.

    Attributes:
        pair: the pair it belongs to.
        name: ``"A"`` or ``"B"``.
        group: the param group that holds it.
        param: the parameter; refreshed by the owner when a framework replaced it.
        grad: its gradient in this step, read once.
    """

    pair: LoraPair
    name: str
    group: dict[str, Any]
    param: Tensor
    grad: Tensor | None = None

    @property
    def rank_dim(self) -> int:
        """Dimension of the rank in a stack of such matrices: 1 or 2."""
        return 1 + (self.pair.dim_A if self.name == "A" else self.pair.dim_B)

    def moment(self) -> str:
        """Return which second moment preconditions this side: "u" or "d"."""
        own = {"A": "d", "B": "u"} if self.group["sides"] == "kfac" else {"A": "u", "B": "d"}
        return own[self.name]

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return the 2-D view of a tensor shaped like the parameter."""
        return tensor if tensor.ndim == 2 else self.pair.matrix(self.name, tensor)

    def key(self) -> tuple[Any, ...]:
        """Return what sides must share to be stacked."""
        p, observable, shards = self.param, self.pair.signal is not None, self.shards
        shape = tuple(p.shape if shards else self.matrix(p).shape)
        how = (shards.mesh, shards.placements) if shards else None
        return (id(self.group), self.name, shape, p.stride(), self.rank_dim, p.dtype, p.device, observable, how)

    @property
    def shards(self) -> Shards | None:
        """How the parameter is split over processes now; None for a plain tensor."""
        return shards_of(self.param, self.rank_dim - 1, f"{self.name} of {self.pair.name}")


@dataclass(eq=False)
class Stack:
    """Sides of one key and one history of gradients.

    Attributes:
        sides: the L sides.
        state: stacked state ``[L, ...]`` by key, and the shared 0-d ``step`` and ``skipped``.
        grads: gradients of this step, ``[L, m, n]`` in the compute dtype, or a list of L matrices ``(m, n)`` as they
            came, where kernels read them so; meaningless between steps.
        shards: how the matrices are split over processes; None if they are plain tensors. Then ``state`` and ``grads``
            are pieces, with all of the rank; see `curvopt.distributed.Shards`.
    """

    sides: list[Side]
    state: dict[str, Tensor] = field(default_factory=dict)
    grads: Tensor | list[Tensor] = field(default_factory=lambda: torch.empty(0))
    shards: Shards | None = None
    _views: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)
    _delta: Tensor | None = None

    @property
    def group(self) -> dict[str, Any]:
        """The param group of the sides."""
        return self.sides[0].group

    @property
    def hyper(self) -> Hyper:
        """What AdamW takes from the group, as it is now."""
        g = self.group
        return Hyper(g["lr"], g["betas"][0], g["betas"][1], g["eps"], g["weight_decay"], g["maximize"])

    @property
    def rank_dim(self) -> int:
        """Dimension of the rank in the stack."""
        return self.sides[0].rank_dim

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.sides[0].param.device

    @property
    def r(self) -> int:
        """Rank of the matrices."""
        return self.sides[0].pair.rank

    @property
    def width(self) -> int:
        """How many columns the matrices have beside the rank, over all processes."""
        return self.sides[0].param.numel() // self.r

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of r×r state and of the arithmetic."""
        return compute_dtype(self.sides[0].param.dtype)

    @property
    def matrices(self) -> list[Tensor]:
        """What this process holds of the parameters as 2-D views, for use under no_grad."""
        if self.shards is not None:
            return [s.matrix(local(s.param)) for s in self.sides]
        return [s.matrix(s.param) for s in self.sides]

    def weights(self) -> Tensor:
        """Return copies of the parameters, ``[L, m, n]`` like ``grads``, in their own dtype."""
        if self.shards is not None:
            return self._pieces(self.shards, [s.param for s in self.sides])
        return torch.stack(self.matrices)

    def assign(self, X: Tensor) -> None:
        """Write ``[L, m, n]``, as `weights` gives them, into the parameters."""
        if self.shards is not None:
            X = self._as_held(X.to(self.sides[0].param.dtype))
        torch._foreach_copy_(self.matrices, X.unbind())

    @property
    def live(self) -> bool:
        """Whether the sides have gradients in this step: all do, or none."""
        return self.sides[0].grad is not None

    def bind(self, states: dict[Tensor, dict[str, Any]], small: dict[str, Tensor]) -> None:
        """Stack the state of the sides, taking over what ``states`` has, and put views of it back there.

        Args:
            states: the optimizer's ``state``.
            small: prototype of each further per-matrix tensor, without the leading L.
        """
        first = self.sides[0]
        self.shards = shards = first.shards
        like = first.matrix(torch.empty_like(first.param) if shards is None else shards.new_piece(first.param))
        prototypes = {"exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like), **small}
        for key, prototype in prototypes.items():
            found = [states.get(s.param, {}).get(key) for s in self.sides]
            moment = key.startswith("exp_avg")
            rows = [self._row(value, s, prototype, moment) for s, value in zip(self.sides, found, strict=True)]
            self.state[key] = torch.stack(rows)
        for key in ("step", "skipped"):
            value = states.get(first.param, {}).get(key, 0.0)
            self.state[key] = torch.as_tensor(value, dtype=torch.float32).to(self.device, copy=True)
        for i, s in enumerate(self.sides):
            state = states[s.param]
            for key in prototypes:
                row = self.state[key][i]
                state[key] = self._of_param(row, s.param) if key.startswith("exp_avg") else row
            state.update(step=self.state["step"], skipped=self.state["skipped"])
        self._views = [(states[s.param], states[s.param]["exp_avg"]) for s in self.sides]

    def bound(self, states: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether ``states`` still holds this stack's own views.

        Looks up the first side only: hashing every parameter would cost as much as a small step.
        """
        own = self._views[0][0]
        return states.get(self.sides[0].param) is own and all(
            state.get("exp_avg") is view for state, view in self._views
        )

    @property
    def stacked_grads(self) -> Tensor:
        """The gradients of this step as ``[L, m, n]`` in the compute dtype."""
        return torch.stack(self.grads).to(self.compute_dtype) if isinstance(self.grads, list) else self.grads

    def load_grads(self, grad_scale: Tensor | None, listed: bool = False) -> None:
        """Stack this step's gradients in the compute dtype, divided by the loss scale if there is one.

        ``listed`` leaves them where they are, if nothing has to be done to them.
        """
        if listed and self.shards is None and grad_scale is None:
            self.grads = [s.matrix(s.grad) for s in self.sides if s.grad is not None]
            return
        if isinstance(self.grads, list):
            self.grads = torch.empty(0)
        if self.shards is not None:
            grads = self._pieces(self.shards, [s.grad for s in self.sides if s.grad is not None])
            self.grads = grads.to(self.compute_dtype)
        elif (grads := [s.matrix(s.grad) for s in self.sides if s.grad is not None])[0].dtype == self.compute_dtype:
            self.grads = torch.stack(grads, out=self.grads) if self.grads.numel() else torch.stack(grads)
        else:
            self.grads = torch.stack(grads).to(self.compute_dtype)
        if grad_scale is not None:
            self.grads.div_(grad_scale.to(self.device))

    def release_grads(self) -> None:
        """Let go of gradients; on the CPU the stack stays, since pages given back would have to be faulted in again."""
        for side in self.sides:
            side.grad = None
        if self.device.type != "cpu":
            self.grads = torch.empty(0)

    def carry(self, R: Tensor, k: Tensor | None = None) -> None:
        """Map both moments by R ``[L, r, r]``, a map of gradients, and zero directions ≥ k."""
        for key, carried in (("exp_avg", carry_first), ("exp_avg_sq", carry_second)):
            X = carried(R, self.state[key].to(self.compute_dtype), self.rank_dim)
            self.state[key].copy_(X if k is None else truncate_(X, k, self.rank_dim))

    def slab(self, matrix: Tensor | None, spare: Tensor | None) -> Slab:
        """Return this stack as the update rules take it; `finish` what they leave.

        Matrices split along their rank are not at hand in the layout of the state: the rule then works on zeros, and
        what it adds to them is the update.
        """
        s, shards, hyper, params = self.state, self.shards, self.hyper, self.matrices
        if shards is not None and shards.crossed:
            self._delta = torch.zeros_like(self.stacked_grads)
            params, hyper = list(self._delta.unbind()), replace(hyper, weight_decay=0.0)
        return Slab(
            params=params,
            grads=self.grads,
            exp_avg=s["exp_avg"],
            exp_avg_sq=s["exp_avg_sq"],
            step=s["step"],
            rank_dim=self.rank_dim,
            matrix=matrix,
            hyper=hyper,
            spare=spare,
            reduce=shards.sum_ if shards is not None and self.group.get("update") in ("momentum", "polar") else None,
        )

    def finish(self, found_inf: Tensor) -> None:
        """Bring an update that `slab` had made elsewhere to the parameters, and let go of the gradients."""
        if self._delta is not None:
            apply_delta(self.matrices, self.hyper, self._as_held(self._delta), found_inf)
            self._delta = None
        self.release_grads()

    def _pieces(self, shards: Shards, tensors: list[Tensor]) -> Tensor:
        """Stack tensors shaped like the parameters in the layout of the state, as matrices."""
        X = shards.load(tensors)
        return X.view(len(X), *self.sides[0].matrix(X[0]).shape)

    def _as_held(self, X: Tensor) -> Tensor:
        """Return a stack in the layout of the state in that of the parameters, both as matrices."""
        if self.shards is None or not self.shards.crossed:
            return X
        X = self.shards.unload(X.view(len(X), *self.shards.work_shape))
        return X.view(len(X), *self.sides[0].matrix(X[0]).shape)

    def _of_param(self, row: Tensor, p: Tensor) -> Tensor:
        """Return a matrix of the stack with the shape of the parameter; rows hold the parameter's memory order."""
        if self.shards is not None:
            return self.shards.wrap(row)
        return row if p.ndim == 2 else row.as_strided(p.shape, p.stride(), row.storage_offset())

    def _row(self, value: Tensor | None, side: Side, prototype: Tensor, moment: bool) -> Tensor:
        """Return what was saved for one side, or its prototype, as a row of the stack."""
        p = side.param
        if value is None:
            return prototype.to(p.device)
        value = value.to(p.device, prototype.dtype)
        if not moment:
            return local(value)
        if self.shards is not None:
            return side.matrix(self.shards.piece(value).contiguous())
        return side.matrix(torch.empty_like(p, dtype=value.dtype).copy_(value))


def partition(sides: Iterable[Side], states: dict[Tensor, dict[str, Any]]) -> list[Stack]:
    """Group sides that share a key and a number of updates into unbound stacks."""
    stacks: dict[tuple[Any, ...], Stack] = {}
    for side in sides:
        step = states.get(side.param, {}).get("step")
        key = (*side.key(), -1 if step is None else int(step))
        stacks.setdefault(key, Stack([])).sides.append(side)
    return list(stacks.values())
