"""The doctor for saved runs: an adapter folder, or a file with an optimizer's state_dict."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvopt.analysis.checks import check_curvature, check_settings, check_steps, check_values
from curvopt.analysis.core import core_of
from curvopt.analysis.drift import gathered, pair_drift
from curvopt.analysis.findings import Finding, Report, report
from curvopt.analysis.spectra import spectrum
from curvopt.lora import LoraPair, pair_by_name
from curvopt.optim.grit.diagnostics import describe_factor, outer_share

CONFIG, WEIGHTS, OPTIMIZER = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin"), "optimizer.pt"
PREFIX = "base_model.model."
TOLD = ("steps", "skipped_updates", "pairs", "parameters", "state_bytes", "norm", "r_eff")


def inspect_saved(path: str | Path) -> Report:
    """Examine an adapter folder of PEFT (with the trainer's optimizer.pt if there), or a checkpoint file.

    A file may hold an optimizer's state_dict, by itself or under any key, or the tensors of an adapter. Of a GoRAInit
    that has handed over, the state is that of the optimizer it has handed over to. Pairs are identified by name. An
    optimizer that was given bare tensors saves no names; its factors are reported by parameter.

    Raises:
        ValueError: it is neither; the message is one line that names the path.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder")
    if place.is_dir():
        return _folder(place)
    held = _loaded(place)
    if (state := _optimizer_in(held)) is not None:
        found, pairs, facts = _state(state, str(place))
    elif tensors := _tensors_in(held):
        found, pairs, facts = _adapter(tensors, {}, str(place))
    else:
        raise ValueError(f"{place}: holds neither an optimizer's state_dict nor the tensors of an adapter")
    return _told(place, found, pairs, facts)


Parts = tuple[list[Finding], dict[str, dict[str, Any]], dict[str, Any]]


def _folder(place: Path) -> Report:
    weights = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    state_file = place / OPTIMIZER
    if not (place / CONFIG).is_file() and not state_file.is_file():
        raise ValueError(f"{place}: no adapter ({CONFIG}) and no {OPTIMIZER} in this folder")
    found: list[Finding] = []
    pairs: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    state = _optimizer_in(_loaded(state_file)) if state_file.is_file() else None
    if state_file.is_file() and state is None:
        raise ValueError(f"{state_file}: no optimizer's state_dict in it")
    if (place / CONFIG).is_file():
        if weights is None:
            raise ValueError(f"{place}: has {CONFIG} but neither {' nor '.join(WEIGHTS)}")
        found, pairs, facts = _adapter(_tensors_in(_loaded(weights)), _config(place / CONFIG), str(weights))
    if state is not None:
        more, others, about = _state(state, str(state_file))
        found, facts = found + more, facts | about
        for name, p in others.items():
            pairs[name] = pairs.get(name, {}) | p
    return _told(place, found, pairs, facts)


def _told(place: Path, found: list[Finding], pairs: dict[str, Any], facts: dict[str, Any]) -> Report:
    return report(f"saved run {place}", found, pairs, {key: facts[key] for key in TOLD if key in facts})


def _loaded(path: Path) -> Any:
    """Return what a file holds; never runs code from it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: needs the package {error.name}, which is not installed") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: cannot be read with weights_only=True: it holds more than tensors") from error
    except Exception as error:  # whatever a damaged file raises is the answer
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read ({line})") from error


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: is no JSON object")
    return config


def _optimizer_in(held: Any, depth: int = 2) -> dict[str, Any] | None:
    """Return the first optimizer's state_dict in nested dicts."""
    if not isinstance(held, Mapping):
        return None
    if isinstance(held.get("state"), Mapping) and isinstance(held.get("param_groups"), list):
        gora = held.get("gora")
        return (_optimizer_in(gora.get("delegate"), 0) if isinstance(gora, Mapping) else None) or dict(held)
    inner = (_optimizer_in(value, depth - 1) for value in held.values()) if depth else iter(())
    return next((found for found in inner if found is not None), None)


def _tensors_in(held: Any, depth: int = 2) -> dict[str, Tensor]:
    """Return the first dict of named tensors that has LoRA factors."""
    if not isinstance(held, Mapping):
        return {}
    tensors = {k: v for k, v in held.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if pair_by_name(tensors.items()):
        return tensors
    inner = (_tensors_in(value, depth - 1) for value in held.values()) if depth else iter(())
    return next((found for found in inner if found), {})


def _adapter(tensors: dict[str, Tensor], config: dict[str, Any], where: str) -> Parts:
    """Examine the tensors of an adapter."""
    pairs = pair_by_name(tensors.items())
    found: list[Finding] = []
    if not pairs:
        found += [Finding(
            "error", "no pairs", f"no lora_A with its lora_B among {len(tensors)} tensors of {where}",
            "save the adapter again; is it LoRA at all?",
        )]  # fmt: skip
    paired = {id(t) for p in pairs for t in (p.A, p.B)}
    if lonely := [name for name, t in tensors.items() if "lora_" in name and id(t) not in paired]:
        found += [Finding(
            "warning", "unpaired layers",
            f"{len(lonely)} tensors look like factors but have no partner of their rank",
            "DoRA magnitudes and the like are harmless; a lone lora_A or lora_B means a damaged adapter",
            tuple(lonely),
        )]  # fmt: skip
    facts, drifts = {}, []
    for p in pairs:
        name = p.name.removeprefix(PREFIX)
        A, B = p.matrix("A", p.A), p.matrix("B", p.B)
        A, B = (A if p.dim_A == 0 else A.mT), (B if p.dim_B == 1 else B.mT)
        live = (A.abs().amax(1) > 0) | (B.abs().amax(0) > 0)  # a mask leaves zeros at the end, in both
        k = int(live.nonzero().max()) + 1 if bool(live.any()) else p.rank
        c = core_of(name, A[:k], B[:, :k], _scaling(config, p), full_rank=p.rank)
        moved = pair_drift(c)
        drifts.append(moved)
        facts[name] = {"rank": c.rank, "full_rank": c.full_rank, "update_rank": spectrum(c).update_rank}
        facts[name] |= {"norm": moved.norm, "r_eff": moved.r_eff}
    found += check_values([d.name for d in drifts if d.norm is None])
    if zero := [d.name for d in drifts if d.norm == 0]:
        found += [Finding(
            "warning", "zero update", f"{len(zero)} of {len(pairs)} pairs have ΔW = 0: the model is the base there",
            "was the adapter saved before training, or were the layers never reached?", tuple(zero),
        )]  # fmt: skip
    whole = gathered(drifts)
    numel = sum(t.numel() for t in tensors.values())
    return found, facts, {"pairs": len(pairs), "parameters": numel, "norm": whole.norm, "r_eff": whole.r_eff}


def _scaling(config: dict[str, Any], pair: LoraPair) -> float:
    """Return PEFT's scaling of a pair: alpha/r or alpha/√r, by the first pattern that matches."""
    path = pair.path.removeprefix(PREFIX)
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)), config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)):
        return 1.0
    return alpha / (math.sqrt(pair.rank) if config.get("use_rslora") else pair.rank)


def _state(saved: dict[str, Any], where: str) -> Parts:
    """Examine an optimizer's state_dict."""
    groups = [g for g in saved["param_groups"] if isinstance(g, Mapping)]
    named: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for g in groups:
        indices = g.get("params", [])
        names = g.get("param_names") or [f"parameter.{i}" for i in indices]
        named |= {name: (g, saved["state"].get(i, {})) for name, i in zip(names, indices, strict=False)}
    pairs = pair_by_name((name, s["exp_avg"]) for name, (_, s) in named.items() if "exp_avg" in s)
    of = {id(s["exp_avg"]): (g, s) for g, s in named.values() if "exp_avg" in s}
    facts: dict[str, dict[str, Any]] = {}
    for p in pairs:
        sides = {"A": of[id(p.A)], "B": of[id(p.B)]}
        if all(_curved(s) for _, s in sides.values()):
            facts[p.name.removeprefix(PREFIX)] = _paired(sides, p.rank)
    if not facts:
        facts = {n: _paired({"A": (g, s)}, _rank_of(s)) for n, (g, s) in named.items() if _curved(s)}
    states = [s for _, s in named.values()]
    steps = max([int(s["cadence"][0] if "cadence" in s else s["step"]) for s in states if "step" in s], default=0)
    skipped = max([int(s["skipped"]) for s in states if "skipped" in s], default=0)
    seen = [name for name, (g, s) in named.items() if g.get("statistics") == "activation" and _unseen(s)]
    found = [*check_curvature(facts, steps), *check_settings(groups, {n: f["full_rank"] for n, f in facts.items()})]
    found += check_steps(skipped, steps, [], [])
    if not any(_curved(s) for s in states):
        why = _uncurved(saved, groups, steps)
        found.append(Finding("note", "no curvature", f"the state in {where} has no factors", why))
    if seen:
        found += [Finding(
            "warning", "silent hooks", f"{len(seen)} parameters were never observed: their curvature is not used",
            'use statistics="gradient", or switch a fused LoRA forward off', tuple(seen),
        )]  # fmt: skip
    size = sum(v.numel() * v.element_size() for s in states for v in s.values() if isinstance(v, Tensor))
    return found, facts, {"steps": steps, "skipped_updates": skipped, "state_bytes": size}


def _curved(state: Mapping[str, Any]) -> bool:
    """Whether there is a factor of curvature in the state of a parameter: on the rank side, or an outer one."""
    return "factor" in state or "outer_trace" in state


def _rank_of(state: Mapping[str, Any]) -> int:
    """Return the rank of one matrix without a name; an outer factor does not tell it, so the shorter side does."""
    return int(state["factor"].shape[0] if "factor" in state else min(state["exp_avg"].shape[:2]))


def _uncurved(saved: Mapping[str, Any], groups: list[Mapping[str, Any]], steps: int) -> str:
    """Say why a state has no factors."""
    if "gora" in saved:
        return "it is the state of a GoRAInit that has not handed over to another optimizer"
    if not any("outer_rank" in g for g in groups):
        return "it is not the state of a GritKFAC"
    return "its settings ask for none: outer_rank=0, and a rule that reads none" if steps else "it has taken no step"


def _unseen(state: Mapping[str, Any]) -> bool:
    return "observed" in state and float(state["observed"]) == 0


def _paired(sides: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]], r: int) -> dict[str, Any]:
    """Return the facts of a pair, or of one factor, from saved state."""
    k = min(int(s.get("rank", r)) for _, s in sides.values())
    out: dict[str, Any] = {"rank": k, "full_rank": r}
    out["outer"] = {side: outer_share(s) for side, (_, s) in sides.items() if "outer_trace" in s}
    if not all("factor" in s for _, s in sides.values()):
        return out
    out["rows"] = max(float(s.get("rows", 0.0)) for _, s in sides.values())
    for side, (g, s) in sides.items():
        rule, damping = g.get("update", "eigen"), g.get("damping", 0.1)
        out[side] = describe_factor(s["factor"][None].cpu(), damping, torch.tensor([k]), rule)
    if len(sides) == 2:
        S_A, S_B = (sides[side][1]["factor"] for side in "AB")
        S_u, S_d = (S_B, S_A) if sides["A"][0].get("sides", "kfac") == "kfac" else (S_A, S_B)
        seen = spectrum(core_of("", torch.zeros(k, k), torch.zeros(k, k), 1.0, (S_u, S_d)))
        out |= {"energy": seen.energy, "effective_rank": seen.effective_rank}
    return out
