"""B₀ along the compressed gradient, and the importances, against float64 oracles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, seeds, some
from torch.nn import functional as F

from curvopt.functional.gradient_init import compressed_start, frobenius, mean_abs, nuclear, step_size

TIGHT = 1e-9  # float64, condition numbers up to a few thousand


def drawn(*shape, g):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def projector(A):
    """Orthogonal projector onto the row space of A, from its SVD."""
    _, sigma, V = torch.linalg.svd(A, full_matrices=False)
    V = V[sigma > 1e-10 * sigma[0]]
    return V.T @ V


@given(seeds, st.integers(1, 6), st.integers(6, 12), st.integers(1, 12))
@some
def test_the_update_is_the_projected_gradient(seed, r, d_in, d_out):
    g = generator(seed)
    A, G = drawn(r, d_in, g=g), drawn(d_out, d_in, g=g)
    s, size = 1.7, 0.3
    B = compressed_start(G @ A.T, A, s, size)
    torch.testing.assert_close(s * B @ A, -size * G @ projector(A), rtol=TIGHT, atol=TIGHT)


def test_no_other_B_is_nearer_to_the_gradient_step():
    g = generator(0)
    A, G = drawn(3, 7, g=g), drawn(5, 7, g=g)
    s, size = 0.5, 0.2
    B = compressed_start(G @ A.T, A, s, size)
    least = torch.linalg.lstsq(s * A.T, -size * G.T).solution.T  # min over B of ‖s B A + ξ G‖
    torch.testing.assert_close(B, least, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("stable", [False, True])
def test_the_official_scale(stable):
    """B₀ = −(γ/α) Ḡ Aᵀ (AAᵀ)⁻¹ with γ = lr₀ R/√(r/d_in), R = √r with rank-stabilised scaling, else r."""
    g, r, d_in, alpha, lr = generator(1), 4, 9, 16.0, 0.05
    A, G = drawn(r, d_in, g=g), drawn(6, d_in, g=g)
    R = math.sqrt(r) if stable else r
    gamma = lr * R / math.sqrt(r / d_in)
    official = -(gamma / alpha) * G @ A.T @ torch.linalg.inv(A @ A.T)
    ours = compressed_start(G @ A.T, A, alpha / R, step_size(lr, r, d_in))
    torch.testing.assert_close(ours, official, rtol=TIGHT, atol=TIGHT)


def layer(seed=2, d_in=8, d_out=5, r=3, rows=40):
    """A frozen W, a fresh adapter and data whose targets another W made."""
    g = generator(seed)
    W, A = drawn(d_out, d_in, g=g), drawn(r, d_in, g=g) / math.sqrt(d_in)
    x = drawn(rows, d_in, g=g)
    return W, A, x, x @ drawn(d_out, d_in, g=g).T


def test_B0_from_the_gradient_of_B_is_B0_from_the_gradient_of_W():
    W, A, x, y = layer()
    s = 1.3
    W.requires_grad_()
    B = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    F.mse_loss(x @ (W + s * B @ A).T, y).backward()
    torch.testing.assert_close(B.grad, s * W.grad @ A.T, rtol=TIGHT, atol=TIGHT)
    one, two = (compressed_start(M, A, s, 0.1) for M in (B.grad / s, W.grad @ A.T))
    torch.testing.assert_close(one, two, rtol=TIGHT, atol=TIGHT)
    # control: with B ≠ 0 the gradient of W is another one
    B.data.normal_(generator=generator(3))
    W.grad = None
    F.mse_loss(x @ (W + s * B @ A).T, y).backward()
    assert not torch.allclose(compressed_start(W.grad @ A.T, A, s, 0.1), two, rtol=1e-2)


def test_the_loss_drops_and_with_the_other_sign_it_rises():
    W, A, x, y = layer()
    W.requires_grad_()
    before = F.mse_loss(x @ W.T, y)
    before.backward()
    W0, s = W.detach(), 2.0
    B = compressed_start(W.grad @ A.T, A, s, step_size(5e-2, 3, 8))
    down, up = (F.mse_loss(x @ (W0 + sign * s * B @ A).T, y) for sign in (1, -1))
    # first order: the change is ∓ξ ‖Ḡ P‖²
    first = step_size(5e-2, 3, 8) * (W.grad @ projector(A)).square().sum()
    assert down < before - first / 2 and up > before + first / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dependent_rows_are_damped(dtype):
    g = generator(4)
    A = drawn(4, 8, g=g).to(dtype)
    A[3] = A[0]
    G = drawn(6, 8, g=g)
    B = compressed_start(G @ A.double().T, A, 1.0, 1.0)
    assert B.isfinite().all() and B.dtype == torch.float64
    P = projector(A.double())
    # damping of 1e-6 of the mean eigenvalue, over the smallest one that is not zero
    torch.testing.assert_close(B @ A.double(), -G @ P, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(B[:, 0], B[:, 3], rtol=1e-6, atol=1e-6)


def test_without_A_there_is_no_start():
    assert not compressed_start(torch.ones(3, 2), torch.zeros(2, 4), 1.0, 1.0).any()
    assert not compressed_start(torch.zeros(3, 2), torch.eye(2, 4), 1.0, 1.0).any()


# ---------------------------------------------------------------------------------------------- importances


def test_importances_by_hand():
    W = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.bfloat16)
    G = torch.tensor([[4.0, 1.0], [7.0, -1.0]])
    assert mean_abs(W, G) == (4 + 2 + 0 + 3) / 4
    assert frobenius(G) == math.sqrt(16 + 1 + 49 + 1)
    assert mean_abs(W, G).dtype == torch.float32


@given(seeds, st.integers(1, 5), st.integers(50, 90), st.integers(50, 90))
@some
def test_nuclear_norm_of_low_rank_is_exact(seed, rank, rows, columns):
    g = generator(seed)
    G = drawn(rows, rank, g=g) @ drawn(rank, columns, g=g)
    exact = torch.linalg.svdvals(G).sum()
    torch.testing.assert_close(nuclear(G, rank=8, generator=g), exact, rtol=1e-8, atol=0)


def test_nuclear_norm_counts_the_leading_values_and_no_more():
    g = generator(5)
    U, V = (torch.linalg.qr(drawn(120, 120, g=g)).Q for _ in range(2))
    sigma = torch.arange(1, 121, dtype=torch.float64) ** -1.0
    G = (U * sigma) @ V.T
    found = nuclear(G, rank=20, generator=g)
    # two power iterations with 8 columns more than needed: the error of Halko et al. is far below one per cent here
    assert 0.99 * sigma[:20].sum() < found < sigma[:20].sum() * (1 + 1e-9)
    rough = nuclear(G, rank=20, power=0, generator=g)
    assert rough < found  # control: the iterations are what makes it near
    small = G[:10, :10]
    torch.testing.assert_close(nuclear(small, generator=g), torch.linalg.svdvals(small).sum(), rtol=1e-12, atol=0)


def test_nuclear_norm_draws_from_its_generator_alone():
    G = drawn(60, 70, g=generator(6))
    state = torch.get_rng_state()
    one, two = (nuclear(G, rank=8, power=0, generator=generator(7)) for _ in range(2))
    assert one == two and torch.equal(state, torch.get_rng_state())
