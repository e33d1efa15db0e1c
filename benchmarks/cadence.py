"""How often must S_u and S_d be observed? GritKFAC at its default, one step in ten, against every step.

    python benchmarks/cadence.py                # resumes where results/cadence.csv ends

Of everything that reads rank-side factors: the update rules "eigen", "adam" and "whiten", and ranks that follow the
spectrum. Learning rates are chosen as in quality.py, with a seed that is not reported. Table: report.py.
"""

import argparse
import warnings
from pathlib import Path

import torch
from contestants import Contestant, grit, grit_ranks
from harness import RESULTS
from quality import run_all
from training import Log

EVERY_STEP = ", every step"
CONTESTANTS: dict[str, Contestant] = {}
for suffix, cadence in (("", {}), (EVERY_STEP, {"factor_every": 1})):
    for rule in ("eigen", "adam", "whiten"):
        CONTESTANTS[rule + suffix] = Contestant(grit(update=rule, **cadence))
    CONTESTANTS["ranks" + suffix] = Contestant(grit_ranks(0.99, **cadence))
TASKS = ("headers", "headers32", "digits", "regression")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--names", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "cadence.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    run_all(Log(args.out), args.tasks, {name: CONTESTANTS[name] for name in args.names}, args.seeds)


if __name__ == "__main__":
    main()
