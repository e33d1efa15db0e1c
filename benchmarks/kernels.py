"""Each op: Triton kernel against torch reference against the best formulation in plain torch. Needs a CUDA device.

    python benchmarks/kernels.py [--ranks 8 16 64] [--layers 224] [--width 4096] [--tokens 16384]

Times are medians with the 20 % and 80 % quantiles of triton's do_bench; achieved bytes per second (what the op must
read and write, once) stand beside the device's own copy rate in the same run. Rows go to results/kernels.csv.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import harness

from curvopt import kernels
from curvopt.functional.update import Hyper, Slab
from curvopt.ops import REFERENCE

Work = tuple[str, str, int, Callable[[], Any]]  # op, implementation, bytes, what to time


def factors(L: int, r: int) -> Tensor:
    """Return power-law second moments."""
    x = torch.randn(L, 4 * r, r, device="cuda") / torch.arange(1, r + 1, device="cuda")
    return (x.mT @ x).contiguous()


def slabs(L: int, r: int, d: int) -> list[Slab]:
    """Return the A and B sides of L pairs."""
    made = []
    for side in (1, 2):
        shape = (L, r, d) if side == 1 else (L, d, r)
        p, g, m = (torch.randn(shape, device="cuda") for _ in range(3))
        Q = torch.linalg.qr(torch.randn(L, r, r, device="cuda")).Q.contiguous()
        step = torch.zeros((), device="cuda")
        made.append(Slab(list(p.unbind()), g, m, m.square(), step, side, Q, Hyper(1e-4, 0.9, 0.999, 1e-8, 0.01)))
    return made


def inverses(L: int, r: int) -> Iterator[Work]:
    """Factors of both sides of all pairs."""
    S, moved = factors(2 * L, r), 2 * 2 * L * r * r * 4
    eye = torch.eye(r, device="cuda")

    def cholesky() -> Tensor:
        scale = r / S.diagonal(dim1=1, dim2=2).sum(-1)
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(S * scale[:, None, None] + 1e-2 * eye)[0])

    def by_eigh() -> Tensor:
        values, Q = torch.linalg.eigh(S)
        return (Q * (values.clamp(min=0) + 1e-2).rsqrt().unsqueeze(-2)) @ Q.mT

    for op, best in (("damped_inverse", cholesky), ("damped_inverse_root", by_eigh)):
        yield op, "kernel", moved, lambda op=op: kernels.OPS[op](S, 1e-2)
        yield op, "reference", moved, lambda op=op: REFERENCE[op](S, 1e-2)
        yield op, "torch", moved, best
    yield "eigenbasis", "kernel", moved, lambda: kernels.OPS["eigenbasis"](S)
    yield "eigenbasis", "reference", moved, lambda: REFERENCE["eigenbasis"](S)
    yield "eigenbasis", "torch", moved, lambda: torch.linalg.eigh(S)


def updates(L: int, r: int, d: int) -> Iterator[Work]:
    """One step over all pairs; the best of torch is its fused AdamW, which preconditions nothing."""
    given, found = slabs(L, r, d), torch.zeros((), device="cuda")
    numbers = 2 * L * r * d
    params = [torch.nn.Parameter(p.clone()) for s in given for p in s.params]
    for p, g in zip(params, [g for s in given for g in s.grads], strict=True):
        p.grad = g.clone()
    adamw = torch.optim.AdamW(params, lr=1e-4, fused=True)
    # momentum reads m again and writes in a second launch; polar hands its step to one
    bytes_per_number = {"polar": 36, "adam": 28, "eigen": 28, "whiten": 28, "momentum": 36}
    for rule, each in bytes_per_number.items():
        op, moved = f"{rule}_update", each * numbers
        yield op, "kernel", moved, lambda op=op: kernels.OPS[op](given, found)
        yield op, "reference", moved, lambda op=op: REFERENCE[op](given, found)
        yield op, "torch fused AdamW", 28 * numbers, adamw.step


def rows(L: int, r: int, d: int) -> Iterator[Work]:
    """Mask and scale B sides."""
    X = torch.randn(L, d, r, device="cuda")
    k, scale = torch.full((L,), r // 2, device="cuda"), torch.rand(L, r, device="cuda") + 0.5
    mask = (torch.arange(r, device="cuda") < k[:, None])[:, None, :].float()
    moved = 2 * X.numel() * 4
    for op, operand, best in (
        ("truncate_", k, lambda: X.mul_(mask)),
        ("scale_rows_", scale, lambda: X.mul_(scale[:, None, :])),
    ):
        yield op, "kernel", moved, lambda op=op, o=operand: kernels.OPS[op](X, o, 2)
        yield op, "reference", moved, lambda op=op, o=operand: REFERENCE[op](X, o, 2)
        yield op, "torch", moved, best


def moments(r: int, tokens: int) -> Iterator[Work]:
    """The Gram matrices of one block of seven linears: u and d of each."""
    from curvopt.kernels.moments import gram_many

    zs = [torch.randn(tokens, r, device="cuda", dtype=torch.bfloat16) for _ in range(14)]
    moved = sum(z.numel() * 2 for z in zs)
    yield "gram", "kernel", moved, lambda: gram_many(zs)
    yield "gram", "reference", moved, lambda: [REFERENCE["gram"](z) for z in zs]
    yield "gram", "torch", moved, lambda: [z.mT @ z for z in zs]
    S, S_new = factors(14, r), factors(14, r)
    t = torch.ones(14, dtype=torch.int64, device="cuda")
    for name, ops in (("kernel", kernels.OPS), ("reference", REFERENCE)):
        yield "ema_", name, 3 * S.numel() * 4, lambda ops=ops: ops["ema_"](S, S_new, t, 0.95)
    yield "ema_", "torch", 3 * S.numel() * 4, lambda: S.lerp_(S_new, 0.05)


def copy_rate(bench: Callable[..., Any]) -> float:
    """Return the bytes a second of a device-to-device copy of 1 GiB, reads and writes counted."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (1e-3 * bench(lambda: target.copy_(source), quantiles=[0.5]))


def main() -> int:
    """Time everything and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--layers", type=int, default=224, help="pairs (224: all linears of an 8 B Llama)")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not kernels.OPS:
        print("benchmarks/kernels.py needs triton and a CUDA device: there is nothing to time here")
        return 2
    import triton
    from triton.testing import do_bench

    peak = copy_rate(do_bench)
    print(f"copy {peak / 1e12:.2f} TB/s on {torch.cuda.get_device_name()}")
    table = []
    for r in arguments.ranks:
        L, d = arguments.layers, arguments.width
        for work in (inverses(L, r), updates(L, r, d), rows(L, r, d), moments(r, arguments.tokens)):
            for op, implementation, moved, function in work:
                median, low, high = do_bench(function, quantiles=[0.5, 0.2, 0.8])
                rate = moved / (1e-3 * median)
                table.append({
                    "op": op, "implementation": implementation, "rank": r, "layers": L, "width": d,
                    "tokens": arguments.tokens, "ms": median, "ms_20": low, "ms_80": high,
                    "bytes_per_second": rate, "copy_bytes_per_second": peak, "triton": triton.__version__,
                    "cuda": torch.version.cuda,
                })  # fmt: skip
                print(
                    f"{op:20} {implementation:18} r={r:<4} {1e3 * median:9.1f} us  {100 * rate / peak:5.1f} % of copy"
                )
    harness.write_csv(harness.RESULTS / "kernels.csv", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
