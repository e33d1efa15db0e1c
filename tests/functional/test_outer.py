"""Outer factors of low rank: what the map does to the gradient, and how well the basis follows the factor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvopt.functional.outer import cosine_rows, outer_map, through

F64 = torch.float64
FINE = torch.tensor(0.0)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def products(G, V):
    return torch.cat((G @ G.mT, G @ V.mT), 2)


def advanced(G, V, mu, trace, decay=0.95, damping=0.1, found_inf=FINE):
    """One step: what preconditions G, the new basis and the new numbers."""
    d = torch.full((len(G),), float(G.shape[2]), dtype=G.dtype)
    M, mu, trace = outer_map(products(G, V), mu, trace, d, decay, damping, found_inf)
    return *through(M, G, V), mu, trace


def start(T, k, d, dtype=F64):
    return cosine_rows(k, d).to(dtype).expand(T, k, d), torch.zeros(T, k, dtype=dtype), torch.zeros(T, dtype=dtype)


def root(S, damping):
    """√(1+λ) (S / mean diag S + λI)^(-1/2), from all eigenvalues."""
    values, Q = torch.linalg.eigh(S / S.diagonal(dim1=1, dim2=2).mean(1)[:, None, None])
    return (Q * ((1 + damping) / (values.clamp(min=0) + damping)).sqrt()[:, None, :]) @ Q.mT


def stream(steps, r, d, spectrum, decay, k, dtype=F64, turn=0.0, scale=1.0):
    """Feed gradients with rows of a covariance that turns; return the last ones and all that is known of the factor."""
    Q = torch.linalg.qr(drawn(0, d, d)).Q
    skew = drawn(1, d, d)
    spin = torch.matrix_exp(turn * (skew - skew.mT) / d**0.5)
    V, mu, trace = start(1, k, d, dtype)
    S = torch.zeros(1, d, d, dtype=F64)
    for n in range(steps):
        Q = spin @ Q
        G = scale * (drawn(2 + n, 1, r, d) * spectrum.sqrt()) @ Q.mT
        S = decay * S + (1 - decay) * G.mT @ G / r
        X, V, mu, trace = advanced(G.to(dtype), V, mu, trace, decay)
    return G, X, V, mu, trace, S


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(6, 30))
def test_rows_stay_orthonormal_and_the_trace_is_that_of_the_average(r, k, d):
    V, mu, trace = start(2, k, d)
    S = torch.zeros(2, d, d, dtype=F64)
    for n in range(4):
        G = drawn(n, 2, r, d)
        S = 0.9 * S + 0.1 * G.mT @ G / r
        _, V, mu, trace = advanced(G, V, mu, trace, 0.9)
    eye = torch.eye(k, dtype=F64).expand(2, k, k)
    # a Cholesky factor of a matrix whose condition may reach 1e8 at few columns
    torch.testing.assert_close(V @ V.mT, eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(trace, S.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=0)
    assert (mu.sum(1) <= trace * (1 + 1e-6)).all() and (mu > 0).all()


def test_the_whole_basis_gives_the_whole_root():
    """k = d: no matter how V lies, once the iteration has found the eigenvectors of a factor that stays."""
    r = d = 6
    sizes = torch.tensor([6.0, 4.0, 3.0, 2.0, 1.5, 1.0], dtype=F64)
    G = sizes[:, None] * torch.linalg.qr(drawn(0, 1, d, d)).Q
    V, mu, trace = start(1, d, d)
    for _ in range(600):
        X, V, mu, trace = advanced(G, V, mu, trace, 0.5)
    S = G.mT @ G / r
    torch.testing.assert_close(mu[0], torch.linalg.eigvalsh(S)[0].flip(0), rtol=1e-8, atol=0)
    torch.testing.assert_close(X, G @ root(S, 0.1), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("damping", [0.03, 0.1, 1.0])
def test_the_map_is_the_root_of_the_model(damping):
    """∇' = ∇ S̃^(-1/2) √(1+λ) with S = Vᵀ diag(μ) V + ρ (I − VᵀV) exactly, for the numbers it returns."""
    G, V = drawn(0, 3, 4, 20), start(3, 5, 20)[0]
    mu = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    trace = mu.sum(1) + 3.0
    X, V, mu, trace = advanced(G, V, mu, trace, 0.9, damping)
    rho = (trace - mu.sum(1)) / 15
    S = V.mT @ (mu[:, :, None] * V) + rho[:, None, None] * (torch.eye(20, dtype=F64) - V.mT @ V)
    torch.testing.assert_close(X, G @ root(S, damping), rtol=1e-9, atol=1e-12)


def test_no_shape_no_change():
    """A factor that is a multiple of I, and λ → ∞, leave the gradient alone; so does one that is empty."""
    d = 8
    eye = torch.eye(d, dtype=F64)[None]
    V, _, _ = start(1, 4, d)
    X, *_ = advanced(eye, V, torch.full((1, 4), 1 / d, dtype=F64), torch.ones(1, dtype=F64))
    torch.testing.assert_close(X, eye, rtol=1e-12, atol=1e-12)
    G = drawn(0, 1, 3, d)
    X, *_ = advanced(G, *start(1, 4, d), damping=1e12)
    torch.testing.assert_close(X, G, rtol=1e-9, atol=1e-9)
    zero = torch.zeros(1, 3, d, dtype=F64)
    X, V, mu, trace = advanced(zero, *start(1, 4, d))
    assert torch.equal(X, zero) and torch.equal(V, start(1, 4, d)[0]) and (mu == 0).all() and (trace == 0).all()


def test_it_sees_shape_alone_and_turns_with_the_columns():
    """Gradients c times as large give a result c times as large; rotated rows of ∇ a rotated result, and the same V."""
    runs = []
    U = torch.linalg.qr(drawn(9, 4, 4)).Q
    for c, turn in ((1.0, torch.eye(4, dtype=F64)), (1e-9, torch.eye(4, dtype=F64)), (1.0, U)):
        V, mu, trace = start(1, 3, 15)
        for n in range(5):
            X, V, mu, trace = advanced(c * turn @ drawn(n, 1, 4, 15), V, mu, trace)
        runs.append((turn.mT @ X / c, V))
    for X, V in runs[1:]:
        torch.testing.assert_close(X, runs[0][0], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(V, runs[0][1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype, unit", [(F64, 1e-12), (torch.float32, 2e-3)])
@pytest.mark.parametrize("turn", [0.0, 0.01])
def test_the_basis_follows_a_drifting_factor(dtype, unit, turn):
    """Against the exact leading eigenvectors of the very average: most of their energy, and the root close to theirs.

    The bounds are what an online method may lose: the iteration lags one step in 1/(1−β) behind what it averages.
    """
    k, d, r = 8, 60, 6
    spectrum = torch.arange(1, d + 1, dtype=F64) ** -1.5
    G, X, V, _, _, S = stream(150, r, d, spectrum, 0.95, k, dtype, turn, scale=1e-6)
    values, Q = torch.linalg.eigh(S)
    V = V.double()
    torch.testing.assert_close(V @ V.mT, torch.eye(k, dtype=F64)[None], rtol=0, atol=unit)
    captured = (V @ S @ V.mT).diagonal(dim1=1, dim2=2).sum()
    assert captured > 0.95 * values[0, -k:].sum()
    rest = values.clone()
    rest[:, :-k] = values[:, :-k].mean()
    top = G @ root((Q * rest[:, None, :]) @ Q.mT, 0.1)
    lost = torch.linalg.vector_norm(X.double() - top) / torch.linalg.vector_norm(top)
    assert lost < 0.25
    # the control: the basis of the start captures little, and plain gradients are far from the root's
    first = start(1, k, d)[0]
    assert (first @ S @ first.mT).diagonal(dim1=1, dim2=2).sum() < 0.6 * captured
    assert torch.linalg.vector_norm(G - top) > 2 * lost * torch.linalg.vector_norm(top)


@pytest.mark.parametrize("bad", ["found", "nan", "inf"])
def test_what_is_not_finite_changes_nothing(bad):
    G, (V, mu, trace) = drawn(0, 2, 3, 12), start(2, 4, 12)
    _, V, mu, trace = advanced(G, V, mu, trace)
    P = products(G, V)
    if bad != "found":
        P[0, 0, 0] = float(bad)
    M, new_mu, new_trace = outer_map(
        P, mu, trace, torch.full((2,), 12.0, dtype=F64), 0.95, 0.1, torch.tensor(float(bad == "found"))
    )
    eye = torch.eye(7, dtype=F64)
    assert torch.equal(M[0], eye) and torch.equal(new_mu[0], mu[0]) and new_trace[0] == trace[0]
    assert torch.equal(M[1], eye) == (bad == "found"), "the other matrix is its own"


def test_start_is_orthonormal():
    V = cosine_rows(5, 37)
    torch.testing.assert_close(V @ V.mT, torch.eye(5, dtype=F64), rtol=0, atol=1e-12)
