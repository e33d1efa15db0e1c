"""Everything that only a GPU can say, in one run of less than five minutes: are the kernels right, and how fast.

    pip install --no-index --no-deps --no-build-isolation -e .
    python benchmarks/device.py [--seconds 285] [--parts steps sweep] [--out benchmarks/results]
    python benchmarks/device.py --dry-run            # tiny sizes on the CPU: does the script itself run?

Needs torch, triton and pytest, no network; matplotlib for the plot, pytorch_optimizer and distributed_shampoo for
"heavy". A part that fails or runs out of time is noted, and the others go on. Parts:

- ``tests``: tests/kernels on the device;
- ``ops``: every op beside the reference and plain torch, with the rate of a copy;
- ``plans``: a step of `UpdatePlan` on the adapters of three models, its host time and as a CUDA graph;
- ``launches``: what each kernel of a step takes, by torch's profiler, with the rate of a copy;
- ``steps``: a step of the optimizers on the same adapters, eager (wall, host) and as a CUDA graph: steps in a row, and
  each after a forward and backward of its own, which leave new gradients and little else in the host's caches;
- ``training``: whole training steps of eight layers of Llama-3-8B width, with and without reading the loss;
- ``cold``: the first step with an empty cache of compiled kernels;
- ``heavy``: SOAP, Shampoo, Distributed Shampoo at sizes they can bear;
- ``sweep``: the alternatives of kernels/launch.py.

Writes device_<part>.csv, device.md and device.png.
"""

import argparse
import gc
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
import op_times
from harness import RESULTS, Row, replayed, stamp, table, write_csv
from shapes import MODELS, Shape, gated

from curvopt import GritKFAC, MatryoshkaScaledAdam, kernels

ROOT = Path(__file__).parents[1]
LR = 1e-4
# sizes: ranks, models, ranks with all contestants, repetitions, pairs and width of ops, tokens, layers of training
FULL: dict[str, Any] = {
    "ranks": (16, 8, 64, 128), "models": dict(reversed(MODELS.items())), "all": (16,),
    "steps": 12, "L": 224, "d": 4096, "tokens": 16384,
    "hidden": (4096, 14336, 1024), "layers": 8, "length": 4096, "heavy": gated(1, 896, 4864, 128),
}  # fmt: skip
TINY: dict[str, Any] = {
    "ranks": (4,), "models": {"tiny": gated(1, 16, 24, 8)}, "all": (4,), "steps": 2, "L": 2, "d": 16, "tokens": 8,
    "hidden": (16, 24, 8), "layers": 1, "length": 8, "heavy": gated(1, 16, 24, 8),
}  # fmt: skip


class Run:
    """What the parts share.

    Attributes:
        sizes: `FULL` or `TINY`.
        device: "cuda" or "cpu".
        dry: whether only the script is tried.
        out: where files go.
        end: when to stop, as time.monotonic() says it.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.dry: bool = args.dry_run
        self.device = "cpu" if self.dry else "cuda"
        self.sizes = dict(TINY if self.dry else FULL)
        if args.ranks is not None:
            self.sizes["ranks"] = tuple(args.ranks)
        self.out: Path = args.out
        self.end = time.monotonic() + args.seconds

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class Pair(nn.Module):
    """An adapter alone: the forward of a step benchmark is u and B u."""

    def __init__(self, d_in: int, d_out: int, r: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(d_in, r, bias=False), nn.Linear(r, d_out, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return B A x."""
        return self.lora_B(self.lora_A(x))


class Adapted(nn.Module):
    """A frozen bfloat16 linear with a float32 adapter."""

    def __init__(self, d_in: int, d_out: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in, dtype=torch.bfloat16) * d_in**-0.5, requires_grad=False)
        self.lora_A, self.lora_B = nn.Linear(d_in, r, bias=False), nn.Linear(r, d_out, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + B A x."""
        return linear(x, self.weight) + self.lora_B(self.lora_A(x.float())).to(x.dtype)


class Block(nn.Module):
    """One layer of a Llama-like model, heads of 128 (or all of a smaller width)."""

    def __init__(self, hidden: int, inner: int, key_value: int, r: int) -> None:
        super().__init__()
        self.head = min(128, key_value)
        self.q, self.o = Adapted(hidden, hidden, r), Adapted(hidden, hidden, r)
        self.k, self.v = Adapted(hidden, key_value, r), Adapted(hidden, key_value, r)
        self.gate, self.up = Adapted(hidden, inner, r), Adapted(hidden, inner, r)
        self.down = Adapted(inner, hidden, r)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states ``(1, length, hidden)``."""
        y = rms_norm(x, x.shape[-1:])
        q, k, v = (f(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        x = x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = rms_norm(x, x.shape[-1:])
        return x + self.down(silu(self.gate(y)) * self.up(y))


class Adapters(nn.Module):
    """The pairs of a model, with a gradient for every parameter, in fixed places."""

    def __init__(self, shape: Shape, r: int, device: str) -> None:
        super().__init__()
        with torch.device(device):
            self.pairs = nn.ModuleList(Pair(*d, r) for _ in range(shape.blocks) for d in shape.linears)
        for p in self.parameters():
            p.data.normal_(std=0.02)
            p.grad = torch.randn_like(p) * 1e-3

    def observe(self) -> None:
        """Send a few rows forward and a gradient back through every pair, as a training step does."""
        for p in self.parameters():
            p.grad = None
        x = {
            p.lora_A.in_features: torch.randn(8, p.lora_A.in_features, device=p.lora_A.weight.device)
            for p in self.pairs
        }
        losses = [pair(x[pair.lora_A.in_features]).square().mean() for pair in self.pairs]
        torch.stack(losses).sum().backward()


Factory = Callable[[nn.Module], torch.optim.Optimizer]


def contestants(run: Run, everybody: bool) -> dict[str, Factory]:
    """Return what is measured at every rank, or everybody."""
    trainable = lambda m: [p for p in m.parameters() if p.requires_grad]  # noqa: E731
    capturable = {"capturable": True} if run.device == "cuda" else {}
    found: dict[str, Factory] = {
        "AdamW fused": lambda m: torch.optim.AdamW(trainable(m), lr=LR, fused=True, **capturable),
        "GritKFAC": lambda m: GritKFAC(m, lr=LR, **capturable),
        "GritKFAC(outer_rank=0)": lambda m: GritKFAC(m, lr=LR, outer_rank=0, **capturable),
        "GritKFAC(eigen, outer_rank=0)": lambda m: GritKFAC(m, lr=LR, update="eigen", outer_rank=0, **capturable),
        "MatryoshkaScaledAdam": lambda m: MatryoshkaScaledAdam(m, lr=LR),
    }
    if everybody:
        found["AdamW foreach"] = lambda m: torch.optim.AdamW(trainable(m), lr=LR, foreach=True, **capturable)
        for rule in ("adam", "whiten", "momentum"):
            found[f"GritKFAC({rule})"] = lambda m, rule=rule: GritKFAC(m, lr=LR, update=rule, **capturable)
        found["GritKFAC(statistics=gradient)"] = lambda m: GritKFAC(m, lr=LR, statistics="gradient", **capturable)
        found["GritKFAC(backend=torch)"] = lambda m: GritKFAC(m, lr=LR, backend="torch", **capturable)
    return found


def milliseconds(run: Run, before: Callable[[], Any] | None, step: Callable[[], Any], steps: int) -> Row:
    """Return medians of what a step takes until it returns (host) and until the device is done (wall)."""
    host, wall = [], []
    for _ in range(steps):
        if before is not None:
            before()
        run.wait()
        start = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - start))
        run.wait()
        wall.append(1e3 * (time.perf_counter() - start))
    return {"host_ms": statistics.median(host), "wall_ms": statistics.median(wall), "wall_max_ms": max(wall)}


def graph_ms(run: Run, step: Callable[[], Any], steps: int) -> Row:
    """Return the median time of a replay of the step as a CUDA graph; what went wrong, if it cannot be captured."""
    if run.device != "cuda":
        return {"graph_ms": ""}
    try:
        replay = replayed(step)
    except Exception as error:  # an optimizer that cannot be captured is a result
        torch.cuda.synchronize()
        return {"graph_ms": "", "error": " ".join(str(error).split())[:120]}
    times = []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"graph_ms": statistics.median(times)}


# ------------------------------------------------------------------------------------------------- parts


def tests(run: Run) -> Iterator[Row]:
    """Run tests/kernels; compiling for other targets needs no device and is left out."""
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") and not run.dry else []
    what = (
        ["tests/kernels/test_launch.py", "-k", "tiling"]
        if run.dry
        else ["tests/kernels", "--ignore=tests/kernels/test_compiled.py"]
    )
    command = [sys.executable, "-m", "pytest", *what, *parallel, "--tb=short", "-rf", "-p", "no:cacheprovider"]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        try:
            subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=log, timeout=max(30.0, min(120.0, run.left)), check=False
            )
            ended = "ended"
        except subprocess.TimeoutExpired:
            ended = "cut off"
        log.seek(0)
        text = log.read()
    (run.out / "device_tests.txt").write_text(text[-100000:], encoding="utf-8")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", text)}
    yield {
        "ended": ended,
        "seconds": time.monotonic() - start,
        **dict.fromkeys(("passed", "failed", "skipped"), 0),
        **counts,
    }


def ops(run: Run) -> Iterator[Row]:
    """Time every op; a dry run has the references alone."""
    z = run.sizes
    copy_ms, rate = _copy(run)
    yield {"op": "copy", "implementation": "torch", "ms": copy_ms, "bytes_per_second": rate, "share_of_copy": 1.0}
    for r in z["ranks"]:
        for op, implementation, moved, function in op_times.all_of(z["L"], r, z["d"], z["tokens"], run.device):
            if run.left < 0 or (run.dry and implementation in ("kernel", "plan")):
                continue
            ms = _ms(run, function)
            own = moved / (1e-3 * ms)
            yield {
                "op": op, "implementation": implementation, "r": r, "ms": ms, "bytes_per_second": own,
                "share_of_copy": own / rate,
            }  # fmt: skip


def _copy(run: Run) -> tuple[float, float]:
    """Return the time of a copy of 1 GiB, and the bytes a second that it reads and writes."""
    source = torch.empty(2**16 if run.dry else 2**28, device=run.device)
    target = torch.empty_like(source)
    ms = _ms(run, lambda: target.copy_(source))
    return ms, 2 * source.numel() * 4 / (1e-3 * ms)


def _ms(run: Run, function: Callable[[], Any]) -> float:
    if run.device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=5, rep=25, quantiles=[0.5]))
    function()
    return float(milliseconds(run, None, function, 2)["wall_ms"])


def plans(run: Run) -> Iterator[Row]:
    """A step of a plan: load, look for non-finite gradients, step."""
    for model, r, rule in (
        (m, r, u) for m in run.sizes["models"] for r in run.sizes["ranks"] for u in ("polar", "eigen")
    ):
        if run.dry or run.left < 0:
            yield {"model": model, "r": r, "rule": rule}
            continue
        shape: Shape = run.sizes["models"][model]
        given = op_times.bucket(
            [s for d in shape.linears for s in ((shape.blocks, d[0], 1), (shape.blocks, d[1], 2))], r, "cuda"
        )
        grads = [g for s in given for g in s.grads]
        plan, flag = op_times.planned(rule, given), torch.zeros((), device="cuda")

        def step(plan: Any = plan, grads: list[Tensor] = grads, flag: Tensor = flag) -> None:
            flag.zero_()
            plan.load(grads)
            plan.nonfinite_(flag)
            plan.step(flag)

        step()
        yield {
            "model": model, "r": r, "rule": rule, "matrices": len(grads), "parameters": sum(g.numel() for g in grads),
            **milliseconds(run, None, step, run.sizes["steps"]), **graph_ms(run, step, run.sizes["steps"]),
        }  # fmt: skip
        del plan, given, grads, step


# of this package, those of wide matrices first
KERNELS = (
    "_products", "_nonfinite", "_advance", "_update", "_grams", "_total", "_outer_map", "_equalise", "_prepare",
    "_average", "_inverse", "_root", "_jacobi", "_gram", "_transform",
)  # fmt: skip


def moved(kernel: str, seen: Container[str]) -> int:
    """Return the bytes of float32 that each number of an adapter makes a kernel move, beside what ``seen`` names.

    With outer factors, as many directions of them as ranks.
    """
    basis = 8 if "_products" in seen else 0
    if kernel == "_update":
        return 12 if "_advance" in seen else 28 + basis
    return {"_nonfinite": 4, "_products": 8, "_advance": 24 + basis}.get(kernel, 0)


def launches(run: Run) -> Iterator[Row]:
    """What the device is busy with in a step, kernel by kernel: medians of five steps."""
    model = "Llama-3-8B" if not run.dry else "tiny"
    _, rate = _copy(run)
    ranks: tuple[int, ...] = run.sizes["ranks"]
    for r, (name, make) in ((n, c) for n in ranks for c in contestants(run, n in run.sizes["all"]).items()):
        if run.left < 0 or name == "GritKFAC(backend=torch)":
            continue
        torch.manual_seed(0)
        adapters = Adapters(run.sizes["models"][model], r, run.device)
        optimizer, numbers = make(adapters), sum(p.numel() for p in adapters.parameters())
        before = adapters.observe if "GritKFAC" in name else lambda: None
        for _ in range(2):
            before(), optimizer.step()
        spent: dict[str, list[float]] = {}
        for _ in range(5):
            before(), run.wait()
            with profile(activities=[ProfilerActivity.CPU if run.dry else ProfilerActivity.CUDA]) as seen:
                optimizer.step()
                run.wait()
            own: dict[str, float] = defaultdict(float)
            for event in seen.key_averages():
                if event.self_device_time_total > 0 or run.dry:
                    own[event.key if event.key in KERNELS else "torch"] += event.self_device_time_total
            for kernel, us in own.items():
                spent.setdefault(kernel, []).append(us)
        for kernel, times in sorted(spent.items(), key=lambda item: -statistics.median(item[1])):
            us = statistics.median(times)
            least = moved(kernel, spent) * numbers / rate
            share = least / (1e-6 * us) if least and r == 16 and us else ""
            yield {"r": r, "optimizer": name, "kernel": kernel, "us": us, "share_of_copy": share}
        del adapters, optimizer, before
        gc.collect()


def steps(run: Run) -> Iterator[Row]:
    """A step of each optimizer on the adapters of each model."""
    for r, model in ((r, model) for r in run.sizes["ranks"] for model in run.sizes["models"]):
        base: Row = {}
        everybody = r in run.sizes["all"] and model == next(iter(run.sizes["models"]))
        for name, make in contestants(run, everybody).items():
            if run.left < 0:
                return
            torch.manual_seed(0)
            adapters = Adapters(run.sizes["models"][model], r, run.device)
            optimizer = make(adapters)
            adapters.observe()
            row = {"first_ms": milliseconds(run, None, optimizer.step, 1)["wall_ms"]}
            for prefix, before in (("after_", adapters.observe), ("", None)):
                milliseconds(run, before, optimizer.step, 2)
                times = milliseconds(run, before, optimizer.step, run.sizes["steps"])
                row |= {prefix + key: value for key, value in times.items()}
            row |= graph_ms(run, optimizer.step, run.sizes["steps"])
            base = base or row
            for key in ("wall_ms", "after_wall_ms", "graph_ms"):
                if row[key] != "":
                    row["ratio_" + key.removesuffix("_ms")] = row[key] / base[key]
            yield {"model": model, "r": r, "optimizer": name, **row}
            del adapters, optimizer, before
            gc.collect()


def training(run: Run) -> Iterator[Row]:
    """Whole training steps."""
    z, base = run.sizes, {}
    for name, make in contestants(run, False).items():
        torch.manual_seed(0)
        with torch.device(run.device):
            model = nn.Sequential(*(Block(*z["hidden"], 16 if not run.dry else 4) for _ in range(z["layers"])))
            x = torch.randn(1, z["length"], z["hidden"][0], dtype=torch.bfloat16)
        optimizer = make(model)

        def step(reading: bool, model: nn.Module = model, x: Tensor = x, optimizer: Any = optimizer) -> None:
            loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if reading:
                loss.item()

        for reading in (False, True):
            if run.left < 0:
                return
            for _ in range(2):
                step(reading)
            run.wait()
            start, n = time.perf_counter(), 2 if run.dry else 10
            for _ in range(n):
                step(reading)
            run.wait()
            ms = 1e3 * (time.perf_counter() - start) / n
            base.setdefault(reading, ms)
            yield {"optimizer": name, "reads_loss": int(reading), "ms": ms, "ratio": ms / base[reading]}
        del model, optimizer, step
        gc.collect()


def cold(run: Run) -> Iterator[Row]:
    """The first and the second step of a process whose cache of compiled kernels is empty."""
    for rule in ("polar",) if run.dry else ("polar", "eigen"):
        program = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "import argparse, device\nfrom pathlib import Path\n"
            f"run = device.Run(argparse.Namespace(dry_run={run.dry}, out=Path('.'), seconds=60, ranks=None))\n"
            "m = device.Adapters(device.gated(1, 896, 4864, 128), 16, run.device)\n"
            f"o = device.GritKFAC(m, lr=1e-4, update={rule!r})\n"
            "print(*(device.milliseconds(run, m.observe, o.step, 1)['wall_ms'] for _ in range(2)))\n"
        )
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, "-c", program], env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True,
                text=True, timeout=100, check=False,
            )  # fmt: skip
        numbers = done.stdout.split()[-2:] if done.returncode == 0 else ["", ""]
        row = dict(zip(("first_ms", "second_ms"), (float(n) if n else "" for n in numbers), strict=True))
        yield {"rule": rule, **row, "error": done.stderr[-150:] if done.returncode else ""}


def heavy(run: Run) -> Iterator[Row]:
    """Optimizers with Kronecker factors of whole matrices, on one block of Qwen2.5-0.5B."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        yield {"optimizer": "pytorch_optimizer is not installed"}
        return
    import adapters as others

    found = {"AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=LR, fused=True), **others.heavy()}
    base = None
    for name, make in found.items():
        if run.left < 0:
            return
        torch.manual_seed(0)
        small = Adapters(run.sizes["heavy"], 16 if not run.dry else 4, run.device)
        small.trainable = lambda small=small: list(small.parameters())  # as benchmarks/adapters.py has it
        small.r = small.pairs[0].lora_A.out_features
        try:
            optimizer = make(small)
            # ten steps are a whole cadence: the rare step is the largest, and the mean has it once
            start = time.perf_counter()
            milliseconds(run, None, optimizer.step, 1 if run.dry else 11)
            rows = [milliseconds(run, None, optimizer.step, 1)["wall_ms"] for _ in range(2 if run.dry else 10)]
        except Exception as error:  # what they raise is a result
            yield {"optimizer": name, "error": " ".join(str(error).split())[:120]}
            continue
        mean = statistics.fmean(rows)
        base = base or mean
        yield {"optimizer": name, "mean_ms": mean, "largest_ms": max(rows), "ratio": mean / base,
               "seconds": time.perf_counter() - start}  # fmt: skip


def sweep(run: Run) -> Iterator[Row]:
    """The shipped configuration and the alternatives: a whole polar step as a CUDA graph, float32 and bfloat16."""
    if run.dry:
        yield {"kernel": "", "config": "dry run"}
        return
    from curvopt.kernels import launch

    asked = {key: value for key, value in launch.ALTERNATIVES.items() if key[1] in run.sizes["ranks"]}
    for (op, rp), alternatives in asked.items():
        for n, config in enumerate((launch.config(op, rp), *alternatives)):
            if run.left < 0:
                return
            with mock.patch.dict(launch.TABLE, {(op, rp): config}):
                row = graph_ms(run, op_times.whole_step(run.sizes["L"], rp, 16, run.device), run.sizes["steps"])
            text = ", ".join(f"{k}={v}" for k, v in vars(config).items() if k != "stack")
            yield {"kernel": op, "r": rp, "shipped": int(n == 0), "config": text, **row}


PARTS: dict[str, Callable[[Run], Iterator[Row]]] = {
    part.__name__: part for part in (launches, steps, ops, plans, sweep, training, cold, heavy, tests)
}


def report(run: Run, results: dict[str, list[Row]], notes: Sequence[str]) -> None:
    """Write the tables as Markdown, and the plot if matplotlib is there."""
    mark = stamp(run.device)
    text = ["# On a device", "", ", ".join(f"{k} {v}" for k, v in mark.items()), ""]
    for part, rows in results.items():
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            shown = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
            text += [f"## {part}", "", table(shown, columns), ""]
    text += [f"- {note}" for note in notes]
    (run.out / "device.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    if results.get("launches") and not run.dry and importlib.util.find_spec("matplotlib") is not None:
        plot(results["launches"], run.out / "device.png")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot what the device is busy with in a step of each optimizer, kernel by kernel, at the first rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["r"] == rows[0]["r"] and row["optimizer"] != "AdamW foreach"]
    names = list(dict.fromkeys(row["optimizer"] for row in rows))[::-1]
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(names) + 1.3))
    left = dict.fromkeys(names, 0.0)
    # the least of them share a colour
    kinds = {kernel: min(n, 4) for n, kernel in enumerate(KERNELS)} | {"torch": 5}
    labels = [*(kernel.strip("_") for kernel in KERNELS[:4]), "r×r and other small ones", "torch"]
    for n, label in enumerate(labels):
        widths = dict.fromkeys(names, 0.0)
        for row in rows:
            widths[row["optimizer"]] += float(row["us"]) * (kinds[row["kernel"]] == n) / 1e3
        if any(widths.values()):
            axis.barh(names, [widths[x] for x in names], left=[left[x] for x in names], color=f"C{n}", label=label)
        left = {x: left[x] + widths[x] for x in names}
    axis.set(xlabel=f"ms of the device a step, rank {rows[0]['r']}")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and write what they found; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--ranks", type=int, nargs="+", help="8, 16, 64 and 128 by default")
    parser.add_argument("--seconds", type=float, default=285.0, help="when to start nothing more")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, nothing worth reading")
    run = Run(parser.parse_args(arguments))
    parts = parser.parse_args(arguments).parts
    if run.device == "cuda" and not (torch.cuda.is_available() and kernels.OPS):
        print("benchmarks/device.py needs triton and a CUDA device; --dry-run tries the script without them")
        return 2
    run.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Row]] = {}
    notes = []
    for part in parts:
        start, rows = time.monotonic(), results.setdefault(part, [])
        try:
            for row in PARTS[part](run):
                rows.append(row)
                print(part, {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        except Exception:  # the other parts are worth having
            notes.append(f"{part} failed: {traceback.format_exc(limit=-2)}")
            print(notes[-1], flush=True)
        if rows:
            write_csv(run.out / f"device_{part}.csv", rows)
        print(f"{part}: {time.monotonic() - start:.0f} s, {run.left:.0f} s left", flush=True)
    report(run, results, notes)
    return 1 if notes else 0


if __name__ == "__main__":
    sys.exit(main())
