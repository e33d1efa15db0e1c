"""AURAC: how good an adapter is over all of its ranks, in one number, and as a plot (MatryoshkaLoRA, 2605.07850)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("linear", "log2")


def aurac(accuracies: Sequence[float], ranks: Sequence[int], *, scale: str = "linear") -> float:
    """Return the trapezoid area under accuracy over rank, divided by the range of ranks: a mean accuracy.

    Args:
        accuracies: one for each rank; any number that is better when higher.
        ranks: ascending, ≥ 1. One rank alone gives its accuracy.
        scale: ``"linear"`` in the rank, or ``"log2"``, where each doubling counts alike.

    Raises:
        ValueError: unknown ``scale``, nothing given, unequal lengths, ranks that do not ascend from at least 1, or a
            non-finite number.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))}, got {scale!r}")
    y, x = [float(a) for a in accuracies], [float(k) for k in ranks]
    if len(y) != len(x) or not x:
        raise ValueError(f"accuracies must be as many as ranks and at least one, got {len(y)} for {len(x)} ranks")
    if x[0] < 1 or not all(a < b for a, b in itertools.pairwise(x)):
        raise ValueError(f"ranks must ascend from at least 1, got {list(ranks)!r}")
    if not all(map(math.isfinite, [*y, *x])):
        raise ValueError(f"accuracies must be finite, got {y!r}")
    if len(x) == 1:
        return y[0]
    if scale == "log2":
        x = [math.log2(k) for k in x]
    area = sum((b - a) * (p + q) / 2 for a, b, p, q in zip(x, x[1:], y, y[1:], strict=False))
    return area / (x[-1] - x[0])


def plot_aurac(curves: Mapping[str, Mapping[int, float | Sequence[float]]], *, label: str = "accuracy") -> Figure:
    """Draw a measure over rank, one line per method, with its AURAC in the legend.

    Args:
        curves: {method: {rank: value, or the values of several seeds}}; several are drawn as their mean and range.
        label: what the values are.

    Returns:
        A matplotlib Figure; nothing is shown.

    Raises:
        ValueError: no curves, or one that `aurac` does not take.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not curves:
        raise ValueError("curves must have at least one method, got {}")
    sheet = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(sheet)
    axes = sheet.add_subplot()
    every = sorted({rank for curve in curves.values() for rank in curve})
    for i, (name, curve) in enumerate(curves.items()):
        ranks = sorted(curve)
        seeds = [_values(curve[rank]) for rank in ranks]
        means = [sum(v) / len(v) for v in seeds]
        areas = [aurac(means, ranks, scale=scale) for scale in SCALES]
        style: dict[str, Any] = {
            "marker": "os^vD"[i % 5],
            "ls": ("-", "--", ":")[i % 3],
            "ms": 5,
        }  # lines may lie on each other
        (line,) = axes.plot(ranks, means, **style, label=f"{name}: {areas[0]:.4f}, {areas[1]:.4f}")
        axes.fill_between(ranks, [min(v) for v in seeds], [max(v) for v in seeds], color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(rank) for rank in every])
    axes.minorticks_off()
    axes.set(xlabel="rank", ylabel=label)
    axes.grid(alpha=0.25)
    sheet.legend(title="AURAC: linear, log2", frameon=False, loc="outside lower center", ncols=2, fontsize="small")
    return sheet


def _values(value: Any) -> list[float]:
    """Return one number, of whatever library, or several; a list."""
    several = len(value) if getattr(value, "ndim", 1) and hasattr(value, "__len__") else None
    if several == 0:
        raise ValueError(f"curves must have a value at every rank, got {value!r}")
    return [float(value)] if several is None else [float(v) for v in value]
