"""What a device must show: the self-check passes right kernels and fails wrong ones, of every op."""

import logging

import pytest
import torch
import triton
from curvopt.kernels import selfcheck

from curvopt import kernels
from curvopt.ops import REFERENCE


@pytest.fixture(autouse=True)
def _interpreter(request, device):
    if "gram" in request.node.name and device.type == "cpu" and triton.__version__ < "3.7":
        pytest.skip("the interpreter of triton 3.6 cannot loop up to a tensor with numpy 2.4")


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_every_op_has_a_problem_and_passes(name, device):
    found = selfcheck.error(name, REFERENCE[name], 16, torch.float32, device)
    assert name in kernels.OPS and found <= selfcheck.allowed(name, torch.float32)


@pytest.mark.parametrize(
    "name", ["gram_many", "damped_inverse_root", "eigenbasis", "eigen_update", "polar_update", "row_update", "plan"]
)
@pytest.mark.parametrize("r, dtype", [(5, torch.float32), (16, torch.bfloat16)])
def test_other_ranks_and_dtypes(name, r, dtype, device):
    assert selfcheck.agrees(name, REFERENCE.get(name), r, dtype, device)


@pytest.mark.parametrize("r, k, dtype", [(16, 16, torch.float32), (5, 33, torch.float32), (40, 16, torch.bfloat16)])
@pytest.mark.parametrize("name", ["polar_update", "eigen_update", "momentum_update", "plan"])
def test_updates_with_outer_factors(name, r, k, dtype, device):
    assert selfcheck.agrees(name, REFERENCE.get(name), r, dtype, device, k)


@pytest.mark.parametrize("r, k", [(16, 16), (5, 33), (100, 16)])
def test_the_map_of_outer_factors(r, k, device):
    assert selfcheck.agrees("outer_map", REFERENCE["outer_map"], r, torch.float32, device, k)


@pytest.mark.parametrize("what", ["V of the gradient", "the gradient of V"])
def test_a_wrong_map_of_outer_factors_is_seen(what, device, monkeypatch, caplog):
    """One entry of one matrix' map is off by a tenth."""
    right = kernels.UpdatePlan.take_outer

    def wrong(self, M):
        M = M.clone()
        row, col = (9, 2) if what == "V of the gradient" else (2, 9)
        M[-1, row, col] += 0.1
        right(self, M)

    monkeypatch.setattr(kernels.UpdatePlan, "take_outer", wrong)
    with caplog.at_level(logging.ERROR):
        assert not selfcheck.agrees("polar_update", REFERENCE["polar_update"], 8, torch.float32, device, 4)
    assert "kernel polar_update" in caplog.text
    selfcheck.agrees.cache_clear()


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_a_wrong_kernel_is_seen(name, device, monkeypatch, caplog):
    kernel = kernels.OPS[name]

    def wrong(first, *args):
        got = kernel(first, *args)
        if name.endswith("_update"):
            first[-1].params[2][1, 3] *= 1.01
        elif name == "eigenbasis":
            got[0][1, :, 2] += 0.1 * got[0][1, :, 0]
        else:
            (first if name.endswith("_") else got).mul_(1.01)
        return got

    monkeypatch.setitem(kernels.OPS, name, wrong)
    with caplog.at_level(logging.ERROR):
        assert not selfcheck.agrees(name, REFERENCE[name], 8, torch.float32, device)
    assert f"kernel {name}" in caplog.text
    selfcheck.agrees.cache_clear()


@pytest.mark.parametrize("what", ["nonfinite_", "grams", "transform_", "outer_products"])
@pytest.mark.parametrize("k", [0, 4])
def test_a_wrong_plan_is_seen(what, k, device, monkeypatch, caplog):
    if what == "outer_products" and not k:
        pytest.skip("there are none")
    right = getattr(kernels.UpdatePlan, what)

    def wrong(self, *args):
        if what in ("grams", "outer_products"):
            return 1.01 * right(self, *args)
        if what == "transform_":
            right(self, args[0], 1.01 * args[1], *args[2:])
        return None

    monkeypatch.setattr(kernels.UpdatePlan, what, wrong)
    with caplog.at_level(logging.ERROR):
        assert not selfcheck.agrees("plan", None, 8, torch.float32, device, k)
    assert "kernel plan" in caplog.text
    selfcheck.agrees.cache_clear()


def test_a_kernel_that_does_not_compile_is_no_kernel(device, monkeypatch):
    def broken(*_):
        raise RuntimeError("no registers left")

    monkeypatch.setitem(kernels.OPS, "ema_", broken)
    assert not selfcheck.agrees("ema_", REFERENCE["ema_"], 8, torch.float32, device)
    selfcheck.agrees.cache_clear()
