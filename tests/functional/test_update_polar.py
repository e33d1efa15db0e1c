"""Polar is Adam's step with equalised singular values: length, spectrum, damping, and dead directions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import EPS
from strategies import generator, rank_dims, seeds, some
from update_kit import HYPER, draw, make_slab, take

# a step of 1e-2 is read off as a difference of parameters of order one
READ = 1e3 * EPS[torch.float64]


def both(seed, rank_dim, r, d, damping, L=2):
    """The steps of polar and of Adam, rank first, from the same three gradients, and both slabs."""
    g = generator(seed)
    slabs = [make_slab(L, r, d, rank_dim, torch.float64, HYPER, None, seed % 1000) for _ in range(2)]
    slabs[0].damping = damping
    for _ in range(3):
        grads = [x.double() for x in draw(slabs[0], g)]
        before = [torch.stack(s.params) for s in slabs]
        for rule, s in zip(("polar", "adam"), slabs, strict=True):
            take(rule, s, grads)
    steps = [torch.stack(s.params) - b for s, b in zip(slabs, before, strict=True)]
    return *(x if rank_dim == 1 else x.mT for x in steps), slabs


@given(seeds, rank_dims, st.integers(1, 8), st.integers(0, 30))
@some
def test_polar_without_damping_is_the_polar_factor_of_adams_step(seed, rank_dim, r, more):
    """U Vᵀ ‖δ‖_F/√r for δ = U Σ Vᵀ: of all steps with that spectral norm none has a larger ⟨·, δ⟩."""
    polar, adam, _ = both(seed, rank_dim, r, r + 4 + more, damping=1e-9)
    U, sigma, Vh = torch.linalg.svd(adam, full_matrices=False)
    size = (sigma.square().mean(-1)).sqrt()
    gap = (sigma[:, :1] / sigma[:, -1:]).max().item() ** 2  # λ shortens the smallest direction by λ gap r / 2 or less
    close = gap * r * 1e-9 * polar.abs().max().item() + READ
    torch.testing.assert_close(polar, size[:, None, None] * U @ Vh, rtol=0, atol=close)
    best = (polar * adam).sum((1, 2))
    torch.testing.assert_close(best, size * sigma.sum(-1), rtol=1e-6, atol=close)
    if r > 1:  # Adam's own step, cut to the same spectral norm, is worse
        assert ((adam * size[:, None, None] / sigma[:, :1, None] * adam).sum((1, 2)) < best).all()


@given(seeds, rank_dims, st.integers(1, 8), st.integers(1, 30))
@some
def test_polar_with_all_damping_is_adam(seed, rank_dim, r, d):
    polar, adam, _ = both(seed, rank_dim, r, d, damping=1e12)
    torch.testing.assert_close(polar, adam, rtol=1e-9, atol=READ)


@given(seeds, rank_dims, st.integers(2, 8), st.integers(1, 30), st.sampled_from([1e-3, 0.1, 1.0]))
@some
def test_polar_has_adams_length_and_a_flatter_spectrum(seed, rank_dim, r, d, damping):
    polar, adam, slabs = both(seed, rank_dim, r, d, damping)
    torch.testing.assert_close(polar.norm(dim=(1, 2)), adam.norm(dim=(1, 2)), rtol=1e-9, atol=READ)
    values, flatter = torch.linalg.svdvals(adam), torch.linalg.svdvals(polar)
    assert (flatter[:, 0] <= values[:, 0] * (1 + 1e-9) + READ).all()
    uneven = values[:, 0] > 1.1 * values[:, -1]  # what is equal already stays as it is
    assert (flatter[uneven, 0] < values[uneven, 0] * 0.9999).all()
    for key in ("exp_avg", "exp_avg_sq"):  # equalising is of the step alone
        assert torch.equal(getattr(slabs[0], key), getattr(slabs[1], key))


@pytest.mark.parametrize("rank_dim", [1, 2])
def test_polar_of_live_directions_is_that_of_the_sliced_pair(rank_dim):
    """With k the damping is relative to the mean over live directions, so cutting dead ones off changes nothing."""
    g, r, k = generator(4), 6, 4
    rows = (slice(None, k), slice(None)) if rank_dim == 1 else (slice(None), slice(None, k))
    whole = make_slab(1, r, 9, rank_dim, torch.float64, HYPER)
    cut = make_slab(1, k, 9, rank_dim, torch.float64, HYPER)
    naive = make_slab(1, r, 9, rank_dim, torch.float64, HYPER)
    whole.k = torch.tensor([k])
    start = whole.params[0].clone()
    cut.params = [start[rows].clone()]
    for _ in range(3):
        grad = torch.zeros_like(start)
        grad[rows] = 0.01 * torch.randn(grad[rows].shape, generator=g, dtype=torch.float64)
        for s, x in ((whole, grad), (naive, grad), (cut, grad[rows])):
            take("polar", s, [x])
    torch.testing.assert_close(whole.params[0][rows], cut.params[0], rtol=0, atol=READ)
    assert (naive.params[0][rows] - cut.params[0]).abs().max() > 1e-5  # control: without k it does change
