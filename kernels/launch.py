"""Launch configurations, the one function that launches, and dispatch checks.

There is no autotuning: most kernels work in place, and a tuner replays what it times. The table below is the only
place where a tile, a warp count or a number of stages is written; the launchers, the compile report
(``python -m curvopt.kernels``) and the tests all read it. At rank 16 it was chosen by measuring on an H200 (the part
"sweep" of benchmarks/device.py), elsewhere by compiling: the largest tile that fits the shared memory of every target
without spilling registers.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANK = 128
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FLOATS = tuple(TYPES)


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        block: length of a tile along its long side; 0 where the tile is the r×r matrix itself.
        warps: warps per program.
        stages: software pipelining depth of the loads.
        group: matrices per program, or tiles.
        precision: of products of float32 operands; never plain tf32.
        stack: bytes of stack a thread may take.
    """

    block: int = 0
    warps: int = 4
    stages: int = 1
    group: int = 1
    precision: str = "ieee"
    stack: int = 16


# (op, padded rank) -> configuration on every target not named in EXCEPTIONS
TABLE: dict[tuple[str, int], Config] = {
    ("inverse", 4): Config(group=32, warps=4),
    ("inverse", 8): Config(group=4, warps=1),
    ("inverse", 16): Config(warps=2),
    ("inverse", 32): Config(warps=2),
    ("inverse", 64): Config(warps=8),
    # the stack at 128 is what is kept across the loops; no instruction inside an inner loop touches it (tested)
    ("inverse", 128): Config(warps=16, stack=192),
    ("eigenbasis", 4): Config(group=4, warps=1),
    ("eigenbasis", 8): Config(group=2, warps=1),
    ("eigenbasis", 16): Config(warps=2),
    ("eigenbasis", 32): Config(warps=4),
    ("eigenbasis", 64): Config(warps=8),
    ("eigenbasis", 128): Config(warps=16, stack=320),
    # operands of matrix units take a quarter of the shared loads of multiply-adds
    ("update", 16): Config(block=64, warps=2, precision="tf32x3"),
    ("update", 32): Config(block=32, warps=4, precision="tf32x3"),
    ("update", 64): Config(block=32, warps=4, precision="tf32x3"),
    ("update", 128): Config(block=16, warps=8, precision="tf32x3", stack=32),
    # as many tiles a program that its Gram matrix, written and read, is at most one of the 37 bytes an element moves
    # few warps: operands of multiply-adds are loaded from shared memory once a warp, which was what held it up
    ("polar", 16): Config(block=32, warps=2, group=8, precision="tf32x3"),
    ("polar", 32): Config(block=32, warps=4, group=16, precision="tf32x3"),
    ("polar", 64): Config(block=32, warps=4, group=16, precision="tf32x3", stack=32),
    ("polar", 128): Config(block=16, warps=8, group=64, precision="tf32x3"),
    ("root", 16): Config(warps=2),
    ("root", 32): Config(warps=4),
    ("root", 64): Config(block=32, warps=8, precision="tf32x3"),
    # the stack at 128 (sm_80) is a few numbers kept across the products
    ("root", 128): Config(block=32, warps=16, precision="tf32x3", stack=48),
    # by the larger of r and k
    ("outer", 16): Config(block=32, warps=1, group=16, stages=3, precision="tf32x3"),
    ("outer", 32): Config(block=32, warps=2, group=16, precision="tf32x3", stack=32),
    ("outer", 64): Config(block=32, warps=4, group=16, precision="tf32x3"),
    # the stack at 128 (r = 96, k = 128, 16-bit) holds what is kept across the products
    ("outer", 128): Config(block=16, warps=8, group=64, precision="tf32x3", stack=208),
    ("outer_map", 16): Config(warps=2),
    ("outer_map", 32): Config(warps=4),
    ("outer_map", 64): Config(warps=8, stack=32),
    # r alone reaches 128 there; the stack (sm_100) is a few numbers kept across the products
    ("outer_map", 128): Config(warps=16, stack=80),
    ("total", 0): Config(block=256, warps=2),
    ("prepare", 0): Config(warps=1),
    ("nonfinite", 0): Config(block=4096, warps=4),
    **{("average", rp): Config(warps=w) for rp, w in ((4, 1), (8, 1), (16, 1), (32, 2), (64, 4), (128, 8))},
    # 16-bit rows: rp 16 and 32 are packed to 64 wide where r divides 64
    ("gram16", 16): Config(block=64, warps=4, stages=3),
    ("gram16", 32): Config(block=64, warps=4, stages=3),
    ("gram16", 64): Config(block=64, warps=4, stages=3),
    ("gram16", 128): Config(block=64, warps=8, stages=3),
    ("gram32", 16): Config(block=64, warps=2, stages=2, precision="tf32x3"),
    ("gram32", 32): Config(block=32, warps=4, stages=2, precision="tf32x3"),
    ("gram32", 64): Config(block=32, warps=4, stages=2, precision="tf32x3"),
    ("gram32", 128): Config(block=32, warps=8, stages=2, precision="tf32x3"),
}

# (op, padded rank, target) -> what differs there; None where the kernel is not shipped and the reference runs
EXCEPTIONS: dict[tuple[str, int, str], Config | None] = {
    ("gram32", 128, "sm_80"): None,  # spills half a kilobyte in the loop
    # triton 3.7's passes for tensor memory fail on the transposed operands of tf32x3 at this size
    ("update", 16, "sm_100"): Config(block=64, warps=4),
    ("update", 64, "sm_100"): Config(block=32, warps=8, precision="tf32x3"),
    # tf32x3 does not exist there; float32 matrix instructions do
    ("update", 16, "gfx942"): Config(block=64, warps=4),
    ("update", 32, "gfx942"): Config(block=32, warps=4),
    ("update", 64, "gfx942"): Config(block=32, warps=4),
    ("update", 128, "gfx942"): Config(block=16, warps=8),
    # with outer factors it spills, at k = 16 in the loop: right, and slower than need be
    ("polar", 128, "sm_80"): Config(block=16, warps=8, group=64, precision="tf32x3", stack=384),
    ("polar", 16, "gfx942"): Config(block=64, warps=4, group=4),
    ("polar", 32, "gfx942"): Config(block=32, warps=4, group=16),
    ("polar", 64, "gfx942"): Config(block=32, warps=4, group=16),
    ("polar", 128, "gfx942"): Config(block=16, warps=8, group=64, stack=672),
    ("outer", 16, "gfx942"): Config(block=64, warps=4, group=4),
    ("outer", 32, "gfx942"): Config(block=32, warps=4, group=16),
    ("outer", 64, "gfx942"): Config(block=32, warps=8, group=16),
    ("outer", 128, "gfx942"): Config(block=16, warps=8, group=64),
    ("outer", 16, "sm_100"): Config(block=32, warps=2, group=8, precision="tf32x3"),
    # two sums of 128×128 do not fit the tensor memory, and triton 3.7 then compiles to a trap
    ("outer", 128, "sm_100"): Config(block=16, warps=8, group=64),
    ("outer_map", 128, "gfx942"): None,  # keeps 600 bytes of stack
    ("root", 64, "gfx942"): Config(block=32, warps=8),
    ("root", 128, "gfx942"): Config(block=32, warps=8),
    ("gram32", 16, "gfx942"): Config(block=64, warps=2),
    ("gram32", 32, "gfx942"): Config(block=32, warps=4),
    ("gram32", 64, "gfx942"): Config(block=32, warps=4),
    ("gram32", 128, "gfx942"): Config(block=32, warps=8),
}

# what else compiles for sm_90 and might be faster elsewhere: for benchmarks to try, never launched otherwise
ALTERNATIVES: dict[tuple[str, int], tuple[Config, ...]] = {
    ("polar", 16): (
        Config(block=32, warps=1, group=8, precision="tf32x3"),
        Config(block=16, warps=1, group=16, precision="tf32x3"),
        Config(block=64, warps=4, group=8, precision="tf32x3"),
        Config(block=32, warps=2, group=16, precision="tf32x3"),
    ),
    ("update", 16): (
        Config(block=64, warps=4, precision="tf32x3"),
        Config(block=128, warps=4, precision="tf32x3"),
    ),
    ("outer", 16): (
        Config(block=32, warps=1, group=16, precision="tf32x3"),
        Config(block=32, warps=2, group=16, precision="tf32x3"),
        Config(block=16, warps=1, group=32, precision="tf32x3"),
    ),
    ("outer_map", 16): (Config(warps=1),),
    ("polar", 64): (
        Config(block=32, warps=2, group=16, precision="tf32x3"),
        Config(block=16, warps=2, group=32, precision="tf32x3"),
        Config(block=64, warps=4, group=8, precision="tf32x3"),
    ),
    ("update", 64): (
        Config(block=32, warps=2, precision="tf32x3"),
        Config(block=64, warps=4, precision="tf32x3"),
    ),
    ("outer", 64): (
        Config(block=32, warps=2, group=16, precision="tf32x3"),
        Config(block=32, warps=4, group=16, stages=2, precision="tf32x3"),
    ),
    ("root", 64): (Config(block=32, warps=4, precision="tf32x3"),),
}


def config(op: str, rp: int, target: str | None = None) -> Config | None:
    """Return the configuration of a kernel for a padded rank, or None where it is not shipped.

    Args:
        op: name of the kernel in the table.
        rp: padded rank.
        target: architecture, or None for the one of the current device.
    """
    target = target or here()
    return EXCEPTIONS[op, rp, target] if (op, rp, target) in EXCEPTIONS else TABLE.get((op, rp))


def shipped(op: str, rp: int) -> Config:
    """Return the configuration of a kernel that is shipped wherever its callers got to, as their ``supports`` saw."""
    c = config(op, rp)
    assert c is not None, f"{op} at padded rank {rp} is not shipped on {here()}"
    return c


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel. Every launch of this package goes through here, so that it can be counted or left out.

    Triton finds out at every call which compiled kernel fits the arguments, which takes the host ten times as long as
    the launch itself. What it found is kept, by all that it looks at: constants, types, alignment, device. It launches
    on the current device, which is made that of the tensors.

    Args:
        kernel: the jitted function, whose compile-time arguments come last.
        grid: programs along each dimension.
        args: run-time arguments.
        constants: compile-time arguments, and ``num_warps`` and ``num_stages``.
    """
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(kernel, grid, *args, **constants)
        return
    if not _KEEPS:
        kernel[grid](*args, **constants)
        return
    key = (id(kernel), device, *map(_kind, args), *constants.items())
    found = _compiled.get(key)
    if found is None:
        made = kernel[grid](*args, **constants)
        _compiled[key] = made, [constants[name] for name in kernel.arg_names[len(args) :]]
    else:
        made, rest = found
        made[(*grid, 1, 1)[:3]](*args, *rest)


def _kind(x: Any) -> Any:
    """Return what a kernel is compiled for of an argument."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    return float if isinstance(x, float) else x


def runs_on(device: torch.device) -> bool:
    """Return whether kernels run on tensors of this device: a shipped GPU, or the host in Triton's interpreter."""
    return device.type == "cpu" if interpreting() else device.type == "cuda" and here() in TARGETS


def split(x: float) -> tuple[float, float]:
    """Return x as a sum of two float32 numbers, as scalar arguments of kernels are float32; exact to about 2⁻⁴⁸."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def padded(r: int, least: int) -> int:
    """Return the power of two, at least ``least``, that holds a rank."""
    return max(least, 1 << (r - 1).bit_length())


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter, on host tensors (decided when triton was imported)."""
    return not isinstance(_probe, triton.runtime.jit.JITFunction)


@triton.jit
def _probe() -> None:
    pass


# a compiled kernel is launched with its compile-time arguments too, as in these versions; host functions are no kernels
_KEEPS = not interpreting() and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def here() -> str:
    """Return the target of the current device; a CUDA device between two targets counts as the older one."""
    if not torch.cuda.is_available():
        return TARGETS[1]
    return _target_of(torch.cuda.current_device())


@cache
def _target_of(device: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    known = [t for t in TARGETS if t.startswith("sm_") and int(t[3:]) <= 10 * major + minor]
    return known[-1] if known else f"sm_{major}{minor}"


def reads(number: float | Tensor, device: torch.device) -> bool:
    """Return whether kernels on a device can read a number: given as it is, or as a tensor of one element there."""
    return not isinstance(number, Tensor) or (number.device == device and number.numel() == 1)


def plain(tensors: Iterable[Any], dtypes: Iterable[torch.dtype] = FLOATS) -> bool:
    """Return whether all tensors are dense, contiguous, of a known dtype, and on one device that runs kernels.

    Wrapper subclasses (DTensor) have no single data pointer, so anything but Tensor and Parameter fails.
    """
    tensors = list(tensors)
    if not set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}:
        return False
    return (
        len(set(map(attrgetter("device"), tensors))) == 1
        and runs_on(tensors[0].device)
        and set(map(attrgetter("dtype"), tensors)) <= set(dtypes)
        and all(map(Tensor.is_contiguous, tensors))
    )
