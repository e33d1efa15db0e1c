"""Plots of what runs have recorded; every function returns a matplotlib Figure and shows nothing.

A source is a file of a `Recorder`, its records, a module, or an optimizer of curvopt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from curvopt.analysis.forgetting import ForgettingFit
from curvopt.analysis.recorder import Recorder, pair_entry
from curvopt.analysis.spectra import cumulative, spectra
from curvopt.functional.ranks import RankPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#00798c", "#d1495b", "#d99a1c", "#7b4b94", "#3c6e3c", "#6b7280", "#1f4e9c", "#a0522d")
KINDS = {"curvature": ("energy", "share of Σσ²"), "update": ("singular", "share of ‖ΔW‖²")}
RANKS = {"rank": "live rank", "effective_rank": "effective rank of the curvature", "update_rank": "rank of the update"}
MOST = 7  # projections with a panel or a line of their own; the others share one

Pair = dict[str, Any]


def records_of(source: Any) -> list[dict[str, Any]]:
    """Return the records of a source; one record of a module or an optimizer as it is now.

    Raises:
        ValueError: there are none.
    """
    if isinstance(source, (str, Path)):
        found = Recorder.read(source)
    elif isinstance(source, (list, tuple)) and all(isinstance(r, dict) for r in source):
        found = list(source)
    else:
        found = [{"step": 0, "pairs": {s.name: pair_entry(s) for s in spectra(source)}}]
    if not found:
        raise ValueError(f"no records in {source!r}")
    return found


def plot_spectra(source: Any, *, kind: str = "curvature", step: int | None = None) -> Figure:
    """Draw how each pair's energy falls off: cumulative curves by projection, and a heat map of all layers for each.

    Args:
        source: see the module.
        kind: "curvature" (σ_i²) or "update" (squared singular values of ΔW).
        step: the last record up to this step; None for the last.

    Raises:
        ValueError: unknown ``kind``, or no record has such spectra.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    key, label = KINDS[kind]
    records = [r for r in _with_pairs(source) if step is None or r["step"] <= step]
    chosen = next((r for r in reversed(records) if any(p.get(key) for p in r["pairs"].values())), None)
    if chosen is None:
        raise ValueError(f"no record {'' if step is None else f'up to step {step} '}has the spectra of kind {kind!r}")
    groups = _by_projection({n: p for n, p in chosen["pairs"].items() if p.get(key)})
    energies = {
        word: [[x * x for x in p[key]] if kind == "update" else p[key] for p in pairs] for word, pairs in groups.items()
    }
    columns = min(4, len(groups) + 1)
    rows = -(-(len(groups) + 1) // columns)
    sheet = _sheet(3.4 * columns, 3.1 * rows)
    sheet.suptitle(f"{'Curvature' if kind == 'curvature' else 'Update'} spectra, step {chosen['step']}", fontsize=12)
    _draw_cumulative(sheet.add_subplot(rows, columns, 1), energies, label)
    width = max(len(row) for own in energies.values() for row in own)
    for place, (word, pairs) in enumerate(groups.items(), 2):
        image = _draw_heat(sheet.add_subplot(rows, columns, place), word, pairs, energies[word], width)
    sheet.colorbar(image, ax=sheet.axes, label=label, shrink=0.8, extend="min")
    return sheet


def _draw_cumulative(axes: Axes, energies: Mapping[str, list[list[float]]], label: str) -> None:
    for colour, (word, rows) in zip(COLOURS * 2, energies.items(), strict=False):
        curves = [cumulative(row) for row in rows]
        length = max(len(curve) for curve in curves)
        across = list(zip(*(curve + [1.0] * (length - len(curve)) for curve in curves), strict=True))
        steps = range(1, length + 1)
        axes.fill_between(steps, [min(v) for v in across], [max(v) for v in across], color=colour, alpha=0.1, lw=0)
        axes.plot(steps, [median(v) for v in across], color=colour, lw=1.6, label=word)
    axes.set(xlabel="directions kept", ylabel=label, ylim=(0, 1.02))
    axes.set_title("cumulative: median, least, most", fontsize=9)
    axes.legend(frameon=False, fontsize=7)


def _draw_heat(axes: Axes, word: str, pairs: Sequence[Pair], energies: Sequence[Sequence[float]], width: int) -> Any:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    nan = float("nan")
    shares = [[x / sum(row) if sum(row) > 0 else nan for x in row] + [nan] * (width - len(row)) for row in energies]
    image = axes.imshow(
        [[max(x, 1e-4) for x in row] for row in shares], aspect="auto", interpolation="nearest",
        norm=LogNorm(1e-4, 1), extent=(0.5, width + 0.5, len(pairs) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_title(word, fontsize=9)
    axes.set(xlabel="direction i", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _layer_ticks(axes, pairs, "y")
    return image


def plot_ranks(source: Any, *, what: str = "rank") -> Figure:
    """Draw where rank is used: by layer and projection now and, given several records, over time.

    Args:
        source: see the module.
        what: "rank" (live directions), "effective_rank" (of the curvature) or "update_rank" (of ΔW).

    Raises:
        ValueError: unknown ``what``, or no record has it.
    """
    if what not in RANKS:
        raise ValueError(f"what must be one of {', '.join(map(repr, RANKS))}, got {what!r}")
    records = [r for r in _with_pairs(source) if any(p.get(what) is not None for p in r["pairs"].values())]
    if not records:
        raise ValueError(f"no record has {what!r}")
    last = records[-1]
    groups = _by_projection({n: p for n, p in last["pairs"].items() if p.get(what) is not None})
    panels = 3 if len(records) > 1 else 1
    sheet = _sheet(5.2 * panels + 0.6, 3.6)
    sheet.suptitle(f"{RANKS[what].capitalize()}, step {last['step']}", fontsize=12)
    top = max(p["full_rank"] for pairs in groups.values() for p in pairs)
    axes, width = sheet.add_subplot(1, panels, 1), max(len(pairs) for pairs in groups.values())
    nan = float("nan")
    grid = [[p[what] for p in pairs] + [nan] * (width - len(pairs)) for pairs in groups.values()]
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", vmin=0, vmax=top)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set(xlabel="layer")
    axes.set_title("now, by layer and projection", fontsize=9)
    _layer_ticks(axes, max(groups.values(), key=len), "x")
    sheet.colorbar(image, ax=axes)
    if panels > 1:
        _draw_over_time(sheet.add_subplot(1, panels, 2), records, what, top)
        image = _draw_layers_over_time(axes := sheet.add_subplot(1, panels, 3), records, what, top)
        sheet.colorbar(image, ax=axes)
    return sheet


def _draw_over_time(axes: Axes, records: Sequence[dict[str, Any]], what: str, top: int) -> None:
    lines: dict[str, list[tuple[int, list[float]]]] = {}
    for record in records:
        for word, pairs in _by_projection(record["pairs"]).items():
            if values := [p[what] for p in pairs if p.get(what) is not None]:
                lines.setdefault(word, []).append((record["step"], values))
    for colour, (word, points) in zip(COLOURS * 2, lines.items(), strict=False):
        steps = [step for step, _ in points]
        axes.fill_between(
            steps, [min(v) for _, v in points], [max(v) for _, v in points], color=colour, alpha=0.1, lw=0
        )
        axes.plot(steps, [fmean(v) for _, v in points], color=colour, lw=1.6, label=word)
    axes.set(xlabel="step", ylabel=RANKS[what], ylim=(0, 1.04 * top))
    axes.set_title("over time: mean, least, most", fontsize=9)
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _draw_layers_over_time(axes: Axes, records: Sequence[dict[str, Any]], what: str, top: int) -> Any:
    """Draw the mean over the projections of each layer; pairs without a layer number stand for themselves."""
    rows: dict[Any, list[float]] = {}
    for i, record in enumerate(records):
        here: dict[Any, list[float]] = {}
        for name, p in record["pairs"].items():
            if p.get(what) is not None:
                here.setdefault(name if p["layer"] is None else p["layer"], []).append(p[what])
        for layer, values in here.items():
            rows.setdefault(layer, [float("nan")] * len(records))[i] = fmean(values)
    image = axes.imshow(list(rows.values()), aspect="auto", interpolation="nearest", vmin=0, vmax=top)
    ticks = range(0, len(records), max(1, len(records) // 5))
    axes.set_xticks(ticks, [str(records[i]["step"]) for i in ticks])
    _ticks(axes, [str(layer) for layer in rows], "y")
    axes.set(xlabel="step", ylabel="layer")
    axes.set_title("mean over projections", fontsize=9)
    return image


def plot_frontier(
    runs: Mapping[str, Any], *, x: str = "norm", y: str = "retain_loss", baseline: float | None = None
) -> Figure:
    """Draw the size of the update against retention, one curve per run.

    Args:
        runs: label → source of records, or list of sources (several seeds: same colour).
        x: the measure of the update: "norm" (‖ΔW‖_F), "step", or any scalar that was recorded, such as tokens.
        y: the recorded scalar that should not rise, such as the pre-training loss.
        baseline: its value before fine-tuning; the rise above it is drawn.

    Raises:
        ValueError: no runs, or a run whose records lack one of them.
    """
    if not runs:
        raise ValueError("runs must have at least one run, got none")
    sheet = _sheet(6, 4.4)
    axes = sheet.add_subplot()
    for colour, (label, sources) in zip(COLOURS * (1 + len(runs) // len(COLOURS)), runs.items(), strict=False):
        several = isinstance(sources, (list, tuple)) and not all(isinstance(s, dict) for s in sources)
        for i, source in enumerate(sources if several else [sources]):
            both = [(_value(r, x), _value(r, y)) for r in records_of(source)]
            points = [(a, b - (baseline or 0.0)) for a, b in both if a is not None and b is not None]
            if not points:
                raise ValueError(f"runs: no record of {label!r} has both {x!r} and {y!r}")
            name = label if i == 0 else None
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3, lw=1.2, alpha=0.8, label=name)
            axes.plot(*points[-1], color=colour, marker="D", ms=7, mec="white")
    axes.set(xlabel="‖ΔW‖ (Frobenius)" if x == "norm" else x, ylabel=y if baseline is None else f"rise of {y}")
    axes.set_title("Updates against retention (lower is better)", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return sheet


def plot_plan(plan: RankPlan) -> Figure:
    """Draw the ranks of a plan of `GoRAInit`, a bar a layer, with the share of the layer's σ² that each holds.

    Args:
        plan: from `GoRAInit.plan_only` or ``GoRAInit.plan``.

    Raises:
        ValueError: the plan has no layer.
    """
    from curvopt.analysis.figures import draw_plan

    rows = plan.rows()
    if not rows:
        raise ValueError(f"plan must have layers, got {plan!r}")
    sheet = _sheet(max(5.0, 0.22 * min(len(rows), 60)), 4.6)
    axes = sheet.add_subplot()
    draw_plan(axes, COLOURS[0], rows)
    axes.set_title(plan.summary() + (f", gain {plan.gain():.2f}" if plan.spectra else ""), fontsize=9)
    return sheet


def plot_forgetting(
    fit: ForgettingFit, n_params: Any, n_tokens: Any, loss: Any, loss0: Any, *, r_eff: Any = None,
    rho_align: Any = None, pi_proj: Any = None, labels: Sequence[str] | None = None,
) -> Figure:  # fmt: skip
    """Draw observations and the plain law, observed against predicted rise for each law, and the intervals of γ.

    Args:
        fit: what `fit_forgetting_law` gave for these observations.
        n_params: as there, and so the other observations.
        n_tokens: as there.
        loss: as there.
        loss0: as there.
        r_eff: as there.
        rho_align: as there.
        pi_proj: as there.
        labels: one per observation; those with one label share a colour.
    """
    import numpy as np

    from curvopt.analysis.figures import draw_gammas, draw_law, draw_predicted

    N, D, L = (np.asarray(v, dtype=float) for v in (n_params, n_tokens, loss))
    base = np.broadcast_to(np.asarray(loss0, dtype=float), L.shape)
    words = list(labels) if labels is not None else [f"N = {n:.3g}" for n in N]
    sheet = _sheet(15 if fit.modulated else 10.4, 4.2)
    panels = 3 if fit.modulated else 2
    draw_law(sheet.add_subplot(1, panels, 1), fit.plain, N, D, L - base, words, COLOURS)
    given = {"r_eff": r_eff, "rho_align": rho_align, "pi_proj": pi_proj}
    predicted = {law.name: law.predict(N, D, 0.0, **given) for law in (fit.plain, fit.modulated) if law is not None}
    draw_predicted(sheet.add_subplot(1, panels, 2), L - base, predicted, fit, COLOURS)
    if fit.modulated is not None:
        draw_gammas(sheet.add_subplot(1, panels, 3), fit, COLOURS)
    return sheet


def _value(record: dict[str, Any], key: str) -> float | None:
    found = record.get(key, (record.get("drift") or {}).get(key))
    return found if isinstance(found, (int, float)) else None


def _with_pairs(source: Any) -> list[dict[str, Any]]:
    found = [r for r in records_of(source) if r.get("pairs")]
    if not found:
        raise ValueError("no record has pairs: record with an optimizer of curvopt, or with model=")
    return found


def _by_projection(pairs: Mapping[str, Pair]) -> dict[str, list[Pair]]:
    """Group pairs by projection, the most frequent first; beyond `MOST`, the rest together."""
    groups: dict[str, list[Pair]] = {}
    for name, p in pairs.items():
        groups.setdefault(p["projection"], []).append({**p, "name": name})
    words = sorted(groups, key=lambda word: -len(groups[word]))
    kept = {word: groups[word] for word in words[: MOST if len(words) > MOST else len(words)]}
    if rest := [p for word in words[len(kept) :] for p in groups[word]]:
        kept["others"] = rest
    return kept


def _layer_ticks(axes: Axes, pairs: Sequence[Pair], side: str) -> None:
    words = [p["name"].split(".")[-1] if p["layer"] is None else str(p["layer"]) for p in pairs]
    _ticks(axes, words, side)


def _ticks(axes: Axes, words: Sequence[str], side: str) -> None:
    """Label about eight of the rows or columns."""
    places = range(0, len(words), max(1, -(-len(words) // 8)))
    ticks = axes.set_yticks if side == "y" else axes.set_xticks
    ticks(places, [words[i] for i in places], fontsize=8)


def _sheet(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(sheet)
    return sheet
