"""The one hook: it sees u and the gradient d at u, and keeps their r×r sums.

u is the output of the module that applies A, and d is the gradient of the loss at that output. A forward hook on the
module puts a tensor hook on u; when the backward brings d, both sums are added. Counting happens in
the backward alone: a forward without one (evaluation, generation, the first pass of a checkpointed block) leaves
nothing, and a recomputed forward is not counted twice.
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

from curvopt.lora.pair import LoraPair


@dataclass
class Sums:
    """What one pair has gathered since the last `pop`.

    Attributes:
        total: Σ zᵀz of the rows z = (u, d), (2r, 2r), fp32 (fp64 for fp64 signals); `uu` and `dd` are its blocks.
            d is as it came, not scaled by the number of rows.
        n: Rows summed (tokens, or positions of a convolution's output).
        calls: Backward passes through the layer that were summed.
    """

    total: Tensor
    n: int = 0
    calls: int = 0

    @property
    def uu(self) -> Tensor:
        """Σ uᵀu, (r, r)."""
        r = self.total.shape[0] // 2
        return self.total[:r, :r]

    @property
    def dd(self) -> Tensor:
        """Σ dᵀd, (r, r)."""
        r = self.total.shape[0] // 2
        return self.total[r:, r:]


class Capture:
    """Forward hooks on the signal modules of some pairs, summing uᵀu and dᵀd.

    Only pairs with a `signal` are watched, and only while at least one factor is trainable. The modules hold no
    reference to this object: once it is gone, or on a copied or unpickled model, the hooks do nothing.

    Args:
        pairs: The pairs to watch.

    Attributes:
        pairs: The pairs, in the given order.
        active: While False the hooks return at once. Read in the forward.
        fired: Backward hits of each pair since construction, {pair: int}.
    """

    def __init__(self, pairs: Iterable[LoraPair]):
        self.pairs = list(pairs)
        self.active = True
        self.fired: dict[LoraPair, int] = dict.fromkeys(self.pairs, 0)
        self._sums: dict[LoraPair, Sums] = {}
        self._hooked: dict[LoraPair, tuple[weakref.ref[nn.Module], RemovableHandle]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Handles and weak references belong to the live model; a copy starts unattached and empty.
        return {"pairs": self.pairs, "active": self.active, "fired": self.fired}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _sums={}, _hooked={})

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
        sums, self._sums = self._sums, {}
        return {pair: sums[pair] for pair in self.pairs if pair in sums}

    def discard(self) -> None:
        """Forget the sums since the last `pop`."""
        self._sums = {}

    def _add(self, pair: LoraPair, u: Tensor, d: Tensor) -> None:
        """Count one backward hit; u and d are (n, r)."""
        self.fired[pair] += 1
        z = torch.cat((u, d), 1)  # one product for both; no autocast, no graph: z has no history and total is in place
        if z.dtype not in (torch.float32, torch.float64):
            z = z.float()
        sums = self._sums.get(pair)
        if sums is None or _layout(sums.total) != _layout(z):  # the rank, device or dtype has changed
            sums = self._sums[pair] = Sums(z.new_zeros(z.shape[1], z.shape[1]))
        sums.total.addmm_(z.T, z)
        sums.n += z.shape[0]
        sums.calls += 1


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
        watched.register_hook(_on_gradient(weakref.ref(capture), weakref.ref(pair), output.detach(), channel))
        return None if watched is output else watched


def _on_gradient(
    capture: weakref.ref[Capture], pair: weakref.ref[LoraPair], u: Tensor, channel: int
) -> Callable[[Tensor | None], None]:
    """The tensor hook on u: d has u's shape, its rank is dimension `channel`."""

    def hook(d: Tensor | None) -> None:
        owner, key = capture(), pair()
        if d is not None and owner is not None and key is not None:
            owner._add(key, _rows(u, channel), _rows(d.detach(), channel))

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


def _layout(tensor: Tensor) -> tuple[int, torch.device, torch.dtype]:
    return tensor.shape[1], tensor.device, tensor.dtype
