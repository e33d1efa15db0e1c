"""GritKFAC with one argument changed at a time, and the ideas of `ideas`, on the cheap tasks.

    python benchmarks/ablations.py              # resumes where results/ablations.csv ends

Learning rates are chosen as in quality.py, by variant and task with a seed that is not reported. Rows go to
results/ablations.csv (table: report.py).
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import ideas
import torch
from contestants import Contestant, adamw, grit
from harness import RESULTS
from quality import run_all
from training import Log

from curvopt import GritKFAC

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "update=eigen": {"update": "eigen"},
    "update=adam": {"update": "adam"},
    "update=whiten": {"update": "whiten"},
    "update=momentum": {"update": "momentum"},
    "damping=0.01": {"damping": 0.01},
    "damping=1": {"damping": 1.0},
    "update=adam, damping=1": {"update": "adam", "damping": 1.0},
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
    "betas=(0.8, 0.999)": {"betas": (0.8, 0.999)},
    "betas=(0.9, 0.95)": {"betas": (0.9, 0.95)},
    "balanced every 10": {"reproject_every": 10},
    "paper projection, τ = 0.99, every 50": {
        "reprojection": "paper", "reproject_every": 50, "rank_threshold": 0.99, "min_rank": 1,
    },
    "one-sided projection, τ = 0.99, every 50": {
        "reprojection": "paper-one-sided", "reproject_every": 50, "rank_threshold": 0.99, "min_rank": 1,
    },
}  # fmt: skip
OWN = {"inverse_every": 10**9}  # after the first step the idea makes the basis
IDEAS: dict[str, tuple[type[GritKFAC], dict[str, Any]]] = {
    "idea: basis by one QR step, every step": (ideas.AmortisedBasis, OWN),
    "idea: two speeds of averages": (ideas.TwoSpeeds, OWN),
    "idea: trust ratio by pair": (ideas.TrustRatios, {}),
    "idea: A against B by cost": (ideas.BalancedCosts, {}),
}


def idea(kind: type[GritKFAC], options: dict[str, Any]) -> Contestant:
    """A contestant of an idea."""
    return Contestant(lambda task, model, lr, steps: [kind(model, lr=lr, **options)])


CONTESTANTS = {
    **{name: Contestant(grit(**options)) for name, options in VARIANTS.items()},
    **{name: idea(*of) for name, of in IDEAS.items()},
    "AdamW": Contestant(adamw()),
    "AdamW, betas=(0.8, 0.999)": Contestant(adamw(betas=(0.8, 0.999))),
    "AdamW, betas=(0.9, 0.95)": Contestant(adamw(betas=(0.9, 0.95))),
}
TASKS = ("regression", "headers", "digits")


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
        args.tasks, args.seeds, args.out = ["regression"], 1, RESULTS / "quick" / "ablations.csv"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    run_all(Log(args.out), args.tasks, {name: CONTESTANTS[name] for name in args.variants}, args.seeds)


if __name__ == "__main__":
    main()
