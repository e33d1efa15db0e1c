"""A side that was frozen for a while counts its steps otherwise than its partner; the pair still changes its basis."""

import pytest
import torch
from situations_kit import build, steps

from curvopt import GritKFAC, MatryoshkaScaledAdam


def thawed(make, frozen, then=40, side="A"):
    """Train with one side of each pair frozen in the first steps, or idle in between."""
    model = build()
    optimizer = make(model)
    sides = [getattr(pair, side) for pair in optimizer.pairs]
    for p in sides:
        p.requires_grad_(False)
    steps(model, optimizer, frozen)
    for p in sides:
        p.requires_grad_(True)
    steps(model, optimizer, then)
    return optimizer


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("frozen", [5, 7])
@pytest.mark.parametrize("more", [{}, {"statistics": "activation"}, {"update": "eigen", "warmup_steps": 3}])
def test_ranks_follow_the_spectrum(side, frozen, more):
    def make(model):
        return GritKFAC(model, lr=1e-2, reproject_every=5, rank_threshold=0.6, min_rank=1, **more)

    optimizer = thawed(make, frozen, side=side)
    assert max(optimizer.ranks().values()) < 4
    for pair in optimizer.pairs:
        count = {name: optimizer.state[getattr(pair, name)]["cadence"][0].item() for name in "AB"}
        assert abs(count["A"] - count["B"]) == frozen
        k = optimizer.ranks()[pair.name]
        assert not pair.A[k:].any() and not pair.B[:, k:].any()


@pytest.mark.parametrize("frozen", [10, 7])
@pytest.mark.parametrize(
    "make",
    [
        lambda model: GritKFAC(model, lr=1e-2, nested_ranks=[1, 2, 4]),
        lambda model: MatryoshkaScaledAdam(model, lr=1e-2, nesting="stratified"),
    ],
    ids=["GritKFAC", "stratified"],
)
def test_directions_are_sorted(make, frozen):
    """After a step that sorts, A Aᵀ and BᵀB are one diagonal up to a scalar, in descending order.

    To 1e-6: the gauge is that of factors regularised by a millionth of their mean eigenvalue.
    """
    optimizer = thawed(make, frozen, then=40 - frozen)  # B, or both, has taken forty steps: they sort every ten
    for pair in optimizer.pairs:
        G, H = pair.A @ pair.A.T, pair.B.T @ pair.B
        for X in (G, H):
            d = X.diagonal()
            assert (X - d.diag()).abs().max() < 1e-6 * d.max() and (d[:-1] >= d[1:]).all()
        torch.testing.assert_close(G / G.trace(), H / H.trace(), rtol=1e-5, atol=1e-6)


def test_others_keep_to_their_own_steps():
    """The cadence of a pair that was never frozen does not change by another that was."""
    model, twin = build(), build()
    both = [GritKFAC(m, lr=1e-2, reproject_every=5, rank_threshold=0.9, min_rank=1) for m in (model, twin)]
    both[0].pairs[1].A.requires_grad_(False)
    for i in range(1, 16):
        for m, optimizer in zip((model, twin), both, strict=True):
            before = optimizer.pairs[0].A.detach().clone()
            optimizer.param_groups[0]["lr"] = 0.0
            steps(m, optimizer)
            assert torch.equal(before, optimizer.pairs[0].A) is (i % 5 != 0), i
        if i == 7:
            both[0].pairs[1].A.requires_grad_(True)


def test_what_shares_a_bucket_with_a_turning_side_keeps_its_matrices():
    """Both A were frozen for two steps, the B of the second pair for one: it turns in other steps than the first."""
    model = build()
    optimizer = GritKFAC(
        model, lr=1e-2, update="eigen", statistics="activation", inverse_every=1000, factor_every=1, reproject_every=5
    )
    first, second = optimizer.pairs
    for i in range(1, 16):
        for p, from_step in ((first.A, 3), (second.A, 3), (second.B, 2)):
            p.requires_grad_(i >= from_step)
        held = {p: optimizer.state[p]["basis"].clone() for p in (first.A, second.A) if "basis" in optimizer.state[p]}
        steps(model, optimizer)
        for p, before in held.items():
            turned = i > 3 and (i if p is first.A else i - 1) % 5 == 0
            assert torch.equal(optimizer.state[p]["basis"], before) is (not turned and i != 3), (i, p is first.A)
