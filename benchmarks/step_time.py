"""Time of one optimizer step on LoRA adapters, as a ratio to torch's fused AdamW of the same run.

    python benchmarks/step_time.py                       # all parts, sizes for a CPU
    python benchmarks/step_time.py --device cuda         # full sizes; times by CUDA events (written, never run)
    python benchmarks/step_time.py --parts blocks --tokens 8

Each optimizer is timed beside the baseline, blocks of a whole cadence (10 steps) in turn. Parts:

- ``axes``: growth with rank, pairs and d, one at a time around a centre;
- ``blocks``: few pairs, where optimizers with d×d factors are bearable;
- ``models``: the adapters of three published models (`shapes`);
- ``split``: GritKFAC's update, outer factors and rank-side statistics, by leaving out one after the other;
- ``capture``: forward and backward of the demo's model with and without the hooks.

Rows of results/step_time.csv that the run measures anew are replaced.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from adapters import BASELINE, Adapters, Factory, adamw, grit, heavy, light
from harness import RESULTS, Row, interleave, merge_csv, ratios, stamp, summary, table
from shapes import MODELS, Shape, square

CADENCE = 10  # steps between new matrices, for everybody
NEVER = 10**9
GROWN = (
    BASELINE, "AdamW foreach", "GritKFAC polar", "GritKFAC eigen", "PEFT Riemannian", "PEFT LoRA-FA", "Muon",
)  # fmt: skip
# ranks, pairs, d; the centre; models; blocks' d
SIZES: dict[str, dict[str, Any]] = {
    "quick": {"r": (4, 16), "pairs": (8, 16), "d": (128, 256), "centre": (8, 8, 128), "models": (), "blocks": 128},
    "cpu": {
        "r": (4, 8, 16, 32, 64, 128), "pairs": (32, 64, 128, 256, 512), "d": (512, 1024, 2048, 4096, 8192),
        "centre": (16, 64, 1024), "models": ("ViT-B", "Qwen2.5-0.5B", "Llama-3-8B"), "blocks": 512,
    },
    "cuda": {
        "r": (4, 8, 16, 32, 64, 128), "pairs": (32, 64, 128, 256, 512), "d": (512, 1024, 2048, 4096, 8192),
        "centre": (16, 224, 4096), "models": tuple(MODELS), "blocks": 1024,
    },
}  # fmt: skip


def work(make: Factory, shape: Shape, r: int, args: argparse.Namespace) -> tuple[Any, Any]:
    """Return what to do before a step, and the step, of one optimizer on adapters of its own."""
    adapters = Adapters(shape, r, args.device)
    optimizer = make(adapters)
    observes = any(g.get("statistics") == "activation" for g in optimizer.param_groups)

    def before() -> None:
        if observes:
            adapters.observe(args.tokens)
        else:
            adapters.arrive()

    return before, optimizer.step


def clock(args: argparse.Namespace) -> Callable[[], float]:
    """Return what tells the time: of this process alone where one thread does all."""
    return time.process_time if args.threads == 1 else time.perf_counter


def timed(who: dict[str, Factory], shape: Shape, r: int, args: argparse.Namespace) -> Iterator[Row]:
    """Time each optimizer in turn beside the baseline, two sets of adapters in memory at a time."""
    for name, make in who.items():
        if name not in (args.optimizers or who):
            continue
        torch.manual_seed(0)
        works = {name: work(make, shape, r, args)}
        if name != BASELINE:
            works[BASELINE] = work(adamw(fused=True), shape, r, args)
        times = interleave(works, args.rounds, CADENCE, args.device, clock=clock(args))
        del works
        gc.collect()
        yield {"optimizer": name, **summary(times[name]), **ratios(times, name, BASELINE), "rounds": args.rounds}


def axes(args: argparse.Namespace, sizes: dict[str, Any]) -> Iterator[Row]:
    """Grow one size at a time."""
    who = {name: make for name, make in light().items() if name in GROWN}
    centre = dict(zip(("r", "pairs", "d"), sizes["centre"], strict=True))
    for axis in centre:
        for value in sizes[axis]:
            at = {**centre, axis: value}
            for row in timed(who, square(at["pairs"], at["d"]), at["r"], args):
                yield {"part": "axes", "axis": axis, **at, **row}


def blocks(args: argparse.Namespace, sizes: dict[str, Any]) -> Iterator[Row]:
    """Everybody on eight pairs."""
    at = {"r": 16, "pairs": 8, "d": sizes["blocks"]}
    for row in timed({**light(), **heavy()}, square(at["pairs"], at["d"]), at["r"], args):
        yield {"part": "blocks", **at, **row}


def models(args: argparse.Namespace, sizes: dict[str, Any]) -> Iterator[Row]:
    """The light ones on the adapters of published models, rank 16."""
    for name in sizes["models"]:
        for row in timed(light(), MODELS[name], 16, args):
            yield {"part": "models", "model": name, "r": 16, "pairs": MODELS[name].pairs, **row}


def split(args: argparse.Namespace, sizes: dict[str, Any]) -> Iterator[Row]:
    """GritKFAC with its work left out piece by piece."""
    r, pairs, d = sizes["centre"]
    observed = {"statistics": "activation"}
    stages = {
        BASELINE: adamw(fused=True),
        "update": grit(outer_rank=0),
        "update + outer factors": grit(),
        "update + outer factors + statistics": grit(inverse_every=NEVER, **observed),
    }
    for row in timed(stages, square(pairs, d), r, args):
        yield {"part": "split", "r": r, "pairs": pairs, "d": d, **row}


def capture(args: argparse.Namespace, sizes: dict[str, Any]) -> Iterator[Row]:
    """Forward and backward of the demo's model with the hooks off and on."""
    from curvopt import GritKFAC
    from curvopt.demo import task as demo

    x = torch.randint(0, 256, (16, 128), device=args.device)
    works: dict[str, Any] = {}
    for name, statistics in (("hooks off", "none"), ("hooks on", "activation")):
        model = demo.lora_model(demo.untrained_model(demo.PretrainConfig()), rank=8).to(args.device)
        optimizer = GritKFAC(model, statistics=statistics)

        def run(model: Any = model) -> None:
            model(input_ids=x, labels=x).loss.backward()

        works[name] = optimizer.zero_grad, run
    times = interleave(works, 2 * args.rounds, 2, args.device, clock=clock(args))
    for name in works:
        yield {
            "part": "capture", "pairs": 28, "r": 8, "d": 128, "optimizer": name, **summary(times[name]),
            **ratios(times, name, "hooks off"), "rounds": 2 * args.rounds,
        }  # fmt: skip


PARTS = {"axes": axes, "blocks": blocks, "models": models, "split": split, "capture": capture}
KEY = ("part", "axis", "model", "r", "pairs", "d", "optimizer")
COLUMNS = (*KEY, "median_ms", "ratio", "ratio_p10", "ratio_p90")


def main() -> None:
    """Run the parts asked for, print each row, merge the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--optimizers", nargs="+", help="measure these, and keep the other rows")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7, help="counted blocks of ten steps")
    parser.add_argument("--tokens", type=int, default=8, help="rows that the hooks see before a step (not timed)")
    parser.add_argument("--threads", type=int, default=1, help="with one, other processes do not count")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into results/quick")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = SIZES["quick" if args.quick else args.device]
    path = RESULTS / ("quick" if args.quick else ".") / "step_time.csv"
    mark = stamp(args.device)
    for part in args.parts:
        rows: list[Row] = []
        for row in PARTS[part](args, sizes):
            rows.append({**dict.fromkeys(COLUMNS, ""), **row, **mark})
            merge_csv(path, KEY, rows[-1:])  # at once: a long part may be interrupted
        print(table([{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows], COLUMNS))


if __name__ == "__main__":
    main()
