"""Whitening and singular vectors from sketches, against the dense matrices in float64."""

import pytest
import torch

from curvopt.functional.whitening import DAMPING, gaussian, right_singular, scaled_like, whitened_rows, whitening

D_IN, D_OUT, N = 24, 18, 400


def rows(d, decay, seed, rank=None):
    """Rows whose second moment has a decaying spectrum in a random basis; of low rank if asked."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    if rank is not None:
        scale[rank:] = 0
    return torch.randn(N, d, generator=g, dtype=torch.float64) * scale @ Q


def dense(S, damping=DAMPING):
    S = S / S.diagonal().mean() + damping * torch.eye(len(S), dtype=S.dtype)
    mu, V = torch.linalg.eigh(S)
    return V * mu.rsqrt() @ V.mT


def sketched(S, columns, rank, name="x"):
    Omega = gaussian(len(S), columns, name, S)
    return whitening(S @ Omega, Omega, S.trace(), rank)


@pytest.mark.parametrize("columns", [24, 40])
def test_with_all_directions_it_is_the_inverse_root(columns):
    X = rows(D_IN, 1.0, 0)
    S = X.mT @ X
    R = sketched(S, columns, D_IN)
    # the condition number of the core (1e3 squared) over float64
    torch.testing.assert_close(R(torch.eye(D_IN, dtype=S.dtype)), dense(S), rtol=1e-6, atol=1e-6)


def test_of_low_rank_it_is_exact_from_few_columns():
    X = rows(D_IN, 0.5, 1, rank=5)
    S = X.mT @ X
    R = sketched(S, 8, 8)
    torch.testing.assert_close(R(torch.eye(D_IN, dtype=S.dtype)), dense(S), rtol=1e-7, atol=1e-7)


def test_the_scale_does_not_matter_and_zero_is_the_identity():
    X = rows(D_IN, 1.0, 2)
    S, E = X.mT @ X, torch.eye(D_IN, dtype=torch.float64)
    torch.testing.assert_close(sketched(1e-12 * S, 12, 6)(E), sketched(S, 12, 6)(E), rtol=1e-9, atol=1e-9)
    assert torch.equal(sketched(0 * S, 12, 6)(E), E)


def test_the_leading_directions_are_equalised_and_the_mean_of_the_rest():
    """Rᵀ(S/mean + λ)R is 1 on V, and has the mean 1 on the complement up to the spread there."""
    X = rows(D_IN, 1.5, 3)
    S = X.mT @ X
    S = S / S.diagonal().mean()
    R = sketched(S, 20, 6)
    white = R(R(S + DAMPING * torch.eye(D_IN, dtype=S.dtype)).mT)
    inside = R.V.mT @ white @ R.V
    # Nyström's error with 14 columns more than directions, relative to the smallest of these
    torch.testing.assert_close(inside, torch.eye(6, dtype=S.dtype), rtol=0, atol=3e-2)
    before = torch.linalg.cond(S + DAMPING * torch.eye(D_IN, dtype=S.dtype))
    assert torch.linalg.cond(white) < before / 20


def matrices(rank):
    g = torch.Generator().manual_seed(4)
    M = torch.randn(D_OUT, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, D_IN, generator=g).double()
    Omega, Psi = gaussian(D_IN, 8, "Ω", M), gaussian(D_OUT, 16, "Ψ", M)
    return M, Omega, Psi


def test_singular_vectors_of_a_matrix_of_low_rank_are_exact():
    M, Omega, Psi = matrices(6)
    sigma, V = right_singular(M @ Omega, Psi.mT @ M, Psi, 6)
    _, wanted, Vh = torch.linalg.svd(M)
    torch.testing.assert_close(sigma, wanted[:6], rtol=1e-10, atol=0)
    # of the same subspaces, vector by vector: the singular values are distinct
    torch.testing.assert_close((Vh[:6] @ V).abs(), torch.eye(6, dtype=M.dtype), rtol=0, atol=1e-9)


def test_of_a_decaying_spectrum_the_leading_subspace_is_found():
    g = torch.Generator().manual_seed(5)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q for n in (D_OUT, D_IN))
    M = U * torch.arange(1, D_OUT + 1).double() ** -2 @ V[:, :D_OUT].mT
    Omega, Psi = gaussian(D_IN, 8, "Ω", M), gaussian(D_OUT, 16, "Ψ", M)
    sigma, found = right_singular(M @ Omega, Psi.mT @ M, Psi, 3)
    overlap = torch.linalg.svdvals(V[:, :3].mT @ found)
    assert overlap.min() > 0.97 and sigma[0] == pytest.approx(1.0, rel=0.02)
    blind = gaussian(D_IN, 3, "blind", M)  # negative control: a random subspace
    assert torch.linalg.svdvals(V[:, :3].mT @ torch.linalg.qr(blind).Q).min() < 0.5


def whole_start(x, g, r=3):
    """The start from sketches wide enough to be exact, and the dense formula."""
    G = g.mT @ x
    S_x, S_g = x.mT @ x, g.mT @ g
    R_x, R_g = sketched(S_x, 2 * D_IN, D_IN), sketched(S_g, 2 * D_OUT, D_OUT, "g")
    Omega, Psi = gaussian(D_IN, D_OUT, "Ω", G), gaussian(D_OUT, 2 * D_OUT, "Ψ", G)
    left = R_g((G @ R_x(Omega.mT).mT).mT).mT  # R is symmetric
    right = R_x(R_g(Psi.mT) @ G)
    sigma, V = right_singular(left, right, Psi, r)
    A = gaussian(D_IN, r, "A", G).mT
    return whitened_rows(V, sigma, A, R_x), dense(S_g) @ G @ dense(S_x), dense(S_x), A


def test_the_start_is_the_dense_formula():
    start, M, R, A = whole_start(rows(D_IN, 0.5, 6), rows(D_OUT, 0.5, 7))
    wanted = scaled_like(torch.linalg.svd(M).Vh[:3] @ R, A)
    signs = (start * wanted).sum(1).sign()[:, None]
    torch.testing.assert_close(signs * start, wanted, rtol=1e-4, atol=1e-5)
    assert torch.linalg.vector_norm(start) == pytest.approx(torch.linalg.vector_norm(A).item())


def test_the_start_follows_orthogonal_changes_of_both_sides():
    """x → x P, g → g Q: A's start turns by P and knows nothing of Q; it does not know the scales either."""
    x, g = rows(D_IN, 0.5, 8), rows(D_OUT, 0.5, 9)
    P, Q = (torch.linalg.qr(rows(d, 0.0, 10)[:d]).Q for d in (D_IN, D_OUT))
    start, *_ = whole_start(x, g)
    turned, *_ = whole_start(3.0 * x @ P, 1e-6 * g @ Q)
    signs = (turned * (start @ P)).sum(1).sign()[:, None]
    torch.testing.assert_close(signs * turned, start @ P, rtol=1e-4, atol=1e-5)


def test_rows_beyond_the_rank_are_random_and_whitened():
    R = sketched(torch.eye(D_IN, dtype=torch.float64), 2 * D_IN, D_IN)
    A = gaussian(D_IN, 4, "A", torch.zeros((), dtype=torch.float64)).mT
    V = torch.eye(D_IN, dtype=torch.float64)[:, :2]
    start = whitened_rows(V, torch.tensor([1.0, 1e-12]), A, R)
    assert torch.linalg.matrix_rank(start) == 4
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(start[1:], A[1:]), torch.ones(3).double())
