"""What every benchmark shares: a stamp, interleaved timing, CSV rows. Report ratios of one run, not bare times."""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def stamp() -> dict[str, Any]:
    """Return what a row needs to be read later: device, versions, threads, commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent
    ).stdout.strip()
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


def interleave(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Time callables in turn, A B C A B C ..., and return milliseconds by name.

    Args:
        steps: what to time.
        rounds: counted rounds.
        warmup: rounds before counting.
        before: untimed preparation of some of them.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name, step in steps.items():
            if before and name in before:
                before[name]()
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return mean (what a cadence costs on average), median and the 10 % and 90 % quantiles, in milliseconds."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return {
        "mean_ms": round(statistics.fmean(times), 4),
        "median_ms": round(statistics.median(times), 4),
        "p10_ms": round(tenths[0], 4),
        "p90_ms": round(tenths[8], 4),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the union of their columns, in order of first appearance, each with the stamp."""
    mark = stamp()
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in mark]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [*columns, *mark])
        writer.writeheader()
        writer.writerows({**mark, **row} for row in rows)  # a row that was recorded earlier keeps its stamp


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as a Markdown table."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(row.get(c, "")) for c in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
