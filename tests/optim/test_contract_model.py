"""What every optimizer leaves on the model, and what it makes of added groups and of several adapters."""

import models
import pytest
import torch
from contract_kit import optimizers
from torch import nn

# ---------------------------------------------------------------------------------------------- traces on the model


@optimizers
@pytest.mark.parametrize("build", [models.mlp, models.llama, models.mixed])
def test_nothing_but_hooks_is_left_on_the_model(make, build):
    def inventory(model):
        modules = {
            name: {key: id(value) for key, value in vars(m).items() if key not in ("training", "_forward_hooks")}
            for name, m in model.named_modules()
        }
        tensors = {
            name: (id(p), p.requires_grad, sorted(vars(p)), p._backward_hooks) for name, p in model.named_parameters()
        }
        return modules, tensors, list(model.state_dict())

    model = build()
    before, count = inventory(model), models.hooks(model)
    optimizer = make(model)
    models.fit(model, optimizer, 3)
    assert inventory(model) == before
    if hasattr(optimizer, "remove_hooks"):
        watches = optimizer.param_groups[0].get("statistics") == "activation"
        assert (sum(len(m._forward_hooks) for m in model.modules()) > 0) == watches
        optimizer.remove_hooks()
    assert models.hooks(model) == count and not any(m._forward_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    moved = models.snapshot(model)
    models.fit(model, optimizer, 2, 3)
    assert models.differences(models.snapshot(model), moved) != []
    optimizer.remove_hooks() if hasattr(optimizer, "remove_hooks") else None  # twice does no harm


@optimizers
def test_an_optimizer_that_is_gone_has_no_say(make):
    model, twin = models.mlp(), models.mlp()
    make(model)  # dropped at once
    optimizers_ = [make(m) for m in (model, twin)]
    for m, o in zip((model, twin), optimizers_, strict=True):
        models.fit(m, o, 3)
    models.assert_same(*(models.snapshot(m, o) for m, o in zip((model, twin), optimizers_, strict=True)))


# ---------------------------------------------------------------------------------------------- groups


@optimizers
def test_add_param_group_completes_a_pair(make):
    model = models.mlp()
    layers = [model.first, model.second, model.third]
    A = [layer.lora_A.weight for layer in layers]
    optimizer = make([{"params": A[:2]}], model=model)
    assert [pair.name for pair in optimizer.pairs] == ["first", "second"]
    models.fit(model, optimizer, 2)
    optimizer.add_param_group({"params": [A[2], *(layer.lora_B.weight for layer in layers)], "lr": 3e-3})
    assert [pair.name for pair in optimizer.pairs] == ["first", "second", "third"]
    assert optimizer.param_groups[1]["lr"] == 3e-3 and optimizer.param_groups[1]["eps"] == 1e-8
    before = models.snapshot(model)
    models.fit(model, optimizer, 2, 2)
    moved = set(models.differences(before, models.snapshot(model)))
    assert moved == {f"{name}.lora_{side}.weight" for name in ("first", "second", "third") for side in "AB"}


@optimizers
def test_a_refused_group_leaves_nothing_behind(make):
    model, twin = models.mlp(), models.mlp()

    def all_but_head(model):
        return [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head")]

    optimizer, other = (make([{"params": all_but_head(m)}], model=m) for m in (model, twin))
    models.fit(model, optimizer, 2)
    models.fit(twin, other, 2)
    standing = models.hooks(model)
    for group in ({"lr": -1.0}, {"betas": (0.9, 1.5)}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=next(iter(group))):
            optimizer.add_param_group({"params": [model.head.weight], **group})
    with pytest.raises(TypeError, match="complex"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.norm.weight]})
    assert len(optimizer.param_groups) == 1 and models.hooks(model) == standing
    models.fit(model, optimizer, 2, 2)
    models.fit(twin, other, 2, 2)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


# ---------------------------------------------------------------------------------------------- several adapters


@optimizers
def test_adapter_selects(make):
    model = models.llama(adapters=("default", "other"))
    model.set_adapter("other")
    optimizer = make(model, adapter="other")
    assert {pair.adapter for pair in optimizer.pairs} == {"other"} and len(optimizer.pairs) == 14
    before = models.snapshot(model)
    models.fit(model, optimizer, 2)
    moved = models.differences(before, models.snapshot(model))
    assert moved and all(".other." in name for name in moved)


@optimizers
def test_switching_adapters_trains_each_as_if_alone(make):
    model = models.llama(adapters=("default", "other"), start="random")
    both = make(model)
    assert len(both.pairs) == 28
    models.fit(model, both, 2)
    model.set_adapter("other")
    models.fit(model, both, 3, 2)
    assert {float(both.state[pair.A]["step"]) for pair in both.pairs if pair.adapter == "other"} == {3.0}
    assert {float(both.state[pair.A]["step"]) for pair in both.pairs if pair.adapter == "default"} == {2.0}
    alone = models.llama(adapters=("default", "other"), start="random")
    models.fit(alone, make(alone, adapter="default"), 2)
    together, apart = models.snapshot(model), models.snapshot(alone)
    for name in apart:
        if ".default." in name:
            assert torch.equal(together[name], apart[name]), name
