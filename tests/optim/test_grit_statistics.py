"""What GritKFAC observes: second moments as autograd has them, in any batches, recomputed, in every kind of adapter."""

import models
import oracles
import pytest
import torch
from grit_kit import EXACT, STATISTICS, factors, observed_backward, rank_side
from torch.nn import functional as F

from curvopt.functional.update import RULES, Hyper, Slab

# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.5, 3), (1.0, 2), (0.0, 1)])
@pytest.mark.parametrize("sides", ["kfac", "paper"])
def test_factors_are_the_second_moments_of_u_and_of_N_d(sides, decay, every, drop):
    model = models.mlp(drop=drop)
    optimizer = rank_side(model, lr=1e-2, sides=sides, factor_decay=decay, factor_every=every, inverse_every=2)
    history = []
    for i in range(7):
        value, seen = observed_backward(model, i, rows=4 + i)
        optimizer.zero_grad()  # autograd.grad went past the hooks too
        value.backward()
        optimizer.step()
        if i % every == 0:
            history.append(seen)
        for j, pair in enumerate(optimizer.pairs[:3]):
            for got, which in zip(factors(optimizer, pair), (0, 1), strict=True):
                assert got.dtype == torch.float64
                expected = oracles.average([seen[j][which] for seen in history], decay**every)
                torch.testing.assert_close(got, expected, **EXACT)
    rows = sum(3 * (4 + i) for i in range(0, 7, every))
    for p in (optimizer.pairs[0].A, optimizer.pairs[0].B):
        assert optimizer.state[p]["rows"] == rows and optimizer.state[p]["observed"] == len(history)


def test_s_d_is_a_per_token_moment():
    """The scale of d is that of one token's loss: the same tokens twice give the same factors."""
    found = []
    for copies in (1, 4):
        model = models.mlp()
        optimizer = rank_side(model)
        x, y = models.batch(model, 0)
        F.cross_entropy(model(x.repeat(copies, 1, 1)).flatten(0, 1), y.repeat(copies, 1).flatten()).backward()
        optimizer.step()
        found.append([S for pair in optimizer.pairs[:3] for S in factors(optimizer, pair)])
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, **EXACT)


@pytest.mark.parametrize("sides", ["kfac", "paper"])
def test_gradient_statistics(sides):
    model = models.mlp()
    optimizer = rank_side(model, lr=1e-2, statistics="gradient", sides=sides, factor_decay=0.7)
    optimizer.remove_hooks()  # nothing is lost: they are not needed
    history = []
    for i in range(4):
        optimizer.zero_grad()
        models.loss(model, i).backward()
        history.append([(p.B.grad.T @ p.B.grad, p.A.grad @ p.A.grad.T) for p in optimizer.pairs[:3]])
        optimizer.step()
    for j, pair in enumerate(optimizer.pairs[:3]):
        for which, got in enumerate(factors(optimizer, pair)):
            torch.testing.assert_close(got, oracles.average([h[j][which] for h in history], 0.7), **EXACT)


@pytest.mark.parametrize("sides", ["kfac", "paper"])
def test_weight_statistics_are_those_of_now(sides):
    model = models.mlp()
    optimizer = rank_side(model, lr=1e-2, statistics="weight", sides=sides, factor_decay=0.7)
    models.fit(model, optimizer, 3)
    before = [(p.A.detach() @ p.A.detach().T, p.B.detach().T @ p.B.detach()) for p in optimizer.pairs[:3]]
    models.fit(model, optimizer, 1, 3)
    for pair, expected in zip(optimizer.pairs, before, strict=False):
        for got, S in zip(factors(optimizer, pair), expected, strict=True):
            torch.testing.assert_close(got, S, **EXACT)


def test_names_alone_give_gradient_statistics():
    runs = []
    for named in (True, False):
        model = models.mlp()
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = rank_side(trainable, lr=1e-2) if named else rank_side(model, lr=1e-2, statistics="gradient")
        models.fit(model, optimizer, 5)
        runs.append(models.snapshot(model, optimizer))
        assert {d["statistics"] for d in optimizer.diagnostics()["pairs"].values() if "rows" in d} == {"gradient"}
    models.assert_same(*runs)


# ---------------------------------------------------------------------------------------------- batches, recomputation


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_equal_one_batch(parts, statistics):
    model, twin = models.mlp(), models.mlp()
    make = {"lr": 1e-2, "statistics": statistics, "inverse_every": 2}
    optimizer, other = rank_side(model, **make), rank_side(twin, **make)
    for i in range(5):
        models.fit(model, optimizer, 1, i)
        other.zero_grad()
        x, y = models.batch(twin, i)
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(twin(x_part).flatten(0, 1), y_part.flatten()) / parts).backward()
        other.step()
    # the same sums in another order, through five steps of Adam
    models.assert_near(models.snapshot(model, optimizer), models.snapshot(twin, other), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(reentrant, drop):
    runs = []
    for checkpointing in (None, reentrant):
        model = models.mlp(drop=drop, checkpointing=checkpointing)
        optimizer = rank_side(model, lr=1e-2, inverse_every=2)
        torch.manual_seed(5)
        models.fit(model, optimizer, 4)
        runs.append(models.snapshot(model, optimizer))
    models.assert_same(*runs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_of_a_llama(reentrant):
    runs = []
    for on in (False, True):
        model = models.llama(torch.float64, start="random")
        if on:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        optimizer = rank_side(model, lr=1e-2, inverse_every=2)
        models.fit(model, optimizer, 3)
        assert all(d["rows"] == 60 for d in optimizer.diagnostics()["pairs"].values())
        runs.append(models.snapshot(model, optimizer))
    models.assert_same(*runs)


def test_forwards_without_backward_are_not_counted():
    model, twin = models.mlp(), models.mlp()
    optimizer, other = rank_side(model, lr=1e-2), rank_side(twin, lr=1e-2)
    for i in range(3):
        models.fit(model, optimizer, 1, i)
        with torch.no_grad():
            models.loss(twin, 90 + i)
        models.loss(twin, 95 + i)  # a graph that nobody walks
        models.fit(twin, other, 1, i)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


# ---------------------------------------------------------------------------------------------- kinds of adapters


def test_convolution_embedding_dora_and_a_frozen_A_train_together():
    model = models.mixed()
    model.front["fc"].lora_A["default"].weight.requires_grad_(False)
    frozen = model.front["fc"].lora_A["default"].weight.detach().clone()
    optimizer = rank_side(model, lr=1e-2, inverse_every=2)
    losses = []
    for _ in range(40):  # one batch again and again: it is learnt by heart
        losses += models.fit(model, optimizer, 1)
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(model.front["fc"].lora_A["default"].weight, frozen)
    found = optimizer.diagnostics()
    assert {name: d["statistics"] for name, d in found["pairs"].items()} == {
        "front.embed": "gradient", "front.conv": "activation", "front.fc": "activation", "back.fc": "gradient",
    }  # fmt: skip
    assert "embedding" in found["pairs"]["front.embed"]["note"] and "Dora" in found["pairs"]["back.fc"]["note"]
    assert found["pairs"]["front.conv"]["note"] == "" and found["silent"] == found["idle"] == []
    assert "A" not in found["pairs"]["front.fc"] and "B" in found["pairs"]["front.fc"]
    # positions of the convolution, pixel by pixel, are its tokens; gradients are observed once a step
    assert found["pairs"]["front.conv"]["rows"] == 40 * 6 * 16 and found["pairs"]["front.embed"]["rows"] == 40


def test_a_frozen_A_still_preconditions_B_by_S_u():
    model, twin = models.mlp(), models.mlp()
    model.first.lora_A.weight.requires_grad_(False)
    optimizer, other = rank_side(model, lr=1e-2), rank_side(twin, lr=1e-2)
    models.fit(model, optimizer, 1)
    models.fit(twin, other, 1)
    assert torch.equal(model.first.lora_B.weight, twin.first.lora_B.weight)
    B, B_twin = model.first.lora_B.weight, twin.first.lora_B.weight
    assert torch.equal(optimizer.state[B]["factor"], other.state[B_twin]["factor"])


def test_without_statistics_nothing_is_watched_or_kept():
    """Adam's step with equalised singular values, and no hook on the model."""
    model = models.mlp()
    optimizer = rank_side(model, lr=1e-2, statistics="none")
    assert not any(m._forward_hooks for m in model.modules()) and not optimizer.watching
    A = model.first.lora_A.weight
    before = A.detach().clone()
    models.loss(model, 0).backward()
    slab = Slab(
        [before], [A.grad.clone()], torch.zeros(1, *A.shape, dtype=A.dtype), torch.zeros(1, *A.shape, dtype=A.dtype),
        torch.tensor(0.0), 1, None, Hyper(1e-2, 0.9, 0.999, 1e-8, 0.0),
    )  # fmt: skip
    RULES["polar"]([slab], torch.tensor(0.0))
    optimizer.step()
    assert torch.equal(A, before)
    assert not {"factor", "basis", "observed"} & optimizer.state[A].keys()
    assert optimizer.diagnostics()["pairs"]["first"]["statistics"] == "none"


WITHOUT = [{"update": "eigen"}, {"update": "adam"}, {"reproject_every": 5, "reprojection": "paper"}]


@pytest.mark.parametrize("wrong", WITHOUT, ids=str)
def test_without_statistics_what_needs_a_factor_is_refused(wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))} must be .*statistics="none"'):
        rank_side(models.mlp(), statistics="none", **wrong)
