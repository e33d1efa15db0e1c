"""What the outer Kronecker factors add to "polar": ablations of the prototype in `outer_prototype`.

    python benchmarks/outer.py --groups betas source            # resumes from results/outer.csv
    python benchmarks/outer.py --groups betas --tasks headers "headers, 4x batch" --seeds 3
    python benchmarks/outer.py --names gradient --horizons 0.8 0.7 0.6
    python benchmarks/outer.py --table --groups betas source    # print the recorded results against AdamW

A group is the list of contestants of one question. For each contestant and task the learning rate climbs a grid of
factor √2 on the validation loss of seed 0 until both neighbours of the best are worse; seeds from 1 on are reported.
Tables give the mean validation loss and the mean paired difference to AdamW (its betas tuned on seed 0), with half of
the 95 % interval (Student's t over seeds). Tasks may be varied: "headers, 4x batch", "headers, 1000 steps",
"headers, r=64".
"""

import argparse
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import side_by_side
import torch
import training
from contestants import Contestant, grit
from harness import RESULTS, Row, append_csv, table
from outer_prototype import OuterPolar
from tasks import Task, register
from torch import nn
from training import SEARCH_SEED, Log

BETAS = ((0.9, 0.999), (0.9, 0.99), (0.8, 0.99), (0.7, 0.99))
RATES = [float(f"{1e-3 * 2 ** (i / 2):.3g}") for i in range(-10, 20)]
START = {
    "language": 8e-3, "headers": 1.6e-2, "headers32": 8e-3, "sentences": 4e-3, "digits": 1.6e-2, "regression": 6.4e-2,
}  # fmt: skip
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


FACTORS: dict[str, dict[str, Any]] = {
    "AdamW": {"source": None, "damping": None},
    "polar": {"source": None},
    "gradient": {},
    "gradient k=8": {"k": 8},
    "gradient k=32": {"k": 32},
    "gradient k=64": {"k": 64},
    "gradient full": {"k": None},
    "activation": {"source": "activation", "rows": 256},
    "activation k=8": {"source": "activation", "rows": 256, "k": 8},
    "activation k=32": {"source": "activation", "rows": 256, "k": 32},
    "activation full": {"source": "activation", "k": None},
}
CHANGES: dict[str, dict[str, Any]] = {
    "A only": {"sides": "A"},
    "B only": {"sides": "B"},
    "before Adam": {"order": "before"},
    "before and after": {"order": "both"},
    "p=1/4": {"exponent": 0.25},
    "p=1": {"exponent": 1.0},
    "no msign": {"damping": None},
    "λ=0.01": {"outer_damping": 0.01},
    "λ=0.03": {"outer_damping": 0.03},
    "λ=0.3": {"outer_damping": 0.3},
    "λ=1": {"outer_damping": 1.0},
    "msign λ=0.03": {"damping": 0.03},
    "msign λ=0.3": {"damping": 0.3},
    "decay 0.9": {"decay": 0.9},
    "decay 0.99": {"decay": 0.99},
    "rows every 5": {"factor_every": 5},
    "roots every step": {"root_every": 1},
    "roots every 20": {"root_every": 20},
    "exact": {"method": "exact"},
    "power": {"method": "power"},
    "oja": {"method": "oja"},
    "blocks of 16": {"k": None, "block": 16},
    "diagonal": {"k": None, "block": 1},
    "64 rows": {"rows": 64},
    "all rows": {"rows": None},
}


def options(name: str) -> dict[str, Any] | None:
    """Return the prototype's options for a name: a key of FACTORS, then CHANGES, then betas in brackets.

    "AdamW" is the prototype without factors and without msign. "GritKFAC" is the package's, hence None.
    """
    name, _, rest = name.removesuffix(")").partition(" (")
    betas = tuple(float(b) for b in rest.split(", ")) if rest else (0.7, 0.99)
    base, *changes = name.split(", ")
    if base == "GritKFAC":
        return None
    chosen = dict(FACTORS[base])
    for change in changes:
        chosen |= CHANGES[change]
    return {**chosen, "betas": betas}


def contestant(name: str) -> Contestant:
    """Return the contestant with this name."""
    chosen = options(name)
    if chosen is None:
        betas = name.removesuffix(")").partition(" (")[2].split(", ")
        return Contestant(grit(betas=tuple(float(b) for b in betas)))

    def make(task: Task, model: nn.Module, lr: float, steps: int) -> list[torch.optim.Optimizer]:
        return [OuterPolar(model, lr, **chosen)]

    return Contestant(make)


def fetch(log: Log, task: str, name: str, pairs: list[tuple[float, int]], horizon: float = 1.0) -> None:
    """Run the pairs of learning rate and seed that are not in the log, batched where the task allows it."""
    present = {
        (r["lr"], r["seed"]) for r in log.rows if (r["task"], r["optimizer"], r["horizon"]) == (task, name, horizon)
    }
    missing = [pair for pair in pairs if pair not in present]
    chosen = options(name)
    if chosen is None or task.split(",")[0] in ("regression", "sentences"):
        for lr, seed in missing:
            log.get(task, name, contestant(name), lr, seed, horizon)
        return
    size = 1 if "x batch" in task else 5
    for i in range(0, len(missing), size):
        for row in side_by_side.run(task, name, chosen, missing[i : i + size], horizon):
            append_csv(log.results, training.RUN_COLUMNS, row)
            log.rows.append(row)
            print(*(row[k] for k in training.KEY), f"{row['valid']:.5g} {row['seconds']:.3g} s", flush=True)


def with_betas(*names: str) -> list[str]:
    """Return names with each of BETAS."""
    return [f"{name} {betas}" for name in names for betas in BETAS]


BEFORE = "gradient, before Adam"
GROUPS: dict[str, list[str]] = {
    "betas": [name for name in with_betas("AdamW", "polar", "gradient") if name != "gradient (0.7, 0.99)"],
    "basis": ["polar (0.7, 0.99)", "GritKFAC (0.7, 0.99)"],
    "source": [f"{source}{k}" for source in ("gradient", "activation") for k in ("", " k=32", " full")]
    + ["activation, power"],
    "sides": ["gradient, A only", "gradient, B only"],
    "order": [BEFORE, "gradient, before and after"],
    "method": ["gradient, power", "gradient, exact", f"{BEFORE}, power", f"{BEFORE}, power, roots every step"],
    "cadence": [f"{BEFORE}, rows every 5", f"{BEFORE}, roots every 20"],
    "exponent": [f"{BEFORE}, p=1/4", f"{BEFORE}, p=1", f"{BEFORE}, no msign"],
    "damping": [f"{BEFORE}, λ={x}" for x in ("0.03", "0.3")] + [f"{BEFORE}, msign λ={x}" for x in ("0.03", "0.3")],
    "decay": [f"{BEFORE}, decay {x}" for x in ("0.9", "0.99")],
    "k": [f"gradient k={k}" for k in (8, 64)],
    "shape": [f"{f} full, {s}" for f in ("gradient", "activation") for s in ("blocks of 16", "diagonal")],
    "long": ["AdamW (0.9, 0.999)", "AdamW (0.7, 0.99)", f"{BEFORE} (0.9, 0.999)", BEFORE],
}


def tuned(log: Log, task: str, name: str, run: bool = True) -> float | None:
    """Return the learning rate with the lowest loss on seed 0; runs what is missing, or returns None."""

    def of(r: Row) -> bool:
        return (r["task"], r["optimizer"], r["seed"], r["horizon"]) == (task, name, SEARCH_SEED, 1)

    recorded = {r["lr"]: r for r in log.rows if of(r)}

    def loss(i: int) -> float:
        if not any(of(r) and r["lr"] == RATES[i] for r in log.rows):
            return math.inf
        value = next(r["valid"] for r in log.rows if of(r) and r["lr"] == RATES[i])
        return value if math.isfinite(value) else math.inf

    if recorded:
        i = RATES.index(min(recorded, key=lambda lr: recorded[lr]["valid"]))
    elif run:
        i = start(log, task)
    else:
        return None
    while True:
        if run:
            fetch(log, task, name, [(RATES[j], SEARCH_SEED) for j in (i - 1, i, i + 1)])
        j = min((i, i - 1, i + 1), key=loss)
        if j == i:
            return RATES[i]
        i = j


def start(log: Log, task: str) -> int:
    """Return where a climb starts: at the most frequent best rate of this task so far."""
    best: dict[str, tuple[float, float]] = {}
    for r in log.rows:
        if (r["task"], r["seed"], r["horizon"]) == (task, SEARCH_SEED, 1) and "AdamW" not in r["optimizer"]:
            best[r["optimizer"]] = min(best.get(r["optimizer"], (math.inf, 0.0)), (r["valid"], r["lr"]))
    rates = [lr for _, lr in best.values()]
    return RATES.index(statistics.mode(rates) if rates else START[task.split(",")[0]])


def difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, int]:
    """Return mean, half of the 95 % interval and number of the differences by seed."""
    d = [ours[s] - theirs[s] for s in ours if s in theirs]
    half = T95[len(d)] * statistics.stdev(d) / len(d) ** 0.5 if len(d) > 1 else math.nan
    return statistics.fmean(d) if d else math.nan, half, len(d)


def seeds_of(
    log: Log, task: str, name: str, lr: float | None, horizon: float = 1.0, what: str = "valid"
) -> dict[int, float]:
    """Return losses by reported seed."""
    key = (task, name, lr, horizon)
    return {
        r["seed"]: float(r[what])
        for r in log.rows
        if (r["task"], r["optimizer"], r["lr"], r["horizon"]) == key and r["seed"] != SEARCH_SEED
    }


def best_adamw(log: Log, task: str) -> str:
    """Return AdamW with the betas that are best on seed 0."""

    def loss(name: str) -> float:
        found = [
            r["valid"] for r in log.rows if (r["task"], r["optimizer"], r["seed"], r["horizon"]) == (task, name, 0, 1)
        ]
        return min(found, default=math.inf)

    return min(with_betas("AdamW"), key=loss)


def print_table(
    log: Log, tasks: list[str], names: list[str], base: str | None, horizons: list[float], what: str
) -> None:
    """Print mean loss, difference to AdamW's full run (or to ``base``) and its half interval."""
    rows = []
    for name in names:
        for horizon in horizons:
            row: dict[str, Any] = {"optimizer": name if horizon == 1 else f"{name}, {horizon} of the steps"}
            for task in tasks:
                against = base or best_adamw(log, task)
                lr = tuned(log, task, name, run=False)
                ours = seeds_of(log, task, name, lr, horizon, what)
                if not ours:
                    row[task] = ""
                    continue
                theirs = seeds_of(log, task, against, tuned(log, task, against, run=False), 1.0, what)
                mean, half, n = difference(ours, theirs)
                more = f" {mean:+.4f} ± {half:.4f}" + (f" ({n})" if n != 5 else "") if n else ""
                row[task] = f"{statistics.fmean(ours.values()):.4f}{more} @{lr:.3g}"
            rows.append(row)
    print(*(f"{task}: against {base or best_adamw(log, task)}" for task in tasks), sep="\n")
    print(table([r for r in rows if any(r[t] for t in tasks)] or rows, ["optimizer", *tasks]))


def main() -> None:
    """Run what is missing, or print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["headers", "headers32", "language"])
    parser.add_argument("--groups", nargs="+", default=[], choices=list(GROUPS))
    parser.add_argument("--names", nargs="+", default=[], help="further contestants")
    parser.add_argument("--seeds", type=int, default=5, help="reported seeds; 0 only chooses learning rates")
    parser.add_argument("--horizons", type=float, nargs="*", default=[1.0], help="shares of the steps")
    parser.add_argument("--out", type=Path, default=RESULTS / "outer.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--against", help="a contestant to take differences to, instead of AdamW")
    parser.add_argument("--what", default="valid", choices=["valid", "test", "retention", "seconds"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    training.CHECKS = 2  # curves are not needed, and looks at the validation loss take time
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    log = Log(args.out)
    tasks = [register(task) for task in args.tasks]
    names = list(dict.fromkeys([*(n for g in args.groups for n in GROUPS[g]), *args.names]))
    if args.table:
        print_table(log, tasks, names, args.against, args.horizons, args.what)
        return
    for task in tasks:
        for name in names:
            lr = tuned(log, task, name)
            for horizon in args.horizons:
                seeds = range(SEARCH_SEED + 1, SEARCH_SEED + 1 + args.seeds)
                fetch(log, task, name, [(lr or 0.0, seed) for seed in seeds], horizon)


if __name__ == "__main__":
    main()
