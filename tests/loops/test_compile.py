"""torch.compile of the model: each hook is a graph break, and is called at every step as without compilation."""

import warnings

import loopkit
import models
import pytest
import torch
from grit_kit import rank_side

from curvopt import GoRAInit


def fit(model, forward, optimizer, steps, begin=0):
    for i in range(begin, begin + steps):
        optimizer.zero_grad()
        loopkit.token_loss(forward, *models.batch(model, i)).backward()
        optimizer.step()


def rows(optimizer):
    return {pair["rows"] for pair in optimizer.diagnostics()["pairs"].values() if "rows" in pair}


def compiled(model, backend="eager", **options):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, **options)


@pytest.mark.parametrize("wrapped", [False, True], ids=["before", "after"])
def test_the_optimizer_may_be_built_before_or_after_the_compilation(wrapped):
    """What counts is that it is there at the first training step."""
    model = models.mlp()
    if wrapped:
        forward = compiled(model)
        optimizer = rank_side(forward, lr=1e-2)
        assert optimizer.pairs[0].name == "_orig_mod.first"
    else:
        optimizer = rank_side(model, lr=1e-2)
        forward = compiled(model)
    fit(model, forward, optimizer, 4)
    plain = models.mlp()
    models.fit(plain, rank_side(plain, lr=1e-2), 4)
    models.assert_same(models.snapshot(model), models.snapshot(plain))


def test_hooks_that_sleep_load_and_leave():
    """Cadence, a load in between, an evaluation and removal act on compiled code as on plain code."""
    ends = []
    for make in (compiled, lambda model: model):
        model = models.mlp()
        optimizer = rank_side(model, lr=1e-2, factor_every=3, inverse_every=2)
        forward = make(model)
        fit(model, forward, optimizer, 4)
        optimizer.load_state_dict(models.round_trip(optimizer.state_dict()))  # puts new hooks on the model
        fit(model, forward, optimizer, 4, 4)
        with torch.no_grad():
            forward(models.batch(model, 0)[0])
        fit(model, forward, optimizer, 2, 8)
        assert rows(optimizer) == {4 * 18.0}
        optimizer.remove_hooks()
        fit(model, forward, optimizer, 3, 10)
        assert rows(optimizer) == {4 * 18.0}
        ends.append(models.snapshot(model, optimizer))
    models.assert_same(*ends)


def test_a_step_compiled_before_the_optimizer_was_built_is_silent_and_says_so_once():
    """torch.compile does not look for hooks again; one warning, and the plain rule acts."""
    model = models.mlp()
    forward = compiled(model)
    loopkit.token_loss(forward, *models.batch(model, 0)).backward()
    model.zero_grad()
    optimizer = rank_side(model, lr=1e-2)
    with pytest.warns(UserWarning, match="3 pairs received gradients but their activations were never seen"):
        fit(model, forward, optimizer, 3)  # in the third step: a hook may be late once
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, forward, optimizer, 1, 3)
    assert rows(optimizer) == {0.0} and optimizer.diagnostics()["silent"] == ["first", "second", "third"]
    torch.compiler.reset()
    fit(model, forward, optimizer, 2, 4)
    assert rows(optimizer) == {36.0}


def test_gradient_statistics_need_no_hook_and_so_no_order():
    ends = []
    for make in (compiled, lambda model: model):
        model = models.mlp()
        forward = make(model)
        loopkit.token_loss(forward, *models.batch(model, 0)).backward()
        model.zero_grad()
        optimizer = rank_side(model, lr=1e-2, statistics="gradient")
        fit(model, forward, optimizer, 4)
        ends.append(models.snapshot(model, optimizer))
    models.assert_same(*ends)


def test_one_graph_needs_gradient_statistics():
    """``fullgraph=True`` refuses the break at a hook; without activations to watch there is none."""
    model = models.mlp()
    optimizer = rank_side(model, lr=1e-2)
    forward = compiled(model, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        fit(model, forward, optimizer, 1)
    optimizer.remove_hooks()
    optimizer = rank_side(model, lr=1e-2, statistics="gradient")
    fit(model, compiled(model, fullgraph=True), optimizer, 2)


def test_hooks_that_come_with_gora_s_handover_need_a_reset():
    """Its own hooks are there from the start; those of the optimizer it hands over to are not."""
    (make,) = [make for make in loopkit.OPTIMIZERS if make.cls is GoRAInit]
    run = loopkit.compiled(make)
    run.train(0, 3, False)
    assert run.optimizer.ready
    torch.compiler.reset()
    run.train(3, 6, False)
    models.assert_same(run.snapshot(), loopkit.like_plain(make, 6))


@pytest.mark.slow
@pytest.mark.parametrize("make", loopkit.OPTIMIZERS[:2], ids=lambda make: make.__name__)
def test_with_generated_code(make):
    run = loopkit.compiled(make, backend="inductor")
    run.train(0, 6, False)
    # fused kernels sum in another order; float64 rounding, grown by Adam's division
    models.assert_near(run.snapshot(), loopkit.like_plain(make, 6), 1e-8, 1e-8)
