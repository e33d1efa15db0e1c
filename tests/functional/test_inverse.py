"""inverse.py: residuals at the level the condition allows, unit scale, and failure as its docstring decides it."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import EPS, bits, damped_power
from strategies import (
    conditions,
    dampings,
    few,
    generator,
    live_stacks,
    orthogonal,
    psd_stacks,
    random_spd,
    seeds,
    small_ranks,
    some,
    spd,
    spd_stacks,
    spectrum,
)

from curvopt.functional import inverse
from curvopt.functional.inverse import (
    SINGLE,
    broken,
    damped_inverse,
    damped_inverse_root,
    eigenbasis,
    empty,
    normalised,
)

FUNCTIONS = {
    "inverse": lambda S, k=None, previous=None: damped_inverse(S, 0.1, k, previous),
    "root": lambda S, k=None, previous=None: damped_inverse_root(S, 0.1, k, previous),
    "eigenbasis": lambda S, k=None, previous=None: eigenbasis(S, k, previous)[0],
}
functions = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def damped(S, damping):
    """Ŝ + λI, one matrix at a time."""
    r = S.shape[-1]
    return torch.stack([M * (r / M.diagonal().sum()) + damping * torch.eye(r, dtype=M.dtype) for M in S.double()])


def spectral(M):
    return torch.linalg.matrix_norm(M, 2)


# ------------------------------------------------------------------------------------------------- values


@some
@given(spd_stacks(), st.sampled_from([1e-12, 1e-6, 1e-3, 1e-1, 1.0]))
def test_residual_of_the_inverse(S, damping):
    """‖(Ŝ+λI)P − I‖ ≤ c·r·cond·eps: Cholesky and two triangular solves are stable; conditions up to 1e12 and above."""
    M, P = damped(S, damping), damped_inverse(S, damping)
    r = S.shape[-1]
    residual = spectral(M @ P - torch.eye(r, dtype=torch.float64))
    assert (residual <= 4 * r * torch.linalg.cond(M) * EPS[torch.float64]).all()
    assert torch.equal(P, P.mT)


@some
@given(spd_stacks(), st.sampled_from([1e-6, 1e-3, 1e-1, 1.0]))
def test_float32_factors_lose_one_rounding_only(S, damping):
    """Computed in float64 and rounded once: the float64 result to half an eps₃₂, whatever the condition."""
    S = S.float()
    for f in (damped_inverse, damped_inverse_root):
        P = f(S, damping)
        assert P.dtype == torch.float32
        if f is damped_inverse or damping < SINGLE:
            assert torch.equal(P, f(S.double(), damping).float())


def bound_of_root(r, damping, eps):
    """What products lose: the rounding of M, relative to the least eigenvalue that the coefficients are made for."""
    return eps * (8 + 2 * (r / damping) ** 0.5 + 0.1 * r / damping)


SPECTRA = {
    "log": lambda r, g: spd(spectrum("log", r, 1e4), g),
    "power law": lambda r, g: covariance_of_rows(r, g),
}


def covariance_of_rows(r, g):
    """Of 4r rows whose scale falls as 1/i, rotated: what training gives."""
    x = torch.randn(4 * r, r, generator=g, dtype=torch.float64) / torch.arange(1, r + 1)
    x = x @ orthogonal(r, g)
    return x.T @ x / (4 * r)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("damping", [1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("r", [1, 2, 4, 8, 16, 32, 64, 128])
def test_root_against_eigenvalues(r, damping, kind):
    """In both dtypes, against the oracle (4), and the scale of the factor does not matter."""
    S = torch.stack([SPECTRA[kind](r, generator(n)) for n in range(2)])
    for factor in (S, 1e-9 * S.float()):
        X = damped_inverse_root(factor, damping).double()
        exact = torch.stack([damped_power(M, damping, -0.5) for M in factor])
        error = ((X - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max()
        eps = EPS[factor.dtype]
        once = factor.dtype == torch.float32 and damping < SINGLE  # computed in float64 and rounded
        assert error <= (eps if once else bound_of_root(r, damping, eps))
        assert torch.equal(X, X.mT)


def test_control_a_stage_less_would_not_do(monkeypatch):
    exact = inverse.stages
    monkeypatch.setattr(inverse, "stages", lambda *how: exact(*how)[:-1])
    S = covariance_of_rows(16, generator(0))[None]
    error = spectral(damped_inverse_root(S, 0.1) - damped_power(S[0], 0.1, -0.5)[None])
    assert (error > 1e3 * bound_of_root(16, 0.1, EPS[torch.float64])).all()


@pytest.mark.parametrize("smallest", [1.0, 0.3, 1e-2, 1e-4, 1e-6, 1e-10])
@pytest.mark.parametrize("tolerance", [1e-3, 3e-8, 1e-14])
def test_stages_take_the_interval_to_one(smallest, tolerance):
    s = torch.logspace(0, math.log10(smallest) / 2, 5001, dtype=torch.float64)
    found = inverse.stages(smallest, tolerance)
    for a, b, c in found:
        s = s * (a + b * s**2 + c * s**4)
    assert (s - 1).abs().max() <= tolerance + 8 * EPS[torch.float64] * len(found)
    assert len(found) == 1 or len(inverse.stages(smallest, 0.5)) <= len(found)


@pytest.mark.parametrize("k", [None, torch.tensor([5, 2])])
def test_root_with_damping_on_the_device(k):
    S = random_spd(2, 5, generator(8))
    for damping in (1e-3, 0.5, 20.0):
        given = torch.tensor(damping, dtype=torch.float64)
        X, want = damped_inverse_root(S, given, k), damped_inverse_root(S, damping, k)
        torch.testing.assert_close(X, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_root_of_a_large_stack_is_that_of_its_pieces(dtype):
    S = random_spd(600, 16, generator(9)).to(dtype)
    S[300] = torch.nan
    X = damped_inverse_root(S, 0.1)
    torch.testing.assert_close(X[:10], damped_inverse_root(S[:10], 0.1), rtol=1e-6, atol=1e-6)
    assert torch.equal(X[300], torch.eye(16, dtype=dtype)) and X.isfinite().all()


@pytest.mark.parametrize("r", [3, 7, 16, 33, 64])
def test_control_float32_arithmetic_would_not_do(r):
    """The same Cholesky in float32 misses the bound of the test above, so the float64 inside is needed."""
    S = spd(spectrum("log", r, 1e12), generator(0))[None].float()
    M = damped(S, 1e-9)
    P = damped_inverse(S.double(), 1e-9)
    narrow = torch.linalg.inv_ex(M.float())[0].double()
    error = spectral(narrow - P) / spectral(P)
    assert (error > 1e-3).all()


@some
@given(spd_stacks(), st.sampled_from([1e-6, 1e-3, 1e-1, 1.0]))
def test_root_squared_is_the_inverse(S, damping):
    """R² against the oracle (4); see `bound_of_root`, twice over."""
    R, M = damped_inverse_root(S, damping), damped(S, damping)
    r = S.shape[-1]
    bound = 8 * r * (r / damping + 1) * EPS[torch.float64]
    P = torch.stack([damped_power(x, damping, -1.0) for x in S])
    assert (spectral(R @ R - P) <= bound * spectral(P)).all()
    assert (spectral(R @ M @ R - torch.eye(r, dtype=torch.float64)) <= bound).all()
    assert torch.linalg.eigvalsh(R).min() > 0


@some
@given(spd_stacks())
def test_eigenbasis(S):
    """Orthonormal, descending, and QᵀŜQ is diagonal, to eps·‖Ŝ‖: backward stability, whatever the condition."""
    Q, values = eigenbasis(S)
    r = S.shape[-1]
    S_hat = damped(S, 0.0)
    bound = 8 * r * EPS[torch.float64] * spectral(S_hat)
    assert (spectral(Q.mT @ Q - torch.eye(r, dtype=torch.float64)) <= 8 * r * EPS[torch.float64]).all()
    assert (spectral(Q.mT @ S_hat @ Q - torch.diag_embed(values)) <= bound).all()
    assert (values.diff(dim=-1) <= 0).all() and (values >= 0).all()
    torch.testing.assert_close(values.sum(-1), torch.full((len(S),), float(r), dtype=torch.float64))
    assert values.dtype == torch.float64
    assert torch.equal(eigenbasis(S.float())[0], eigenbasis(S.float().double())[0].float())


@few
@given(psd_stacks())
def test_rank_deficient_and_zero_factors(S):
    """A second moment of fewer rows than r inverts to the oracle (4) all the same; without rows it is the identity."""
    for damping in (1e-3, 1.0):
        r = S.shape[-1]
        for f, power in ((damped_inverse, -1.0), (damped_inverse_root, -0.5)):
            oracle = torch.stack([damped_power(x, damping, power) for x in S])
            # ‖M‖ ≤ r + λ, hence cond ≤ (r + λ)/λ and the result is ≤ λ^power
            tolerance = 32 * r * (r / damping + 1) * EPS[torch.float64] * damping**power
            torch.testing.assert_close(f(S, damping), oracle, rtol=0, atol=tolerance)
    zero = S.diagonal(dim1=1, dim2=2).sum(-1) == 0
    assert torch.equal(empty(S), zero) and torch.equal(normalised(S)[1], ~zero)


@given(seeds, st.integers(1, 64), conditions, dampings)
@few
def test_equivariance(seed, r, condition, damping):
    """f(V S Vᵀ) = V f(S) Vᵀ for orthogonal V."""
    g = generator(seed)
    S, V = spd(spectrum("log", r, condition), g)[None], orthogonal(r, g)
    for f in (damped_inverse, damped_inverse_root):
        a, b = f(V @ S @ V.mT, damping), V @ f(S, damping) @ V.mT
        assert (spectral(a - b) <= 64 * r * (r / damping + 1) * EPS[torch.float64] * spectral(b)).all()


# ------------------------------------------------------------------------------------------------- scale


@functions
@given(S=spd_stacks(conditions=st.just(1e3)), exponent=st.integers(-60, 60))
@few
def test_powers_of_two_cancel_bit_for_bit(f, S, exponent):
    assert torch.equal(f(S), f(S * 2.0**exponent))


@given(spd_stacks(conditions=st.floats(0, 4).map(lambda x: 10.0**x)), dampings)
@some
def test_scale_of_the_factor_does_not_matter(S, damping):
    """S and 1e-10·S: the factor itself rounds by eps, which the inverse amplifies by its condition, the root by r/λ."""
    cond = S.shape[-1] / damping + 1
    for f in (damped_inverse, damped_inverse_root):
        a, b = f(S, damping), f(1e-10 * S, damping)
        assert (spectral(a - b) <= 16 * S.shape[-1] * cond * EPS[torch.float64] * spectral(a)).all()


def test_control_absolute_damping_is_a_scalar_on_small_factors():
    """What relative damping avoids: at 1e-10 the absolutely damped inverse is 1/λ times the identity to 1e-6."""
    S = 1e-10 * spd(spectrum("log", 8, 100.0), generator(1))
    absolute = torch.linalg.inv(S + 1e-3 * torch.eye(8, dtype=torch.float64)) * 1e-3
    assert spectral(absolute - torch.eye(8, dtype=torch.float64)) < 1e-6
    relative = damped_inverse(S[None], 1e-3)[0]
    assert spectral(relative) * spectral(torch.linalg.inv(relative)) > 50


def test_unit_scale():
    """Flat spectrum: Ŝ = I, so the inverse is 1/(1+λ) whatever the scale: the preconditioner does not change lr."""
    for scale in (1e-20, 1.0, 1e15):
        P = damped_inverse(scale * torch.eye(5)[None], 0.25)
        torch.testing.assert_close(P[0], torch.eye(5) / 1.25)


def test_subnormal_float64_factor_does_not_raise():
    eigenbasis(torch.eye(3, dtype=torch.float64)[None] * 1e-310)


def test_float32_extremes():
    """The whole range of float32, subnormal numbers and overflowing traces included, is fine."""
    for scale in (1e-44, 1e-30, 1e30, 3e38):
        S = scale * torch.eye(4)[None]
        torch.testing.assert_close(damped_inverse(S, 1.0)[0], torch.eye(4) / 2)
        torch.testing.assert_close(damped_inverse_root(S, 1.0)[0], torch.eye(4) / 2**0.5)
        assert torch.equal(eigenbasis(S)[0][0].abs().sum(0), torch.ones(4))


# ------------------------------------------------------------------------------------------------- live rank


@pytest.mark.parametrize("r", [1, 2, 5, 8])
def test_live_rank_is_the_small_problem_and_the_identity(r):
    for k in range(1, r + 1):
        S = torch.zeros(1, r, r, dtype=torch.float64)
        S[0, :k, :k] = random_spd(1, k, generator(k))[0]
        live = torch.tensor([k])
        for f in (damped_inverse, damped_inverse_root):
            P, small = f(S, 0.1, live), f(S[:, :k, :k], 0.1)
            # batched factorisations of another size may round otherwise
            torch.testing.assert_close(P[:, :k, :k], small, rtol=0, atol=64 * r * EPS[torch.float64] * 10)
            power = -1.0 if f is damped_inverse else -0.5
            torch.testing.assert_close(P[0], damped_power(S[0], 0.1, power, k), rtol=0, atol=1e-12)
            assert_identity_outside(P[0], k)
        Q, values = eigenbasis(S, live)
        small_values = eigenbasis(S[:, :k, :k])[1]
        torch.testing.assert_close(values[:, :k], small_values, rtol=0, atol=64 * r * EPS[torch.float64])
        assert not values[:, k:].any()
        assert_identity_outside(Q[0], k)
        S_hat = S[0] * k / S[0].trace()
        torch.testing.assert_close(Q[0].T @ S_hat @ Q[0], values[0].diag(), rtol=0, atol=1e-13 * r)
        torch.testing.assert_close(Q[0].T @ Q[0], torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-14 * r)


def assert_identity_outside(P, k):
    r = len(P)
    outside = P - torch.zeros_like(P).index_put_(
        (torch.arange(k)[:, None], torch.arange(k)[None, :]), P[:k, :k].clone()
    )
    assert torch.equal(outside, torch.eye(r, dtype=P.dtype) * (torch.arange(r) >= k))


@given(live_stacks())
@few
def test_what_stands_in_dead_rows_is_not_read(case):
    S, k = case
    r = S.shape[-1]
    alive = torch.arange(r) < k[:, None]
    rubbish = torch.where(alive[:, :, None] & alive[:, None, :], S, torch.randn(r, r, dtype=torch.float64))
    for f in FUNCTIONS.values():
        assert torch.equal(f(rubbish, k), f(S, k))


@functions
def test_full_live_rank_is_no_mask(f):
    S = random_spd(3, 6, generator(2))
    assert torch.equal(f(S, torch.tensor([6, 6, 6])), f(S))


@functions
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_live_rank_of_any_integer_type(f, dtype):
    S = random_spd(2, 4, generator(3))
    S[0, 2:], S[0, :, 2:] = 0, 0
    assert torch.equal(f(S, torch.tensor([2, 4], dtype=dtype)), f(S, torch.tensor([2, 4])))


# ------------------------------------------------------------------------------------------------- failure

POISONS = {
    "nan": lambda S: S.index_fill(-1, torch.tensor([0]), torch.nan),
    "one nan": lambda S: (
        S + torch.zeros_like(S).index_put_((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.nan, dtype=S.dtype))
    ),
    "inf": lambda S: S * torch.inf,
    "negative": lambda S: -S,
}
poisons = pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_is_the_identity_also_after_better_days(f, dtype):
    S = torch.zeros(2, 5, 5, dtype=dtype)
    previous = torch.full((2, 5, 5), 3.0, dtype=dtype)
    eye = torch.eye(5, dtype=dtype).expand(2, 5, 5)
    assert torch.equal(f(S), eye) and torch.equal(f(S, None, previous), eye)
    assert torch.equal(f(S, torch.tensor([2, 5])), eye)
    assert empty(S).all() and not broken(S).any()


@functions
@poisons
def test_broken_keeps_previous_or_gives_the_identity(f, poison):
    S = poison(random_spd(1, 4, generator(4))[0])[None]
    previous = torch.randn(1, 4, 4, dtype=torch.float64)
    assert broken(S).all()
    assert torch.equal(f(S), torch.eye(4, dtype=torch.float64)[None])
    assert torch.equal(f(S, None, previous), previous)
    assert torch.equal(f(S.float(), None, previous.float()), previous.float())


@functions
@poisons
@given(seed=seeds, r=small_ranks.filter(lambda r: r > 1), L=st.integers(2, 5), data=st.data())
@few
def test_one_broken_pair_does_not_disturb_the_others(f, poison, seed, r, L, data):
    g = generator(seed)
    S, previous = random_spd(L, r, g), torch.randn(L, r, r, generator=g, dtype=torch.float64)
    bad = data.draw(st.integers(0, L - 1))
    sick = S.clone()
    sick[bad] = poison(S[bad])
    rest = [i for i in range(L) if i != bad]
    healthy = f(S, None, previous)
    assert torch.equal(bits(f(sick, None, previous)[rest]), bits(healthy[rest]))
    assert torch.equal(f(sick, None, previous)[bad], previous[bad])
    assert not torch.equal(healthy[bad], previous[bad])


@pytest.mark.parametrize("f", [damped_inverse, damped_inverse_root])
def test_indefinite_beyond_damping_is_broken_and_within_it_is_not(f):
    S = torch.diag_embed(torch.tensor([[1.0, 1.0, -0.05], [1.0, 1.0, -0.5]], dtype=torch.float64))
    previous = torch.full((2, 3, 3), 9.0, dtype=torch.float64)
    P = f(S, 0.1, None, previous)
    assert (P[0] != 9).all() and P[0].isfinite().all()
    assert torch.equal(P[1], previous[1])


def test_asymmetric_input_is_symmetrised():
    S = random_spd(1, 4, generator(5))
    skew = torch.randn(4, 4, dtype=torch.float64)
    skew = (skew - skew.T) / 16
    torch.testing.assert_close(damped_inverse(S + skew, 0.1), damped_inverse(S, 0.1), rtol=1e-12, atol=1e-12)


@example(100.0)
@given(st.floats(10, 1e6))
@few
def test_eigenbasis_of_an_indefinite_factor_is_orthogonal(off_diagonal):
    S = torch.tensor([[[1, off_diagonal, 0], [off_diagonal, 1, 0], [0, 0, 0]]], dtype=torch.float64)
    Q, _ = eigenbasis(S, torch.tensor([2]))
    torch.testing.assert_close(Q[0].T @ Q[0], torch.eye(3, dtype=torch.float64))


@functions
def test_input_is_not_modified(f):
    S, previous = random_spd(2, 3, generator(6)), torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    S[1] = torch.nan
    before, kept = bits(S), bits(previous)
    f(S, torch.tensor([2, 3]), previous)
    assert torch.equal(bits(S), before) and torch.equal(bits(previous), kept)
