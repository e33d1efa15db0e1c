"""Bytes of optimizer state on LoRA adapters, and peak memory of a step, as ratios to AdamW.

    python benchmarks/memory.py [--device cuda]

Every optimizer runs in a process of its own, so that the peak is its own. Writes results/memory.csv.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from adapters import BASELINE, Adapters, contestants, light
from harness import RESULTS, merge_csv, peak_bytes, stamp, table, write_csv
from shapes import MODELS, square


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


def measure(name: str, where: str, args: argparse.Namespace) -> dict[str, Any]:
    """Take a few steps with one optimizer in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    adapters = Adapters(MODELS.get(where) or square(args.pairs, args.d), args.rank, args.device)
    optimizer = contestants()[name](adapters)
    adapters.observe()  # as every training step does, so that it is not counted as the optimizer's
    before = peak_bytes(args.device)
    for _ in range(2):
        adapters.observe()
        optimizer.step()
    own = sum(p.numel() * p.element_size() for p in adapters.trainable())
    return {
        "adapter_bytes": own,
        "state_bytes": state_bytes(optimizer),
        "peak_growth_bytes": peak_bytes(args.device) - before,
    }


def main() -> None:
    """Measure every contestant in a child process, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="of the part with everybody")
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", nargs="*", default=["Qwen2.5-0.5B"], choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", help="measure these beside the baseline, and keep the other rows")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("OPTIMIZER", "WHERE"), help="measure this here and print JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into results/quick")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.d, args.models = 8, 256, []
    if args.one:
        print(json.dumps(measure(*args.one, args)))
        return
    rows = []
    for where, who in (("pairs", contestants()), *((model, light()) for model in args.models)):
        base: dict[str, Any] = {}
        for name in (n for n in who if n == BASELINE or n in (args.optimizers or who)):
            command = [sys.executable, Path(__file__).name, *sys.argv[1:], "--one", name, where]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
            found = json.loads(done.stdout.splitlines()[-1])
            base = found if name == BASELINE else base
            pairs = MODELS[where].pairs if where in MODELS else args.pairs
            ratio = {"state_ratio": found["state_bytes"] / base["state_bytes"]}
            ratio["peak_ratio"] = found["peak_growth_bytes"] / max(1, base["peak_growth_bytes"])
            rows.append({"model": where, "optimizer": name, "pairs": pairs, "r": args.rank, **found, **ratio})
    path = RESULTS / ("quick" if args.quick else ".") / "memory.csv"
    stamped = [{**row, **stamp(args.device)} for row in rows]
    if args.optimizers:
        merge_csv(path, ("model", "optimizer"), stamped)
    else:
        write_csv(path, stamped)
    print(table(rows, ["model", "optimizer", "pairs", "state_bytes", "state_ratio", "peak_ratio"]))


if __name__ == "__main__":
    main()
