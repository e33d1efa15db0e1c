"""Gradients, factors and moments carried into another basis arrive intact."""

import torch
from basis_kit import F64, eye, norm, pair_of_factors
from hypothesis import given
from hypothesis import strategies as st
from oracles import EPS
from strategies import few, generator, orthogonal, random_spd, rank_dims, seeds, small_ranks, some, stack_sizes

from curvopt.functional.basis import balanced, carry_first, carry_second, congruence


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
