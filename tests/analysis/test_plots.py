"""Plots from files, records and live runs: what is drawn is what was recorded, also at 200 layers."""

import math

import models
import pytest
from grit_kit import rank_side

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from curvopt.analysis import (
    Recorder,
    effective_rank,
    fit_forgetting_law,
    plot_forgetting,
    plot_frontier,
    plot_plan,
    plot_ranks,
    plot_spectra,
)
from curvopt.functional.ranks import allocate

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def record(step, layers, r=16, words=PROJECTIONS):
    """A record of a model with so many layers; the rank of layer l in projection i is known."""
    pairs = {}
    for layer in range(layers):
        for i, word in enumerate(words):
            energy = [math.exp(-0.3 * j * (1 + i)) for j in range(r)]
            entry = {"layer": layer, "projection": word, "rank": 1 + (layer + i + step) % r, "full_rank": r}
            entry |= {
                "energy": energy,
                "singular": energy,
                "effective_rank": effective_rank(energy),
                "update_rank": 2.0,
            }
            pairs[f"layers.{layer}.{word}"] = entry
    return {"step": step, "pairs": pairs, "drift": {"norm": float(step)}, "retain_loss": 1.0 + step / 10}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    model = models.llama()
    optimizer = rank_side(model, lr=1e-2, reproject_every=1, rank_threshold=0.7, min_rank=1)
    recorder = Recorder(path)
    for step in range(1, 6):
        (loss,) = models.fit(model, optimizer, 1, begin=step)
        recorder.record(optimizer, step, loss=loss, retain_loss=loss)
    return path, model, optimizer


def saved(figure, tmp_path):
    """The picture as it is written, with a check that it is one."""
    from matplotlib.image import imread

    figure.savefig(tmp_path / "plot.png")
    picture = imread(tmp_path / "plot.png")
    assert picture[..., :3].std() > 0.02  # not blank
    return picture


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_from_a_file_alone(run, tmp_path):
    path, *_ = run
    for figure in (plot_spectra(path), plot_spectra(path, kind="update"), plot_ranks(path), plot_frontier({"a": path})):
        saved(figure, tmp_path)


def test_from_a_live_run(run, tmp_path):
    _, model, optimizer = run
    saved(plot_spectra(optimizer), tmp_path)
    saved(plot_ranks(optimizer), tmp_path)
    saved(plot_spectra(model, kind="update"), tmp_path)
    with pytest.raises(ValueError, match="curvature"):
        plot_spectra(model)  # a model alone knows no curvature


def test_200_layers_fit_on_one_sheet(tmp_path):
    records = [record(step, 200) for step in (0, 10, 20)]
    spectra = plot_spectra(records)
    assert titles(spectra)[1:8] == list(PROJECTIONS)
    height, width, _ = saved(spectra, tmp_path).shape
    assert height < 1600 and width < 2400
    assert all(len(axes.get_yticks()) <= 9 for axes in spectra.axes[1:8])
    height, width, _ = saved(plot_ranks(records), tmp_path).shape
    assert height < 1600 and width < 2400


def test_heat_maps_hold_the_recorded_numbers():
    last = record(3, 5)
    (image,) = plot_ranks([last]).axes[0].get_images()
    grid = image.get_array()
    for i, word in enumerate(PROJECTIONS):
        for layer in range(5):
            assert grid[i, layer] == last["pairs"][f"layers.{layer}.{word}"]["rank"]
    (image,) = plot_spectra([last]).axes[1].get_images()
    energy = last["pairs"]["layers.0.q_proj"]["energy"]
    assert image.get_array()[0].tolist() == pytest.approx([max(e / sum(energy), 1e-4) for e in energy])


def test_ranks_over_time_are_means_of_the_projection():
    records = [record(step, 4) for step in (0, 5)]
    axes = plot_ranks(records).axes[2]
    line = next(line for line in axes.get_lines() if line.get_label() == "v_proj")
    mean = [sum(r["pairs"][f"layers.{n}.v_proj"]["rank"] for n in range(4)) / 4 for r in records]
    assert list(line.get_xdata()) == [0, 5] and list(line.get_ydata()) == mean


def test_step_chooses_the_record():
    records = [record(step, 2) for step in (0, 5, 10)]
    assert "step 5" in plot_spectra(records, step=7).get_suptitle()
    with pytest.raises(ValueError, match="up to step -1"):
        plot_spectra(records, step=-1)


def test_many_kinds_of_projection_share_a_panel():
    figure = plot_spectra([record(0, 2, words=[f"p{i}" for i in range(30)])])
    assert "others" in titles(figure) and len(figure.axes) <= 10


def test_frontier_draws_the_rise_for_every_run():
    records = [record(step, 1) for step in (1, 2, 3)]
    axes = plot_frontier({"one": records, "two": [records, records]}, baseline=1.0).axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]
    assert len(lines) == 3
    assert list(lines[0].get_xdata()) == [1, 2, 3] and list(lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.3])
    by_step = plot_frontier({"one": records}, x="step").axes[0].get_lines()[0]
    assert list(by_step.get_xdata()) == [1, 2, 3]


def test_forgetting(tmp_path):
    N = [1e5] * 6 + [4e5] * 6
    D = [1e4, 3e4, 1e5, 3e5, 1e6, 3e6] * 2
    z = {
        k: [0.1 + ((i * m) % 12) / 12 for i in range(12)] for k, m in (("r_eff", 5), ("rho_align", 7), ("pi_proj", 11))
    }
    loss = [1 + 0.02 * d**0.5 / n**0.3 / (1 + r) ** 0.3 for n, d, r in zip(N, D, z["r_eff"], strict=True)]
    plain = fit_forgetting_law(N, D, loss, 1.0, resamples=20)
    figure = plot_forgetting(plain, N, D, loss, 1.0)
    saved(figure, tmp_path)
    assert len(figure.axes) == 2
    both = fit_forgetting_law(N, D, loss, 1.0, **z, resamples=20)
    figure = plot_forgetting(both, N, D, loss, 1.0, **z, labels=["a", "b"] * 6)
    saved(figure, tmp_path)
    drawn = figure.axes[1].collections[1].get_offsets()  # observed and predicted by the modulated law
    assert drawn[:, 0].tolist() == pytest.approx([x - 1 for x in loss])
    assert drawn[:, 1].tolist() == pytest.approx(both.modulated.predict(N, D, 0.0, **z).tolist())


def test_nothing_is_shown_and_no_backend_is_chosen(run):
    import matplotlib

    before = matplotlib.get_backend()
    plot_ranks(run[0])
    assert matplotlib.get_backend() == before


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: plot_spectra([record(0, 1)], kind="hessian"), "kind"),
        (lambda: plot_ranks([record(0, 1)], what="size"), "what"),
        (lambda: plot_spectra([]), "no records"),
        (lambda: plot_ranks([{"step": 1, "loss": 2.0}]), "no record has pairs"),
        (lambda: plot_frontier({}), "runs"),
        (lambda: plot_frontier({"a": [record(0, 1)]}, y="eval_loss"), "eval_loss"),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_a_plan_has_a_bar_for_each_layer():
    shapes = {"a": (8, 8), "b": (8, 8)}
    spectra = {"a": [3.0, 1.0], "b": [1.0, 1.0]}
    plan = allocate({"a": 1.0, "b": 3.0}, shapes, rank=2, min_rank=1, max_rank=3, spectra=spectra)
    (axes,) = plot_plan(plan).axes
    assert [bar.get_height() for bar in axes.patches] == [1, 3] and "gain 0.83" in axes.get_title()
    assert [text.get_text() for text in axes.texts] == ["0.75", "1.00"]
    with pytest.raises(ValueError, match="plan must have layers"):
        plot_plan(allocate({}, {}, rank=2, min_rank=1, max_rank=3))
