"""Weights put back from outside: training goes on from what the module holds, and what is cut is exactly zero."""

import copy

import pytest
import torch
from situations_kit import X, build, loss, steps

from curvopt import GritKFAC, MatryoshkaScaledAdam

WAYS = {
    "load_state_dict": lambda model, saved: model.load_state_dict(saved),
    "copy_ to .data": lambda model, saved: [p.data.copy_(saved[n]) for n, p in model.named_parameters()],
    "new .data": lambda model, saved: [setattr(p, "data", saved[n].clone()) for n, p in model.named_parameters()],
}
ways = pytest.mark.parametrize("way", WAYS)


@ways
@pytest.mark.parametrize("scale", ["none", "rank", "sqrt"])
def test_dylora_goes_on_from_what_the_module_holds(way, scale):
    model = build()
    optimizer = MatryoshkaScaledAdam(model, lr=1e-2, nesting="dylora", scale=scale)
    ranks = {}
    for _ in range(12):  # snapshots at every rank, among them those that are not the present one
        steps(model, optimizer)
        A = optimizer.pairs[0].A
        ranks[int(A.detach().any(1).sum())] = copy.deepcopy(model.state_dict())
    assert set(ranks) == {1, 2, 4}
    optimizer.param_groups[0]["lr"] = 0.0
    for rank, saved in ranks.items():
        WAYS[way](model, saved)
        before = model(X).detach()
        steps(model, optimizer)
        with optimizer.truncated(rank):
            # Q and 1/Q are rounded once each
            torch.testing.assert_close(model(X), before, rtol=0, atol=1e-14)


def test_dylora_rows_that_are_not_held_stay():
    model = build()
    optimizer = MatryoshkaScaledAdam(model, lr=0.0, nesting="dylora", ranks=[2, 4])
    steps(model, optimizer)
    pair = optimizer.pairs[0]
    while int(pair.A.detach().any(1).sum()) != 2:
        steps(model, optimizer)
    before = optimizer.state[pair.A]["full"].clone()
    with torch.no_grad():
        pair.A.mul_(0.5)  # a norm constraint on what the module holds
    steps(model, optimizer)
    full = optimizer.state[pair.A]["full"]
    torch.testing.assert_close(full[:2], before[:2] / 2, rtol=1e-15, atol=0)
    assert torch.equal(full[2:], before[2:])


def masked():
    model = build(0.3)
    optimizer = GritKFAC(model, lr=1e-3, reproject_every=2, rank_threshold=0.5, min_rank=1, inverse_every=2)
    saved = copy.deepcopy(model.state_dict())
    for _ in range(30):
        steps(model, optimizer, 2)
        if min(optimizer.ranks().values()) < 4:
            return model, optimizer, saved
    raise AssertionError("no rank went down")


@ways
@pytest.mark.parametrize("inference", [False, True])
def test_compact_cuts_nothing_that_is_not_zero(way, inference):
    model, optimizer, saved = masked()
    WAYS[way](model, saved)
    before = loss(model).item()
    with torch.inference_mode(inference):
        ranks = optimizer.compact()
    assert set(ranks.values()) == {4} and optimizer.ranks() == ranks
    assert loss(model).item() == before


@ways
def test_a_reprojection_takes_the_directions_back(way):
    """Masks of before would zero directions in use; with a threshold of 1 everything stays."""
    model, optimizer, saved = masked()
    WAYS[way](model, saved)
    optimizer.param_groups[0].update(lr=0.0, rank_threshold=1.0, reproject_every=1, factor_decay=0.0)
    before = model(X).detach()
    steps(model, optimizer, 3)
    # rounding times the condition of T, at most 1e4
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-10)
    assert set(optimizer.ranks().values()) == {4}


def test_control_masks_that_weights_bear_out_are_cut():
    model, optimizer, _ = masked()
    ranks, before = optimizer.ranks(), model(X).detach()
    assert optimizer.compact() == ranks and min(ranks.values()) < 4
    # the same sums without the zeros, in another order
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-14)


def test_training_goes_on_after_compacting_in_inference_mode():
    model, optimizer, _ = masked()
    with torch.inference_mode():
        optimizer.compact()
    assert not any(p.is_inference() for p in model.parameters())
    steps(model, optimizer, 3)
