"""Panels: the three of the law of forgetting, and the ranks of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curvopt.analysis.forgetting import GAMMAS, ForgettingFit, Law

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes


def draw_law(
    axes: Axes, law: Law, N: np.ndarray, D: np.ndarray, rise: np.ndarray, labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Draw the rise over tokens, a colour for each label, and the plain law for each model size."""
    import numpy as np

    for place, label in enumerate(dict.fromkeys(labels)):
        own = [i for i, word in enumerate(labels) if word == label]
        axes.scatter(D[own], rise[own], s=22, alpha=0.7, color=colours[place % len(colours)], lw=0, label=label)
    grid = np.geomspace(D.min(), D.max(), 100)
    for style, n in zip(["-", "--", ":", "-."] * len(N), np.unique(N), strict=False):
        axes.plot(grid, law.predict(n, grid, 0.0), color="#333333", ls=style, lw=1.2, label=f"plain law, N = {n:.3g}")
    axes.set(xscale="log", xlabel="fine-tuning tokens D", ylabel="rise of the pre-training loss")
    sizes = np.unique(D)
    if len(sizes) <= 6:  # else the labels would run into each other
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes.minorticks_off()
    axes.set_title("What is forgotten", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7)


def draw_predicted(
    axes: Axes, rise: np.ndarray, predicted: Mapping[str, np.ndarray], fit: ForgettingFit, colours: Sequence[str]
) -> None:
    """Draw the predicted against the observed rise for each law."""
    laws = {law.name: law for law in (fit.plain, fit.modulated) if law is not None}
    for colour, marker, (name, values) in zip(colours, "ox", predicted.items(), strict=False):
        label = f"{name}: AICc {laws[name].aicc:.1f}, BIC {laws[name].bic:.1f}"
        axes.scatter(rise, values, s=26, alpha=0.7, color=colour, marker=marker, lw=1, label=label)
    ends = [float(rise.min()), float(rise.max())]
    axes.plot(ends, ends, color="#333333", lw=1)
    verdict = "" if fit.modulated is None else f" (Ξ {'justifies' if fit.earns else 'does not justify'} its parameters)"
    axes.set(xlabel="observed rise", ylabel="predicted rise")
    axes.set_title(f"Fit{verdict}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def draw_gammas(axes: Axes, fit: ForgettingFit, colours: Sequence[str]) -> None:
    """Draw exponents and γ with their intervals."""
    laws = [law for law in (fit.plain, fit.modulated) if law is not None]
    words = ["alpha", "beta", *(GAMMAS if fit.modulated is not None else ())]
    for shift, (colour, law) in enumerate(zip(colours, laws, strict=False)):
        for place, word in enumerate(words):
            if word not in law.params:
                continue
            low, high = law.intervals[word]
            y = place + 0.2 * (shift - 0.5)
            axes.plot([low, high], [y, y], color=colour, lw=2, solid_capstyle="butt")
            label = law.name if word == "alpha" else None
            axes.plot(law.params[word], y, color=colour, marker="o", ms=6, ls="none", label=label)
    axes.set_yticks(range(len(words)), words)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=-0.03)
    axes.set_title(f"Parameters with {laws[0].level:.0%} intervals", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def draw_plan(axes: Axes, colour: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw a bar a layer: its rank, and how much of its σ² that holds."""
    places = range(len(rows))
    axes.bar(places, [row["rank"] for row in rows], color=colour)
    for place, row in zip(places, rows, strict=True):
        if row["gain"] is not None and len(rows) <= 40:
            axes.annotate(f"{row['gain']:.2f}", (place, row["rank"]), ha="center", va="bottom", fontsize=6)
    step = max(1, -(-len(rows) // 40))
    axes.set_xticks(places[::step], [row["name"].removeprefix("base_model.model.") for row in rows][::step],
                    rotation=90, fontsize=6)  # fmt: skip
    axes.set(ylabel="rank")
