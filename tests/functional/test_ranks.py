"""ranks.py: rules worked by hand, and the bounds and monotonicities that hold for every spectrum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import energies, generator, seeds, some

from curvopt.functional.ranks import energy_rank, entropy_rank, heavy_tail, hysteresis

thresholds = st.one_of(st.sampled_from([0.5, 0.9, 0.99, 1.0]), st.floats(0.01, 1.0))


# ------------------------------------------------------------------------------------------------- energy rule


@pytest.mark.parametrize(
    ("energy", "threshold", "expected"),
    [
        ([8, 4, 2, 1, 1], 0.5, 1),  # 8 of 16 is half: reached with equality
        ([8, 4, 2, 1, 1], 0.51, 2),
        ([8, 4, 2, 1, 1], 0.75, 2),
        ([8, 4, 2, 1, 1], 0.875, 3),
        ([8, 4, 2, 1, 1], 0.9, 4),
        ([8, 4, 2, 1, 1], 0.9375, 4),
        ([8, 4, 2, 1, 1], 0.95, 5),
        ([8, 4, 2, 1, 1], 1.0, 5),
        ([1, 1, 1, 1], 0.5, 2),
        ([1, 1, 1, 1], 0.75, 3),
        ([5, 0, 0], 1.0, 1),  # zeros are not needed for all of the energy
        ([3, 1, 0], 1.0, 2),
        ([0, 0, 0], 0.9, 3),  # nothing known: keep
        ([1e-30, 0], 0.9, 1),
    ],
)
def test_energy_rule_by_hand(energy, threshold, expected):
    assert energy_rank(torch.tensor([energy], dtype=torch.float64), threshold).tolist() == [expected]


@pytest.mark.parametrize(
    ("min_rank", "k", "expected"),
    [(1, 5, 1), (2, 5, 2), (4, 5, 4), (4, 3, 3), (9, 5, 5), (1, 1, 1)],
)
def test_clamps_by_hand(min_rank, k, expected):
    energy = torch.tensor([[16.0, 0.1, 0.1, 0.1, 0.1]]) * (torch.arange(5) < k)
    assert energy_rank(energy, 0.5, min_rank, torch.tensor([k])).tolist() == [expected]


def test_without_energy_the_live_rank_stays():
    assert energy_rank(torch.zeros(2, 6), 0.9, 2, torch.tensor([3, 6])).tolist() == [3, 6]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_energy_cuts_nothing(bad):
    energy = torch.tensor([[4.0, 2.0, 1.0], [bad, 2.0, 1.0]])
    asked = energy_rank(energy, 0.5)
    assert asked[0] == 1 and asked.dtype == torch.int64
    if math.isnan(bad):
        assert asked[1] == 3


@given(energies(), thresholds, st.integers(1, 6), st.data())
@some
def test_energy_rule_is_the_smallest_prefix(energy, threshold, min_rank, data):
    """Against the definition with exact sums (fsum), and inside [min(min_rank, k), k]."""
    L, r = energy.shape
    k = torch.tensor([data.draw(st.integers(1, r)) for _ in range(L)])
    energy = energy * (torch.arange(r) < k[:, None])
    asked = energy_rank(energy, threshold, min_rank, k)
    for row, n, top in zip(energy.tolist(), asked.tolist(), k.tolist(), strict=True):
        assert min(min_rank, top) <= n <= top
        total = math.fsum(row)
        if total == 0:
            assert n == top
            continue
        # sums of r terms round by r·eps, so the prefix is sufficient, and one shorter is not, to within that
        slack = 4 * r * 2.3e-16 * total
        if n < top:
            assert math.fsum(row[:n]) >= threshold * total - slack
        if n > min(min_rank, top):
            assert math.fsum(row[: n - 1]) < threshold * total + slack


@given(energies(), thresholds, thresholds, st.integers(1, 4))
@some
def test_energy_rule_is_monotone_in_its_threshold(energy, a, b, min_rank):
    low, high = min(a, b), max(a, b)
    assert (energy_rank(energy, low, min_rank) <= energy_rank(energy, high, min_rank)).all()


@given(energies(), st.sampled_from([torch.float32, torch.float64]))
@some
def test_threshold_one_keeps_all_but_rounding(energy, dtype):
    """τ = 1: what is dropped is at most the rounding of a sum of r terms, and no direction is kept in vain."""
    energy = energy.to(dtype)
    eps = torch.finfo(dtype).eps
    for row, n in zip(energy, energy_rank(energy, 1.0).tolist(), strict=True):
        sums = row.cumsum(0)
        assert row[n:].double().sum() <= len(row) * eps * row.double().sum()
        assert n == 1 or sums[-1] == 0 or sums[n - 2] < sums[-1]


@given(energies(), thresholds, st.integers(-40, 40))
@some
def test_energy_rule_does_not_depend_on_scale(energy, threshold, exponent):
    assert torch.equal(energy_rank(energy, threshold), energy_rank(energy * 2.0**exponent, threshold))


# ------------------------------------------------------------------------------------------------- entropy rank


@pytest.mark.parametrize("r", [1, 2, 7, 64])
def test_entropy_rank_of_flat_and_single(r):
    flat, single = torch.full((r,), 0.3, dtype=torch.float64), torch.zeros(r, dtype=torch.float64)
    single[0] = 5
    assert entropy_rank(flat).item() == pytest.approx(r, rel=1e-13)
    assert entropy_rank(single).item() == 1
    assert entropy_rank(torch.zeros(r)).item() == 0


def test_entropy_rank_by_hand():
    """p = (½, ¼, ¼): H = 1.5 bit, so 2^1.5 directions."""
    assert entropy_rank(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)).item() == pytest.approx(2**1.5, rel=1e-14)


@given(energies(), st.floats(-6, 6), seeds)
@some
def test_entropy_rank_is_bounded_scale_free_and_symmetric(energy, exponent, seed):
    n = entropy_rank(energy)
    active = (energy > 0).sum(-1).double()
    assert ((n >= (active > 0).double() * (1 - 1e-13)) & (n <= active * (1 + 1e-13))).all()
    torch.testing.assert_close(entropy_rank(energy * 10.0**exponent), n, rtol=1e-12, atol=0)
    order = torch.randperm(energy.shape[-1], generator=generator(seed))
    torch.testing.assert_close(entropy_rank(energy[:, order]), n, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------- hysteresis


def run(asks, k=8, room=False, r=8):
    """Return the live ranks after each check; asks are clamped to the live rank as the energy rule clamps them."""
    state, pending, seen = torch.tensor([k]), torch.tensor([0]), []
    for i, asked in enumerate(asks):
        this = torch.tensor([min(asked, state.item())])
        lift = torch.tensor([room[i] if isinstance(room, list) else room])
        state, pending = hysteresis(state, this, pending, lift, r)
        seen.append(state.item())
    return seen


@pytest.mark.parametrize(
    ("asks", "expected"),
    [
        ([8, 8, 8], [8, 8, 8]),
        ([5, 5], [8, 5]),  # two in a row
        ([5, 3], [8, 5]),  # to the larger of the two …
        ([3, 5], [8, 5]),  # … whichever came first
        ([5, 8, 5, 8, 5], [8, 8, 8, 8, 8]),  # oscillation never cuts
        ([5, 8, 5, 5], [8, 8, 8, 5]),  # a satisfied check starts the count again
        ([5, 5, 4, 4], [8, 5, 5, 4]),  # after a cut, two fresh checks
        ([5, 3, 3, 3], [8, 5, 5, 3]),
        ([7, 6, 5, 4], [8, 7, 7, 5]),
        ([1, 1, 1, 1], [8, 1, 1, 1]),
    ],
)
def test_hysteresis_by_hand(asks, expected):
    assert run(asks) == expected


@pytest.mark.parametrize(
    ("asks", "room", "expected"),
    [
        ([8, 8], [True, True], [5, 6]),
        ([8, 8, 8, 8, 8], True, [5, 6, 7, 8, 8]),  # by one, and never above r
        ([8, 8], [False, False], [4, 4]),
        ([8, 2, 8], [True, True, True], [5, 5, 6]),  # an ask for less neither lifts nor, alone, cuts
        ([2, 8, 2], [True, True, True], [4, 5, 5]),
        ([2, 2, 8], [True, True, True], [4, 2, 3]),
    ],
)
def test_lift_by_hand(asks, room, expected):
    assert run(asks, k=4, room=room) == expected


def test_no_lift_above_the_full_rank():
    assert run([8, 8, 8], k=8, room=True) == [8, 8, 8]


def test_hysteresis_of_a_stack_is_pair_by_pair():
    k, asked = torch.tensor([8, 8, 4, 4]), torch.tensor([5, 5, 4, 4])
    pending, room = torch.tensor([6, 0, 0, 0]), torch.tensor([True, True, True, False])
    new_k, new_pending = hysteresis(k, asked, pending, room, 8)
    assert new_k.tolist() == [6, 8, 5, 4] and new_pending.tolist() == [0, 5, 0, 0]
    assert new_k.dtype == k.dtype


@given(st.lists(st.integers(1, 8), min_size=1, max_size=30), st.lists(st.booleans(), min_size=30, max_size=30))
@some
def test_hysteresis_invariants(asks, room):
    """Never below the larger of the last two asks, never up by more than one, never down on a single ask."""
    seen = [8, *run(asks, room=room)]
    for i in range(1, len(seen)):
        before, now = seen[i - 1], seen[i]
        assert 1 <= now <= 8 and now <= before + 1
        if now < before:
            assert i >= 2 and now == max(asks[i - 1], asks[i - 2]) and asks[i - 2] < seen[i - 2] == before
        if now > before:
            assert asks[i - 1] >= before and room[i - 1]


# ------------------------------------------------------------------------------------------------- heavy tail


def test_heavy_tail_by_hand():
    """τ = 0.9 may drop 10 %: heavy when the last live direction holds more than 20 %."""
    energy = torch.tensor([[5.0, 3.0, 2.1, 0], [5, 3, 1.9, 0], [6, 2, 2, 0], [10, 0, 0, 0], [0, 0, 0, 0]])
    k = torch.tensor([3, 3, 3, 1, 2])
    assert heavy_tail(energy, 0.9, k).tolist() == [True, False, False, True, False]
    assert heavy_tail(energy, 0.9, torch.tensor([4] * 5)).tolist() == [False] * 5


def test_heavy_tail_at_threshold_one():
    assert heavy_tail(torch.tensor([[1.0, 1e-9], [1.0, 0.0]]), 1.0, torch.tensor([2, 2])).tolist() == [True, False]


@given(energies(), st.floats(0.5, 1.0))
@some
def test_a_heavy_tail_is_not_asked_away(energy, threshold):
    """Consistency of the two rules: where the tail is heavy, the energy rule wants every live direction."""
    k = torch.full((len(energy),), energy.shape[-1])
    heavy = heavy_tail(energy, threshold, k)
    # at τ = 1 a last direction below the rounding of the sum counts for one rule and not for the other
    visible = energy[:, -1] > 1e-14 * energy.sum(-1)
    assert (energy_rank(energy, threshold)[heavy & visible] == energy.shape[-1]).all()
