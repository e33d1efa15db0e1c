"""Fine-tuning quality: every contestant on every task, same start, same batches, equal steps, one grid for all.

    python benchmarks/quality.py                # the full benchmark; resumes where results/quality.csv ends
    python benchmarks/quality.py --quick        # two seeds and three optimizers on the three smallest tasks

For each optimizer and task the learning rate climbs the task's grid (factor 2) on the validation loss until both
neighbours of the best are worse, with a seed that is not reported; of losses within 0.1 % the lowest rate is taken.
Then the best runs with the seeds that are, and for --horizons with fewer steps; GritKFAC runs at AdamW's best rate
besides. Rows go to results/quality.csv, curves to results/quality_curves.csv. Tables: report.py; plots: plots.py.
"""

import argparse
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from contestants import CHOICES, CONTESTANTS, Contestant
from harness import RESULTS, append_csv, read_csv
from tasks import TASKS
from training import SEARCH_SEED, Log, chosen_rate, load

# where the climb starts: near AdamW's best, so that few runs are spent on finding it
START = {
    "language": 8e-3, "headers": 8e-3, "headers32": 8e-3, "sentences": 4e-3, "digits": 8e-3, "regression": 1.6e-2,
}  # fmt: skip
TEXTS = ("language", "headers", "headers32")  # the tasks whose earlier task has a loss before fine-tuning
# the optimizers that also run with fewer steps
SHORTER = ("AdamW", "GritKFAC", "GoRA + AdamW", "GoRA + GritKFAC")

# what is run by default: CHOICES instead of their variants
NAMES = [*(n for n in CONTESTANTS if n == "AdamW" or not any(n in c for c in CHOICES.values())), *CHOICES]


def best_rate(log: Log, task: str, name: str, contestant: Contestant) -> float:
    """Return the learning rate of the grid with the lowest validation loss; both neighbours of the best were tried."""
    rates = TASKS[task].rates

    def loss(i: int) -> float:
        value = float(log.get(task, name, contestant, rates[i], SEARCH_SEED)["valid"])
        return value if math.isfinite(value) else math.inf

    i = rates.index(START[task.split(",")[0]] * contestant.start)
    while True:
        near = [j for j in (i, i + 1, i - 1) if 0 <= j < len(rates)]
        j = min(near, key=loss)
        if j == i:
            return chosen_rate({rates[k]: loss(k) for k in near})
        i = j


def chosen(log: Log, task: str, name: str) -> str:
    """Return the contestant that stands for a name on a task: of CHOICES the one with the lowest validation loss."""

    def loss(variant: str) -> float:
        contestant = CONTESTANTS[variant]
        lr = best_rate(log, task, variant, contestant)
        return float(log.get(task, variant, contestant, lr, SEARCH_SEED)["valid"])

    return min(CHOICES[name], key=loss) if name in CHOICES else name


def run_all(
    log: Log,
    tasks: Sequence[str],
    contestants: Mapping[str, Contestant | None],
    seeds: int,
    horizons: Sequence[float] = (),
    shorter: Sequence[str] = (),
) -> None:
    """Run what the log lacks, cheap tasks first: every contestant's best rate and ``seeds`` runs at it.

    Args:
        log: what has been run.
        tasks: keys in `TASKS`.
        contestants: by name; None for the names of CHOICES.
        seeds: reported seeds of each.
        horizons: shares of the steps for those in ``shorter`` besides the full run.
        shorter: names of contestants.
    """
    for task in sorted(tasks, key=lambda t: list(reversed(TASKS)).index(t)):
        for label, given in contestants.items():
            name = label if given is not None else chosen(log, task, label)
            contestant = given or CONTESTANTS[name]
            if contestant.tasks is not None and task not in contestant.tasks:
                continue
            lr = best_rate(log, task, name, contestant)
            for seed in range(SEARCH_SEED + 1, SEARCH_SEED + 1 + seeds):
                for horizon in [1.0, *(horizons if label in shorter else [])]:
                    log.get(task, name, contestant, lr, seed, horizon)


def run_drop_in(log: Log, tasks: Sequence[str], seeds: int) -> None:
    """Run GritKFAC at the learning rate that is best for AdamW."""
    for task in tasks:
        lr = best_rate(log, task, "AdamW", CONTESTANTS["AdamW"])
        for seed in range(SEARCH_SEED + 1, SEARCH_SEED + 1 + seeds):
            log.get(task, "GritKFAC", CONTESTANTS["GritKFAC"], lr, seed)


def measure_before(tasks: Sequence[str], path: Path) -> None:
    """Record each task's losses before fine-tuning, where the CSV lacks them."""
    known = {row["task"] for row in read_csv(path)}
    for name in (name for name in tasks if name not in known):
        task = load(name)
        losses = {part: task.loss_on(task.base, part)[0] for part in ("valid", "test", "retention")}
        append_csv(path, ("task", *losses), {"task": name, **losses})


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", default=NAMES, choices=[*CONTESTANTS, *CHOICES])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--horizons", type=float, nargs="*", default=[0.8, 0.7, 0.6], help="shares of the steps")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.csv")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.seeds, args.horizons = ["regression", "digits", "headers"], 2, []
        args.optimizers = ["AdamW", "GritKFAC", "GoRA + GritKFAC"]
        args.out = RESULTS / "quick" / "quality.csv"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    log = Log(args.out)
    names = {name: CONTESTANTS.get(name) for name in args.optimizers}
    run_all(log, args.tasks, names, args.seeds, args.horizons, SHORTER)
    if {"AdamW", "GritKFAC"} <= set(names):
        run_drop_in(log, args.tasks, args.seeds)
    measure_before([task for task in args.tasks if task in TEXTS], args.out.with_name("before.csv"))


if __name__ == "__main__":
    main()
