"""Matrices of equal shape kept as one stack: state is a stacked tensor, and what ``optimizer.state`` holds are views.

Batched work needs stacks; checkpoints, users and torch want one tensor per parameter. Both are true at once here:
``state[p]["exp_avg"]`` is row i of the stack's ``exp_avg``, so in-place reads and writes through either agree.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvopt.functional import compute_dtype
from curvopt.functional.basis import carry_first, carry_second
from curvopt.functional.truncate import truncate_
from curvopt.functional.update import Hyper, Slab
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
        p, observable = self.param, self.pair.signal is not None
        shape = tuple(self.matrix(p).shape)
        return (id(self.group), self.name, shape, p.stride(), self.rank_dim, p.dtype, p.device, observable)


@dataclass(eq=False)
class Stack:
    """Sides of one key and one history of gradients.

    Attributes:
        sides: the L sides.
        state: stacked state ``[L, ...]`` by key, and the shared 0-d ``step`` and ``skipped``.
        grads: ``[L, m, n]`` gradients of this step in the compute dtype; meaningless between steps.
    """

    sides: list[Side]
    state: dict[str, Tensor] = field(default_factory=dict)
    grads: Tensor = field(default_factory=lambda: torch.empty(0))
    _views: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)

    @property
    def group(self) -> dict[str, Any]:
        """The param group of the sides."""
        return self.sides[0].group

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
    def compute_dtype(self) -> torch.dtype:
        """Dtype of r×r state and of the arithmetic."""
        return compute_dtype(self.sides[0].param.dtype)

    @property
    def matrices(self) -> list[Tensor]:
        """The parameters as 2-D views, for use under no_grad."""
        return [s.matrix(s.param) for s in self.sides]

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
        like = first.matrix(torch.empty_like(first.param))
        prototypes = {"exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like), **small}
        for key, prototype in prototypes.items():
            rows = [self._row(states.get(s.param, {}).get(key), s, prototype) for s in self.sides]
            self.state[key] = torch.stack(rows)
        for key in ("step", "skipped"):
            value = states.get(first.param, {}).get(key, 0.0)
            self.state[key] = torch.as_tensor(value, dtype=torch.float32).to(self.device, copy=True)
        for i, s in enumerate(self.sides):
            state = states[s.param]
            for key in prototypes:
                row = self.state[key][i]
                state[key] = _like_param(row, s.param) if key.startswith("exp_avg") else row
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

    def load_grads(self, grad_scale: Tensor | None) -> None:
        """Stack this step's gradients in the compute dtype, divided by the loss scale if there is one."""
        grads = [s.matrix(s.grad) for s in self.sides if s.grad is not None]
        if grads[0].dtype == self.compute_dtype:
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
        """Return this stack as the update rules take it."""
        g, s = self.group, self.state
        return Slab(
            params=self.matrices,
            grads=self.grads,
            exp_avg=s["exp_avg"],
            exp_avg_sq=s["exp_avg_sq"],
            step=s["step"],
            rank_dim=self.rank_dim,
            matrix=matrix,
            hyper=Hyper(g["lr"], g["betas"][0], g["betas"][1], g["eps"], g["weight_decay"], g["maximize"]),
            spare=spare,
        )

    @staticmethod
    def _row(value: Tensor | None, side: Side, prototype: Tensor) -> Tensor:
        p = side.param
        if value is None:
            return prototype.to(p.device)
        value = value.to(p.device, prototype.dtype)
        if value.shape != p.shape:
            return value
        return side.matrix(torch.empty_like(p, dtype=value.dtype).copy_(value))


def _like_param(row: Tensor, p: Tensor) -> Tensor:
    """Return a matrix of the stack with the shape of the parameter; rows hold the parameter's memory order."""
    return row if p.ndim == 2 else row.as_strided(p.shape, p.stride(), row.storage_offset())


def partition(sides: Iterable[Side], states: dict[Tensor, dict[str, Any]]) -> list[Stack]:
    """Group sides that share a key and a number of updates into unbound stacks."""
    stacks: dict[tuple[Any, ...], Stack] = {}
    for side in sides:
        step = states.get(side.param, {}).get("step")
        key = (*side.key(), -1 if step is None else int(step))
        stacks.setdefault(key, Stack([])).sides.append(side)
    return list(stacks.values())


def sliced(side: Side, state: dict[str, Any], k: int) -> dict[str, Any]:
    """Return copies of a parameter's state cut to its first k directions."""
    r, cut = side.pair.rank, {}
    for key, value in state.items():
        if key.startswith("exp_avg"):
            value = value.narrow(side.rank_dim - 1, 0, k)
        elif value.shape == (r, r):
            value = value[:k, :k]
        cut[key] = value.clone()
    return cut


class Scratch:
    """One buffer that all stacks of a device work in, one after the other."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, X: Tensor) -> Tensor | None:
        """Return a buffer shaped like ``X``; None off the CPU, where torch's allocator keeps memory itself."""
        if X.device.type != "cpu":
            return None
        flat = self._flat.get((X.device, X.dtype))
        if flat is None or flat.numel() < X.numel():
            flat = self._flat[X.device, X.dtype] = X.new_empty(X.numel())
        return flat[: X.numel()].view(X.shape)
