"""Truncation in the balanced basis costs least on the K-FAC quadratic; the published projectors keep eigenspaces."""

import pytest
import torch
from basis_kit import F64, eye, pair_of_factors
from hypothesis import given
from hypothesis import strategies as st
from oracles import EPS, best_subset, eckart_young, rise, rise_sampled
from strategies import generator, orthogonal, seeds, some

from curvopt.functional.basis import balanced, projectors
from curvopt.functional.truncate import truncate_

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
