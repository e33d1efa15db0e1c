"""AURAC against areas worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvopt.analysis import aurac, plot_aurac

# accuracies, ranks, linear, log2
TABLE = [
    ([0.7], [8], 0.7, 0.7),
    ([0.2, 0.6], [1, 2], 0.4, 0.4),
    # linear: (1·(0+1)/2 + 2·(1+2)/2) / 3 = 3.5/3;  log2: (1·0.5 + 1·1.5) / 2
    ([0, 1, 2], [1, 2, 4], 3.5 / 3, 1.0),
    # linear: (2·0.4 + 6·0.65) / 8;  log2 from 2: log2(4) − 1 = 1, log2(10) − 2
    ([0.3, 0.5, 0.8], [2, 4, 10], 4.7 / 8, (0.4 + 0.65 * (math.log2(10) - 2)) / (math.log2(10) - 1)),
]
curves = st.lists(
    st.tuples(st.integers(1, 64), st.floats(-1, 1)), min_size=1, max_size=8, unique_by=lambda p: p[0]
).map(sorted)
both = pytest.mark.parametrize("scale", ["linear", "log2"])


@pytest.mark.parametrize(("accuracies", "ranks", "linear", "log2"), TABLE)
def test_by_hand(accuracies, ranks, linear, log2):
    assert aurac(accuracies, ranks) == aurac(accuracies, ranks, scale="linear") == pytest.approx(linear, rel=1e-15)
    assert aurac(accuracies, ranks, scale="log2") == pytest.approx(log2, rel=1e-14)


@both
@given(curve=curves, shift=st.floats(-2, 2))
def test_it_is_a_mean(scale, curve, shift):
    """Between the least and the greatest, a constant gives itself, and a shift shifts it."""
    ranks, y = zip(*curve, strict=True)
    area = aurac(y, ranks, scale=scale)
    assert min(y) - 1e-12 <= area <= max(y) + 1e-12
    assert aurac([shift] * len(ranks), ranks, scale=scale) == pytest.approx(shift, abs=1e-12)
    assert aurac([v + shift for v in y], ranks, scale=scale) == pytest.approx(area + shift, abs=1e-12)


@both
@given(curve=curves)
def test_a_point_on_the_line_changes_nothing(scale, curve):
    x = [2.0 * rank for rank, _ in curve]
    y = [v for _, v in curve]
    at = {"linear": lambda a, b: (a + b) / 2, "log2": lambda a, b: math.sqrt(a * b)}[scale]
    finer = [(x[0], y[0])]
    for i in range(1, len(x)):
        finer += [(at(x[i - 1], x[i]), (y[i - 1] + y[i]) / 2), (x[i], y[i])]
    assert aurac([v for _, v in finer], [k for k, _ in finer], scale=scale) == pytest.approx(
        aurac(y, x, scale=scale), abs=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (([0.1], [1], "log"), "scale must be one of 'linear', 'log2', got 'log'"),
        (([], [], "linear"), "accuracies must be as many as ranks and at least one, got 0 for 0 ranks"),
        (([0.1], [1, 2], "linear"), "got 1 for 2 ranks"),
        (([0.1, 0.2], [2, 1], "linear"), r"ranks must ascend from at least 1, got \[2, 1\]"),
        (([0.1, 0.2], [2, 2], "linear"), "ranks must ascend"),
        (([0.1, 0.2], [0, 1], "log2"), "ranks must ascend from at least 1"),
        (([0.1, math.nan], [1, 2], "linear"), "accuracies must be finite"),
    ],
)
def test_bad_input(arguments, word):
    accuracies, ranks, scale = arguments
    with pytest.raises(ValueError, match=word):
        aurac(accuracies, ranks, scale=scale)


def test_the_plot_shows_every_method_with_its_area():
    pytest.importorskip("matplotlib")
    sheet = plot_aurac(
        {"one": {1: 0.2, 2: 0.4, 4: 0.6}, "seeds": {1: [0.1, 0.3], 4: [0.5, 0.7]}}, label="token accuracy"
    )
    (axes,) = sheet.axes
    lines = axes.get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[0.2, 0.4, 0.6], [0.2, pytest.approx(0.6)]]
    assert [text.get_text() for text in sheet.legends[0].get_texts()] == [
        "one: 0.4333, 0.4000",
        "seeds: 0.4000, 0.4000",
    ]
    assert axes.get_ylabel() == "token accuracy" and axes.get_xlabel() == "rank"
    with pytest.raises(ValueError, match="curves must have at least one method"):
        plot_aurac({})
    with pytest.raises(ValueError, match="curves must have a value at every rank"):
        plot_aurac({"one": {1: []}})
    numpy = pytest.importorskip("numpy")
    for number in (numpy.float32, torch.tensor):
        (line,) = plot_aurac({"one": {1: number(0.25), 2: [number(0.5), number(1.0)]}}).axes[0].get_lines()
        assert list(line.get_ydata()) == [0.25, 0.75]
