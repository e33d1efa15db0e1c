"""What only "polar" has: Gram matrices over many tiles, damping, live ranks; what all rules share is in test_update."""

import copy
import warnings

import pytest
import torch
from curvopt.kernels import launch
from update_cases import BF16, EPS, F16, F32, both, check, launches, moved, planned, slab, tensors

from curvopt import kernels
from curvopt.functional.update import RULES


def with_ranks(s, ranks):
    """The slab with live ranks: everything dead is zero."""
    s.k = torch.tensor(ranks)
    for l, k in enumerate(ranks):
        dead = (slice(k, None), slice(None)) if s.rank_dim == 1 else (slice(None), slice(k, None))
        for t in (s.params, s.grads, s.exp_avg, s.exp_avg_sq):
            t[l][dead] = 0
    return s


@pytest.fixture
def noted():
    with launches() as seen:
        yield lambda name: [(grid, constants) for kernel, grid, constants in seen if kernel == name]


@pytest.mark.parametrize("r, d", [(3, 1100), (16, 700), (31, 600), (64, 530)])
def test_sums_over_many_programs(r, d, device, noted):
    check(*planned("polar", [slab(2, r, d, 1), slab(1, r, d // 4, 2, seed=1)], device))
    c = launch.config("polar", launch.padded(r, 16))
    ((grid, constants),) = noted("_advance")
    assert noted("_total") and constants["T"] == c.group
    assert grid == (2 * -(-d // (c.block * c.group)) + -(-(d // 4) // (c.block * c.group)),)


def test_one_tile_needs_no_sum_and_no_empty_tiles(device, noted):
    check(*planned("polar", [slab(2, 8, launch.config("polar", 16).block, 1)], device))
    assert not noted("_total") and noted("_advance")[0][1]["T"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("r", [48, 100, 128])
def test_tiles_of_the_two_launches_may_differ(target, r, device, monkeypatch):
    own = launch.config
    monkeypatch.setattr(launch, "config", lambda op, rp, _=None: own(op, rp, target))
    check(*both("polar", [slab(1, r, 90, 1), slab(1, r, 77, 2)], device))


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0, torch.tensor(0.02), torch.tensor([0.5], dtype=torch.float64)])
def test_damping(damping, device):
    slabs = [slab(2, 8, 40, 1), slab(1, 8, 33, 2)]
    for s in slabs:
        s.damping = damping
    check(*both("polar", slabs, device))


def test_slabs_of_a_rank_may_differ_in_damping(device, noted):
    slabs = [slab(1, 8, 40, side, seed=n) for n, side in enumerate((1, 2, 1, 2))]
    shared = torch.tensor(0.3, device=device)
    for s, damping in zip(slabs, (0.01, 1.0, 0.01, shared), strict=True):
        s.damping = damping
    check(*both("polar", slabs, device))
    assert len(noted("_update")) == len(noted("_equalise")) == 4


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("param, state", [(F32, F32), (BF16, BF16), (F16, F32), (F32, BF16)])
def test_live_ranks(side, param, state, device):
    slabs = [
        with_ranks(slab(3, 8, 70, side, param, state, maximize=True), (3, 8, 1)),
        slab(2, 8, 40, 3 - side, param, state, weight_decay=0.0, seed=1),
    ]
    ours, exact = both("polar", slabs, device)
    for s, e in zip(ours, exact, strict=True):
        assert s.params[0].dtype == param
        states = [s.exp_avg, s.exp_avg_sq], [e.exp_avg, e.exp_avg_sq]
        for got, want in zip([*s.params, *states[0]], [*e.params, *states[1]], strict=True):
            unit = {F32: 40 * EPS, BF16: 2.0**-7, F16: 2.0**-10}[got.dtype]
            torch.testing.assert_close(got.cpu().double(), want, rtol=unit, atol=unit)
    dead = ours[0].params[0][3:] if side == 1 else ours[0].params[0][:, 3:]
    assert (dead == 0).all()


def test_the_step_does_not_depend_on_what_float16_cannot_hold(device):
    """Gradients whose squares vanish in float16: from the stored second moment the step would be m/ε."""
    s = slab(1, 8, 40, 1, F16, F16, weight_decay=0.0)
    s.grads.mul_(1e-5)
    s.exp_avg.zero_(), s.exp_avg_sq.zero_(), s.step.zero_()
    ours, exact = both("polar", [s], device)
    assert (ours[0].exp_avg_sq == 0).all()
    check(ours, exact)


@pytest.mark.parametrize("lr", [1e-20, 1e15])
def test_the_learning_rate_only_scales(lr, device):
    """Also where the squares of the step leave the range of float32."""
    runs = [moved(slab(1, 8, 40, 1, weight_decay=0.0, lr=given), device) for given in (1.0, lr)]
    for s in runs:
        s.params[0].zero_()
        kernels.OPS["polar_update"]([s], torch.zeros((), device=device))
    torch.testing.assert_close(runs[1].params[0] / lr, runs[0].params[0], rtol=1e-5, atol=1e-6)


def test_a_step_of_zero_is_zero(device):
    s = slab(2, 8, 40, 1)
    s.grads[0].zero_(), s.exp_avg[0].zero_()
    check(*both("polar", [s], device))


def test_found_inf_with_rubbish_in_between(device):
    """What the buffers hold, NaN or not, changes nothing, with ranks and damping on the device."""
    s = with_ranks(slab(2, 8, 600, 1), (3, 8))
    s.damping = torch.tensor(0.1)
    s.grads.fill_(float("nan"))
    real = torch.empty
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the interpreter's numpy
        patch.setattr(torch, "empty", lambda *size, **options: real(*size, **options).fill_(float("nan")))
        ours, _ = both("polar", [s], device, found=1.0)
    assert ours[0].step.item() == 3
    assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors(ours[0]), tensors(s), strict=True))


@pytest.mark.parametrize("change", ["damping", "rule"])
def test_a_wrong_step_fails_the_check(change, device):
    good = slab(1, 8, 40, 2)
    bad = copy.copy(good)
    if change == "damping":
        bad.damping = 0.11
    ours, _ = both("eigen" if change == "rule" else "polar", [bad], device)
    exact = moved(good, "cpu", torch.float64)
    RULES["polar"]([exact], torch.tensor(0.0))
    with pytest.raises(AssertionError):
        check(ours, [exact])


def test_supports(device):
    found = torch.tensor(0.0, device=device)

    def fits(**changed):
        s = moved(slab(1, 8, 20, 1), device)
        for name, value in changed.items():
            setattr(s, name, value)
        return kernels.supports("polar_update", [s], found)

    assert fits() and fits(damping=torch.tensor(0.1, device=device)) and fits(k=torch.tensor([3], device=device))
    assert not fits(damping=0.0) and not fits(damping=torch.ones(2, device=device))
    assert not fits(k=torch.tensor([3], device=device, dtype=torch.int32))
    assert not fits(reduce=lambda t: None)
