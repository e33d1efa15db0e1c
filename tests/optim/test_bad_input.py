"""Wrong arguments are named, with their value and with what is allowed, and leave nothing behind."""

import math

import models
import pytest
import torch
from torch import nn

from curvopt import GritKFAC

# argument, values, what the message says is allowed
REFUSED = [
    ("lr", [-1e-3, math.nan, math.inf, "0.1", None], "a number ≥ 0"),
    ("betas", [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), (0.9,), 0.9, None], "two numbers in [0, 1)"),
    ("eps", [-1e-8, math.nan, "x"], "a number ≥ 0"),
    ("weight_decay", [-0.1, math.nan, None], "a number ≥ 0"),
    ("statistics", ["activations", "kfac", None, 3, ["weight"]], "'activation', 'gradient', 'weight'"),
    ("sides", ["both", "", None], "'kfac', 'paper'"),
    ("update", ["adamw", "sgd", None], "'polar', 'eigen', 'adam', 'whiten', 'momentum'"),
    ("reprojection", ["paper-two-sided", True, ""], "'balanced', 'paper', 'paper-one-sided', None"),
    ("damping", [0, 0.0, -0.1, math.nan, None, torch.ones(1, 1)], "a number > 0, or a 0-d tensor"),
    ("maximize", ["no", 1, None], "True or False"),
    ("capturable", ["yes", 0], "True or False"),
    ("factor_decay", [-0.01, 1.01, math.nan, None], "a number in [0, 1]"),
    ("factor_every", [0, -1, 1.5, True, None], "an integer ≥ 1"),
    ("inverse_every", [0, -3, 2.0, None], "an integer ≥ 1"),
    ("warmup_steps", [-1, 0.5, None], "an integer ≥ 0"),
    ("reproject_every", [-1, 10.0], "an integer ≥ 0"),
    ("outer_rank", [-1, 8.0, None], "an integer ≥ 0"),
    ("rank_threshold", [0, -0.5, 1.01, math.nan, "0.9"], "(0, 1]"),
    ("min_rank", [0, -1, 2.5, None], "an integer ≥ 1"),
    ("backend", ["cuda", "Torch", "", None], "'auto', 'torch', 'triton'"),
]
EACH = [(name, value, allowed) for name, values, allowed in REFUSED for value in values]


@pytest.fixture
def model():
    return models.mlp()


@pytest.mark.parametrize(("name", "value", "allowed"), EACH, ids=lambda x: repr(x)[:24])
def test_a_refused_argument_is_named_with_its_value(model, name, value, allowed):
    with pytest.raises(ValueError) as error:
        GritKFAC(model, **{name: value})
    message = str(error.value)
    assert message.startswith(name) and repr(value) in message and allowed in message


@pytest.mark.parametrize(
    ("name", "values"), [(name, values) for name, values, _ in REFUSED], ids=lambda x: repr(x)[:24]
)
def test_a_refusal_leaves_no_hook(model, name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            GritKFAC(model, **{name: value})
        assert models.hooks(model) == 0, value


@pytest.mark.parametrize(
    ("name", "value", "allowed"), [case for case in EACH if case[0] != "backend"], ids=lambda x: repr(x)[:24]
)
def test_the_same_in_a_param_group(model, name, value, allowed):
    params = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError) as error:
        GritKFAC([{"params": params, name: value}], model=model)
    message = str(error.value)
    assert message.startswith(name) and repr(value) in message and allowed in message
    optimizer = GritKFAC([{"params": params[:-1]}], model=model)
    standing = models.hooks(model)
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": params[-1:], name: value})
    assert len(optimizer.param_groups) == 1 and models.hooks(model) == standing


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0), ("lr", torch.tensor(0.1)), ("betas", (0, 0)), ("betas", [0.9, 0.99]), ("eps", 0), ("factor_decay", 0),
     ("factor_decay", 1), ("rank_threshold", 1), ("rank_threshold", 1e-9), ("min_rank", 3), ("damping", 1e-12)],
)  # fmt: skip
def test_the_edges_that_are_allowed(name, value):
    model = models.mlp()
    models.fit(model, GritKFAC(model, **{"min_rank": 1, name: value}), 1)


def test_min_rank_above_the_rank_of_a_pair(model):
    with pytest.raises(ValueError, match=r"min_rank must be at most the rank of every pair \(third: 3\), got 4"):
        GritKFAC(model, rank_threshold=0.9)
    with pytest.raises(ValueError, match=r"min_rank must be .*\(first: 4\), got 9"):
        GritKFAC(model, min_rank=9)
    assert models.hooks(model) == 0
    GritKFAC(model).remove_hooks()  # the default binds only where ranks are adapted


@pytest.mark.parametrize("name, values", [("statistics", ("activation", "weight")), ("sides", ("kfac", "paper")),
                                          ("update", ("eigen", "adam")), ("reproject_every", (0, 5))])  # fmt: skip
def test_a_pair_in_two_groups_that_disagree(model, name, values):
    A = [p for n, p in model.named_parameters() if "lora_A" in n]
    B = [p for n, p in model.named_parameters() if "lora_B" in n]
    with pytest.raises(ValueError) as error:
        GritKFAC([{"params": A, name: values[0]}, {"params": B, name: values[1]}], model=model)
    message = str(error.value)
    assert message.startswith(f"{name} of first") and repr(values) in message and "the same" in message
    assert models.hooks(model) == 0
    optimizer = GritKFAC([{"params": A, name: values[0]}], model=model)
    standing = models.hooks(model)
    with pytest.raises(ValueError, match=f"{name} of first"):
        optimizer.add_param_group({"params": B, name: values[1]})
    assert len(optimizer.param_groups) == 1 and models.hooks(model) == standing
    optimizer.remove_hooks()


# ---------------------------------------------------------------------------------------------- params


def test_a_model_without_lora_says_what_was_looked_for_and_found():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError) as error:
        GritKFAC(model)
    message = str(error.value)
    for word in ("no LoRA pair found", "lora_A/lora_B", "4 parameters", "0.weight", "require_pairs=False"):
        assert word in message


def test_named_parameters_without_lora():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"no LoRA pair found.*4 named parameters \(0\.weight, 0\.bias.*lora_A"):
        GritKFAC(model.named_parameters())


def test_bare_tensors_cannot_be_paired(model):
    with pytest.raises(ValueError, match=r"no LoRA pair found.*no names.*Pass the model"):
        GritKFAC([p for p in model.parameters() if p.requires_grad])
    assert models.hooks(model) == 0


def test_half_a_model(model):
    """Groups that hold no factor of any pair in the model."""
    with pytest.raises(ValueError, match="no LoRA pair found"):
        GritKFAC([{"params": list(model.head.parameters())}], model=model)
    assert models.hooks(model) == 0


@pytest.mark.parametrize("params", [torch.ones(3, requires_grad=True), 5, None, ["lora_A"], [None], [[1, 2]]], ids=repr)
def test_params_of_other_types(params):
    with pytest.raises(TypeError):
        GritKFAC(params)


def test_no_parameters():
    with pytest.raises(ValueError, match="empty"):
        GritKFAC([])
    with pytest.raises(ValueError, match="trainable"):
        GritKFAC(nn.Linear(2, 2).requires_grad_(False), require_pairs=False)


def test_a_parameter_in_two_groups(model):
    p = model.first.lora_A.weight
    with pytest.raises(ValueError, match="more than one parameter group"):
        GritKFAC([{"params": [p]}, {"params": [p]}], model=model)
    assert models.hooks(model) == 0


def test_a_model_that_is_no_module(model):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        GritKFAC([p for p in model.parameters() if p.requires_grad], model="model")


def test_an_unknown_adapter():
    model = models.llama(adapters=("default", "other"))
    with pytest.raises(ValueError, match=r"adapter 'third' .*'default', 'other'"):
        GritKFAC(model, adapter="third")
    assert models.hooks(model) == 0


def test_complex_parameters(model):
    with pytest.raises(TypeError, match="complex"):
        GritKFAC([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], require_pairs=False)
    layer = models.single()
    layer.lora_A.weight = nn.Parameter(layer.lora_A.weight.to(torch.complex64))
    with pytest.raises(TypeError, match="complex"):
        GritKFAC(layer)
    assert models.hooks(layer) == 0


@pytest.mark.parametrize("where", ["pair", "outside"])
def test_sparse_gradients(where):
    model = models.mlp()
    optimizer = GritKFAC(model, lr=1e-2)
    p = model.first.lora_A.weight if where == "pair" else model.head.weight
    for late in (False, True):
        optimizer.zero_grad()
        models.loss(model, 0).backward()
        p.grad = p.grad.to_sparse()
        before = models.snapshot(model, *[optimizer] * late)
        with pytest.raises(RuntimeError, match="sparse gradients"):
            optimizer.step()
        models.assert_same(models.snapshot(model, *[optimizer] * late), before)
        if not late:
            models.fit(model, optimizer, 2)


def test_sparse_gradients_of_a_convolution():
    layer = nn.Module()
    layer.lora_A, layer.lora_B = nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 5, 1, bias=False)
    optimizer = GritKFAC(layer)
    layer.lora_B(layer.lora_A(torch.randn(2, 3, 6, 6))).sum().backward()
    layer.lora_A.weight.grad = layer.lora_A.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without CUDA")
def test_triton_without_a_cuda_device(model):
    with pytest.raises(ValueError, match=r"backend='triton' needs triton and a CUDA device.*not available"):
        GritKFAC(model, backend="triton")
    assert models.hooks(model) == 0


# ---------------------------------------------------------------------------------------------- what is left


def test_a_refusal_leaves_an_older_optimizer_alone():
    model, twin = models.mlp(), models.mlp()
    optimizer, other = GritKFAC(model, lr=1e-2), GritKFAC(twin, lr=1e-2)
    standing = models.hooks(model)
    for wrong in ({"lr": -1}, {"update": "x"}, {"factor_every": 0}, {"min_rank": 99}):
        with pytest.raises(ValueError):
            GritKFAC(model, **wrong)
    assert models.hooks(model) == standing
    models.fit(model, optimizer, 3)
    models.fit(twin, other, 3)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))
