import copy

import pytest
import torch
from curvopt.kernels import launch
from update_cases import BF16, F16, F32, both, check, launches, moved, planned, slab, tensors

from curvopt import kernels
from curvopt.functional.update import RULES


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "r, d", [(4, 37), (6, 16), (8, 200), (12, 64), (16, 65), (24, 48), (32, 40), (48, 33), (64, 70)]
)
def test_both_sides_and_plain_slabs_in_one_launch(rule, r, d, device):
    slabs = [slab(2, r, d, 1), slab(2, r, d + 9, 2, seed=1), slab(1, r, d, 1, matrix=False, seed=2)]
    with launches() as seen:
        check(*planned(rule, slabs, device))
    assert sum(name == "_update" for name, *_ in seen) == (2 if rule == "momentum" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("r", [4, 8, 16, 64, 96, 128])
@pytest.mark.parametrize("d", [1, 37, 200, 501, 1000])
def test_matches_float64(rule, side, r, d, device):
    check(*both(rule, [slab(1, r, d, side)], device))


@pytest.mark.parametrize("r", [96, 128])
def test_large_ranks(r, device):
    check(*both("eigen", [slab(1, r, 40, 1), slab(1, r, 32, 2)], device))


@pytest.mark.parametrize("rule", RULES)
def test_mixed_ranks_dtypes_and_hyperparameters(rule, device):
    slabs = [
        slab(1, 8, 32, 1, lr=torch.tensor(3e-3)),
        slab(2, 8, 32, 2, BF16, BF16, weight_decay=0.0),
        slab(1, 16, 48, 1, BF16, F32, eps=1e-3),
        slab(1, 6, 20, 2, F16, F32, beta1=0.0, beta2=0.5),
        slab(1, 6, 20, 2, lr=0.0),
    ]
    check(*both(rule, slabs, device))


def test_alignment_branches(device):
    with launches() as seen:
        both("adam", [slab(1, 8, 32, 1)], device)
        both("adam", [slab(1, 8, 33, 1)], device)
        ours = moved(slab(1, 8, 32, 1), device)
        ours.params = [torch.zeros(8 * 32 + 1, device=device)[1:].view(8, 32)]
        kernels.OPS["adam_update"]([ours], torch.tensor(0.0, device=device))
    assert [x["ALIGN"] for name, _, x in seen if name == "_update"] == [True, False, False]


@pytest.mark.parametrize("rule", RULES)
def test_found_inf_changes_nothing(rule, device):
    s = slab(2, 8, 20, 1)
    s.grads[0, 0, 0] = float("nan")
    ours, _ = both(rule, [s], device, found=1.0)
    assert ours[0].step.item() == 3
    assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors(ours[0]), tensors(s), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_slabs_that_share_their_step_are_one_update(rule, device):
    slabs = [slab(1, 8, 20, 1), slab(1, 8, 33, 2, seed=1), slab(1, 8, 20, 1, lr=1e-3, seed=2)]
    slabs[2].hyper = slab(1, 8, 20, 1, lr=1e-3).hyper
    ours, exact = [moved(s, device) for s in slabs], [moved(s, "cpu", torch.float64) for s in slabs]
    ours[1].step = ours[0].step
    with launches() as seen:
        kernels.OPS[f"{rule}_update"](ours, torch.tensor(0.0, device=device))
    RULES[rule](exact, torch.tensor(0.0))
    check(ours, exact)
    assert sum(name == "_prepare" for name, *_ in seen) == 2


def test_several_steps_follow_a_changing_learning_rate(device):
    ours, exact = moved(slab(1, 8, 20, 1), device), moved(slab(1, 8, 20, 1), "cpu", torch.float64)
    for n in range(4):
        grad = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(n))
        ours.grads, exact.grads = grad.to(device), grad.double()
        ours.hyper.lr = exact.hyper.lr = 1e-2 / (n + 1)
        kernels.OPS["eigen_update"]([ours], torch.tensor(0.0, device=device))
        RULES["eigen"]([exact], torch.tensor(0.0))
    check([ours], [exact])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", [1, 2])
def test_dead_directions_become_zero_whatever_they_hold(rule, side, device):
    s = slab(2, 8, 20, side)
    s.k = torch.tensor([3, 8], device=device)
    rows = (slice(3, None), slice(None)) if side == 1 else (slice(None), slice(3, None))
    for t in (s.params[0], s.grads[0], s.exp_avg[0], s.exp_avg_sq[0]):
        t[rows] = float("nan")
    s.matrix[:] = torch.eye(8)
    ours = moved(s, device)
    kernels.OPS[f"{rule}_update"]([ours], torch.tensor(0.0, device=device))
    for t in (ours.params[0], ours.exp_avg[0], ours.exp_avg_sq[0]):
        assert (t[rows] == 0).all()
    assert all(t.isfinite().all() for t in tensors(ours))


def test_wrong_matrix_fails_the_check(device):
    good = slab(1, 8, 20, 1)
    bad = copy.copy(good)
    bad.matrix = good.matrix.mT.contiguous()
    ours, _ = both("eigen", [bad], device)
    _, exact = both("eigen", [good], device)
    with pytest.raises(AssertionError):
        check(ours, exact)


def test_supports(device):
    found = torch.tensor(0.0, device=device)
    fits = lambda s: kernels.supports("eigen_update", [s], found)  # noqa: E731
    assert fits(moved(slab(1, 8, 20, 1), device))
    assert not kernels.supports("eigen_update", [], found)
    assert not fits(moved(slab(1, 8, 20, 1), device, torch.float64))
    assert not fits(moved(slab(1, 129, 4, 1), device))
    strided = moved(slab(1, 8, 20, 1), device)
    strided.params = [strided.params[0].mT.contiguous().mT]
    assert not fits(strided)
    mixed = moved(slab(2, 8, 20, 1), device)
    mixed.params[1] = mixed.params[1].half()
    assert not fits(mixed)
    wrapped = moved(slab(1, 8, 20, 1), device)
    wrapped.params = [wrapped.params[0].as_subclass(type("Wrapped", (torch.Tensor,), {}))]
    assert not fits(wrapped)
    fractional = moved(slab(1, 8, 20, 1), device)
    fractional.matrix = fractional.matrix.bfloat16()
    assert not fits(fractional)


def test_table_covers_every_rank():
    for r in range(1, launch.MAX_RANK + 1):
        assert launch.config("update", launch.padded(r, 16), "sm_90") is not None
    for rp in (16, 32, 64, 128):
        for target in launch.TARGETS:
            shipped = {launch.config(op, rp, target) is not None for op in ("update", "polar", "root")}
            assert len(shipped) == 1, "polar takes all three"


def test_rows_have_their_own_rates(device):
    """row_update against Adam run row by row in float64 with learning rate p·lr, ε/p and the same decay."""
    rates = (2.5, 1.0, 1.0, 0.25, 0.0, 0.0)
    slabs = [slab(2, 6, 37, 1, eps=1e-2), slab(1, 6, 20, 2, BF16, F32, seed=1), slab(1, 6, 16, 1, matrix=False, seed=2)]
    for s, own in zip(slabs, (rates, rates, None), strict=True):
        s.rates = own
    ours, exact = [moved(s, device) for s in slabs], [moved(s, "cpu", torch.float64) for s in slabs]
    kernels.OPS["row_update"](ours, torch.zeros((), device=device))
    for s in exact:
        for l, p in enumerate(s.params):
            for i, rate in enumerate(s.rates or (1.0,) * 6):
                at = (l, i) if s.rank_dim == 1 else (l, slice(None), i)
                if rate == 0:
                    p[at[1:]], s.exp_avg[at], s.exp_avg_sq[at] = 0, 0, 0
                    continue
                h, t = s.hyper, 4
                m = s.exp_avg[at].mul_(h.beta1).add_(s.grads[at], alpha=1 - h.beta1)
                v = s.exp_avg_sq[at].mul_(h.beta2).add_(s.grads[at].square(), alpha=1 - h.beta2)
                root = (v / (1 - h.beta2**t)).sqrt() + h.eps / rate
                p[at[1:]] = p[at[1:]] * (1 - h.lr * h.weight_decay) - rate * h.lr * m / (1 - h.beta1**t) / root
        s.step += 1
    check(ours, exact)


@pytest.mark.parametrize("rule", ["eigen", "polar"])
def test_gradients_may_come_as_a_list(rule, device):
    s = slab(3, 8, 33, 2)
    whole, listed = moved(s, device), moved(s, device)
    listed.grads = [g.clone() for g in listed.grads]
    found = torch.zeros((), device=device)
    assert kernels.supports(f"{rule}_update", [listed], found)
    for c in (whole, listed):
        kernels.OPS[f"{rule}_update"]([c], found)
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(listed), strict=True))
