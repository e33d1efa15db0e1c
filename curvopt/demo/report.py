"""What the demo shows for its runs: a table, a figure, and files with every number."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

COLOURS = ("#6b7280", "#d1495b", "#00798c", "#d99a1c", "#7b4b94", "#3c6e3c")


@dataclass(frozen=True)
class Losses:
    """Mean loss on the fine-tuning text, on its held-out part, and on the text not to forget (if any)."""

    train: float
    heldout: float
    retain: float | None = None


@dataclass
class Run:
    """One optimizer with one seed: what came out."""

    optimizer: str
    lr: float
    seed: int
    losses: Losses
    seconds: float
    rank: float
    parameters: int
    curve: list[float] = field(repr=False)
    disk_bytes: int | None = None
    start_loss: float | None = None  # on the fine-tuning text, where GoRA chose the start

    def row(self) -> dict[str, Any]:
        """The numbers of this run, flat and without the curve."""
        numbers = {item.name: getattr(self, item.name) for item in fields(self)}
        del numbers["curve"], numbers["losses"]
        return numbers | {f"{name}_loss": value for name, value in asdict(self.losses).items()}


def by_optimizer(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each optimizer, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.optimizer, []).append(run)
    return groups


def spread(values: Sequence[float], note: str = "") -> str:
    """Mean and, below it, the standard deviation if there is more than one value."""
    text = f"{mean(values):.4f}{note}"
    return f"{text}\n± {stdev(values):.4f}" if len(values) > 1 else text


def table(runs: Sequence[Run], before: Losses, unit: str) -> Table:
    """The runs as a rich table, one row per optimizer."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    seeds = len({run.seed for run in runs})
    title = f"Loss in {unit}, mean ± sd of {seeds} seeds" if seeds > 1 else f"Loss in {unit}"
    result = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, leading=1, show_edge=False, collapse_padding=True
    )
    names = ["optimizer", "fine-tuning\ntext", "held-out\ndocuments"]
    names += ["earlier text\n(rise)"] if before.retain is not None else []
    for name in names:
        result.add_column(name, no_wrap=True)
    for name in ("seconds", "rank", "parameters\n(on disk)"):
        result.add_column(name, no_wrap=True, justify="right")
    first = [f"{loss:.4f}" for loss in (before.train, before.heldout, before.retain) if loss is not None]
    result.add_row("before", *first, style="dim")
    for name, group in by_optimizer(runs).items():
        result.add_row(*_cells(name, group, before))
    return result


def _cells(name: str, group: list[Run], before: Losses) -> list[str]:
    cells = [f"{name}\nlr {group[0].lr:g}"]
    cells += [spread([run.losses.train for run in group]), spread([run.losses.heldout for run in group])]
    if before.retain is not None:
        after = [run.losses.retain or 0.0 for run in group]
        cells.append(spread(after, f" ({mean(after) - before.retain:+.3f})"))
    cells += [f"{mean(run.seconds for run in group):.1f}", f"{mean(run.rank for run in group):.1f}"]
    size = f"{mean(run.parameters for run in group):,.0f}"
    disk = [run.disk_bytes for run in group if run.disk_bytes]
    return [*cells, f"{size}\n({mean(disk) / 1024:,.0f} KiB)" if disk else size]


def write_numbers(runs: Sequence[Run], before: Losses, settings: dict[str, Any], out: Path) -> None:
    """``results.csv`` (one line per run) and ``results.json`` (also the curves, the settings, the versions)."""
    rows = [run.row() for run in runs]
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    import peft
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "peft": peft.__version__}
    curves = [row | {"curve": run.curve} for row, run in zip(rows, runs, strict=True)]
    everything = {"settings": settings, "versions": versions, "before": asdict(before), "runs": curves}
    (out / "results.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")


def smooth(curve: Sequence[float], width: int) -> list[float]:
    """Moving mean over up to ``width`` values around each step."""
    half = width // 2
    return [mean(curve[max(0, i - half) : i + half + 1]) for i in range(len(curve))]


def figure(runs: Sequence[Run], before: Losses, unit: str, title: str, path: Path) -> None:
    """Draw the training curves, their paired difference, and gain against forgetting, into one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = by_optimizer(runs)
    panels: list[Callable[[Axes, dict[str, list[Run]], Losses, str], None]] = [_draw_curves]
    panels += [_draw_differences] if len(groups) > 1 else []
    panels += [_draw_frontier] if before.retain is not None else []
    sheet = Figure(figsize=(5.2 * len(panels), 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(sheet)
    sheet.suptitle(title, fontsize=12, fontweight="bold")
    for place, draw in enumerate(panels):
        axes = sheet.add_subplot(1, len(panels), place + 1)
        draw(axes, groups, before, unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    sheet.savefig(path)


def _band(axes: Axes, curves: list[list[float]], colour: str, label: str) -> None:
    steps = range(1, len(curves[0]) + 1)
    across = list(zip(*curves, strict=True))
    axes.fill_between(steps, [min(v) for v in across], [max(v) for v in across], color=colour, alpha=0.2, lw=0)
    axes.plot(steps, [mean(v) for v in across], color=colour, lw=1.8, label=label)


def _width(groups: dict[str, list[Run]]) -> int:
    return max(3, len(next(iter(groups.values()))[0].curve) // 12)


def _draw_curves(axes: Axes, groups: dict[str, list[Run]], before: Losses, unit: str) -> None:
    for colour, (name, group) in zip(COLOURS * 9, groups.items(), strict=False):
        curves = [smooth(run.curve, _width(groups)) for run in group]
        _band(axes, curves, colour, f"{name}, lr {group[0].lr:g}")
    axes.set(xlabel="fine-tuning step", ylabel=f"training loss ({unit})")
    axes.set_title("Training loss, smoothed; band: min to max of seeds", fontsize=10)
    axes.legend(frameon=False)


def _draw_differences(axes: Axes, groups: dict[str, list[Run]], before: Losses, unit: str) -> None:
    first, *others = groups
    reference = {run.seed: run.curve for run in groups[first]}
    for colour, name in zip(COLOURS[1:] * 9, others, strict=False):
        pairs = [(run.curve, reference[run.seed]) for run in groups[name]]
        curves = [smooth([a - b for a, b in zip(*pair, strict=True)], _width(groups)) for pair in pairs]
        _band(axes, curves, colour, f"{name} − {first}")
    axes.axhline(0, color=COLOURS[0], lw=1.2)
    axes.set(xlabel="fine-tuning step", ylabel=f"difference ({unit})")
    axes.set_title(f"Against {first} on the same batches (below 0: lower loss)", fontsize=10)
    axes.legend(frameon=False)


def _draw_frontier(axes: Axes, groups: dict[str, list[Run]], before: Losses, unit: str) -> None:
    for colour, (name, group) in zip(COLOURS * 9, groups.items(), strict=False):
        x = [(run.losses.retain or 0.0) - (before.retain or 0.0) for run in group]
        y = [run.losses.heldout for run in group]
        axes.scatter(x, y, color=colour, s=34, alpha=0.45, lw=0)
        axes.scatter([mean(x)], [mean(y)], color=colour, s=150, marker="D", edgecolor="white", label=f"{name} (mean)")
    axes.margins(0.25)
    axes.set(xlabel=f"forgetting: rise of loss on earlier text ({unit})", ylabel=f"held-out loss ({unit})")
    axes.set_title("Gain against forgetting (lower left is better)", fontsize=10)
    axes.legend(frameon=False)
