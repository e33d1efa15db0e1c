"""GritKFAC with one argument changed at a time, on the cheap tasks: rule × statistics × sides × damping × ... .

    python benchmarks/ablations.py              # resumes where results/ablations.csv ends

Every variant runs at the learning rates of `RATES`, which hold the default's best, with all seeds; the best is
reported. Rows go to results/ablations.csv (table: report.py).
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant, adamw, grit
from harness import RESULTS
from training import Log

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "update=adam": {"update": "adam"},
    "update=adam, damping=1": {"update": "adam", "damping": 1.0},
    "update=whiten": {"update": "whiten"},
    "update=whiten, damping=1": {"update": "whiten", "damping": 1.0},
    "update=momentum": {"update": "momentum"},
    "statistics=gradient": {"statistics": "gradient"},
    "statistics=weight": {"statistics": "weight"},
    "statistics=weight, update=adam": {"statistics": "weight", "update": "adam"},
    "sides=paper": {"sides": "paper"},
    "sides=paper, update=adam": {"sides": "paper", "update": "adam"},
    "factor_decay=0.8": {"factor_decay": 0.8},
    "factor_decay=0.99": {"factor_decay": 0.99},
    "factor_every=5": {"factor_every": 5},
    "inverse_every=1": {"inverse_every": 1},
    "inverse_every=30": {"inverse_every": 30},
    "warmup_steps=20": {"warmup_steps": 20},
    "betas=(0.9, 0.95)": {"betas": (0.9, 0.95)},
    "betas=(0.9, 0.99)": {"betas": (0.9, 0.99)},
    "balanced every 10": {"reproject_every": 10},
    "balanced every 50": {"reproject_every": 50},
    "paper projection, τ = 0.99, every 50": {
        "reprojection": "paper", "reproject_every": 50, "rank_threshold": 0.99, "min_rank": 1,
    },
    "one-sided projection, τ = 0.99, every 50": {
        "reprojection": "paper-one-sided", "reproject_every": 50, "rank_threshold": 0.99, "min_rank": 1,
    },
}  # fmt: skip
CONTESTANTS = {
    **{name: Contestant(grit(**options)) for name, options in VARIANTS.items()},
    "AdamW": Contestant(adamw()),
    "AdamW, betas=(0.9, 0.95)": Contestant(adamw(betas=(0.9, 0.95))),
}
RATES = {"regression": (1.6e-2, 3.2e-2, 6.4e-2), "headers": (1.6e-2,), "digits": (8e-3,)}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--variants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations.csv")
    parser.add_argument("--quick", action="store_true", help="one seed of the smallest task, into results/quick")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.seeds, args.out = ["regression"], 1, RESULTS / "quick" / "ablations.csv"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    log = Log(args.out)
    for task in args.tasks:
        for name in args.variants:
            for lr in RATES[task]:
                for seed in range(args.seeds):
                    log.get(task, name, CONTESTANTS[name], lr, seed)


if __name__ == "__main__":
    main()
