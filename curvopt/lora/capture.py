"""The one hook: it sees u and the gradient d at u, and keeps their r×r sums.

u is the output of the module that applies A, and d is the gradient of the loss at that output. A forward hook on the
module forms uᵀu and puts a tensor hook on u; when the backward brings d, both sums are added. Counting happens in
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
        uu: Σ uᵀu over the rows, (r, r), fp32 (fp64 for fp64 signals).
        dd: Σ dᵀd over the rows, (r, r), of the gradients as they came: not scaled by the number of rows.
        n: Rows summed (tokens, or positions of a convolution's output).
        calls: Backward passes through the layer that were summed.
    """

    uu: Tensor
    dd: Tensor
    n: int
    calls: int


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

    def _add(self, pair: LoraPair, uu: Tensor, d: Tensor) -> None:
        """Count one backward hit: uu is (r, r), d is (n, r) in the dtype of uu."""
        self.fired[pair] += 1
        sums = self._sums.get(pair)
        if sums is None or _layout(sums.uu) != _layout(uu):  # the rank, device or dtype has changed
            sums = self._sums[pair] = Sums(torch.zeros_like(uu), torch.zeros_like(uu), 0, 0)
        sums.uu.add_(uu)
        sums.dd.addmm_(d.T, d)
        sums.n += d.shape[0]
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
        if not torch.is_grad_enabled() or not (pair.a_trainable or pair.b_trainable):
            return None
        watched = output
        if not output.requires_grad:
            # A frozen A on an input without gradient: the backward would not come by otherwise.
            watched = output.detach().requires_grad_()
        with torch.no_grad():
            channel = _channel(module, output)
            u = _rows(output, channel)
            # In-place, so that autocast leaves it alone; only r×r numbers outlive the forward.
            uu = u.new_zeros(u.shape[1], u.shape[1]).addmm_(u.T, u)
        watched.register_hook(_on_gradient(weakref.ref(capture), weakref.ref(pair), uu, channel))
        return None if watched is output else watched


def _on_gradient(
    capture: weakref.ref[Capture], pair: weakref.ref[LoraPair], uu: Tensor, channel: int
) -> Callable[[Tensor | None], None]:
    """The tensor hook on u: d has u's shape, its rank is dimension `channel`."""

    def hook(d: Tensor | None) -> None:
        owner, key = capture(), pair()
        if d is None or owner is None or key is None:
            return
        with torch.no_grad():
            owner._add(key, uu, _rows(d, channel))

    return hook


def _channel(module: nn.Module, output: Tensor) -> int:
    """The dimension of the output that is the rank: the last, but the channels of a convolution."""
    spatial = module.weight.ndim - 2 if isinstance(module, _ConvNd) else 0
    return output.ndim - 1 - spatial


def _rows(signal: Tensor, channel: int) -> Tensor:
    """The signal as (n, r), in fp32, or fp64 if it is fp64."""
    rows = signal.detach().movedim(channel, -1).flatten(0, -2) if signal.ndim > 1 else signal.detach()[None]
    return rows if rows.dtype == torch.float64 else rows.float()


def _layout(tensor: Tensor) -> tuple[torch.Size, torch.device, torch.dtype]:
    return tensor.shape, tensor.device, tensor.dtype
