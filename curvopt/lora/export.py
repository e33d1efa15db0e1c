"""Write one adapter of a PEFT model as a plain folder, cut or padded to other ranks."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from curvopt.lora.pair import LoraPair
from curvopt.lora.pairs import find_lora_pairs, find_skipped
from curvopt.lora.resize import (
    alpha_for,
    by_pair,
    check_resize,
    denominator,
    moved_base,
    resized,
    saved_scaling,
    set_patterns,
)


def export_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    adapter: str | None = None,
    ranks: Mapping[str, int] | int | None = None,
    pad_to: int | None = None,
) -> Path:
    """Write one adapter of a PEFT model as a plain adapter folder, optionally of other ranks; the model is untouched.

    Args:
        model: A `PeftModel`, unwrapped.
        path: The folder; made if it does not exist, files of an earlier export in it are replaced.
        adapter: Which adapter; None means the active one.
        ranks: Keep the leading rows and columns: {pair name: rank}, or one number for all pairs that have more.
        pad_to: Afterwards fill every pair with zeros to this rank, and put its scaling into B as far as `r` and
            `lora_alpha` alone cannot say it, for programs that do not read patterns.

    Returns:
        The folder.

    Raises:
        TypeError: If `model` is no PeftModel or a rank no integer.
        ValueError: If the adapter or a name is unknown, a rank is out of range, or the adapter has parts that cannot be
            cut or padded (a layer that is no plain pair, an initialisation that moved the base weights).
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not callable(getattr(model, "get_base_model", None)):
        raise TypeError(f"model must be an unwrapped PeftModel, got {type(model).__name__}")
    for word, value in (("ranks", ranks), ("pad_to", pad_to)):
        if value is not None and not isinstance(value, (int, Mapping) if word == "ranks" else int):
            raise TypeError(f"{word} must be an int, got {type(value).__name__}")
    chosen = model.active_adapter if adapter is None else adapter
    if chosen not in configs:
        raise ValueError(f"adapter {chosen!r} is unknown; the model has {sorted(configs)}")
    live = configs[chosen]
    config = copy.deepcopy(live)
    state = model.state_dict()
    if ranks is not None or pad_to is not None:
        _reshape(model, chosen, config, state, ranks, pad_to)
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        try:
            configs[chosen] = config
            model.save_pretrained(scratch, selected_adapters=[chosen], state_dict=state)
        finally:
            configs[chosen] = live
        nested = Path(scratch) / chosen  # where PEFT puts every adapter but "default"
        shutil.copytree(nested if nested.is_dir() else scratch, target, dirs_exist_ok=True)
    return target


def _reshape(
    model: nn.Module, adapter: str, config: Any, state: dict[str, Tensor], ranks: Any, pad_to: int | None
) -> None:
    """Cut and pad what is to be written: `config` and `state` are changed, the tensors of the model are not."""
    if moved_base(config):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} moved the base weights: first convert the adapter to a "
            "plain one (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    pairs = find_lora_pairs(model, adapter)
    kept = _kept_ranks(pairs, ranks, adapter, pad_to)
    others = find_skipped(model)  # they go by the config's `r` too, and are written as they are
    factors = dict.fromkeys(pairs, 1.0)
    scalings = {pair: saved_scaling(pair, pair.rank) for pair in pairs}
    if pad_to is None:
        alphas = {pair: alpha_for(scalings[pair], denominator(pair, kept[pair])) for pair in pairs}
        _say(config, {pair.base_path: (kept[pair], alphas[pair]) for pair in pairs}, uniform_allowed=not others)
    elif others:
        raise ValueError(f"pad_to: {others[0][0]} is no plain pair ({others[0][1]})")
    else:
        common, alpha = scalings[pairs[0]], alpha_for(scalings[pairs[0]], pad_to)
        if len(set(scalings.values())) > 1 or not isinstance(alpha, int):
            common, alpha = 1.0, pad_to
        factors = {pair: scalings[pair] / common for pair in pairs}
        config.use_rslora = False
        _say(config, {pair.base_path: (pad_to, alpha) for pair in pairs})
    _fill(model, state, kept, factors, pad_to)


def _kept_ranks(pairs: list[LoraPair], ranks: Any, adapter: str, pad_to: int | None) -> dict[LoraPair, int]:
    """The leading rank of each pair that is written, validated."""
    kept = {pair: pair.rank for pair in pairs}
    if isinstance(ranks, Mapping):
        kept.update(by_pair(pairs, ranks, adapter))
    elif ranks is not None:
        kept = {pair: ranks if pair.rank > ranks else pair.rank for pair in pairs}
    for pair, rank in kept.items():
        check_resize(pair, rank)
        if rank > pair.rank:
            raise ValueError(f"ranks: {pair.name} has rank {pair.rank}, {rank} cannot be cut from it")
        if pad_to is not None and pad_to < rank:
            raise ValueError(f"pad_to must be at least {rank}, the rank of {pair.name}, got {pad_to}")
    return kept


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
    kept: dict[LoraPair, int],
    factors: dict[LoraPair, float],
    pad_to: int | None,
) -> None:
    """Replace the factors in a state dict by cut, scaled and padded copies."""
    places = {id(pair.A): (pair, pair.dim_A, 1.0) for pair in kept}
    places.update({id(pair.B): (pair, pair.dim_B, factors[pair]) for pair in kept})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in places:
            continue
        pair, dim, factor = places[id(parameter)]
        cut = parameter.detach().narrow(dim, 0, kept[pair]) * factor
        state[name] = resized(cut, dim, pad_to or kept[pair]).contiguous()
        bias = name.removesuffix("weight") + "bias"
        if dim == pair.dim_B and bias in state:
            state[bias] = state[bias] * factor
