"""One fine-tuning run, from task, contestant, learning rate and seed to a row and a curve; and the CSVs of runs."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant
from harness import Row, append_csv, read_csv, rounded, stamp
from tasks import TASKS, Task
from tasks.base import Batch
from torch import Tensor, nn

SEARCH_SEED = 0  # chooses learning rates; the seeds after it are reported
TIE = 1e-3  # losses of the search that are closer, as a share, are a tie
CHECKS = 10  # looks at the validation loss in a run
KEY = ("task", "optimizer", "lr", "seed", "horizon")
RUN_COLUMNS = (
    *KEY, "steps", "rank", "valid", "test", "accuracy", "retention", "retention_accuracy", "train_tail", "update_norm",
    "mean_rank", "adapter_parameters", "seconds", "device", "threads", "python", "torch", "commit",
)  # fmt: skip
CURVE_COLUMNS = (*KEY, "steps", "valid", "train", "seconds")

_loaded: dict[str, Task] = {}


def load(name: str) -> Task:
    """Return a task, pre-trained once a process."""
    if name not in _loaded:
        _loaded[name] = TASKS[name]()
    return _loaded[name]


def chosen_rate(losses: Mapping[float, float]) -> float:
    """Return the learning rate with the lowest loss; of several within a thousandth of it, the lowest rate."""
    best = min(losses.values())
    return min(lr for lr, loss in losses.items() if loss <= best + TIE * abs(best))


def update_norm(model: nn.Module) -> float:
    """Return ‖ΔW‖_F over all pairs, ΔW = s B A; NaN for adapters that are no pairs."""
    total, found = 0.0, False
    for layer in model.modules():
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            A, B = (m["default"].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
            total += float(((B.T @ B) * (A @ A.T)).sum()) * layer.scaling["default"] ** 2
            found = True
    return math.sqrt(max(total, 0.0)) if found else math.nan


def run(
    task_name: str,
    name: str,
    contestant: Contestant,
    lr: float,
    seed: int,
    horizon: float = 1.0,
    checks: int | None = None,
) -> tuple[Row, Row]:
    """Fine-tune on this thread and measure.

    Args:
        task_name: key in `TASKS`.
        name: the contestant's name, for the row.
        contestant: adapter and optimizers.
        lr: peak learning rate; it decays linearly to zero.
        seed: of the adapter's start and of the batches, the same for every contestant.
        horizon: share of the task's steps; the learning rate decays over these.
        checks: looks at the validation loss; `CHECKS` by default.

    Returns:
        A row of results and a row with the curve (lists of ``checks`` numbers).
    """
    task, checks = load(task_name), checks or CHECKS
    steps = round(task.steps * horizon)
    model = task.build(seed, contestant.kind)
    torch.manual_seed(seed)  # for contestants that draw: GoRAInit, new rows of A
    optimizers = contestant.make(task, model, lr, steps)
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
    curve: dict[str, list[float]] = {"steps": [], "valid": [], "train": [], "seconds": []}
    seconds, losses = 0.0, []
    model.train()
    for step, batch in enumerate(task.batches(seed, steps)):
        start = time.process_time()  # of this thread's work: other processes do not count
        for o, own in zip(optimizers, peaks, strict=True):
            for g, peak in zip(o.param_groups, own, strict=True):
                g["lr"] = peak * (1 - step / steps)

        def closure(batch: Batch = batch) -> Tensor:
            for o in optimizers:
                o.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        if hasattr(optimizers[0], "delegate"):  # GoRAInit tries several starts on one batch
            loss = optimizers[0].step(closure)
        else:
            loss = closure()
            for o in optimizers:
                o.step()
        losses.append(loss.item())
        seconds += time.process_time() - start
        if not math.isfinite(losses[-1]):
            break
        if (step + 1) * checks // steps > step * checks // steps:
            values = step + 1, task.valid(model), statistics.fmean(losses[-steps // checks :]), seconds
            for key, value in zip(curve, values, strict=True):
                curve[key].append(value)
    key = dict(zip(KEY, (task_name, name, lr, seed, horizon), strict=True))
    row = {**key, "steps": steps, "rank": task.rank, "seconds": seconds, **finished(task, model, optimizers, losses)}
    row["valid"] = curve["valid"][-1] if len(losses) == steps else math.inf
    return {**rounded(row, 6), **stamp(task.device)}, {**key, **curve}


def finished(task: Task, model: nn.Module, optimizers: Sequence[Any], losses: Sequence[float]) -> Row:
    """Compact the adapter if the optimizer can, and measure it."""
    ranks: list[int] = []
    for o in optimizers:
        if hasattr(o, "ranks"):
            ranks = list((o.compact() if hasattr(o, "compact") else o.ranks()).values())
        if hasattr(o, "remove_hooks"):
            o.remove_hooks()
    own = [p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n]
    return {
        **task.measure(model),
        "train_tail": statistics.fmean(losses[-max(1, len(losses) // CHECKS) :]),
        "update_norm": update_norm(model),
        "mean_rank": statistics.fmean(ranks) if ranks else task.rank,
        "adapter_parameters": sum(own),
    }


class Log:
    """The runs of two CSVs, results and curves; what is in them is not run again.

    Args:
        results: path of the results; the curves lie beside it, with "_curves" in the name.
        checks: looks at the validation loss in a run.
    """

    def __init__(self, results: Path, checks: int | None = None) -> None:
        self.checks = checks
        self.results, self.curves = results, results.with_name(f"{results.stem}_curves.csv")
        self.rows = read_csv(results)

    def take(self, row: Row | None) -> None:
        """Add a run of another log, unless it is in this one."""
        if row and tuple(row[k] for k in KEY) not in {tuple(r[k] for k in KEY) for r in self.rows}:
            append_csv(self.results, RUN_COLUMNS, row)
            self.rows.append(row)

    def get(self, task: str, name: str, contestant: Contestant, lr: float, seed: int, horizon: float = 1.0) -> Row:
        """Return the recorded row of a run, or run it now and record it."""
        key = (task, name, lr, seed, horizon)
        for row in self.rows:
            if tuple(row[k] for k in KEY) == key:
                return row
        row, curve = run(task, name, contestant, lr, seed, horizon, self.checks)
        append_csv(self.results, RUN_COLUMNS, row)
        append_csv(self.curves, CURVE_COLUMNS, curve)
        self.rows.append(row)
        print(*key, *(f"{k}={row[k]:.5g}" for k in ("valid", "test", "retention", "seconds")), flush=True)
        return row
