"""Tensors without names: each LoRA matrix by its shape, trained to the bit as with the model."""

import copy
import logging
import pickle

import models
import pytest
import torch
from torch import nn

from curvopt import GritKFAC
from curvopt.analysis import Recorder, doctor
from curvopt.lora import low_rank_by_shape

STEPS = 6


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def bare(model, **kwargs):
    return GritKFAC(trained(model), lr=1e-2, low_rank="shape", **kwargs)


MODELS = {
    "hand-written": lambda: models.mlp(width=8, r=3),
    "float32": lambda: models.mlp(torch.float32, width=8, r=3),
    "bfloat16": lambda: models.mlp(torch.bfloat16, width=8, r=3),
    "PEFT": models.llama,
}


@pytest.mark.parametrize("kwargs", [{}, {"outer_rank": 0}, {"warmup_steps": 3, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("build", MODELS.values(), ids=list(MODELS))
def test_bare_tensors_are_the_model_to_the_bit(build, kwargs):
    ends = []
    for make in (lambda model: GritKFAC(model, lr=1e-2, **kwargs), lambda model: bare(model, **kwargs)):
        model = build()
        optimizer = make(model)
        models.fit(model, optimizer, STEPS)
        ends.append(models.snapshot(model, optimizer))
    models.assert_same(*ends)
    assert any(name.endswith("exp_avg") and "lora_B" in name for name in ends[0])


def test_control_what_is_not_low_rank_gets_adamw():
    """The same run with half of the rank's bound exceeded: A and B then are AdamW's, bit for bit."""
    ends = []
    for make in (
        lambda model: bare(model, betas=(0.9, 0.999), require_pairs=False),
        lambda model: torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.0),
    ):
        model = models.mlp(width=8, r=5)
        models.fit(model, make(model), STEPS)
        ends.append(models.snapshot(model))
    models.assert_same(*ends)


@pytest.mark.parametrize(
    ("shape", "side"),
    [
        ((4, 64), "A"), ((64, 4), "B"), ((128, 257), "A"), ((128, 256), None), ((129, 4096), None), ((1, 3), "A"),
        ((64, 64), None), ((7,), None), ((), None), ((4, 8, 3, 3), "A"), ((64, 4, 1, 1), "B"), ((4, 64, 1, 1), "A"),
        ((64, 3, 3, 3), None), ((4, 8, 3, 3, 3), "A"), ((8, 4, 64), None),
    ],
)  # fmt: skip
def test_which_shapes_are_low_rank(shape, side):
    found = low_rank_by_shape([("p", torch.zeros(shape))])
    assert [name for _, name in found] == ([] if side is None else [side])
    if side is not None:
        pair, _ = found[0]
        assert pair.rank == shape["AB".index(side)]


def test_what_was_taken_is_logged(caplog):
    with caplog.at_level(logging.INFO, "curvopt"):
        bare(models.mlp(width=8, r=3))
    (record,) = [r for r in caplog.records if "low rank" in r.getMessage()]
    assert record.levelno == logging.INFO
    low = "3 of 3 × 8, 3 of 8 × 3, 1 of 2 × 8, 1 of 6 × 2"
    assert record.getMessage() == f"low rank by shape: {low}; AdamW: 2 of 8, 1 of 5 × 6, 1 of 5"


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"update": "eigen"}, "update"), ({"update": "whiten", "statistics": "gradient"}, "update"),
        ({"rank_threshold": 0.9}, "rank_threshold"), ({"reproject_every": 5}, "reproject_every"),
        ({"statistics": "activation"}, "statistics"), ({"statistics": "gradient"}, "statistics"),
        ({"statistics": "weight"}, "statistics"),
    ],
)  # fmt: skip
def test_what_needs_a_partner_is_refused(kwargs, name):
    model = models.mlp(width=8, r=3)
    with pytest.raises(ValueError, match=f"^{name} must be .*low_rank=.shape.: tensors without names have no partner"):
        bare(model, **kwargs)
    assert models.hooks(model) == 0
    optimizer = bare(model)
    models.fit(model, optimizer, 1)
    optimizer.param_groups[0].update({"reproject_every": 0, **kwargs})
    with pytest.raises(ValueError, match=name):
        models.fit(model, optimizer, 1)


def test_bad_values():
    model = models.mlp(width=8, r=3)
    with pytest.raises(ValueError, match=r"low_rank must be one of .*'names', 'shape'.*, got 'size'"):
        GritKFAC(model, low_rank="size")
    with pytest.raises(ValueError, match=r"no tensor has a dimension of at most 128 .* got \(9, 9\)"):
        GritKFAC([nn.Parameter(torch.ones(9, 9))], low_rank="shape")
    with pytest.raises(ValueError, match="update must be one of"):
        GritKFAC.paper(model, low_rank="shape", min_rank=1)
    with pytest.raises(ValueError, match=r"have no names.*low_rank=.shape. for tensors without names"):
        GritKFAC(trained(model))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_copies_and_files_go_on_to_the_bit(copied):
    model = models.mlp(width=8, r=3)
    optimizer = bare(model)
    models.fit(model, optimizer, 3)
    twin, other = copied((model, optimizer))
    fresh = models.copied_into(model, models.mlp(width=8, r=3))
    loaded = bare(fresh)
    loaded.load_state_dict(models.round_trip(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other), (fresh, loaded)):
        models.fit(m, o, 3, 3)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(fresh, loaded))


def test_groups_that_are_added_are_looked_at_too():
    ends = []
    for late in (False, True):
        model = models.mlp(width=8, r=3)
        params = trained(model)
        optimizer = GritKFAC(params[:4] if late else params, lr=1e-2, low_rank="shape")
        if late:
            optimizer.add_param_group({"params": params[4:]})
        assert len(optimizer.sides) == 8
        models.fit(model, optimizer, STEPS)
        ends.append(models.snapshot(model))
    models.assert_near(*ends, rtol=1e-10, atol=1e-12)  # other batches of matrix products
    assert optimizer.ranks() == {} and optimizer.compact() == {}
    report = optimizer.diagnostics()
    assert len(report["pairs"]) == 8 and report["skipped_updates"] == 0


def test_the_analysis_knows_that_there_are_no_pairs(tmp_path):
    model = models.llama()
    optimizer = bare(model)
    models.fit(model, optimizer, 3)
    report = doctor(model, optimizer)
    assert report.findings == [] and report.facts["norm"] is None and len(report.pairs) == 28
    Recorder(tmp_path / "run.jsonl").record(optimizer, 3, loss=1.0)
    (record,) = Recorder.read(tmp_path / "run.jsonl")
    assert record.keys() == {"step", "time", "loss", "optimizer", "skipped_updates"}


def test_control_a_run_without_low_rank_matrices_needs_attention():
    model = models.mlp(width=8, r=5)  # above half of the width
    optimizer = bare(model, require_pairs=False)
    models.fit(model, optimizer, 3)
    assert "no pairs" in doctor(model, optimizer).kinds()
