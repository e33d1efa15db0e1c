"""The plan of a bucket: what it launches and uploads, whom it refuses, and what it does to whole buckets."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from curvopt.kernels import launch, tables
from update_cases import BF16, EPS, F16, F32, bucket, check, gradients, launches, moved, planned, slab, tensors, uploads

from curvopt import kernels
from curvopt.functional import left, live_rows
from curvopt.functional.basis import carry_first, carry_second
from curvopt.functional.truncate import truncate_
from curvopt.functional.update import RULES, Hyper

# what products of matrix units lose, see `update_tiles._dot`: lo lo, and on a device the ends of both lo, 2⁻²⁰ each
LOST = (3 if torch.cuda.is_available() else 1) * 2.0**-20
ALL = [*RULES, "row"]
LAUNCHES = {
    "polar": ["_prepare", "_advance", "_total", "_equalise", "_update"],
    "momentum": ["_prepare", "_update", "_update"],
}


def slabs_of(pairs, r=8, d=300, param=F32, state=F32):
    return [slab(pairs, r, d, 1, param, state), slab(pairs, r, d + 9, 2, param, state, seed=1)]


def plan_of(rule, slabs, device):
    ours = bucket(slabs, device)
    plan = kernels.UpdatePlan(rule, ours)
    assert plan.load(gradients(ours))
    return plan, ours


@pytest.fixture
def found(device):
    return torch.zeros((), device=device)


@pytest.mark.parametrize("rule", ALL)
def test_launches_are_constant_in_the_number_of_matrices(rule, device, found):
    seen = []
    d = 300 if rule == "polar" else 20
    for pairs in (1, 4):
        plan, _ = plan_of(rule, slabs_of(pairs, d=d), device)
        with launches() as own:
            plan.step(found)
        seen.append([name for name, *_ in own])
    assert seen[0] == seen[1] == LAUNCHES.get(rule, ["_prepare", "_update"])


def test_launches_of_what_is_done_to_whole_buckets(device, found):
    plan, _ = plan_of("eigen", slabs_of(3), device)
    M, k = torch.randn(6, 8, 8, device=device), torch.full((6,), 5, device=device)
    with launches() as seen:
        plan.nonfinite_(found)
        plan.grams("params")
        plan.transform_("moments", M, k, found)
    assert [name for name, *_ in seen] == ["_nonfinite", "_grams", "_total", "_transform"]


@pytest.mark.parametrize("rule", ALL)
def test_an_unchanged_step_uploads_nothing(rule, device, found):
    """Nor does one with other hyper-parameters; other gradients do, once."""
    plan, ours = plan_of(rule, slabs_of(2, d=20), device)
    with uploads() as seen:
        for n in range(2):
            plan.hyper = Hyper(1e-3 * n, 0.9 - 0.1 * n, 0.99, 1e-8, 0.1 * n, n == 1)
            plan.load(gradients(ours))
            plan.step(found)
            plan.nonfinite_(found)
        assert not seen
        others = [g.clone() for g in gradients(ours)]
        assert plan.load(others) and plan.load(others)
        assert seen == [[g.data_ptr() for g in others]]


@pytest.mark.parametrize("rule", RULES)
def test_gradients_may_move_and_rates_may_change(rule, device, found):
    plan, ours = plan_of(rule, slabs_of(2, d=40), device)
    exact = [moved(s, "cpu", torch.float64) for s in slabs_of(2, d=40)]
    for n in range(3):
        generator = torch.Generator().manual_seed(n)
        grads = [torch.randn(g.shape, generator=generator) for g in gradients(ours)]
        for s, own in zip(exact, (grads[:2], grads[2:]), strict=True):
            s.grads = torch.stack(own).double()
        plan.hyper = Hyper(1e-2 / (n + 1), 0.9, 0.99, 1e-8, 0.1 * n)
        for s in exact:
            s.hyper = plan.hyper
        assert plan.load([g.to(device) for g in grads])
        plan.step(found)
        RULES[rule](exact, torch.tensor(0.0))
    check(ours, exact)


def test_damping_may_change(device, found):
    slabs = slabs_of(1, d=40)
    plan, ours = plan_of("polar", slabs, device)
    exact = [moved(s, "cpu", torch.float64) for s in slabs]
    for damping in (0.1, torch.tensor(0.3), 0.01, 0.01):
        plan.damping = damping.to(device) if isinstance(damping, torch.Tensor) else damping
        for s, old in zip(exact, slabs, strict=True):
            s.damping, s.grads = damping, old.grads.double()
        with uploads() as seen:
            plan.step(found)
        RULES["polar"](exact, torch.tensor(0.0))
    assert not seen, "the last damping was that of the step before"
    check(ours, exact)


@contextmanager
def capture():
    """As if a CUDA graph were being captured."""
    with mock.patch.object(tables, "capturing", lambda device: True):
        yield


@pytest.mark.parametrize("rule", ALL)
def test_a_capture_uploads_nothing_and_its_tables_are_kept(rule, device, found):
    plan, ours = plan_of(rule, slabs_of(1, d=20), device)
    before = [g.clone() for g in gradients(ours)]
    plan.load(before)
    with capture():
        plan.load(before)
        plan.step(found)
        captured = plan._gradients
        with pytest.raises(RuntimeError, match="eager step"):
            plan.load([g.clone() for g in before])
        with pytest.raises(RuntimeError, match="eager step"):
            kernels.UpdatePlan(rule, ours)
    addresses = captured.tolist()
    plan.load(gradients(ours))
    plan.step(found)
    assert any(t is captured for t in plan._captured) and captured.tolist() == addresses


def test_other_gradients_are_refused(device):
    plan, ours = plan_of("eigen", slabs_of(2), device)
    good, before = gradients(ours), plan._gradients
    wide = good[0].new_empty(*reversed(good[0].shape)).mT
    for bad in (
        good[:-1],
        [wide, *good[1:]],
        [good[0].half(), *good[1:]],
        [good[0][:, :-1].contiguous(), *good[1:]],
        [good[0].clone().as_subclass(type("Wrapped", (torch.Tensor,), {})), *good[1:]],
    ):
        assert not plan.load(bad)
    assert plan._gradients is before and plan.load(good)


def test_whom_a_plan_refuses(device):
    def fits(change, rule="polar"):
        ours = bucket(slabs_of(2), device)
        change(ours)
        return kernels.plan_supports(rule, ours)

    assert fits(lambda ours: None) and fits(lambda ours: ours.pop())
    assert not kernels.plan_supports("polar", []) and not fits(lambda ours: None, "no such rule")
    assert not fits(lambda ours: setattr(ours[1], "step", ours[1].step.clone()))
    assert not fits(lambda ours: setattr(ours[1], "hyper", Hyper(0.5, 0.9, 0.999, 1e-8, 0.1)))
    assert not fits(lambda ours: setattr(ours[1], "damping", 0.2))
    assert fits(lambda ours: setattr(ours[1], "damping", 0.2), "eigen")
    assert not fits(lambda ours: setattr(ours[0], "reduce", lambda x: None))
    assert not fits(lambda ours: setattr(ours[0], "exp_avg", ours[0].exp_avg.half()))
    assert not fits(lambda ours: setattr(ours[0], "matrix", ours[0].matrix.mT))
    with pytest.raises(ValueError, match="no kernels take this bucket"):
        kernels.UpdatePlan("eigen", [moved(slab(1, 8, 20, 1), device, torch.float64)])


@pytest.mark.parametrize("rule", ALL)
def test_ranks_and_matrices_are_read_where_they_are(rule, device, found):
    """What changes in place between steps needs no new plan."""
    slabs = slabs_of(2, d=40)
    for s in slabs:
        s.k = torch.tensor([8, 8])
    plan, ours = plan_of(rule, slabs, device)
    plan.step(found)
    assert all((p != 0).any(1 - (s.rank_dim == 2)).all() for s in ours for p in s.params)
    for s in ours:
        s.k.copy_(torch.tensor([8, 3]))
        s.matrix.copy_(torch.eye(8).expand(2, 8, 8))
    plan.load(gradients(ours))
    plan.step(found)
    for s in ours:
        for t in (s.params[1], s.exp_avg[1], s.exp_avg_sq[1]):
            assert not (t[3:] if s.rank_dim == 1 else t[:, 3:]).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_what_is_not_finite_is_found_wherever_it_is(poison, dtype, device):
    ours = bucket([slab(2, 3, 37, 1, dtype, dtype), slab(1, 3, 3000, 2, dtype, dtype)], device)
    for s in ours:
        s.grads = [g.to(dtype) for g in s.grads]
    plan, flag = kernels.UpdatePlan("adam", ours), torch.zeros((), device=device)
    grads = gradients(ours)
    assert plan.load(grads)
    plan.nonfinite_(flag)
    assert flag.item() == 0
    for which, at in ((0, 0), (1, 37 * 3 - 1), (2, 5000), (2, 3 * 3000 - 1)):
        element = grads[which].view(-1)[at : at + 1]
        kept = element.clone()
        element.fill_(poison), flag.zero_()
        plan.nonfinite_(flag)
        element.copy_(kept)
        assert flag.item() == 1
    grads[0].fill_(torch.finfo(dtype).max), flag.zero_()  # their squares and sums are not looked at
    plan.nonfinite_(flag)
    assert flag.item() == 0


@pytest.mark.parametrize("of", ["gradients", "params"])
@pytest.mark.parametrize("r, d, dtype", [(3, 37, F32), (8, 700, F32), (16, 64, BF16), (33, 90, F32), (16, 600, F16)])
def test_gram_matrices(of, r, d, dtype, device):
    slabs = slabs_of(2, r, d, dtype, dtype)
    for s in slabs:
        s.grads = s.grads.to(dtype)
    plan, ours = plan_of("adam", slabs, device)
    got = plan.grams(of).cpu().double()
    assert got.shape == (4, r, r)
    matrices = [X for s in ours for X in (s.grads if of == "gradients" else s.params)]
    for G, X, side in zip(got, matrices, [1, 1, 2, 2], strict=True):
        X = X.cpu().double()
        want = X @ X.T if side == 1 else X.T @ X
        assert (G - want).norm() <= 1e-6 * want.norm()
    with pytest.raises(ValueError, match="of must be"):
        plan.grams("moments")


@pytest.mark.parametrize("of", ["params", "moments"])
@pytest.mark.parametrize("r, d, dtype", [(3, 37, F32), (8, 64, BF16), (16, 130, F32), (17, 40, F16), (64, 50, F32)])
def test_maps_are_those_of_the_basis(of, r, d, dtype, device, found):
    slabs = slabs_of(2, r, d, dtype, dtype)
    k = torch.tensor([0, r // 2, r, 1])
    M = torch.randn(4, r, r, generator=torch.Generator().manual_seed(3))
    for matrices, ranks in ((M, k), (M, None), (None, k)):
        plan, ours = plan_of("eigen", slabs, device)
        plan.transform_(
            of, matrices if matrices is None else M.to(device), ranks if ranks is None else k.to(device), found
        )
        for n, (s, old) in enumerate(zip(ours, slabs, strict=True)):
            own = slice(2 * n, 2 * n + 2)
            T = torch.eye(r).expand(2, r, r).double() if matrices is None else M[own].double()
            params = torch.stack(old.params).double()
            first, second = old.exp_avg.double(), old.exp_avg_sq.double()
            want = {
                "params": (torch.stack(s.params), params, left(T, params, s.rank_dim)),
                "exp_avg": (s.exp_avg, first, carry_first(T, first, s.rank_dim)),
                "exp_avg_sq": (s.exp_avg_sq, second, carry_second(T, second, s.rank_dim)),
            }
            for name, (got, was, mapped) in want.items():
                if (name == "params") != (of == "params"):
                    assert torch.equal(got.cpu().double(), was)
                    continue
                mapped = mapped if ranks is None else truncate_(mapped, k[own], s.rank_dim)
                # roundings of the sum of |products| that add up like a walk; then one, which the interpreter cuts
                unit = {F32: 0, BF16: 2.0**-7, F16: 2.0**-10}[dtype]
                size = left((T**2 if name == "exp_avg_sq" else T).abs(), was.abs(), s.rank_dim)
                assert (
                    (got.cpu().double() - mapped).abs() <= ((4 + r**0.5) * EPS + LOST) * size + unit * mapped.abs()
                ).all()
                if ranks is not None:
                    dead = ~live_rows(k[own], r)
                    assert not (got.cpu() if s.rank_dim == 1 else got.cpu().mT)[dead].any()


@pytest.mark.parametrize("of", ["params", "moments"])
def test_rows_beyond_the_rank_may_hold_anything(of, device, found):
    slabs = slabs_of(2, d=40)
    for s in slabs:
        for X in (*s.params, *s.exp_avg, *s.exp_avg_sq):
            (X[5:] if s.rank_dim == 1 else X[:, 5:]).fill_(float("nan"))
    plan, ours = plan_of("eigen", slabs, device)
    plan.transform_(of, None, torch.full((4,), 5, device=device), found)
    for s in ours:
        for X in s.params if of == "params" else (*s.exp_avg, *s.exp_avg_sq):
            assert X.isfinite().all() and not (X[5:] if s.rank_dim == 1 else X[:, 5:]).any()


def test_found_inf_maps_nothing(device):
    plan, ours = plan_of("eigen", slabs_of(2), device)
    before = [t.clone() for s in ours for t in tensors(s)]
    for of in ("params", "moments"):
        k = torch.zeros(4, dtype=torch.int64, device=device)
        plan.transform_(of, torch.zeros(4, 8, 8, device=device), k, torch.tensor(1.0, device=device))
    assert all(torch.equal(a, b) for a, b in zip(before, [t for s in ours for t in tensors(s)], strict=True))


def test_maps_of_other_shapes_are_refused(device, found):
    plan, _ = plan_of("eigen", slabs_of(2), device)
    for M, k in (
        (torch.zeros(3, 8, 8), None),
        (None, torch.zeros(3, dtype=torch.int64)),
        (None, torch.zeros(4)),
    ):
        with pytest.raises(ValueError, match="expected a contiguous"):
            plan.transform_("params", M if M is None else M.to(device), k if k is None else k.to(device), found)
    with pytest.raises(ValueError, match="of must be"):
        plan.transform_("gradients", None, None, found)


def test_a_wrong_map_fails_the_check(device, found):
    plan, ours = plan_of("eigen", slabs_of(1, 8, 40), device)
    M = torch.randn(2, 8, 8)
    plan.transform_("params", M.mT.contiguous().to(device), None, found)
    old = slabs_of(1, 8, 40)[0].params[0]
    assert ((ours[0].params[0].cpu() - M[0] @ old).abs() > 1e-2).any()


@pytest.mark.parametrize("rule", ALL)
def test_found_inf_changes_nothing(rule, device):
    slabs = slabs_of(1, d=40)
    for s in slabs:
        s.grads[0, 0, 0] = float("nan")
    plan, ours = plan_of(rule, slabs, device)
    plan.step(torch.tensor(1.0, device=device))
    assert ours[0].step.item() == 3
    for s, old in zip(ours, slabs, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors(s), tensors(old), strict=True))


def test_one_launch_function(device, found):
    """With it left out nothing happens on the device: that is what a step costs the host."""
    plan, ours = plan_of("polar", slabs_of(2), device)
    before = [t.clone() for s in ours for t in tensors(s)]
    with mock.patch.object(launch, "run", lambda *args, **constants: None):
        plan.step(found)
    assert ours[0].step.item() == 3
    assert all(torch.equal(a, b) for a, b in zip(before, [t for s in ours for t in tensors(s)], strict=True))


def test_a_copy_of_a_slab_is_another_bucket(device):
    ours = bucket(slabs_of(1), device)
    twin = copy.copy(ours[1])
    twin.step = twin.step.clone()
    assert not kernels.plan_supports("eigen", [ours[0], twin])
    check(*planned("eigen", slabs_of(1, d=40), device))
