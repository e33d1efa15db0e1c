"""Each op: Triton kernel against torch reference against the best formulation in plain torch. Needs a CUDA device.

    python benchmarks/kernels.py [--ranks 8 16 64] [--layers 224] [--width 4096] [--tokens 16384]

Times are medians with the 20 % and 80 % quantiles of triton's do_bench; achieved bytes per second (what the op must
read and write, once) stand beside the device's own copy rate in the same run. Rows go to results/kernels.csv.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import harness
import op_times

from curvopt import kernels


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
        for op, implementation, moved, function in op_times.all_of(L, r, d, arguments.tokens, "cuda"):
            median, low, high = do_bench(function, quantiles=[0.5, 0.2, 0.8])
            rate = moved / (1e-3 * median)
            table.append({
                "op": op, "implementation": implementation, "rank": r, "layers": L, "width": d,
                "tokens": arguments.tokens, "ms": median, "ms_20": low, "ms_80": high,
                "bytes_per_second": rate, "copy_bytes_per_second": peak, "triton": triton.__version__,
                "cuda": torch.version.cuda,
            })  # fmt: skip
            print(f"{op:20} {implementation:18} r={r:<4} {1e3 * median:9.1f} us  {100 * rate / peak:5.1f} % of copy")
    harness.write_csv(harness.RESULTS / "kernels.csv", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
