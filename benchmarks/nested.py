"""One run for every rank, against a run per rank: loss and token accuracy by rank on two tasks, AURAC, time.

Tasks: ``topics``, the demo's, and ``headers`` (see tasks/language.py). Contestants, with the same seeds and batches:
``LoRA per rank`` (AdamW, a run for each rank) and ``GritKFAC per rank``; ``DyLoRA`` and ``MatryoshkaScaledAdam`` (plain
modules, this package); ``MatryoshkaLoRA`` as it is published: modules that compute B P A, under AdamW. At rank ρ these
compute s(ρ) B[:, :ρ] A[:ρ], but for ``P kept``: B[:, :ρ] (P A)[:ρ]. ``AdamW, cut by SVD`` is the run of ``LoRA per
rank`` at the largest rank, cut by the singular values of B A, and ``GritKFAC, cut by SVD`` likewise; ``stratified`` is
``MatryoshkaScaledAdam(nesting="stratified")``, ``GritKFAC, nested`` is ``GritKFAC(nested_ranks=...)``.

Each contestant's learning rate is that of the grid with the best mean accuracy over ranks on a seed that is not
reported; the reported seeds are run at that rate alone. Writes results/nested.csv (one row per run and rank) and
results/nested-TASK.png. Runs that the CSV has are not repeated.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Row, read_csv, rounded, spread, stamp, table, write_csv
from tasks import TASKS
from torch import Tensor, nn
from torch.nn import functional as fn

from curvopt import GritKFAC, MatryoshkaScaledAdam
from curvopt.analysis import aurac, plot_aurac
from curvopt.demo import task as demo_task
from curvopt.functional.nested import diagonal, sampled_diagonal
from curvopt.lora import truncated

KEPT = "MatryoshkaScaledAdam, P kept"
CUT, STRATIFIED = "AdamW, cut by SVD", "stratified"
GRIT_CUT, GRIT_NESTED = "GritKFAC, cut by SVD", "GritKFAC, nested"
PER_RANK = ("LoRA per rank", "GritKFAC per rank")
NESTINGS = {"DyLoRA": "dylora", "MatryoshkaScaledAdam": "matryoshka", KEPT: "matryoshka", STRATIFIED: "stratified"}
CONTESTANTS = (
    *PER_RANK,
    "DyLoRA",
    "MatryoshkaLoRA",
    "MatryoshkaScaledAdam",
    KEPT,
    CUT,
    STRATIFIED,
    GRIT_CUT,
    GRIT_NESTED,
)
CHOICE = 100  # the seed that learning rates are chosen on
CSV = RESULTS / "nested.csv"
KEY = ("task", "optimizer", "lr", "seed")


@dataclass
class Texts:
    """A task: the text to train on, held-out text (1-d uint8), and what builds a model by rank and seed."""

    train: Tensor
    held: Tensor
    build: Any


@functools.cache
def load(task: str) -> Texts:
    """Return a task by name."""
    if task == "topics":
        domains = demo_task.load_text_domains()
        base = demo_task.pretrained_model(domains=domains)
        return Texts(domains.topics, domains.topics_heldout, lambda r, seed: demo_task.lora_model(base, r, seed))
    own: Any = TASKS[task]()
    return Texts(own.texts["train"], own.texts["test"], lambda r, seed: own.build(seed, rank=r))


class Explicit(nn.Module):
    """The published forward: the base layer and B P A, with P in the computation."""

    def __init__(self, layer: nn.Module, P: Sequence[float]) -> None:
        super().__init__()
        self.base = layer.base_layer
        self.A = nn.Parameter(layer.lora_A["default"].weight.detach().clone())
        self.B = nn.Parameter(layer.lora_B["default"].weight.detach().clone())
        self.register_buffer("P", torch.tensor(P))

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + B P A x."""
        return self.base(x) + fn.linear(fn.linear(x, self.A) * self.P, self.B)


def explicit(model: nn.Module, ranks: Sequence[int], scale: str) -> list[Explicit]:
    """Replace a PEFT model's adapted layers by the published ones, and return these."""
    P, made = diagonal(ranks, ranks[-1], scale), []
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "lora_A"):
            made.append(Explicit(layer, P))
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, made[-1])
    return made


@contextmanager
def explicit_rank(layers: Sequence[Explicit], rank: int, scale: str) -> Iterator[None]:
    """Let the published layers compute at one rank."""
    held = [layer.P.clone() for layer in layers]
    for layer in layers:
        layer.P.copy_(torch.tensor(sampled_diagonal(rank, len(layer.P), scale)))
    yield
    for layer, P in zip(layers, held, strict=True):
        layer.P.copy_(P)


@torch.no_grad()
def measure(model: nn.Module, tokens: Tensor, length: int, windows: int) -> tuple[float, float]:
    """Return mean next-token loss (nats) and accuracy over evenly spaced windows."""
    starts = torch.linspace(0, len(tokens) - length, windows, dtype=torch.float64).long()
    loss, hits, count = 0.0, 0.0, 0
    model.eval()
    for some in starts.split(32):
        x = tokens[some[:, None] + torch.arange(length)].long()
        logits, y = model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()
        loss += fn.cross_entropy(logits, y, reduction="sum").item()
        hits += (logits.argmax(-1) == y).sum().item()
        count += y.numel()
    model.train()
    return loss / count, hits / count


def train(model: nn.Module, optimizer: Any, text: Tensor, seed: int, args: argparse.Namespace) -> Row:
    """Fine-tune with linear decay to zero; return wall seconds, and medians of a whole step and of ``step()``."""
    whole, own = [], []
    peak = optimizer.param_groups[0]["lr"]
    model.train()
    begin = time.perf_counter()
    for i, x in enumerate(demo_task.batches(text, args.batch, args.length, args.steps, seed)):
        start = time.perf_counter()
        for g in optimizer.param_groups:
            g["lr"] = peak * (1 - i / args.steps)
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        whole.append(1e3 * (end - start))
        own.append(1e3 * (end - middle))
    return {
        "seconds": time.perf_counter() - begin,
        "loop_ms": statistics.median(whole),
        "step_ms": statistics.median(own),
    }


def run(task: str, name: str, lr: float, seed: int, texts: Texts, args: argparse.Namespace) -> list[Row]:
    """Train one contestant and measure it at every rank; a row for each rank."""
    top, ranks = args.ranks[-1], args.ranks
    rows: list[Row] = []
    for r in ranks if name in PER_RANK else [top]:
        model = texts.build(r, seed)
        layers = explicit(model, ranks, args.scale) if name == "MatryoshkaLoRA" else []
        if name in NESTINGS:
            scale = "none" if name == STRATIFIED else args.scale
            optimizer: Any = MatryoshkaScaledAdam(model, lr=lr, ranks=ranks, scale=scale, nesting=NESTINGS[name])
        elif name.startswith("GritKFAC"):
            optimizer = GritKFAC(model, lr=lr, nested_ranks=ranks if name == GRIT_NESTED else None)
        else:
            adapters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(adapters, lr=lr, weight_decay=0.0)
        spent = train(model, optimizer, texts.train, seed, args)
        for rank in [r] if name in PER_RANK else ranks:
            at: Any = nullcontext()
            if layers:
                at = explicit_rank(layers, rank, args.scale)
            elif name in (CUT, GRIT_CUT, GRIT_NESTED):
                at = truncated(model, rank, basis="stored" if name == GRIT_NESTED else "svd")
            elif isinstance(optimizer, MatryoshkaScaledAdam):
                at = optimizer.truncated(rank, keep_P=name == KEPT)
            with at:
                loss, accuracy = measure(model, texts.train, args.length, args.windows)
                held_loss, held_accuracy = measure(model, texts.held, args.length, args.windows)
            rows.append({"task": task, "optimizer": name, "lr": lr, "seed": seed, "rank": rank, "loss": loss,
                         "accuracy": accuracy, "heldout_loss": held_loss, "heldout_accuracy": held_accuracy,
                         "scale": args.scale, "steps": args.steps, "batch": args.batch, "length": args.length,
                         "windows": args.windows, **spent})  # fmt: skip
    return rows


def add(rows: list[Row], point: tuple[str, str, float, int], args: argparse.Namespace) -> None:
    """Run a task, contestant, learning rate and seed, unless the rows have it, and write the CSV."""
    if point not in {tuple(row[key] for key in KEY) for row in rows}:
        rows += [{**rounded(row), **stamp()} for row in run(*point, load(point[0]), args)]
        print(rounded(rows[-1]), flush=True)
        write_csv(args.out, rows)  # each time, so that an interrupted run is not lost


def rate(rows: Sequence[Row], name: str) -> float:
    """Return the learning rate of a contestant that has the best mean accuracy on the seed that is not reported."""
    by_lr: dict[float, list[float]] = {}
    for row in rows:
        if row["optimizer"] == name and row["seed"] == CHOICE:
            by_lr.setdefault(row["lr"], []).append(row["accuracy"])
    return max(by_lr, key=lambda lr: statistics.fmean(by_lr[lr]))


def best(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return each contestant's rows of the reported seeds at its learning rate."""
    found = {}
    tried = {row["optimizer"] for row in rows if row["seed"] == CHOICE}
    for name in (name for name in CONTESTANTS if name in tried):
        lr = rate(rows, name)
        own = [row for row in rows if row["optimizer"] == name and row["lr"] == lr and row["seed"] != CHOICE]
        found |= {name: own} if own else {}
    return found


def curve(rows: Sequence[Row], key: str) -> dict[int, list[float]]:
    """Return {rank: one value per seed}."""
    return {rank: [r[key] for r in rows if r["rank"] == rank] for rank in sorted({row["rank"] for row in rows})}


def areas(rows: Sequence[Row], scale: str, key: str = "accuracy") -> list[float]:
    """Return the AURAC of each seed."""
    seeds = sorted({row["seed"] for row in rows})
    curves = [{row["rank"]: row[key] for row in rows if row["seed"] == seed} for seed in seeds]
    return [aurac([c[k] for k in sorted(c)], sorted(c), scale=scale) for c in curves]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Return a line per contestant: accuracy by rank, AURAC, wall time of all its runs, time of its step."""
    lines = []
    for name, own in best(rows).items():
        runs = {(row["seed"], row["seconds"]): row for row in own}.values()
        seeds = len({row["seed"] for row in own})
        lines.append(
            {"optimizer": name, "lr": own[0]["lr"], "seeds": seeds}
            | {f"accuracy r={k}": spread(v) for k, v in curve(own, "accuracy").items()}
            | {f"loss r={k}": spread(v) for k, v in curve(own, "loss").items()}
            | {f"AURAC {scale}": spread(areas(own, scale)) for scale in ("linear", "log2")}
            | {"AURAC linear, held out": spread(areas(own, "linear", "heldout_accuracy"))}
            | {"seconds for all ranks": round(sum(row["seconds"] for row in runs) / seeds, 1)}
            | {key: round(statistics.median(row[key] for row in runs), 2) for key in ("loop_ms", "step_ms")}
        )
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over rank, mean and range of the seeds."""
    curves: Mapping[str, Any] = {name: curve(own, "accuracy") for name, own in best(rows).items()}
    plot_aurac(curves, label="token accuracy on the fine-tuning text").savefig(path)


def main() -> None:
    """Run the grid, print the summary, write the CSV and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["topics", "headers"], choices=["topics", "headers"])
    parser.add_argument("--optimizers", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-3, 1e-2, 1.4e-2, 2e-2])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--windows", type=int, default=192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--scale", default="none")
    parser.add_argument("--out", type=Path, default=CSV)
    parser.add_argument("--replot", action="store_true", help="only the table and the plot of what is recorded")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = read_csv(args.out) if args.out.exists() else []
    for task in args.tasks:
        for name in () if args.replot else args.optimizers:
            for lr in args.lrs:
                add(rows, (task, name, lr, CHOICE), args)
            lr = rate([row for row in rows if row["task"] == task], name)
            for seed in range(args.seeds):
                add(rows, (task, name, lr, seed), args)
        own = [row for row in rows if row["task"] == task]
        for line in summarise(own):
            print(table([{"": key, task: value} for key, value in line.items()]))
        plot(own, args.out.with_name(f"{args.out.stem}-{task}.png"))


if __name__ == "__main__":
    main()
