"""Every shipped configuration, compiled to machine code for a target without a GPU, and what that code takes.

`cases` reads the same table as the launchers. `build` compiles one case and reads registers, stack and shared memory
out of the result; a case fits if its shared memory is within the target's limit and its stack (spilled registers, and
what little the compiler puts there of its own accord) within the configuration's allowance.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import eigen, inverse, launch, moments, outer, outer_map, polar, root, update_tiles, whole

F32, I32, I64, NUMBER = "*fp32", "*i32", "*i64", "fp32"
MODES = {
    name: getattr(update_tiles, name.upper())
    for name in ("adam", "eigen", "whiten", "moments", "graft", "rows", "polar")
}
LEAST = 8  # registers of a kernel that does anything
TYPE_NAMES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}


@dataclass(frozen=True)
class Case:
    """One kernel with all its constants.

    Attributes:
        kernel: name of the op in the table.
        label: what distinguishes the case.
        function: the jitted function.
        types: type of every run-time argument.
        constants: value of every compile-time argument.
        config: warps, stages, stack allowance.
        unaligned: run-time arguments not known to be multiples of 16.
    """

    kernel: str
    label: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    config: launch.Config
    unaligned: tuple[str, ...] = ()


@dataclass
class Built:
    """What a case compiled to; ``error`` if it did not."""

    case: Case
    target: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    error: str = ""
    asm: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return "fits", or what does not."""
        if self.error:
            return "does not compile: " + self.error
        if self.shared > launch.SHARED_LIMIT[self.target]:
            return "does not fit: shared memory"
        if self.target.startswith("sm_") and self.registers < LEAST:
            return "compiles to a trap"
        return "fits" if self.stack <= self.case.config.stack else "spills"


def cases(target: str) -> Iterator[Case]:
    """Yield the shipped cases of a target."""
    for op, rp in launch.TABLE:
        config = launch.config(op, rp, target)
        if config is not None:
            yield from MAKERS[op](op, rp, config)


def _inverse(op: str, rp: int, c: launch.Config) -> Iterator[Case]:
    types = {"S": F32, "k": I64, "previous": F32, "damping": NUMBER, "out": F32, "L": "i32"}
    own = {"HAS_K": True, "HAS_PREVIOUS": True, "ON_DEVICE": False, "R": rp, "RP": rp, "G": c.group}
    yield Case(op, f"r={rp}", inverse._inverse, types, own, c, ("L", "damping"))


def _root(op: str, rp: int, c: launch.Config) -> Iterator[Case]:
    memory = rp > root.REGISTER_RANK
    own: dict[str, Any] = {"HAS_K": True, "ON_DEVICE": False, "STAGES": 5, "RP": rp, "BD": c.block if memory else rp}
    own |= {"PREC": c.precision, "IN_MEMORY": memory}
    types = {"S": F32, "k": I64, "previous": F32, "coefficients": F32, "damping": NUMBER, "work": F32, "out": F32}
    for r in (rp, 4) if rp == 16 else (rp,):
        alone = own | {"HAS_PREVIOUS": True, "R": r}
        yield Case(op, f"r={r} fp32", root._root, types | {"L": "i32"}, alone, c, ("L", "damping"))
        polar = own | {"R": r}
        given = {"grams": F32, "fixed": I64, "coefficients": F32, "damping": NUMBER, "work": F32, "out": F32}
        yield Case(op, f"r={r} fp32 equalise", root._equalise, given, polar, c, ("damping",))


def _eigenbasis(op: str, rp: int, c: launch.Config) -> Iterator[Case]:
    types = {"S": F32, "k": I64, "previous": F32, "work": F32, "out": F32, "values": F32, "L": "i32"}
    own = {"HAS_K": True, "HAS_PREVIOUS": True, "R": rp, "RP": rp, "G": c.group, "SWEEPS": eigen.SWEEPS}
    own["IN_MEMORY"] = rp > eigen.REGISTER_RANK
    yield Case(op, f"r={rp}", eigen._jacobi, types, own, c, ("L",))


def _update(op: str, rp: int, c: launch.Config) -> Iterator[Case]:
    types = {"tiles": I32, "fixed": I64, "gradients": I64, "bases": I64, "maps": F32, "meta": I32, "scalars": F32}
    types["partials"] = F32
    variants = [(rule, rp, 0, "fp32", "fp32", "fp32") for rule in MODES]
    for rule in ("eigen", "polar"):
        variants += [(rule, rp, 0, "bf16", "fp32", "bf16"), (rule, 3 * rp // 4, 0, "bf16", "bf16", "bf16")]
    # with outer factors: the larger of r and k is the padded rank; "polar" reads the gradient elsewhere
    variants += [(rule, rp, 16, "fp32", "fp32", "fp32") for rule in ("adam", "eigen", "moments")]
    variants += [("eigen", 16, rp, "fp32", "fp32", "fp32"), ("eigen", 3 * rp // 4, rp, "bf16", "bf16", "bf16")]
    for rule, r, k, p, g, s in dict.fromkeys(variants):
        own: dict[str, Any] = {"MODE": MODES[rule].value, "BD": c.block, "NP": 512, "PREC": c.precision, "ALIGN": True}
        own |= _widths(r, k)
        own |= {"PT": TYPE_NAMES[p], "GT": TYPE_NAMES[g], "ST": TYPE_NAMES[s], "HAS_M": True, "HAS_K": True}
        last = {"steps": "*" + p if rule == "polar" else F32}
        yield Case(
            op, f"{rule} r={r}{f' k={k}' * (k > 0)} p={p} g={g} state={s}", update_tiles._update, types | last, own, c
        )
    for of in ("params", "moments"):
        own = {"MOMENTS": of == "moments", "R": rp, "RP": rp, "BD": c.block, "XT": tl.float32, "PREC": c.precision}
        own |= {"HAS_M": True, "HAS_K": True, "ALIGN": True}
        given = {"tiles": I32, "fixed": I64, "meta": I32, "M": F32, "ranks": I64, "found_inf": F32}
        yield Case(op, f"transform {of} r={rp} fp32", whole._transform, given, own, c)


def _polar(op: str, rp: int, c: launch.Config) -> Iterator[Case]:
    types = {"parts": I32, "fixed": I64, "gradients": I64, "bases": I64, "maps": F32, "meta": I32, "scalars": F32}
    own: dict[str, Any]
    variants = [(rp if n % 2 == 0 else 3 * rp // 4, k, *dtypes) for k in (0, 16) for n, dtypes in enumerate(
        (("fp32",) * 4, ("bf16", "fp32", "bf16", "bf16"), ("bf16",) * 4, ("fp16", "fp16", "fp16", "fp32"))
    )]  # fmt: skip
    # with outer factors: the larger of r and k is the padded rank
    variants += [(16, rp, *("fp32",) * 4), (rp, rp, *("fp32",) * 4)]
    for r, k, p, g, s, u in dict.fromkeys(variants):
        own = {"T": c.group, "BD": c.block, "UB": 64, "ALIGN": True, "PREC": c.precision}
        own |= {"GT": TYPE_NAMES[g], "ST": TYPE_NAMES[s], "UT": TYPE_NAMES[u], "HAS_K": True, **_widths(r, k)}
        yield Case(
            op,
            f"r={r}{f' k={k}' * (k > 0)} p={p} g={g} state={s}",
            polar._advance,
            types | {"steps": "*" + u, "grams": F32},
            own,
            c,
        )
    own = {"STRIDE": 1, "T": c.group, "R": rp, "RP": rp, "BD": c.block, "ALIGN": True}
    own |= {"PREC": c.precision}
    for g in ("fp32", "bf16"):
        given = {"parts": I32, "addresses": I64, "meta": I32, "grams": F32}
        yield Case(op, f"grams r={rp} {g}", whole._grams, given, own | {"XT": TYPE_NAMES[g]}, c)


def _widths(r: int, k: int) -> dict[str, Any]:
    return {"R": r, "K": k, "RP": launch.padded(r, 16), "KP": launch.padded(k, 16)}


def _outer(op: str, rp: int, c: launch.Config) -> Iterator[Case]:
    # r and k: the larger of both is the padded rank
    for r, k, g, v in ((rp, 16, "fp32", "fp32"), (3 * rp // 4, rp, "bf16", "bf16"), (rp, rp, "fp32", "fp32")):
        own: dict[str, Any] = {**_widths(r, k), "BD": c.block}
        own |= {"GT": TYPE_NAMES[g], "VT": TYPE_NAMES[v], "PREC": c.precision, "LOOK": True, "ALIGN": True}
        given = {"parts": I32, "gradients": I64, "bases": I64, "meta": I32, "out": F32, "flag": F32}
        yield Case(op, f"r={r} k={k} g={g} V={v}", outer._products, given, own | {"T": c.group}, c)


def _outer_map(op: str, rp: int, c: launch.Config) -> Iterator[Case]:
    types = {"products": F32, "mu": F32, "trace": F32, "width": F32, "found_inf": F32, "decay": NUMBER}
    types |= {"damping": NUMBER, "maps": F32, "new_mu": F32, "new_trace": F32}
    most = min(rp, outer_map.MAX_DIRECTIONS)
    for r, k in dict.fromkeys(((rp, 16), (16, most), (rp, most))):
        if max(r, k) < rp:
            continue
        own = {"R": r, "K": k, "RP": launch.padded(r, 16), "KP": launch.padded(k, 16), "PREC": c.precision}
        own |= {"DECAY_ON_DEVICE": False, "DAMPING_ON_DEVICE": False}
        yield Case(op, f"r={r} k={k}", outer_map._outer_map, types, own, c, ("decay", "damping"))


def _total(op: str, _: int, c: launch.Config) -> Iterator[Case]:
    types = {"grams": F32, "ranges": I32, "out": F32}
    yield Case(op, "16 parts", polar._total, types, {"NP": 16, "RR": 4096, "BLOCK": c.block}, c)


def _prepare(op: str, _: int, c: launch.Config) -> Iterator[Case]:
    types = {"step": F32, "found_inf": F32, "scalars": F32}
    numbers = [n for n in update_tiles._prepare.arg_names if n not in types and n != "LR_ON_DEVICE"]
    for on_device in (False, True):
        given = types | dict.fromkeys(numbers, NUMBER) | ({"lr": F32} if on_device else {})
        label = "lr on the device" if on_device else "lr given"
        yield Case(op, label, update_tiles._prepare, given, {"LR_ON_DEVICE": on_device}, c, tuple(numbers))


def _nonfinite(op: str, _: int, c: launch.Config) -> Iterator[Case]:
    types = {"runs": I32, "gradients": I64, "sizes": I32, "flag": F32}
    for name, dtype in TYPE_NAMES.items():
        yield Case(op, name, whole._nonfinite, types, {"GT": dtype, "BLOCK": c.block, "ALIGN": True}, c)


def _gram(op: str, rp: int, c: launch.Config) -> Iterator[Case]:
    types = {"jobs": I64, "counts": I64, "scale": F32, "sign": NUMBER, "work": F32, "counters": I32, "out": F32}
    narrow = op == "gram16"
    for r in (rp, *((4, 8, 12) if rp == 16 else (3 * rp // 4,))):
        pack = moments.PACKED.get(r, 1) if narrow else 1
        width = launch.padded(pack * r, 16)
        for name in ("bf16", "fp16") if narrow else ("fp32",):
            own = {"R": r, "RP": rp, "P": pack, "W": width, "BN": c.block, "SPLIT": 4, "T": TYPE_NAMES[name]}
            own |= {"WEIGHTED": not narrow, "COUNTED": True, "SCALED": True, "ADD": True, "ALIGN": True, "UP": False}
            yield Case(op, f"r={r} {name}", moments._gram, types, own | {"PREC": c.precision}, c, ("sign",))


def _average(op: str, rp: int, c: launch.Config) -> Iterator[Case]:
    types = {"S": F32, "S_new": F32, "t": I64, "took": "*i8", "found_inf": F32}
    numbers = ("rest", "rest_low", "log_decay", "log_decay_low")
    yield Case(op, f"r={rp}", moments._average, types | dict.fromkeys(numbers, NUMBER), {"R": rp, "RP": rp}, c, numbers)


MAKERS = {
    "inverse": _inverse,
    "root": _root,
    "eigenbasis": _eigenbasis,
    "update": _update,
    "polar": _polar,
    "outer": _outer,
    "outer_map": _outer_map,
    "total": _total,
    "prepare": _prepare,
    "nonfinite": _nonfinite,
    "gram16": _gram,
    "gram32": _gram,
    "average": _average,
}


def build(case: Case, target: str) -> Built:
    """Compile one case for a target; never raises for a case that does not compile."""
    names = case.function.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    aligned = [n for n in case.types if n not in case.unaligned]
    hints = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constants = {(names.index(n),): v for n, v in case.constants.items()}
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages}
    try:
        kernel = triton.compile(ASTSource(case.function, signature, constants, hints), target=gpu, options=options)
    except Exception as error:  # whatever the compiler throws is the answer
        return Built(case, target, error=" ".join(str(error).split())[-200:] or type(error).__name__)
    registers, stack = _amd(kernel.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(kernel.asm["cubin"])
    return Built(case, target, registers, stack, kernel.metadata.shared, asm=dict(kernel.asm))


def _nvidia(cubin: bytes) -> tuple[int, int]:
    usage = disassemble(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    return int(found[1]), int(found[2])


def _amd(text: str) -> tuple[int, int]:
    found = {n: int(v) for n, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    return found["vgpr_count"], found["private_segment_fixed_size"]


def disassemble(cubin: bytes, option: str = "-sass") -> str:
    """Return what the cuobjdump that comes with triton prints about machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def spills_in_loops(sass: str) -> list[str]:
    """Return the loads and stores of spilled registers inside innermost loops of a disassembly."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    code = [(int(at, 16), text) for at, text in lines]
    jumps = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text))]
    loops = [(start, end) for start, end in jumps if start < end]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [text for at, text in code if re.search(r"\b(LDL|STL)\b", text) and any(s <= at <= e for s, e in inner)]
