"""Time of one optimizer step on LoRA adapters, as a ratio to torch's fused AdamW of the same run.

Three parts, each interleaved in one process: ``full`` (32 blocks, 224 pairs; the optimizers whose state is r×r),
``blocks`` (few pairs; also those with d×d blocks) and ``capture`` (forward and backward of the demo's model with and
without the hooks). Times are means over whole inverse cadences, so refresh steps are in. Writes
results/step_time.csv.
"""

import argparse
from typing import Any

import torch
from adapters import Adapters, contestants
from harness import RESULTS, interleave, summary, table, write_csv

BASELINE = "AdamW fused"


def optimizer_rows(part: str, layers: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a step of every contestant on its own copy of the adapters."""
    steps, before = {}, {}
    for name, make in contestants(heavy=part == "blocks").items():
        adapters = Adapters(layers, args.hidden, args.intermediate, args.rank)
        optimizer = make(adapters)
        steps[name] = optimizer.step
        if name.startswith("GritKFAC") and "," not in name:
            before[name] = adapters.observe
    times = interleave(steps, args.rounds if part == "full" else args.block_rounds, before=before)
    base = summary(times[BASELINE])["mean_ms"]
    return [
        {
            "part": part, "optimizer": name, "pairs": 7 * layers, "hidden": args.hidden, "rank": args.rank,
            **summary(t), "ratio": round(summary(t)["mean_ms"] / base, 3), "rounds": len(t),
        }
        for name, t in times.items()
    ]  # fmt: skip


def capture_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time forward and backward of the demo's model with the hooks off and on."""
    from curvopt import GritKFAC
    from curvopt.demo import task as demo_task

    model = demo_task.lora_model(demo_task.untrained_model(demo_task.PretrainConfig()), rank=8)
    optimizer = GritKFAC(model)
    x = torch.randint(0, 256, (16, 128))

    def run(active: bool) -> None:
        optimizer._observer.capture.active = active
        model(input_ids=x, labels=x).loss.backward()

    steps = {"hooks off": lambda: run(False), "hooks on": lambda: run(True)}
    times = interleave(steps, args.rounds, before=dict.fromkeys(steps, optimizer.zero_grad))
    base = summary(times["hooks off"])["median_ms"]
    return [
        {"part": "capture", "optimizer": name, "pairs": 28, "hidden": 128, "rank": 8, **summary(t),
         "ratio": round(summary(t)["median_ms"] / base, 3), "rounds": len(t)}
        for name, t in times.items()
    ]  # fmt: skip


def main() -> None:
    """Run the parts asked for, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["full", "blocks", "capture"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--block-layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block-rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        layers = {"full": args.layers, "blocks": args.block_layers}.get(part)
        rows += capture_rows(args) if layers is None else optimizer_rows(part, layers, args)
    print(table(rows, ["part", "optimizer", "pairs", "mean_ms", "median_ms", "p10_ms", "p90_ms", "ratio"]))
    write_csv(RESULTS / "step_time.csv", rows)


if __name__ == "__main__":
    main()
