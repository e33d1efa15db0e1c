"""The doctor: whether curvature has an effect, where rank is used, and what is wrong with a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.analysis.checks import check_clipping, check_curvature, check_settings, check_steps, check_values
from curvopt.analysis.core import cores, unwrapped
from curvopt.analysis.drift import gathered, pair_drift
from curvopt.analysis.findings import Finding, Report, report
from curvopt.analysis.spectra import spectrum
from curvopt.lora import LoraPair, describe_search, find_lora_pairs, find_skipped
from curvopt.optim import GritKFAC, PairedOptimizer
from curvopt.optim.checking import check, is_number
from curvopt.optim.grit.diagnostics import live_rank


def doctor(model: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None = None) -> Report:
    """Examine a run between two steps, without changing it. Synchronises with the device; gathers sharded parameters.

    For an optimizer of curvopt the `Report` is complete; for any other it contains what can be seen from outside:
    parameters that were replaced or forgotten, pairs without gradients, the update's spectrum, bytes of state.

    Args:
        model: the model that is trained, or a wrapper of it.
        optimizer: the optimizer, or accelerate's wrapper of it.
        max_grad_norm: the norm to which the loop clips gradients; 0 if it does not clip. None: judged from the present
            gradients, if there are any.

    Raises:
        TypeError: ``model`` is not a module or ``optimizer`` not an optimizer.
        ValueError: ``max_grad_norm`` is negative.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    clip = max_grad_norm
    check("max_grad_norm", clip, clip is None or (is_number(clip) and clip >= 0), "None or a number ≥ 0")
    optimizer = unwrapped(optimizer)
    ours = isinstance(optimizer, PairedOptimizer)
    pairs = optimizer.pairs if isinstance(optimizer, PairedOptimizer) else find_lora_pairs(model)
    known = optimizer.diagnostics() if isinstance(optimizer, GritKFAC) else _outside(optimizer, pairs)
    found = [
        *_pairing(model, optimizer, pairs),
        *_parameters(model, optimizer),
        *_observation(optimizer, known),
    ]
    facts: dict[str, dict[str, Any]] = {name: dict(p) for name, p in known["pairs"].items()}
    drifts = []
    for c in cores(optimizer if ours else pairs):
        s, moved = spectrum(c), pair_drift(c)
        drifts.append(moved)
        facts[c.name] |= {"energy": s.energy, "effective_rank": s.effective_rank, "update_rank": s.update_rank}
        facts[c.name] |= {key: getattr(moved, key) for key in ("norm", "r_eff", "rho_align", "pi_proj")}
    steps = known["steps"]
    trained = {p.name for p in pairs if p.a_trainable or p.b_trainable}
    if hasattr(optimizer, "plan"):  # a GoRAInit at work takes no steps of its own
        found += _calibrating(optimizer)
        trained = set()
    idle = [name for name in known["idle"] if name in trained]
    zero = [d.name for d in drifts if d.norm == 0 and d.name in trained and d.name not in idle]
    ranks = {p.name: p.rank for p in pairs}
    found += check_values([d.name for d in drifts if d.norm is None])
    found += check_curvature(facts, steps)
    found += check_steps(known["skipped_updates"], steps, idle, zero)
    found += check_settings(optimizer.param_groups, ranks)
    nested = any("nesting" in g for g in optimizer.param_groups)
    found += check_clipping(nested, max_grad_norm, _gradient_norm(optimizer))
    held = [p for g in optimizer.param_groups for p in g["params"]]
    whole = gathered(drifts)
    about = {
        "steps": steps, "skipped_updates": known["skipped_updates"], "pairs": len(pairs),
        "parameters": sum(p.numel() for p in held), "state_bytes": state_bytes(optimizer),
        "parameter_bytes": _bytes(held), "norm": whole.norm if drifts else None, "r_eff": whole.r_eff,
        "rho_align": whole.rho_align, "pi_proj": whole.pi_proj,
    }  # fmt: skip
    return report(f"{type(optimizer).__name__} on {type(model).__name__}", found, facts, about)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in the state, each counted once."""
    return _bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values())


def _outside(optimizer: torch.optim.Optimizer, pairs: list[LoraPair]) -> dict[str, Any]:
    """Return of any optimizer what `GritKFAC.diagnostics` returns, as far as its state shows it."""
    steps = [int(s["cadence"][0] if "cadence" in s else s["step"]) for s in optimizer.state.values() if "step" in s]
    skipped = [int(s["skipped"]) for s in optimizer.state.values() if "skipped" in s]
    ours = optimizer if isinstance(optimizer, PairedOptimizer) else None
    return {
        "steps": max(steps, default=0),
        "skipped_updates": max(skipped, default=0),
        "silent": [],
        "idle": [p.name for p in pairs if not (optimizer.state.get(p.A) or optimizer.state.get(p.B))],
        "pairs": {
            p.name: {"rank": p.rank if ours is None else live_rank(ours, p), "full_rank": p.rank, "note": p.note}
            for p in pairs
        },
    }


def _pairing(model: nn.Module, optimizer: torch.optim.Optimizer, pairs: list[LoraPair]) -> Iterator[Finding]:
    """Say which adapters curvature cannot see, and why."""
    by_shape = isinstance(optimizer, PairedOptimizer) and optimizer.sides  # each matrix by itself, without pairs
    if not pairs and not by_shape:
        yield Finding(
            "error", "no pairs", f"no LoRA pair among what is trained: {describe_search(model)}",
            "pass the model itself to the optimizer, after its adapters were added",
        )  # fmt: skip
    elif not isinstance(optimizer, PairedOptimizer):
        yield Finding(
            "note", "no curvature",
            f"{type(optimizer).__name__} does not use the curvature of the {len(pairs)} pairs of this model",
            "curvopt.GritKFAC(model, lr=...) can replace it in any loop",
        )  # fmt: skip
    if skipped := find_skipped(model):
        reasons = "; ".join(dict.fromkeys(reason for _, reason in skipped))
        yield Finding(
            "warning", "unpaired layers",
            f"{len(skipped)} layers look like adapters but are not plain pairs: {reasons}",
            "their parameters get plain AdamW; use plain LoRA on them if curvature should be used",
            tuple(path for path, _ in skipped),
        )  # fmt: skip


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Finding]:
    """Say which parameters the optimizer holds that the model no longer has, and the other way round."""
    held = {p: name for g in optimizer.param_groups for p, name in _named(g)}
    alive = set(model.parameters())
    gone = [p for p in held if p not in alive]
    followed = {now for p in gone if (now := _successor(optimizer, p)) in alive}
    stale = [held[p] or f"a tensor of shape {tuple(p.shape)}" for p in gone if _successor(optimizer, p) not in alive]
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p not in held and p not in followed]
    if followed:
        yield Finding(
            "note", "replaced parameters", f"{len(followed)} parameters were replaced since the last step",
            "nothing to do: the next step uses the new ones, with the old state where the shape is the same",
            tuple(name for name, p in model.named_parameters() if p in followed),
        )  # fmt: skip
    if stale:
        yield Finding(
            "error", "stale parameters",
            f"{len(stale)} of {len(held)} parameters in the optimizer are no longer the model's: they were replaced "
            f"(by a cast, a rank, sharding, a copy of the model), and {len(missing)} of the model's are not trained",
            "build the optimizer after the last change to the model", tuple(missing or stale),
        )  # fmt: skip
    elif missing:
        yield Finding(
            "warning", "forgotten parameters",
            f"{len(missing)} trainable parameters are in no group of the optimizer",
            "add them with add_param_group, or call requires_grad_(False)", tuple(missing),
        )  # fmt: skip


def _successor(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """Return what stands in the model where a parameter stood when the optimizer saw it last."""
    return optimizer.now_at(p) if isinstance(optimizer, PairedOptimizer) else p


def _named(group: dict[str, Any]) -> list[tuple[Tensor, str]]:
    names = group.get("param_names") or [""] * len(group["params"])
    return list(zip(group["params"], names, strict=True))


def _observation(optimizer: torch.optim.Optimizer, known: dict[str, Any]) -> Iterator[Finding]:
    """Say which pairs are not observed as asked."""
    if known["silent"]:
        yield Finding(
            "warning", "silent hooks",
            f"{len(known['silent'])} pairs had gradients but their hook never fired: their curvature is not used. "
            'statistics="activation" needs a forward that calls the modules of the adapter, as a fused one does not',
            'use statistics="gradient", or switch the fused forward off', tuple(known["silent"]),
        )  # fmt: skip
    wanted = [g for g in optimizer.param_groups if g.get("statistics") == "activation"]
    watched = [p.name for p in getattr(optimizer, "pairs", []) if p.signal is not None]
    if wanted and watched and not getattr(optimizer, "watching", True):
        yield Finding(
            "warning", "hooks removed",
            f"the hooks of {len(watched)} pairs were removed: their factors are no longer updated",
            "create a new optimizer to continue observing, or ignore this after training",
        )  # fmt: skip
    by_note: dict[str, list[str]] = {}
    for name, p in known["pairs"].items():
        if wanted and p.get("note"):
            by_note.setdefault(p["note"], []).append(name)
    for note, names in by_note.items():
        yield Finding(
            "note", "gradient statistics", f"{len(names)} pairs are observed by their gradients: {note}",
            "pass the model itself to the optimizer if you did not; otherwise nothing can be done", tuple(names),
        )  # fmt: skip


def _calibrating(optimizer: Any) -> Iterator[Finding]:
    """Say where a GoRAInit is that has not handed over."""
    if optimizer.ready:
        what = "the calibration is over, and there is no optimizer to continue with"
        yield Finding("error", "calibrated", what, "create an optimizer for the model now, or pass then= to GoRAInit")
    else:
        what = "ranks and starts are still being calibrated; nothing is trained yet"
        yield Finding("note", "calibrating", what, "look again after calibration_steps")


def _gradient_norm(optimizer: torch.optim.Optimizer) -> float | None:
    grads = [p.grad.detach() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return float(torch.stack([g.norm().cpu() for g in grads]).norm()) if grads else None
