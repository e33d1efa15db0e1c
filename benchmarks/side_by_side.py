"""Several runs that differ only in seed and learning rate, batched into one model.

Small models spend much of a step on call overhead. Here R adapters share one frozen base model: a batch is the
concatenation of the R runs' batches, every LoRA matrix is a stack of R, and the sum of the R losses is differentiated,
so each run takes the steps that `training.run` would take, up to rounding. For tasks without trained heads.
"""

import math
import statistics
import time
from typing import Any

import torch
from harness import Row, rounded, stamp
from outer_prototype import OuterPolar
from tasks import Task
from tasks.base import Batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import KEY, load


class Stack(nn.Module):
    """R linear maps without bias, weights ``[R, out, in]``, for inputs ``[R, n, in]``."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([w.detach() for w in weights]))

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs ``[R, n, out]``."""
        return x @ self.weight.mT


class StackedLora(nn.Module):
    """A frozen linear layer with R LoRA pairs, for R concatenated batches.

    Args:
        layers: PEFT's layers of the R runs; the base layer is the first one's.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.base_layer, self.scaling = layers[0].base_layer, layers[0].scaling["default"]
        self.lora_A = nn.ModuleDict({"default": Stack([layer.lora_A["default"].weight for layer in layers])})
        self.lora_B = nn.ModuleDict({"default": Stack([layer.lora_B["default"].weight for layer in layers])})

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + s B A x, each run's rows through its own A and B."""
        out = self.base_layer(x)
        A, B = self.lora_A["default"], self.lora_B["default"]
        return out + self.scaling * B(A(x.reshape(len(A.weight), -1, x.shape[-1]))).reshape(out.shape)


def stacked(models: list[nn.Module]) -> nn.Module:
    """Return the first model with the LoRA pairs of all."""
    names = [name for name, module in models[0].named_modules() if hasattr(module, "lora_A")]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(models[0].get_submodule(parent), child, StackedLora([m.get_submodule(name) for m in models]))
    return models[0]


def losses(task: Task, model: nn.Module, batch: Batch, R: int) -> tuple[Tensor, Tensor]:
    """Return mean loss and accuracy ``[R]`` for a batch of R batches."""
    labels = batch["labels"]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if labels.dim() == 2:  # language: the next token
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.flatten(0, -2), labels.flatten()
    each = cross_entropy(logits, labels, reduction="none").reshape(R, -1).mean(1)
    return each, (logits.argmax(-1) == labels).float().reshape(R, -1).mean(1)


@torch.no_grad()
def losses_on(task: Task, model: nn.Module, part: str, R: int) -> tuple[list[float], list[float]]:
    """Return losses and accuracies of R runs on held-out batches; see `tasks.Task.loss_on`."""
    model.eval()
    total, right, rows = torch.zeros(R), torch.zeros(R), 0
    for batch in task.split(part):
        n = len(batch["labels"])
        each, share = losses(task, model, {k: v.repeat(R, *[1] * (v.dim() - 1)) for k, v in batch.items()}, R)
        total, right, rows = total + each * n, right + share * n, rows + n
    model.train()
    return (total / rows).tolist(), (right / rows).tolist()


def run(
    task_name: str, name: str, options: dict[str, Any], pairs: list[tuple[float, int]], horizon: float = 1.0
) -> list[Row]:
    """Fine-tune R adapters and measure each.

    Args:
        task_name: key in `TASKS`; not "sentences" nor "regression".
        name: the contestant's name, for the rows.
        options: of `OuterPolar`.
        pairs: learning rate and seed of each run.
        horizon: share of the task's steps.

    Returns:
        One row of results per run, as `training.run` returns it.
    """
    task, R = load(task_name), len(pairs)
    steps = round(task.steps * horizon)
    model = stacked([task.build(seed) for _, seed in pairs])
    rates = torch.tensor([lr for lr, _ in pairs])
    optimizer = OuterPolar(model, rates, **options)
    train: list[list[float]] = []
    seconds = 0.0
    model.train()
    for step, parts in enumerate(zip(*(task.batches(seed, steps) for _, seed in pairs), strict=True)):
        start = time.process_time()
        optimizer.param_groups[0]["lr"] = rates * (1 - step / steps)
        optimizer.zero_grad()
        each, _ = losses(task, model, {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, R)
        each.sum().backward()
        optimizer.step()
        train.append(each.tolist())
        seconds += time.process_time() - start
    optimizer.remove_hooks()
    valid, test, kept = (losses_on(task, model, part, R) for part in ("valid", "test", "retention"))
    norms = torch.zeros(R, dtype=torch.float64)
    for layer in model.modules():
        if isinstance(layer, StackedLora):
            A, B = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
            norms += ((B.mT @ B) * (A @ A.mT)).sum((1, 2)) * layer.scaling**2
    size = sum(p.numel() for p in model.parameters() if p.requires_grad) // R
    rows = []
    for i, (lr, seed) in enumerate(pairs):
        row = {
            **dict(zip(KEY, (task_name, name, lr, seed, horizon), strict=True)), "steps": steps, "rank": task.rank,
            "valid": valid[0][i] if math.isfinite(valid[0][i]) else math.inf,
            "test": test[0][i], "accuracy": test[1][i], "retention": kept[0][i], "retention_accuracy": kept[1][i],
            "train_tail": statistics.fmean(t[i] for t in train[-max(1, steps // 10) :]),
            "update_norm": float(norms[i].sqrt()), "mean_rank": task.rank, "adapter_parameters": size,
            "seconds": seconds / R,
        }  # fmt: skip
        rows.append({**rounded(row, 6), **stamp("cpu")})
    return rows
