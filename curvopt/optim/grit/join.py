"""Uneven numbers of batches: what a process does that has none left while others of its group still train."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import JoinHook

from curvopt.optim.base import PairedOptimizer


class StepsOfOthers(JoinHook):
    """Takes part in what the steps of others send, and takes over their result in the end.

    Args:
        optimizer: a `GritKFAC`, unsharded.
        process_group: its processes; None for the default group.
    """

    def __init__(self, optimizer: PairedOptimizer, process_group: dist.ProcessGroup | None) -> None:
        self.optimizer, self.group = optimizer, process_group

    def main_hook(self) -> None:
        """Step on zero gradients and no rows: the sums over processes are those of the others."""
        optimizer = self.optimizer
        optimizer.zero_grad()
        params = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        seen = [p for p in params if optimizer.state.get(p)]
        for p in seen or params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Take weights, state and settings of a process that had most batches."""
        optimizer, me = self.optimizer, dist.get_rank(self.group)
        device = optimizer.param_groups[0]["params"][0].device
        source = torch.tensor(me if is_last_joiner else -1, device=device)
        dist.all_reduce(source, op=dist.ReduceOp.MAX, group=self.group)
        mine = int(source) == me
        root = int(source) if self.group is None else dist.get_global_rank(self.group, int(source))
        state = optimizer.state_dict()
        state["state"] = {i: {k: v.cpu() for k, v in own.items()} for i, own in state["state"].items()}
        sent: list[Any] = [state if mine else None]
        dist.broadcast_object_list(sent, src=root, group=self.group, device=device)
        if not mine:
            optimizer.load_state_dict(sent[0])
        for g in optimizer.param_groups:
            for p in g["params"]:
                dist.broadcast(p.detach(), src=root, group=self.group)
