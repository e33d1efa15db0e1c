"""Starts and ranks before training: no start, GoRA's, and the whitened ones, with AdamW and GritKFAC after them.

    python benchmarks/gora_starts.py                # resumes where results/gora_starts.csv ends
    python benchmarks/gora_starts.py --cost         # what the default calibration takes, in training steps with AdamW

The learning rate of a task is the one that quality.py chose for the optimizer without a start. The calibration takes 8
of the run's steps, 4 with GoRAInit's defaults. Runs that quality.py has made are taken from its CSV. Rows go to
results/gora_starts.csv, curves beside it.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant, Optimizers, adamw, gora, grit
from findings import Runs
from harness import RESULTS, spread, table
from tasks import TASKS, Task
from torch import nn
from training import KEY, SEARCH_SEED, Log, load

THEN = {"AdamW": adamw(), "GritKFAC": grit()}
STARTS: dict[str, dict[str, Any]] = {
    "default": {},
    "whitened": {"calibration_steps": 8},
    "whitened-random": {"start": "whitened-random", "calibration_steps": 8},
    "whitened, spectrum": {"allocation": "spectrum", "calibration_steps": 8},
    "GoRA uniform": {"start": "gora", "calibration_steps": 8, "init_lr": "auto"},
}


def started(then: Callable[..., Optimizers], **settings: Any) -> Callable[..., Optimizers]:
    """GoRAInit with settings, whose calibration takes the first of the run's steps."""

    def make(task: Task, model: nn.Module, lr: float, steps: int) -> Optimizers:
        from curvopt import GoRAInit

        return [GoRAInit(model, **settings, then=lambda ready: then(task, ready, lr, steps)[0])]

    return make


def contestants(name: str) -> dict[str, Contestant]:
    """Return by label an optimizer without a start and after each."""
    then = THEN[name]
    found = {name: Contestant(then), f"GoRA + {name}": Contestant(gora(then))}
    return found | {f"{start} + {name}": Contestant(started(then, **kw)) for start, kw in STARTS.items()}


def cost(name: str) -> list[float]:
    """Return the time of GoRAInit's default calibration in training steps with AdamW, three times."""
    task, found = load(name), []
    for _ in range(3):
        times = {}
        for label, then in (("AdamW", adamw()), ("GoRAInit", started(adamw()))):
            model = task.build(0).train()
            optimizer, own = then(task, model, 0.0, 8)[0], []
            for batch in task.batches(0, 8):
                begin = time.process_time()
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
                own.append(time.process_time() - begin)
            times[label] = own
        found.append(sum(times["GoRAInit"][:4]) / statistics.median(times["AdamW"]))
    return found


def main() -> None:
    """Run what is missing, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", default=["headers", "headers32", "digits", "language", "sentences"], choices=list(TASKS)
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="labels; all by default")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "gora_starts.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if args.cost:
        print(table([{"task": name, "steps": spread(cost(name))} for name in args.tasks]))
        return
    log, quality = Log(args.out), Runs()
    same = {tuple(row[k] for k in KEY): row for row in quality.rows}
    for task in args.tasks:
        for seed in range(SEARCH_SEED + 1, SEARCH_SEED + 1 + args.seeds):
            for name in THEN:
                for label, contestant in contestants(name).items():
                    if args.only is None or label in args.only:
                        lr = quality.rate(task, name)
                        log.take(same.get((task, label, lr, seed, 1.0)))
                        log.get(task, label, contestant, lr, seed)
    for task in args.tasks:
        for label in dict.fromkeys(row["optimizer"] for row in log.rows if row["task"] == task):
            rows = [row for row in log.rows if (row["task"], row["optimizer"]) == (task, label)]
            print(task, label, spread([row["valid"] for row in rows]), spread([row["test"] for row in rows]), len(rows))
    print(statistics.fmean(row["seconds"] for row in log.rows), "seconds a run")


if __name__ == "__main__":
    main()
