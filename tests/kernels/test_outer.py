"""Outer factors on the device against float64: the products, the maps, and whole steps through them."""

import pytest
import torch
from update_cases import BF16, EPS, F32, bucket, check, gradients, launches, moved, slab, uploads

from curvopt import kernels
from curvopt.functional.outer import cosine_rows, outer_map, through
from curvopt.functional.plan import ReferencePlan
from curvopt.functional.update import RULES


def with_basis(s, k, seed=0):
    """The slab with a basis of k orthonormal directions, in the dtype of its state, and no matrix for "polar"."""
    d = s.exp_avg.shape[3 - s.rank_dim]
    V = torch.linalg.qr(torch.randn(len(s.params), d, k, generator=torch.Generator().manual_seed(seed))).Q.mT
    s.basis = (V if s.rank_dim == 1 else V.mT).contiguous().to(s.exp_avg.dtype)
    return s


def slabs_of(r, k, d, param=F32, state=F32):
    return [with_basis(slab(2, r, d, 1, param, state), k), with_basis(slab(1, r, d + 7, 2, param, state, seed=1), k)]


def oracle(slabs):
    exact = [moved(s, "cpu", torch.float64) for s in slabs]
    for s in exact:
        s.step = exact[0].step
    return exact


def maps_of(plan, slabs, k):
    """What a step of the optimizer would make of the plan's products, in their dtype."""
    products = plan.outer_products()
    widths = torch.tensor([float(s.exp_avg.shape[3 - s.rank_dim]) for s in slabs for _ in s.params])
    T, like = len(products), {"dtype": products.dtype, "device": products.device}
    mu = torch.linspace(2.0, 0.1, k, **like).expand(T, k)
    trace = torch.full((T,), 3.0 * k, **like)
    return outer_map(products, mu, trace, widths.to(products), 0.9, 0.1, torch.zeros((), device=products.device))[0]


@pytest.mark.parametrize("r, k, d", [(8, 16, 40), (16, 16, 1100), (3, 5, 33), (40, 16, 90), (16, 48, 70)])
@pytest.mark.parametrize("param, state", [(F32, F32), (BF16, BF16)])
@pytest.mark.parametrize("rule", ["polar", "eigen", "adam"])
def test_a_step_through_the_maps(rule, param, state, r, k, d, device):
    if rule != "polar" and (r, k) != (8, 16):
        pytest.skip("the rules read one buffer; one shape shows it")
    slabs = slabs_of(r, k, d, param, state)
    ours, exact = bucket(slabs, device), oracle(slabs)
    plans = kernels.UpdatePlan(rule, ours), ReferencePlan(RULES[rule], exact)
    for plan, own in zip(plans, (ours, exact), strict=True):
        assert plan.load(gradients(own))
    got, want = (plan.outer_products() for plan in plans)
    # float32 sums of d products
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=20 * EPS * d**0.5)
    M = maps_of(plans[1], exact, k)
    plans[0].take_outer(M.float().to(device))
    plans[1].take_outer(M)
    for plan, where in zip(plans, (device, "cpu"), strict=True):
        plan.step(torch.zeros((), device=where))
    check(ours, exact)
    for s, e in zip(ours, exact, strict=True):
        unit = 40 * EPS if state == F32 else 2.0**-7
        torch.testing.assert_close(s.basis.cpu().double(), e.basis, rtol=unit, atol=unit)
        assert not torch.equal(e.basis, moved(slabs[0], "cpu", torch.float64).basis)


def test_nothing_changes_where_gradients_are_not_finite(device):
    slabs = slabs_of(8, 16, 40)
    slabs[0].grads[0, 0, 0] = float("inf")
    ours = bucket(slabs, device)
    before = [t.clone() for s in ours for t in (*s.params, s.exp_avg, s.exp_avg_sq, s.basis)]
    plan = kernels.UpdatePlan("polar", ours)
    plan.load(gradients(ours))
    plan.take_outer(torch.full((3, 24, 24), float("nan"), device=device))
    plan.step(torch.ones((), device=device))
    after = [t for s in ours for t in (*s.params, s.exp_avg, s.exp_avg_sq, s.basis)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_look_at_the_gradients_makes_their_products(device):
    ours = bucket(slabs_of(8, 16, 1100), device)
    plan, flag = kernels.UpdatePlan("polar", ours), torch.zeros((), device=device)
    plan.load(gradients(ours))
    alone = plan.outer_products()
    plan.nonfinite_(flag)
    with launches() as seen:
        # the statistics of the gradients are among them
        torch.testing.assert_close(plan.grams("gradients"), alone[:, :, :8], rtol=0, atol=0)
        assert torch.equal(plan.outer_products(), alone) and not flag
    assert not seen
    with launches() as seen:
        plan.grams("gradients")  # products are used once
    assert seen
    # one bad number, in the last column of the last matrix, is enough; large ones are not bad
    for bad, expected in ((1e30, 0.0), (float("nan"), 1.0), (float("-inf"), 1.0)):
        ours[1].grads[0, -1, -1] = bad
        plan.load(gradients(ours))
        plan.nonfinite_(flag.zero_())
        assert flag.item() == expected
    ours[1].grads[0, -1, -1] = 0.0
    plan.load(gradients(ours))  # products of other gradients are not kept
    assert torch.isfinite(plan.outer_products()).all()


def test_no_launch_more_in_a_step_and_no_upload(device):
    ours = bucket(slabs_of(8, 16, 1100), device)
    plan = kernels.UpdatePlan("polar", ours)
    plan.load(gradients(ours))
    found = torch.zeros((), device=device)
    with uploads() as uploaded, launches() as seen:
        plan.load(gradients(ours))
        plan.take_outer(maps_of(plan, ours, 16))
        plan.step(found)
    # the first two sum up the products
    names = [name for name, *_ in seen]
    assert names == ["_products", "_total", "_prepare", "_advance", "_total", "_equalise", "_update"]
    assert not uploaded


def test_maps_are_taken_anew_for_every_step(device):
    ours = bucket(slabs_of(8, 16, 40), device)
    plan = kernels.UpdatePlan("adam", ours)
    plan.load(gradients(ours))
    with pytest.raises(RuntimeError, match="take_outer"):
        plan.step(torch.zeros((), device=device))
    with pytest.raises(ValueError, match="M must be"):
        plan.take_outer(torch.zeros(3, 23, 23, device=device))


def test_a_plan_without_a_basis_has_no_products(device):
    plan = kernels.UpdatePlan("adam", bucket([slab(2, 8, 40, 1)], device))
    with pytest.raises(ValueError, match="no basis"):
        plan.outer_products()


def test_supports(device):
    def fits(V):
        s = moved(slab(1, 8, 20, 1), device)
        s.basis = V.to(device)
        return kernels.plan_supports("polar", [s])

    V = cosine_rows(4, 20).float()
    assert fits(V[None]) and not fits(V[None, :, 1:]) and not fits(V[None].to(BF16)) and not fits(V[None].double())


@pytest.mark.parametrize("r, k", [(16, 16), (3, 5), (40, 16), (16, 33), (1, 1), (64, 64)])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_the_map_is_that_of_the_reference(r, k, scale, device):
    """From the start of a run through ten gradients, against float64 from the same products at every step."""
    d, T = 4 * max(r, k), 3
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -1.0
    V = cosine_rows(k, d).expand(T, k, d)
    mu, trace, none = torch.zeros(T, k, device=device), torch.zeros(T, device=device), torch.zeros((), device=device)
    width = torch.full((T,), float(d), device=device)
    for n in range(10):
        g = torch.Generator().manual_seed(n)
        G = scale * torch.randn(T, r, d, generator=g, dtype=torch.float64) * spectrum.sqrt()
        products = torch.cat((G @ G.mT, G @ V.mT), 2).float().to(device)
        got = kernels.OPS["outer_map"](products, mu, trace, width, 0.9, 0.1, none)
        given = [x.cpu() for x in (products, mu, trace, width)]
        rounded = outer_map(*given, 0.9, 0.1, torch.zeros(()))
        exact = outer_map(*[x.double() for x in given], 0.9, 0.1, torch.zeros(()))
        for of in range(3):  # of the map, what it does
            ours, plain, want = (
                does(X[0], G / scale, V, scale) if of == 0 else X[of].cpu().double() for X in (got, rounded, exact)
            )
            # what the reference itself loses in float32, by rounding of the products and of their Cholesky factor
            lost = (plain - want).abs().max() + 10 * EPS * want.abs().max()
            assert (ours - want).abs().max() <= 4 * lost, (n, of)
            assert lost < 1e-2 * want.abs().max()
        mu, trace = got[1:]
        V = does(exact[0], G / scale, V, scale)[:, r:]


def does(M, G, V, scale):
    """What a map does to gradients in units of ``scale``, and to V, in float64."""
    M, r = M.cpu().double(), G.shape[1]
    M[:, :r, r:] /= scale
    M[:, r:, :r] *= scale
    return torch.cat(through(M, G, V), 1)


def test_a_map_of_what_is_not_finite_or_empty_is_the_identity(device):
    products = torch.zeros(4, 3, 5, device=device)
    products[:, :, :3] = torch.eye(3)
    products[0, 1, 1], products[1, 0, 4], products[2] = float("inf"), float("nan"), 0
    mu, trace = torch.tensor([[0.5, 0.25]], device=device).expand(4, 2).contiguous(), torch.ones(4, device=device)
    trace[2] = mu[2] = 0
    width, flags = torch.full((4,), 9.0, device=device), torch.tensor([0.0, 1.0], device=device)
    for flag in flags:
        M, new_mu, new_trace = kernels.OPS["outer_map"](products, mu, trace, width, 0.9, 0.1, flag)
        for n in range(4):
            same = torch.equal(M[n].cpu(), torch.eye(5)) and torch.equal(new_mu[n], mu[n]) and new_trace[n] == trace[n]
            assert same == (n < 3 or flag == 1)


def test_decay_and_damping_may_lie_on_the_device(device):
    given = [
        torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0)).abs(), torch.ones(2, 3), torch.full((2,), 4.0),
        torch.full((2,), 20.0),
    ]  # fmt: skip
    given = [x.to(device) for x in given]
    none, op = torch.zeros((), device=device), kernels.OPS["outer_map"]
    numbers = op(*given, 0.75, 0.125, none)
    tensors = op(*given, torch.tensor(0.75, device=device), torch.tensor(0.125, device=device), none)
    assert all(torch.equal(x, y) for x, y in zip(numbers, tensors, strict=True))
    assert kernels.supports("outer_map", *given, 0.75, 0.125, none)
    assert not kernels.supports("outer_map", *given, 0.75, 1e-9, none)
    assert not kernels.supports("outer_map", *[x.double() for x in given], 0.75, 0.125, none)
