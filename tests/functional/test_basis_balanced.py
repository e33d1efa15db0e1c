"""The balanced basis: both factors become one diagonal, whatever the gauge; singular, broken and dead parts."""

import pytest
import torch
from basis_kit import F64, eye, norm, pair_of_factors
from hypothesis import given
from hypothesis import strategies as st
from oracles import EPS, hankel
from strategies import (
    conditions,
    generator,
    live_stacks,
    orthogonal,
    psd_stacks,
    random_spd,
    seeds,
    some,
    spd,
    spectrum,
    stack_sizes,
)

from curvopt.functional.basis import balanced, congruence


def random_gauge(L, r, g, condition=10.0):
    """A well-conditioned matrix that is no rotation."""
    values = torch.stack([spectrum("log", r, condition) for _ in range(L)])
    Q, R = (torch.stack([orthogonal(r, g) for _ in range(L)]) for _ in range(2))
    return Q * values[:, None, :] @ R


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
        # a direction, a row of T and a column of T⁻¹, is unique up to its sign
        signs = (T[i, :n, :n] * small.T[0]).sum(-1).sign()
        gap = small.sigma[0].diff().abs().min().item() / small.sigma[0, 0].item() if n > 1 else 1.0
        for ours, theirs, scaled in (
            (T[i], small.T[0], small.T[0] * signs[:, None]),
            (T_inv[i], small.T_inv[0], small.T_inv[0] * signs),
        ):
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
