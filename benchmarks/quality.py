"""Fine-tuning quality on the demo's task: same start, same batches, equal steps, one grid of learning rates for all.

Every optimizer runs at every learning rate with every seed; the one with the lowest mean fine-tuning loss is
reported, with the paired difference to AdamW of the same seed. The last one adapts its ranks and is compacted before it
is measured. Writes results/quality.csv (every run) and results/quality.png.
"""

import argparse
import csv
import functools
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from harness import RESULTS, table, write_csv

from curvopt.demo import task as demo_task
from curvopt.demo.run import Factory, optimizers

MEASURES = ("fine_tuning", "held_out", "retention")
TITLES = {
    "fine_tuning": "text it was fine-tuned on",
    "held_out": "held-out documents",
    "retention": "text it was pre-trained for",
}


def contestants(tau: float, every: int) -> dict[str, Factory]:
    """Return the optimizers by name."""
    made = optimizers(tau, every)
    return {"AdamW": made["adamw"], "GritKFAC": made["grit"], "GritKFAC, ranks adapted": made["grit-ranks"]}


def run(name: str, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune one adapter on one thread and measure it."""
    torch.set_num_threads(1)
    task, make = load_task(), contestants(args.tau, args.every)[name]
    model = demo_task.lora_model(task["base"], args.rank, seed)
    optimizer: Any = make(model, lr)
    data = demo_task.batches(task["domains"].topics, args.batch, args.length, args.steps, seed)
    start = time.perf_counter()
    curve = demo_task.fine_tune(model, optimizer, data, args.steps)
    seconds = time.perf_counter() - start
    masked = demo_task.evaluate(model, task["domains"].topics_heldout, args.length)
    ranks = list(optimizer.compact().values()) if hasattr(optimizer, "compact") else [args.rank]
    texts = (task["domains"].topics, task["domains"].topics_heldout, task["domains"].source_heldout)
    losses = [demo_task.evaluate(model, text, args.length) for text in texts]
    return {
        "optimizer": name, "lr": lr, "seed": seed, "rank": args.rank, "steps": args.steps,
        **dict(zip(MEASURES, (round(x, 5) for x in losses), strict=True)),
        "last_30_batches": round(statistics.fmean(curve[-30:]), 5),
        "compaction_changed": round(losses[1] - masked, 7),
        "mean_rank": round(statistics.fmean(ranks), 3),
        "adapter_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 2),
    }  # fmt: skip


@functools.cache
def load_task() -> dict[str, Any]:
    """Return the texts and the pre-trained model; once a process."""
    domains = demo_task.load_text_domains()
    return {"domains": domains, "base": demo_task.pretrained_model(domains=domains)}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each optimizer at its best learning rate, mean ± sd and the paired difference to AdamW."""
    best: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = [row for row in rows if row["optimizer"] == name]
        by_lr = {lr: [row for row in own if row["lr"] == lr] for lr in {row["lr"] for row in own}}
        best[name] = min(by_lr.values(), key=lambda runs: statistics.fmean(run["fine_tuning"] for run in runs))
    base = {row["seed"]: row for row in next(iter(best.values()))}
    lines = []
    for name, runs in best.items():
        line: dict[str, Any] = {"optimizer": name, "lr": runs[0]["lr"], "seeds": len(runs)}
        for key in MEASURES:
            line[key] = _spread([run[key] for run in runs])
            line[f"Δ {key}"] = _spread([run[key] - base[run["seed"]][key] for run in runs])
        line["mean_rank"] = round(statistics.fmean(run["mean_rank"] for run in runs), 2)
        line["parameters"] = round(statistics.fmean(run["adapter_parameters"] for run in runs))
        lines.append(line)
    return lines


def _spread(values: list[float]) -> str:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} ± {sd:.4f}"


def earlier(args: argparse.Namespace, grid: list[tuple[str, float, int]]) -> list[dict[str, Any]]:
    """Return the recorded runs of the same setting that ``grid`` does not repeat."""
    with (RESULTS / "quality.csv").open(encoding="utf-8") as f:
        rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(f)]
    same = [row for row in rows if (row["rank"], row["steps"]) == (args.rank, args.steps)]
    return [row for row in same if (row["optimizer"], row["lr"], row["seed"]) not in grid]


def _number(text: str) -> Any:
    try:
        return float(text) if set(text) & set(".e") else int(text)
    except ValueError:
        return text


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw loss against learning rate, one line per optimizer, the band from best to worst seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MEASURES), figsize=(12, 3.8), layout="constrained")
    for axis, key in zip(axes, MEASURES, strict=True):
        for name in dict.fromkeys(row["optimizer"] for row in rows):
            own = [row for row in rows if row["optimizer"] == name]
            lrs = sorted({row["lr"] for row in own})
            values = [[row[key] for row in own if row["lr"] == lr] for lr in lrs]
            axis.plot(lrs, [statistics.fmean(v) for v in values], marker="o", label=name)
            axis.fill_between(lrs, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
        ticks = sorted({row["lr"] for row in rows})
        axis.set(xscale="log", xlabel="learning rate", ylabel="loss, nats per byte", title=TITLES[key])
        axis.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Rank {rows[0]['rank']}, {rows[0]['steps']} steps: mean and range over seeds")
    figure.savefig(RESULTS / "quality.png", dpi=130)


def main() -> None:
    """Run the grid, print the summary, write the CSV and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2, 2e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tau", type=float, default=0.99)
    parser.add_argument("--every", type=int, default=50, help="steps between looks at the ranks")
    parser.add_argument("--replot", action="store_true", help="only the table and the plot of results/quality.csv")
    parser.add_argument("--append", action="store_true", help="keep the runs of results/quality.csv not in this grid")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    args = parser.parse_args()
    if args.replot:
        plot(rows := earlier(args, []))
        print(table(lines := summarise(rows), list(lines[0])))
        return
    load_task()  # pre-trains if need be, before the workers start
    grid = [(name, lr, seed) for seed in range(args.seeds) for lr in args.lrs for name in contestants(0.99, 1)]
    rows = earlier(args, grid) if args.append else []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(run, *zip(*grid, strict=True), [args] * len(grid)):
            rows.append(row)
            print(row, flush=True)
            write_csv(RESULTS / "quality.csv", rows)  # each time, so that an interrupted run is not lost
    print(table(lines := summarise(rows), list(lines[0])))
    plot(rows)


if __name__ == "__main__":
    main()
