"""Every optimizer copied, pickled and saved goes on as if it had not been; its state has torch's form and is live."""

import copy
import pickle

import models
import pytest
import torch
from contract_kit import optimizers


def go_on_together(model, optimizer, model_2, optimizer_2):
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(model_2, optimizer_2))
    for i in range(4, 10):  # alternately, so that a shared tensor or hook would show
        models.fit(model, optimizer, 1, i)
        models.fit(model_2, optimizer_2, 1, i)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(model_2, optimizer_2))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in model_2.parameters()}


@optimizers
@pytest.mark.parametrize("build", [models.mlp, models.llama])
def test_deepcopy_of_model_and_optimizer(make, build):
    model = build()
    optimizer = make(model)
    models.fit(model, optimizer, 4)
    go_on_together(model, optimizer, *copy.deepcopy((model, optimizer)))


@optimizers
def test_deepcopy_of_the_optimizer_alone_brings_its_model(make):
    model = models.single()
    optimizer = make(model)
    models.fit(model, optimizer, 4)
    twin = copy.deepcopy(optimizer)
    (pair,) = twin.pairs
    assert pair.module is not model
    go_on_together(model, optimizer, pair.module, twin)


@optimizers
def test_deepcopy_of_the_model_alone_is_unwatched(make):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 2)
    twin = models.mlp()
    other = make(twin)
    models.fit(twin, other, 2)
    stranger = copy.deepcopy(model)
    for i in range(3):
        models.loss(stranger, i).backward()  # must not be counted by anyone
    models.fit(model, optimizer, 3, 2)
    models.fit(twin, other, 3, 2)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


@optimizers
def test_pickle(make):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 4)
    go_on_together(model, optimizer, *pickle.loads(pickle.dumps((model, optimizer))))


@optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_dict_through_a_file(make, dtype):
    model = models.mlp(dtype)
    optimizer = make(model)
    models.fit(model, optimizer, 4)
    saved = models.round_trip(optimizer.state_dict())
    fresh = models.copied_into(model, models.mlp(dtype))
    other = make(fresh)
    other.load_state_dict(saved)
    go_on_together(model, optimizer, fresh, other)


@optimizers
def test_state_dict_has_torch_s_form(make):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 2)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    for state in saved["state"].values():
        assert {"step", "exp_avg", "exp_avg_sq"} <= state.keys()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    for p, state in optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape


@optimizers
def test_state_is_live(make):
    """Writing into ``optimizer.state`` acts on the next step, as it does in torch."""
    model, twin = models.mlp(), models.mlp()
    optimizer, other = make(model), make(twin)
    models.fit(model, optimizer, 2)
    models.fit(twin, other, 2)
    p = optimizer.pairs[0].A
    optimizer.state[p]["exp_avg"].zero_()
    models.fit(model, optimizer, 1, 2)
    models.fit(twin, other, 1, 2)
    assert not torch.equal(p, other.pairs[0].A)
    torch.testing.assert_close(model.second.lora_A.weight, twin.second.lora_A.weight, rtol=0, atol=0)
