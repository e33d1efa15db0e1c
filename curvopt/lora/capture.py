"""The one hook: it sees u and the gradient d at u, and keeps their r×r sums.

u is the output of the module that applies A, and d is the gradient of the loss at that output. A forward hook on the
module puts a tensor hook on u; when the backward brings d, both sums are added. Counting happens in
the backward alone: a forward without one (evaluation, generation, the first pass of a checkpointed block) leaves
nothing, and a recomputed forward is not counted twice.

On the CPU each sum is one product at once. On a device products this small are all launch: u and d wait until many can
be summed by one op.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from curvopt.functional import compute_dtype
from curvopt.lora.pair import LoraPair
from curvopt.ops import Ops

# bytes of u and d that may wait for their products on a device
WAITING = 2**26


@dataclass
class Sums:
    """What one pair has gathered since the last `pop`.

    Attributes:
        both: Σ uᵀu and Σ dᵀd, (2, r, r), fp32 (fp64 for fp64 signals); `uu` and `dd` are its two halves.
            d is as it came, not scaled by the number of rows.
        n: Rows summed (tokens, or positions of a convolution's output); a 0-d tensor where a mask counted them.
        calls: Backward passes through the layer that were summed.
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


class Capture:
    """Forward hooks on the signal modules of some pairs, summing uᵀu and dᵀd.

    Only pairs with a `signal` are watched, and only while at least one factor is trainable. The modules hold no
    reference to this object: once it is gone, or on a copied or unpickled model, the hooks do nothing.

    Args:
        pairs: The pairs to watch.
        ops: Makes the products that waited; the reference if None.
        waiting: Bytes of u and d that may wait; by default none on the CPU, 64 MiB elsewhere.
        static: Keep sums and counts in the same memory from `pop` to `pop`, and let nothing wait: a CUDA graph that
            pops them finds them there when it is replayed. Counts are then 0-d tensors.

    Attributes:
        pairs: The pairs, in the given order.
        active: While False the hooks return at once. Read in the forward.
        mask: Which rows of the coming forward passes are real, (n,) float, or None for all. Layers with another
            number of rows count all of theirs. Read in the forward; gone after `pop` and `discard`.
        fired: Backward hits of each pair since construction, {pair: int}.
    """

    def __init__(
        self, pairs: Iterable[LoraPair], ops: Ops | None = None, waiting: int | None = None, static: bool = False
    ):
        self.pairs = list(pairs)
        self.active = True
        self.mask: Tensor | None = None
        self.fired: dict[LoraPair, int] = dict.fromkeys(self.pairs, 0)
        self._ops = Ops("torch") if ops is None else ops
        self._limit = 0 if static else waiting
        self._static = static
        self._sums: dict[LoraPair, Sums] = {}
        self._waiting: list[_Product] = []
        self._waiting_bytes = 0
        self._hooked: dict[LoraPair, tuple[weakref.ref[nn.Module], RemovableHandle]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Handles and weak references belong to the live model; a copy starts unattached and empty.
        own = ("pairs", "active", "fired", "_limit", "_static")
        return {key: self.__dict__[key] for key in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, mask=None, _ops=Ops("torch"), _sums={}, _waiting=[], _waiting_bytes=0, _hooked={})

    def attach(self) -> None:
        """Put the hooks on; modules that were replaced since the last call are hooked anew."""
        for pair in self.pairs:
            module = pair.signal
            old, handle = self._hooked.get(pair, (None, None))
            if module is not None and old is not None and old() is module:
                continue
            if handle is not None:
                handle.remove()
                del self._hooked[pair]
            if module is not None:
                hook = _Hook(weakref.ref(self), weakref.ref(pair))
                self._hooked[pair] = (weakref.ref(module), module.register_forward_hook(hook))

    def remove(self) -> None:
        """Take the hooks off. What has been summed stays until `pop` or `discard`."""
        for _, handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()

    def pop(self) -> dict[LoraPair, Sums]:
        """Give and clear the sums since the last call; pairs that no backward reached are not in it."""
        self._sum_up()
        sums = self._sums
        if self._static:
            sums = {pair: Sums(s.both.clone(), s.n + 0, s.calls) for pair, s in sums.items()}
        self.discard()
        return {pair: sums[pair] for pair in self.pairs if pair in sums}

    def discard(self) -> None:
        """Forget the sums since the last `pop`."""
        self._waiting, self._waiting_bytes, self.mask = [], 0, None
        if not self._static:
            self._sums = {}
        for s in self._sums.values():
            s.both.zero_()
            s.n = s.n.zero_() if isinstance(s.n, Tensor) else 0
            s.calls = 0

    def _add(self, pair: LoraPair, u: Tensor, d: Tensor, mask: Tensor | None) -> None:
        """Count one backward hit; u and d are (n, r), mask is (n,) or None."""
        self.fired[pair] += 1
        dtype, r = compute_dtype(u.dtype), u.shape[1]
        sums = self._sums.get(pair)
        if sums is None or (sums.both.shape[1], sums.both.dtype, sums.both.device) != (r, dtype, u.device):
            n = torch.zeros((), dtype=torch.float64, device=u.device) if self._static else 0
            sums = self._sums[pair] = Sums(torch.zeros(2, r, r, dtype=dtype, device=u.device), n)
        sums.n += u.shape[0] if mask is None else mask.sum()
        sums.calls += 1
        limit = self._limit if self._limit is not None else 0 if u.device.type == "cpu" else WAITING
        if limit > 0:
            self._waiting += [_Product(sums.uu, u, mask), _Product(sums.dd, d, mask)]
            self._waiting_bytes += u.nbytes + d.nbytes
            if self._waiting_bytes > limit:
                self._sum_up()
            return
        for S, z in ((sums.uu, u.to(dtype)), (sums.dd, d.to(dtype))):
            # in place: no autocast, no graph
            S.addmm_(z.T if mask is None else z.T * mask, z)

    def _sum_up(self) -> None:
        """Do the products that wait, those of one kind by one op."""
        kinds: dict[tuple[Any, ...], list[_Product]] = {}
        for p in self._waiting:
            kinds.setdefault((p.z.shape[1], p.z.dtype, p.z.device, p.mask is None), []).append(p)
        for products in kinds.values():
            masks = [p.mask for p in products if p.mask is not None]
            G = self._ops("gram_many", [p.z for p in products], None, masks or None)
            torch._foreach_add_([p.into for p in products], list(G.unbind()))
        self._waiting, self._waiting_bytes = [], 0


@dataclass
class _Product:
    """zᵀz of the rows of z (n, r) that a mask (n,) leaves, to be added to a sum."""

    into: Tensor
    z: Tensor
    mask: Tensor | None


class _Hook:
    """What stands on the module: weak references only, and nothing at all once copied or pickled."""

    def __init__(
        self,
        capture: weakref.ref[Capture] | None = None,
        pair: weakref.ref[LoraPair] | None = None,
    ):
        self._capture = capture
        self._pair = pair

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()  # copies of the model are not watched

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        capture = self._capture() if self._capture is not None else None
        pair = self._pair() if self._pair is not None else None
        if capture is None or pair is None or not capture.active or not isinstance(output, Tensor):
            return None
        if not torch.is_grad_enabled() or not (module.weight.requires_grad or pair.b_trainable):
            return None
        watched = output
        if not output.requires_grad:
            # A frozen A on an input without gradient: the backward would not come by otherwise.
            watched = output.detach().requires_grad_()
        channel = _channel(module, output)
        # the backward of B needs u too, so that holding it costs nothing (but r numbers a row under checkpointing)
        mask = capture.mask
        if mask is not None and mask.numel() * output.shape[channel] != output.numel():
            mask = None
        watched.register_hook(_on_gradient(weakref.ref(capture), weakref.ref(pair), output.detach(), channel, mask))
        return None if watched is output else watched


def _on_gradient(
    capture: weakref.ref[Capture], pair: weakref.ref[LoraPair], u: Tensor, channel: int, mask: Tensor | None
) -> Callable[[Tensor | None], None]:
    """The tensor hook on u: d has u's shape, its rank is dimension `channel`."""

    def hook(d: Tensor | None) -> None:
        owner, key = capture(), pair()
        if d is not None and owner is not None and key is not None:
            owner._add(key, _rows(u, channel), _rows(d.detach(), channel), mask)

    return hook


def _channel(module: nn.Module, output: Tensor) -> int:
    """The dimension of the output that is the rank: the last, but the channels of a convolution."""
    spatial = module.weight.ndim - 2 if isinstance(module, _ConvNd) else 0
    return output.ndim - 1 - spatial


def _rows(signal: Tensor, channel: int) -> Tensor:
    """The signal as (n, r)."""
    if channel != signal.ndim - 1:
        signal = signal.movedim(channel, -1)
    return signal if signal.ndim == 2 else signal.reshape(-1, signal.shape[-1])
