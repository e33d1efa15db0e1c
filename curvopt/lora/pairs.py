"""Find the LoRA pairs of a model, whatever library made them.

A pair is two matrices with one shared dimension, the rank: A maps the layer's input to u = x Aᵀ, B maps u to the
layer's output, and the layer adds s B A to its weight. PEFT layers, torchtune and loralib layers and hand-written
modules are recognised by their attributes, never by importing their library.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from curvopt.distributed import local
from curvopt.lora.pair import DICTS, LoraPair, is_peft, resolve

_STYLES = (("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up"), ("A", "B"), ("a", "b"))
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_BARE = {"A", "B", "a", "b"}  # words too common to trust without a look at the shapes
_SIDES = {word: (style, side) for style in (*_STYLES, _EMBEDDING) for word, side in zip(style, "AB", strict=True)}
COMPILED = "_orig_mod"  # the child of what torch.compile returns that is the module compiled
_WRAPPERS = {COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
LARGEST_RANK = 128  # of a tensor that is told by its shape
_Key = tuple[str, tuple[str, str], tuple[str, ...]]
_Fit = tuple[int, int, int]


def find_lora_pairs(model: nn.Module, adapter: str | None = None) -> list[LoraPair]:
    """Return all LoRA pairs of a model, in module order.

    Args:
        model: Any module: a PEFT model, a model with torchtune or loralib layers, a hand-written one, or a wrapper.
        adapter: Only the pairs of this PEFT adapter; None means every adapter and every other style.

    Returns:
        The pairs. A parameter that two modules share gives one pair, which says so in `LoraPair.shared`; frozen pairs
        are included.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If no layer has the adapter; the message names those that exist.
    """
    pairs, _ = _scan(model)
    if adapter is None:
        return pairs
    chosen = [pair for pair in pairs if pair.adapter == adapter]
    if not chosen:
        known = ", ".join(sorted({repr(pair.adapter) for pair in pairs if pair.adapter})) or "none"
        raise ValueError(f"adapter {adapter!r} is on no layer of the model; adapters found: {known}")
    return chosen


def find_skipped(model: nn.Module) -> list[tuple[str, str]]:
    """Return layers that look like adapters but are not plain pairs, as (path, reason), in module order.

    Raises:
        TypeError: If `model` is not a module.
    """
    return _scan(model)[1]


def uncompiled(model: Any) -> Any:
    """Return the module that torch.compile was given, which has the same parameters; anything else as it is."""
    children = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    return children[COMPILED] if set(children) == {COMPILED} else model


def describe_search(model: nn.Module) -> str:
    """Return one line on what was searched for and what was found instead, for the error "no pair found"."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    total = sum(1 for _ in model.parameters())
    shown = ", ".join(trainable[:3]) + (", ..." if len(trainable) > 3 else "")
    looked = ", ".join("/".join(style) for style in (*_STYLES, _EMBEDDING))
    missed = "; ".join(f"{path}: {reason}" for path, reason in find_skipped(model)[:3])
    return (
        f"looked for {looked} in every module; found {total} parameters, {len(trainable)} of them trainable"
        + (f" ({shown})" if shown else "")
        + (f"; skipped {missed}" if missed else "")
    )


def pair_by_name(named_parameters: Iterable[tuple[str, Tensor]]) -> list[LoraPair]:
    """Return pairs from names and parameters alone, in order of the first matrix met.

    Args:
        named_parameters: (name, parameter) as `nn.Module.named_parameters()` gives them; any shapes and dtypes.

    Returns:
        Pairs without a module: scaling 1.0, no signal. Names whose shapes share no rank are left out.

    Raises:
        TypeError: If an entry is not a name with a tensor.
    """
    halves: dict[_Key, dict[str, Tensor]] = {}
    for entry in named_parameters:
        if not (isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[1], Tensor)):
            raise TypeError(f"named_parameters must give (name, parameter), got {type(entry).__name__}")
        if (place := _place(entry[0])) is not None:
            halves.setdefault(place[0], {})[place[1]] = entry[1]
    made = (_named_pair(key, half["A"], half["B"]) for key, half in halves.items() if len(half) == 2)
    return [pair for pair in made if pair is not None]


def low_rank_by_shape(named: Iterable[tuple[str, Tensor]]) -> list[tuple[LoraPair, str]]:
    """Return the tensors that look like LoRA matrices, each by itself, for rules that need no partner.

    The rank is the dimension of a matrix that is at most `LARGEST_RANK` and less than half of the other. Kernels (four
    or five dimensions) count as the matrices that A (r, everything else) and B (d, r, 1, ...) of a convolution are.

    Args:
        named: (name, tensor), of any shapes and dtypes.

    Returns:
        For each that does, in the given order, a pair without a module, both of whose matrices it is, and which of the
        two it is laid out like: "A" with the rank first, or "B".
    """
    found = []
    for name, p in named:
        if (dim := _rank_dim(p)) is not None:
            kind = "conv" if p.ndim > 2 else "raw"
            found.append((LoraPair(name, name, None, kind, None, dim, dim, fixed=(p, p)), "AB"[dim]))
    return found


def _rank_dim(p: Tensor) -> int | None:
    """Return the dimension of a tensor that is the rank, by its shape; None if none is."""
    if p.ndim not in (2, 4, 5):  # three: a convolution's A, or matrices of several experts
        return None
    first, second, rest = p.shape[0], p.shape[1], p.shape[2:].numel()
    if rest > 1:
        return 0 if first <= LARGEST_RANK and 2 * first < second * rest else None
    small, large = sorted((first, second))
    return p.shape.index(small) if small <= LARGEST_RANK and 2 * small < large else None


def _place(name: str) -> tuple[_Key, str] | None:
    """((path, the two words, what follows), side) of a parameter name; None if it names no factor."""
    words = name.split(".")
    telling = [i for i, word in enumerate(words) if word in _SIDES and word not in _BARE]
    # A bare letter counts only at the end: elsewhere it may be a layer or an adapter.
    last = len(words) - (2 if len(words) > 1 and words[-1] == "weight" else 1)
    if not telling and words[last] not in _BARE:
        return None
    at = telling[-1] if telling else last
    style, side = _SIDES[words[at]]
    return (".".join(words[:at]), style, tuple(words[at + 1 :])), side


def _scan(model: nn.Module) -> tuple[list[LoraPair], list[tuple[str, str]]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    pairs: list[LoraPair] = []
    skipped: list[tuple[str, str]] = []
    roots: list[tuple[str, dict]] = []  # (path prefix of a PEFT base model, its configs), outermost first
    owner: dict[int, str] = {}  # memory of a parameter -> the pair that has it
    uses: dict[int, list[str]] = {}  # memory of a parameter -> names of all parameters there
    also: dict[str, list[str]] = {}  # pair -> other layers that use its parameters
    closed: set[int] = set()  # modules that belong to a layer already read
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                uses.setdefault(_memory(p), []).append(f"{path}.{name}" if path else name)
        if id(module) in closed:
            continue
        if isinstance(configs := vars(module).get("peft_config"), dict):
            roots.append((_base_prefix(path, module), configs))
        found = _from_peft(path, module, roots) if is_peft(module) else _from_attributes(path, module)
        for item in found:
            _file(item, pairs, skipped, owner, also)
        closed.update(id(part) for inner in _inner(module) for part in inner.modules())
    return [_told(pair, uses, also) for pair in pairs], skipped


def _memory(p: Tensor) -> int:
    """What two parameters have in common if one is a view of the other from its first entry on."""
    here = local(p.detach())
    return (0 if here.device.type == "meta" else here.data_ptr()) or id(p)


def _told(pair: LoraPair, uses: dict[int, list[str]], also: dict[str, list[str]]) -> LoraPair:
    """The pair, with what else uses its parameters."""
    sides = [(side, uses[_memory(p)]) for side, p in (("A", pair.A), ("B", pair.B))]
    words = [f"{side} is one parameter with {', '.join(names[1:])}" for side, names in sides if len(names) > 1]
    words += [f"{path} uses its parameters too" for path in also.get(pair.name, ())] if not words else []
    return replace(pair, shared="; ".join(words)) if words else pair


def _base_prefix(path: str, module: nn.Module) -> str:
    """Prefix of the base model's paths; a PEFT tuner (known by a method all of them have) holds it as `model`."""
    words = [path] if path else []
    return "".join(f"{w}." for w in words + (["model"] if hasattr(type(module), "_create_and_replace") else []))


def _inner(module: nn.Module) -> list[nn.Module]:
    """Children of a PEFT layer that are not layers of their own: the factors, and what is merged before it is used."""
    if not is_peft(module):
        return []
    words = [*_STYLES[0], *_EMBEDDING]
    if isinstance(module._modules.get("base_layer"), nn.MultiheadAttention):
        words.append("base_layer")
    return [child for word in words if (child := module._modules.get(word)) is not None]


def _file(
    item: LoraPair | tuple, pairs: list, skipped: list, owner: dict[int, str], also: dict[str, list[str]]
) -> None:  # fmt: skip
    """Keep a pair whose parameters are new, note everything else."""
    if isinstance(item, tuple):
        skipped.append(item)
        return
    first = owner.get(_memory(item.A), owner.get(_memory(item.B)))
    if first is not None:
        skipped.append((item.path, f"shares a parameter with {first}"))
        also.setdefault(first, []).append(item.path)
        return
    owner[_memory(item.A)] = owner[_memory(item.B)] = item.name
    pairs.append(item)


def _named_pair(key: _Key, A: Tensor, B: Tensor) -> LoraPair | None:
    path, style, rest = key
    usual = rest[-1:] == ("weight",)  # the weight of a module: no transposed reading
    fit = _orient(A, B) if usual or style is _EMBEDDING else _orient(A, B, (0, 1), (1, 0))
    if fit is None or (style[0] in _BARE and not _small(fit[0], A, B)):
        return None
    adapter = next((word for word in rest if word != "weight"), None)
    flat = "linear" if usual else "raw"
    kind = "embedding" if style is _EMBEDDING else "conv" if A.ndim > 2 else flat
    return LoraPair(_full_name(path, adapter), path, adapter, kind, None, fit[1], fit[2], fixed=(A, B))


def _from_peft(path: str, module: nn.Module, roots: list[tuple[str, dict]]) -> Iterator[LoraPair | tuple[str, str]]:
    if obstacle := _peft_obstacle(module):
        yield path, obstacle
        return
    found: list[tuple[str, tuple[tuple[str, ...], ...]]]
    plain: Any = module._modules["lora_A"]
    embedded: Any = module._modules.get("lora_embedding_A")
    found = [(key, tuple((word, key, "weight") for word in _STYLES[0])) for key in plain or ()]
    found += [(key, tuple((word, key) for word in _EMBEDDING)) for key in embedded or ()]
    for adapter, keys in found:
        A, B = resolve(module, keys[0]), resolve(module, keys[1])
        fit = _orient(A, B)
        if fit is None:
            word = "grouped convolution: B sees r/groups channels" if A.ndim > 2 else "no shared rank"
            yield path, f"{word}: A {tuple(A.shape)}, B {tuple(B.shape)}"
            continue
        kind = "embedding" if keys[0][0] == _EMBEDDING[0] else "conv" if A.ndim > 2 else "linear"
        mine = [(p, c) for p, c in roots if path.startswith(p) and adapter in c]
        prefix, configs = mine[-1] if mine else ("", None)
        base = ".".join(word for word in path[len(prefix) :].split(".") if word not in _WRAPPERS)
        name = _full_name(path, adapter)
        yield LoraPair(name, path, adapter, kind, module, fit[1], fit[2], keys, base_path=base, configs=configs)


def _from_attributes(path: str, module: nn.Module) -> Iterator[LoraPair | tuple[str, str]]:
    for words in _STYLES:
        A, path_A, child, dims_A = _factor(module, words[0], "A")
        B, path_B, _, dims_B = _factor(module, words[1], "B")
        if A is None or B is None:
            continue
        fit = _orient(A, B, dims_A, dims_B)
        bare = words[0] in _BARE
        if fit is not None and (not bare or _small(fit[0], A, B)):
            embedded = isinstance(module, nn.Embedding) or isinstance(child, nn.Embedding)
            flat = "raw" if child is None else "linear"
            kind = "embedding" if embedded else "conv" if A.ndim > 2 or isinstance(child, _ConvNd) else flat
            yield LoraPair(_full_name(path, None), path, None, kind, module, fit[1], fit[2], (path_A, path_B))
            return
        if not bare:
            yield path, f"{words[0]} {tuple(A.shape)} and {words[1]} {tuple(B.shape)} share no rank"


def _peft_obstacle(module: nn.Module) -> str:
    """Why the adapters of a PEFT layer are not plain pairs; empty if they are."""
    base = module._modules.get("base_layer")
    if isinstance(base, nn.MultiheadAttention):
        return "MultiheadAttention merges the adapter into its weights before the forward"
    if "parameter_name" in vars(module) and "num_experts" in vars(module):
        return "adapts a bare parameter: its factors are stacked over experts"
    return "AdaLoRA keeps a third factor between B and A" if "lora_E" in module._modules else ""


def _factor(module: nn.Module, word: str, side: str) -> tuple[Any, tuple[str, ...], Any, tuple[int, ...]]:
    """(matrix or None, keys, child that owns it or None, dimensions that can be the rank) of one factor."""
    usual = (0, 1) if side == "A" else (1, 0)
    if module._parameters.get(word) is not None:
        return module._parameters[word], (word,), None, usual
    child = module._modules.get(word)
    weight = child._parameters.get("weight") if child is not None and not isinstance(child, DICTS) else None
    if isinstance(child, nn.Embedding):
        return weight, (word, "weight"), child, (1,)
    return weight, (word, "weight"), child, usual[:1]


def _orient(A: Tensor, B: Tensor, dims_A: tuple[int, ...] = (0,), dims_B: tuple[int, ...] = (1,)) -> _Fit | None:
    """(r, dim_A, dim_B) of the smallest rank on which the shapes agree, the usual orientation first; None if none."""
    if min(A.ndim, B.ndim) < 2 or B.shape[2:].numel() != 1:
        return None
    free = len(dims_A) == len(dims_B) == 2  # two bare matrices are either both as usual or both transposed
    if A.ndim > 2 or B.ndim > 2:
        dims_A, dims_B = (0,), (1,)
    fits = [(A.shape[i], i, j) for i in dims_A for j in dims_B if A.shape[i] == B.shape[j] > 0]
    fits = [fit for fit in fits if not free or fit[1] != fit[2]]
    return min(fits, key=lambda fit: fit[0], default=None)


def _small(rank: int, A: Tensor, B: Tensor) -> bool:
    """Whether the rank is no larger than either outer dimension."""
    return rank <= min(A.numel() // rank, B.numel() // rank)


def _full_name(path: str, adapter: str | None) -> str:
    return (path or "(root)") + (f":{adapter}" if adapter not in (None, "default") else "")
