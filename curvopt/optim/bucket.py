"""Buckets: all sides of one group, rank, dtype, device and layout, whose step is decided once.

A bucket keeps the state of its sides in few tensors: both moments flat, r×r matrices as ``[T, r, r]``, numbers as
``[T]``. What ``optimizer.state`` holds are views of these, so checkpoints and users see one tensor per parameter, and
in-place writes through either agree. Sides of one shape are neighbours, a *block*: on the CPU work of width d goes by
blocks, on a device all of a bucket is one launch. Where parameters are DTensors a bucket holds this process's pieces,
and what ``optimizer.state`` holds are DTensors.

`BucketedOptimizer` keeps buckets in line with which sides have gradients, state and addresses now. Usually nothing has
changed, and finding that out is all that a step spends on it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from curvopt.distributed import Shards, agreed, all_reduce_grams, local
from curvopt.functional import compute_dtype, rank_gram
from curvopt.functional.outer import cosine_rows
from curvopt.functional.plan import mapped
from curvopt.functional.update import Hyper, Undecayed, apply_delta
from curvopt.optim.base import PairedOptimizer, Side, check_dense
from curvopt.optim.checking import as_scalar

State = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq")
BASIS = "outer_basis"
FULL = "full"
PERIODIC = ("factor_every", "inverse_every", "reproject_every")
_grad_of = attrgetter("grad")


@dataclass(eq=False)
class Block:
    """Neighbours of one shape in a bucket.

    Attributes:
        sides: the L sides.
        rows: where they are among the bucket's T.
        shards: how the matrices are split over processes; None for plain tensors. The moments then are this process's
            pieces, with all of the rank; see `curvopt.distributed.Shards`.
        wide: state as wide as the parameters by key, ``[L, m, n]`` views of flat tensors of the bucket; of the basis
            of the outer factors ``[L, k, n]`` or ``[L, m, k]``.
    """

    sides: list[Side]
    rows: slice
    shards: Shards | None
    wide: dict[str, Tensor] = field(default_factory=dict)

    @property
    def exp_avg(self) -> Tensor:
        """First moments ``[L, m, n]``."""
        return self.wide["exp_avg"]

    @property
    def exp_avg_sq(self) -> Tensor:
        """Second moments ``[L, m, n]``."""
        return self.wide["exp_avg_sq"]

    @property
    def basis(self) -> Tensor | None:
        """V of the outer factors ``[L, k, n]`` or ``[L, m, k]``; None without them."""
        return self.wide.get(BASIS)

    @property
    def full(self) -> Tensor | None:
        """The parameters ``[L, m, n]`` where the module holds no more than a part of them; None elsewhere."""
        return self.wide.get(FULL)

    @property
    def rank_dim(self) -> int:
        """Dimension of the rank in the block: 1 or 2."""
        return self.sides[0].rank_dim

    @property
    def width(self) -> int:
        """How many columns the matrices have beside the rank, over all processes."""
        side = self.sides[0]
        return side.param.numel() // side.pair.rank

    def matrices(self) -> list[Tensor]:
        """Return what this process holds of the parameters as 2-D views of their memory."""
        return [s.matrix(local(s.param).detach()) for s in self.sides]

    def weights(self) -> Tensor:
        """Return copies of the parameters ``[L, m, n]`` in the layout of the state, in their own dtype."""
        return torch.stack(self.pieces([s.param.detach() for s in self.sides]))

    def assign(self, X: Tensor) -> None:
        """Write ``[L, m, n]``, as `weights` gives them, into the parameters."""
        held = self.as_held(X.to(self.sides[0].param.dtype))
        torch._foreach_copy_(self.matrices(), list(held.unbind()))

    def pieces(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return tensors shaped like the parameters as L matrices in the layout of the state."""
        if self.shards is None:
            return [s.matrix(t) for s, t in zip(self.sides, tensors, strict=True)]
        X = self.shards.load(tensors)
        return list(X.view(len(X), *self.sides[0].matrix(X[0]).shape).unbind())

    def as_held(self, X: Tensor) -> Tensor:
        """Return ``[L, m, n]`` in the layout of the state as a stack in that of the parameters."""
        if self.shards is None or not self.shards.sharded_on_rank:
            return X
        X = self.shards.unload(X.view(len(X), *self.shards.work_shape))
        return X.view(len(X), *self.sides[0].matrix(X[0]).shape)


class Bucket:
    """Sides that share a step.

    Args:
        sides: T sides of one `bucket_key` and one history of steps.
        states: the optimizer's ``state``; what it has of the sides is taken over, and views are put back.
        small: gives the r×r and counting state of a side: prototypes by key, without the leading T.
        wide: keys of the state that is as large as the parameters, zero at first.
        outer_rank: k, how many directions of the outer factors are kept; 0 for none.
        traits: what the optimizer wants its sides to share besides, as its ``_traits`` says.

    Attributes:
        sides: the T sides, those of one shape neighbours.
        blocks: runs of one shape.
        live: whether the sides have gradients in this step.
        mixed: whether some of them have, and some have none.
        steps: steps with gradients so far.
        state: ``[T, ...]`` by key; the shared 0-d ``step`` and ``skipped``; and ``cadence`` ``[4]`` on the host: the
            number of steps with gradients, and at which of them each of `PERIODIC` was last done.
        grads: gradients of this step, one per side; empty between steps.
        slabs: the blocks as the rules take them, with the `Hyper` they share.
        plan: what runs the update of this step, chosen by `begin`.
        widths: ``[T]`` how many columns the matrices have beside the rank, over all processes.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        states: Mapping[Tensor, State],
        small: Callable[[Side], dict[str, Tensor]],
        wide: Sequence[str] = MOMENTS,
        outer_rank: int = 0,
        traits: Any = None,
    ) -> None:
        shapes: dict[tuple[Any, ...], list[Side]] = {}
        for s in sides:
            shapes.setdefault((s.name, s.rates, *s.param.shape, *s.param.stride()), []).append(s)
        self.sides = [s for block in shapes.values() for s in block]
        self.params = [s.param for s in self.sides]
        self._shapes = [p.shape for p in self.params]
        self.state: dict[str, Tensor] = {}
        self.blocks: list[Block] = []
        self.grads: list[Any] = []  # None for all sides of a bucket without gradients
        self.live = self.mixed = False
        first = self.sides[0]
        self.group, self.r, self.traits = first.group, first.pair.rank, traits
        self.outer_rank = outer_rank
        self.dtype, self.device = first.param.dtype, first.param.device
        self.compute_dtype = compute_dtype(self.dtype)
        self.hyper = Hyper(0.0, 0.0, 0.0, 0.0, 0.0)
        self.slabs: list[Any] = []
        self.plan: Any = None
        self._planned: Any = None  # what the plan was made for
        self._owed: list[tuple[int, float, float, Callable[[], float]]] = []
        self._addresses: list[int] = []
        self._plain = first.shards is None and all(p.ndim == 2 for p in self.params)
        self._bind(
            list(shapes.values()), states, small, dict.fromkeys(wide) | ({BASIS: outer_rank} if outer_rank else {})
        )
        widths = [float(block.width) for block in self.blocks for _ in block.sides]
        self.widths = torch.tensor(widths, dtype=self.compute_dtype).to(self.device)

    # ------------------------------------------------------------------ state

    def _bind(
        self,
        shapes: list[list[Side]],
        states: Mapping[Tensor, State],
        small: Callable[[Side], dict[str, Tensor]],
        wide: Mapping[str, int | None],
    ) -> None:
        """Make the state, taking over what ``states`` has, and put views of it back there.

        ``wide`` says how many directions each has where it is not the rank.
        """
        row = 0
        for block in shapes:
            self.blocks.append(Block(block, slice(row, row + len(block)), block[0].shards))
            row += len(block)
        known = [states[p] for p in self.params]
        rest = [small(s) for s in self.sides]
        for key, like_row in rest[0].items():
            rows = [local(state.get(key, own[key])).to(like_row) for state, own in zip(known, rest, strict=True)]
            self.state[key] = torch.stack(rows)
        for key in ("step", "skipped"):
            self.state[key] = torch.as_tensor(known[0].get(key, 0.0), dtype=torch.float32).to(self.device, copy=True)
        self.state["cadence"] = cadence_of(known[0]).clone()
        steps, *self._done = self.state["cadence"].tolist()
        self.steps = int(steps)
        self._ticks = self.state["cadence"][0]
        for key, directions in wide.items():
            self._bind_wide(key, directions, states)
        shared = {key: self.state[key] for key in ("step", "skipped", "cadence")}
        for i, state in enumerate(known):
            state.update({key: self.state[key][i] for key in rest[0]}, **shared)
        self._entries = known
        self._views = [state[key] for key in MOMENTS for state in known]

    def _bind_wide(self, key: str, directions: int | None, states: Mapping[Tensor, State]) -> None:
        """Make one kind of state that is as wide as the parameters, in one flat tensor."""
        like = [_Layout(block.sides[0], directions) for block in self.blocks]
        total = sum(len(block.sides) * math.prod(X.shape) for block, X in zip(self.blocks, like, strict=True))
        flat, at = torch.zeros(total, dtype=self.dtype, device=self.device), 0
        for block, layout in zip(self.blocks, like, strict=True):
            end = at + len(block.sides) * math.prod(layout.shape)
            kept = block.wide[key] = flat[at:end].view(len(block.sides), *layout.shape)
            at = end
            if directions is not None:
                kept.copy_(_start(block, directions))
            for s, x in zip(block.sides, kept, strict=True):
                value = states[s.param].get(key)
                if value is not None:
                    x.copy_(layout.kept(s, value.to(self.device, self.dtype)))
                states[s.param][key] = layout.shown(s, x)

    @property
    def intact(self) -> bool:
        """Whether the entries of the optimizer's state that this bucket filled still have its views of the moments."""
        try:
            first, second = (map(itemgetter(key), self._entries) for key in MOMENTS)
            return all(map(is_, chain(first, second), self._views))
        except KeyError:
            return False

    def bound(self, states: Mapping[Tensor, State]) -> bool:
        """Whether ``states`` still has those entries for these parameters."""
        return self.intact and all(states.get(s.param) is e for s, e in zip(self.sides, self._entries, strict=True))

    # ------------------------------------------------------------------ one step

    def read(self) -> None:
        """Read the gradients. A bucket in which some sides have none is to be made anew."""
        self.grads = list(map(_grad_of, self.params))
        missing = sum(map(is_, self.grads, repeat(None)))
        self.live, self.mixed = missing == 0, 0 < missing < len(self.grads)

    def begin(
        self,
        rule: str,
        make: Callable[["Bucket", str], tuple[Any, list[Any]]],
        prepare: Callable[["Bucket"], None] | None = None,
    ) -> None:
        """Give the plan of ``rule`` the gradients; it is made by ``make`` where there is none yet that fits.

        ``prepare`` may change ``grads``, by then in the layout of the state, before the plan takes them.

        Raises:
            ValueError: a parameter has another dtype, device or shape than its state.
            RuntimeError: a gradient is sparse.
        """
        addresses = list(map(Tensor.data_ptr, self.params if self._plain else map(local, self.params)))
        if addresses != self._addresses:
            self._moved_to(addresses)
        g, h = self.group, self.hyper
        h.lr, h.eps, h.weight_decay, h.maximize = as_scalar(g["lr"]), g["eps"], g["weight_decay"], g["maximize"]
        h.beta1, h.beta2 = g["betas"]
        if not self._plain:
            check_dense(self.grads)
            self.grads = [X for block in self.blocks for X in block.pieces(self.grads[block.rows])]
        if prepare is not None:
            prepare(self)
        if self._planned != rule or not self.plan.load(self.grads):
            self._replan(rule, make)

    def _replan(self, rule: str, make: Callable[["Bucket", str], tuple[Any, list[Any]]]) -> None:
        """Load gradients that the plan did not take as they are: copied, and by a new plan if it must be."""
        check_dense(self.grads)  # no plan takes sparse ones
        self.grads = [g.contiguous() for g in self.grads]
        if self._planned != rule or not self.plan.load(self.grads):
            self.plan, self.slabs = make(self, rule)
            self._planned = rule
            if not self.plan.load(self.grads):
                raise RuntimeError(f"no plan of {len(self.sides)} matrices for {rule!r} takes their gradients")

    def _moved_to(self, addresses: list[int]) -> None:
        """Note that parameters lie elsewhere than at the last step, for which no plan was made."""
        for s, shape in zip(self.sides, self._shapes, strict=True):
            if s.param.shape != shape:
                raise ValueError(
                    f"{s.name} of {s.pair.name} must stay {tuple(shape)}, as its optimizer state is, got "
                    f"{tuple(s.param.shape)}: make a new optimizer after resizing, or take the state of its parameters "
                    "out of optimizer.state"
                )
            if (s.param.dtype, s.param.device) != (self.dtype, self.device):
                raise ValueError(
                    f"{s.name} of {s.pair.name} must stay {self.dtype} on {self.device}, as its optimizer state "
                    f"is, got {s.param.dtype} on {s.param.device}: cast or move the model before the first step or "
                    "make a new optimizer and load the state"
                )
        self._addresses = addresses
        self.forget_plan()

    def step(self, found_inf: Tensor) -> None:
        """Run the update and let go of the gradients."""
        self.plan.step(found_inf)
        for block, slab in zip(self.blocks, self.slabs, strict=True):
            if block.shards is not None and block.shards.sharded_on_rank and block.full is None:  # see `on_pieces`
                delta = block.as_held(torch.stack(slab.params)).to(self.compute_dtype)
                apply_delta(block.matrices(), self.hyper, delta, found_inf)
                torch._foreach_zero_(slab.params)
        self.state["skipped"].add_(found_inf)
        self.grads = []

    def forget_plan(self) -> None:
        """Let the plan be made anew, after a change of what it was made of."""
        self._planned = None

    def transform(
        self,
        of: str,
        M: Tensor | None,
        k: Tensor | None,
        found_inf: Tensor,
        finish: Callable[[Block, Tensor], Tensor] | None = None,
    ) -> None:
        """Map parameters or moments on the rank side and mask them; see `functional.plan.ReferencePlan.transform_`.

        ``finish`` may change parameters ``[L, m, n]`` once more before they are written.
        """
        if of == "moments" or self.blocks[0].shards is None:
            self.plan.transform_(of, M, k, found_inf)
            if finish is not None:
                for block in self.blocks:
                    block.assign(finish(block, block.weights()))
            return
        for block in self.blocks:
            own = [None if X is None else X[block.rows] for X in (M, k)]
            X = mapped(own[0], block.weights(), own[1], block.rank_dim)
            block.assign(X if finish is None else finish(block, X))

    def weight_grams(self) -> Tensor:
        """Return X Xᵀ of the parameters on the rank side ``[T, r, r]``, of what this process holds of the columns."""
        if self.blocks[0].shards is None:
            made: Tensor = self.plan.grams("params")
            return made
        X = [block.weights().to(self.compute_dtype) for block in self.blocks]
        return torch.cat([rank_gram(x, block.rank_dim) for block, x in zip(self.blocks, X, strict=True)])

    # ------------------------------------------------------------------ periodic work

    def tick(self) -> None:
        """Count a step with gradients, whether or not it changes anything."""
        self.settle()
        self.steps += 1
        self._ticks.add_(1)

    def due(self, what: str, ahead: int = 0) -> bool:
        """Whether periodic work is to be done in this step, or ``ahead`` steps later.

        The first observation is at the first step, the first matrices at the first step after the warm-up,
        reprojections at multiples of their period. What a skipped step should have done stays due.
        """
        g, now, done = self.group, self.steps + ahead, self._done[PERIODIC.index(what)]
        every, warmup = g[what], g["warmup_steps"]
        if every == 0 or (what != "factor_every" and now <= warmup):
            return False
        first = {"factor_every": 1, "inverse_every": 1 + warmup, "reproject_every": 0}[what]
        # integers in float64; done = 0 lies before every period
        return (done == 0 and what != "reproject_every") or (now - first) // every > (max(done, 0) - first) // every

    def did(self, what: str, found_inf: Tensor) -> None:
        """Note that periodic work was done in this step; it stays due if the step changes nothing.

        On a device the flag travels to the host, where `settle` reads it before the next step.
        """
        i = PERIODIC.index(what)
        before = self._done[i]
        self._set_done(i, self.steps)
        if self.group["capturable"] or self.group[what] == 1:
            return  # a graph repeats what its step did; what is done at every step is due at the next in any case
        self._owed.append((i, before, self.steps, _sent(found_inf)))
        if _at_hand(found_inf):
            self.settle()

    @property
    def unsettled(self) -> bool:
        """Whether periodic work of the last step may turn out to be skipped."""
        return bool(self._owed)

    def settle(self) -> None:
        """Make due again what turned out to be skipped.

        This waits for the flags of the last step. By the next step, the passes between them are queued behind those,
        so that the device never runs dry; and all processes find the same.
        """
        for i, before, at, arrived in self._owed:
            if arrived() and self._done[i] == at:
                self._set_done(i, before)
        self._owed = []

    def _set_done(self, i: int, value: float) -> None:
        self._done[i] = value
        self.state["cadence"][1 + i] = value


def _at_hand(flag: Tensor) -> bool:
    """Whether the host can read a flag without waiting."""
    return flag.is_cpu


def _sent(flag: Tensor) -> Callable[[], float]:
    """Send a 0-d flag to the host; the result waits for it and returns it."""
    if not flag.is_cuda:
        return flag.clone().item
    host = torch.empty(1, pin_memory=True)
    host.copy_(flag.reshape(1), non_blocking=True)
    sent = torch.cuda.Event()
    sent.record(torch.cuda.current_stream(flag.device))

    def arrived() -> float:
        sent.synchronize()
        return host.item()

    return arrived


def sum_over_pieces(buckets: Sequence[Bucket], grams: Sequence[Tensor]) -> None:
    """Sum, in place, Gram matrices ``[T, r, r]`` of buckets over the processes that share their matrices."""
    shared: dict[Any, list[Tensor]] = {}
    for bucket, G in zip(buckets, grams, strict=True):
        shards = bucket.blocks[0].shards
        if shards is not None and shards.group is not None:
            shared.setdefault(shards.group, []).append(G)
    for group, pieces in shared.items():
        all_reduce_grams(pieces, group)


def bucket_key(side: Side, state: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what sides must share to be in one bucket: settings, rank, dtype, device, layout, history."""
    p, shards = side.param, side.shards
    layout = None if shards is None else (shards.mesh, shards.placements, side.name)
    step = -1 if state.get("step") is None else int(state["step"])
    return (id(side.group), side.pair.rank, p.dtype, p.device, layout, step, *cadence_of(state).tolist())


def cadence_of(state: Mapping[str, Any]) -> Tensor:
    """Return the ``cadence`` of a side's state ``[4]`` float64 on the host; zeros without one."""
    known = state.get("cadence")
    return torch.zeros(4, dtype=torch.float64) if known is None else known.to("cpu", torch.float64)


def on_pieces(block: Block, hyper: Hyper, dtype: torch.dtype) -> tuple[list[Tensor], Hyper]:
    """Return the matrices and settings that a rule works on.

    Matrices split along their rank are not at hand in the layout of the state: the rule then works on zeros, without
    decay, and what it adds to them is the update, which `Bucket.step` brings to the parameters. Parameters that are
    kept in the state are at hand there.
    """
    if block.full is not None:
        return list(block.full.unbind()), hyper
    if block.shards is None or not block.shards.sharded_on_rank:
        return block.matrices(), hyper
    return list(torch.zeros_like(block.exp_avg, dtype=dtype).unbind()), Undecayed(hyper)


class _Layout:
    """How state as wide as a parameter lies in a block, and in ``optimizer.state``.

    Args:
        side: any side of the block.
        directions: how many it has along the rank; None for those of the parameter.

    Attributes:
        shape: of the matrix on this process.
    """

    def __init__(self, side: Side, directions: int | None) -> None:
        shards, dim, whole = side.shards, side.rank_dim - 1, side.param.shape
        if directions is not None:
            whole = torch.Size(directions if i == dim else n for i, n in enumerate(whole))
        self._shards = None if shards is None else replace(shards, shape=tuple(whole))
        held = whole if self._shards is None else torch.Size(self._shards.work_shape)
        self.shape = held[0], held[1:].numel()

    def kept(self, side: Side, value: Tensor) -> Tensor:
        """Return a saved tensor as a matrix of the block."""
        if self._shards is not None:
            return side.matrix(self._shards.piece(value).contiguous())
        made = value.new_empty(self.shape)
        self.shown(side, made).copy_(value)
        return made

    def shown(self, side: Side, row: Tensor) -> Tensor:
        """Return a matrix of the block with the dimensions of the parameter; rows hold its memory order."""
        return side.pair.unfolded(side.name, row) if self._shards is None else self._shards.wrap(row)


def _start(block: Block, k: int) -> Tensor:
    """Return the columns that this process has of V at the start; see `functional.outer.cosine_rows`."""
    whole = cosine_rows(k, block.width)
    V = whole if block.shards is None else block.shards.columns(whole)
    return V if block.rank_dim == 1 else V.mT


class BucketedOptimizer(PairedOptimizer):
    """A `PairedOptimizer` that steps its sides in buckets."""

    _buckets: list[Bucket]
    _values: list[Any]
    _loose: list[Side]  # in no bucket

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets that have been made so far; sides that never had a gradient are in none."""
        return list(self._buckets)

    def _note_params(self) -> None:
        super()._note_params()
        for bucket in getattr(self, "_buckets", ()):
            bucket.settle()
        self._buckets, self._values, self._loose = [], [], list(self._sides)

    def _read(self) -> tuple[list[Bucket], dict[int, list[Tensor]]]:
        """Return the buckets with gradients, and by group the other parameters with gradients."""
        self._read_groups()
        changed = self._align()
        idle = [p for b in self._buckets if not b.live for p in b.params]
        idle += [s.param for s in self._loose] + [p for ps in self._others for p in ps if p.grad is None]
        if self._locator.moved(iter(idle)):
            self._follow()
            changed = self._align() or changed
        others = self._live_others()
        live = [b for b in self._buckets if b.live]
        any_gradient = bool(live or others)
        if changed or not any_gradient or self._locator.orphans():
            self._locator.look_after(any_gradient)
        return live, others

    def _align(self) -> bool:
        """Bring the buckets in line with which sides have gradients and state now; returns whether any changed."""
        for bucket in self._buckets:
            bucket.read()
        same = len(self.state) == len(self._values) and all(map(is_, self.state.values(), self._values))
        kept = [b for b in self._buckets if not b.mixed and (b.intact if same else b.bound(self.state))]
        changed = len(kept) != len(self._buckets)
        if changed:
            for bucket in self._buckets:
                bucket.settle()
            bucketed = {id(s) for b in kept for s in b.sides}
            self._loose = [s for s in self._sides if id(s) not in bucketed]
        changed = changed or any(s.param.grad is not None for s in self._loose)
        if changed:
            self._buckets = kept + self._regrouped([s for s in self._loose if s.param.grad is not None])
            self._buckets += self._regrouped(
                [s for s in self._loose if s.param.grad is None and self.state.get(s.param)]
            )
            self._loose = [s for s in self._loose if s.param.grad is None and not self.state.get(s.param)]
        if changed or not same:
            self._values = list(self.state.values())
        return changed

    def _regrouped(self, sides: Sequence[Side]) -> list[Bucket]:
        groups: dict[tuple[Any, ...], list[Side]] = {}
        for side in sides:
            key = (*bucket_key(side, self.state.get(side.param, {})), self._outer_rank(side), self._traits(side))
            groups.setdefault(key, []).append(side)
        made = [
            Bucket(group, self.state, self._small_state, self._wide_state(group[0]), *key[-2:])
            for key, group in groups.items()
        ]
        for bucket in made:
            bucket.read()
        return made

    def _traits(self, side: Side) -> Any:
        """Return what sides must share to be in one bucket, besides what all optimizers want."""
        return None

    def _small_state(self, side: Side) -> dict[str, Tensor]:
        """Return prototypes of the state that a subclass keeps of a side beside Adam's."""
        return {}

    def _wide_state(self, side: Side) -> Sequence[str]:
        """Return the keys of the state of a side that is as large as the parameter."""
        return MOMENTS

    def _outer_rank(self, side: Side) -> int:
        """Return how many directions of its outer factor a side keeps; 0 for none."""
        return 0

    def _found_inf(self, buckets: Sequence[Bucket], others: dict[int, list[Tensor]]) -> dict[torch.device, Tensor]:
        """Return, per device, a 0-d float32 that is 1 if any gradient of this step is not finite, anywhere."""
        flags: dict[torch.device, Tensor] = {}
        for bucket in buckets:
            if bucket.device not in flags:
                flags[bucket.device] = torch.zeros((), device=bucket.device)
            bucket.plan.nonfinite_(flags[bucket.device])
        if self._shared_by and not flags:  # others may have gradients, and wait for this process
            flags = {p.device: torch.zeros((), device=p.device) for p in self.param_groups[0]["params"][:1]}
        return agreed(flags, [p.grad for ps in others.values() for p in ps], self._shared_by)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # files of earlier versions count the steps there
            steps = group.pop("clock", None)
            for p in group["params"] if steps is not None else ():
                if p in self.state and "cadence" not in self.state[p]:
                    self.state[p]["cadence"] = torch.full((4,), float(steps), dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict."""
        for bucket in self._buckets:
            bucket.settle()
        return super().state_dict()
