"""Saving, loading and going on: bit for bit, for every rule and source, with ranks on the move."""

import copy
import re

import models
import pytest
import torch

from curvopt import GritKFAC

RULES = ("polar", "eigen", "adam", "whiten", "momentum")
STATISTICS = ("activation", "gradient", "weight")
DTYPES = [torch.float32, torch.bfloat16]
WIDE = {"width": 12, "r": 6}
MOVING = {"inverse_every": 4, "factor_every": 2, "warmup_steps": 2, "weight_decay": 0.1, "reproject_every": 3,
          "rank_threshold": 0.8, "min_rank": 1}  # fmt: skip


def started(dtype=torch.float64, steps=0, **settings):
    model = models.mlp(dtype, **WIDE)
    optimizer = GritKFAC(model, lr=1e-2, **settings)
    models.fit(model, optimizer, steps)
    return model, optimizer


def resumed(model, optimizer, dtype=torch.float64, **settings):
    """A new model and a new optimizer that know of the old ones only what a file kept."""
    fresh = models.mlp(dtype, seed=99, **WIDE)
    fresh.load_state_dict(models.round_trip(model.state_dict()))
    other = GritKFAC(fresh, lr=1e-2, **settings)
    other.load_state_dict(models.round_trip(optimizer.state_dict()))
    return fresh, other


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["balanced", "paper"])
def test_bit_exact_resume_at_any_step(mode, rule, statistics, dtype):
    settings = {"update": rule, "statistics": statistics, "reprojection": mode, **MOVING}
    model, optimizer = started(dtype, **settings)
    at = {}
    for i in range(13):
        if i in (1, 6, 10):  # in the warm-up, right after a reprojection, in between
            at[i] = resumed(model, optimizer, dtype, **settings)
        models.fit(model, optimizer, 1, i)
    end = models.snapshot(model, optimizer)
    for i, (fresh, other) in at.items():
        models.fit(fresh, other, 13 - i, i)
        models.assert_same(models.snapshot(fresh, other), end)
        assert other.ranks() == optimizer.ranks()
    if mode == "balanced":
        assert min(optimizer.ranks().values()) < 5


def test_the_resume_test_has_teeth():
    """Each of these, lost on the way, would be seen in the bits."""
    model, optimizer = started(steps=7, **MOVING)
    for key in (
        "factor",
        "outer_basis",
        "outer_eigenvalues",
        "outer_trace",
        "exp_avg",
        "exp_avg_sq",
        "step",
        "cadence",
    ):
        fresh, other = resumed(model, optimizer, **MOVING)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            if key in state:
                state[key] = torch.zeros_like(state[key])
        other.load_state_dict(saved)
        whole = resumed(model, optimizer, **MOVING)
        models.fit(fresh, other, 6, 7)
        models.fit(*whole, 6, 7)
        assert models.differences(models.snapshot(fresh), models.snapshot(whole[0])) != [], key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_survive_a_load(dtype):
    model, optimizer = started(dtype, 7, **MOVING)
    _, other = resumed(model, optimizer, dtype, **MOVING)
    for states in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert states[0].keys() == states[1].keys()
        assert all(states[0][key].dtype == states[1][key].dtype for key in states[0])


def test_loading_does_not_share_tensors():
    model, optimizer = started(steps=4, **MOVING)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    fresh = models.copied_into(model, models.mlp(**WIDE))
    other = GritKFAC(fresh, lr=1e-2, **MOVING)
    other.load_state_dict(saved)
    models.fit(fresh, other, 5, 4)
    paired = [i for i, p in enumerate(other.param_groups[0]["params"]) if "factor" in other.state[p]]
    assert len(paired) == 6  # of the rest torch itself takes the tensors over as they are
    for index in paired:
        for key, value in kept["state"][index].items():
            assert torch.equal(saved["state"][index][key], value), key


def test_loading_twice_and_loading_over_a_run():
    """What was loaded stands, whatever the optimizer has done before."""
    model, optimizer = started(steps=5, **MOVING)
    fresh, other = started(steps=9, **MOVING)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    for _ in range(2):
        other.load_state_dict(models.round_trip(optimizer.state_dict()))
    models.fit(model, optimizer, 5, 5)
    models.fit(fresh, other, 5, 5)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(fresh, other))


def test_a_half_seen_batch_is_forgotten_by_a_load():
    model, optimizer = started(steps=5)
    fresh, other = resumed(model, optimizer)
    models.loss(fresh, 50).backward()
    fresh.zero_grad()
    other.load_state_dict(models.round_trip(optimizer.state_dict()))
    models.fit(model, optimizer, 3, 5)
    models.fit(fresh, other, 3, 5)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(fresh, other))


def test_resume_of_a_peft_model_with_a_resting_adapter():
    model = models.llama(adapters=("default", "other"), start="random")
    optimizer = GritKFAC(model, lr=1e-2, inverse_every=2)
    models.fit(model, optimizer, 3)
    model.set_adapter("other")
    models.fit(model, optimizer, 2, 3)
    fresh = models.copied_into(model, models.llama(adapters=("default", "other")))
    fresh.set_adapter("other")
    other = GritKFAC(fresh, lr=1e-2, inverse_every=2)
    other.load_state_dict(models.round_trip(optimizer.state_dict()))
    for m, o in ((model, optimizer), (fresh, other)):
        models.fit(m, o, 2, 5)
        m.set_adapter("default")
        models.fit(m, o, 2, 7)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(fresh, other))


# ---------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("named", [False, True])
def test_state_of_other_ranks_is_refused_and_changes_nothing(named):
    def build(r):
        model = models.mlp(width=12, r=r)
        params = [(n, p) for n, p in model.named_parameters() if p.requires_grad] if named else model
        return model, GritKFAC(params, lr=1e-2)

    small, saver = build(5)
    models.fit(small, saver, 3)
    model, optimizer = build(6)
    models.fit(model, optimizer, 2)
    twin, other = build(6)
    models.fit(twin, other, 2)
    before, groups = models.snapshot(model, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=r"state_dict.*\(6, 12\).*\(5, 12\)") as error:
        optimizer.load_state_dict(saver.state_dict())
    assert "parameter 0" in str(error.value) or "first.lora_A.weight" in str(error.value)
    models.assert_same(models.snapshot(model, optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    models.fit(model, optimizer, 3, 2)
    models.fit(twin, other, 3, 2)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


def test_compacted_state_does_not_fit_full_tensors():
    _, optimizer = started(steps=9, **MOVING)
    optimizer.compact()
    _, other = started(**MOVING)
    with pytest.raises(ValueError, match="resize_adapter"):
        other.load_state_dict(optimizer.state_dict())


def test_other_numbers_of_parameters_are_refused_as_torch_does():
    _, optimizer = started(steps=2)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    _, other = started(steps=2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=re.escape("doesn't match the size")):
        other.load_state_dict(saved)
    assert str(other.state_dict()) == str(before)


# ---------------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize("rule", RULES)
def test_state_of_adamw_is_taken_over(rule):
    """Moments and counts are AdamW's; the factors start empty. In warm-up it goes on as AdamW, bit for bit."""
    model, twin = models.mlp(torch.float32), models.mlp(torch.float32)
    adamw = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, fused=True) for m in (model, twin)
    ]
    for m, o in zip((model, twin), adamw, strict=True):
        models.fit(m, o, 4)
    optimizer = GritKFAC(model, update=rule)
    optimizer.load_state_dict(models.round_trip(adamw[0].state_dict()))
    group = optimizer.param_groups[0]
    assert group["lr"] == 1e-2 and group["weight_decay"] == 1e-2 and group["update"] == rule
    group["warmup_steps"] = 3
    pairs = [("first.lora_A.weight", model.first.lora_A.weight), ("second.lora_B.weight", model.second.lora_B.weight)]
    for i in range(4, 7):
        models.fit(model, optimizer, 1, i)
        for name, p in twin.named_parameters():
            p.grad = None if model.get_parameter(name).grad is None else model.get_parameter(name).grad.clone()
        adamw[1].step()
        assert all(torch.equal(p, twin.get_parameter(name)) for name, p in pairs)
    models.fit(model, optimizer, 4, 7)
    assert optimizer.state[pairs[0][1]]["step"] == 11
    assert not torch.equal(pairs[0][1], twin.get_parameter(pairs[0][0]))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "lost",
    [
        ("rows",),
        ("cadence",),
        ("pending",),
        ("observed",),
        ("rank", "pending", "rows", "observed", "skipped"),
        ("outer_trace",),
        ("factor", "outer_basis", "outer_eigenvalues", "outer_trace"),
    ],
    ids="+".join,
)
def test_files_without_newer_state_still_load(lost):
    model, optimizer = started(steps=7, **MOVING)
    saved = models.round_trip(optimizer.state_dict())
    for state in saved["state"].values():
        for key in lost:
            state.pop(key, None)
    fresh = models.copied_into(model, models.mlp(**WIDE))
    other = GritKFAC(fresh, lr=1e-2, **MOVING)
    other.load_state_dict(saved)
    losses = models.fit(fresh, other, 6, 7)
    assert all(p.isfinite().all() for p in fresh.parameters()) and max(losses) < 5
    assert all(key in other.state[fresh.first.lora_A.weight] for key in lost)
    other.diagnostics()


@pytest.mark.parametrize("lost", ["warmup_steps", "rank_threshold", "sides", "maximize", "capturable"])
def test_files_without_newer_settings_still_load(lost):
    """A setting that the file does not have is the one the optimizer was made with."""
    model, optimizer = started(steps=5)
    saved = models.round_trip(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group[lost]
    fresh = models.copied_into(model, models.mlp(**WIDE))
    other = GritKFAC(fresh, lr=1e-2)
    other.load_state_dict(saved)
    assert other.param_groups[0][lost] == optimizer.param_groups[0][lost]
    models.fit(fresh, other, 3, 5)
    models.fit(model, optimizer, 3, 5)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(fresh, other))


def test_files_that_count_steps_in_their_groups_still_load():
    model, optimizer = started(steps=7, **MOVING)
    saved = models.round_trip(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["clock"] = 7
    for state in saved["state"].values():
        state.pop("cadence", None)
    fresh = models.copied_into(model, models.mlp(**WIDE))
    other = GritKFAC(fresh, lr=1e-2, **MOVING)
    other.load_state_dict(saved)
    models.fit(fresh, other, 6, 7)
    models.fit(model, optimizer, 6, 7)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(fresh, other), ignore=("cadence",))


def test_settings_made_by_hand_survive_a_file_that_lacks_them():
    _, optimizer = started(steps=2)
    saved = models.round_trip(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["damping"]
    _, other = started(damping=0.7)
    other.load_state_dict(saved)
    assert other.param_groups[0]["damping"] == 0.7
