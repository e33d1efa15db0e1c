"""GritKFAC with one argument changed at a time, on two cheap tasks.

    python benchmarks/ablations.py              # resumes where results/ablations.csv ends

Learning rates are chosen as in quality.py, by variant and task with a seed that is not reported. Rows go to
results/ablations.csv (table: report.py).
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant, grit
from harness import RESULTS
from quality import run_all
from training import Log

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "outer_rank=0": {"outer_rank": 0},
    "outer_rank=8": {"outer_rank": 8},
    "outer_rank=32": {"outer_rank": 32},
    "outer_rank=64": {"outer_rank": 64},
    "damping=0.03": {"damping": 0.03},
    "damping=0.3": {"damping": 0.3},
    "factor_decay=0.9": {"factor_decay": 0.9},
    "factor_decay=0.99": {"factor_decay": 0.99},
    "betas=(0.8, 0.99)": {"betas": (0.8, 0.99)},
    "betas=(0.6, 0.99)": {"betas": (0.6, 0.99)},
    "warmup_steps=20": {"warmup_steps": 20},
    "update=eigen": {"update": "eigen"},
    "update=adam": {"update": "adam"},
    "update=whiten": {"update": "whiten"},
    "update=momentum": {"update": "momentum"},
    "balanced every 10": {"reproject_every": 10},
    "paper projection, τ = 0.99, every 50": {
        "reprojection": "paper", "reproject_every": 50, "rank_threshold": 0.99, "min_rank": 1,
    },
}  # fmt: skip
CONTESTANTS = {name: Contestant(grit(**options)) for name, options in VARIANTS.items()}
TASKS = ("headers", "digits")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--variants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations.csv")
    parser.add_argument("--quick", action="store_true", help="one seed of the smallest task, into results/quick")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.seeds, args.out = ["digits"], 1, RESULTS / "quick" / "ablations.csv"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    run_all(Log(args.out), args.tasks, {name: CONTESTANTS[name] for name in args.variants}, args.seeds)


if __name__ == "__main__":
    main()
