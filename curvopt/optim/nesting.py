"""Nested ranks by masks, for any optimizer of pairs: in training every sample of a batch computes at its own rank.

The masks stand in a hook on u = A x. One number a step, drawn by the optimizer, decides them all, so what is drawn does
not depend on how often a forward runs: a checkpointed block that is recomputed gets the masks it had, and a resumed run
those of the run that was never interrupted. Micro-batches are told apart by how many gradients have arrived at the pair
since the last step, which is the same when a block is computed and when it is recomputed.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.distributed import local, process_index, world_size
from curvopt.functional.nested import powers_of_two, stratified_ranks
from curvopt.lora import LoraPair
from curvopt.lora.hooks import PairHooks, Watch, backward_pass, on_arrival
from curvopt.optim.base import Side
from curvopt.optim.bucket import Bucket, cadence_of
from curvopt.optim.checking import check, is_number, is_whole, warn

# one more golden section for each micro-batch: offsets that fill [0, 1) evenly, however many there are
GOLDEN = (5**0.5 - 1) / 2

# defaults of the schedule, chosen by benchmarks/nested.py: share of the samples at full rank, steps before the first
# masks, steps from one ordering of the directions to the next
FULL_SHARE, WARMUP, REORDER_EVERY = 0.5, 25, 10


# ---------------------------------------------------------------------- settings


def check_ranks(g: dict[str, Any], name: str) -> None:
    """Raise a ValueError unless the group's ``name`` is None or ascending ranks; make these a tuple."""
    ranks = g[name]
    listed = isinstance(ranks, (list, tuple)) and len(ranks) > 0
    whole = listed and all(is_whole(k) and k >= 1 for k in ranks)
    ascending = whole and all(a < b for a, b in itertools.pairwise(ranks))
    check(name, ranks, ranks is None or ascending, "None or ascending integers ≥ 1")
    g[name] = None if ranks is None else tuple(ranks)  # a list could be changed in place, unseen


def check_schedule(g: dict[str, Any], warmup: str) -> None:
    """Raise a ValueError if the share at full rank or the steps before the first masks are out of range."""
    share = g["full_share"]
    check("full_share", share, is_number(share) and 0 < share <= 1, "a number in (0, 1]")
    check(warmup, g[warmup], is_whole(g[warmup]) and g[warmup] >= 0, "an integer ≥ 0")


def check_maskable(pair: LoraPair, name: str, value: Any, instead: str) -> None:
    """Raise a ValueError if samples of a pair cannot be masked, or its directions cannot be put in order."""
    check(f"{name} of {pair.name}", value, pair.signal is not None, f"{instead} ({pair.note})")
    check(f"{name} of {pair.name}", value, not pair.bound, f"{instead} ({pair.bound})")


def check_largest(sides: Iterable[Side], name: str) -> None:
    """Raise a ValueError for a group whose nested ranks go beyond those of all its pairs."""
    most: dict[int, tuple[dict[str, Any], int]] = {}
    for side in sides:
        group, r = most.get(id(side.group), (side.group, 0))
        most[id(group)] = group, max(r, side.pair.rank)
    for group, r in most.values():
        ranks = group[name]
        check(name, ranks, ranks is None or ranks[-1] <= r, f"at most {r}, the largest rank of a pair")


def sample_ranks(ranks: Sequence[int] | None, r: int) -> tuple[int, ...]:
    """Return the ranks that the samples of a pair of rank r are at: the given ones below r, and r itself."""
    return powers_of_two(r) if ranks is None else (*(k for k in ranks if k < r), r)


# ---------------------------------------------------------------------- the draw


class StepDraw:
    """One uniform number a step, and the generator it is from.

    Args:
        generator: On the CPU; None: one seeded with 0.

    Attributes:
        last: The number drawn last, in [0, 1); None before the first.

    Raises:
        TypeError: ``generator`` is no CPU generator.
    """

    SMALL = frozenset({"generator", "draw"})

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
            raise TypeError(f"generator must be None or a torch.Generator on the CPU, got {generator!r}")
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.last: float | None = None

    def next(self) -> float:
        """Draw a number."""
        self.last = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        return self.last

    def save(self, sides: Iterable[Side], states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Put generator and last number into the state of the first side of every pair among ``sides``."""
        draw = torch.tensor(torch.nan if self.last is None else self.last, dtype=torch.float64)
        state = self._generator.get_state()
        for side in {side.pair: side for side in reversed(list(sides))}.values():
            if side.param in states:
                states[side.param].update(generator=state, draw=draw)

    def load(self, states: Iterable[Mapping[str, Any]]) -> bool:
        """Take what `save` has put there; returns whether anything was."""
        kept = next((s for s in states if "generator" in s), None)
        if kept is not None:
            self._generator.set_state(kept["generator"].cpu())
            draw = float(kept["draw"])
            self.last = None if draw != draw else draw
        return kept is not None

    def __getstate__(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "last": self.last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._generator = torch.Generator()
        self._generator.set_state(state["generator"])
        self.last = state["last"]


# ---------------------------------------------------------------------- the masks


@dataclass(frozen=True)
class MaskedPair:
    """A pair whose samples are masked.

    Attributes:
        pair: the pair.
        ranks: the ranks of its samples, ascending; the last is its own.
        group: the param group whose ``full_share`` and warm-up apply, as they stand at each forward.
    """

    pair: LoraPair
    ranks: tuple[int, ...]
    group: Mapping[str, Any]


def _nothing() -> None:
    return None


@dataclass(eq=False)
class _Record:
    """One pair: its micro-batches since the last step, and whether its forward was masked since then.

    Attributes:
        nest: the pair and the ranks of its samples.
        counted: weak reference to the parameter whose gradients are counted. In the forward FSDP2 has another in its
            place, which never has a gradient.
        part: the number of the micro-batch since the last step.
        arrived: whether a gradient has arrived since the last forward outside of a backward pass. Under reentrant
            checkpointing one arrives for every use of a layer.
        masked: whether the forward was.
    """

    nest: MaskedPair
    counted: Callable[[], Tensor | None] = _nothing
    part: int = 0
    arrived: bool = False
    masked: bool = False


class SampleMasks:
    """The hooks of all pairs whose samples are masked.

    The modules hold weak references alone: once this object is gone its hooks do nothing, and on a copied or unpickled
    model neither.

    Args:
        nests: The pairs to mask, each with a `LoraPair.signal`.
        warmup: The setting of their groups that holds the number of steps before the first masks.
        before: The masks that these replace; their hooks are removed, and if they were switched off, these are.

    Attributes:
        enabled: False once `remove` was called.
        pairs: what is masked.
    """

    def __init__(self, nests: Iterable[MaskedPair], warmup: str, before: "SampleMasks | None" = None) -> None:
        self.enabled: bool = before is None or before.enabled
        if before is not None:
            before.remove()
        self._warmup = warmup
        self.pairs = list(nests)
        self._records = {nest.pair: _Record(nest) for nest in self.pairs}
        self._hooks = PairHooks()
        self._draw: float | None = None
        self._steps = 0
        self._made: dict[tuple[Any, ...], Tensor] = {}
        self._warned = False
        self.attach()

    def attach(self) -> None:
        """Register the hooks; modules and parameters replaced since the last call are hooked again."""
        for pair, record in self._records.items() if self.enabled else ():
            if not pair.exists:
                self._hooks.remove(pair)
                continue
            counted = pair.B if pair.b_trainable and not pair.a_trainable else pair.A
            now = (pair.signal, counted)
            if self._hooks.stand_on(pair, now):
                continue
            self._hooks.remove(pair)
            assert now[0] is not None, "checked by `check_maskable`"
            me, mine = weakref.ref(self), weakref.ref(record)
            # also while both are frozen: a resting adapter may be active in the next step
            counts = on_arrival(counted, _Arrival(me, mine))
            self._hooks.put(pair, now, [now[0].register_forward_hook(_Mask(me, mine)), counts])
            record.counted = weakref.ref(counted)

    @property
    def attached(self) -> bool:
        """Whether any hook is on."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Remove the hooks permanently."""
        self.enabled = False
        self._hooks.remove_all()

    def advance(self, draw: float | None, buckets: Sequence[Bucket], moved: Sequence[Bucket]) -> None:
        """End a step: warn of pairs that were not masked, look after the hooks, arm them for the next step.

        Args:
            draw: What its masks are drawn from; None: no masks.
            buckets: All of the optimizer's.
            moved: Those that had gradients in this step.
        """
        self._warn_of_silence(side.pair for bucket in moved for side in bucket.sides)
        self.attach()
        self.arm(draw, max((bucket.steps for bucket in buckets), default=0))

    def arm(self, draw: float | None, steps: int) -> None:
        """Say what the masks of the next step are drawn from, and how many steps were taken."""
        self._draw, self._steps = draw, steps
        self._made.clear()
        for record in self._records.values():
            record.part, record.arrived, record.masked = 0, False, False

    def _warn_of_silence(self, moving: Iterable[LoraPair]) -> None:
        """Warn, once, of pairs with gradients in this step whose forward should have been masked and was not."""
        if self._warned or not self.enabled or not self._records:
            return
        found = dict.fromkeys(self._records[pair] for pair in moving if pair in self._records)
        silent = [r.nest.pair.name for r in found if self._active(r) and not r.masked and _moves(r.nest.pair)]
        if silent:
            self._warned = True
            warn(
                f"{len(silent)} pairs received gradients but no sample was masked ({', '.join(silent[:3])}"
                f"{', ...' if len(silent) > 3 else ''}): smaller ranks are not trained. Their module for A was not "
                "called (a fused forward), or the model is in evaluation mode: call model.train()"
            )

    def _active(self, record: _Record) -> bool:
        g = record.nest.group
        drawn = self._draw is not None and self._steps >= g[self._warmup]
        return drawn and g["full_share"] < 1 and len(record.nest.ranks) > 1

    def apply(self, record: _Record, u: Tensor) -> Tensor | None:
        """Return u with each sample's directions above its rank at zero; None where nothing is masked."""
        nest = record.nest
        if not self._active(record):
            return None
        record.masked = True
        pair, counted = nest.pair, record.counted()
        if backward_pass() == -1:  # within one, checkpointing repeats a forward, which needs the masks that it had
            dropped = counted is None or counted.grad is None  # what follows is the first micro-batch again
            record.part = 0 if dropped else record.part + record.arrived
            record.arrived = False
        channel = u.ndim - 1 - (pair.A.ndim - 2 if pair.kind == "conv" else 0)
        n = u.shape[0] if channel > 0 else 1
        mask = self._mask(nest, record.part, n, u)
        if channel == 0:
            return u * mask[0].view(-1, *[1] * (u.ndim - 1))
        shape = [1] * u.ndim
        shape[0], shape[channel] = n, u.shape[channel]
        return u * mask.view(shape)

    def _mask(self, nest: MaskedPair, part: int, n: int, u: Tensor) -> Tensor:
        """Return ``[n, r]`` ones and zeros in the dtype of u, the same for all pairs of these ranks."""
        r, share = nest.pair.rank, nest.group["full_share"]
        key = (part, n, nest.ranks, r, share, u.dtype, u.device)
        if key not in self._made:
            assert self._draw is not None, "checked by `_active`"
            process = process_index()
            seed = int(self._draw * 2**53) + part * 0x9E3779B97F4A7C15 + process * 0x2545F4914F6CDD1D
            offset = (self._draw + part * GOLDEN + process / world_size()) % 1.0
            generator = torch.Generator().manual_seed(seed % 2**63)
            ranks = stratified_ranks(nest.ranks, share, n, offset, generator)
            mask = (torch.arange(r) < ranks[:, None]).to(u.dtype)
            self._made[key] = mask.to(u.device, non_blocking=True)
        return self._made[key]


def steps_taken(states: Iterable[Mapping[str, Any]]) -> int:
    """Return the largest number of steps that any state has seen."""
    return int(max((cadence_of(s)[0] for s in states), default=0))


def _moves(pair: LoraPair) -> bool:
    """Whether a pair has a gradient that is not zero: an idle process is given zeros (`torch` Join)."""
    return any(p.grad is not None and bool(local(p.grad).any()) for p in (pair.A, pair.B))


class _Mask(Watch):
    """Stands on the module that computes u; acts in training mode alone, as dropout does."""

    @torch._disable_dynamo  # a graph break: what a compiler would trace of it changes at every step
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Return u with the samples' directions masked; None for u as it is."""
        if not module.training or not isinstance(output, Tensor):
            return None
        masks, record = self.alive()
        return None if masks is None or record is None else masks.apply(record, output)


class _Arrival(Watch):
    """Stands on A (on B where A is frozen): its gradient has been added to ``.grad``."""

    def __call__(self, param: Tensor) -> None:
        _, record = self.alive()
        if record is not None:
            record.arrived = True
