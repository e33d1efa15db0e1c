"""From factors to the r×r matrices that the update rules act through."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvopt.functional.inverse import empty
from curvopt.ops import Ops
from curvopt.optim.stacks import Stack

# rule → (the op that makes its matrix, the state key that holds it)
MATRICES = {
    "polar": ("eigenbasis", "basis"),
    "eigen": ("eigenbasis", "basis"),
    "adam": ("damped_inverse", "inverse"),
    "whiten": ("damped_inverse_root", "root"),
    "momentum": ("damped_inverse", "inverse"),
}


def live_rank(stack: Stack) -> Tensor | None:
    """Return ``[L]`` live ranks, or None where ranks never change."""
    return None if stack.group["rank_threshold"] is None else stack.state["rank"]


def known(stack: Stack) -> Tensor:
    """Return ``[L]`` booleans: factors that say something; B = 0 keeps that of A empty at the start."""
    return ~empty(stack.state["factor"], live_rank(stack))


def make(stack: Stack, ops: Ops) -> Tensor:
    """Return the rule's matrices ``[L, r, r]`` for the factors as they are; a broken factor keeps what it has."""
    op, key = MATRICES[stack.group["update"]]
    factor, old, k = stack.state["factor"], stack.state[key], live_rank(stack)
    if op == "eigenbasis":
        Q: Tensor = ops(op, factor, k, old)[0]
        return Q
    M: Tensor = ops(op, factor, stack.group["damping"], k, old)
    return M


def refresh(stacks: Sequence[Stack], found_inf: dict[torch.device, Tensor], ops: Ops) -> None:
    """Make new matrices; where both moments live in a basis they turn with it."""
    for stack in stacks:
        key = MATRICES[stack.group["update"]][1]
        old = stack.state[key]
        new = torch.where(found_inf[stack.device] == 0, make(stack, ops), old)
        if key == "basis":
            R = torch.where(found_inf[stack.device] == 0, new.mT @ old, torch.eye(stack.r).to(old))
            stack.carry(R)
        old.copy_(new)
