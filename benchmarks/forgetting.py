"""The law of forgetting on real runs: two model sizes × three amounts of data × AdamW and GritKFAC, over seeds.

Each run fine-tunes a LoRA adapter of the demo's task from a pre-trained base and measures the loss on the text the base
was pre-trained for, before and after, beside the update's r_eff, ρ_align and π_proj (with S_u and S_d observed on the
same batches for both optimizers). Fits the plain and the curvature-modulated law. Goes on where results/forgetting.csv
ends, and writes it and results/forgetting.png.
"""

import argparse
import functools
import itertools
import time
from typing import Any

import torch
from harness import RESULTS, read_csv, table, write_csv

from curvopt.analysis import drift, fit_forgetting_law, observe, plot_forgetting
from curvopt.demo import task as demo_task
from curvopt.demo.run import LEARNING_RATES, optimizers

SIZES = {
    "small": demo_task.PretrainConfig(hidden=64, heads=2, intermediate=172),
    "demo": demo_task.PretrainConfig(),
}
OPTIMIZERS = {"AdamW": "adamw", "GritKFAC": "grit"}
KEY = ("model", "optimizer", "seed", "steps")
MODULATORS = ("r_eff", "rho_align", "pi_proj")
PROBES, PROBE_SEED = 8, 10_000  # batches on which S_u and S_d are observed, the same ones for every run


@functools.cache
def load(size: str) -> dict[str, Any]:
    """Return the texts, the pre-trained model of a size, its number of parameters and its loss; once a process."""
    domains = demo_task.load_text_domains()
    base = demo_task.pretrained_model(config=SIZES[size], domains=domains)
    return {
        "domains": domains,
        "base": base,
        "n_params": sum(p.numel() for p in base.parameters()),
        "loss0": demo_task.evaluate(base, domains.source_heldout),
    }


def run(size: str, steps: int, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune one adapter and measure what it has forgotten."""
    task, start = load(size), time.perf_counter()
    domains, lr = task["domains"], LEARNING_RATES[OPTIMIZERS[name]]
    model = demo_task.lora_model(task["base"], args.rank, seed)
    optimizer: Any = optimizers()[OPTIMIZERS[name]](model, lr)
    data = demo_task.batches(domains.topics, args.batch, args.length, steps, seed)
    demo_task.fine_tune(model, optimizer, data, steps)
    if hasattr(optimizer, "remove_hooks"):
        optimizer.remove_hooks()
    probes = demo_task.batches(domains.topics, args.batch, args.length, PROBES, PROBE_SEED)
    moved = drift(model, observe(model, probes, lambda m, x: m(input_ids=x, labels=x).loss))
    return {
        "model": size, "optimizer": name, "lr": lr, "seed": seed, "rank": args.rank, "steps": steps,
        "n_params": task["n_params"], "n_tokens": steps * args.batch * args.length,
        "loss0": round(task["loss0"], 5), "loss": round(demo_task.evaluate(model, domains.source_heldout), 5),
        "held_out": round(demo_task.evaluate(model, domains.topics_heldout), 5), "norm": round(moved.norm, 4),
        **{key: round(getattr(moved, key), 5) for key in MODULATORS}, "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def report(rows: list[dict[str, Any]]) -> None:
    """Fit both laws to all runs and to each optimizer's, print them, and draw the first."""
    for name in (None, *OPTIMIZERS):
        own = [row for row in rows if name in (None, row["optimizer"])]
        observed = {key: [float(row[key]) for row in own] for key in ("n_params", "n_tokens", "loss", "loss0")}
        modulators = {key: [float(row[key]) for row in own] for key in MODULATORS}
        fit = fit_forgetting_law(**observed, **modulators)
        print(f"\n{name or 'all runs'}\n{fit}")
        if name is None:
            labels = [f"{row['optimizer']}, {int(row['n_params']) / 1e6:.2g} M" for row in own]
            plot_forgetting(fit, **observed, **modulators, labels=labels).savefig(RESULTS / "forgetting.png", dpi=130)


def main() -> None:
    """Run the grid, write the CSV after each run, fit and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 120, 360], help="amounts of data, in batches")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "forgetting.csv"
    rows = read_csv(path)
    done = {tuple(row[key] for key in KEY) for row in rows}
    for seed, size, steps, name in itertools.product(range(args.seeds), SIZES, args.steps, OPTIMIZERS):
        if (size, name, seed, steps) not in done:
            rows.append(run(size, steps, name, seed, args))
            print(rows[-1], flush=True)
            write_csv(path, rows)  # each time, so that an interrupted run is not lost
    columns = ("model", "optimizer", "steps", "seed", "loss0", "loss", "held_out", "norm", *MODULATORS)
    print(table(rows, columns))
    report(rows)


if __name__ == "__main__":
    main()
