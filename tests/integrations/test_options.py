"""Strings from command lines and YAML become what the optimizer's arguments want, or one clear error."""

import inspect
from typing import Literal

import models
import pytest
import torch

from curvopt import GoRAInit, GritKFAC, MatryoshkaScaledAdam
from curvopt.integrations import parse_options
from curvopt.integrations.options import parse_value
from curvopt.optim.grit import settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr=1e-3", {"lr": 1e-3}), ("--lr=5", {"lr": 5.0}), ("betas=0.9,0.99", {"betas": (0.9, 0.99)}),
        ("betas=(0.9, 0.99)", {"betas": (0.9, 0.99)}), ("maximize=True", {"maximize": True}),
        ("maximize=no", {"maximize": False}), ("rank_threshold=None", {"rank_threshold": None}),
        ("rank_threshold=0.9", {"rank_threshold": 0.9}), ("reprojection=None", {"reprojection": None}),
        ("reprojection=paper", {"reprojection": "paper"}), ("update='eigen'", {"update": "eigen"}),
        ("inverse_every=1e2", {"inverse_every": 100}), ("adapter=null", {"adapter": None}), ("", {}),
        ("lr=1e-3, betas=0.9,0.99 ,update=adam", {"lr": 1e-3, "betas": (0.9, 0.99), "update": "adam"}),
    ],
)  # fmt: skip
def test_strings(text, value):
    found = parse_options(text, GritKFAC)
    assert found == value
    assert {name: type(x) for name, x in found.items()} == {name: type(x) for name, x in value.items()}


def test_lists_and_mappings_say_the_same():
    wanted = {"lr": 1e-3, "betas": (0.9, 0.99), "inverse_every": 5}
    for options in (
        "lr=1e-3,betas=0.9,0.99,inverse_every=5",
        ["lr=1e-3", "betas=0.9,0.99", "inverse_every=5"],
        {"lr": "1e-3", "betas": [0.9, 0.99], "inverse_every": 5},  # PyYAML reads 1e-3 as a string
    ):
        assert parse_options(options, GritKFAC) == wanted
    assert parse_options({"name": "grit", "lr": "1"}, GritKFAC, ignore=("name",)) == {"lr": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr=fast", r"lr must be a number.*, got 'fast'"),
        ("lr=nan", r"lr must be a number"),
        ("betas=0.9", r"betas must be 2 numbers, separated by commas, got '0.9'"),
        ("betas=0.9,x", r"betas must be 2 numbers"),
        ("maximize=maybe", r"maximize must be True or False, got 'maybe'"),
        ("inverse_every=2.5", r"inverse_every must be an integer, got '2.5'"),
        ("rank_threshold=most", r"rank_threshold must be .*None.*, got 'most'"),
        ("inverse=3", r"inverse must be an argument of GritKFAC \(.*inverse_every.*\), got '3'; did you mean"),
        ("model=x", r"model must be an argument of GritKFAC"),
        ("polar", r"an option must be name=value, got 'polar'"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=message):
        parse_options(text, GritKFAC)


def test_what_no_string_can_say():
    with pytest.raises(ValueError, match=r"then must be None|then cannot be given as a string"):
        parse_options("then=GritKFAC", GoRAInit)
    assert parse_options("init_lr=auto, rank=4", GoRAInit) == {"init_lr": "auto", "rank": 4}
    assert parse_options("init_lr=0.1", GoRAInit) == {"init_lr": 0.1}


def test_literals_tuples_and_unions():
    assert parse_value("x", "polar", Literal["polar", "eigen"]) == "polar"
    assert parse_value("x", "3", Literal[1, 3] | None) == 3
    with pytest.raises(ValueError, match="x must be 'polar' or 'eigen' or None, got 'x'"):
        parse_value("x", "x", Literal["polar", "eigen"] | None)
    assert parse_value("x", "1,2,4", tuple[int, ...] | None) == (1, 2, 4)
    assert parse_value("x", 7, str) == 7


def test_functions_and_classes_without_annotations():
    def build(model, lr=1e-3, nesterov=False, anything=None):
        """Types come from the defaults, or from how Python reads the text."""

    assert parse_options("lr=1,nesterov=true,anything=[1,2]", build) == {
        "lr": 1.0,
        "nesterov": True,
        "anything": [1, 2],
    }
    assert parse_options("momentum=0.9,nesterov=1", torch.optim.SGD) == {"momentum": 0.9, "nesterov": True}


def test_keywords_that_a_typed_dict_lists():
    """What stands in ``**advanced: Unpack[AdvancedSettings]`` is parsed like a named argument, and so is no other."""
    said = parse_options("factor_every=3, factor_decay=1, reprojection=None, require_pairs=no, adapter=x", GritKFAC)
    assert said == {
        "factor_every": 3, "factor_decay": 1.0, "reprojection": None, "require_pairs": False, "adapter": "x",
    }  # fmt: skip
    for name, value in settings.ADVANCED.items():
        assert parse_options({name: str(value)}, GritKFAC) == {name: value}, name
    with pytest.raises(ValueError, match=r"inverse_evry must be an argument of GritKFAC .*did you mean inverse_every"):
        parse_options("inverse_evry=3", GritKFAC)


@pytest.mark.parametrize("cls", [GritKFAC, MatryoshkaScaledAdam, GoRAInit])
def test_every_default_can_be_said_as_a_string(cls):
    """What str() makes of a default is read as that default, and the optimizer accepts it."""
    for name, parameter in inspect.signature(cls).parameters.items():
        value = parameter.default
        if value is inspect.Parameter.empty or name == "model":
            continue
        assert parse_options({name: str(value)}, cls) == {name: value}, name


def test_the_optimizer_accepts_what_is_parsed():
    said = parse_options("lr=1e-2,betas=0.8,0.9,update=eigen,rank_threshold=0.9,min_rank=1,reproject_every=2", GritKFAC)
    one, two = models.mlp(), models.mlp()
    by_text = GritKFAC(one, **said)
    by_hand = GritKFAC(
        two, lr=1e-2, betas=(0.8, 0.9), update="eigen", rank_threshold=0.9, min_rank=1, reproject_every=2
    )
    models.fit(one, by_text, 4), models.fit(two, by_hand, 4)
    models.assert_same(models.snapshot(one, by_text), models.snapshot(two, by_hand))
