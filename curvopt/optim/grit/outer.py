"""The outer factors of GritKFAC's buckets: state, and the preconditioning of a step's gradients."""

from typing import Any

import torch
from torch import Tensor

from curvopt.functional import compute_dtype
from curvopt.ops import Ops
from curvopt.optim.base import Side
from curvopt.optim.bucket import Bucket

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


def precondition(bucket: Bucket, ops: Ops, found_inf: Tensor) -> None:
    """S ← β S + (1−β) ∇ᵀ∇/r, and let the plan read ∇ S̃^(-1/2) for ∇ in this step; plain ∇ during the warm-up.

    DDP has averaged the gradients, so every process has the same factor; pieces of a sharded matrix are summed.
    """
    state, g, shards = bucket.state, bucket.group, bucket.blocks[0].shards
    products = bucket.plan.outer_products()
    if shards is not None:
        shards.sum_(products)
    mu, trace = state["outer_eigenvalues"], state["outer_trace"]
    decay = g["factor_decay"]
    if decay == 1:  # the running mean: the newest of t gradients weighs 1/t
        decay = 1 - 1 / (state["step"] + 1)
    M, new_mu, new_trace = ops("outer_map", products, mu, trace, bucket.widths, decay, g["damping"], found_inf)
    torch._foreach_copy_([mu, trace], [new_mu, new_trace])
    if bucket.steps <= g["warmup_steps"]:
        M[:, : bucket.r] = torch.eye(bucket.r, M.shape[2], dtype=M.dtype, device=M.device)
    bucket.plan.take_outer(M)
