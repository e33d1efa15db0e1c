"""Where the gain grows and where it ends: ladders of ranks, horizons, batch sizes and model sizes.

    python benchmarks/ladders.py                                  # all; resumes where results/ladders.csv ends
    python benchmarks/ladders.py --parts ranks --optimizers GritKFAC AdamW
    python benchmarks/ladders.py --parts sizes --device cuda --tasks "headers, 25 M" "headers, 100 M"

Every rung is a varied task, "headers, r=64", "headers, 1000 steps", "headers, 4x batch" or "headers, 4 M", whose model
is trained on docstrings first and kept. Learning rates climb as in quality.py, and on the ladder of ranks every
optimizer runs at five rates around its start besides, so that the loss at a rate that was chosen at another rank can be
read off. Rows go to results/ladders.csv. Tables: report.py; plot: plots.py.
"""

import argparse
import warnings
from pathlib import Path

import torch
from contestants import CONTESTANTS
from harness import RESULTS
from quality import START, best_rate
from tasks import TASKS, register
from training import SEARCH_SEED, Log

RANKS = tuple(f"headers, r={r}" for r in (8, 16, 32, 64, 128))
HORIZONS = tuple(f"headers, {n} steps" for n in (100, 300, 1000, 3000))
BATCHES = ("headers", "headers, 4x batch", "headers, 16x batch")
SIZES = ("headers", "headers, 0.8 M", "headers, 4 M")  # 25 M and 100 M are for a device
PARTS = {"ranks": RANKS, "horizons": HORIZONS, "batches": BATCHES, "sizes": SIZES}
# the optimizers of each ladder
NAMES = {
    "ranks": ("AdamW", "AdamW (0.7, 0.99)", "GritKFAC", "Muon", "LoRA-Muon (0.8)"),
    "horizons": ("AdamW", "AdamW (0.7, 0.99)", "GritKFAC", "GritKFAC (0.9, 0.999)"),
    "batches": ("AdamW", "AdamW (0.7, 0.99)", "GritKFAC", "Muon"),
    "sizes": ("AdamW", "AdamW (0.7, 0.99)", "GritKFAC"),
}
SHORTER = (0.7, 0.6)  # shares of the steps, of GritKFAC on all ladders but that of horizons


def around(task: str, name: str) -> list[float]:
    """Return five learning rates, factor 2 apart, around an optimizer's start."""
    rates = TASKS[task].rates
    i = rates.index(START[task.split(",")[0]] * CONTESTANTS[name].start)
    return list(rates[i - 2 : i + 3])


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tasks", nargs="+", help="rungs; all by default")
    parser.add_argument("--optimizers", nargs="+", help="names in contestants.py; those of NAMES by default")
    parser.add_argument("--device", default="cpu", help="of the part sizes: cpu or cuda")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "ladders.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    log = Log(args.out, checks=2)
    for part in args.parts:
        for task in (register(t, args.device) for t in args.tasks or PARTS[part]):
            for name in args.optimizers or NAMES[part]:
                contestant = CONTESTANTS[name]
                for lr in around(task, name) if part == "ranks" else ():
                    log.get(task, name, contestant, lr, SEARCH_SEED)
                lr = best_rate(log, task, name, contestant)
                for seed in range(SEARCH_SEED + 1, SEARCH_SEED + 1 + args.seeds):
                    for horizon in (1.0, *(SHORTER if name == "GritKFAC" and part != "horizons" else ())):
                        log.get(task, name, contestant, lr, seed, horizon)


if __name__ == "__main__":
    main()
