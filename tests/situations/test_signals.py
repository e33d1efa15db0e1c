"""A signal belongs to a gradient: what is observed is what stands in ``.grad``, and goes when that is dropped."""

import gc
import warnings

import pytest
import torch
from grit_kit import rank_side
from peft import LoraConfig
from situations_kit import X, build, factor, loss, steps

from curvopt.lora import Capture, find_lora_pairs

DROPS = {
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer.zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "by hand": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
}


def started():
    model = build()
    optimizer = rank_side(model, lr=1e-2)
    steps(model, optimizer, 3)
    optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("drop", DROPS)
def test_a_dropped_batch_leaves_no_trace(drop):
    """An out-of-memory retry, SAM's first pass, a diagnostic backward: however the gradients were dropped."""
    found = []
    for spoilt in (True, False):
        model, optimizer = started()
        if spoilt:
            (1e4 * loss(model)).backward()
            DROPS[drop](model, optimizer)
        loss(model).backward()
        optimizer.step()
        found.append(factor(optimizer).clone())
    assert torch.equal(*found)


def test_a_batch_that_was_kept_leaves_one():
    """The negative control: the same batch, not dropped, is in the sums."""
    model, optimizer = started()
    (1e4 * loss(model)).backward()
    loss(model).backward()
    optimizer.step()
    other = started()
    loss(other[0]).backward()
    other[1].step()
    assert factor(optimizer).trace() > 1e3 * factor(other[1]).trace()


def summed(backwards):
    model = build()
    pairs = find_lora_pairs(model)
    capture = Capture(pairs)
    capture.attach()
    backwards(model)
    return capture.pop()


def test_several_backward_passes_over_one_graph_are_the_backward_of_their_sum():
    """With cross terms, and every row counted once."""

    def one(model):
        y = model(X)
        (y.square().mean() + y.exp().mean()).backward()

    def two(model):
        y = model(X)
        y.square().mean().backward(retain_graph=True)
        y.exp().mean().backward()

    for a, b in zip(summed(one).values(), summed(two).values(), strict=True):
        assert a.n == b.n == 32
        # two orders of summation of some hundred float64 products
        torch.testing.assert_close(a.both, b.both, rtol=1e-12, atol=1e-15)


def test_autograd_grad_counts_nothing():
    """GradNorm and penalties by norm look at gradients that no parameter gets."""

    def looked_at(model):
        y = model(X)
        torch.autograd.grad(y.exp().sum(), [p for p in model.parameters() if p.requires_grad], retain_graph=True)
        y.square().mean().backward()

    plain = summed(lambda model: model(X).square().mean().backward())
    for a, b in zip(plain.values(), summed(looked_at).values(), strict=True):
        assert torch.equal(a.both, b.both) and a.n == b.n


def test_a_differentiated_gradient_is_warned_of():
    """A force loss: part of ∇A does not come through u."""
    model = build()
    optimizer = rank_side(model, lr=1e-2)
    x = X.clone().requires_grad_()
    with pytest.warns(UserWarning, match=r'create_graph=True.*statistics="gradient"'):
        (forces,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    forces.square().mean().backward()
    optimizer.step()


def test_no_rows_are_no_observation():
    model = build()
    optimizer = rank_side(model, lr=1e-2)
    steps(model, optimizer)
    before = factor(optimizer).clone(), factor(optimizer, side="B").clone()
    optimizer.zero_grad()
    (model(X[:0]).sum() + sum((p**2).sum() for p in model.parameters() if p.requires_grad)).backward()
    optimizer.step()
    assert torch.equal(factor(optimizer), before[0]) and torch.equal(factor(optimizer, side="B"), before[1])
    assert optimizer.state[optimizer.pairs[0].A]["observed"] == 1
    optimizer.zero_grad()
    optimizer.mask_rows(torch.zeros(32))
    loss(model).backward()
    optimizer.step()
    assert torch.equal(factor(optimizer), before[0])


def test_autograd_grad_of_another_graph_counts_nothing_where_the_model_resets():
    """The optimizer does not see `model.zero_grad`, and not what comes between two micro-batches."""
    ends = []
    for looked in (False, True):
        model = build()
        optimizer = rank_side(model, lr=1e-2)
        for _ in range(2):
            model.zero_grad()
            for part in (X[:16], X[16:]):
                if looked:
                    torch.autograd.grad(1e3 * loss(model, part), [p for p in model.parameters() if p.requires_grad])
                loss(model, part).backward()
            optimizer.step()
        ends.append([factor(optimizer, side=side) for side in "AB"])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_hooks_of_optimizers_that_are_gone_are_gone():
    model = build()
    for _ in range(3):
        optimizer = rank_side(model, lr=1e-2)
    gc.collect()
    A = optimizer.pairs[0].module.lora_A["default"]
    assert len(A._forward_hooks) == 1 and len(A.weight._post_accumulate_grad_hooks) == 1


def test_zero_gradients_of_an_idle_adapter_are_no_silence():
    """Wrappers give zeros to parameters that took no part."""
    model = build()
    optimizer = rank_side(model, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            optimizer.step()


@pytest.mark.parametrize("every", [1, 10])
def test_a_fused_forward_is_told_of_in_the_third_step(every):
    """Also where the second observation is far away; at the line that called ``step``, a scheduler between or not."""
    model = build()
    optimizer = rank_side(model, lr=1e-2, factor_every=every)
    if every == 1:
        torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps step
    with pytest.warns(UserWarning, match="2 pairs received gradients but their activations were never seen") as caught:
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.step()
    assert [w.filename for w in caught] == [__file__]


def told(optimizer):
    """How many hooks tell of the gradients of A and B, pair by pair."""
    return [[len(p._post_accumulate_grad_hooks or ()) for p in (pair.A, pair.B)] for pair in optimizer.pairs]


def test_hooks_are_idle_between_observations():
    """One step in three observes: only there a hook tells of the gradient of A."""
    model = build()
    optimizer = rank_side(model, lr=1e-2, factor_every=3)
    seen = []
    for _ in range(6):
        optimizer.zero_grad()
        loss(model).backward()
        seen.append(told(optimizer))
        optimizer.step()
    assert seen == [[[1, 0]] * 2, [[0, 0]] * 2, [[0, 0]] * 2] * 2


def switched(model, i, by):
    if by == "adapter":
        model.set_adapter("b" if i >= 3 else "default")
    else:
        model.base_model.model[0].lora_A["default"].weight.requires_grad_(i >= 3)


@pytest.mark.parametrize("by", ["adapter", "frozen A"])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_trains_later_is_observed_in_its_first_step(by, resumed):
    """Another adapter's turn, or an A that is unfrozen, in a step that observes nothing else; also after a resume."""
    model = build()
    if by == "adapter":
        model.add_adapter("b", LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False))
        model.double()
    settings = {"lr": 1e-2, "update": "eigen", "inverse_every": 10, "factor_every": 10}
    optimizer = rank_side(model, **settings)
    for i in range(6):
        switched(model, i, by)
        if i == 3 and resumed:
            saved = optimizer.state_dict()
            optimizer = rank_side(model, **settings)
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        loss(model).backward()
        if by == "frozen A":
            assert told(optimizer)[0] == [int(i == 3), int(i < 3)]  # idle once nothing else may come
        optimizer.step()
    late = model.base_model.model[0].lora_A["b" if by == "adapter" else "default"].weight
    state = optimizer.state[late]
    assert int(state["rows"]) == 32 and int(state["step"]) == 3
    assert not torch.equal(state["basis"], torch.eye(len(state["basis"]), dtype=torch.float64))


def test_a_deleted_adapter_wakes_no_hooks():
    model = build()
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    optimizer = rank_side(model.double(), lr=1e-2, factor_every=3)
    for i in range(8):
        if i == 4:
            model.delete_adapter("b")
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert {int(optimizer.state[s.param]["rows"]) for s in optimizer.sides} == {3 * 32}


@pytest.mark.parametrize("drop", ["in place", "past the version"])
def test_a_step_that_is_watched_but_not_observed_leaves_nothing(drop):
    """After a resume the hooks are on in a step that observes nothing, and gradients are zeroed behind their backs."""
    rows = []
    for resumed in (False, True):
        model = build()
        optimizer = rank_side(model, lr=1e-2, factor_every=4)
        for i in range(5):
            if i == 3 and resumed:
                saved = optimizer.state_dict()
                optimizer = rank_side(model, lr=1e-2, factor_every=4)
                optimizer.load_state_dict(saved)
            for p in model.parameters():
                if p.grad is not None:
                    (p.grad if drop == "in place" else p.grad.data).zero_()
            loss(model).backward()
            optimizer.step()
        rows.append([int(optimizer.state[s.param]["rows"]) for s in optimizer.sides])
    assert rows == [[64] * 4] * 2


def test_an_optimizer_made_after_the_backward_observes_the_next_step():
    model = build()
    loss(model).backward()
    optimizer = rank_side(model, lr=1e-2, update="eigen", factor_every=10)
    seen = []
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loss(model).backward()
        state = optimizer.state[optimizer.pairs[0].B]
        seen.append((int(state["rows"]), bool((state["basis"] != torch.eye(4, dtype=torch.float64)).any())))
    assert seen == [(0, False), (32, True), (32, True)]


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "autograd.grad before"])
def test_frozen_A_counts_every_use_of_a_layer(grad):
    """B's gradient may arrive before some d of its layer and after others; what fills no .grad counts nothing."""
    model = build()
    first, act, twice, _, last = model.base_model.model
    for pair in find_lora_pairs(model):
        pair.A.requires_grad_(False)
    optimizer = rank_side(model, lr=1e-2)

    def value():
        return last(act(twice(act(twice(act(first(X))))))).square().mean()

    for _ in range(3):
        optimizer.zero_grad()
        if grad:
            torch.autograd.grad(value(), [pair.B for pair in optimizer.pairs])
        value().backward()
        optimizer.step()
    assert [int(optimizer.state[pair.B]["rows"]) for pair in optimizer.pairs] == [3 * 32, 3 * 64]


def test_a_mask_is_gone_after_a_step_that_observes_nothing():
    """Also where gradients are reset by the model, which the optimizer does not see."""
    model = build()
    optimizer = rank_side(model, lr=1e-2, factor_every=2)
    for i in range(3):
        model.zero_grad()
        if i == 1:  # no observation falls on this step
            optimizer.mask_rows(torch.zeros(32))
        loss(model).backward()
        optimizer.step()
    assert optimizer.state[optimizer.pairs[0].A]["rows"] == 64  # two times all of the rows
