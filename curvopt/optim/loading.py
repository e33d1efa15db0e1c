"""What comes from a file: whether it fits, and what torch's loading does to it that has to be put right."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_fits(groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Raise a ValueError if the saved state of a parameter of ``groups`` has another shape, for another rank."""
    for p, index, state in _matched(groups, state_dict):
        shape = state["exp_avg"].shape if "exp_avg" in state else p.shape
        if shape != p.shape:
            raise ValueError(
                f"state_dict does not fit: parameter {index} has shape {tuple(p.shape)} but its saved state "
                f"{tuple(shape)}; give the adapter the saved ranks first (curvopt.lora.resize_adapter)"
            )


def restore(
    states: Mapping[Tensor, dict[str, Any]],
    groups: Sequence[dict[str, Any]],
    state_dict: Mapping[str, Any],
    small: frozenset[str],
) -> None:
    """Take the r×r and counting state as it was saved: torch has cast it to the parameter's dtype, and shares it."""
    for p, _, state in _matched(groups, state_dict):
        for key in small & state.keys():
            states[p][key] = state[key].to(p.device, copy=True)
        if (step := state.get("step")) is not None:  # torch leaves it where it was saved; once it was a number
            states[p]["step"] = torch.as_tensor(step, dtype=torch.float32).to(p.device, copy=True)


def _matched(
    groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]
) -> list[tuple[Tensor, Any, dict[str, Any]]]:
    """Return each parameter with its index in the file and its state there."""
    params = (p for g in groups for p in g["params"])
    indices = (i for g in state_dict["param_groups"] for i in g["params"])
    return [(p, i, state_dict["state"].get(i, {})) for p, i in zip(params, indices, strict=False)]
