"""Change the rank of adapters in place.

Slicing keeps the first rows of A and the first columns of B. Growing draws new rows of A and sets the new columns of B
to zero, so the layer's update s B A is unchanged. What a library records about the rank is updated.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvopt.distributed import is_sharded
from curvopt.lora.pair import RANK_FREE, LoraPair, read_number
from curvopt.lora.pairs import find_lora_pairs

T = TypeVar("T")
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits that also change the base weight


@torch.inference_mode(False)  # parameters made in inference mode could not be trained
def resize_pair(
    pair: LoraPair, rank: int, *, keep_scaling: bool = True, generator: torch.Generator | None = None
) -> None:
    """Change the rank of one pair; the parameters remain the same objects, and their gradients are dropped.

    On PEFT layers rank, alpha, scaling, the features of both modules and the patterns of the config are updated, so
    that a saved adapter can be loaded as usual. On other layers the attributes `rank`, `r`, `alpha`, `lora_alpha`,
    `scaling` and `scale` are updated if they exist. Optimizer state is not resized here, and a model inside
    DistributedDataParallel has to be wrapped again, since the wrapper keeps the old shapes.

    Args:
        pair: The pair, of any kind.
        rank: The new rank, at least 1.
        keep_scaling: Keep s and let alpha follow; False keeps alpha and recomputes s.
        generator: Source of the new rows of A, uniform with the bound 1/√(columns).

    Raises:
        TypeError: If `rank` is not an integer.
        ValueError: If `rank` is below 1, a variant holds more tensors along the rank, or the matrices are sharded or
            merged into the base weight.
    """
    check_resize(pair, rank)
    old, scaling = pair.rank, pair.scaling
    if rank == old and keep_scaling:
        return
    for side, parameter, dim in (("A", pair.A, pair.dim_A), ("B", pair.B, pair.dim_B)):
        _replace(parameter, resized(parameter.data, dim, rank, side == "A", generator))
    _follow_factors(pair, old, rank)
    if pair.is_peft:
        _follow_peft(pair, old, rank, keep_scaling)
    elif pair.module is not None:
        _follow_attributes(pair.module, old, rank, scaling, keep_scaling)


def resize_adapter(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    adapter: str | None = None,
    keep_scaling: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, int]:
    """Change the ranks of pairs of a model. Nothing is changed if any entry is invalid.

    Args:
        model: The model with the adapters.
        ranks: {pair name: new rank}; pairs that are not named keep theirs.
        adapter: Only this PEFT adapter; a pair may then be named by its path alone.
        keep_scaling: As in `resize_pair`.
        generator: As in `resize_pair`.

    Returns:
        {pair name: rank} of all pairs of the adapter (of all adapters without one).

    Raises:
        TypeError: If `model` is not a module or a rank not an integer.
        ValueError: If a name is unknown (some known ones are given), a rank below 1, or a pair cannot be resized.
    """
    pairs = find_lora_pairs(model, adapter)
    wanted = by_pair(pairs, ranks, adapter)
    for pair, rank in wanted.items():
        check_resize(pair, rank)
    for pair, rank in wanted.items():
        resize_pair(pair, rank, keep_scaling=keep_scaling, generator=generator)
    return {pair.name: pair.rank for pair in pairs}


def check_resize(pair: LoraPair, rank: Any) -> None:
    """Raise what `resize_pair` documents."""
    check_cut(pair, rank)
    if pair.idle == "merged":
        raise ValueError(
            f"{pair.name} cannot be resized while it is merged: unmerging would take other matrices out of the base "
            "weight than were put in. Call unmerge_adapter() of the PeftModel first"
        )


def check_cut(pair: LoraPair, rank: Any) -> None:
    """Raise what `resize_pair` documents, as far as it holds for a copy of that rank too."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank of {pair.name} must be an int, got {type(rank).__name__}")
    if rank < 1:
        raise ValueError(f"rank of {pair.name} must be at least 1, got {rank}")
    if is_sharded(pair.A) or is_sharded(pair.B):
        raise ValueError(
            f"{pair.name} cannot be resized: its factors are sharded. Load the full state_dict into a model on one "
            "process and resize that"
        )
    if pair.shared:
        raise ValueError(
            f"{pair.name} cannot be resized: {pair.shared}, which would keep the old rank. Give every layer matrices "
            "of its own, or leave this pair out"
        )
    if pair.variant and not pair.variant.startswith(RANK_FREE):
        raise ValueError(f"{pair.name} cannot be resized: {pair.variant} may hold more tensors along the rank")
    tied = getattr(pair.configs[pair.adapter], "target_modules_to_tie", None) if pair.configs is not None else None
    if tied and (pair.kind == "embedding" or pair.path.rpartition(".")[2] in tied):
        raise ValueError(f"{pair.name} cannot be resized: its factors share memory with those of a tied layer")
    if (between := _between(pair)) is not None:
        raise ValueError(
            f"{pair.name} cannot be resized: {between[0]} {between[1]} is as long as the rank, as a mixer or a gate "
            "between A and B is. Make the layer with the rank that it is to have"
        )


def _between(pair: LoraPair) -> tuple[str, tuple[int, ...]] | None:
    """Name and shape of a parameter of a layer that is not known to be plain, all of whose dimensions are the rank."""
    if pair.module is None or pair.plain:
        return None
    a, bias = pair.owner("A"), None
    if isinstance(a, nn.Module) and a is not pair.module:
        bias = a._parameters.get("bias")
    for name, p in pair.module.named_parameters():
        if p.ndim and set(p.shape) == {pair.rank} and p not in {pair.A, pair.B, bias}:
            return name, tuple(p.shape)
    return None


def by_pair(pairs: list[LoraPair], named: Mapping[str, T], adapter: str | None) -> dict[LoraPair, T]:
    """Look names up; with an adapter, paths are names too. ValueError for an unknown one."""
    known = {pair.path: pair for pair in pairs} if adapter is not None else {}
    known.update({pair.name: pair for pair in pairs})
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(f"no pair is named {unknown[0]!r}; some that are: {sorted(known)[:3]}")
    return {known[name]: value for name, value in named.items()}


def resized(data: Tensor, dim: int, rank: int, draw: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """`data` with `rank` entries along `dim`, in the same memory order; what is new is drawn, or zero."""
    shape = list(data.shape)
    shape[dim] = rank
    order = sorted(range(data.ndim), key=lambda i: (-data.stride()[i], i))
    new = data.new_zeros([shape[i] for i in order]).permute([order.index(i) for i in range(data.ndim)])
    kept = min(rank, data.shape[dim])
    new.narrow(dim, 0, kept).copy_(data.narrow(dim, 0, kept))
    fresh = new.narrow(dim, kept, rank - kept)
    if draw and fresh.numel():
        bound = math.sqrt(data.shape[dim] / data.numel())  # Kaiming uniform with a = √5
        where = generator.device if generator is not None else data.device
        fresh.copy_(torch.empty(fresh.shape, device=where).uniform_(-bound, bound, generator=generator))
    return new


def _replace(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter other data of another shape, and no gradient."""
    parameter.grad = None
    # While an old loss is alive autograd holds the parameter to its old shape; a change of dtype makes it let go.
    parameter.data = data.new_empty(0, dtype=torch.float16 if data.dtype == torch.float32 else torch.float32)
    parameter.data = data


def _set_where_equal(owner: Any, words: tuple[str, ...], old: int, new: int) -> None:
    """Set those of the attributes that say `old` and are plain integers."""
    for word in words:
        if type(getattr(owner, word, None)) is int and getattr(owner, word) == old:
            setattr(owner, word, new)


def _follow_factors(pair: LoraPair, old: int, rank: int) -> None:
    """Keep the modules that hold the factors true: their widths, and a bias on u."""
    a, b = pair.owner("A"), pair.owner("B")
    if a is not pair.module:
        _set_where_equal(a, ("out_features", "out_channels", "embedding_dim"), old, rank)
        bias = getattr(a, "bias", None)
        if isinstance(bias, Tensor) and bias.shape == (old,):
            _replace(bias, resized(bias.data, 0, rank))
    if b is not pair.module:
        _set_where_equal(b, ("in_features", "in_channels"), old, rank)


def denominator(pair: LoraPair, rank: int) -> float:
    """What alpha is divided by: the rank, or its square root under rank-stabilised scaling."""
    stable = getattr(pair.module, "use_rslora", {}).get(pair.adapter, False)
    return math.sqrt(rank) if stable else rank


def saved_scaling(pair: LoraPair, rank: int) -> float:
    """The scaling a saved copy has: that of alpha and rank, whatever a PEFT layer is set to for the moment."""
    layer: Any = pair.module
    by_alpha, live = layer.lora_alpha[pair.adapter] / denominator(pair, rank), pair.scaling
    return live if math.isclose(by_alpha, live, rel_tol=1e-12) else by_alpha  # rounding must not pile up


def alpha_for(scaling: float, denominator: float) -> float:
    """The alpha whose quotient is the scaling, to the last bit where there is one; an int if it can be."""
    alpha = scaling * denominator
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    alpha = next((a for a in (float(round(alpha)), *near) if a / denominator == scaling), alpha)
    return int(alpha) if float(alpha).is_integer() else alpha


def _follow_peft(pair: LoraPair, old: int, rank: int, keep_scaling: bool) -> None:
    layer: Any = pair.module
    saved, after = saved_scaling(pair, old), denominator(pair, rank)
    layer.r[pair.adapter] = rank
    if keep_scaling:
        layer.lora_alpha[pair.adapter] = alpha_for(saved, after)
    else:
        layer.scaling[pair.adapter] = layer.lora_alpha[pair.adapter] / after
    if pair.configs is None:
        return
    config = pair.configs[pair.adapter]
    if any(other is config for name, other in pair.configs.items() if name != pair.adapter):
        config = pair.configs[pair.adapter] = copy.deepcopy(config)  # two adapters may share one config object
    if moved_base(config):
        warnings.warn(
            f"init_lora_weights={config.init_lora_weights!r} moved the base weights by the old rank: "
            "the resized adapter will not load as it is",
            stacklevel=3,
        )
    set_patterns(config, pair.base_path, rank, layer.lora_alpha[pair.adapter])


def _follow_attributes(module: nn.Module, old: int, rank: int, scaling: float, keep_scaling: bool) -> None:
    """The same for layers that keep plain numbers."""
    told = read_number(module, "rank", "r")
    alpha = read_number(module, "alpha", "lora_alpha")
    _set_where_equal(module, ("rank", "r"), old, rank)
    if alpha is None or told != old:
        return
    if keep_scaling:
        for word in ("alpha", "lora_alpha"):
            _set_number(module, word, alpha_for(scaling, rank))
        return
    for word in ("scaling", "scale"):
        _set_number(module, word, alpha / rank)


def _set_number(module: nn.Module, word: str, value: float) -> None:
    held = getattr(module, word, None)
    if isinstance(held, Tensor) and held.numel() == 1:
        held.data.fill_(value)
    elif isinstance(held, (int, float)) and not isinstance(held, bool):
        setattr(module, word, value)


def moved_base(config: Any) -> bool:
    """Whether the initialisation of a PEFT config took the first B A out of the base weights."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower().startswith(_MOVES_BASE)


def set_patterns(config: Any, path: str, rank: int, alpha: float) -> None:
    """Let a config say rank and alpha of one layer, by an anchored pattern only where it must."""
    key = "^" + re.escape(path)
    if getattr(config, "init_lora_weights", None) == "orthogonal":
        config.init_lora_weights = True  # that start exists for even ranks only; a saved adapter brings its weights
    for field, default, value in (("rank_pattern", config.r, rank), ("alpha_pattern", config.lora_alpha, alpha)):
        others = {k: v for k, v in (getattr(config, field) or {}).items() if k != key}
        said = next((v for k, v in others.items() if re.match(rf"(.*\.)?({k})$", path)), default)
        # First in the dict: PEFT takes the first pattern that matches.
        setattr(config, field, others if said == value else {key: value, **others})
