"""Every plot from the CSVs, into results/*.png.

python benchmarks/plots.py
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import device
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from findings import BASE, Runs, exponent, interval, step_times
from harness import RESULTS, Row, read_csv
from ladders import PARTS, RANKS
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from tasks import TASKS

DPI = 130
# one colour an optimizer in every plot; those that are not named share a grey
COLOURS = {
    "AdamW": "#222222", "GritKFAC": "#d62728", "GritKFAC eigen": "#ff7f0e", "GritKFAC, ranks": "#ff9896",
    "AdamW, tuned betas": "#7f7f7f", "LoRA-Muon": "#1f77b4", "LoRA-RITE": "#8c564b",
    "GoRA + AdamW": "#c7c7c7", "GritKFAC (0.9, 0.999)": "#ff9896", "GritKFAC, 0.7 of the steps": "#ff7f0e",
    "GoRA + GritKFAC": "#9467bd", "LoRA+": "#aec7e8", "SOAP": "#2ca02c", "Riemannian": "#c49c94", "Muon": "#e377c2",
    "orthogonal": "#17becf", "DoRA": "#bcbd22", "Shampoo": "#9edae5", "IA3": "#aec7e8", "natural gradient": "#98df8a",
}  # fmt: skip
SHOWN = ("AdamW", "AdamW, tuned betas", "GritKFAC", "SOAP", "Muon", "LoRA-Muon")


def panels(n: int, columns: int = 3, height: float = 3.4) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, those that are not needed taken away."""
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.3 * columns, height * rows), layout="constrained")
    flat = list(axes.flat) if n > 1 else [axes]
    for axis in flat[n:]:
        axis.remove()
    return figure, flat[:n]


def finish(figure: Any, axes: Sequence[Any], name: str, title: str) -> None:
    """Put one legend below, and save."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
        axis.grid(alpha=0.25)
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(6, len(found)), fontsize=9)
    figure.suptitle(title)
    figure.savefig(RESULTS / name, dpi=DPI)
    plt.close(figure)


def logarithmic(side: Any) -> None:
    """Give an axis a logarithmic scale with readable ticks, few over decades and some within one."""
    (side.axes.set_xscale if side.axis_name == "x" else side.axes.set_yscale)("log")
    low, high = side.get_view_interval()
    wide = high > 8 * low
    side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(6))
    side.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}"))
    side.set_minor_formatter(NullFormatter())
    side.set_minor_locator(NullLocator())
    side.set_tick_params(labelsize=8)


def loss_curves(runs: Runs, clock: str) -> None:
    """Validation loss against steps or seconds: mean over seeds, band from lowest to highest."""
    tasks = runs.tasks()
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for name in (name for name in SHOWN if name in runs.optimizers(task)):
            curves = [c for c in runs.curves(task, name).values() if c[clock]]
            if not curves:
                continue
            x = [statistics.fmean(v) for v in zip(*(c[clock] for c in curves), strict=True)]
            y = list(zip(*(c["valid"] for c in curves), strict=True))
            axis.plot(x, [statistics.fmean(v) for v in y], color=COLOURS[name], label=name, lw=1.6)
            axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=COLOURS[name], alpha=0.12, lw=0)
        goal = statistics.fmean(runs.column(task, BASE, "valid"))
        axis.axhline(goal, color=COLOURS[BASE], ls=":", lw=1)
        logarithmic(axis.yaxis)
        unit = "steps" if clock == "steps" else "CPU seconds of training"
        axis.set(title=TASKS[task].title, xlabel=unit, ylabel=f"validation loss, {TASKS[task].unit}")
        axis.title.set_fontsize(10)
    title = f"Validation loss against {clock}, each optimizer at its best learning rate (dotted: AdamW's last)"
    finish(figure, axes, f"loss_{clock}.png", title)


def rates(runs: Runs) -> None:
    """Validation loss against learning rate, on the seed that chooses it."""
    tasks = runs.tasks()
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        searched = []
        for name in (name for name in SHOWN if name in runs.optimizers(task)):
            own = sorted(runs.searched(task, name), key=lambda r: r["lr"])
            searched += own
            axis.plot(
                [r["lr"] for r in own], [r["valid"] for r in own], marker="o", ms=4, color=COLOURS[name], label=name
            )
        ticks = sorted({r["lr"] for r in searched})
        axis.set(
            xscale="log", title=TASKS[task].title, xlabel="learning rate", ylabel=f"validation loss, {TASKS[task].unit}"
        )
        axis.set_xticks(ticks, [f"{lr:g}" for lr in ticks], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.title.set_fontsize(10)
        values = [r["valid"] for r in searched if math.isfinite(r["valid"])]
        goal = statistics.fmean(runs.column(task, BASE, "valid"))
        axis.set_ylim(0.97 * min(values), min(max(values), 10 * goal if goal < 0.2 else 1.5 * goal))
        logarithmic(axis.yaxis)
    finish(figure, axes, "rates.png", "Final validation loss against learning rate, on the seed that chooses it")


def frontier(runs: Runs) -> None:
    """‖ΔW‖_F against the loss on the earlier task: every run, at every learning rate."""
    tasks = runs.tasks()
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for name in (name for name in SHOWN if name in runs.optimizers(task)):
            own = [r for r in runs.rows if (r["task"], r["optimizer"]) == (task, runs.variant(task, name))]
            own = [r for r in own if r["update_norm"]]
            own = [r for r in own if math.isfinite(r["update_norm"]) and math.isfinite(r["retention"])]
            xy = [(r["update_norm"], r["retention"]) for r in own]
            axis.scatter(*zip(*xy, strict=True), s=16, color=COLOURS[name], label=name, alpha=0.75)
        axis.set(title=TASKS[task].title, xlabel="‖ΔW‖_F", ylabel="loss on the earlier task")
        logarithmic(axis.xaxis)
        axis.title.set_fontsize(10)
        if task == "sentences":
            axis.set_ylabel("1 − cosine to earlier embeddings")
    finish(figure, axes, "frontier.png", "Size of the update against retention: one point a run, all learning rates")


def ladders(runs: Runs) -> None:
    """Loss against learning rate by rank, an optimizer a panel; then Δ to the best AdamW by rank, steps and batch."""
    ranks = [task for task in RANKS if runs.optimizers(task)]
    if not ranks:
        return
    names = [
        name for name in ("AdamW, tuned betas", "GritKFAC", "Muon", "LoRA-Muon") if name in runs.optimizers(ranks[0])
    ]
    parts = {part: [t for t in rungs if "AdamW, tuned betas" in runs.optimizers(t)] for part, rungs in PARTS.items()}
    parts = {part: rungs for part, rungs in parts.items() if rungs}
    figure, axes = panels(len(names) + len(parts), columns=4)
    values = [r["valid"] for task in ranks for name in names for r in runs.searched(task, name)]
    low, high = min(values), statistics.median(values) + 0.15
    for axis, name in zip(axes, names, strict=False):
        for task, colour in zip(ranks, plt.get_cmap("viridis_r")([0.15, 0.35, 0.55, 0.75, 0.95]), strict=False):
            if name not in runs.optimizers(task):
                continue
            own = sorted(runs.searched(task, name), key=lambda r: r["lr"])
            x, y = [r["lr"] for r in own], [r["valid"] for r in own]
            axis.plot(x, y, color=colour, marker="o", ms=3, label=task.removeprefix("headers, "))
            axis.plot(x[y.index(min(y))], min(y), marker="*", ms=11, color=colour)
        axis.set(xscale="log", title=name, xlabel="learning rate (star: best)", ylabel="validation loss, nats per byte")
        ticks = sorted({r["lr"] for task in ranks for r in runs.searched(task, name)})
        axis.set_xticks(ticks, [f"{lr:g}" for lr in ticks], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(low - 0.02, high)
    for axis, (part, rungs) in zip(axes[len(names) :], parts.items(), strict=True):
        _gains(axis, runs, part, rungs)
    finish(figure, axes, "ladders.png", "headers: learning rates by rank (seed that chooses), and Δ to the best AdamW")


def _gains(axis: Any, runs: Runs, part: str, rungs: Sequence[str]) -> None:
    shown = [("GritKFAC", 1.0), ("GritKFAC", 0.7), ("GritKFAC (0.9, 0.999)", 1.0), ("Muon", 1.0), ("LoRA-Muon", 1.0)]
    bounds = [0.0]
    for name, horizon in shown:
        label = name if horizon == 1 else f"{name}, {horizon:g} of the steps"
        here = [task for task in rungs if name in runs.optimizers(task) and runs.best(task, name, horizon)]
        if not here:
            continue
        found = [interval(runs.difference(task, name, "valid", horizon, "AdamW, tuned betas")) for task in here]
        mean, half = zip(*found, strict=True)
        if name == "GritKFAC":  # what diverges leaves the picture
            bounds += [m + s * h for m, h in found for s in (-1, 1)]
        x = [rungs.index(task) for task in here]
        axis.errorbar(x, mean, half, color=COLOURS[label], marker="o", ms=4, capsize=3, label=label)
    axis.axhline(0, color=COLOURS[BASE], lw=1)
    axis.set_xticks(range(len(rungs)), [task.removeprefix("headers, ") for task in rungs], fontsize=8)
    axis.set(title=f"ladder of {part}", ylabel="Δ validation loss", ylim=(min(bounds) - 0.01, max(bounds) + 0.01))


def growth() -> None:
    """Step time against rank, pairs and d, with fitted exponents."""
    rows = step_times("axes")
    if not rows:
        return
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, axes = panels(3, height=4.4)
    for axis, size in zip(axes, ("r", "pairs", "d"), strict=True):
        here = [r for r in rows if r["axis"] == size]
        unit = here[0]["median_ms"]  # the baseline comes first, at the smallest size
        for name, colour in zip(names, plt.get_cmap("tab10").colors, strict=False):
            own = [r for r in here if r["optimizer"] == name]
            x = [r[size] for r in own]
            middle, low, high = ([r[key] / unit for r in own] for key in ("median_ms", "p10_ms", "p90_ms"))
            axis.plot(x, middle, marker="o", ms=4, color=colour, label=name)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            axis.annotate(f" {exponent(own, size):.2f}", (x[-1], middle[-1]), color=colour, fontsize=8, va="center")
        ticks = sorted({r[size] for r in rows if r["axis"] == size})
        fixed = {k: next(r[k] for r in rows if r["axis"] == size) for k in ("r", "pairs", "d") if k != size}
        title = ", ".join(f"{k} = {v}" for k, v in fixed.items())
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=size,
            ylabel=f"steps of fused AdamW at {size} = {here[0][size]}",
            title=title,
        )
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.margins(x=0.12)
    finish(figure, axes, "step_time.png", f"Step time (numbers: fitted exponent); {rows[0]['device']}")


def spectra() -> None:
    """Energies of every pair at the end, and live rank by pair over time."""
    rows = read_csv(RESULTS / "spectra.csv")
    if not rows:
        return
    last = max(row["step"] for row in rows)
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.2), layout="constrained", width_ratios=(1, 1.4))
    names = list(dict.fromkeys(row["pair"] for row in rows))
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for kind, colour in zip(kinds, plt.get_cmap("tab10").colors, strict=False):
        for i, row in enumerate(r for r in rows if r["step"] == last and r["pair"].endswith(f".{kind}")):
            energy = row["energy"] if isinstance(row["energy"], list) else [row["energy"] or 1.0]
            label = kind if i == 0 else None
            axes[0].plot(range(1, len(energy) + 1), energy, color=colour, alpha=0.7, marker=".", label=label)
    axes[0].set(yscale="log", xlabel="direction", ylabel="share of Σσ²", title=f"Energies after {last} steps")
    axes[0].set_ylim(1e-3, 1.2)  # directions that have just come back have next to nothing
    steps = sorted({row["step"] for row in rows})
    ranks = [[next(r["rank"] for r in rows if r["step"] == s and r["pair"] == n) for s in steps] for n in names]
    image = axes[1].imshow(ranks, aspect="auto", cmap="viridis", vmin=1)
    axes[1].set_xticks(range(len(steps)), [str(s) for s in steps], fontsize=8)
    axes[1].set_yticks(range(len(names)), [_short(n) for n in names], fontsize=7)
    axes[1].set(xlabel="step", title="Live rank by layer")
    figure.colorbar(image, ax=axes[1], label="rank")
    finish(figure, axes[:1], "spectra.png", "Energy spectra and ranks, GritKFAC with τ = 0.99 on the demo's task")


def _short(name: str) -> str:
    parts = [p for p in name.split(".") if p not in ("base_model", "model", "layers", "self_attn", "mlp")]
    return ".".join(parts)


def split() -> None:
    """What a step of GritKFAC is made of."""
    rows: list[Row] = step_times("split")
    if len(rows) < 4:
        return
    figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
    ratio = [row["ratio"] for row in rows]
    spread = [[row["ratio"] - row["ratio_p10"] for row in rows], [row["ratio_p90"] - row["ratio"] for row in rows]]
    names = [row["optimizer"] for row in rows]
    axis.barh(names, ratio, xerr=spread, capsize=3, color=["#222222", "#ff9896", "#d62728", "#9467bd"])
    axis.invert_yaxis()
    axis.set(
        xlabel="ratio to fused AdamW, median and 10 to 90 %",
        title=f"{rows[0]['pairs']} pairs, d = {rows[0]['d']}, r = {rows[0]['r']}",
    )
    figure.savefig(RESULTS / "split.png", dpi=DPI)
    plt.close(figure)


def main() -> None:
    """Draw all."""
    runs = Runs()
    if runs.rows:
        loss_curves(runs, "steps")
        loss_curves(runs, "seconds")
        rates(runs)
        frontier(runs)
    ladders(Runs(RESULTS / "ladders.csv"))
    growth()
    split()
    spectra()
    launches = read_csv(RESULTS / "device_launches.csv")
    if launches:
        device.plot(launches, RESULTS / "device.png")


if __name__ == "__main__":
    main()
