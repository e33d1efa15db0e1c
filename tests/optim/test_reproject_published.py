"""Reprojection as published: projections of A and B onto leading eigenvectors, in tensors that keep their shape."""

import models
import pytest
import torch
from grit_kit import WIDE, factors, stepped
from torch import Tensor

from curvopt import GritKFAC


def projector(S: Tensor, k: int) -> Tensor:
    V = torch.linalg.eigh(S)[1].flip(-1)[:, :k]
    return V @ V.T


def paper_rank(S_u: Tensor, tau: float | None, least: int) -> int:
    if tau is None:
        return len(S_u)
    values = torch.linalg.eigvalsh(S_u).flip(-1)
    return min(max(next(k for k in range(1, len(S_u) + 1) if values[:k].sum() >= tau * values.sum()), least), len(S_u))


@pytest.mark.parametrize("tau", [None, 0.7, 0.9])
@pytest.mark.parametrize("mode", ["paper", "paper-one-sided"])
@pytest.mark.parametrize("begin", [2, 5])
@pytest.mark.parametrize("sides", ["kfac", "paper"])
def test_published_projections(mode, tau, begin, sides):
    """A ← V_a V_aᵀ A and B ← B V_g V_gᵀ; V_g is V_a in the one-sided form and below 64 rows (18 per batch)."""
    _, optimizer, _, other = stepped(begin=begin, reprojection=mode, rank_threshold=tau, sides=sides)
    for pair, before in zip(optimizer.pairs[:3], other.pairs, strict=False):
        S_u, S_d = factors(other, before)
        k = paper_rank(S_u, tau, 1)
        P_a = projector(S_u, k)
        P_g = projector(S_d, k) if mode == "paper" and begin == 5 else P_a
        # eigenvectors of float64 factors, with relative gaps above 1e-3
        torch.testing.assert_close(pair.A.detach(), P_a @ before.A.detach(), rtol=0, atol=1e-11)
        torch.testing.assert_close(pair.B.detach(), before.B.detach() @ P_g, rtol=0, atol=1e-11)
        assert pair.A.shape == before.A.shape and optimizer.ranks()[pair.name] == pair.rank
        assert optimizer.diagnostics()["pairs"][pair.name]["kept"] == [k]
        for p, q in ((pair.A, before.A), (pair.B, before.B)):
            for key in ("exp_avg", "exp_avg_sq", "factor"):
                assert torch.equal(optimizer.state[p][key], other.state[q][key])
        assert torch.linalg.matrix_rank(pair.A) == k


def test_published_projections_never_shrink_a_tensor():
    model = models.mlp(**WIDE)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    optimizer = GritKFAC.paper(
        model, 1e-2, factor_every=1, inverse_every=2, reproject_every=2, rank_threshold=0.6, min_rank=1
    )
    models.fit(model, optimizer, 8)
    assert set(optimizer.ranks().values()) == {6, 5}
    assert optimizer.compact() == optimizer.ranks()
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
