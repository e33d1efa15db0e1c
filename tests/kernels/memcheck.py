"""Watches what kernels in Triton's interpreter do to memory: what lies outside, what races, what was never written.

Every tensor made under `watched` gets memory of its own, with a fence on both sides, that is not used again; whatever
else a kernel touches, a tensor from before or one that is gone, lies outside. Programs run one after another, but what
counts is what they may do at once. They are cut into segments, at barriers and at atomics. An access conflicts with one
of another program unless that was handed over: a barrier, a releasing atomic, then here an acquiring atomic on the same
address, and a barrier. A program's own store may be read after a barrier. What it loads and then stores is questioned
where a tile is so small that several warps load each element and one of them stores it; two of its stores to one
address are not, unless they are lanes of one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partialmethod
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton._C.libtriton import ir
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

FENCE = 4096  # bytes on either side, and what tensors are aligned to
POISON = 0xFF  # a byte; floating-point numbers of it are NaN
ORDER = ir.MEM_SEMANTIC
Original = Callable[..., Any]
Findings = Iterator[tuple[str, np.ndarray]]  # what may be wrong, and which bytes [elements, size]


@dataclass
class Fault:
    """What a kernel did wrong in one launch, where it did so first, and to how many elements."""

    kernel: str
    kind: str
    program: tuple[int, ...]
    address: int
    count: int = 0


@dataclass
class Span:
    """The memory of one tensor, kept lest it become another's, and which bytes nobody is known to have written."""

    low: int
    high: int
    tensor: StorageWeakRef
    memory: np.ndarray
    unwritten: np.ndarray


class Fences(TorchDispatchMode):
    """Moves every new tensor between fences; those that are made empty are filled with poison."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: dict[int, Span] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            return made
        # torch.tensor(...) lifts what it has just made; else what shares memory with an argument is a view
        given = [] if func is torch.ops.aten.lift_fresh.default else tree_leaves((args, kwargs))
        old = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)} | self.spans.keys()
        empty = func._schema.name.startswith(("aten::empty", "aten::new_empty"))
        return tree_map_only(torch.Tensor, lambda t: self._moved(t, old, empty), made)

    def _moved(self, t: torch.Tensor, old: set[int], empty: bool) -> torch.Tensor:
        storage, size = t.untyped_storage(), t.untyped_storage().nbytes()
        if size == 0 or storage.data_ptr() in old:
            return t
        memory = np.full(size + 3 * FENCE, POISON, np.uint8)
        start = FENCE + -memory.ctypes.data % FENCE
        own = torch.from_numpy(memory[start : start + size])
        if not empty:
            own.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        low, fresh = own.data_ptr(), own.untyped_storage()
        self.spans[low] = Span(low, low + size, StorageWeakRef(fresh), memory, np.full(size, empty))
        return torch.empty(0, dtype=t.dtype).set_(fresh, t.storage_offset(), t.size(), t.stride())


class Launch:
    """What the programs of one launch have done to every byte so far.

    Segments are numbered from 1 on, over all programs: those of the current one from ``first`` on, those since its last
    barrier from ``since`` on.
    """

    def __init__(self, kernel: str, spans: dict[int, Span], warps: int = 4) -> None:
        self.kernel, self.segment = kernel, 0
        self.threads = 32 * warps if warps > 1 else 0
        self.spans = spans = [spans[low] for low in sorted(spans) if not spans[low].tensor.expired()]
        self.low, self.high = (np.array([getattr(s, end) for s in spans], np.int64) for end in ("low", "high"))
        self.starts = np.cumsum([0, *(self.high - self.low)])
        self.unwritten = np.concatenate([s.unwritten for s in spans])
        # segments: of the last store, the first and last load, the last one by several warps, the last atomic; and the
        # lane of that store
        none = np.zeros((6, self.starts[-1]), np.int32)
        self.stored, self.loaded_first, self.loaded, self.loaded_by_all, self.exchanged, self.lane = none
        self.released: dict[int, set[int]] = defaultdict(set)  # by the address of the atomic

    def enter(self, *program: int) -> None:
        self.program, self.segment = program, self.segment + 1
        self.first = self.since = self.segment
        self.seen: set[int] = set()  # segments of others that came before
        self.arriving: set[int] = set()  # seen by one thread, and by all after the next barrier

    def barrier(self) -> None:
        self.since = self.segment = self.segment + 1
        self.seen |= self.arriving

    def place(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which elements lie inside of a tensor, and the places ``[elements, size]`` of the bytes of those."""
        n = np.searchsorted(self.low, address, side="right") - 1
        inside = (n >= 0) & (address + size <= self.high[n])
        return inside, (address - self.low[n] + self.starts[n])[inside, None] + np.arange(size)

    def others(self, *segments: np.ndarray) -> np.ndarray:
        """Return where one of the segments belongs to another program and need not have come before."""
        theirs = [(s > 0) & (s < self.first) for s in segments]
        if self.seen:
            theirs = [t & ~np.isin(s, list(self.seen)) for t, s in zip(theirs, segments, strict=True)]
        return np.any(theirs, 0)

    def load(self, at: np.ndarray, lanes: np.ndarray, size: int) -> Findings:
        stored, first = self.stored[at], self.loaded_first[at]
        yield "loads what another program writes", self.others(stored, self.exchanged[at])
        own = stored >= self.since
        yield "loads its own store without a barrier", own
        self.loaded_first[at] = np.where(first == 0, self.segment, first)
        self.loaded[at] = self.segment
        if size < self.threads:
            self.loaded_by_all[at] = self.segment

    def store(self, at: np.ndarray, lanes: np.ndarray, size: int) -> Findings:
        yield "stores what another program writes", self.others(self.stored[at], self.exchanged[at])
        yield "stores what another program loads", self.others(self.loaded_first[at], self.loaded[at])
        yield "stores what its other warps may still load", self.loaded_by_all[at] >= self.since
        self.lane[at] = lanes[:, None]
        yield "stores twice to an address", self.lane[at] != lanes[:, None]
        self.stored[at] = self.segment
        self.unwritten[at] = False

    def exchange(self, at: np.ndarray, release: bool, acquire: bool) -> Findings:
        plain = self.others(self.stored[at], self.loaded_first[at], self.loaded[at])
        yield "has an atomic on what another program loads or stores", plain
        self.segment += 1
        self.exchanged[at] = self.segment
        self.unwritten[at] = False
        for address in at[:, 0]:
            self.arriving |= self.released[address] if acquire else set()
            if release:  # what a barrier has closed, and the atomic itself
                self.released[address] |= {*range(self.first, self.since), self.segment} | self.seen
        self.segment += 1


class Watch:
    """Stands in for the interpreter's entry points, which come as ``original``."""

    def __init__(self, rubbish: Container[str]) -> None:
        self.fences, self.rubbish = Fences(), rubbish
        self.faults: list[Fault] = []  # one a launch and kind
        self.accesses: Counter[str] = Counter()  # how many elements a kernel loaded, stored and exchanged

    def _note(self, kind: str, wrong: np.ndarray, address: np.ndarray) -> None:
        if not wrong.any():
            return
        wrong = wrong.reshape(len(address), -1).any(1)
        if kind not in self._known:
            self._known[kind] = Fault(self.launch.kernel, kind, self.launch.program, int(address[wrong][0]))
            self.faults.append(self._known[kind])
        self._known[kind].count += int(wrong.sum())

    def _access(self, ptrs: Any, mask: Any, check: Callable[..., Findings]) -> tuple[Any, np.ndarray, np.ndarray]:
        """Return the mask of what lies inside, the addresses of that, and the places of its bytes."""
        address = ptrs.data.astype(np.int64)
        lanes = np.flatnonzero(np.broadcast_to(np.asarray(mask.data, bool), address.shape))
        active = address.reshape(-1)[lanes]
        inside, at = self.launch.place(active, max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
        self.accesses[self.launch.kernel] += len(lanes)
        self._note("lies outside", ~inside, active)
        for kind, wrong in check(at, lanes[inside], address.size):
            self._note(kind, wrong, active[inside])
        allowed = np.zeros(address.shape, bool)
        allowed.reshape(-1)[lanes[inside]] = True
        return TensorHandle(allowed, tl.int1), active[inside], at

    def launched(self, original: Original, executor: Any, *args: Any, **kwargs: Any) -> None:
        self.launch = Launch(executor.fn.__name__, self.fences.spans, kwargs.get("num_warps", 4))
        self._known: dict[str, Fault] = {}
        original(executor, *args, **kwargs)
        ends = self.launch.starts[1:-1]
        for span, unwritten in zip(self.launch.spans, np.split(self.launch.unwritten, ends), strict=True):
            span.unwritten = unwritten

    def load(self, original: Original, builder: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        allowed, address, at = self._access(ptrs, mask, self.launch.load)
        found = original(builder, ptrs, allowed, *rest, **named)
        unwritten = self.launch.unwritten[at].all(1)
        if unwritten.any() and self.launch.kernel not in self.rubbish:
            # what torch has written is not known, but not poison any more
            bits = np.ascontiguousarray(found.data[allowed.data]).view(np.uint8).reshape(at.shape)
            self._note("loads what was never written", unwritten & (bits == POISON).all(1), address)
        return found

    def store(self, original: Original, builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
        original(builder, ptrs, value, self._access(ptrs, mask, self.launch.store)[0], *rest)

    def atomic(self, original: Original, builder: Any, op: Any, ptr: Any, value: Any, mask: Any, *order: Any) -> Any:
        sem = None if order[1] == ir.MEM_SYNC_SCOPE.CTA else order[0]
        release, acquire = (sem in (one, ORDER.ACQUIRE_RELEASE) for one in (ORDER.RELEASE, ORDER.ACQUIRE))
        check = lambda at, *_: self.launch.exchange(at, release, acquire)  # noqa: E731
        return original(builder, op, ptr, value, self._access(ptr, mask, check)[0], *order)

    def hint(self, original: Original, handle: Any, name: str, values: list[int]) -> None:
        if name == "tt.divisibility" and handle.data.size == 1:
            self._note("is not the multiple it is said to be", handle.data % values[0] != 0, handle.data)
        original(handle, name, values)


@contextmanager
def watched(rubbish: Container[str] = ()) -> Iterator[Watch]:
    """Watch every launch inside; the kernels named in ``rubbish`` may load what was never written."""
    watch = Watch(rubbish)
    places = {
        (GridExecutor, "__call__"): watch.launched,
        (InterpreterBuilder, "set_grid_idx"): lambda was, i, *program: (watch.launch.enter(*program), was(i, *program)),
        (InterpreterBuilder, "create_barrier"): lambda *_: watch.launch.barrier(),
        (InterpreterBuilder, "create_masked_load"): watch.load,  # all loads and stores end in these two
        (InterpreterBuilder, "create_masked_store"): watch.store,
        (InterpreterBuilder, "create_atomic_rmw"): watch.atomic,
        (InterpreterBuilder, "create_atomic_cas"): mock.Mock(side_effect=NotImplementedError),
        (TensorHandle, "set_attr"): watch.hint,
    }
    with ExitStack() as stack:
        for (owner, name), own in places.items():
            instead = lambda i, own, was, *args, **kwargs: own(was, i, *args, **kwargs)  # noqa: E731
            stack.enter_context(mock.patch.object(owner, name, partialmethod(instead, own, getattr(owner, name))))
        stack.enter_context(watch.fences)
        yield watch
