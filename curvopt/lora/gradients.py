"""The gradient of a frozen base weight, from what passes through its layer: Ḡ = Σ gᵀx, one layer at a time.

g is the gradient at the layer's output and x its input; the weight itself needs no gradient, is never touched, and may
be quantized. A forward hook on the layer puts a tensor hook on the output; when the backward brings g, the product is
added at once, so that no more than one layer's product exists beside the sums. As in `curvopt.lora.capture` counting
happens in the backward alone. x is kept the way autograd keeps activations, so that checkpointing drops it, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from curvopt.lora.pair import LoraPair


class BaseGradients:
    """Hooks on the layers of some pairs, summing the gradients of their base weights.

    A contribution that is not finite is left out. The modules hold no reference to this object: once it is gone, or on
    a copied or unpickled model, the hooks do nothing.

    Args:
        pairs: The pairs; those without a module cannot be watched.
        offload: Keep the sums on the CPU; each product is formed on the device and moved there.

    Attributes:
        sums: {pair: Σ G, (d_out, d_in)}, fp32 (fp64 for fp64 gradients). An embedding counts as the linear map of
            one-hot rows, a convolution's kernel has its dimensions after the first flattened.
        seen: {pair: steps in which a finite gradient came, 0-d fp32}.
        broken: Whether anything was left out since the last `commit`, {device: 0-d bool}.
        staged: Keep what comes apart from the sums until `commit` decides; a second set of sums.
    """

    def __init__(self, pairs: Iterable[LoraPair], offload: bool = False):
        self.pairs = list(pairs)
        self.offload = offload
        self.staged = False
        self.sums: dict[LoraPair, Tensor] = {}
        self.seen: dict[LoraPair, Tensor] = {}
        self.broken: dict[torch.device, Tensor] = {}
        self._pending: dict[LoraPair, Tensor] = {}
        self._hit: dict[LoraPair, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on."""
        self.remove()
        for pair in self.pairs:
            hook = _Hook(weakref.ref(self), weakref.ref(pair))
            if pair.module is not None:
                self._handles.append(pair.module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off. The sums stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def fresh(self) -> dict[LoraPair, Tensor]:
        """What came in the step that is not committed yet, as far as it is apart from what came before."""
        return self._pending if self.staged else {p: G for p, G in self.sums.items() if p not in self.seen}

    def discard(self) -> None:
        """Forget what came since the last `commit`, as far as it is apart from the sums."""
        self._pending, self.broken = {}, {}
        if self.staged:
            self._hit = {}

    def forget(self) -> None:
        """Forget all that came."""
        self.discard()
        self._hit = {}
        self.sums.clear()
        self.seen.clear()

    def commit(self, keep: Tensor | None = None, scale: Tensor | None = None) -> None:
        """End a step: count the layers it reached.

        Args:
            keep: 0-d bool: False drops the step; honoured by staged sums, and by the first step of all.
            scale: Loss scale to divide by, where the same holds.
        """
        for pair, hit in self._hit.items():
            taken = hit if keep is None else torch.where(keep.to(hit.device), hit, 0.0)
            first = pair not in self.seen
            if self.staged or (first and not (keep is None and scale is None)):
                part = self._pending.pop(pair) if self.staged else self.sums[pair]
                part.div_(1.0 if scale is None else scale.to(part.device))
                part = part.masked_fill_(taken.to(part.device) == 0, 0.0)
                if self.staged:
                    self.sums[pair] = self.sums[pair].add_(part) if pair in self.sums else part
            self.seen[pair] = taken.clone() if first else self.seen[pair] + taken
        self._hit, self._pending, self.broken = {}, {}, {}

    def _add(self, pair: LoraPair, x: Tensor, g: Tensor) -> None:
        """Take one backward hit in."""
        high = torch.float64 if g.dtype == torch.float64 else torch.float32
        g = g.to(high)
        x = x.to(high) if x.is_floating_point() else x
        fine = (g.sum() + x.sum()).isfinite()
        # zero, not the sum as it is: 0 · NaN would be NaN, and a branch would wait for the device
        g, x = torch.where(fine, g, 0.0), torch.where(fine, x, torch.zeros_like(x))
        G = layer_gradient(pair, x, g)
        sums = self._pending if self.staged else self.sums
        held = sums.get(pair)
        if held is None:
            sums[pair] = G.cpu() if self.offload else G
        else:
            held.add_(G.to(held.device))
        hit = fine.to(torch.float32)
        self._hit[pair] = torch.maximum(self._hit[pair], hit) if pair in self._hit else hit
        self.broken[g.device] = self.broken.get(g.device, torch.zeros_like(fine)) | ~fine


class _Keep(torch.autograd.Function):
    """A node that is never run: what it saved stays packed, offloaded or recomputed like any activation."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return token.clone()


class _Hook:
    """What stands on the layer: weak references only, and nothing at all once copied or pickled."""

    def __init__(
        self,
        owner: weakref.ref[BaseGradients] | None = None,
        pair: weakref.ref[LoraPair] | None = None,
    ):
        self._owner = owner
        self._pair = pair

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()  # copies of the model are not watched

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        owner = self._owner() if self._owner is not None else None
        pair = self._pair() if self._pair is not None else None
        if owner is None or pair is None or not isinstance(output, Tensor):
            return
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            kept = _Keep.apply(torch.zeros((), device=output.device, requires_grad=True), x.detach())
            output.register_hook(_on_gradient(weakref.ref(owner), weakref.ref(pair), [kept]))


def _on_gradient(
    owner: weakref.ref[BaseGradients], pair: weakref.ref[LoraPair], kept: list[Any]
) -> Callable[[Tensor | None], None]:
    """The tensor hook on the output; `kept` holds x until it has been used."""

    def hook(g: Tensor | None) -> None:
        watcher, key = owner(), pair()
        if g is None or watcher is None or key is None or not kept:
            return
        token = kept.pop()  # its node lives as long as it does
        (x,) = token.grad_fn.saved_tensors
        with torch.no_grad():
            watcher._add(key, x, g.detach())

    return hook


# ------------------------------------------------------------------------------------------------ one layer


def layer_gradient(pair: LoraPair, x: Tensor, g: Tensor) -> Tensor:
    """The gradient (d_out, d_in) of the base weight of a pair from its input and the gradient at its output.

    ∂L/∂B = s G Aᵀ with it, while B is zero.

    Args:
        pair: Of kind linear, raw, conv or embedding; its shapes tell d_in and d_out.
        x: (..., d_in); the indices of an embedding; (n, c, ...) of a convolution.
        g: (..., d_out), or (n, d_out, ...); of the dtype of the result.
    """
    if pair.kind == "embedding":
        base: Any = base_layer(pair)
        ids, rows = x.reshape(-1), g.reshape(-1, g.shape[-1])
        padding = getattr(base, "padding_idx", None)
        if padding is not None:
            rows = rows.masked_fill((ids == padding)[:, None], 0.0)
        return g.new_zeros(rows.shape[1], layer_shape(pair)[0]).index_add_(1, ids, rows.mT)
    if pair.kind == "conv":
        # PEFT gives A the stride and padding of the base, but neither its dilation nor its padding mode: where those
        # matter, what the adapter can do is follow the gradient of a kernel with its own
        conv = next((m for m in (pair.owner("A"), base_layer(pair)) if isinstance(m, _ConvNd)), None)
        if conv is None:
            raise ValueError(f"{pair.name}: no convolution found under {type(pair.module).__name__}")
        # a convolution is linear in its kernel: any kernel gives the gradient
        shape = (g.shape[1], conv.in_channels // conv.groups, *conv.kernel_size)
        kernel = g.new_zeros(shape).requires_grad_()
        with torch.enable_grad():
            y = conv._conv_forward(x, kernel, None)
        return torch.autograd.grad(y, kernel, g)[0].flatten(1)
    return g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1])


def layer_shape(pair: LoraPair) -> tuple[int, int]:
    """(d_in, d_out) of the layer a pair adapts, as its factors have it; d_in counts all entries of a kernel."""
    return pair.A.numel() // pair.rank, pair.B.numel() // pair.rank


def rows_of(pair: LoraPair) -> Tensor:
    """A as (r, d_in), in the order of columns that `layer_gradient` has; detached."""
    return pair.A.detach().movedim(pair.dim_A, 0).flatten(1)


def columns_of(pair: LoraPair, tensor: Tensor | None = None) -> Tensor:
    """B, or a tensor laid out like it, as (d_out, r); detached."""
    found = pair.B if tensor is None else tensor
    return found.detach().movedim(pair.dim_B, 1).flatten(1)


def write_columns(pair: LoraPair, columns: Tensor) -> None:
    """Write (d_out, r) into B, rounded once to its dtype."""
    place = pair.B.data.movedim(pair.dim_B, 1)
    place.copy_(columns.reshape(place.shape))


def draw_rows(pair: LoraPair, generator: torch.Generator | None = None) -> None:
    """Draw A anew, uniform with the bound 1/√d_in, as LoRA begins."""
    A, bound = pair.A.data, layer_shape(pair)[0] ** -0.5
    where = A.device if generator is None else generator.device
    A.copy_(torch.empty(A.shape, device=where).uniform_(-bound, bound, generator=generator))


def base_layer(pair: LoraPair) -> nn.Module | None:
    """The module that holds the frozen weight: PEFT's base layer, the layer itself, or its child of that shape."""
    layer: Any = pair.module
    if layer is None:
        return None
    if pair.is_peft:
        found: nn.Module = layer.get_base_layer()
        return found
    factors = (pair.owner("A"), pair.owner("B"))
    d_in, d_out = layer_shape(pair)
    for module in (layer, *(child for child in layer.children() if child not in factors)):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and (weight.numel() == d_in * d_out or not weight.is_floating_point()):
            return module
    return None


def base_weight(pair: LoraPair) -> Tensor:
    """The frozen weight (d_out, d_in), dequantized by PEFT's own helper where it is quantized; detached.

    Raises:
        ValueError: If no weight of the layer's shape is found; the message names the layer.
    """
    d_in, d_out = layer_shape(pair)
    base: Any = base_layer(pair)
    weight: Any = getattr(base, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if base is not None and not plain:
        # imported here: only a quantized base needs PEFT, and whoever has one through PEFT has PEFT
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(base)
    if weight is None or weight.numel() != d_in * d_out:
        found = "none" if weight is None else str(tuple(weight.shape))
        raise ValueError(f"{pair.name}: no base weight of {d_out} × {d_in} entries (found {found})")
    weight = weight.detach()
    if pair.kind == "embedding" or getattr(pair.module, "fan_in_fan_out", False):
        return weight.mT
    weight = weight.flatten(1)
    return weight if weight.shape[0] == d_out else weight.mT
