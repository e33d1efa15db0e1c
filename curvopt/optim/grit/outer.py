"""The state of GritKFAC's outer factors."""

from typing import Any

import torch
from torch import Tensor

from curvopt.functional import compute_dtype
from curvopt.optim.base import Side

SMALL = frozenset({"outer_eigenvalues", "outer_trace"})


def outer_rank(side: Side) -> int:
    """Return k of a side: what its group asks for, and at most the width of the matrix."""
    k: int = side.group["outer_rank"]
    return min(k, side.param.numel() // side.pair.rank)


def small_state(side: Side) -> dict[str, Tensor]:
    """Return prototypes of the eigenvalues μ ``(k,)`` and of the trace of a side's outer factor."""
    k = outer_rank(side)
    like: dict[str, Any] = {"dtype": compute_dtype(side.param.dtype), "device": side.param.device}
    return {"outer_eigenvalues": torch.zeros(k, **like), "outer_trace": torch.zeros((), **like)} if k else {}
