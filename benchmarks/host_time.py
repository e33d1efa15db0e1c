"""What a step and the hooks cost the host on a device: Python alone, every kernel launch left out. Needs no GPU.

    python benchmarks/host_time.py                 # results/host_time.csv
    python benchmarks/host_time.py --pairs 8 --quick

Small tensors on the CPU count as being on a device: kernels are asked for, u and d wait for their products, and the one
function that launches kernels does nothing. What remains is what Python does: reading gradients and groups, comparing
addresses, preparing arguments. Times are this process's on one core, so that other processes do not count.

- ``step``: the ratio of ``step()`` to that of ``torch.optim.AdamW(fused=True)`` on the same tensors in the same run,
  steps in a row; of those without hooks. AdamW's arithmetic on so small tensors is small beside its work on the host.
- ``passes``: the same, each step after a forward and backward of its own, which leave new gradients, u and d, and
  little of the optimizer in the processor's caches. Means of ten steps, of which one observes u and d.
- ``hooks``: the ratio of forward and backward with the hooks of ``statistics="activation"`` to the same without, of a
  Llama of width 64 with 24 blocks, 168 pairs and 8 tokens, which is bound by the host as much as any: over the whole
  cadence of the default, which observes one step in ten, and where every step is observed.
"""

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from curvopt.kernels import launch, moments, tables
from harness import RESULTS, Row, interleave, merge_csv, ratios, rounded, stamp, summary, table
from torch import nn

from curvopt import GritKFAC, MatryoshkaScaledAdam, ops
from curvopt.lora import capture
from curvopt.optim import bucket

KEY = ("part", "optimizer", "pairs", "r", "d")
CONTESTANTS = {
    "GritKFAC polar, no outer factors": lambda model: GritKFAC(model, outer_rank=0),
    "GritKFAC polar": GritKFAC,
    "GritKFAC polar, activations": lambda model: GritKFAC(model, statistics="activation", inverse_every=10**9),
    "GritKFAC eigen": lambda model: GritKFAC(model, update="eigen", inverse_every=10**9),
    "GritKFAC polar, gradient": lambda model: GritKFAC(model, statistics="gradient", inverse_every=10**9),
    "MatryoshkaScaledAdam": MatryoshkaScaledAdam,
}


class Pair(nn.Module):
    """A layer that has nothing but an adapter."""

    def __init__(self, r: int, d: int) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(d, r, bias=False), nn.Linear(r, d, bias=False)


@contextmanager
def as_on_a_device() -> Iterator[list[str]]:
    """Let CPU tensors count as device tensors, and launches do nothing; yields the names of what was launched."""
    launched: list[str] = []

    def run(kernel: object, grid: tuple[int, ...], *args: object, **constants: object) -> None:
        launched.append(kernel.fn.__name__)  # type: ignore[attr-defined]
        if kernel is moments._average:  # later steps go by what was observed: everything
            for written in args[2:4]:
                written.fill_(1)  # type: ignore[attr-defined]

    with (
        mock.patch.object(launch, "run", run),
        mock.patch.object(launch, "runs_on", lambda device: True),
        mock.patch.object(tables, "capturing", lambda device: False),
        mock.patch.object(ops, "on_device", lambda sample: True),
        mock.patch.object(capture, "on_device", lambda sample: True),
        mock.patch.object(bucket, "_at_hand", lambda flag: False),
        mock.patch.object(ops.Ops, "trusts", lambda *_: True),
    ):
        yield launched


def filled(pairs: int, r: int, d: int) -> nn.Module:
    """Return pairs with gradients."""
    torch.manual_seed(0)
    model = nn.ModuleList([Pair(r, d) for _ in range(pairs)])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def passes(model: nn.Module, rows: int = 2) -> Callable[[], None]:
    """Return a forward and backward of every pair, without the arithmetic of a model."""
    x = {pair.lora_A.in_features: torch.randn(rows, pair.lora_A.in_features) for pair in model}

    def run() -> None:
        for p in model.parameters():
            p.grad = None
        sum(pair.lora_B(pair.lora_A(x[pair.lora_A.in_features])).sum() for pair in model).backward()  # type: ignore[union-attr]

    return run


def steps(args: argparse.Namespace, part: str = "step") -> Iterator[Row]:
    """Time the steps of all contestants, each in turn with fused AdamW."""
    other = filled(args.pairs, args.r, args.d)
    baseline = torch.optim.AdamW(other.parameters(), fused=True)
    for name, make in CONTESTANTS.items():
        with as_on_a_device() as launched:
            model = filled(args.pairs, args.r, args.d)
            optimizer = make(model)
            if part == "step" and getattr(optimizer, "watching", False):
                continue  # its step needs a backward before it
            before, before_other = (None, None) if part == "step" else (passes(model), passes(other))
            counts = []
            for _ in range(11):  # the last observes again
                launched.clear()
                if before is not None:
                    before()
                optimizer.step()
                counts.append(len(launched))
            count = max(counts[1:])
            works = {name: (before, optimizer.step), "AdamW fused": (before_other, baseline.step)}
            times = interleave(works, 3 if args.quick else args.rounds, 10, clock=time.process_time)
        found = {**summary(times[name]), **ratios(times, name, "AdamW fused"), "launches": count}
        yield {"part": part, "optimizer": name, "pairs": args.pairs, "r": args.r, "d": args.d, **found, **stamp("cpu")}


def hooks(args: argparse.Namespace) -> Iterator[Row]:
    """Time forward and backward with hooks and without."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    blocks = 2 if args.quick else 24
    shape = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    x = torch.randint(256, (1, 8), generator=torch.Generator().manual_seed(0))

    def work(options: dict[str, Any] | None) -> tuple[Callable[[], Any], Callable[[], Any]]:
        torch.manual_seed(0)
        config = LoraConfig(r=args.r, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(LlamaForCausalLM(shape), config)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if options is not None:
            optimizer = GritKFAC(model, lr=0.0, statistics="activation", **options)

        def before() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return before, lambda: model(input_ids=x, labels=x).loss.backward()

    names = {"GritKFAC polar, activations": {}, "GritKFAC polar, activations at every step": {"factor_every": 1}}
    with as_on_a_device():
        works = {name: work(options) for name, options in {**names, "none": None}.items()}
        times = interleave(works, 3 if args.quick else args.rounds, 10, clock=time.process_time)
    for name in names:
        found = {**summary(times[name]), **ratios(times, name, "none"), "launches": 0}
        yield {"part": "hooks", "optimizer": name, "pairs": 7 * blocks, "r": args.r, "d": 64, **found, **stamp("cpu")}


PARTS = {"step": steps, "passes": functools.partial(steps, part="passes"), "hooks": hooks}


def main() -> None:
    """Time everybody in turn and merge the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--pairs", type=int, default=224)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--d", type=int, default=16, help="small, so that the baseline has little to compute")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    rows = [row for part in args.parts for row in PARTS[part](args)]
    merge_csv(RESULTS / ("quick" if args.quick else ".") / "host_time.csv", KEY, rows)
    print(table([rounded(row, 4) for row in rows], (*KEY, "median_ms", "ratio", "ratio_p10", "ratio_p90", "launches")))


if __name__ == "__main__":
    main()
