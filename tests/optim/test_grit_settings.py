"""GritKFAC's settings: those of the paper, those of each group, and edits in flight."""

import copy
import inspect
from typing import get_args

import models
import pytest
import torch

from curvopt import GritKFAC
from curvopt.functional.ranks import BUDGET_WEIGHTS, BudgetWeight
from curvopt.functional.update import RULES
from curvopt.optim.grit import AdvancedSettings, settings
from curvopt.optim.grit.curvature import SOURCES


def test_paper_has_the_published_settings():
    group = GritKFAC.paper(models.mlp(), min_rank=2).param_groups[0]
    published = {
        "lr": 2e-5, "sides": "paper", "update": "adam", "damping": 1e-3, "factor_decay": 1.0, "factor_every": 15,
        "inverse_every": 50, "reprojection": "paper", "reproject_every": 50, "rank_threshold": 0.99, "min_rank": 2,
    }  # fmt: skip
    assert {key: group[key] for key in published} == published


def test_the_signature_is_short_and_the_rest_are_keywords_with_defaults():
    parameters = inspect.signature(GritKFAC).parameters
    named = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name != "params"]
    assert len(named) <= 16
    assert settings.ADVANCED.keys() == AdvancedSettings.__annotations__.keys()
    assert not settings.ADVANCED.keys() & set(named)
    assert parameters["min_rank"].default == settings.MIN_RANK  # which `check_pairs` takes for not given


def test_advanced_settings_are_settings_of_the_groups():
    """Each is what it is told to be, in the constructor and in a group of its own, and the default elsewhere."""
    own = {"sides": "paper", "factor_decay": 0.5, "factor_every": 2, "inverse_every": 3, "warmup_steps": 4,
           "reprojection": "paper"}  # fmt: skip
    usual = {key: settings.ADVANCED[key] for key in own}
    assert GritKFAC(models.mlp(), **own).param_groups[0].items() >= own.items()
    model = models.mlp()
    first, *others = GritKFAC(model).pairs
    groups = [
        {"params": [first.A, first.B], **own},
        {"params": [p for pair in others for p in (pair.A, pair.B)]},
    ]
    here, there = GritKFAC(groups, model=model).param_groups
    assert here.items() >= own.items() and there.items() >= usual.items()


@pytest.mark.parametrize(
    ("given", "meant"),
    [("inverse_evry", "inverse_every"), ("rank_treshold", "rank_threshold"), ("beta", "betas"), ("momentum", None)],
)
def test_an_unknown_keyword_is_named_with_the_nearest_known(given, meant):
    model = models.mlp()
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{given}'") as error:
        GritKFAC(model, **{given: 1})
    assert (f"did you mean '{meant}'?" in str(error.value)) == (meant is not None)
    assert models.hooks(model) == 0


def test_the_typed_choices_are_those_of_the_registries():
    assert get_args(settings.Update) == tuple(RULES)
    assert get_args(settings.Statistics) == ("auto", *SOURCES)
    assert get_args(BudgetWeight) == tuple(BUDGET_WEIGHTS)


def test_every_setting_is_read_at_every_step():
    """A run whose groups are edited after two steps is the run that continues from there with those settings."""
    edits = {
        "damping": 1.0,
        "factor_decay": 0.2,
        "inverse_every": 1,
        "factor_every": 2,
        "betas": (0.5, 0.9),
        "eps": 1e-3,
    }
    for key, value in edits.items():
        base = {"lr": 1e-2, "update": "adam", "factor_every": 1, "inverse_every": 3}
        model = models.mlp()
        optimizer = GritKFAC(model, **base)
        models.fit(model, optimizer, 2)
        other_model = models.copied_into(model, models.mlp())
        other = GritKFAC(other_model, **base)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0][key] = value
        other.load_state_dict(saved)
        optimizer.param_groups[0][key] = value
        models.fit(model, optimizer, 6, 2)
        models.fit(other_model, other, 6, 2)
        models.assert_same(models.snapshot(model, optimizer), models.snapshot(other_model, other))
        untouched = models.mlp()
        models.fit(untouched, GritKFAC(untouched, **base), 8)
        assert models.differences(models.snapshot(untouched), models.snapshot(model)) != [], key


def test_groups_of_A_and_of_B_with_their_own_lr():
    """LoRA+: B's learning rate is a multiple of A's; the first step scales with it and nothing else changes."""
    moved = []
    for ratio in (1.0, 4.0):
        model = models.mlp()
        A, B = (
            [p for n, p in model.named_parameters() if side in n and "idle" not in n] for side in ("lora_A", "lora_B")
        )
        optimizer = GritKFAC([{"params": A}, {"params": B, "lr": 1e-2 * ratio}], lr=1e-2, model=model)
        before = [p.detach().clone() for p in (*A, *B)]
        models.fit(model, optimizer, 1)
        moved.append([p.detach() - q for p, q in zip((*A, *B), before, strict=True)])
    for i, (one, four) in enumerate(zip(*moved, strict=True)):
        torch.testing.assert_close(four, one * (1.0 if i < 3 else 4.0), rtol=1e-9, atol=1e-15)
