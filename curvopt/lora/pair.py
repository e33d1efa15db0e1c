"""One LoRA pair: where its two matrices are, their orientation, and the settings of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

DICTS = (nn.ModuleDict, nn.ParameterDict)
RANK_FREE = ("Dora", "DoRA", "MiCA", "ALora")  # PEFT's variants that treat all directions of the rank alike
_LIBRARIES = ("peft.tuners.lora.", "torchtune.modules.peft.", "loralib.")  # whose layers compute W x + s B A x
_PEFT_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
_FORWARDS = {m.forward for m in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)}


@dataclass(eq=False, frozen=True, repr=False)
class LoraPair:
    """The two LoRA matrices of one adapter on one layer.

    Parameters are looked up at each access, because sharding and PEFT replace them. Two pairs are equal only if they
    are the same object.

    Attributes:
        name: `path`, plus ":adapter" unless the adapter is "default" or None; "(root)" for an empty path.
        path: Path of `module` inside the model that was searched.
        adapter: PEFT adapter name, or None.
        kind: "linear", "conv", "embedding" or "raw" (bare parameters).
        module: The layer that owns the adapter; None if the pair was found by names only.
        dim_A: The dimension of A that is the rank: 0 for (r, d_in), 1 for (d_in, r).
        dim_B: The dimension of B that is the rank: 1 for (d_out, r), 0 for (r, d_out).
        keys: Attribute names and keys that lead from `module` to A, and those that lead to B.
        fixed: (A, B) of a pair without a module.
        base_path: Path of the layer inside the PEFT base model, without the names that wrappers add.
        configs: PEFT's {adapter: config}, shared with the model; None outside PEFT.
        shared: Where else in the model A or B is used; empty if nowhere. The basis of such a pair cannot be changed.
    """

    name: str
    path: str
    adapter: str | None
    kind: str
    module: nn.Module | None
    dim_A: int  # noqa: N815
    dim_B: int  # noqa: N815
    keys: tuple[tuple[str, ...], ...] = ()
    fixed: tuple[Any, ...] = ()  # parameters; tensors where a saved state is read
    base_path: str = ""
    configs: dict[Any, Any] | None = None
    shared: str = ""

    def __repr__(self) -> str:
        return f"LoraPair({self.name!r}, {self.kind}, A={tuple(self.A.shape)}, B={tuple(self.B.shape)})"

    @property
    def A(self) -> nn.Parameter:
        """The current parameter A."""
        return self.fixed[0] if self.fixed else resolve(self.module, self.keys[0])

    @property
    def B(self) -> nn.Parameter:
        """The current parameter B."""
        return self.fixed[1] if self.fixed else resolve(self.module, self.keys[1])

    @property
    def exists(self) -> bool:
        """Whether the model still has the pair: PEFT can delete an adapter."""
        try:
            return isinstance(self.A, Tensor) and isinstance(self.B, Tensor)
        except (AttributeError, KeyError):
            return False

    def owner(self, side: str) -> Any:
        """The module or dict that holds "A" or "B" now; None if the pair was made from names alone."""
        return resolve(self.module, self.keys["AB".index(side)][:-1]) if self.keys else None

    @property
    def rank(self) -> int:
        """The current rank r, from the shape of A."""
        return self.A.shape[self.dim_A]

    @property
    def a_trainable(self) -> bool:
        """Whether A requires a gradient now."""
        return self.A.requires_grad

    @property
    def b_trainable(self) -> bool:
        """Whether B requires a gradient now."""
        return self.B.requires_grad

    @property
    def is_peft(self) -> bool:
        """Whether the layer keeps its settings in PEFT's dicts by adapter."""
        return self.module is not None and is_peft(self.module)

    @property
    def scaling(self) -> float:
        """The factor s of s B A, read from the layer; 1.0 if the layer has no such setting."""
        if self.module is None:
            return 1.0
        own = getattr(self.module, "scaling", None)
        if isinstance(own, dict):
            return float(own[self.adapter])
        for word in ("scaling", "scale"):
            if (number := read_number(self.module, word)) is not None:
                return number
        alpha = read_number(self.module, "alpha", "lora_alpha")
        rank = read_number(self.module, "rank", "r")
        return 1.0 if alpha is None or not rank else alpha / rank

    @property
    def bound(self) -> str:
        """Why no change of basis A → T A, B → B T⁻¹ leaves the function as it is; empty if nothing is known against."""
        if self.shared:
            return self.shared
        return "A has a bias, which no change of basis carries" if self.biased else ""

    @property
    def biased(self) -> bool:
        """Whether the module of A adds a bias to A x."""
        owner = self.owner("A")
        raw = owner is self.module or isinstance(owner, DICTS)  # the bias of such a layer is that of its base
        return not raw and getattr(owner, "bias", None) is not None

    @property
    def idle(self) -> str:
        """Why a PEFT layer does not add s B A x now; empty if it does, and for layers that cannot tell.

        "merged": s B A is in the base weight, and changes of A and B have no effect; "disabled": the layer computes
        without its adapters; "inactive": it computes with others.
        """
        if not self.is_peft:
            return ""
        layer: Any = self.module
        if self.adapter in getattr(layer, "merged_adapters", ()):
            return "merged"
        if getattr(layer, "disable_adapters", False):
            return "disabled"
        return "" if self.adapter in getattr(layer, "active_adapters", (self.adapter,)) else "inactive"

    @property
    def variant(self) -> str:
        """Name of the PEFT variant (or "DoRA") that replaces the plain forward; empty if none does."""
        found = getattr(self.module, "lora_variant", None)
        if isinstance(found, dict) and self.adapter in found:
            return type(found[self.adapter]).__name__
        return "DoRA" if not self.is_peft and hasattr(self.module, "magnitude") else ""

    @property
    def note(self) -> str:
        """Why u cannot be captured; empty if it can."""
        if self.module is None:
            return "paired by name: no module to watch"
        if self.kind == "embedding":
            return "embedding: no module computes u"
        owner = self.owner("A")
        if owner is self.module or isinstance(owner, DICTS):
            return "A is a raw parameter"
        return f"{self.variant} forward is not the plain one" if self.variant else ""

    @property
    def plain(self) -> bool:
        """Whether the layer is known to compute s B A x, so that A → T A, B → B T⁻¹ changes nothing for any T.

        Known are the layers of libraries, with torch's own modules for A and B. A layer that is not known may still
        be plain; `curvopt.functional.basis.asymmetry` tells by its gradients.
        """
        if self.module is None or not type(self.module).__module__.startswith(_LIBRARIES):
            return False
        if self.is_peft and not set(getattr(self.module, "adapter_layer_names", ())) <= _PEFT_PARTS:
            return False
        owners = [m for m in map(self.owner, "AB") if m is not self.module and not isinstance(m, DICTS)]
        alike = not self.variant or self.variant.startswith(RANK_FREE)
        return alike and all(type(m).forward in _FORWARDS for m in owners)

    @property
    def signal(self) -> nn.Module | None:
        """The module whose output is u = x Aᵀ; None where there is none (see `note`)."""
        return None if self.note else self.owner("A")

    def matrix(self, side: str, tensor: Tensor) -> Tensor:
        """The two-dimensional view of a tensor that is laid out like A or B.

        The order of the columns is that of the parameter's memory, so parameter, gradient and moments agree.

        Args:
            side: "A" or "B".
            tensor: The parameter, its gradient or its state: any dtype, number of dimensions of the parameter.

        Returns:
            A view: (r, c·kh·kw) for a convolution's A, (d_out, r) for its B; `tensor` itself if it has two dimensions.

        Raises:
            ValueError: If `side` is unknown, or the strides of `tensor` allow no such view.
        """
        order = self._order(side)
        if tensor.ndim == 2:
            return tensor
        if tensor.ndim != len(order):
            raise ValueError(f"{self.name}: {side} has {len(order)} dimensions, the tensor has {tensor.ndim}")
        try:
            return tensor.permute(order).view(tensor.shape[0], tensor.shape[1:].numel())
        except RuntimeError as error:
            raise ValueError(
                f"no matrix view of a tensor with shape {tuple(tensor.shape)} and strides {tensor.stride()} in the "
                f"order {order} of the dimensions of {side} of {self.name}"
            ) from error

    def unfolded(self, side: str, matrix: Tensor) -> Tensor:
        """The view of a matrix, as `matrix` gives it, with the dimensions of A or B.

        Args:
            side: "A" or "B".
            matrix: Contiguous; its number of directions along the rank may be another than that of the pair.

        Returns:
            A view: (k, c, kh, kw) for a convolution's A, (d_out, k, 1, 1) for its B; `matrix` itself if the parameter
            has two dimensions.
        """
        order = self._order(side)
        if len(order) == 2:
            return matrix
        like, rank_dim = (self.A, self.dim_A) if side == "A" else (self.B, self.dim_B)
        sizes = [-1 if i == rank_dim else like.shape[i] for i in order]
        return matrix.view(sizes).permute([order.index(i) for i in range(like.ndim)])

    def _order(self, side: str) -> list[int]:
        """The dimensions of A or B as their memory has them, those that lead in the matrix view first."""
        if side not in ("A", "B"):
            raise ValueError(f"side must be 'A' or 'B', got {side!r}")
        like, lead = (self.A, 1) if side == "A" else (self.B, 2)
        # Length-one dimensions carry arbitrary strides and never matter to the order.
        inner = sorted(range(lead, like.ndim), key=lambda i: (like.shape[i] == 1, -like.stride()[i]))
        return [*range(lead), *inner]


def is_peft(module: nn.Module) -> bool:
    """Whether a module keeps adapters as PEFT's LoRA layers do."""
    # vars() and _modules, not getattr: PEFT's wrappers forward unknown attributes to the model inside.
    return isinstance(vars(module).get("scaling"), dict) and isinstance(module._modules.get("lora_A"), DICTS)


def resolve(root: Any, keys: tuple[str, ...]) -> Any:
    """Follow attribute names, and keys where the object is a module dict or parameter dict."""
    for key in keys:
        root = root[key] if isinstance(root, DICTS) else getattr(root, key)
    return root


def read_number(module: nn.Module | None, *words: str) -> float | None:
    """The first of the named attributes that is a plain number or a one-element tensor, as float."""
    for word in words:
        value = getattr(module, word, None)
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None
