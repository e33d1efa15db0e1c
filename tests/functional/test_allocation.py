"""A budget shared out by importance: the official rounding by hand, and the exact one over drawn layers."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import some

from curvopt.functional.ranks import allocate

COST = {"linear": float, "sqrt": math.sqrt, "log1p": math.log1p}
# costs 128, 256 and 512 parameters a rank; uniform rank 8 is 7168
SHAPES = {"a": (64, 64), "b": (64, 192), "c": (128, 384)}
SETTING = {"rank": 8, "min_rank": 4, "max_rank": 32}

# (importances, budget weight, ranks), each worked out by hand
PAPER = [
    # 3584 // 128, round(2150.4) // 256, round(1433.6) // 512 = 2 → 4
    ((5, 3, 2), "linear", (28, 8, 4)),
    # 7168 // 128 = 56 → 32; nothing for the others: 0 → 4
    ((1, 0, 0), "linear", (32, 4, 4)),
    # √: costs 11.31, 16, 22.63, budget 399.53: 200 // 11.31, 120 // 16, 80 // 22.63 = 3 → 4
    ((5, 3, 2), "sqrt", (17, 7, 4)),
    # log(1 + ·): costs 4.860, 5.549, 6.240, budget 133.19: 67 // 4.860, 40 // 5.549, 27 // 6.240
    ((5, 3, 2), "log1p", (13, 7, 4)),
    # without importance uniform: 1024 // 128, 2048 // 256, 4096 // 512
    ((0, 0, 0), "linear", (8, 8, 8)),
]


@pytest.mark.parametrize(("importances", "weight", "ranks"), PAPER)
def test_official_rounding_by_hand(importances, weight, ranks):
    measured = dict(zip(SHAPES, map(float, importances), strict=True))
    plan = allocate(measured, SHAPES, **SETTING, allocation="paper", budget_weight=weight)
    assert tuple(plan.ranks.values()) == ranks
    assert plan.importances == measured
    cost = [COST[weight](sum(shape)) for shape in SHAPES.values()]
    assert plan.budget == pytest.approx(8 * sum(cost), rel=1e-15)
    assert plan.spent == pytest.approx(sum(c * r for c, r in zip(cost, ranks, strict=True)), rel=1e-15)


def test_official_rounding_rounds_before_it_divides():
    """1023.6 parameters are 1024, four ranks of 256; rounding down first would make three."""
    shapes = {"a": (128, 128), "b": (128, 128)}
    plan = allocate({"a": 1023.6, "b": 3072.4}, shapes, rank=8, min_rank=1, max_rank=32, allocation="paper")
    assert plan.ranks == {"a": 4, "b": 12}


def test_exact_by_hand():
    """c is held at 4 (2048); 5120 go 5:3 to a and b: 25 and 7.5; the last 128 buy a rank of a, not one of b."""
    plan = allocate({"a": 5.0, "b": 3.0, "c": 2.0}, SHAPES, **SETTING)
    assert plan.ranks == {"a": 26, "b": 7, "c": 4}
    assert plan.spent == plan.budget == 7168
    official = allocate({"a": 5.0, "b": 3.0, "c": 2.0}, SHAPES, **SETTING, allocation="paper")
    assert official.spent == 7680  # control: the official rounding overdraws here


def test_what_is_left_over_goes_by_remainder_and_then_by_name():
    shapes = dict.fromkeys("zyx", (50, 50))
    # ideal 9.6, 9.6, 10.8: two units left after rounding down; .8 first, then the tie goes to "y"
    plan = allocate({"z": 9.6, "y": 9.6, "x": 10.8}, shapes, rank=10, min_rank=1, max_rank=32)
    assert plan.ranks == {"z": 9, "y": 10, "x": 11}


def test_one_huge_layer():
    """The embedding of a large vocabulary: its one rank costs more than all others together."""
    shapes = {f"layer{i}": (64, 64) for i in range(8)} | {"head": (64, 100_000)}
    importances = dict.fromkeys(shapes, 1.0)
    plan = allocate(importances, shapes, rank=8, min_rank=1, max_rank=64)
    assert all(plan.ranks[f"layer{i}"] == 64 for i in range(8)) and plan.ranks["head"] == 7
    assert 0 <= plan.budget - plan.spent < sum(shapes["head"])


@st.composite
def tasks(draw):
    """Layers of drawn shapes and importances, with zeros, ties and wide ranges, and clamps around a rank."""
    n = draw(st.integers(1, 7))
    side = st.sampled_from([4, 5, 16, 48, 64, 96, 256, 1024, 50_000])
    value = st.one_of(st.just(0.0), st.sampled_from([1.0, 0.5]), st.floats(-30, 30).map(lambda x: 10.0**x))
    names = draw(st.permutations([f"layer{i}" for i in range(n)]))
    shapes = {name: (draw(side), draw(side)) for name in names}
    low = draw(st.integers(1, 8))
    rank = draw(st.integers(low, 24))
    setting = {"rank": rank, "min_rank": low, "max_rank": draw(st.integers(rank, 64))}
    return {name: draw(value) for name in names}, shapes, setting, draw(st.sampled_from(list(COST)))


@given(tasks())
@some
def test_exact_meets_the_budget_to_the_unit(task):
    importances, shapes, setting, weight = task
    cost = {name: COST[weight](sum(shape)) for name, shape in shapes.items()}
    top = {name: min(setting["max_rank"], *shape) for name, shape in shapes.items()}
    low = {name: min(setting["min_rank"], top[name]) for name in shapes}
    budget = setting["rank"] * sum(cost.values())
    if sum(cost[name] * top[name] for name in shapes) < budget * (1 - 1e-9):
        with pytest.raises(ValueError, match="asks for a budget"):
            allocate(importances, shapes, **setting, budget_weight=weight)
        return
    plan = allocate(importances, shapes, **setting, budget_weight=weight)
    assert all(low[name] <= rank <= top[name] for name, rank in plan.ranks.items())
    # costs under √ and log are floats: sums of a few of them differ by rounding
    left = budget * (1 + 1e-9) - sum(cost[name] * rank for name, rank in plan.ranks.items())
    assert left >= 0
    assert all(cost[name] > left * (1 - 1e-6) - 1e-6 for name in shapes if plan.ranks[name] < top[name])
    assert list(plan.ranks) == list(importances)


@given(tasks())
@some
def test_order_does_not_matter_and_scale_does_not(task):
    importances, shapes, setting, weight = task
    for allocation in ("paper", "exact"):
        kwargs = {**setting, "budget_weight": weight, "allocation": allocation}
        try:
            plan = allocate(importances, shapes, **kwargs)
        except ValueError:
            continue
        turned = allocate(dict(reversed(importances.items())), shapes, **kwargs)
        assert turned.ranks == plan.ranks
        doubled = allocate({name: 4 * value for name, value in importances.items()}, shapes, **kwargs)
        assert doubled.ranks == plan.ranks


@given(tasks())
@some
def test_the_more_important_of_two_equal_layers_never_gets_less(task):
    importances, shapes, setting, weight = task
    shapes = dict.fromkeys(shapes, next(iter(shapes.values())))
    if min(next(iter(shapes.values()))) < setting["rank"]:
        return
    plan = allocate(importances, shapes, **setting, budget_weight=weight)
    ordered = sorted(plan.ranks, key=lambda name: importances[name])
    for less, more in itertools.pairwise(ordered):
        # one, because of two neighbours the lesser may have the larger remainder
        assert plan.ranks[more] >= plan.ranks[less] - 1, (less, more)


def test_shares_are_proportional_where_no_clamp_binds():
    shapes = dict.fromkeys("abcd", (512, 512))
    importances = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    plan = allocate(importances, shapes, rank=25, min_rank=1, max_rank=100)
    assert plan.ranks == {"a": 10, "b": 20, "c": 30, "d": 40}


def test_layers_without_importance_share_what_the_others_cannot_take():
    shapes = dict.fromkeys("abc", (64, 64))
    plan = allocate({"a": 1.0, "b": 0.0, "c": 0.0}, shapes, rank=8, min_rank=2, max_rank=12)
    assert plan.ranks == {"a": 12, "b": 6, "c": 6}


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_wrong_importance_is_named(value):
    with pytest.raises(ValueError, match=r"importance of b must be a finite number ≥ 0"):
        allocate({"a": 1.0, "b": value}, {"a": (8, 8), "b": (8, 8)}, **SETTING)


def test_a_budget_the_clamps_cannot_meet():
    with pytest.raises(ValueError, match=r"rank=8 asks for a budget of 96, .* allow 24 to 48"):
        allocate({"a": 1.0}, {"a": (4, 8)}, rank=8, min_rank=2, max_rank=32)
    with pytest.raises(ValueError, match="min_rank=9"):
        allocate({"a": 1.0}, {"a": (64, 64)}, rank=8, min_rank=9, max_rank=32)
