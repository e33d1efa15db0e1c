"""Masks by sample: in training every sample of a batch computes at a rank of its own, through a hook on u = A x.

One number a step, drawn by the optimizer, decides everything, so what is drawn does not depend on how often a forward
runs: a checkpointed block that is recomputed gets the masks it had, and a resumed run those of the run that was never
interrupted. Micro-batches are told apart by how many gradients have arrived at the pair since the last step, which is
the same when a block is computed and when it is recomputed.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.distributed import process_index, world_size
from curvopt.functional.nested import stratified_ranks
from curvopt.lora import LoraPair
from curvopt.optim.matryoshka.nested_ranks import NestedRanks

# one more golden section for each micro-batch: offsets that fill [0, 1) evenly, however many there are
GOLDEN = (5**0.5 - 1) / 2


def _nothing() -> None:
    return None


@dataclass(eq=False)
class _Record:
    """One pair: gradients that arrived since the last step, and whether its forward was masked since then.

    Attributes:
        nest: the nested ranks of the pair.
        counted: weak reference to the parameter whose gradients are counted. In the forward FSDP2 has another in its
            place, which never has a gradient.
        arrived: how many there were.
        masked: whether the forward was.
    """

    nest: NestedRanks
    counted: Callable[[], Tensor | None] = _nothing
    arrived: int = 0
    masked: bool = False


class SampleMasks:
    """The hooks of all pairs whose samples are masked.

    The modules hold weak references alone: once this object is gone its hooks do nothing, and on a copied or unpickled
    model neither.

    Args:
        nests: The pairs to mask, each with a `LoraPair.signal`.
        enabled: Whether hooks are put on at all.

    Attributes:
        enabled: False once `remove` was called.
    """

    def __init__(self, nests: Iterable[NestedRanks], enabled: bool = True) -> None:
        self.enabled = enabled
        self._records = {nest.pair: _Record(nest) for nest in nests}
        self._hooked: dict[LoraPair, tuple[Any, ...]] = {}
        self._handles: dict[LoraPair, list[Any]] = {}
        self._draw: float | None = None
        self._steps = 0
        self._made: dict[tuple[Any, ...], Tensor] = {}
        self._warned = False
        weakref.finalize(self, _remove_all, self._handles)

    def attach(self) -> None:
        """Register the hooks; modules and parameters replaced since the last call are hooked again."""
        for pair, record in self._records.items() if self.enabled else ():
            counted = pair.A if pair.a_trainable else pair.B
            now = (pair.signal, counted)
            if pair in self._hooked and all(a is b() for a, b in zip(now, self._hooked[pair], strict=True)):
                continue
            self._unhook(pair)
            assert now[0] is not None, "checked by `check_pairs`"
            hooks = [now[0].register_forward_hook(_Mask(weakref.ref(self), weakref.ref(record)))]
            if counted.requires_grad:
                hooks.append(counted.register_post_accumulate_grad_hook(_Arrival(None, weakref.ref(record))))
            self._handles[pair], self._hooked[pair] = hooks, tuple(map(weakref.ref, now))
            record.counted = weakref.ref(counted)

    @property
    def attached(self) -> bool:
        """Whether any hook is on."""
        return bool(self._handles)

    def remove(self) -> None:
        """Remove the hooks permanently."""
        self.enabled = False
        for pair in list(self._hooked):
            self._unhook(pair)

    def _unhook(self, pair: LoraPair) -> None:
        for handle in self._handles.pop(pair, ()):
            handle.remove()
        self._hooked.pop(pair, None)

    def arm(self, draw: float | None, steps: int) -> None:
        """Say what the masks of the next step are drawn from, and how many steps were taken."""
        self._draw, self._steps = draw, steps
        self._made.clear()
        for record in self._records.values():
            record.arrived, record.masked = 0, False

    def warn_of_silence(self, moving: Iterable[LoraPair]) -> None:
        """Warn, once, of pairs with gradients in this step whose forward should have been masked and was not."""
        if self._warned or not self.enabled or not self._records:
            return
        found = dict.fromkeys(self._records[pair] for pair in moving if pair in self._records)
        silent = [r.nest.pair.name for r in found if self._active(r) and not r.masked]
        if silent:
            self._warned = True
            warnings.warn(
                f"{len(silent)} pairs received gradients but no sample was masked ({', '.join(silent[:3])}"
                f"{', ...' if len(silent) > 3 else ''}): smaller ranks are not trained. Their module for A was not "
                "called (a fused forward), or the model is in evaluation mode: call model.train()",
                UserWarning,
                stacklevel=4,
            )

    def _active(self, record: _Record) -> bool:
        g = record.nest.group
        drawn = self._draw is not None and self._steps >= g["warmup_steps"]
        return drawn and g["full_share"] < 1 and len(record.nest.ranks) > 1

    def apply(self, record: _Record, u: Tensor) -> Tensor | None:
        """Return u with each sample's directions above its rank at zero; None where nothing is masked."""
        nest = record.nest
        if not self._active(record):
            return None
        record.masked = True
        pair, counted = nest.pair, record.counted()
        if counted is None or counted.grad is None:
            record.arrived = 0  # gradients were dropped: what follows is the first micro-batch again
        channel = u.ndim - 1 - (pair.A.ndim - 2 if pair.kind == "conv" else 0)
        n = u.shape[0] if channel > 0 else 1
        mask = self._mask(nest, record.arrived, n, u)
        if channel == 0:
            return u * mask[0].view(-1, *[1] * (u.ndim - 1))
        shape = [1] * u.ndim
        shape[0], shape[channel] = n, u.shape[channel]
        return u * mask.view(shape)

    def _mask(self, nest: NestedRanks, part: int, n: int, u: Tensor) -> Tensor:
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


def _remove_all(handles: dict[LoraPair, list[Any]]) -> None:
    for own in handles.values():
        for handle in own:
            handle.remove()


class _Watch:
    """What stands on the model: weak references only, and nothing at all once copied or pickled."""

    def __init__(self, masks: Any = None, record: Any = None) -> None:
        self._masks, self._record = masks, record

    def __reduce__(self) -> tuple[type["_Watch"], tuple[()]]:
        return type(self), ()


class _Mask(_Watch):
    """Stands on the module that computes u; acts in training mode alone, as dropout does."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not module.training or self._masks is None or not isinstance(output, Tensor):
            return None
        masks, record = self._masks(), self._record()
        return None if masks is None or record is None else masks.apply(record, output)


class _Arrival(_Watch):
    """Stands on A (on B where A is frozen): its gradient has been added to ``.grad``."""

    def __call__(self, param: Tensor) -> None:
        record = None if self._record is None else self._record()
        if record is not None:
            record.arrived += 1
