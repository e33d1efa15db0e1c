"""Every optimizer steps as AdamW does: closures, missing gradients, hooks, silence."""

import models
import pytest
import torch
from contract_kit import optimizers


@optimizers
def test_closure_is_called_once_with_gradients_enabled(make):
    models_ = [models.mlp() for _ in range(2)]
    first, second = (make(model) for model in models_)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        second.zero_grad()
        value = models.loss(models_[1], len(calls) - 1)
        value.backward()
        return value

    for i in range(3):
        (expected,) = models.fit(models_[0], first, 1, i)
        with torch.no_grad():
            assert second.step(closure).item() == expected
    models.assert_same(models.snapshot(models_[0]), models.snapshot(models_[1]))
    assert calls == [True] * 3 and first.step() is None


@optimizers
def test_parameters_without_gradient_are_left_alone_and_stateless(make):
    model = models.mlp()
    optimizer = make(model, weight_decay=0.5)
    before = models.snapshot(model)
    optimizer.step()  # no gradient anywhere
    models.assert_same(models.snapshot(model, optimizer), before)
    models.fit(model, optimizer, 3)
    after = models.snapshot(model, optimizer)
    for name in before:
        if name.startswith("idle"):
            assert torch.equal(before[name], after[name])
    assert not any(name.startswith("idle") and "/" in name for name in after)
    assert any(name.startswith("first") and "/" in name for name in after)


@optimizers
def test_a_pair_that_joins_late_and_rests_keeps_its_own_count(make):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 2)
    second = optimizer.pairs[1]
    for i in (2, 3):  # the pair rests: its bits stay, state included
        optimizer.zero_grad()
        models.loss(model, i).backward()
        second.A.grad = second.B.grad = None
        before = {k: torch.as_tensor(v).clone() for p in (second.A, second.B) for k, v in optimizer.state[p].items()}
        kept = [p.detach().clone() for p in (second.A, second.B)]
        optimizer.step()
        after = {k: torch.as_tensor(v) for p in (second.A, second.B) for k, v in optimizer.state[p].items()}
        models.assert_same(before, after)
        assert all(torch.equal(p, q) for p, q in zip(kept, (second.A, second.B), strict=True))
    models.fit(model, optimizer, 1, 4)
    assert optimizer.state[second.A]["step"] == 3 and optimizer.state[optimizer.pairs[0].A]["step"] == 5


@optimizers
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make, set_to_none):
    model = models.mlp()
    optimizer = make(model)
    models.loss(model, 0).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in model.first.lora_A.parameters()]
    assert (grads == [None]) if set_to_none else (grads[0] == 0).all()
    # what was thrown away leaves no trace in the step that follows
    models.fit(model, optimizer, 3)
    twin = models.mlp()
    models.fit(twin, other := make(twin), 3)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


@optimizers
def test_gradients_are_never_modified(make):
    model = models.mlp()
    optimizer = make(model, maximize=True, weight_decay=0.1)
    for i in range(4):
        optimizer.zero_grad()
        models.loss(model, i).backward()
        before = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, p in model.named_parameters():
            if name in before:
                assert p.grad is before[name][0] and torch.equal(p.grad, before[name][1]), name
            else:
                assert p.grad is None


@optimizers
def test_step_hooks(make):
    model = models.mlp()
    optimizer = make(model)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o is optimizer))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o is optimizer))),
    ]
    models.fit(model, optimizer, 2)
    for handle in handles:
        handle.remove()
    models.fit(model, optimizer, 1)
    assert seen == [("before", True), ("after", True)] * 2


@optimizers
@pytest.mark.filterwarnings("error")
def test_nothing_is_printed_and_nothing_warned(make, capfd):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 6)
    repr(optimizer)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
