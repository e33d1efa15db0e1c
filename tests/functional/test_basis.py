"""basis.py: balanced truncation is what it claims on the K-FAC quadratic, and what is carried along arrives intact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import EPS, best_subset, eckart_young, hankel, rise, rise_sampled
from strategies import (
    conditions,
    few,
    generator,
    live_stacks,
    orthogonal,
    psd_stacks,
    random_spd,
    rank_dims,
    seeds,
    small_ranks,
    some,
    spd,
    spectrum,
    stack_sizes,
)

from curvopt.functional.basis import balanced, carry_first, carry_second, congruence, projectors
from curvopt.functional.truncate import truncate_

F64 = torch.float64


def eye(r):
    return torch.eye(r, dtype=F64)


def norm(M):
    return torch.linalg.matrix_norm(M, 2)


def random_gauge(L, r, g, condition=10.0):
    """A well-conditioned matrix that is no rotation."""
    values = torch.stack([spectrum("log", r, condition) for _ in range(L)])
    Q, R = (torch.stack([orthogonal(r, g) for _ in range(L)]) for _ in range(2))
    return Q * values[:, None, :] @ R


def pair_of_factors(L, r, g, scale=1.0):
    return random_spd(L, r, g), scale * random_spd(L, r, g)


# ------------------------------------------------------------------------------------------------- the balanced gauge


@given(seeds, stack_sizes, st.integers(1, 32), st.integers(-14, 4), st.sampled_from([0.0, 2.0**-20, 2.0**-7]))
@some
def test_both_factors_become_the_same_diagonal(seed, L, r, exponent, damping):
    """T S_u Tᵀ = T⁻ᵀ S_d T⁻¹ = diag(σ) for the regularised factors, and σ is what (7) says."""
    g = generator(seed)
    S_u, S_d = pair_of_factors(L, r, g, 10.0**exponent)
    T, T_inv, sigma = balanced(S_u, S_d, damping)
    ridge = [damping * S.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * eye(r) for S in (S_u, S_d)]
    R_u, R_d = S_u + ridge[0], S_d + ridge[1]
    # every product passes through T or its inverse twice, so rounding is amplified by cond(T)²
    tolerance = (64 * r * EPS[F64] * torch.linalg.cond(T).square() * sigma[:, 0])[:, None, None]
    assert ((T @ R_u @ T.mT - torch.diag_embed(sigma)).abs() <= tolerance).all()
    assert ((T_inv.mT @ R_d @ T_inv - torch.diag_embed(sigma)).abs() <= tolerance).all()
    assert (norm(T @ T_inv - eye(r)) <= 16 * r * EPS[F64] * torch.linalg.cond(T)).all()
    assert (sigma.diff(dim=-1) <= 0).all()
    for i in range(L):
        # eigenvalues of a product: conditioned by the eigenvectors T
        error = 256 * r * EPS[F64] * torch.linalg.cond(T[i]).item() ** 2 * sigma[i, 0].item()
        torch.testing.assert_close(sigma[i].square(), hankel(R_u[i], R_d[i]).square(), rtol=0, atol=error * sigma[i, 0])


def test_damping_is_not_rounded_to_float32():
    S = torch.full((1, 1, 1), 2.0, dtype=F64)
    sigma = balanced(S, S, 0.01).sigma
    torch.testing.assert_close(sigma, torch.full((1, 1), 2.02, dtype=F64), rtol=1e-14, atol=0)


@given(seeds, st.integers(2, 12), st.floats(1, 30))
@some
def test_sigma_does_not_depend_on_the_gauge(seed, r, condition):
    """A → RA, B → BR⁻¹: S_u → RS_uRᵀ, S_d → R⁻ᵀS_dR⁻¹, and the σ stay (no damping)."""
    g = generator(seed)
    S_u, S_d = pair_of_factors(2, r, g)
    R = random_gauge(2, r, g, condition)
    R_inv = torch.linalg.inv(R)
    sigma = balanced(S_u, S_d, 0.0).sigma
    moved = balanced(R @ S_u @ R.mT, R_inv.mT @ S_d @ R_inv, 0.0).sigma
    # perturbation of S by eps·cond(R)² each, seen through the condition of the factors (≤ ~100 here)
    worst = EPS[F64] * condition**2 * 1e3 * r
    torch.testing.assert_close(moved, sigma, rtol=0, atol=worst * sigma.max().item())


def test_control_eigenvalues_of_one_factor_do_depend_on_the_gauge():
    g = generator(0)
    S_u, _ = pair_of_factors(1, 5, g)
    R = random_gauge(1, 5, g)
    a, b = (torch.linalg.eigvalsh(S)[0] for S in (S_u, R @ S_u @ R.mT))
    assert ((a / a.sum() - b / b.sum()).abs() > 0.01).any()


def test_without_truncation_the_layer_is_unchanged():
    """The gauge maps the model to itself: ΔW = BA is unchanged to rounding, whatever the scales (no truncation)."""
    g = generator(1)
    for scale in (1e-12, 1.0, 1e4):
        S_u, S_d = pair_of_factors(3, 8, g, scale)
        A, B = torch.randn(3, 8, 20, generator=g, dtype=F64), torch.randn(3, 15, 8, generator=g, dtype=F64)
        T, T_inv, _ = balanced(S_u, S_d)
        before, after = B @ A, (B @ T_inv) @ (T @ A)
        bound = 64 * EPS[F64] * torch.linalg.cond(T) * norm(A) * norm(B)
        assert (norm(after - before) <= bound).all()
        assert (norm(T - eye(8)) > 0.1).all()


@given(seeds, st.integers(2, 16), conditions, conditions)
@some
def test_fallback_is_orthogonal_and_still_a_gauge(seed, r, condition_u, condition_d):
    """Badly conditioned T: its orthogonal part. T T⁻¹ = I holds on both sides of the limit."""
    g = generator(seed)
    S_u = spd(spectrum("log", r, condition_u), g)[None]
    S_d = spd(spectrum("log", r, condition_d), g)[None]
    for limit in (1.0, 10.0, 1e4):
        T, T_inv, sigma = balanced(S_u, S_d, 1e-12, max_condition=limit)
        cond = torch.linalg.cond(T)
        assert (cond <= limit * (1 + 1e-10)).all()
        assert (norm(T @ T_inv - eye(r)) <= 32 * r * EPS[F64] * cond).all()
        assert (norm(T_inv @ T - eye(r)) <= 32 * r * EPS[F64] * cond).all()
        if limit == 1.0:  # nothing but a multiple of a rotation is well conditioned in this sense
            assert (norm(T.mT @ T / norm(T)[:, None, None] ** 2 - eye(r)) <= 1e-10).all()
        assert torch.equal(sigma, balanced(S_u, S_d, 1e-12).sigma)


def test_fallback_is_the_polar_factor():
    """The nearest orthogonal matrix to T: T·Qᵀ is symmetric positive."""
    g = generator(2)
    S_u, S_d = pair_of_factors(2, 5, g)
    T, Q = balanced(S_u, S_d).T, balanced(S_u, S_d, max_condition=1.0).T
    polar = T @ Q.mT
    torch.testing.assert_close(polar, polar.mT, rtol=0, atol=1e-13)
    assert (torch.linalg.eigvalsh(polar) > 0).all()
    torch.testing.assert_close(Q @ Q.mT, eye(5).expand(2, 5, 5), rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("seed", range(5))
def test_loss_rise_of_truncation(seed):
    """On the K-FAC quadratic (8): Σ_{i>k} σ_i²/2 exactly, no other subset or core of that rank does better, and the
    published projections are worse."""
    r, g = 6, generator(seed)
    S_u, S_d = pair_of_factors(1, r, g)
    T, T_inv, sigma = balanced(S_u, S_d, 0.0)
    for k in range(1, r):
        keep = torch.tensor([k])
        A, B = eye(r)[None].clone(), eye(r)[None].clone()  # core of B·I·A: A ← TA, B ← BT⁻¹, then the mask
        A, B = truncate_(T @ A, keep, 1), truncate_(B @ T_inv, keep, 2)
        ours = rise((B @ A)[0], S_u[0], S_d[0])
        predicted = 0.5 * sigma[0, k:].square().sum().item()
        assert ours == pytest.approx(predicted, rel=1e-10)
        assert ours == pytest.approx(eckart_young(k, S_u[0], S_d[0]), rel=1e-9)
        best, kept = best_subset(k, T[0], T_inv[0], S_u[0], S_d[0])
        assert kept == tuple(range(k)) and best == pytest.approx(ours, rel=1e-9)
        for _ in range(40):  # random cores, and neighbours of the best one
            left_, right_ = torch.randn(r, k, generator=g, dtype=F64), torch.randn(k, r, generator=g, dtype=F64)
            for step in (None, 1e-1, 1e-2):
                core = left_ @ right_ if step is None else (B[0, :, :k] + step * left_) @ (A[0, :k] + step * right_)
                assert rise(core, S_u[0], S_d[0]) >= ours * (1 - 1e-10)
        for two_sided in (False, True):
            P_a, P_g = projectors(S_u, S_d, keep, two_sided)
            assert rise((P_g @ P_a)[0], S_u[0], S_d[0]) > ours * 1.05


def test_rise_is_the_expectation_it_stands_for():
    """(8) against ½E(dᵀ(C−I)u)² over all pairs of rows: independence makes it exact, not approximate."""
    g = generator(7)
    u, d = torch.randn(9, 4, generator=g, dtype=F64), torch.randn(11, 4, generator=g, dtype=F64)
    core = torch.randn(4, 4, generator=g, dtype=F64)
    S_u, S_d = u.T @ u / 9, d.T @ d / 11
    assert rise(core, S_u, S_d) == pytest.approx(rise_sampled(core, u, d), rel=1e-12)


def test_known_case():
    """Diagonal factors: σ_i = √(u_i d_i), sorted; the permutation is T up to signs and scale."""
    S_u, S_d = torch.diag(torch.tensor([1.0, 4.0, 9.0])), torch.diag(torch.tensor([16.0, 9.0, 1.0]))
    T, _, sigma = balanced(S_u[None], S_d[None], 0.0)
    torch.testing.assert_close(sigma[0], torch.tensor([6.0, 4.0, 3.0], dtype=F64))
    expected = torch.tensor([[0, (9 / 4) ** 0.25, 0], [2, 0, 0], [0, 0, (1 / 9) ** 0.25]], dtype=F64)
    torch.testing.assert_close(T[0].abs(), expected, rtol=0, atol=1e-14)


def test_identical_factors_need_an_orthogonal_gauge_only():
    S = random_spd(2, 5, generator(3))
    T, _, sigma = balanced(S, S, 0.0)
    torch.testing.assert_close(T @ T.mT, eye(5).expand(2, 5, 5), rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma, torch.linalg.eigvalsh(S).flip(-1), rtol=1e-12, atol=0)


def test_balancing_twice_is_balancing_once():
    g = generator(4)
    S_u, S_d = pair_of_factors(2, 6, g)
    T, T_inv, sigma = balanced(S_u, S_d, 0.0)
    again = balanced(congruence(T, S_u), congruence(T_inv.mT, S_d), 0.0)
    torch.testing.assert_close(again.sigma, sigma, rtol=1e-11, atol=0)
    torch.testing.assert_close(again.T.abs(), eye(6).expand(2, 6, 6), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------- what may not change


@pytest.mark.parametrize("which", ["S_u", "S_d"])
@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf"), -1.0])
def test_empty_or_broken_factor_changes_nothing(which, poison):
    """That pair keeps its basis, exactly, and the others do not notice."""
    g = generator(5)
    S_u, S_d = pair_of_factors(3, 4, g)
    clean = balanced(S_u, S_d)
    S = {"S_u": S_u, "S_d": S_d}[which]
    S[1] = S[1] * poison
    T, T_inv, sigma = balanced(S_u, S_d)
    assert (
        torch.equal(T[1], eye(4)) and torch.equal(T_inv[1], eye(4)) and torch.equal(sigma[1], torch.zeros(4, dtype=F64))
    )
    for ours, theirs in zip((T, T_inv, sigma), clean, strict=True):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])


@given(psd_stacks())
@some
def test_rank_deficient_factors(S):
    """Fewer observations than directions: with damping the gauge exists, is finite, and inverts."""
    r = S.shape[-1]
    for S_u, S_d in ((S, S.flip(0)), (S, eye(r).expand_as(S)), (eye(r).expand_as(S), S)):
        T, T_inv, sigma = balanced(S_u, S_d)
        assert T.isfinite().all() and sigma.isfinite().all() and (sigma >= 0).all()
        assert (norm(T @ T_inv - eye(r)) <= 64 * r * EPS[F64] * torch.linalg.cond(T)).all()


@given(live_stacks(), seeds)
@some
def test_live_rank_is_the_small_problem_and_the_identity(case, seed):
    S_u, k = case
    L, r = S_u.shape[:2]
    alive = torch.arange(r) < k[:, None]
    S_d = torch.where(alive[:, :, None] & alive[:, None, :], random_spd(L, r, generator(seed)), 0.0)
    T, T_inv, sigma = balanced(S_u, S_d, 1e-6, k)
    for i, n in enumerate(k.tolist()):
        small = balanced(S_u[i : i + 1, :n, :n], S_d[i : i + 1, :n, :n], 1e-6)
        torch.testing.assert_close(sigma[i, :n], small.sigma[0], rtol=1e-10, atol=0)
        assert not sigma[i, n:].any()
        for ours, theirs in ((T[i], small.T[0]), (T_inv[i], small.T_inv[0])):
            signs = (ours[:n, :n] * theirs).sum(-1 if theirs is small.T[0] else -2).sign()
            gap = small.sigma[0].diff().abs().min().item() / small.sigma[0, 0].item() if n > 1 else 1.0
            scaled = theirs * (signs[:, None] if theirs is small.T[0] else signs)
            # eigenvectors of close eigenvalues turn by eps/gap
            torch.testing.assert_close(ours[:n, :n], scaled, rtol=0, atol=1e-11 / gap * norm(theirs).item())
            outside = ours.clone()
            outside[:n, :n] = 0
            torch.testing.assert_close(outside, eye(r) * ~alive[i], rtol=0, atol=1e-15)


def test_scale_of_a_factor_does_not_trigger_the_fallback():
    """cond(T) < 100 on the live block, S_d at 1e-18 of S_u: with and without a dead direction must agree."""
    g = generator(6)
    S_u = torch.zeros(1, 4, 4, dtype=F64)
    S_d = torch.zeros(1, 4, 4, dtype=F64)
    S_u[0, :3, :3] = spd(torch.tensor([1.0, 1e-2, 1e-3], dtype=F64), g)
    S_d[0, :3, :3] = 1e-18 * random_spd(1, 3, g)[0]
    small = balanced(S_u[:, :3, :3], S_d[:, :3, :3])
    assert torch.linalg.cond(small.T) < 100
    T = balanced(S_u, S_d, k=torch.tensor([3])).T[:, :3, :3]
    torch.testing.assert_close(T.abs(), small.T.abs(), rtol=1e-8, atol=1e-12)


# ------------------------------------------------------------------------------------------------- carrying along


@given(seeds, small_ranks)
@some
def test_gradients_of_gauged_parameters(seed, r):
    """By autograd through a layer: ∂L/∂(TA) = T⁻ᵀ∇A and ∂L/∂(BT⁻¹) = ∇B Tᵀ, in both storages."""
    g = generator(seed)
    L, d_in, d_out, n = 2, 5, 4, 7
    A, B = torch.randn(L, r, d_in, generator=g, dtype=F64), torch.randn(L, d_out, r, generator=g, dtype=F64)
    x, w = torch.randn(n, d_in, generator=g, dtype=F64), torch.randn(n, d_out, generator=g, dtype=F64)
    T, T_inv, _ = balanced(*pair_of_factors(L, r, g))

    def gradients(A, B):
        A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
        loss = sum((torch.tanh(2.0 * (x @ a.T) @ b.T) * w).mean() for a, b in zip(A, B, strict=True))
        return torch.autograd.grad(loss, (A, B))

    old_A, old_B = gradients(A, B)
    new_A, new_B = gradients(T @ A, B @ T_inv)
    tolerance = {"rtol": 0, "atol": 1e-10 * max(1, norm(T).max().item() * norm(T_inv).max().item())}
    torch.testing.assert_close(new_A, carry_first(T_inv.mT, old_A, 1), **tolerance)
    torch.testing.assert_close(new_B, carry_first(T, old_B, 2), **tolerance)
    if r > 2:  # the wrong map does not pass
        assert (new_A - carry_first(T, old_A, 1)).abs().max() > 100 * tolerance["atol"]


def test_factors_of_gauged_parameters():
    """S_u and S_d of the new basis are congruences of the old ones, from the signals themselves."""
    g = generator(8)
    T, T_inv, _ = balanced(*pair_of_factors(1, 4, g), 0.0)
    u, d = torch.randn(50, 4, generator=g, dtype=F64), torch.randn(50, 4, generator=g, dtype=F64)
    new_u, new_d = u @ T[0].T, d @ T_inv[0]
    torch.testing.assert_close(congruence(T, (u.T @ u)[None])[0], new_u.T @ new_u)
    torch.testing.assert_close(congruence(T_inv.mT, (d.T @ d)[None])[0], new_d.T @ new_d)


@given(seeds, stack_sizes, small_ranks, rank_dims)
@some
def test_second_moments_are_exact_for_signed_permutations_and_scalings(seed, L, r, rank_dim):
    g = generator(seed)
    permutation = torch.stack([eye(r)[torch.randperm(r, generator=g)] for _ in range(L)])
    signs = torch.randint(0, 2, (L, r), generator=g) * 2.0 - 1
    M = permutation * signs[:, :, None] * 2.0 ** torch.randint(-3, 4, (L, r), generator=g)[:, :, None]
    grads = torch.randn(30, L, *((r, 3) if rank_dim == 1 else (3, r)), generator=g, dtype=F64)
    moved = torch.stack([carry_first(M, x, rank_dim) for x in grads])
    assert torch.equal(carry_second(M, grads[0].square(), rank_dim), moved[0].square())
    # a mean of squares moves like each of them; the mean rounds in another order
    torch.testing.assert_close(carry_second(M, grads.square().mean(0), rank_dim), moved.square().mean(0))
    torch.testing.assert_close(carry_first(M, grads.mean(0), rank_dim), moved.mean(0), rtol=0, atol=1e-14)


@given(seeds, small_ranks, rank_dims, st.sampled_from([torch.float32, torch.float64]))
@few
def test_second_moments_stay_non_negative_and_keep_their_trace_under_rotations(seed, r, rank_dim, dtype):
    g = generator(seed)
    Q = orthogonal(r, g)[None]
    v = torch.rand(1, *((r, 5) if rank_dim == 1 else (5, r)), generator=g).to(dtype) * 1e-12
    carried = carry_second(Q, v, rank_dim)
    assert (carried >= 0).all() and carried.dtype == dtype
    torch.testing.assert_close(carried.sum(rank_dim), v.sum(rank_dim), rtol=64 * r * EPS[dtype], atol=0)


def test_second_moments_are_exact_in_expectation_for_uncorrelated_entries():
    """(M∘M)v is E(Mg)² when the entries of a column are uncorrelated; with correlation it is not."""
    g, n, r = generator(9), 200_000, 3
    M = torch.randn(1, r, r, generator=g, dtype=F64)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=F64)[:, None]
    free = torch.randn(r, n, generator=g, dtype=F64) * scale
    bound = torch.randn(1, n, generator=g, dtype=F64) * scale
    for x, exact in ((free, True), (bound, False)):
        truth = (M[0] @ x).square().mean(-1)
        carried = carry_second(M, x.square().mean(-1)[None, :, None], 1)[0, :, 0]
        error = ((carried - truth).abs() / truth).max()
        assert error < 6 * (2 / n) ** 0.5 * 2 if exact else error > 0.1  # six standard errors of a second moment


@given(seeds, small_ranks, st.sampled_from([torch.float32, torch.float64]))
@few
def test_congruence(seed, r, dtype):
    g = generator(seed)
    M, S = torch.randn(2, r, r, generator=g, dtype=F64), random_spd(2, r, g).to(dtype)
    C = congruence(M, S)
    assert C.dtype == dtype and torch.equal(C, C.mT)
    exact = M @ S.double() @ M.mT
    # computed in float64 and rounded once, also for float32 factors
    torch.testing.assert_close(C.double(), exact, rtol=0, atol=(EPS[dtype] * exact.abs().max()).item())
    torch.testing.assert_close(
        congruence(torch.linalg.inv(M), congruence(M, S.double())), S.double(), rtol=0, atol=1e-6
    )


# ------------------------------------------------------------------------------------------------- published projectors


@given(seeds, st.integers(1, 12), st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.data())
@some
def test_projectors_are_projectors(seed, r, two_sided, dtype, data):
    g = generator(seed)
    k = torch.tensor([data.draw(st.integers(0, r)) for _ in range(2)])
    S_u, S_d = (S.to(dtype) for S in pair_of_factors(2, r, g, 1e-8))
    for P in projectors(S_u, S_d, k, two_sided):
        assert P.dtype == dtype
        tolerance = 16 * r * EPS[dtype]
        torch.testing.assert_close(P @ P, P, rtol=0, atol=tolerance)
        torch.testing.assert_close(P, P.mT, rtol=0, atol=tolerance)
        torch.testing.assert_close(P.diagonal(dim1=1, dim2=2).sum(-1), k.to(dtype), rtol=0, atol=tolerance * r)
        values = torch.linalg.eigvalsh(P)
        assert ((values > 0.5).sum(-1) == k).all()


def test_projectors_keep_the_leading_eigenspaces():
    g = generator(10)
    Q, V = orthogonal(5, g), orthogonal(5, g)
    values = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0], dtype=F64)
    S_u, S_d = ((Q * values) @ Q.T)[None], 1e-9 * ((V * values) @ V.T)[None]
    P_a, P_g = projectors(S_u, S_d, torch.tensor([2]), two_sided=True)
    torch.testing.assert_close(P_a[0], Q[:, :2] @ Q[:, :2].T)
    torch.testing.assert_close(P_g[0], V[:, :2] @ V[:, :2].T)
    one = projectors(S_u, S_d, torch.tensor([2]), two_sided=False)
    torch.testing.assert_close(one[0], P_a)
    torch.testing.assert_close(one[1], P_a)


@pytest.mark.parametrize("poison", [0.0, float("nan"), -1.0])
def test_two_sided_falls_back_to_one_side_pair_by_pair(poison):
    S_u, S_d = pair_of_factors(3, 4, generator(11))
    S_d[1] *= poison
    k = torch.tensor([2, 2, 2])
    P_a, P_g = projectors(S_u, S_d, k, two_sided=True)
    torch.testing.assert_close(P_g[1], P_a[1], rtol=0, atol=1e-15)
    assert (P_g[0] - P_a[0]).abs().max() > 0.01


def test_full_rank_projectors_are_the_identity():
    P_a, P_g = projectors(*pair_of_factors(2, 6, generator(12)), torch.tensor([6, 6]), two_sided=True)
    for P in (P_a, P_g):
        torch.testing.assert_close(P, eye(6).expand(2, 6, 6), rtol=0, atol=1e-14)
