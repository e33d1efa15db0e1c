"""What a step costs the host on a device: Python alone, with every kernel launch left out. Needs no GPU.

    python benchmarks/host_time.py                 # results/host_time.csv
    python benchmarks/host_time.py --pairs 8 --quick

Small tensors on the CPU count as being on a device: kernels are asked for, and the one function that launches them
does nothing. What remains is what Python does in a step: reading gradients and groups, comparing addresses, preparing
arguments. The ratio is to ``torch.optim.AdamW(fused=True).step()`` on the same tensors on the CPU in the same run; its
arithmetic on so small tensors is small beside its own work on the host.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from curvopt.kernels import launch, tables
from harness import RESULTS, Row, interleave, merge_csv, ratios, rounded, stamp, summary, table
from torch import nn

from curvopt import GritKFAC, MatryoshkaScaledAdam, ops

KEY = ("optimizer", "pairs", "r", "d")
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

    with (
        mock.patch.object(launch, "run", run),
        mock.patch.object(launch, "runs_on", lambda device: True),
        mock.patch.object(tables, "capturing", lambda device: False),
        mock.patch.object(ops, "on_device", lambda sample: True),
        mock.patch.object(ops.Ops, "trusts", lambda self, name, rank, sample: True),
    ):
        yield launched


def filled(pairs: int, r: int, d: int) -> nn.Module:
    """Return pairs with gradients."""
    torch.manual_seed(0)
    model = nn.ModuleList([Pair(r, d) for _ in range(pairs)])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def observe(model: nn.Module, rows: int) -> None:
    """Let the hooks see u and d of every pair, as a forward and backward would, without the arithmetic of a model."""
    for pair in model:
        pair.lora_A(torch.randn(rows, pair.lora_A.in_features)).sum().backward()


def main() -> None:
    """Time everybody in turn and merge the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=224)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--d", type=int, default=16, help="small, so that the baseline has little to compute")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / ("quick" if args.quick else ".") / "host_time.csv"
    baseline = torch.optim.AdamW(filled(args.pairs, args.r, args.d).parameters(), fused=True)
    rows: list[Row] = []
    with as_on_a_device() as launched:
        for name, make in CONTESTANTS.items():
            model = filled(args.pairs, args.r, args.d)
            optimizer = make(model)
            observes = any(g.get("statistics") == "activation" for g in optimizer.param_groups)

            def before(model: nn.Module = model, observes: bool = observes) -> None:
                if observes:
                    observe(model, 2)

            before()
            optimizer.step()
            launched.clear()
            before()
            optimizer.step()
            count = len(launched)
            works = {name: (before, optimizer.step), "AdamW fused": (None, baseline.step)}
            times = interleave(works, 3 if args.quick else args.rounds, 3)
            found = {**summary(times[name]), **ratios(times, name, "AdamW fused"), "launches": count}
            rows.append({"optimizer": name, "pairs": args.pairs, "r": args.r, "d": args.d, **found, **stamp("cpu")})
    merge_csv(path, KEY, rows)
    columns = (*KEY, "median_ms", "ratio", "ratio_p10", "ratio_p90", "launches")
    print(table([rounded(row, 4) for row in rows], columns))


if __name__ == "__main__":
    main()
