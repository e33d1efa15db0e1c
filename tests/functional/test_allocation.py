"""A budget shared out by importance: the official rounding by hand, and the exact one over drawn layers."""

import itertools
import math
import random

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


def brute_force(spectra, cost, low, top, budget):
    best = -1.0
    names = list(spectra)
    for ranks in itertools.product(*(range(low, top + 1) for _ in names)):
        if sum(cost[n] * r for n, r in zip(names, ranks, strict=True)) <= budget + 1e-9:
            best = max(best, sum(sum(spectra[n][:r]) for n, r in zip(names, ranks, strict=True)))
    return best


def held(plan):
    return sum(sum(plan.spectra[name][:r]) for name, r in plan.ranks.items())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("equal", [True, False])
def test_water_filling_is_optimal(seed, equal):
    """Against all allocations; where costs differ, to within the largest direction."""
    rng = random.Random(seed)
    names = ["a", "b", "c", "d"]
    spectra = {n: sorted((rng.expovariate(1.0) for _ in range(6)), reverse=True) for n in names}
    shapes = {n: (10, 10) if equal else (rng.randint(6, 30), rng.randint(6, 30)) for n in names}
    plan = allocate(
        dict.fromkeys(names, 1.0), shapes, rank=3, min_rank=1, max_rank=6, allocation="spectrum", spectra=spectra
    )
    cost = {n: sum(shapes[n]) for n in names}
    best = brute_force(spectra, cost, 1, 6, plan.budget)
    assert plan.spent <= plan.budget
    if equal:
        assert held(plan) == pytest.approx(best, rel=1e-12)
    else:
        assert best - max(max(s) for s in spectra.values()) <= held(plan) <= best * (1 + 1e-12)
    assert plan.gain() >= plan.gain(dict.fromkeys(names, 3)) or not equal


def test_uniform_ranks_are_uniform():
    shapes = {"a": (10, 20), "b": (3, 40), "c": (100, 10)}
    plan = allocate({"a": 1.0, "b": 5.0, "c": 0.0}, shapes, rank=4, min_rank=2, max_rank=8, allocation="uniform")
    assert plan.ranks == {"a": 4, "b": 3, "c": 4}  # b has no more directions


@pytest.mark.parametrize("allocation", ["exact", "paper", "spectrum"])
def test_groups_keep_their_budget(allocation):
    """Importances of the second group a thousand times as large change nothing: it competes with itself alone."""
    shapes = dict.fromkeys("abcd", (12, 20))
    groups = {"a": "attn", "b": "attn", "c": "mlp", "d": "mlp"}
    found = []
    for factor in (1.0, 1000.0):
        importances = {"a": 1.0, "b": 3.0, "c": 2.0 * factor, "d": 1.0 * factor}
        spectra = {n: [v * 0.5**i for i in range(12)] for n, v in importances.items()}
        found.append(allocate(
            importances, shapes, rank=4, min_rank=1, max_rank=8, allocation=allocation, spectra=spectra, groups=groups
        ))  # fmt: skip
    assert found[0].ranks == found[1].ranks and found[0].ranks["a"] < found[0].ranks["b"]
    spent = [sum(found[0].ranks[n] for n in label) for label in ("ab", "cd")]
    assert spent == [8, 7 if allocation == "paper" else 8]  # 512 · 1/3 // 32 = 5 and 256 · 1/3 // 32 = 2
    together = allocate(
        found[1].importances, shapes, rank=4, min_rank=1, max_rank=8, allocation=allocation, spectra=found[1].spectra
    )
    assert together.ranks["a"] == together.ranks["b"] == 1  # the negative control


def test_a_plan_is_a_table():
    plan = allocate({"a": 1.0, "long.name": 3.0}, {"a": (8, 8), "long.name": (8, 8)}, rank=2, min_rank=1, max_rank=3,
                    spectra={"a": [3.0, 1.0], "long.name": [1.0, 1.0]})  # fmt: skip
    assert plan.ranks == {"a": 1, "long.name": 3} and plan.gain() == pytest.approx(5 / 6)
    assert [row["gain"] for row in plan.rows()] == [0.75, 1.0]
    text = str(plan)
    assert text.splitlines()[1].split() == ["a", "1", "0.2500", "0.750"] and text.endswith(plan.summary())
    with pytest.raises(ValueError, match="spectra must be measured"):
        allocate({"a": 1.0}, {"a": (8, 8)}, rank=2, min_rank=1, max_rank=3).gain()
