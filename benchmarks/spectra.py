"""One run of the demo's task that looks at every pair now and then: energies σ² and live ranks over time.

    python benchmarks/spectra.py

Writes results/spectra.csv: a row a look and pair, with the energies as shares in descending order.
"""

import argparse
import warnings

import torch
from harness import RESULTS, append_csv, stamp
from training import load

from curvopt import GritKFAC

COLUMNS = ("task", "step", "pair", "rank", "effective_rank", "energy", "device", "threads", "python", "torch", "commit")


def main() -> None:
    """Fine-tune with rank adaptation and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="language")
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tau", type=float, default=0.99)
    parser.add_argument("--looks", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    task = load(args.task)
    every = max(1, task.steps // args.looks)
    model = task.build(0, rank=args.rank)
    optimizer = GritKFAC(model, lr=args.lr, reproject_every=every, rank_threshold=args.tau, min_rank=1)
    path = RESULTS / "spectra.csv"
    path.unlink(missing_ok=True)
    mark = stamp("cpu")
    model.train()
    for step, batch in enumerate(task.batches(0, task.steps)):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / task.steps)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if (step + 1) % every == 0:
            for name, pair in optimizer.diagnostics()["pairs"].items():
                energy, own = pair.get("energy", []), {"task": args.task, "step": step + 1, "pair": name}
                own |= {"rank": pair["rank"], "effective_rank": pair.get("effective_rank"), "energy": energy}
                append_csv(path, COLUMNS, {**own, **mark})


if __name__ == "__main__":
    main()
