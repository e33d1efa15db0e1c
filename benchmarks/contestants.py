"""Who takes part in the quality benchmark: an adapter and the optimizers that train it, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peers import LoraMuon, LoraRite
from tasks import Task
from torch import Tensor, nn

Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True)
class Contestant:
    """One way to fine-tune.

    Attributes:
        make: from task, model, learning rate and the number of steps, the optimizers to step in turn.
        kind: the adapter; see `tasks.Task.build`.
        tasks: the tasks it takes part in; None for all.
        start: where the search for its learning rate starts, as a share of where AdamW's does: where losses have a
            second valley beyond divergence, the climb must not start in it.
    """

    make: Callable[[Task, nn.Module, float, int], Optimizers]
    kind: str = "lora"
    tasks: tuple[str, ...] | None = None
    start: float = 1.0


def trainable(model: nn.Module) -> list[Tensor]:
    """Return the parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


def adamw(**options: Any) -> Callable[[Task, nn.Module, float, int], Optimizers]:
    """AdamW of torch with options, no decay."""

    def make(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
        return [torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0, **options)]

    return make


def grit(**options: Any) -> Callable[[Task, nn.Module, float, int], Optimizers]:
    """GritKFAC with options."""

    def make(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
        from curvopt import GritKFAC

        return [GritKFAC(model, lr=lr, **options)]

    return make


def grit_ranks(tau: float, looks: int = 6, **options: Any) -> Callable[[Task, nn.Module, float, int], Optimizers]:
    """GritKFAC with options that adapts ranks, with so many looks at them in a run."""

    def make(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
        every = max(1, steps // looks)
        return grit(reproject_every=every, rank_threshold=tau, min_rank=1, **options)(task, model, lr, steps)

    return make


def gora(then: Callable[[Task, nn.Module, float, int], Optimizers]) -> Callable[..., Optimizers]:
    """GoRAInit, whose calibration takes the first 8 of the run's steps, before another contestant's optimizer."""

    def make(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
        from curvopt import GoRAInit

        return [
            GoRAInit(
                model, rank=task.rank, min_rank=task.rank // 2, max_rank=4 * task.rank, calibration_steps=8,
                start="gora", allocation="exact", init_lr="auto", then=lambda ready: then(task, ready, lr, steps)[0],
            )
        ]  # fmt: skip

    return make


def _loraplus(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
    from peft.optimizers import create_loraplus_optimizer

    return [create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=16, weight_decay=0.0)]


def _riemannian(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
    from peft.optimizers import create_riemannian_optimizer

    return [create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr, weight_decay=0.0)]


def _soap(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
    import pytorch_optimizer

    return [pytorch_optimizer.SOAP(trainable(model), lr=lr, weight_decay=0.0, max_precondition_dim=512)]


def _shampoo(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
    import pytorch_optimizer

    return [
        pytorch_optimizer.ScalableShampoo(
            trainable(model), lr=lr, graft_type=3, moving_average_for_momentum=True, nesterov=False,
            start_preconditioning_step=1, preconditioning_compute_steps=10, block_size=128,
        )  # graft 3: the step length of RMSProp, so that the common grid of learning rates fits
    ]  # fmt: skip


def _muon(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
    matrices = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, *([torch.optim.AdamW(others, lr=lr, weight_decay=0.0)] if others else [])]


def _peer(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[Task, nn.Module, float, int], Optimizers]:
    """An optimizer of `peers` for the pairs, AdamW for what trains besides."""

    def make(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
        from curvopt import find_lora_pairs

        pairs = [(pair.A, pair.B) for pair in find_lora_pairs(model)]
        known = {id(p) for pair in pairs for p in pair}
        others = [p for p in trainable(model) if id(p) not in known]
        return [
            kind(pairs, lr=lr, **options),
            *([torch.optim.AdamW(others, lr=lr, weight_decay=0.0)] if others else []),
        ]

    return make


def _natural(task: Any, model: nn.Module, lr: float, steps: int) -> Optimizers:
    from tasks.regression import NaturalGradient

    return [NaturalGradient(model, 10 * lr, task.covariance)]  # the grid's 6.4e-2 is then 0.64 of a Newton step


CONTESTANTS: dict[str, Contestant] = {
    "AdamW": Contestant(adamw()),
    "AdamW (0.9, 0.99)": Contestant(adamw(betas=(0.9, 0.99))),
    "AdamW (0.8, 0.99)": Contestant(adamw(betas=(0.8, 0.99))),
    "AdamW (0.7, 0.99)": Contestant(adamw(betas=(0.7, 0.99))),
    "GritKFAC": Contestant(grit()),
    "GritKFAC (0.9, 0.999)": Contestant(grit(betas=(0.9, 0.999))),
    "GritKFAC, no outer factors": Contestant(grit(outer_rank=0)),
    "GritKFAC eigen": Contestant(grit(update="eigen")),
    "GritKFAC, ranks": Contestant(grit_ranks(0.99)),
    "GoRA + AdamW": Contestant(gora(adamw())),
    "GoRA + GritKFAC": Contestant(gora(grit())),
    "LoRA+": Contestant(_loraplus, start=1 / 8),
    "SOAP": Contestant(_soap),
    "Riemannian": Contestant(_riemannian),
    "Muon": Contestant(_muon),
    # η of LoRA-Muon is a length in W, about eight times an element's step
    "LoRA-Muon (0.95)": Contestant(_peer(LoraMuon, momentum=0.95), start=8),
    "LoRA-Muon (0.8)": Contestant(_peer(LoraMuon, momentum=0.8), start=8),
    "LoRA-RITE (0.9, 0.999)": Contestant(_peer(LoraRite, escape=False)),  # as its authors' code, and a little better
    "LoRA-RITE (0.7, 0.99)": Contestant(_peer(LoraRite, betas=(0.7, 0.99), escape=False)),
    "orthogonal": Contestant(adamw(), "orthogonal"),
    "DoRA": Contestant(adamw(), "dora"),
    "Shampoo": Contestant(_shampoo, start=1 / 8),
    "IA3": Contestant(adamw(), "ia3"),
    "natural gradient": Contestant(_natural, tasks=("regression",)),
}

# By name, contestants that differ in betas or momentum alone: the one with the lowest validation loss on the seed that
# chooses learning rates, each at its best, stands for the name on a task.
CHOICES: dict[str, tuple[str, ...]] = {
    "AdamW, tuned betas": ("AdamW", "AdamW (0.9, 0.99)", "AdamW (0.8, 0.99)", "AdamW (0.7, 0.99)"),
    "LoRA-Muon": ("LoRA-Muon (0.95)", "LoRA-Muon (0.8)"),
    "LoRA-RITE": ("LoRA-RITE (0.9, 0.999)", "LoRA-RITE (0.7, 0.99)"),
}
