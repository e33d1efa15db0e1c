"""moments.py: the average is the weighted mean it claims to be, and bad observations leave no trace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import EPS, average, bits
from strategies import dims, few, generator, ranks, seeds, small_ranks, some, stack_sizes

from curvopt.functional import trace
from curvopt.functional.moments import ema_, ema_weight, gram, gram_add_, gram_many

DECAYS = [0.0, 0.5, 0.95, 0.999, 1 - 1e-7, 1.0]


@some
@given(seeds, stack_sizes, small_ranks, st.integers(1, 30), st.sampled_from(DECAYS))
def test_recursion_is_the_weighted_average(seed, L, r, steps, decay):
    g = generator(seed)
    observations = torch.randn(steps, L, r, r, generator=g, dtype=torch.float64)
    S, t = torch.zeros(L, r, r, dtype=torch.float64), torch.zeros(L)
    for x in observations:
        assert ema_(S, x, t, decay).all()
    # every step rounds a few times, and w_t has the relative error eps/(1 − β^t) ≈ eps/(t(1−β)); observations are < 6
    weight_error = 0 if decay in (0, 1) else 2 / (1 - decay)
    bound = 6 * EPS[torch.float64] * (4 * steps + weight_error)
    torch.testing.assert_close(S, average(list(observations), decay), rtol=0, atol=bound)
    assert t.tolist() == [steps] * L


def test_decay_one_is_the_running_mean():
    x = torch.randn(50, 3, 4, 4, generator=generator(0), dtype=torch.float64)
    S, t = torch.zeros(3, 4, 4, dtype=torch.float64), torch.zeros(3)
    for i, observation in enumerate(x, 1):
        ema_(S, observation, t, 1.0)
        torch.testing.assert_close(S, x[:i].mean(0), rtol=0, atol=50 * 4 * EPS[torch.float64])


def test_weights():
    t = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert ema_weight(t, 1.0).tolist() == [1.0, 1 / 2, 1 / 3, 1 / 10]
    assert ema_weight(t, 0.0).tolist() == [1.0] * 4
    # the newest of two at β = ½ weighs (1/2)/(3/4)
    torch.testing.assert_close(ema_weight(t, 0.5)[:2], torch.tensor([1, 2 / 3], dtype=torch.float64))
    # continuous in β at 1: w_t(β) → 1/t; the first-order term of w·t − 1 is (t−1)(1−β)/2 and rounding adds eps/(1−β)
    torch.testing.assert_close(ema_weight(t, 1 - 1e-8), 1 / t.double(), rtol=5e-8, atol=0)


@given(seeds, st.sampled_from(DECAYS))
@few
def test_first_observation_replaces_the_start(seed, decay):
    """No bias towards the initial value, whatever it was: w_1 = 1."""
    g = generator(seed)
    x = torch.randn(2, 3, 3, generator=g)
    S, t = torch.full((2, 3, 3), 7.0), torch.zeros(2)
    ema_(S, x, t, decay)
    assert torch.equal(S, x)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [torch.float32, torch.int64])
def test_non_finite_observation_leaves_its_pair_alone(poison, dtype, count):
    g = generator(1)
    S = torch.randn(4, 3, 3, generator=g, dtype=dtype)
    x = torch.randn(4, 3, 3, generator=g, dtype=dtype)
    clean, t_clean = S.clone(), torch.full((4,), 5, dtype=count)
    ema_(clean, x, t_clean, 0.9)
    before, t = S.clone(), torch.full((4,), 5, dtype=count)
    x[1, 2, 0] = poison
    took = ema_(S, x, t, 0.9)
    assert took.tolist() == [True, False, True, True] and t.tolist() == [6, 5, 6, 6]
    assert torch.equal(bits(S[1]), bits(before[1]))
    rest = [0, 2, 3]
    assert torch.equal(bits(S[rest]), bits(clean[rest])) and not torch.equal(S[rest], before[rest])


def test_found_inf_takes_nothing():
    S = torch.randn(3, 2, 2, generator=generator(2))
    before, t = S.clone(), torch.tensor([0.0, 1.0, 9.0])
    took = ema_(S, torch.ones(3, 2, 2), t, 0.5, found_inf=torch.tensor(1.0))
    assert not took.any() and t.tolist() == [0, 1, 9] and torch.equal(bits(S), bits(before))
    assert ema_(S, torch.ones(3, 2, 2), t, 0.5, found_inf=torch.tensor(0.0)).all()


def test_skipped_observations_do_not_age_the_average():
    """A skipped step is not an observation: the average is that of the rest."""
    x = torch.randn(9, 1, 2, 2, generator=generator(3), dtype=torch.float64)
    S, t = torch.zeros(1, 2, 2, dtype=torch.float64), torch.zeros(1)
    for i, observation in enumerate(x):
        ema_(S, torch.full_like(observation, torch.nan) if i % 3 == 1 else observation, t, 0.8)
    kept = [observation for i, observation in enumerate(x) if i % 3 != 1]
    torch.testing.assert_close(S, average(kept, 0.8), rtol=0, atol=1e-14)


@given(seeds, dims, ranks)
@some
def test_gram_symmetric_and_exact_to_rounding(seed, n, r):
    z = torch.randn(n, r, generator=generator(seed), dtype=torch.float64)
    expected = sum(torch.outer(row, row) for row in z)
    # a dot product of n terms: n·eps·Σ|terms|, and |terms| ≤ the product of the column norms
    bound = n * z.norm(dim=0).outer(z.norm(dim=0))
    assert ((gram(z) - expected).abs() <= EPS[torch.float64] * bound).all()
    z32 = z.float()
    assert gram(z32).dtype == torch.float32
    assert ((gram(z32).double() - z32.double().T @ z32.double()).abs() <= EPS[torch.float32] * bound * 1.01).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_of_sixteen_bits_is_summed_in_float32(dtype):
    z = torch.randn(4096, 5, generator=generator(4)).to(dtype)
    exact = z.double().T @ z.double()
    assert gram(z).dtype == torch.float32
    # float32 sums of exact products: well below one rounding to 16 bits
    torch.testing.assert_close(gram(z).double(), exact, rtol=1e-5, atol=4096 * EPS[torch.float32])
    # the control: the product in the narrow type is off by its rounding, a hundred times that
    narrow = (z.mT @ z).double()
    assert ((narrow - exact).abs() / exact.abs().max()).max() > EPS[dtype] / 16


def test_gram_of_large_half_precision_does_not_overflow():
    z = torch.full((64, 2), 300.0, dtype=torch.float16)  # 300² > 65504
    assert torch.equal(gram(z), torch.full((2, 2), 64 * 300.0**2))
    assert not (z.mT @ z).isfinite().all()


def test_gram_of_no_rows_is_zero():
    assert torch.equal(gram(torch.zeros(0, 3)), torch.zeros(3, 3))


def test_gram_sums_over_micro_batches():
    z = torch.randn(40, 6, generator=generator(5), dtype=torch.float64)
    torch.testing.assert_close(
        sum(gram(part) for part in z.split(7)), gram(z), rtol=0, atol=40 * 16 * EPS[torch.float64]
    )


def test_trace():
    S = torch.arange(18.0).reshape(2, 3, 3)
    assert trace(S).tolist() == [0 + 4 + 8, 9 + 13 + 17]


@some
@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=4), small_ranks)
def test_many_grams_are_the_sums_over_their_rows(seed, sizes, r):
    """Against the definition, row by row; what stands after ``counts`` may be anything."""
    g = generator(seed)
    zs = [torch.randn(n, r, generator=g, dtype=torch.float64) for n in sizes]
    weights = [torch.rand(n, generator=g, dtype=torch.float64) for n in sizes]
    counts = torch.tensor([n // 2 for n in sizes])
    scale = torch.rand(len(sizes), generator=g, dtype=torch.float64)
    torch.testing.assert_close(gram_many(zs), torch.stack([gram(z) for z in zs]), rtol=0, atol=0)
    want = [
        sum((c * w[n] * torch.outer(z[n], z[n]) for n in range(len(z) // 2)), torch.zeros(r, r, dtype=torch.float64))
        for z, w, c in zip(zs, weights, scale, strict=True)
    ]
    for z in zs:
        z[len(z) // 2 :] = torch.nan
    # at most nine products and sums of numbers below 5² each
    torch.testing.assert_close(gram_many(zs, counts, weights, scale), torch.stack(want), rtol=0, atol=1e-13)


@some
@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=4), small_ranks, st.sampled_from([1.0, -1.0, 0.5]))
def test_grams_are_added_to_their_places(seed, sizes, r, sign):
    g = generator(seed)
    zs = [torch.randn(n, r, generator=g, dtype=torch.float64) for n in sizes]
    weights = [torch.rand(n, generator=g, dtype=torch.float64) for n in sizes]
    sums = torch.randn(6, r, r, generator=g, dtype=torch.float64)
    index = torch.randperm(6, generator=g)[: len(sizes)].tolist()
    for own in (None, weights):
        want = sums.clone()
        for m, z in zip(index, zs, strict=True):
            w = torch.ones(len(z), dtype=torch.float64) if own is None else own[index.index(m)]
            want[m] += sign * sum((a * torch.outer(x, x) for a, x in zip(w, z, strict=True)), torch.zeros(r, r))
        got = sums.clone()
        assert gram_add_(got, index, zs, own, sign) is got
        # at most nine products and sums of numbers below 5² each
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
        others = [m for m in range(6) if m not in index]
        assert torch.equal(bits(got[others]), bits(sums[others]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grams_of_sixteen_bits_are_added_in_float32(dtype):
    z = torch.randn(300, 5, generator=generator(6)).to(dtype)
    sums = gram_add_(torch.zeros(2, 5, 5), [1], [z])
    torch.testing.assert_close(sums[1].double(), z.double().T @ z.double(), rtol=1e-5, atol=300 * EPS[torch.float32])
    assert not sums[0].any()
