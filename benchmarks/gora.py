"""GoRA on the demo's task at equal parameters: loss at the start and the end, the allocation, what calibrating costs.

    python benchmarks/gora.py

Uniform-rank LoRA and GoRAInit, each with AdamW and GritKFAC, on the same batches; GoRAInit looks at ``--calibration``
further ones first. Rows, one per run, go to results/gora.csv, the ranks by layer to results/gora_ranks.csv and their
plot to results/gora.png. Times are CPU seconds.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from harness import RESULTS, Row, read_csv, rounded, spread, table, write_csv

from curvopt import GoRAInit, GritKFAC
from curvopt.demo import task as demo

MAKERS = {
    "AdamW": lambda model, lr: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr, weight_decay=0
    ),
    "GritKFAC": lambda model, lr: GritKFAC(model, lr=lr),
}
STARTS = ("LoRA", "GoRA")


def calibrate(model: Any, make: Any, data: Any, args: argparse.Namespace) -> tuple[Any, Row]:
    """Run GoRAInit over its batches; return the optimizer, and seconds and floats held for it."""
    held = live_bytes()
    optimizer = GoRAInit(
        model, rank=args.rank, min_rank=args.min_rank, max_rank=args.max_rank, calibration_steps=args.calibration,
        start="gora", allocation="exact", init_lr="auto", then=make,
    )  # fmt: skip
    most, spent = 0, 0.0
    for x in data:

        def closure(x: Any = x) -> Any:
            optimizer.zero_grad()
            loss = model(input_ids=x, labels=x).loss
            loss.backward()
            return loss

        if not optimizer.ready:
            most = max(most, live_bytes() - held)
        start = time.process_time()
        optimizer.step(closure)
        spent += time.process_time() - start
    return optimizer, {"calibration_seconds": spent, "calibration_bytes": most}


def live_bytes() -> int:
    """Return the bytes of all tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def losses(model: Any, domains: Any, when: str) -> Row:
    """Return the losses on the three texts."""
    texts = {"fine_tuning": domains.topics, "held_out": domains.topics_heldout, "retention": domains.source_heldout}
    return {f"{name}_{when}": demo.evaluate(model, text) for name, text in texts.items()}


def run(start: str, name: str, seed: int, base: Any, domains: Any, args: argparse.Namespace) -> tuple[Row, list[Row]]:
    """Train one adapter and measure it; return the row, and a row per layer of its allocation."""
    model = demo.lora_model(base, args.rank, seed)
    torch.manual_seed(seed)
    row: Row = {"start": start, "optimizer": name, "lr": args.lr, "seed": seed}
    layers: list[Row] = []
    if start == "GoRA":
        data = demo.batches(domains.topics, 8, 128, args.calibration, 1000 + seed)
        optimizer, cost = calibrate(model, lambda m: MAKERS[name](m, args.lr), data, args)
        plan = optimizer.plan
        row |= {**cost, "budget": plan.budget, "spent": plan.spent}
        layers = [{"seed": seed, "pair": pair, "rank": rank} for pair, rank in plan.ranks.items()]
    else:
        optimizer = MAKERS[name](model, args.lr)
    row |= losses(model, domains, "before")
    begin = time.process_time()
    demo.fine_tune(model, optimizer, demo.batches(domains.topics, 8, 128, args.steps, seed), args.steps)
    row["step_seconds"] = (time.process_time() - begin) / args.steps
    row |= losses(model, domains, "after")
    row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return row, layers


def summarise(rows: list[Row]) -> list[Row]:
    """Return a line for each start and optimizer, with the paired difference to uniform ranks and AdamW."""
    base = {row["seed"]: row for row in rows if (row["start"], row["optimizer"]) == ("LoRA", "AdamW")}
    lines = []
    for start in STARTS:
        for name in MAKERS:
            own = [row for row in rows if (row["start"], row["optimizer"]) == (start, name)]
            line: Row = {
                "": f"{start} + {name}",
                "parameters": f"{statistics.fmean(r['parameters'] for r in own):,.0f}",
            }
            for key in ("fine_tuning_before", "fine_tuning_after", "held_out_after", "retention_after"):
                line[key.replace("_", " ")] = spread([row[key] for row in own])
            after = [row["fine_tuning_after"] - base[row["seed"]]["fine_tuning_after"] for row in own]
            line["Δ after"] = spread(after) if (start, name) != ("LoRA", "AdamW") else ""
            if start == "GoRA":
                plain = statistics.median(base[row["seed"]]["step_seconds"] for row in own)
                steps = statistics.median(row["calibration_seconds"] for row in own) / plain
                line["calibration, in AdamW steps"] = f"{steps:.0f}"
                line["held for it, MB"] = f"{statistics.median(r['calibration_bytes'] for r in own) / 1e6:.1f}"
            lines.append(line)
    return lines


def plot(layers: list[Row], rank: int) -> None:
    """Draw rank by block for each projection, a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["pair"].split(".")[-1] for row in layers))
    figure, axes = plt.subplots(1, len(kinds), figsize=(2 * len(kinds), 3), sharey=True, layout="constrained")
    for axis, kind in zip(axes, kinds, strict=True):
        own = [row for row in layers if row["pair"].split(".")[-1] == kind]
        blocks = [int(next(part for part in row["pair"].split(".") if part.isdigit())) for row in own]
        axis.scatter(blocks, [row["rank"] for row in own], s=22, alpha=0.5, color="#00798c")
        axis.axhline(rank, color="#6b7280", lw=1, ls="--")
        axis.set(title=kind, xlabel="block", xticks=sorted(set(blocks)))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("rank")
    figure.suptitle(f"Ranks that GoRA's importances give for the parameters of rank {rank} (dashed)", fontsize=10)
    figure.savefig(RESULTS / "gora.png", dpi=130)


def main() -> None:
    """Run what is missing, print the table, write CSVs and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rank": 16, "min-rank": 8, "max-rank": 32, "calibration": 16, "steps": 300, "seeds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--replot", action="store_true", help="only the table and the plot of what is recorded")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, layers = read_csv(RESULTS / "gora.csv"), read_csv(RESULTS / "gora_ranks.csv")
    if not args.replot:
        rows, layers = [], []
        domains = demo.load_text_domains()
        base = demo.pretrained_model(domains=domains)
        for seed in range(args.seeds):
            for start in STARTS:
                for name in MAKERS:
                    row, ranks = run(start, name, seed, base, domains, args)
                    rows, layers = [*rows, row], [*layers, *(ranks if name == "AdamW" else [])]
                    print(rounded(row), flush=True)
                    write_csv(RESULTS / "gora.csv", rows)
                    write_csv(RESULTS / "gora_ranks.csv", layers or [{"seed": seed, "pair": "", "rank": 0}])
    lines = summarise(rows)
    print(table(lines, list(lines[-1])))
    plot(layers, args.rank)


if __name__ == "__main__":
    main()
