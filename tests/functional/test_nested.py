"""Nested ranks: P against sums written out, and the step row by row against AdamW of A in float64."""

import itertools
import math

import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvopt.functional.nested import (
    RowSlab,
    bands,
    diagonal,
    powers_of_two,
    prefix,
    rank_scale,
    row_update,
    sampled_diagonal,
    sampled_rank,
)
from curvopt.functional.update import Hyper

# (ranks, r, scale) → P, by hand
TABLE = [
    ((1, 2, 4), 4, "none", (3, 2, 1, 1)),
    ((1, 2, 4), 4, "rank", (1 + 1 / 2 + 1 / 4, 1 / 2 + 1 / 4, 1 / 4, 1 / 4)),
    ((1, 4), 4, "sqrt", (1.5, 0.5, 0.5, 0.5)),
    ((2, 3), 5, "none", (2, 2, 1, 0, 0)),
    ((4,), 4, "none", (1, 1, 1, 1)),
    ((4,), 4, "sqrt", (0.5,) * 4),
    ((2, 8), 4, "none", (1, 1, 0, 0)),
    ((1, 2, 4, 8, 16), 16, "none", (5, 4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1)),
]

rank_sets = st.integers(1, 12).flatmap(
    lambda r: st.tuples(st.sets(st.integers(1, r), min_size=1).map(sorted), st.just(r))
)
scales = st.sampled_from(["none", "rank", "sqrt"])


@pytest.mark.parametrize(("ranks", "r", "scale", "P"), TABLE)
def test_the_diagonal_by_hand(ranks, r, scale, P):
    assert diagonal(ranks, r, scale) == pytest.approx(P, rel=1e-15)  # sums of up to five numbers


@strategies.some
@given(rank_sets, scales)
def test_the_diagonal_is_the_sum_of_its_ranks(case, scale):
    """B P A is the sum over ρ of s(ρ) B[:, :ρ] A[:ρ], and each term is what `prefix` leaves of it."""
    ranks, r = case
    P = diagonal(ranks, r, scale)
    parts = [sampled_diagonal(k, r, scale) for k in ranks]
    assert pytest.approx([math.fsum(column) for column in zip(*parts, strict=True)], rel=1e-14) == P
    assert all(a >= b for a, b in itertools.pairwise(P)) and (P[-1] > 0) == (ranks[-1] == r)
    for k, part in zip(ranks, parts, strict=True):
        assert [f * p for f, p in zip(prefix(P, k, scale), P, strict=True)] == pytest.approx(part, rel=1e-15)
        assert part == (rank_scale(k, scale),) * k + (0,) * (r - k)


@strategies.some
@given(rank_sets, scales)
def test_bands_tile_the_live_directions(case, scale):
    ranks, r = case
    P = diagonal(ranks, r, scale)
    found = bands(P)
    assert [p for a, b, p in found for _ in range(a, b)] == list(P[: ranks[-1]])
    assert [b for _, b, _ in found] == ranks  # one band a nested rank: equal entries are equal to the bit


@pytest.mark.parametrize(
    ("r", "expected"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9))]
)
def test_powers_of_two(r, expected):
    assert powers_of_two(r) == expected


def test_every_rank_is_as_likely():
    counts = dict.fromkeys((1, 2, 4), 0)
    for i in range(300):
        counts[sampled_rank((1, 2, 4), i / 300)] += 1
    assert set(counts.values()) == {100} and sampled_rank((1, 2), 1.0) == 2  # rounding of a draw just below 1


def test_an_unknown_scale_is_named():
    with pytest.raises(ValueError, match=r"scale must be one of 'none', 'rank', 'sqrt', got 'alpha'"):
        diagonal((1, 2), 2, "alpha")


# ---------------------------------------------------------------------------------------------- the step

HYPER = Hyper(lr=1e-2, beta1=0.8, beta2=0.97, eps=1e-3, weight_decay=0.3)


def slab(params, rank_dim, rates, hyper=HYPER):
    like = torch.stack([p.contiguous() for p in params])
    return RowSlab(params, [], torch.zeros_like(like), torch.zeros_like(like), torch.zeros(()), rank_dim, rates, hyper)


def start(L, r, d, g, layout, dtype=torch.float64):
    """L matrices with the rank first, as parameters would be laid out: rows, columns, or rows of a wider tensor."""
    X = torch.randn(L, r, d, generator=g, dtype=torch.float64).to(dtype)
    if layout == "columns":
        return [x.T.contiguous() for x in X], 2
    if layout == "strided":
        return [x.T.contiguous().T for x in X], 1
    return [x.clone() for x in X], 1


@strategies.some
@given(rank_sets, scales, st.integers(1, 3), st.integers(1, 9), st.sampled_from(["rows", "columns", "strided"]),
       st.floats(0.2, 4), strategies.seeds, st.booleans())  # fmt: skip
def test_the_step_is_adamw_of_A(case, scale, L, d, layout, s, seed, maximize):
    """Ã = Q A with Q = P / s stays Q A, where A is stepped by the formula: ε is not small beside √v̂ here."""
    ranks, r = case
    g = strategies.generator(seed)
    Q = [p / s for p in diagonal(ranks, r, scale)]
    column = torch.tensor(Q, dtype=torch.float64)[:, None]
    A = [a.double() for a in start(L, r, d, g, "rows")[0]]
    params, rank_dim = start(L, r, d, g, layout)
    for p, a in zip(params, A, strict=True):
        p.copy_((column * a) if rank_dim == 1 else (column * a).T)
    hyper = Hyper(1e-2, 0.8, 0.97, 1e-3, 0.3, maximize)
    own = slab(params, rank_dim, tuple(Q), hyper)
    adams = [oracles.AdamW((r, d), 0.8, 0.97, 1e-3) for _ in A]
    for _ in range(4):
        grads = [torch.randn(r, d, generator=g, dtype=torch.float64) * 1e-2 for _ in A]  # ∂L/∂Ã
        own.grads = [x if rank_dim == 1 else x.T.contiguous() for x in grads]
        kept = [x.clone() for x in own.grads]
        row_update([own], torch.zeros(()))
        assert all(torch.equal(x, y) for x, y in zip(own.grads, kept, strict=True))
        A = [oracles.rule_step("eigen", adam, a, column * x, torch.eye(r, dtype=torch.float64), 1e-2, 0.3, maximize)
             for adam, a, x in zip(adams, A, grads, strict=True)]  # fmt: skip
    assert own.step == 4
    for p, a in zip(params, A, strict=True):
        # four steps of a dozen operations each on numbers of order one, in another order
        torch.testing.assert_close(p if rank_dim == 1 else p.T, column * a, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wrong", ["rates", "eps", "decay"])
def test_control_each_of_the_three_is_needed(wrong):
    g, r, d = strategies.generator(0), 4, 6
    Q = torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    A = torch.randn(r, d, generator=g, dtype=torch.float64)
    adam, p = oracles.AdamW((r, d), 0.8, 0.97, 1e-3), (Q[:, None] * A).clone()
    own = slab([p], 1, (1.0,) * 4 if wrong == "rates" else tuple(Q.tolist()))
    gradient = torch.randn(r, d, generator=g, dtype=torch.float64) * 1e-3
    if wrong != "rates":  # what a plain lr per row would do
        own.hyper = Hyper(1e-2, 0.8, 0.97, 3e-3 if wrong == "eps" else 1e-3, 0.9 if wrong == "decay" else 0.3)
    own.grads = [gradient]
    row_update([own], torch.zeros(()))
    A = oracles.rule_step("eigen", adam, A, Q[:, None] * gradient, torch.eye(r, dtype=torch.float64), 1e-2, 0.3, False)
    assert (p - Q[:, None] * A).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rates", [None, (1.0,) * 4])
def test_with_rates_of_one_it_is_fused_adamw_bit_for_bit(dtype, rates):
    g = strategies.generator(1)
    params, _ = start(3, 4, 16, g, "rows", dtype)
    twins = [torch.nn.Parameter(p.clone()) for p in params]
    adamw = torch.optim.AdamW(twins, lr=1e-2, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.3, fused=True)
    own = slab(params, 1, rates)
    for _ in range(5):
        own.grads = [torch.randn(4, 16, generator=g).to(dtype) for _ in params]
        for twin, grad in zip(twins, own.grads, strict=True):
            twin.grad = grad.clone()
        row_update([own], torch.zeros(()))
        adamw.step()
    for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
        assert torch.equal(p, twin) and torch.equal(own.exp_avg_sq[i], adamw.state[twin]["exp_avg_sq"])


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_found_inf_changes_nothing(layout):
    g = strategies.generator(2)
    params, rank_dim = start(2, 4, 6, g, layout)
    own = slab(params, rank_dim, (3.0, 2.0, 1.0, 1.0))
    own.grads = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in params]
    row_update([own], torch.zeros(()))
    before = [oracles.bits(x) for x in (*params, own.exp_avg, own.exp_avg_sq, own.step)]
    own.grads[0][0, 0] = torch.nan
    row_update([own], torch.ones(()))
    after = [oracles.bits(x) for x in (*params, own.exp_avg, own.exp_avg_sq, own.step)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_directions_without_a_rate_stay(layout):
    params, rank_dim = start(2, 4, 6, strategies.generator(3), layout)
    own = slab(params, rank_dim, (0.0, 2.0, 1.0, 0.0))
    before = [p.clone() for p in params]
    own.grads = [torch.ones_like(p) for p in params]
    row_update([own], torch.zeros(()))
    for p, q in zip(params, before, strict=True):
        moved = (p != q).any(2 - rank_dim)
        assert moved.tolist() == [False, True, True, False]


def test_parameters_of_another_shape_are_refused():
    own = slab([torch.zeros(4, 6)], 1, None)
    own.params, own.grads = [torch.zeros(3, 6)], [torch.zeros(3, 6)]
    with pytest.raises(ValueError, match=r"params must have the shape of their state, \(4, 6\), got \(3, 6\)"):
        row_update([own], torch.zeros(()))


def test_a_tensor_lr_is_its_number():
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        params, _ = start(2, 4, 6, strategies.generator(4), "rows")
        own = slab(params, 1, (3.0, 2.0, 1.0, 1.0), Hyper(lr, 0.9, 0.99, 1e-8, 0.1))
        own.grads = [torch.ones_like(p) for p in params]
        row_update([own], torch.zeros(()))
        results.append(torch.stack(params))
    torch.testing.assert_close(*results, rtol=1e-15, atol=1e-16)
