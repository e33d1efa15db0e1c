"""What every benchmark shares: a stamp, interleaved timing, peak memory, CSV rows. Ratios, not bare times."""

import csv
import functools
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# columns without numbers
TEXT = (
    "task", "start", "optimizer", "pair", "part", "axis", "scale", "model", "kernel", "config", "error", "device",
    "python", "torch", "commit",
)  # fmt: skip

Row = dict[str, Any]


def stamp(device: str | None = None) -> Row:
    """Return what a row needs to be read later: device ("cuda" if there is one), threads, versions, commit."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


Work = Callable[[], Any]


def interleave(
    works: Mapping[str, tuple[Work | None, Work]],
    rounds: int,
    steps: int,
    device: str = "cpu",
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time blocks of steps in turn, A A A B B B A A A B B B ..., and return milliseconds a step, a number a block.

    Args:
        works: by name, what to do before a step (not timed) and the step.
        rounds: counted blocks of each.
        steps: steps of a block; a whole cadence, so that rare work is in every block.
        device: on "cuda" CUDA events are read after the block, on "cpu" the clock at each step.
        warmup: blocks before counting.
        clock: seconds, on "cpu".
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    block = _cuda_block if device == "cuda" else functools.partial(_cpu_block, clock)
    for i in range(warmup + rounds):
        for name, (before, step) in works.items():
            spent = block(before, step, steps)
            if i >= warmup:
                times[name].append(spent / steps)
    return times


def _cpu_block(clock: Callable[[], float], before: Work | None, step: Work, steps: int) -> float:
    spent = 0.0
    for _ in range(steps):
        if before is not None:
            before()
        start = clock()
        step()
        spent += clock() - start
    return 1e3 * spent


def _cuda_block(before: Work | None, step: Work, steps: int) -> float:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
    for start, end in events:
        if before is not None:
            before()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events)


def replayed(step: Work, warmup: int = 3) -> Work:
    """Return a replay of ``step`` recorded as a CUDA graph: its time on the device without launches from Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return median and the 10 % and 90 % quantiles, in milliseconds."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return {"median_ms": statistics.median(times), "p10_ms": tenths[0], "p90_ms": tenths[8]}


def spread(values: Sequence[float]) -> str:
    """Return "mean ± standard deviation" for a table."""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}"


def ratios(times: Mapping[str, Sequence[float]], name: str, base: str) -> dict[str, float]:
    """Return median and quantiles of the block-by-block ratio of one contestant to another."""
    paired = sorted(a / b for a, b in zip(times[name], times[base], strict=True))
    found = summary(paired)
    return {"ratio": found["median_ms"], "ratio_p10": found["p10_ms"], "ratio_p90": found["p90_ms"]}


def peak_bytes(device: str) -> int:
    """Return the most memory this process has held so far: allocated by torch on CUDA, resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rounded(row: Mapping[str, Any], digits: int = 5) -> Row:
    """Return a row whose floats have so many digits."""
    return {key: float(f"{v:.{digits}g}") if isinstance(v, float) else v for key, v in row.items()}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the union of their columns, in order of first appearance; one without a stamp gets it now."""
    mark = stamp()
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in mark]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [*columns, *mark], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**mark, **rounded(row)} for row in rows)


def merge_csv(path: Path, key: Sequence[str], rows: Sequence[Row]) -> None:
    """Write rows into a CSV: those with the same values under ``key`` are replaced, the others stay."""
    kept = {tuple(row[k] or "" for k in key): row for row in [*read_csv(path), *rows]}
    write_csv(path, list(kept.values()))


def append_csv(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row to a CSV, with a head if it is new; lists are written with blanks between their numbers."""
    flat = {k: " ".join(f"{x:.5g}" for x in v) if isinstance(v, list) else v for k, v in rounded(row, 6).items()}
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, extrasaction="ignore", lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({k: "" if v is None else v for k, v in flat.items()})


def read_csv(path: Path) -> list[Row]:
    """Return the rows of a CSV with numbers as numbers; no file, no rows."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as f:
        return [{k: v if k in TEXT else _number(v) for k, v in row.items()} for row in csv.DictReader(f)]


def _number(text: str) -> Any:
    if " " in text:
        return [float(x) for x in text.split()]
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return rows as a Markdown table."""
    columns = columns or list(rows[0])
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(row.get(c, "")) for c in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
