"""What the runs in results/*.csv say: best learning rates, 95 % intervals, steps and seconds to AdamW's loss."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from contestants import CHOICES
from harness import RESULTS, Row, read_csv
from tasks import TASKS
from training import SEARCH_SEED, chosen_rate

BASE = "AdamW"
HIDDEN = {name for names in CHOICES.values() for name in names} - {BASE}  # CHOICES stand for them


def student(n: int) -> float:
    """Return the 97.5 % quantile of Student's t with n − 1 degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (NaN for one value)."""
    n = len(values)
    half = student(n) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), half


def shown(values: Sequence[float], digits: int = 4, sign: bool = False) -> str:
    """Return "mean ± half" for a table."""
    mean, half = interval(values)
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return text.replace("-", "−") + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


class Runs:
    """All runs of one log, by task and optimizer; what chose the learning rates is left out of the results.

    Args:
        path: results CSV; the curves lie beside it.
    """

    def __init__(self, path: Path = RESULTS / "quality.csv") -> None:
        self.rows = read_csv(path)
        self._curves = read_csv(path.with_name(f"{path.stem}_curves.csv"))

    def tasks(self) -> list[str]:
        """Tasks that have runs of AdamW."""
        found = {row["task"] for row in self.rows if row["optimizer"] == BASE}
        return [task for task in TASKS if task in found]

    def optimizers(self, task: str) -> list[str]:
        """Optimizers of a task, AdamW first; a name of CHOICES in place of its variants."""
        found = dict.fromkeys(row["optimizer"] for row in self.rows if row["task"] == task)
        names = [*(n for n in found if n not in HIDDEN), *(n for n in CHOICES if self.variant(task, n))]
        return sorted((name for name in names if self.best(task, name)), key=lambda name: name != BASE)

    def variant(self, task: str, name: str) -> str:
        """Return the optimizer that a name stands for: of CHOICES the best of the search, "" if none was searched."""
        if name not in CHOICES:
            return name
        rows = _select((r for r in self.rows if r["seed"] == SEARCH_SEED), task, None, 1.0)
        searched = [row for row in rows if row["optimizer"] in CHOICES[name]]
        return str(min(searched, key=lambda row: row["valid"])["optimizer"]) if searched else ""

    def rate(self, task: str, name: str) -> float:
        """Return the learning rate that the search chooses."""
        return chosen_rate({row["lr"]: row["valid"] for row in self.searched(task, name)})

    def searched(self, task: str, name: str) -> list[Row]:
        """Return the runs of the search."""
        return [row for row in self._of(task, name, 1.0) if row["seed"] == SEARCH_SEED]

    def at(self, task: str, name: str, lr: float) -> dict[int, Row]:
        """Return the full runs at a learning rate by seed."""
        return _by_seed(self._of(task, name, 1.0), lr)

    def at_edge(self, task: str, name: str) -> bool:
        """Whether the best learning rate is the highest or lowest of the grid."""
        return self.rate(task, name) in (TASKS[task].rates[0], TASKS[task].rates[-1])

    def best(self, task: str, name: str, horizon: float = 1.0) -> dict[int, Row]:
        """Return the runs at the best learning rate by seed."""
        if not self.searched(task, name):
            return {}
        return _by_seed(self._of(task, name, horizon), self.rate(task, name))

    def curves(self, task: str, name: str) -> dict[int, Row]:
        """Return the curves at the best learning rate by seed."""
        lr = self.rate(task, name)
        return _by_seed(_select(self._curves, task, self.variant(task, name), 1.0), lr)

    def column(self, task: str, name: str, key: str, horizon: float = 1.0) -> list[float]:
        """Return one column of the best runs."""
        return [row[key] for row in self.best(task, name, horizon).values() if row[key] is not None]

    def difference(self, task: str, name: str, key: str, horizon: float = 1.0, to: str = BASE) -> list[float]:
        """Return differences to the full runs of another optimizer, AdamW by default, of the same seeds."""
        base = self.best(task, to)
        runs = self.best(task, name, horizon)
        return [row[key] - base[seed][key] for seed, row in runs.items() if seed in base and row[key] is not None]

    def steps_needed(self, task: str, name: str) -> float:
        """Return the share of the steps that a run of that length needs for AdamW's final validation loss.

        Between the horizons that were run, interpolated linearly; inf if a full run does not reach it, and the
        shortest horizon if even that does.
        """
        goal = statistics.fmean(self.column(task, BASE, "valid"))
        horizons = sorted({row["horizon"] for row in self._of(task, name, None)}, reverse=True)
        points = [(h, statistics.fmean(self.column(task, name, "valid", h))) for h in horizons]
        if not points or points[0][1] > goal:
            return math.inf
        for (h0, v0), (h1, v1) in itertools.pairwise(points):
            if v1 > goal:
                return h1 + (h0 - h1) * (v1 - goal) / (v1 - v0)
        return points[-1][0]

    def steps_shown(self, task: str, name: str) -> str:
        """Return `steps_needed` for a table; "≤" where no shorter run failed to reach the loss."""
        needed = self.steps_needed(task, name)
        shortest = min(row["horizon"] for row in self._of(task, name, None))
        return ("≤ " if needed == shortest else "") + number(needed)

    def crossing(self, task: str, name: str, clock: str) -> list[float]:
        """Return, by seed, when the validation curve of a full run first meets AdamW's final loss, as a share.

        Args:
            task: the task.
            name: the optimizer.
            clock: "steps" or "seconds"; both as a share of AdamW's whole run with that seed. inf if it never does.
        """
        base, found = self.curves(task, BASE), []
        for seed, curve in self.curves(task, name).items():
            if seed in base and curve[clock] and base[seed][clock]:
                goal = base[seed]["valid"][-1]
                found.append(_meets(curve[clock], curve["valid"], goal) / base[seed][clock][-1])
        return found

    def _of(self, task: str, name: str, horizon: float | None) -> list[Row]:
        return _select(self.rows, task, self.variant(task, name), horizon)


def _select(rows: Iterable[Row], task: str, name: str | None, horizon: float | None) -> list[Row]:
    found = (r for r in rows if r["task"] == task and horizon in (None, r["horizon"]))
    return [r for r in found if name in (None, r["optimizer"])]


def _by_seed(rows: Iterable[Row], lr: float) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["lr"] == lr and row["seed"] != SEARCH_SEED}


def _meets(clock: Sequence[float], values: Sequence[float], goal: float) -> float:
    if values[0] <= goal:
        return clock[0]
    for i in range(1, len(values)):
        if values[i] <= goal:
            part = (values[i - 1] - goal) / (values[i - 1] - values[i])
            return clock[i - 1] + part * (clock[i] - clock[i - 1])
    return math.inf


def exponent(rows: Sequence[Row], axis: str) -> float:
    """Return b of the least-squares fit log(ms) = a + b log(size)."""
    x = [math.log(row[axis]) for row in rows]
    y = [math.log(row["median_ms"]) for row in rows]
    return statistics.linear_regression(x, y).slope if len(set(x)) > 1 else math.nan


def step_times(part: str) -> list[Row]:
    """Return the rows of one part of results/step_time.csv."""
    return [row for row in read_csv(RESULTS / "step_time.csv") if row["part"] == part]


def number(value: Any, digits: int = 2) -> str:
    """Return a number for a table; "never" for inf, a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return "never" if value == math.inf else f"{value:.{digits}f}"
