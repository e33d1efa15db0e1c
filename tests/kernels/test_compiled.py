"""What the shipped configurations compile to; no GPU needed. Interpreted kernels cannot be compiled."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

from curvopt.kernels import compiled, launch

# one of every kernel, and both kinds of tile; the rest is behind -m slow
QUICK = re.compile(
    r"inverse r=(4|16|128)$|root r=(4 fp32|16 fp32 equalise|64 fp32)$|eigenbasis r=(8|64)$"
    r"|update eigen r=(12|16|64) p=(bf16 g=bf16|fp32)|update (moments|graft|rows|polar) r=16"
    r"|update transform moments r=(16|64)|polar r=(12 p=fp16|64 p=fp32|128 p=fp32)|polar grams r=16 bf16|total"
    r"|prepare|nonfinite bf16|gram(16|32) r=(8|48|128) (bf16|fp32)|average r=16"
)
ALL = [(target, case) for target in launch.TARGETS for case in compiled.cases(target)]


def name(target, case):
    return f"{case.kernel} {case.label}"


def quick(target, case):
    return QUICK.match(name(target, case)) and (
        target == "sm_90" or case.kernel in ("update", "polar", "gram32", "root")
    )


def parameters():
    for target, case in ALL:
        marks = [] if quick(target, case) else [pytest.mark.slow]
        yield pytest.param(target, case, marks=marks, id=f"{target} {name(target, case)}")


def find(target, pattern):
    return next(case for t, case in ALL if t == target and re.match(pattern, name(t, case)))


def narrow(built):
    return re.findall(r"\b(?:LDG|STG)\.E\.U16\b", compiled.disassemble(built.asm["cubin"]))


def has_plain_tf32(built):
    """Whether float32 operands go to matrix units as they are; the three products of their parts are not that."""
    products = len(re.findall(r"inputPrecision = tf32\b", built.asm["ttir"]))
    parted = re.search(r"dense<-8192>", built.asm["ttir"]) is not None
    return products > 0 and not (parted and products % 3 == 0)


@pytest.mark.parametrize("target, case", list(parameters()))
def test_fits(target, case):
    built = compiled.build(case, target)
    assert built.verdict == "fits", built
    assert "fp32" not in case.label or not has_plain_tf32(built)
    vectorised = case.constants.get("ALIGN") and case.constants["R"] % 16 == 0 if "R" in case.constants else False
    if vectorised and target.startswith("sm_"):
        assert not narrow(built), "16-bit accesses one element at a time"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_inner_loops_at_rank_128_do_not_touch_the_stack(target):
    built = compiled.build(find(target, "inverse r=128$"), target)
    assert compiled.spills_in_loops(compiled.disassemble(built.asm["cubin"])) == []


def test_without_the_alignment_hint_accesses_are_narrow():
    case = find("sm_90", "update eigen r=16 p=bf16")
    unhinted = replace(case, constants={**case.constants, "ALIGN": False})
    assert narrow(compiled.build(unhinted, "sm_90")), "the check for narrow accesses sees none where there are some"


def test_plain_tf32_is_seen():
    case = find("sm_90", "update eigen r=16 p=fp32")
    careless = replace(case, constants={**case.constants, "PREC": "tf32"})
    assert has_plain_tf32(compiled.build(careless, "sm_90"))


def test_what_is_too_large_is_reported():
    case = find("sm_80", "gram16 r=128 bf16")
    config = replace(case.config, block=256, stages=6)
    large = replace(case, config=config, constants={**case.constants, "BN": 256})
    assert compiled.build(large, "sm_80").verdict == "does not fit: shared memory"


def test_a_trap_is_reported():
    """Two sums of 128×128 in tensor memory, more than there is: the compiler need not raise anything."""
    case = find("sm_100", "outer r=128 k=128 g=fp32")
    careless = replace(case, constants={**case.constants, "PREC": "tf32x3"})
    assert compiled.build(careless, "sm_100").verdict != "fits"
    assert compiled.Built(case, "sm_100", registers=4).verdict == "compiles to a trap"


def test_spills_are_reported():
    case = find("sm_90", "update eigen r=32 p=fp32")
    assert compiled.build(replace(case, constants={**case.constants, "BD": 256}), "sm_90").verdict == "spills"


def test_what_does_not_compile_is_reported():
    case = find("sm_90", "update eigen r=16 p=fp32")
    narrow_pad = replace(case, constants={**case.constants, "R": 8, "RP": 8})
    assert compiled.build(narrow_pad, "sm_90").verdict.startswith("does not compile")


def run(*targets, **environment):
    command = [sys.executable, "-m", "curvopt.kernels", *targets]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800)


def test_report_refuses_what_it_cannot_do():
    assert run("sm_1").returncode == 1
    done = run("sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 1 and "TRITON_INTERPRET" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", launch.TARGETS)
def test_report(target):
    done = run(target)
    assert done.returncode == 0 and done.stdout.strip().endswith("all fit"), done.stdout[-3000:]


def test_report_leaves_with_1_if_something_does_not_fit(monkeypatch, capsys):
    from curvopt.kernels import __main__ as report

    case = find("sm_90", "prepare")
    monkeypatch.setattr(compiled, "cases", lambda target: iter([case]))
    monkeypatch.setattr(report, "_launched", lambda reference: 0)
    assert report.main(["sm_90"]) == 0
    monkeypatch.setattr(compiled, "build", lambda c, t: compiled.Built(c, t, shared=10**6))
    assert report.main(["sm_90"]) == 1
    assert "does not fit: shared memory" in capsys.readouterr().out
