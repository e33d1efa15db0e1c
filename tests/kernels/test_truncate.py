import pytest
import torch
from curvopt.kernels import truncate

from curvopt import kernels
from curvopt.functional import truncate as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stack(L, r, d, side, dtype=torch.float32):
    g = torch.Generator().manual_seed(r + d)
    return torch.randn((L, r, d) if side == 1 else (L, d, r), generator=g).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("r, d", [(4, 1), (6, 37), (12, 200), (16, 501), (48, 100), (128, 64), (130, 9)])
def test_exactly_the_reference(r, d, side, dtype, device):
    X, k = stack(3, r, d, side, dtype), torch.tensor([0, r // 2, r])
    scale = torch.rand(3, r)
    for op, twin, operand in (
        (truncate.truncate_, reference.truncate_, k),
        (truncate.scale_rows_, reference.scale_rows_, scale),
        (truncate.scale_rows_, reference.scale_rows_, scale[0]),
    ):
        got = X.to(device, copy=True)
        assert op(got, operand.to(device), side) is got
        want = twin(X.clone(), operand, side)
        # exact on a device; the interpreter cuts 16 bits off where a device rounds, in the factor and in the product
        unit = {torch.float32: 0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        slack = 2 * unit if device.type == "cpu" else 0
        torch.testing.assert_close(got.cpu(), want, rtol=slack, atol=slack * 2.0**-13)


@pytest.mark.parametrize("side", [1, 2])
def test_dead_rows_may_hold_anything(side, device):
    X = stack(2, 8, 33, side).fill_(float("nan"))
    k = torch.tensor([3, 8])
    got = truncate.truncate_(X.to(device, copy=True), k.to(device), side).cpu()
    assert torch.equal(got.nan_to_num(7.0), reference.truncate_(X.clone(), k, side).nan_to_num(7.0))
    assert (got == 0).sum() == 5 * 33


def test_any_mix_of_ranks_in_one_launch(device, monkeypatch):
    shapes = [(2, 4, 100, 1), (1, 64, 33, 2), (3, 12, 700, 2), (120, 8, 16, 1)]
    stacks = [(stack(*s), torch.randint(0, s[1] + 1, (s[0],)), s[3]) for s in shapes]
    grids = []
    real = truncate._rows

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return real[grid]

    monkeypatch.setattr(truncate, "_rows", Recorder())
    given = [(X.to(device, copy=True), k.to(device), side) for X, k, side in stacks]
    truncate.truncate_many_(given)
    assert len(grids) == 1
    for (got, _, _), (X, k, side) in zip(given, stacks, strict=True):
        assert torch.equal(got.cpu(), reference.truncate_(X.clone(), k, side))


def test_wrong_rank_is_noticed(device):
    X, k = stack(2, 8, 33, 1), torch.tensor([3, 5])
    got = truncate.truncate_(X.to(device, copy=True), (k + 1).to(device), 1).cpu()
    assert not torch.equal(got, reference.truncate_(X.clone(), k, 1))


def test_supports(device):
    X, k, s = stack(2, 8, 33, 1).to(device), torch.tensor([3, 5], device=device), torch.rand(8, device=device)
    assert kernels.supports("truncate_", X, k, 1) and kernels.supports("scale_rows_", X, s, 1)
    assert not kernels.supports("truncate_", X.double(), k, 1)
    assert not kernels.supports("truncate_", X.mT, k, 2)
    assert not kernels.supports("truncate_", X, k.float(), 1)
    assert not kernels.supports("scale_rows_", X, s.double(), 1)
    assert not kernels.supports("scale_rows_", X, s[:4], 1)
