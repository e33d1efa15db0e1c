"""The forward hook that observes u and the gradient d at u, and keeps their r×r sums.

u is the output of the module that applies A, and d is the gradient of the loss at that output. A forward hook on the
module puts a tensor hook on u. Passes without a backward (evaluation, generation, the first pass of a checkpointed
block) leave nothing behind, and a recomputed forward is not counted twice.

**A signal belongs to a gradient.** d is stored when the backward pass delivers it, and counted when the gradient to
which it contributes arrives in ``A.grad`` (in ``B.grad`` if A is frozen). `torch.autograd.grad` writes no ``.grad`` and
counts nothing. If several backward passes use one graph (``retain_graph``), d is their sum, and u is counted once. If a
gradient is discarded, by whatever means, what was counted for it is discarded too: the version counter of the next
gradient shows that it is not a continuation of the last.

On the CPU each sum is one product, computed at once. On a device the time of such small products is dominated by their
launches: u and d are queued until many can be summed by one op.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from curvopt.distributed import is_sharded, world_size
from curvopt.functional import compute_dtype
from curvopt.lora.hooks import Arrival, PairHooks, Watch, backward_pass, continues, on_arrival
from curvopt.lora.pair import LoraPair
from curvopt.ops import Ops, on_device

# two passes are one if Σ u agrees to this, relatively: above the rounding of a recomputation in bfloat16
SAME = 1e-2
# bytes of u and d that may be queued for their products on a device
QUEUE_LIMIT = 2**26


@dataclass
class Sums:
    """What one pair has gathered since the last `Capture.pop`.

    Attributes:
        both: Σ uᵀu and Σ dᵀd, (2, r, r), fp32 (fp64 for fp64 signals); `uu` and `dd` are its two halves.
            d is as it came, not scaled by the number of rows.
        n: Rows summed (tokens, or positions of a convolution's output); a 0-d tensor where a mask counted them.
        calls: Forward passes of the layer whose backward was summed.
    """

    both: Tensor
    n: int | Tensor = 0
    calls: int = 0

    @property
    def uu(self) -> Tensor:
        """Σ uᵀu, (r, r)."""
        return self.both[0]

    @property
    def dd(self) -> Tensor:
        """Σ dᵀd, (r, r)."""
        return self.both[1]


@dataclass(eq=False)
class Store:
    """The sums of all pairs of one rank, dtype and device.

    Attributes:
        sums: [2, P, r, r]: Σ uᵀu of each pair, then Σ dᵀd of each.
        index: {pair: its place}.
        n: Rows of each pair so far: numbers, or 0-d tensors where a mask counted; static: [P] float64 on the device.
        limit: Bytes of u and d that may be queued for their products.
    """

    sums: Tensor
    index: dict[LoraPair, int]
    n: Any
    limit: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What its pairs share."""
        return (self.sums.shape[-1], self.sums.dtype, self.sums.device)


class _Call:
    """One forward pass of a layer: its u, and what its backward passes have brought. It is the tensor hook on u.

    Attributes:
        u: The output of the layer; dropped once it is counted.
        channel: The dimension of u and d that is the rank.
        mask: Which rows are real, (n,), or None.
        d: What the last backward brought, while the gradient has not arrived yet.
        counted: d as it was counted last, (n, r), for backward passes to come.
        backward: Number of the backward pass that brought d.
    """

    __slots__ = ("_owner", "_record", "backward", "channel", "counted", "d", "mask", "u")

    def __init__(self, owner: Any, record: Any, u: Tensor, mask: Tensor | None, channel: int) -> None:
        self._owner, self._record, self.channel = owner, record, channel
        self.u: Tensor | None = u
        self.mask = mask
        self.d: Tensor | None = None
        self.counted: Tensor | None = None
        self.backward = -1

    def __call__(self, d: Tensor | None) -> None:
        """Take what a backward has brought, of the shape of u with the rank in one dimension."""
        owner, record = self._owner(), self._record()
        if d is not None and owner is not None and record is not None:
            owner.came(record, self, d)


@dataclass(eq=False)
class _Record:
    """One pair: its calls on the way, and how far its sums are those of the present gradient.

    Attributes:
        pair: The pair.
        place: The store of its sums, and which of its pairs it is; None until it is seen.
        like: Rank, dtype and device of the d that the place is for.
        waiting: Calls whose gradient has not arrived.
        calls: Calls counted.
        version: Of the gradient when it arrived last.
        generation: Counts dropped gradients: products queued for an older one are void.
        at_once: Whether d counts when it comes, since no hook tells of its gradient.
        to_a: Whether it is the gradient of A that tells; else that of B.
        landed: Number of the backward pass in which the gradient arrived last.
        passed: For each forward pass without a graph since the last `discard`, its mask and Σ u over its rows, (r,).
            Under reentrant checkpointing such a pass is computed anew in the backward, when another mask may be set.
    """

    pair: LoraPair
    place: tuple[Store, int] | None = None
    like: tuple[Any, ...] = ()
    waiting: list[_Call] = field(default_factory=list)
    calls: int = 0
    version: int = -1
    generation: int = 0
    at_once: bool = False
    to_a: bool = True
    landed: int = -1
    passed: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Capture:
    """Hooks on the signal modules of some pairs, summing uᵀu and dᵀd.

    Only pairs with a `signal` are watched, and only while at least one of A and B is trainable. The modules hold no
    reference to this object: once it is gone its hooks are, and on a copied or unpickled model they do nothing.

    Args:
        pairs: The pairs to watch.
        ops: Makes the products that were queued; the reference if None.
        queue_limit: Bytes of u and d that may be queued; by default 64 MiB where kernels run, none elsewhere.
        static: Keep sums and counts in the same memory, and queue nothing: a CUDA graph that reads them finds them
            there when it is replayed. Counts are then tensors.
        at_once: Count every backward when it comes, also those of `torch.autograd.grad`.

    Attributes:
        pairs: The pairs, in the given order.
        active: Whether passes are observed; see `watch`.
        mask: Which rows of the coming forward passes are real, (n,) float, or None for all. Layers with another
            number of rows count all of theirs. Read in the forward, of a checkpointed block in its first; gone after
            `pop` and `discard`.
        fired: Counted calls of each pair since construction, {pair: int}.
        stores: The sums, one entry per rank, dtype and device; `flush` first.
    """

    def __init__(
        self,
        pairs: Iterable[LoraPair],
        ops: Ops | None = None,
        queue_limit: int | None = None,
        static: bool = False,
        at_once: bool = False,
    ):
        self.pairs = list(pairs)
        self.active = True
        self.mask: Tensor | None = None
        self.fired: dict[LoraPair, int] = dict.fromkeys(self.pairs, 0)
        self._limit = 0 if static else queue_limit
        self._static, self._at_once = static, at_once
        self._start(Ops("torch") if ops is None else ops)

    def _start(self, ops: Ops) -> None:
        self._ops = ops
        self.stores: list[Store] = []
        self._records = {pair: _Record(pair) for pair in self.pairs}
        self._touched: set[_Record] = set()  # since the last `discard`
        self._queue: list[_Product] = []
        self._queued_bytes = 0
        self._hooks, self._arrivals = PairHooks(), PairHooks()
        self._many = world_size() > 1
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        # Handles and weak references belong to the live model; a copy starts unattached and empty.
        own = ("pairs", "active", "fired", "_limit", "_static", "_at_once")
        return {key: self.__dict__[key] for key in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, mask=None)
        self._start(Ops("torch"))

    # ------------------------------------------------------------------------------------------ hooks

    def attach(self) -> None:
        """Register the hooks; modules and parameters replaced since the last call are hooked again."""
        self._many = world_size() > 1
        for pair, record in self._records.items():
            module = pair.signal if pair.exists else None
            now: tuple[Any, ...] = () if module is None else (module, pair.A, pair.B)
            if self._hooks.stand_on(pair, now):
                continue
            self._hooks.remove(pair)
            self._arrivals.remove(pair)
            if module is None:
                continue
            record.at_once = self._at_once or any(is_sharded(p) or not p.is_leaf for p in now[1:])
            spatial = module.weight.ndim - 2 if isinstance(module, _ConvNd) else 0
            hook = _Hook(weakref.ref(self), weakref.ref(record), weakref.ref(pair.A), spatial)
            self._hooks.put(pair, now, [module.register_forward_hook(hook)])
            if self.active:
                self.listen(record, pair.a_trainable)

    def listen(self, record: _Record, to_a: bool) -> None:
        """Let a hook tell of the gradients of A, or of those of B where A is frozen."""
        pair, record.to_a = record.pair, to_a
        self._arrivals.remove(pair)
        if not record.at_once:
            param = pair.A if to_a else pair.B
            self._arrivals.put(pair, [param], [on_arrival(param, Arrival(weakref.ref(self), weakref.ref(record)))])

    def watch(self, active: bool) -> None:
        """Observe the coming passes or not; without, forward hooks return at once and nothing is kept."""
        if active is self.active:
            return
        self.active = active
        for pair, record in self._records.items():
            if not active:
                self._arrivals.remove(pair)
            elif pair in self._hooks and pair.exists:
                self.listen(record, pair.a_trainable)

    @property
    def attached(self) -> bool:
        """Whether any hook is on."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Remove the hooks. The sums are kept until `pop` or `discard`."""
        self._hooks.remove_all()
        self._arrivals.remove_all()

    def adopt(self, other: Capture) -> None:
        """Take over what another capture has counted, and expects, for the same pairs or parameters.

        Where parameters were replaced since the backward (FSDP2), no hook will tell of their gradients any more.
        """
        other.flush()
        before = {id(record.pair.A): record for record in other._records.values() if record.pair.exists}
        for pair, record in self._records.items():
            old = other._records.get(pair) or (before.get(id(pair.A)) if pair.exists else None)
            if old is None:
                continue
            record.waiting = list(old.waiting)
            record.version = old.version
            self._touched.add(record)
            self.fired[pair] += other.fired[old.pair]
            if old.calls and old.place is not None:
                store, i = old.place
                mine, j = self._put(record, store.key)
                record.calls = old.calls
                mine.sums[:, j].copy_(store.sums[:, i])
                mine.n[j] = store.n[i]
            if record.at_once:
                for call in record.waiting:
                    self._take(record, call)
                record.waiting.clear()

    # ------------------------------------------------------------------------------------------ reading

    def pop(self) -> dict[LoraPair, Sums]:
        """Return and clear the sums since the last call; pairs that no backward pass reached are left out."""
        self.flush()
        found: dict[LoraPair, Sums] = {}
        for pair in self.pairs:
            record = self._records[pair]
            if record.place is not None and (record.calls or self._static):
                store, i = record.place
                n = store.n[i].clone() if self._static else store.n[i]
                found[pair] = Sums(store.sums[:, i].clone(), n, record.calls)
        self.discard()
        return found

    def seen(self, pair: LoraPair) -> bool:
        """Whether anything was counted for a pair since the last `discard`."""
        return self._records[pair].calls > 0

    def discard(self) -> None:
        """Forget everything since the last time, also what is on its way."""
        self._queue, self._queued_bytes, self.mask = [], 0, None
        # a replayed graph adds to static sums without a word
        for store in self.stores if self._touched or self._static else ():
            store.sums.zero_()
            if self._static:
                store.n.zero_()
            else:
                store.n = [0] * len(store.n)
        for record in self._touched:
            record.calls = 0
            record.waiting.clear()
            record.passed.clear()
        self._touched.clear()

    def passed(self, record: _Record, u: Tensor) -> None:
        """Note the mask of a forward pass that leaves no graph, with what tells u ``(n, r)`` when it is seen again."""
        if self.mask is not None and self.mask.numel() == u.shape[0]:
            record.passed.append((self.mask, u.sum(0)))
            self._touched.add(record)

    def mask_of(self, record: _Record, u: Tensor) -> Tensor | None:
        """Return the mask of u ``(n, r)``: the present one, or that of the pass of which u is the recomputation.

        Reads the device where passes with several masks wait for their backward.
        """
        mask = self.mask
        known = [(m, total) for m, total in record.passed if m.numel() == u.shape[0]]
        if any(m is not mask for m, _ in known):
            total = u.sum(0)
            apart = torch.stack([(total - other).abs().amax() for _, other in known])
            # a first pass is repeated to rounding; among equals the last is the first to have its backward
            near = int(apart.flip(0).argmin())
            if apart[-1 - near] <= SAME * total.abs().amax():
                mask = known[-1 - near][0]
        return mask if mask is None or mask.numel() == u.shape[0] else None

    def prepare(self, pairs: Iterable[LoraPair]) -> None:
        """Make the sums of pairs that were not seen here: every process must have the same to add up."""
        for pair in dict.fromkeys(pairs):
            record = self._records.get(pair)
            if record is None:
                continue
            self._touched.add(record)  # what others have seen is added to its sums
            if record.place is None:
                self._put(record, (pair.rank, compute_dtype(pair.A.dtype), pair.A.device))

    def flush(self) -> None:
        """Do the queued products, those of one store by one op."""
        while self._queue:
            # one op adds to a sum once: what has the same target goes into the next round
            rounds: dict[tuple[Any, ...], list[_Product]] = {}
            taken, later = set(), []
            for p in self._queue:
                if p.generation != p.record.generation:
                    continue
                target = (p.store, p.at)
                if target in taken:
                    later.append(p)
                    continue
                taken.add(target)
                rounds.setdefault((p.store, p.sign, p.z.dtype, p.mask is None), []).append(p)
            for (store, sign, *_), products in rounds.items():
                self._add(store, products, sign)
            self._queue = later
        self._queued_bytes = 0

    def _add(self, store: Store, products: list[_Product], sign: float) -> None:
        masks = [p.mask for p in products if p.mask is not None]
        self._ops(
            "gram_add_",
            store.sums.view(-1, *store.sums.shape[2:]),
            [p.at for p in products],
            [p.z for p in products],
            masks or None,
            sign,
        )

    # ------------------------------------------------------------------------------------------ counting

    def came(self, record: _Record, call: _Call, d: Tensor) -> None:
        """Keep what a backward brought to one call until its gradient arrives."""
        if d.requires_grad:
            d = d.detach()
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"a backward with create_graph=True went through {record.pair.name}: of a gradient that is "
                    'differentiated again, the statistics see the first part alone. Use statistics="gradient"',
                    UserWarning,
                    stacklevel=3,
                )
        call.d, call.backward = d, backward_pass()
        if call not in record.waiting:
            record.waiting.append(call)
            self._touched.add(record)
        if record.at_once or record.landed == call.backward:  # B's gradient may arrive before d
            self._count(record)

    def arrived(self, record: _Record, grad: Tensor) -> None:
        """Count what is kept, after its gradient was added to ``grad``; drop what an earlier gradient left.

        See ``curvopt.lora.hooks``.
        """
        if not continues(grad, record.version, self._many):
            self._drop(record)
        record.version, record.landed = grad._version, backward_pass()
        self._count(record)

    def _count(self, record: _Record) -> None:
        """Count what this backward pass has brought; what `torch.autograd.grad` left behind stays uncounted."""
        now, later = backward_pass(), []
        for call in record.waiting:
            if call.backward == now:
                self._take(record, call)
            else:
                later.append(call)
        record.waiting = later

    def _drop(self, record: _Record) -> None:
        """Forget what was counted for a gradient that is gone."""
        record.generation += 1
        if record.calls and record.place is not None:
            record.calls = 0
            store, i = record.place
            store.sums[:, i].zero_()
            if self._static:
                store.n[i].zero_()
            else:
                store.n[i] = 0

    def _take(self, record: _Record, call: _Call) -> None:
        """Add one call's products to the sums."""
        if call.d is None or call.d.numel() == 0:
            return
        d, before, mask = _rows(call.d, call.channel), call.counted, call.mask
        u = None if call.u is None else _rows(call.u, call.channel)
        if before is not None:
            d = before + d
        call.u, call.d, call.counted = None, None, d
        store, i = self._place(record, d)
        if u is not None:
            store.n[i] += u.shape[0] if mask is None else mask.sum()
            record.calls += 1
            self.fired[record.pair] += 1
        products = [] if u is None else [(0, u, 1.0)]
        products.append((1, d, 1.0))
        if before is not None:
            products.append((1, before, -1.0))
        if store.limit == 0:
            for half, z, sign in products:
                z = z.to(store.sums.dtype)
                # in place: no autocast, no graph
                store.sums[half, i].addmm_(z.T if mask is None else z.T * mask, z, alpha=sign)
            return
        for half, z, sign in products:
            at = half * len(store.index) + i
            self._queue.append(_Product(record, record.generation, store, at, z, mask, sign))
            self._queued_bytes += z.nbytes
        if self._queued_bytes > store.limit:
            self.flush()

    def _place(self, record: _Record, z: Tensor) -> tuple[Store, int]:
        """Return the store of a pair, made when the pair is first seen, or seen with another rank or dtype."""
        like = (z.shape[1], z.dtype, z.device)
        if record.place is None or record.like != like:
            record.like = like
            return self._put(record, (z.shape[1], compute_dtype(z.dtype), z.device))
        return record.place

    def _put(self, record: _Record, key: tuple[Any, ...]) -> tuple[Store, int]:
        """Give a pair a place among the sums of its rank, dtype and device."""
        if record.place is not None and record.place[0].key == key:
            return record.place
        pair, record.calls = record.pair, 0
        store = next((s for s in self.stores if s.key == key and pair in s.index), None)
        if store is None:
            r, dtype, device = key
            # all pairs of the rank that are not elsewhere, in their order: which one is seen first does not matter
            index = {p: i for i, p in enumerate(q for q in self.pairs if q.exists and q.rank == r)}
            index.setdefault(pair, len(index))
            P = len(index)
            n: Any = torch.zeros(P, dtype=torch.float64, device=device) if self._static else [0] * P
            sums = torch.zeros(2, P, r, r, dtype=dtype, device=device)
            limit = self._limit if self._limit is not None else QUEUE_LIMIT if on_device(sums) else 0
            store = Store(sums, index, n, limit)
            self.stores.append(store)
        record.place = store, store.index[pair]
        return record.place


@dataclass(eq=False, slots=True)
class _Product:
    """± zᵀz of the rows of z (n, r) that a mask (n,) leaves, to be added to one of a store's 2P sums.

    Void once the record is at another generation.
    """

    record: _Record
    generation: int
    store: Store
    at: int
    z: Tensor
    mask: Tensor | None
    sign: float


class _Hook(Watch):
    """Stands on the module that computes u.

    Args:
        owner: As in `Watch`.
        record: As in `Watch`.
        A: Weak reference to its weight.
        spatial: How many dimensions of u come after the rank: those of a convolution's positions.
    """

    def __init__(self, owner: Any = None, record: Any = None, A: Any = None, spatial: int = 0) -> None:
        super().__init__(owner, record)
        self._A, self._spatial = A, spatial

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if self._owner is None:
            return None
        capture = self._owner()  # the record only where it is needed: in most steps the hook ends here
        if capture is None or not capture.active or not isinstance(output, Tensor):
            return None
        record, A = self._record(), self._A()
        if record is None:
            return None
        trains_A = A is not None and A.requires_grad
        if not (trains_A or record.pair.b_trainable):
            return None
        channel = output.ndim - 1 - self._spatial
        if not torch.is_grad_enabled():
            if capture.mask is not None and module.training:
                capture.passed(record, _rows(output.detach(), channel))
            return None
        if trains_A is not record.to_a:
            capture.listen(record, trains_A)
        watched, u = output, output.detach()
        if not output.requires_grad:
            # A frozen A on an input without gradient: the backward would not come by otherwise.
            watched = output.detach().requires_grad_()
        mask = None
        if record.passed or capture.mask is not None:
            mask = capture.mask_of(record, _rows(u, channel))
        # the backward of B needs u too, so that holding it costs nothing (but r numbers a row under checkpointing)
        watched.register_hook(_Call(weakref.ref(capture), weakref.ref(record), u, mask, channel))
        return None if watched is output else watched


def _rows(signal: Tensor, channel: int) -> Tensor:
    """The signal as (n, r)."""
    if channel != signal.ndim - 1:
        signal = signal.movedim(channel, -1)
    return signal if signal.ndim == 2 else signal.reshape(-1, signal.shape[-1])
