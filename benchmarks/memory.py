"""Bytes of optimizer state on LoRA adapters, and peak memory of a step, as ratios to AdamW.

Every optimizer runs in a process of its own, so that the peak is its own. Writes results/memory.csv.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from adapters import Adapters, contestants
from harness import RESULTS, table, write_csv


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in the state, each storage once, nested containers included."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(dict(optimizer.state))
    return sum(seen.values())


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Take a few steps with one optimizer in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    adapters = Adapters(args.layers, args.hidden, args.intermediate, args.rank)
    optimizer = contestants(heavy=True)[name](adapters)
    adapters.observe()  # as every training step does, so that it is not counted as the optimizer's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        adapters.observe()
        optimizer.step()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"state_bytes": state_bytes(optimizer), "peak_growth_bytes": 1024 * grown}


def main() -> None:
    """Measure every contestant in a child process, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help="measure this optimizer here and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    rows = []
    for name in contestants(heavy=True):
        command = [sys.executable, Path(__file__).name, *sys.argv[1:], "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        rows.append({"optimizer": name, "pairs": 7 * args.layers, "rank": args.rank, **json.loads(done.stdout)})
    base = rows[0]
    for row in rows:
        row["state_ratio"] = round(row["state_bytes"] / base["state_bytes"], 4)
        row["peak_ratio"] = round(row["peak_growth_bytes"] / base["peak_growth_bytes"], 3)
    print(table(rows, ["optimizer", "pairs", "state_bytes", "state_ratio", "peak_growth_bytes", "peak_ratio"]))
    write_csv(RESULTS / "memory.csv", rows)


if __name__ == "__main__":
    main()
