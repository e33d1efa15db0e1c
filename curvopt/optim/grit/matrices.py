"""From factors to the r×r matrices that the update rules act through."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvopt.ops import Ops
from curvopt.optim.stacks import Stack

# rule → (the op that makes its matrix, the state key that holds it)
MATRICES = {
    "eigen": ("eigenbasis", "basis"),
    "adam": ("damped_inverse", "inverse"),
    "whiten": ("damped_inverse_root", "root"),
    "momentum": ("damped_inverse", "inverse"),
}


def live_rank(stack: Stack) -> Tensor | None:
    """Return ``[L]`` live ranks, or None where ranks never change."""
    return None if stack.group["rank_threshold"] is None else stack.state["rank"]


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
    """Make new matrices; under "eigen" both moments live in the basis and turn with it."""
    for stack in stacks:
        rule = stack.group["update"]
        old = stack.state[MATRICES[rule][1]]
        new = torch.where(found_inf[stack.device] == 0, make(stack, ops), old)
        if rule == "eigen":
            R = torch.where(found_inf[stack.device] == 0, new.mT @ old, torch.eye(stack.r).to(old))
            stack.carry(R)
        old.copy_(new)
