"""A signal belongs to a gradient: what is observed is what stands in ``.grad``, and goes when that is dropped."""

import gc
import warnings

import pytest
import torch
from grit_kit import rank_side
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
    """Also where the second observation is far away."""
    model = build()
    optimizer = rank_side(model, lr=1e-2, factor_every=every)
    with pytest.warns(UserWarning, match="2 pairs received gradients but their activations were never seen"):
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.step()


def test_hooks_are_idle_between_observations():
    """One step in three observes: only there a hook tells of the gradient of A, or of B where A is frozen."""
    model = build()
    optimizer = rank_side(model, lr=1e-2, factor_every=3)
    first, second = optimizer.pairs[:2]
    second.A.requires_grad_(False)
    told, rows = [], []
    for _ in range(6):
        optimizer.zero_grad()
        value = loss(model)
        told.append([len(p._post_accumulate_grad_hooks or ()) for p in (first.A, first.B, second.A, second.B)])
        value.backward()
        optimizer.step()
        rows.append([int(optimizer.state[p]["rows"]) for p in (first.A, second.B)])
    assert told == [[1, 0, 0, 1], [0] * 4, [0] * 4] * 2
    assert rows == [[32, 32]] * 3 + [[64, 64]] * 3


def test_a_matrix_unfrozen_between_observations_is_observed_a_step_later():
    model = build()
    optimizer = rank_side(model, lr=1e-2, factor_every=10)
    A = optimizer.pairs[0].A
    A.requires_grad_(False)
    rows = []
    for i in range(12):
        A.requires_grad_(i >= 3)
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        rows.append(int(optimizer.state[A]["rows"]) if A in optimizer.state else None)
    assert rows == [None] * 3 + [0] + [32] * 8


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
