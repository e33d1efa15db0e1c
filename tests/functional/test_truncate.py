"""truncate.py: exactly zero, in place, on both storages."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import bits
from strategies import DTYPES, dims, few, generator, ranks, seeds, stack_sizes

from curvopt.functional.truncate import truncate_


@given(seeds, stack_sizes, ranks, dims, st.sampled_from(DTYPES), st.data())
@few
def test_dead_rows_are_zero_and_live_rows_untouched(seed, L, r, d, dtype, data):
    k = torch.tensor([data.draw(st.integers(0, r)) for _ in range(L)])
    X = torch.randn(L, r, d, generator=generator(seed)).to(dtype)
    Y, Z = X.clone(), X.mT.clone()
    assert truncate_(Y, k, 1) is Y
    truncate_(Z, k, 2)
    assert torch.equal(bits(Z.mT), bits(Y))
    for i in range(L):
        assert torch.equal(bits(Y[i, : k[i]]), bits(X[i, : k[i]]))
        assert not bits(Y[i, k[i] :]).any()  # +0 by the bit, never −0


def test_dead_nan_becomes_zero_and_live_nan_stays():
    X = torch.full((1, 3, 2), torch.nan)
    truncate_(X, torch.tensor([1]), 1)
    assert X[0, 0].isnan().all() and torch.equal(X[0, 1:], torch.zeros(2, 2))


def test_idempotent_and_monotone():
    X = torch.randn(2, 5, 4, generator=generator(0))
    once = truncate_(X.clone(), torch.tensor([3, 2]), 1)
    assert torch.equal(truncate_(once.clone(), torch.tensor([3, 2]), 1), once)
    assert torch.equal(truncate_(once.clone(), torch.tensor([5, 5]), 1), once)
