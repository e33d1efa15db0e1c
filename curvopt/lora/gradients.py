"""The gradient of a frozen base weight, from what passes through its layer: Ḡ = Σ gᵀx, one layer at a time.

g is the gradient at the layer's output and x its input; the weight itself needs no gradient, is never changed, and may
be quantized. A forward hook passes the layer's output through a node that saves x as autograd saves activations:
checkpointing drops it too, and it is kept as long as the graph may be run backward again. The result of a backward pass
waits until the gradient of B has been added to ``B.grad`` (see `curvopt.lora.hooks`), and is kept apart from the sums
until `BaseGradients.commit`, so that gradients which are discarded before, by whatever means, have no effect.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from curvopt.distributed import all_reduce_sums, is_sharded, local, placed_like, whole, world_size
from curvopt.functional import compute_dtype
from curvopt.lora.hooks import Arrival, Watch, backward_pass, continues, on_arrival
from curvopt.lora.pair import LoraPair

Product = Callable[[LoraPair, Tensor, Tensor], dict[str, Tensor]]


@dataclass(eq=False)
class _Sum:
    """A sum of products by name, and whether any of them was finite, 0-d fp32; None if nothing came."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    hit: Tensor | None = None

    def add(self, parts: dict[str, Tensor], hit: Tensor) -> None:
        """Add products; the tensors may be kept and changed."""
        for name, part in parts.items():
            self.parts[name] = self.parts[name].add_(part) if name in self.parts else part
        self.hit = hit if self.hit is None else torch.maximum(self.hit, hit)


@dataclass(eq=False)
class _Record:
    """One pair on its way.

    Attributes:
        pair: The pair.
        waiting: (number of the backward pass, x, g) of what came and whose gradient has not arrived.
        coming: The products of what came and whose gradient has not arrived.
        here: The products of the gradients that have arrived since the last `commit`.
        landed: What this process holds of ``B.grad`` as it was when it arrived last.
        version: Its version then.
        at_once: Whether products are formed when something comes: under FSDP2 gradients arrive when they have been
            summed over processes, which may be some backward passes later.
    """

    pair: LoraPair
    waiting: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    coming: _Sum = field(default_factory=_Sum)
    here: _Sum = field(default_factory=_Sum)
    landed: Tensor | None = None
    version: int = -1
    at_once: bool = False

    def land(self) -> None:
        """Count what was coming."""
        if self.coming.hit is not None:
            self.here.add(self.coming.parts, self.coming.hit)
        self.coming = _Sum()

    def clear(self) -> None:
        """Forget what is not committed."""
        self.waiting.clear()
        self.coming, self.here, self.landed = _Sum(), _Sum(), None


class BaseGradients:
    """Hooks on the layers of some pairs, summing the gradients of their base weights, or other products of x and g.

    The sums use the gradients as they are in ``B.grad`` at `commit`: factors applied since the backward pass (a
    GradScaler's unscaling, clipping) are applied to the sums, layer by layer. A non-finite contribution is left out.
    The modules hold no reference to this object: once it is deleted, or on a copied or unpickled model, the hooks do
    nothing.

    Args:
        pairs: The pairs, in an order that every process shares; those without a module cannot be watched.
        offload: Keep the sums on the CPU; each product is formed on the device and moved there.
        product: What is summed, linear in g: pair, x and g (see `layer_gradient`) to tensors by name, fp32 or fp64. By
            default ``{"gradient": Ḡ}``, (d_out, d_in); an embedding counts as the linear map of one-hot rows, a
            convolution's kernel has its dimensions after the first flattened.
        group: Processes that share the gradients.

    Attributes:
        sums: {pair: {name: Σ}}, fp32 (fp64 for fp64 gradients).
        seen: {pair: steps in which a finite gradient came, 0-d fp32}.
        bypassed: {pair: whether B had a gradient, finite and not zero, in a step in which the layer's hook was not
            called, 0-d bool}, of pairs with such steps.
        differentiable: Name of a pair through which a backward with ``create_graph=True`` went: then Ḡ is not known.
    """

    def __init__(
        self,
        pairs: Iterable[LoraPair],
        offload: bool = False,
        product: Product | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.pairs = list(pairs)
        self.offload = offload
        self.product = _whole if product is None else product
        self.sums: dict[LoraPair, dict[str, Tensor]] = {}
        self.seen: dict[LoraPair, Tensor] = {}
        self.bypassed: dict[LoraPair, Tensor] = {}
        self.differentiable = ""
        self._group = group
        self._records = {pair: _Record(pair) for pair in self.pairs}
        self._handles: list[Any] = []
        weakref.finalize(self, _remove_all, self._handles)

    def attach(self) -> None:
        """Put the hooks on."""
        self.remove()
        me = weakref.ref(self)
        for pair, record in self._records.items():
            if pair.module is not None:
                mine = weakref.ref(record)
                self._handles.append(pair.module.register_forward_hook(_Hook(me, mine), with_kwargs=True))
                record.at_once = is_sharded(pair.B)
                if pair.B.is_leaf:
                    self._handles.append(on_arrival(pair.B, Arrival(me, mine)))

    def remove(self) -> None:
        """Take the hooks off. The sums stay."""
        _remove_all(self._handles)

    def discard(self) -> None:
        """Forget what came since the last `commit`."""
        for record in self._records.values():
            record.clear()
        self.differentiable = ""

    def forget(self) -> None:
        """Forget all that came."""
        self.discard()
        self.sums.clear()
        self.seen.clear()
        self.bypassed.clear()

    def commit(self) -> Tensor:
        """End a step: add what belongs to the gradients that stand now to the sums, and count the layers reached.

        Over several processes, all of them must call.

        Returns:
            Whether anything of a gradient was not finite, 0-d bool.
        """
        factors = self._factors()
        broken = torch.zeros((), dtype=torch.bool)
        for pair, factor in factors.items():
            record = self._records[pair]
            sum_ = record.here
            if pair.B.grad is None:
                continue
            if sum_.hit is None:
                self._note_bypass(record)
                continue
            fine = factor.isfinite() & (sum_.hit > 0)
            broken = broken | ~fine.to(broken.device)
            held = self.sums.setdefault(pair, {})
            for name, part in sum_.parts.items():
                # zero by `where`: 0 · NaN would be NaN, and a branch would wait for the device
                part = torch.where(fine.to(part.device), part * factor.to(part.device, part.dtype), 0.0)
                held[name] = held[name].add_(part) if name in held else part
            taken = fine.to(torch.float32)
            self.seen[pair] = self.seen[pair] + taken if pair in self.seen else taken
        self.discard()
        return broken

    def _note_bypass(self, record: _Record) -> None:
        """Note that a gradient of B has arrived and nothing came with it."""
        pair = record.pair
        if record.landed is not None and pair.B.grad is not None:
            held = local(pair.B.grad.detach())
            around = held.isfinite().all() & held.any()
            self.bypassed[pair] = self.bypassed[pair] | around if pair in self.bypassed else around

    def _factors(self) -> dict[LoraPair, Tensor]:
        """Return by what ``B.grad`` has been multiplied since it arrived, 0-d fp64; 1 exactly where it was left alone.

        ⟨h, h⟩ / ⟨h, b⟩ with h what stands there now and b what arrived. Summed over processes this is also right where
        h is the mean of their gradients. Where A is zero, as PEFT starts an embedding's, B's gradient is zero too and
        tells nothing: what all others say together counts for it.
        """
        if not self.pairs:
            return {}
        home = self.pairs[0].B.device
        products = []
        for pair, record in self._records.items():
            held, landed = pair.B.grad, record.landed
            found = torch.zeros(3, dtype=torch.float64, device=home)
            if held is not None and landed is not None:
                h, b = local(held.detach()).double().flatten(), landed.double().flatten()
                found = torch.stack([h @ h, h @ b, b @ b]).to(home)
            products.append(found)
        table = torch.stack(products)
        if world_size(self._group) > 1:
            all_reduce_sums([table], self._group)
        hh, hb, bb = table.unbind(1)
        common = torch.where(hh.sum() == 0, (bb.sum() == 0).double(), hh.sum() / hb.sum())
        # a gradient that was set to zero in place: nothing of it is left
        factor = torch.where(hh == 0, torch.where(bb == 0, common, 0.0), hh / hb)
        return dict(zip(self.pairs, factor.unbind(), strict=True))

    def brought(self, record: _Record, x: Tensor, g: Tensor) -> None:
        """Keep what a backward brings to one layer until the gradient of B arrives."""
        if g.requires_grad:
            self.differentiable = record.pair.name
        record.waiting.append((backward_pass(), x, g.detach()))
        if record.at_once or not record.pair.B.is_leaf:
            self._count(record)
        if not record.at_once and not record.pair.B.is_leaf:
            record.land()

    def arrived(self, record: _Record, grad: Tensor) -> None:
        """Take in what came in this backward pass; forget what an earlier gradient left."""
        held = local(grad)  # a detached DTensor would have another version counter
        if not continues(held, record.version, record.at_once or world_size(self._group) > 1):
            record.here = _Sum()
        record.version, record.landed = held._version, held.detach().clone()
        self._count(record)
        record.land()

    def _count(self, record: _Record) -> None:
        now = backward_pass()
        come = [(x, g) for number, x, g in record.waiting if number == now]
        record.waiting = [entry for entry in record.waiting if entry[0] != now]
        with torch.no_grad():
            for x, g in come:
                self._add(record, x, g)

    def _add(self, record: _Record, x: Tensor, g: Tensor) -> None:
        g = g.to(compute_dtype(g.dtype))
        x = x.to(g.dtype) if x.is_floating_point() else x
        fine = (g.sum() + x.sum()).isfinite()
        g, x = torch.where(fine, g, 0.0), torch.where(fine, x, torch.zeros_like(x))
        parts = self.product(record.pair, x, g)
        if self.offload:
            parts = {name: part.cpu() for name, part in parts.items()}
        record.coming.add(parts, fine.to(torch.float32))


def _whole(pair: LoraPair, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    return {"gradient": layer_gradient(pair, x, g)}


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class _Through(torch.autograd.Function):
    """The identity on the layer's output, with the layer's input saved for the backward."""

    @staticmethod
    def forward(y: Tensor, x: Tensor, watch: _Brought) -> Tensor:
        return y.clone()  # not y itself: what comes next may change it in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, ctx.watch = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.watch(ctx.saved_tensors[0], g)
        return g, None, None


class _Brought(Watch):
    """Called by the backward."""

    def __call__(self, x: Tensor, g: Tensor) -> None:
        owner, record = self.alive()
        if owner is not None and record is not None:
            owner.brought(record, x, g)


class _Hook(Watch):
    """Stands on the layer."""

    @torch._disable_dynamo  # a graph break; unlike `torch.compiler.disable` it imports nothing before it is called
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        owner, record = self.alive()
        if owner is None or record is None or not isinstance(output, Tensor):
            return None
        if not (torch.is_grad_enabled() and output.requires_grad):
            return None
        if backward_pass() == -1:
            record.waiting.clear()  # of a backward that was broken off, or filled no gradient
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            return None
        return _Through.apply(output, x.detach(), _Brought(self._owner, self._record))


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
        ids, rows = x.reshape(-1), g.reshape(-1, g.shape[-1])
        rows = rows.masked_fill(_padded(pair, ids)[:, None], 0.0)
        return g.new_zeros(rows.shape[1], layer_shape(pair)[0]).index_add_(1, ids, rows.mT)
    if pair.kind == "conv":
        conv = _convolution(pair)
        # a convolution is linear in its kernel: any kernel gives the gradient
        shape = (g.shape[1], conv.in_channels // conv.groups, *conv.kernel_size)
        kernel = g.new_zeros(shape).requires_grad_()
        with torch.enable_grad():
            y = conv._conv_forward(x, kernel, None)
        return torch.autograd.grad(y, kernel, g)[0].flatten(1)
    return g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1])


def projected(pair: LoraPair, x: Tensor, T: Tensor) -> Tensor:
    """The input rows times a matrix, (N, l): X T, where X has one-hot rows for an embedding and patches for a kernel.

    Args:
        pair: As in `layer_gradient`.
        x: As there.
        T: (d_in, l).

    Raises:
        ValueError: If the pair is of a grouped convolution.
    """
    if pair.kind == "embedding":
        ids = x.reshape(-1)
        return T[ids].masked_fill(_padded(pair, ids)[:, None], 0.0)
    return _input_rows(pair, x) @ T


def gathered(pair: LoraPair, H: Tensor, x: Tensor) -> Tensor:
    """Hᵀ X, (l, d_in), with X as in `projected` and H (N, l) of the dtype of the result."""
    if pair.kind == "embedding":
        ids = x.reshape(-1)
        H = H.masked_fill(_padded(pair, ids)[:, None], 0.0)
        return H.new_zeros(H.shape[1], layer_shape(pair)[0]).index_add_(1, ids, H.mT)
    return H.mT @ _input_rows(pair, x)


def output_rows(pair: LoraPair, g: Tensor) -> Tensor:
    """The gradient at the output as rows (N, d_out), in the order of `projected`."""
    if pair.kind == "conv":
        g = g.movedim(1, -1)
    return g.reshape(-1, g.shape[-1])


def _padded(pair: LoraPair, ids: Tensor) -> Tensor:
    padding = getattr(base_layer(pair), "padding_idx", None)
    return torch.zeros_like(ids, dtype=torch.bool) if padding is None else ids == padding


def _input_rows(pair: LoraPair, x: Tensor) -> Tensor:
    if pair.kind != "conv":
        return x.reshape(-1, x.shape[-1])
    conv = _convolution(pair)
    if conv.groups > 1:
        raise ValueError(f"{pair.name}: sketches need convolutions with groups=1, got groups={conv.groups}")
    # the convolution whose output channels are the entries of the patch
    shape = (conv.in_channels, *conv.kernel_size)
    d_in = math.prod(shape)
    eye = torch.eye(d_in, dtype=x.dtype, device=x.device).reshape(d_in, *shape)
    return conv._conv_forward(x, eye, None).movedim(1, -1).reshape(-1, d_in)


def _convolution(pair: LoraPair) -> Any:
    # PEFT gives A the stride and padding of the base, but neither its dilation nor its padding mode: where those
    # matter, what the adapter can do is follow the gradient of a kernel with its own
    conv = next((m for m in (pair.owner("A"), base_layer(pair)) if isinstance(m, _ConvNd)), None)
    if conv is None:
        raise ValueError(f"{pair.name}: no convolution found under {type(pair.module).__name__}")
    return conv


def layer_shape(pair: LoraPair) -> tuple[int, int]:
    """(d_in, d_out) of the layer a pair adapts, as its factors have it; d_in counts all entries of a kernel."""
    return pair.A.numel() // pair.rank, pair.B.numel() // pair.rank


def rows_of(pair: LoraPair) -> Tensor:
    """A as (r, d_in), in the order of columns that `layer_gradient` has; detached, and whole where it is sharded."""
    return whole(pair.A).movedim(pair.dim_A, 0).flatten(1)


def columns_of(pair: LoraPair, tensor: Tensor | None = None) -> Tensor:
    """B, or a tensor laid out like it, as (d_out, r); detached, and whole where it is sharded."""
    return whole(pair.B if tensor is None else tensor).movedim(pair.dim_B, 1).flatten(1)


def write_columns(pair: LoraPair, columns: Tensor) -> None:
    """Write (d_out, r), the same in every process, into B, rounded once to its dtype."""
    _write(pair.B, columns, pair.dim_B, 1)


def write_rows(pair: LoraPair, rows: Tensor, of_first: bool = False) -> None:
    """Write (k, d_in) into the first k directions of A, rounded once to its dtype, and zero into the others.

    Args:
        pair: The pair.
        rows: The same in every process, unless `of_first`.
        of_first: Where A is sharded take the rows of the first process.
    """
    padded = torch.nn.functional.pad(rows, (0, 0, 0, pair.rank - rows.shape[0]))
    _write(pair.A, padded, pair.dim_A, 0, of_first)


def _write(parameter: Tensor, X: Tensor, dim: int, at: int, of_first: bool = False) -> None:
    """Write a matrix whose rank is dimension `at` into a parameter whose rank is dimension `dim`."""
    shape = torch.empty(parameter.shape, device="meta").movedim(dim, at).shape
    X = X.reshape(shape).movedim(at, dim).to(parameter.dtype)
    parameter.data.copy_(placed_like(parameter, X, of_first))


def draw_rows(pair: LoraPair, generator: torch.Generator | None = None) -> None:
    """Redraw A, uniform with the bound 1/√d_in, as LoRA initialises it; if it is sharded, in the first process."""
    A, bound = pair.A, layer_shape(pair)[0] ** -0.5
    where = A.device if generator is None else generator.device
    drawn = torch.empty(A.shape, device=where).uniform_(-bound, bound, generator=generator)
    A.data.copy_(placed_like(A, drawn.to(A), of_first=True) if is_sharded(A) else drawn)


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


def has_base_weight(pair: LoraPair) -> bool:
    """Whether `base_weight` finds anything: a weight, or what PEFT's helper can dequantize (HQQ's has no such name)."""
    base = base_layer(pair)
    return any(getattr(base, word, None) is not None for word in ("weight", "W_q"))


def base_weight(pair: LoraPair) -> Tensor:
    """The frozen weight (d_out, d_in), dequantized by PEFT's own helper where it is quantized; detached.

    A sharded one is gathered: all processes must call.

    Raises:
        ValueError: If no weight of the layer's shape is found; the message names the layer.
    """
    d_in, d_out = layer_shape(pair)
    base: Any = base_layer(pair)
    weight: Any = getattr(base, "weight", None)
    weight = whole(weight) if is_sharded(weight) else weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if not plain and has_base_weight(pair):
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
