"""Runs the numerical tests of this folder in Triton's interpreter, a process per file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerical import NUMERICAL

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="the files run by themselves here"
)


def run(file, marks):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE / file),
        "-m",
        marks,
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
    ]
    done = subprocess.run(
        command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, "nothing ran:\n" + done.stdout[-2000:]


@pytest.mark.parametrize("file", NUMERICAL)
def test_in_interpreter(file):
    pytest.importorskip("triton")
    run(file, "not slow and not gpu")


@pytest.mark.slow
@pytest.mark.parametrize("file", NUMERICAL)
def test_in_interpreter_full_sweep(file):
    pytest.importorskip("triton")
    run(file, "slow and not gpu")
