"""What a device must show: the self-check passes right kernels and fails wrong ones, of every op."""

import logging

import pytest
import torch
from curvopt.kernels import launch, selfcheck

from curvopt import kernels
from curvopt.ops import REFERENCE


def test_every_op_has_a_problem_and_passes(device):
    checked = [name for name, error, allowed in selfcheck.run(REFERENCE, device) if error <= allowed]
    assert set(checked) == set(kernels.OPS) and kernels.OPS.keys() <= REFERENCE.keys()


@pytest.mark.parametrize("name", ["gram_many", "damped_inverse_root", "eigenbasis", "eigen_update", "truncate_"])
@pytest.mark.parametrize("r, dtype", [(5, torch.float32), (16, torch.bfloat16)])
def test_other_ranks_and_dtypes(name, r, dtype, device):
    assert selfcheck.agrees(name, REFERENCE[name], r, dtype, device)


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


def test_a_kernel_that_does_not_compile_is_no_kernel(device, monkeypatch):
    def broken(*_):
        raise RuntimeError("no registers left")

    monkeypatch.setitem(kernels.OPS, "gram", broken)
    assert not selfcheck.agrees("gram", REFERENCE["gram"], 8, torch.float32, device)
    selfcheck.agrees.cache_clear()
    assert launch.interpreting() or device.type == "cuda"
