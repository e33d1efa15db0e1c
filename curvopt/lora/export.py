"""Write one adapter of a PEFT model as a plain folder, at other ranks, for the program that will read it."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from curvopt.distributed import is_sharded
from curvopt.lora.cut import Basis, Factors, OrderedPair, Ranks, cut
from curvopt.lora.pair import LoraPair
from curvopt.lora.pairs import COMPILED, find_lora_pairs, find_skipped, uncompiled
from curvopt.lora.resize import (
    alpha_for,
    denominator,
    moved_base,
    resized,
    saved_scaling,
    set_patterns,
)

Target = Literal["peft", "vllm", "sglang", "tensorrt-llm", "llama.cpp", "hotswap", "diffusers"]


@dataclass(frozen=True)
class _Reader:
    """How a program computes the update of a layer from the files.

    Attributes:
        scale: What B A is multiplied by. "pattern": alpha over rank, both by layer, as the config's patterns say;
            "config": `lora_alpha` over `r`, one number for all layers; "tensor": `lora_alpha` over the rank of each
            tensor; "one": nothing.
        refuses: Settings of a PEFT config whose tensors it does not read.
    """

    scale: Literal["pattern", "config", "tensor", "one"]
    refuses: tuple[str, ...] = ("modules_to_save", "bias", "lora_bias", "use_dora")


# what none but PEFT reads: rows of embeddings that are trained, adapters that act from a token on
_PEFT_ALONE = ("trainable_token_indices", "alora_invocation_tokens")
_READERS: dict[str, _Reader] = {
    "peft": _Reader("pattern", ()),
    "vllm": _Reader("config"),
    "sglang": _Reader("config"),
    "hotswap": _Reader("config", ("modules_to_save", "bias")),
    "tensorrt-llm": _Reader("tensor"),
    "llama.cpp": _Reader("tensor"),
    "diffusers": _Reader("one", ("modules_to_save", "bias", "use_dora")),
}
# layers whose base weights PEFT saves beside their adapters
_EMBEDDINGS = ("embed_tokens", "lm_head")
_PEFT_FILE = "adapter_model.safetensors"
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def export_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    adapter: str | None = None,
    ranks: Ranks = None,
    energy: float | None = None,
    basis: Basis = "stored",
    factors: Factors | None = None,
    pad_to: int | None = None,
    target: Target = "peft",
    prefix: str = "transformer",
) -> Path:
    """Write one adapter of a PEFT model, unchanged itself, as a plain adapter folder, optionally with other ranks.

    PEFT supports a rank and an alpha for each layer; other programs do not. `target` names the program that will load
    the folder; ΔW as computed by that program, by its documentation of November 2026, equals ΔW of the model.

    - ``"peft"``: ranks and alphas as they are, with `rank_pattern` and `alpha_pattern`.
    - ``"vllm"``, ``"sglang"``: one rank and one alpha. Smaller ranks are padded with zeros, and differing scalings are
      folded into B. The server's `max_lora_rank` must be at least that rank.
    - ``"hotswap"``: the same, for `peft.utils.hotswap`. Set `pad_to` to the largest rank of the adapters to be swapped.
    - ``"tensorrt-llm"``, ``"llama.cpp"`` (for `convert_lora_to_gguf.py`): ranks as they are and one alpha, which the
      program divides by the rank of each tensor; the rest of the scaling is folded into B.
    - ``"diffusers"``: one file, `pytorch_lora_weights.safetensors`: ranks as they are, the scaling folded into B, and
      names that begin with `prefix`.

    All except ``"diffusers"`` are PEFT folders too. Folding multiplies B once, so ΔW is equal up to one rounding of B's
    dtype; padding is exact.

    Args:
        model: A `PeftModel`, unwrapped; or what torch.compile made of one.
        path: The folder; created if it does not exist; files of an earlier export in it are replaced.
        adapter: Name of the adapter; None: the active one.
        ranks: Keep the leading directions: {pair name: rank}, or one number for all pairs that have more.
        energy: Instead of ranks: each pair keeps the smallest number of directions that hold this share of its energy,
            in (0, 1]: of ‖B A‖² with ``"svd"``; with ``"balanced"``, of the rise of the loss under the K-FAC quadratic
            if all were dropped. A pair without any energy keeps its rank.
        basis: The basis in which directions are counted; ΔW at full rank is the same in each. ``"stored"``: rows of A
            and columns of B as they are, for adapters trained to be cut there (`MatryoshkaScaledAdam`, GritKFAC after a
            balanced reprojection). ``"svd"``: singular vectors of B A, for the adapter of any optimizer: no adapter of
            that rank is nearer to ΔW in the Frobenius norm (Eckart and Young, 1936). ``"balanced"``: the basis in which
            both K-FAC factors are the same diagonal matrix, and in which truncation raises the loss least under the
            K-FAC quadratic (our derivation, `curvopt.functional.basis.balanced`).
        factors: For ``"balanced"``: {pair name: (S_u, S_d)} of all pairs, (r, r) each.
        pad_to: Pad every pair with zeros to this rank, and fold the part of its scaling into B that `r` and
            `lora_alpha` alone cannot express. None: pad to the largest rank if `target` needs one rank.
        target: The program that will read the folder.
        prefix: For ``"diffusers"``: the part of the pipeline that the model is, ``"transformer"`` or ``"unet"``.

    Returns:
        The folder.

    Raises:
        TypeError: If `model` is not a PeftModel, a rank not an integer, or a share not a number.
        ValueError: If the adapter, the target, the basis or a name is unknown; a rank or share is out of range, or both
            are given; factors are missing or not needed; the model is sharded, or an adapted embedding merged; the
            adapter has parts that cannot be cut or padded (a layer that is not a plain pair, an initialisation that
            changed the base weights), or parts that the target does not support (saved modules, biases, DoRA
            magnitudes, trained tokens, aLoRA); or the model's state_dict has no tensor of the adapter.
    """
    given, model = model, uncompiled(model)
    peft: Any = model
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not callable(getattr(model, "get_base_model", None)):
        raise TypeError(f"model must be an unwrapped PeftModel, got {type(model).__name__}")
    if target not in _READERS:
        raise ValueError(f"target must be one of {', '.join(map(repr, get_args(Target)))}, got {target!r}")
    if pad_to is not None and (not isinstance(pad_to, int) or isinstance(pad_to, bool)):
        raise TypeError(f"pad_to must be an int, got {type(pad_to).__name__}")
    chosen: str = peft.active_adapter if adapter is None else adapter
    if chosen not in configs:
        raise ValueError(f"adapter {chosen!r} is unknown; the model has {sorted(configs)}")
    live = configs[chosen]
    _check_readable(live, target)
    _check_embeddings(model, chosen)
    config = copy.deepcopy(live)
    if target == "hotswap":
        config.lora_dropout = 0.0  # compared between adapters, though nothing is dropped at inference
    state = model.state_dict()
    split = next((name for name, tensor in state.items() if is_sharded(tensor)), None)
    if split is not None:
        raise ValueError(
            f"model must hold whole tensors, but {split} is sharded (fully_shard): gather its weights into a model on "
            "one process, get_model_state_dict with full_state_dict=True, and export that"
        )
    if basis != "stored" or any(x is not None for x in (ranks, energy, factors, pad_to)) or target != "peft":
        pairs = _cuttable(model, chosen, config)
        if given is not model:  # its names of pairs are those of what is inside, after the wrapper's own
            ranks, factors = _inside(ranks), _inside(factors)
        made, kept = cut(pairs, ranks, energy, basis, factors, chosen)
        _reshape(model, config, state, made, kept, pad_to, target)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            configs[chosen] = config
            peft.save_pretrained(scratch, selected_adapters=[chosen], state_dict=state)
        finally:
            configs[chosen] = live
        nested = Path(scratch) / chosen  # where PEFT puts every adapter but "default"
        written = nested if nested.is_dir() else Path(scratch)
        _settle_names(written, chosen)
        if target == "diffusers":
            _write_for_diffusers(written, folder, prefix)
        else:
            shutil.copytree(written, folder, dirs_exist_ok=True)
    return folder


def _check_readable(config: Any, target: str) -> None:
    """Raise a ValueError if the adapter has tensors that the target does not read."""
    for field in (*_READERS[target].refuses, *(() if target == "peft" else _PEFT_ALONE)):
        value = getattr(config, field, None)
        if value not in (None, False, "none", [], (), {}):
            raise ValueError(f"{target} does not read {field}={value!r}; target='peft' writes it")


def _check_embeddings(model: nn.Module, adapter: str) -> None:
    """Raise a ValueError if an adapted embedding is merged: PEFT may save it as the base's, beside its adapter."""
    for pair in find_lora_pairs(model, adapter):
        if pair.idle == "merged" and pair.path.rpartition(".")[2] in _EMBEDDINGS:
            raise ValueError(
                f"model must not be merged, but {pair.name} is, and PEFT may write the merged weight beside the "
                "adapter, which would then count twice: call unmerge_adapter() first"
            )


def _inside(named: Any) -> Any:
    """Return what is given by names of pairs by those that they have inside what torch.compile returns."""
    return {k.removeprefix(f"{COMPILED}."): v for k, v in named.items()} if isinstance(named, Mapping) else named


def _settle_names(written: Path, adapter: str) -> None:
    """Take the names that torch.compile gives the layers it wraps out of the file that PEFT has written.

    Raises:
        ValueError: If the file has no tensors: PEFT writes what it finds by name, and says nothing where that is none.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(written / _PEFT_FILE)
    if not tensors:
        raise ValueError(
            f"model must have the tensors of adapter {adapter!r} in its state_dict under the names that PEFT gives "
            "them, but none was found there: export the PeftModel itself, without wrappers or hooks on state_dict"
        )
    named = {name.replace(f".{COMPILED}.", "."): tensor for name, tensor in tensors.items()}
    if named.keys() != tensors.keys():
        save_file(named, written / _PEFT_FILE, metadata={"format": "pt"})


def _write_for_diffusers(written: Path, folder: Path, prefix: str) -> None:
    """Turn the file that PEFT has written into the one that diffusers looks for."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(written / _PEFT_FILE)
    named = {f"{prefix}.{name.removeprefix('base_model.model.')}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / _DIFFUSERS_FILE, metadata={"format": "pt"})


def _cuttable(model: nn.Module, adapter: str, config: Any) -> list[LoraPair]:
    """Return the pairs of an adapter whose tensors may be changed on the way to the file."""
    if moved_base(config):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} moved the base weights: first convert the adapter to a "
            "plain one (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    return find_lora_pairs(model, adapter)


def _reshape(
    model: nn.Module,
    config: Any,
    state: dict[str, Tensor],
    made: Mapping[LoraPair, OrderedPair],
    kept: Mapping[LoraPair, int],
    pad_to: int | None,
    target: str,
) -> None:
    """Cut, pad and scale what is to be written: `config` and `state` are changed, the tensors of the model are not."""
    pairs = list(made)
    for pair, rank in kept.items():
        if pad_to is not None and pad_to < rank:
            raise ValueError(f"pad_to must be at least {rank}, the rank of {pair.name}, got {pad_to}")
    others = find_skipped(model)  # they go by the config's `r` too, and are written as they are
    scale = _READERS[target].scale
    if scale == "config" and pad_to is None:
        pad_to = max(kept.values())
    if others and (pad_to is not None or scale != "pattern"):
        word = "pad_to" if target == "peft" else target
        raise ValueError(f"{word}: {others[0][0]} is not a plain pair ({others[0][1]})")
    written = {pair: pad_to or kept[pair] for pair in pairs}
    scalings = {pair: saved_scaling(pair, pair.rank) for pair in pairs}
    if scale == "pattern" and pad_to is None:
        alphas = {pair: alpha_for(scalings[pair], denominator(pair, written[pair])) for pair in pairs}
        factors = dict.fromkeys(pairs, 1.0)
    else:
        config.use_rslora = False
        alphas = dict(written) if scale == "one" else dict.fromkeys(pairs, _common_alpha(scalings, written))
        factors = {pair: scalings[pair] / (alphas[pair] / written[pair]) for pair in pairs}
    _say(config, {pair.base_path: (written[pair], alphas[pair]) for pair in pairs}, uniform_allowed=not others)
    _fill(model, state, made, kept, factors, pad_to)


def _common_alpha(scalings: dict[LoraPair, float], ranks: dict[LoraPair, int]) -> int:
    """The alpha that most pairs have at these ranks; where it is no integer, the largest rank."""
    alphas = Counter(alpha_for(scalings[pair], rank) for pair, rank in ranks.items())
    alpha, _ = alphas.most_common(1)[0]
    return alpha if isinstance(alpha, int) and alpha > 0 else max(ranks.values())


def _say(config: Any, layers: dict[str, tuple[int, float]], uniform_allowed: bool = True) -> None:
    """Write {path: (rank, alpha)} into a config, without patterns if all layers agree."""
    if uniform_allowed:
        (config.r, config.lora_alpha), _ = Counter(layers.values()).most_common(1)[0]
        config.rank_pattern, config.alpha_pattern = {}, {}
    for path, (rank, alpha) in layers.items():
        set_patterns(config, path, rank, alpha)


def _fill(
    model: nn.Module,
    state: dict[str, Tensor],
    made: Mapping[LoraPair, OrderedPair],
    kept: Mapping[LoraPair, int],
    factors: Mapping[LoraPair, float],
    pad_to: int | None,
) -> None:
    """Replace the LoRA matrices in a state dict by cut, scaled and padded copies."""
    places = {id(pair.A): (pair, own.A, pair.dim_A, 1.0) for pair, own in made.items()}
    places.update({id(pair.B): (pair, own.B, pair.dim_B, factors[pair]) for pair, own in made.items()})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in places:
            continue
        pair, matrix, dim, factor = places[id(parameter)]
        part = matrix.narrow(dim, 0, kept[pair]) * factor
        state[name] = resized(part, dim, pad_to or kept[pair]).contiguous()
        bias = name.removesuffix("weight") + "bias"
        if dim == pair.dim_B and bias in state:
            state[bias] = state[bias] * factor
