"""torch's own properties of an optimizer: zero gradients, decay and schedules by group, names and older files."""

import copy

import models
import pytest
import torch
from gora_models import SMALL, adamw, published, run
from gora_models import build as calibrated
from optimizer_info_kit import adapted, build, infos, inputs, linear, minimize
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, SequentialLR, StepLR

SCHEDULES = {
    "exponential and step": lambda o: [ExponentialLR(o, 0.9), StepLR(o, 3, 0.5)],
    "linear and cosine": lambda o: [LinearLR(o, 0.4, total_iters=4), CosineAnnealingLR(o, 10)],
    "one after the other": lambda o: [SequentialLR(o, [LinearLR(o, 0.5, total_iters=3), ExponentialLR(o, 0.9)], [3])],
}


@inputs
def test_zero_gradients_without_decay_change_nothing(info, given):
    """Parameters outside pairs; a pair under DyLoRA draws another rank."""
    params, loss = linear()
    optimizer = build(info, params, {**given.kwargs, "weight_decay": 0.0})
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    loss().backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@infos
def test_zero_gradients_decay_exactly(info):
    params, _ = linear()
    optimizer = build(info, [{"params": params[:1], "weight_decay": 0.5}, {"params": params[1:]}], {"lr": 1e-1})
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(params[0], before[0] * (1 - 1e-1 * 0.5)) and torch.equal(params[1], before[1])


@infos
def test_decay_by_group_makes_the_weights_of_its_group_smaller(info):
    norms = []
    for decay in (0.0, 0.5):
        (weight, bias), loss = linear()
        groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}]
        minimize(build(info, groups, {"lr": 1e-2}), loss, 20)
        norms.append(weight.norm().item())
    assert norms[1] < norms[0]


@pytest.mark.parametrize("which", SCHEDULES)
@infos
def test_schedules_of_groups_are_those_of_adamw(info, which):
    """Rates by group step for step, and by them the same weights: parameters outside pairs get torch's AdamW."""
    ends, betas = [], []

    def ours(groups):
        optimizer = build(info, groups, {"lr": 1e-2})
        betas.append(optimizer.param_groups[0]["betas"])
        return optimizer

    for make in (ours, lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=betas[0])):
        (weight, bias), loss = linear()
        optimizer = make(
            [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "lr": 1e-3, "weight_decay": 0.0}]
        )
        schedulers, rates = SCHEDULES[which](optimizer), []
        for _ in range(8):
            minimize(optimizer, loss, 1)
            for scheduler in schedulers:
                scheduler.step()
            rates.append([g["lr"] for g in optimizer.param_groups])
        ends.append((rates, weight.detach(), bias.detach()))
    assert ends[0][0] == ends[1][0] and len(set(map(tuple, ends[0][0]))) > 1
    assert torch.equal(ends[0][1], ends[1][1]) and torch.equal(ends[0][2], ends[1][2])


@infos
def test_a_tensor_learning_rate_of_two_dimensions_is_refused_unless_it_is_one_number(info):
    for lr in (torch.tensor(1e-2), torch.tensor([1e-2]), torch.tensor([[1e-2]])):
        params, loss = linear()
        values = minimize(build(info, params, {"lr": lr}), loss, 3)
        assert values[-1] < values[0]
        assert all(p.shape == q.shape for p, q in zip(params, linear()[0], strict=True))
    with pytest.raises(ValueError, match="lr must be a number"):
        build(info, linear()[0], {"lr": torch.full((1, 2), 1e-2)})


@infos
def test_state_is_not_empty_after_a_step(info):
    model, optimizer = adapted({}, info)
    models.fit(model, optimizer, 1)
    moved = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    assert moved and all({"step", "exp_avg", "exp_avg_sq"} <= optimizer.state[p].keys() for p in moved)
    assert all(bool(optimizer.state[p]["exp_avg_sq"].any()) for p in moved if p.grad.any())


@pytest.mark.parametrize("saved_named", [True, False])
@pytest.mark.parametrize("loads_named", [True, False])
@infos
def test_files_with_and_without_names_load_into_either(info, saved_named, loads_named):
    def make(named):
        params, loss = linear()
        return build(info, list(zip("wb", params, strict=True)) if named else params), params, loss

    optimizer, params, loss = make(saved_named)
    minimize(optimizer, loss, 3)
    saved = models.round_trip(optimizer.state_dict())
    assert ("param_names" in saved["param_groups"][0]) == saved_named
    other, own, own_loss = make(loads_named)
    for p, q in zip(own, params, strict=True):
        p.data.copy_(q.data)
    other.load_state_dict(saved)
    minimize(optimizer, loss, 2)
    minimize(other, own_loss, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, own, strict=True))


@infos
def test_a_load_pre_hook_can_match_parameters_by_name(info):
    """A file in another order, as torch's documentation of named parameters shows."""
    params, loss = linear()
    optimizer = build(info, list(zip("wb", params, strict=True)))
    minimize(optimizer, loss, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    own, own_loss = linear()
    for p, q in zip(own, params, strict=True):
        p.data.copy_(q.data)
    other = build(info, [("b", own[1]), ("w", own[0])])

    def match(o, state):
        names = state["param_groups"][0]["param_names"]
        ids = dict(zip(names, state["param_groups"][0]["params"], strict=True))
        mine = o.param_groups[0]["param_names"]
        group = {**state["param_groups"][0], "param_names": mine, "params": [ids[name] for name in mine]}
        return {"state": state["state"], "param_groups": [group]}

    other.register_load_state_dict_pre_hook(match)
    other.load_state_dict(saved)
    minimize(optimizer, loss, 2)
    minimize(other, own_loss, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, own, strict=True))


@infos
def test_files_without_settings_that_came_later_load(info):
    """An older file lacks keys of the groups: they are what this optimizer's defaults say."""
    model, optimizer = adapted({}, info)
    models.fit(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["maximize"]
    fresh, other = adapted({}, info)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    assert all(g["maximize"] is False for g in other.param_groups)
    for m, o in ((model, optimizer), (fresh, other)):
        models.fit(m, o, 2, 2)
    models.assert_same(models.snapshot(fresh, other), models.snapshot(model, optimizer))


# ---------------------------------------------------------------------------------------------- GoRAInit


@pytest.mark.parametrize("which", SCHEDULES)
def test_gora_s_schedules_reach_the_delegate(which):
    """The default lr of 1 makes a schedule a factor: after the hand-over it is AdamW under the same schedule."""
    model, loss = calibrated("llama")
    optimizer = published(model, **SMALL, then=adamw)
    run(optimizer, loss, 3)
    twin, twin_loss = calibrated("llama")
    other = published(twin, **SMALL, then=adamw)
    run(other, twin_loss, 3)
    for schedulers, o, f in (
        (SCHEDULES[which](optimizer), optimizer, loss),
        (SCHEDULES[which](other.delegate), other.delegate, twin_loss),
    ):
        for i in range(5):
            run(o, f, 1, 3 + i)
            for scheduler in schedulers:
                scheduler.step()
    # factor times rate, or the rate itself: one rounding apart
    models.assert_near(models.snapshot(model), models.snapshot(twin), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_gora_s_state_dict_round_trip(after):
    """In the calibration, at the hand-over, and after it."""
    model, loss = calibrated("llama")
    optimizer = published(model, **SMALL, then=adamw)
    run(optimizer, loss, after)
    saved, weights = models.round_trip(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    fresh, fresh_loss = calibrated("llama")
    other = published(fresh, **SMALL, then=adamw)
    other.load_state_dict(saved)
    fresh.load_state_dict(weights)
    for o, f in ((optimizer, loss), (other, fresh_loss)):
        torch.manual_seed(1)  # new rows of A are drawn from torch's own generator
        run(o, f, 4, after)
    assert optimizer.ready and other.ready
    models.assert_same(models.snapshot(fresh), models.snapshot(model))


def test_gora_s_zero_gradients_write_nothing():
    """Without any gradient of the base weights no layer can be given a rank: the calibration goes on."""
    model, loss = calibrated("llama")
    optimizer = published(model, **SMALL, then=adamw)
    before = models.snapshot(model)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    models.assert_same(models.snapshot(model), before)
    assert not optimizer.ready
    run(optimizer, loss, 1)
    assert optimizer.ready
