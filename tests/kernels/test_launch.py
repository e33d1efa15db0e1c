import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from curvopt import kernels
from curvopt.ops import REFERENCE

FOLDER = Path(kernels.__file__).parent


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.name)
def test_no_module_imports_the_package_of_the_reference(path):
    assert not [m for m in imported(path) if m.split(".")[0] == "curvopt"]


def test_one_op_one_name():
    pytest.importorskip("triton")
    assert set(kernels.OPS) == set(REFERENCE)


def test_import_without_triton_and_without_side_effects():
    code = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
threads, default = torch.get_num_threads(), torch.get_default_dtype()
import curvopt.kernels as kernels
assert kernels.OPS == {} and not kernels.supports("gram", torch.zeros(2, 2))
assert (threads, default) == (torch.get_num_threads(), torch.get_default_dtype())
from curvopt.kernels.__main__ import main
assert main([]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_import_starts_no_device():
    pytest.importorskip("triton")
    code = """
import sys, torch, curvopt.kernels as kernels
assert "triton" not in sys.modules, "only when it is asked for"
assert kernels.OPS and "triton" in sys.modules and not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_host_tensors_are_refused_outside_the_interpreter():
    pytest.importorskip("triton")
    from curvopt.kernels import launch

    if launch.interpreting():
        pytest.skip("the interpreter takes host tensors")
    assert not kernels.supports("damped_inverse", torch.eye(4)[None], 1e-2)
    assert not kernels.supports("gram", torch.zeros(3, 4))
    assert not kernels.supports("no_such_op", torch.zeros(3, 4))


@pytest.mark.parametrize("r, least, expected", [(1, 1, 1), (3, 4, 4), (4, 16, 16), (17, 16, 32), (128, 4, 128)])
def test_padding(r, least, expected):
    launch = pytest.importorskip("curvopt.kernels.launch")
    assert launch.padded(r, least) == expected


def test_tiling_covers_every_element_once():
    tables = pytest.importorskip("curvopt.kernels.tables")
    tiles, first = tables.tiling((1, 64, 65, 200), 64)
    assert list(zip(tiles[::2], tiles[1::2], strict=True)) == [
        (0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (3, 3),
    ]  # fmt: skip
    assert first == [0, 1, 2, 4]


def test_a_target_between_two_is_the_older_one(monkeypatch):
    launch = pytest.importorskip("curvopt.kernels.launch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: {0: (8, 9), 1: (12, 0), 2: (7, 5)}[d])
    names = [launch._target_of.__wrapped__(d) for d in range(3)]
    assert names == ["sm_80", "sm_100", "sm_75"]
    assert names[2] not in launch.TARGETS, "older than any target: the reference runs"


class Compiled:
    """Stands for a compiled kernel."""

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


class Jitted:
    """Stands for a jitted function: notes when it has to look for what it was compiled to."""

    arg_names = ("x", "n", "scale", "R", "BD")

    def __init__(self):
        self.looked, self.launched = [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.looked.append((grid, args, constants))
            return Compiled(self.launched)

        return run


def test_a_launch_that_fits_again_does_not_look_for_its_kernel(monkeypatch):
    launch = pytest.importorskip("curvopt.kernels.launch")
    monkeypatch.setattr(launch, "_KEEPS", True)
    monkeypatch.setattr(launch, "_compiled", {})
    kernel, x = Jitted(), torch.zeros(16)
    launch.run(kernel, (3,), x, 2, 0.5, BD=32, R=8, num_warps=4)
    launch.run(kernel, (5, 2), torch.ones(16), 2, 0.25, BD=32, R=8, num_warps=4)
    assert len(kernel.looked) == 1
    [(grid, args)] = kernel.launched
    # the compile-time arguments follow in the order of the function, options do not
    assert grid == (5, 2, 1) and args[1:] == (2, 0.25, 8, 32)
    # whatever a kernel is compiled for makes it look again
    for other in (x.double(), x[1:]):
        launch.run(kernel, (3,), other, 2, 0.5, BD=32, R=8, num_warps=4)
    launch.run(kernel, (3,), x, 1, 0.5, BD=32, R=8, num_warps=4)
    launch.run(kernel, (3,), x, 2, x, BD=32, R=8, num_warps=4)
    launch.run(kernel, (3,), x, 2, 0.5, BD=32, R=4, num_warps=4)
    launch.run(kernel, (3,), x, 2, 0.5, BD=32, R=8, num_warps=2)
    launch.run(kernel, (3,), torch.zeros(16, device="meta"), 2, 0.5, BD=32, R=8, num_warps=4)
    assert len(kernel.looked) == 8 and len(kernel.launched) == 1


def test_compile_time_arguments_come_last():
    """What `launch.run` keeps of a kernel is launched with them behind the others."""
    compiled = pytest.importorskip("curvopt.kernels.compiled")
    if compiled.launch.interpreting():
        pytest.skip("interpreted kernels are not jitted")
    for function in {case.function for case in compiled.cases("sm_90")}:
        constant = [p.is_constexpr for p in function.params]
        assert constant == sorted(constant), function.fn.__name__
