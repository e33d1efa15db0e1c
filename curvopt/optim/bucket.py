"""Buckets: all sides of one group, rank, dtype, device and layout, whose step is decided once.

A bucket keeps the state of its sides in few tensors: both moments flat, r×r matrices as ``[T, r, r]``, numbers as
``[T]``. What ``optimizer.state`` holds are views of these, so checkpoints and users see one tensor per parameter, and
in-place writes through either agree. Sides of one shape are neighbours, a *block*: on the CPU work of width d goes by
blocks, on a device all of a bucket is one launch. Where parameters are DTensors a bucket holds this process's pieces,
and what ``optimizer.state`` holds are DTensors.

`BucketedOptimizer` keeps buckets in line with which sides have gradients, state and addresses now. Usually nothing has
changed, and finding that out is all that a step spends on it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
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
        kind: what the subclass wants its sides to share, whatever it is.

    Attributes:
        sides: the T sides, those of one shape neighbours.
        blocks: runs of one shape.
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
        kind: Any = None,
    ) -> None:
        shapes: dict[tuple[Any, ...], list[Side]] = {}
        for s in sides:
            shapes.setdefault((s.name, s.kind, *s.param.shape, *s.param.stride()), []).append(s)
        self.sides = [s for block in shapes.values() for s in block]
        self.params = [s.param for s in self.sides]
        self.state: dict[str, Tensor] = {}
        self.blocks: list[Block] = []
        self.grads: list[Any] = []  # None for all sides of a bucket without gradients
        first = self.sides[0]
        self.group, self.r, self.kind = first.group, first.pair.rank, kind
        self.outer_rank = outer_rank
        self.dtype, self.device = first.param.dtype, first.param.device
        self.compute_dtype = compute_dtype(self.dtype)
        self.hyper = Hyper(0.0, 0.0, 0.0, 0.0, 0.0)
        self.slabs: list[Any] = []
        self.plan: Any = None
        self._plans: dict[str, tuple[Any, list[Any]]] = {}
        self._owed: list[tuple[int, float, float, Tensor, Any]] = []
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
        self._steps, *self._done = self.state["cadence"].tolist()
        self._ticks = self.state["cadence"][0]
        for key, directions in wide.items():
            self._bind_wide(key, directions, states)
        shared = {key: self.state[key] for key in ("step", "skipped", "cadence")}
        for i, state in enumerate(known):
            state.update({key: self.state[key][i] for key in rest[0]}, **shared)
        self._entries = known
        self._views = [state["exp_avg"] for state in known]

    def _bind_wide(self, key: str, directions: int | None, states: Mapping[Tensor, State]) -> None:
        """Make one kind of state that is as wide as the parameters, in one flat tensor."""
        like = [_Layout(block.sides[0], directions) for block in self.blocks]
        total = sum(len(block.sides) * X.matrix.numel() for block, X in zip(self.blocks, like, strict=True))
        flat, at = torch.zeros(total, dtype=self.dtype, device=self.device), 0
        for block, layout in zip(self.blocks, like, strict=True):
            end = at + len(block.sides) * layout.matrix.numel()
            kept = block.wide[key] = flat[at:end].view(len(block.sides), *layout.matrix.shape)
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
        """Whether the entries of the optimizer's state that this bucket filled still have its views."""
        try:
            return all(map(is_, map(itemgetter("exp_avg"), self._entries), self._views))
        except KeyError:
            return False

    def bound(self, states: Mapping[Tensor, State]) -> bool:
        """Whether ``states`` still has those entries for these parameters."""
        return self.intact and all(states.get(s.param) is e for s, e in zip(self.sides, self._entries, strict=True))

    # ------------------------------------------------------------------ one step

    def read(self) -> None:
        """Read the gradients; they are there for all sides or for none."""
        self.grads = list(map(_grad_of, self.params))

    @property
    def live(self) -> bool:
        """Whether the sides have gradients in this step."""
        return bool(self.grads) and self.grads[0] is not None

    @property
    def mixed(self) -> bool:
        """Whether some sides have gradients and some have none."""
        missing = sum(map(is_, self.grads, repeat(None)))
        return 0 < missing < len(self.grads)

    def begin(
        self,
        name: str,
        make: Callable[["Bucket", str], tuple[Any, list[Any]]],
        prepare: Callable[["Bucket"], None] | None = None,
    ) -> None:
        """Choose the plan called ``name``, made by ``make`` where there is none yet, and give it the gradients.

        ``prepare`` may change ``grads``, by then in the layout of the state, before the plan takes them.

        Raises:
            ValueError: a parameter has another dtype or device than its state.
        """
        if self._moved():
            self._plans.clear()
            for s in self.sides:
                if (s.param.dtype, s.param.device) != (self.dtype, self.device):
                    raise ValueError(
                        f"{s.name} of {s.pair.name} must stay {self.dtype} on {self.device}, as its optimizer state "
                        f"is, got {s.param.dtype} on {s.param.device}: cast or move the model before the first step or "
                        "make a new optimizer and load the state"
                    )
        g, h = self.group, self.hyper
        h.lr, h.eps, h.weight_decay, h.maximize = as_scalar(g["lr"]), g["eps"], g["weight_decay"], g["maximize"]
        h.beta1, h.beta2 = g["betas"]
        if not self._plain:
            self.grads = [X for block in self.blocks for X in block.pieces(self.grads[block.rows])]
        if prepare is not None:
            prepare(self)
        if name not in self._plans or not self._plans[name][0].load(self.grads):
            self._plans[name] = make(self, name)
            self._plans[name][0].load(self.grads)
        self.plan, self.slabs = self._plans[name]

    def _moved(self) -> bool:
        """Whether a parameter lies elsewhere than at the last step."""
        now = list(map(Tensor.data_ptr, self.params if self._plain else map(local, self.params)))
        if now == self._addresses:
            return False
        self._addresses = now
        return True

    def step(self, found_inf: Tensor) -> None:
        """Run the update and let go of the gradients."""
        self.plan.step(found_inf)
        for block, slab in zip(self.blocks, self.slabs, strict=True):
            if block.full is None and block.shards is not None and block.shards.sharded_on_rank:  # see `on_pieces`
                delta = block.as_held(torch.stack(slab.params)).to(self.compute_dtype)
                apply_delta(block.matrices(), self.hyper, delta, found_inf)
                torch._foreach_zero_(slab.params)
        self.state["skipped"].add_(found_inf)
        self.plan.release()
        self.grads = []

    def forget_plans(self) -> None:
        """Let plans be made anew, after a change of what they were made of."""
        self._plans.clear()

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
        self._steps += 1
        self._ticks.add_(1)

    @property
    def steps(self) -> int:
        """Steps with gradients so far."""
        return int(self._steps)

    def due(self, what: str, ahead: int = 0) -> bool:
        """Whether periodic work is to be done in this step, or ``ahead`` steps later.

        The first observation is at the first step, the first matrices at the first step after the warm-up,
        reprojections at multiples of their period. What a skipped step should have done stays due.
        """
        g, now, done = self.group, self._steps + ahead, self._done[PERIODIC.index(what)]
        every, warmup = g[what], g["warmup_steps"]
        if every == 0 or (what != "factor_every" and now <= warmup):
            return False
        first = {"factor_every": 1, "inverse_every": 1 + warmup, "reproject_every": 0}[what]
        # integers in float64; done = 0 lies before every period
        return (done == 0 and what != "reproject_every") or (now - first) // every > (max(done, 0) - first) // every

    def did(self, what: str, found_inf: Tensor) -> None:
        """Note that periodic work was done in this step; it stays due if the step changes nothing.

        On a device that is seen without waiting: the flag travels to the host and is read when it has arrived.
        """
        i = PERIODIC.index(what)
        before = self._done[i]
        self._set_done(i, self._steps)
        if self.group["capturable"]:
            return  # a graph repeats what its step did
        if found_inf.is_cpu:
            if found_inf.item():
                self._set_done(i, before)
            return
        host = torch.empty(1, pin_memory=True)
        host.copy_(found_inf.reshape(1), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._owed.append((i, before, self._steps, host, arrived))

    def settle(self, wait: bool = False) -> None:
        """Make due again what turned out to be skipped."""
        waiting = []
        for item in self._owed:
            i, before, at, host, arrived = item
            if wait:
                arrived.synchronize()
            elif not arrived.query():
                waiting.append(item)
                continue
            if host.item() and self._done[i] == at:
                self._set_done(i, before)
        self._owed = waiting

    def _set_done(self, i: int, value: float) -> None:
        self._done[i] = value
        self.state["cadence"][1 + i] = value


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
        matrix: a meta tensor with the shape of the matrix on this process.
    """

    def __init__(self, side: Side, directions: int | None) -> None:
        shards, dim = side.shards, side.rank_dim - 1
        if directions is not None and shards is not None:
            shape = tuple(directions if i == dim else n for i, n in enumerate(shards.shape))
            shards = replace(shards, shape=shape)
        self._shards = shards
        if shards is None:
            self._like = _in_memory_order(side.param, dim, directions)
        else:
            self._like = torch.empty(shards.work_shape, device="meta")
        self.matrix = side.matrix(self._like)

    def kept(self, side: Side, value: Tensor) -> Tensor:
        """Return a saved tensor as a matrix of the block."""
        if self._shards is not None:
            return side.matrix(self._shards.piece(value).contiguous())
        return side.matrix(torch.empty_like(self._like, dtype=value.dtype, device=value.device).copy_(value))

    def shown(self, side: Side, row: Tensor) -> Tensor:
        """Return a matrix of the block with the dimensions of the parameter; rows hold its memory order."""
        if self._shards is not None:
            return self._shards.wrap(row)
        if side.param.ndim == 2:
            return row
        return row.as_strided(self._like.shape, self._like.stride(), row.storage_offset())


def _in_memory_order(p: Tensor, dim: int, n: int | None) -> Tensor:
    """Return a meta tensor shaped like ``p``, with n entries along ``dim`` if given, in the memory order of ``p``."""
    if n is None:
        return torch.empty_like(p, device="meta")
    order = sorted(range(p.ndim), key=lambda i: (p.shape[i] == 1, -p.stride()[i]))
    made = torch.empty([n if i == dim else p.shape[i] for i in order], device="meta")
    return made.permute([order.index(i) for i in range(p.ndim)])


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
        for bucket in live:
            check_dense(bucket.grads)
        self._locator.look_after(bool(live) or any(others.values()), changed)
        return live, others

    def _align(self) -> bool:
        """Bring the buckets in line with which sides have gradients and state now; returns whether any changed."""
        for bucket in self._buckets:
            bucket.read()
        same = len(self.state) == len(self._values) and all(map(is_, self.state.values(), self._values))
        kept = [b for b in self._buckets if not b.mixed and (b.intact if same else b.bound(self.state))]
        changed = len(kept) != len(self._buckets)
        if changed:
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
            key = (*bucket_key(side, self.state.get(side.param, {})), self._outer_rank(side), self._kind(side))
            groups.setdefault(key, []).append(side)
        made = [
            Bucket(group, self.state, self._small_state, self._wide_state(group[0]), *key[-2:])
            for key, group in groups.items()
        ]
        for bucket in made:
            bucket.read()
        return made

    def _kind(self, side: Side) -> Any:
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
            bucket.settle(wait=True)
        return super().state_dict()
