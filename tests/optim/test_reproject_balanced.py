"""Reprojection in a running GritKFAC: outputs stay, both factors become one diagonal, moments are carried; and when."""

import models
import oracles
import pytest
import torch
from grit_kit import RULES, WIDE, delta, factors, fork, masked_are_zero, rank_side, stepped
from torch import Tensor

from curvopt.lora import find_lora_pairs

KEYS = {"eigen": "basis", "adam": "inverse", "whiten": "root", "momentum": "inverse"}


def gauge(pair, before) -> Tensor:
    """T with A = T A_before, by least squares: A_before has full row rank."""
    return pair.A.detach() @ torch.linalg.pinv(before.A.detach())


# ---------------------------------------------------------------------------------------------- balanced, full rank


@pytest.mark.parametrize("sides", ["kfac", "paper"])
@pytest.mark.parametrize("rule", RULES)
def test_outputs_do_not_change(rule, sides):
    model = models.mlp(**WIDE)
    optimizer = rank_side(model, lr=1e-2, update=rule, sides=sides, inverse_every=2)
    x, _ = models.batch(model, 77)
    turned = 0
    for i in range(12):
        twin, other = fork(model, optimizer, models.mlp(**WIDE), reproject_every=0)
        optimizer.param_groups[0]["reproject_every"] = 3
        models.fit(model, optimizer, 1, i)
        models.fit(twin, other, 1, i)
        with torch.no_grad():
            # T and T⁻¹ meet in the product: rounding (2e-16) times the condition of T, at most 1e4
            torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-11)
        turned += not torch.allclose(model.first.lora_A.weight, twin.first.lora_A.weight, rtol=1e-3)
    assert turned == 4  # every third of twelve steps did change the basis


def test_outputs_in_float32_change_by_rounding_times_the_condition():
    model, _, twin, other = stepped(torch.float32, reprojection="balanced")
    x, _ = models.batch(model, 77)
    for pair, before in zip(find_lora_pairs(model)[:3], other.pairs, strict=False):
        T = gauge(pair, before)
        # A and B are each rounded once (relative eps) in a basis in which they may be cond(T) larger than B A is
        bound = 4 * oracles.EPS[torch.float32] * torch.linalg.cond(T) * before.A.norm() * before.B.norm()
        assert (delta(pair) - delta(before)).abs().max() < bound
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("statistics", ["activation", "gradient"])
@pytest.mark.parametrize("sides", ["kfac", "paper"])
@pytest.mark.parametrize("rule", RULES)
def test_both_factors_become_the_same_diagonal(rule, sides, statistics):
    _, optimizer, _, other = stepped(update=rule, sides=sides, statistics=statistics, factor_decay=1.0)
    for pair, before in zip(optimizer.pairs[:3], other.pairs, strict=False):
        S_u, S_d = factors(optimizer, pair)
        sigma = oracles.hankel(*factors(other, before))
        # What is exactly diagonal are the factors plus 1e-6 of their mean eigenvalue, which T carries along.
        T = gauge(pair, before)
        B_u, B_d = (1e-6 * S.trace() / len(S) for S in factors(other, before))
        # up to the scale of the loss, which T leaves where it is: both are σ when it is shared out evenly
        even = (S_d.trace() / S_u.trace()).sqrt()
        S_u, S_d = S_u * even, S_d / even
        ridge = (B_u * even * T.norm() ** 2 + B_d / even * torch.linalg.inv(T).norm() ** 2).item()
        assert ridge < 0.1 * sigma[0]
        for S in (S_u, S_d):
            torch.testing.assert_close(S, torch.diag(sigma), rtol=0, atol=2 * ridge)
        assert (S_u.diagonal().diff() <= 2 * ridge).all()
        # and before it they were neither diagonal nor equal
        assert (factors(other, before)[0] - torch.diag(sigma)).abs().max() > 0.05 * sigma[0]


@pytest.mark.parametrize("sides", ["kfac", "paper"])
@pytest.mark.parametrize("rule", RULES)
def test_the_first_moment_is_carried(rule, sides):
    """In original coordinates the first moment of ∇A becomes T⁻ᵀ m, that of ∇Bᵀ becomes T m."""
    _, optimizer, _, other = stepped(update=rule, sides=sides)

    def original(o, p, rank_first):
        m = rank_first(o.state[p]["exp_avg"])
        if rule in ("momentum", "polar"):
            return m
        M = o.state[p][KEYS[rule]]
        return M @ m if KEYS[rule] == "basis" else torch.linalg.solve(M, m)

    for pair, before in zip(optimizer.pairs[:3], other.pairs, strict=False):
        T = gauge(pair, before)
        assert torch.linalg.cond(T) > 1.5
        expected_A = torch.linalg.inv(T).T @ original(other, before.A, lambda m: m)
        expected_B = T @ original(other, before.B, lambda m: m.T)
        # inverses of T and of the matrices, each of a condition of at most 1e3 or so
        for got, expected in (
            (original(optimizer, pair.A, lambda m: m), expected_A),
            (original(optimizer, pair.B, lambda m: m.T), expected_B),
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-8 * expected.abs().max().item())
        for p, q in ((pair.A, before.A), (pair.B, before.B)):
            assert (
                optimizer.state[p]["step"] == other.state[q]["step"] and (optimizer.state[p]["exp_avg_sq"] >= 0).all()
            )


def test_second_moments_go_by_squared_entries():
    _, optimizer, _, other = stepped(update="momentum")  # whose moments live in original coordinates
    for pair, before in zip(optimizer.pairs[:3], other.pairs, strict=False):
        T = gauge(pair, before)
        expected_A = torch.linalg.inv(T).T.square() @ other.state[before.A]["exp_avg_sq"]
        expected_B = other.state[before.B]["exp_avg_sq"] @ T.square().T
        torch.testing.assert_close(optimizer.state[pair.A]["exp_avg_sq"], expected_A, rtol=1e-8, atol=0)
        torch.testing.assert_close(optimizer.state[pair.B]["exp_avg_sq"], expected_B, rtol=1e-8, atol=0)


def test_with_an_empty_factor_nothing_happens():
    model = models.mlp(start="zero", **WIDE)
    optimizer = rank_side(model, lr=0.0, reproject_every=1, rank_threshold=0.9, min_rank=1)
    before = models.snapshot(model)
    models.fit(model, optimizer, 3)  # with lr = 0, B stays zero and so does S_d
    models.assert_same(models.snapshot(model), before)
    assert set(optimizer.ranks().values()) == {6, 5}


def test_a_pair_with_a_frozen_factor_keeps_its_basis():
    model, twin = models.mlp(**WIDE), models.mlp(**WIDE)
    for m in (model, twin):
        m.first.lora_A.weight.requires_grad_(False)
    frozen = model.first.lora_A.weight.detach().clone()
    models.fit(model, optimizer := rank_side(model, lr=1e-2, reproject_every=2, rank_threshold=0.8, min_rank=1), 2)
    models.fit(twin, rank_side(twin, lr=1e-2), 2)
    assert torch.equal(model.first.lora_A.weight, frozen)
    torch.testing.assert_close(model.first.lora_B.weight, twin.first.lora_B.weight, rtol=1e-12, atol=1e-14)
    models.fit(model, optimizer, 8, 2)
    assert optimizer.ranks()["first"] == 6 and torch.equal(model.first.lora_A.weight, frozen)


def test_reprojection_none_is_never():
    model, twin = models.mlp(), models.mlp()
    optimizer = rank_side(model, lr=1e-2, reprojection=None, reproject_every=2, rank_threshold=0.5, min_rank=1)
    other = rank_side(twin, lr=1e-2)
    models.fit(model, optimizer, 6)
    models.fit(twin, other, 6)
    models.assert_near(models.snapshot(model), models.snapshot(twin), rtol=1e-12, atol=1e-14)
    assert optimizer.ranks() == other.ranks()


# ---------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize("mode", ["balanced", "paper", "paper-one-sided"])
def test_a_skipped_step_does_not_reproject(mode):
    model = models.mlp(**WIDE)
    optimizer = rank_side(model, lr=1e-2, reprojection=mode, reproject_every=4, rank_threshold=0.7, min_rank=1)
    models.fit(model, optimizer, 3)
    optimizer.zero_grad()
    models.loss(model, 3).backward()
    model.head.bias.grad[0] = torch.inf
    before = models.snapshot(model, optimizer)
    optimizer.step()  # the fourth
    models.assert_same(models.snapshot(model, optimizer), before, ignore=("skipped", "cadence"))
    models.fit(model, optimizer, 4, 4)
    assert models.differences(models.snapshot(model), before)


def test_not_during_warmup():
    model, twin = models.mlp(**WIDE), models.mlp(**WIDE)
    models.fit(model, rank_side(model, lr=1e-2, warmup_steps=6, reproject_every=2), 6)
    models.fit(twin, rank_side(twin, lr=1e-2, warmup_steps=6), 6)
    models.assert_same(models.snapshot(model), models.snapshot(twin))


def test_pairs_whose_A_and_B_are_in_different_groups_are_reprojected_too():
    model = models.mlp(**WIDE)
    A, B = ([p for n, p in model.named_parameters() if side in n] for side in ("lora_A", "lora_B"))
    optimizer = rank_side([{"params": A}, {"params": B, "lr": 4e-2}], lr=1e-2, model=model, reproject_every=3,
                         rank_threshold=0.7, min_rank=1)  # fmt: skip
    models.fit(model, optimizer, 12)
    assert masked_are_zero(optimizer) > 0
    for pair in optimizer.pairs[:3]:
        S_u, S_d = factors(optimizer, pair)
        k = optimizer.ranks()[pair.name]
        S_d = S_d * S_u.trace() / S_d.trace()  # equal up to the scale of the loss
        torch.testing.assert_close(S_u[:k, :k], S_d[:k, :k], rtol=0, atol=1e-2 * S_u.max().item())
