"""What GritKFAC.factors() and outer_factors() return: the averages of explicit float64 products, as copies."""

import models
import oracles
import pytest
import torch
from grit_kit import EXACT, observed_backward, rank_side
from torch import nn

from curvopt import GritKFAC
from curvopt.functional.outer import cosine_rows, outer_map
from curvopt.functional.update import RULES


@pytest.mark.parametrize("sides", ["kfac", "paper"])
def test_factors_are_the_averages_of_autograd_in_order_u_d(sides):
    model = models.mlp()
    optimizer = rank_side(model, lr=1e-2, sides=sides, factor_decay=0.9)
    assert optimizer.factors() == {}
    history = []
    for i in range(4):
        value, seen = observed_backward(model, i)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(seen)
    found = optimizer.factors()
    assert list(found) == ["first", "second", "third"]  # the fourth pair is idle
    for j, name in enumerate(found):
        S_u, S_d = found[name]
        torch.testing.assert_close(S_u, oracles.average([h[j][0] for h in history], 0.9), **EXACT)
        torch.testing.assert_close(S_d, oracles.average([h[j][1] for h in history], 0.9), **EXACT)
        assert not torch.allclose(S_u, S_d)  # a swap would be seen


def test_factors_are_copies():
    model, twin = models.mlp(), models.mlp()
    optimizer, other = (rank_side(m, lr=1e-2, update="eigen", outer_rank=2) for m in (model, twin))
    for m, o in ((model, optimizer), (twin, other)):
        models.fit(m, o, 2)
    for S in (S for pair in optimizer.factors().values() for S in pair):
        S.fill_(torch.nan)
    for outer in (F for pair in optimizer.outer_factors().values() for F in pair.values()):
        outer.basis.fill_(torch.nan), outer.eigenvalues.fill_(torch.nan), outer.rest.fill_(torch.nan)
    for m, o in ((model, optimizer), (twin, other)):
        models.fit(m, o, 2, 2)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


def test_a_frozen_side_has_no_factor():
    """S_d preconditions A alone and S_u B alone; what no trained side reads is not kept."""
    model = models.mlp()
    model.first.lora_A.weight.requires_grad_(False)
    model.second.lora_B.weight.requires_grad_(False)
    optimizer = rank_side(model, lr=1e-2)
    models.fit(model, optimizer, 2)
    found = optimizer.factors()
    assert found["first"].S_d is None and found["first"].S_u is not None
    assert found["second"].S_u is None and found["second"].S_d is not None


@pytest.mark.parametrize("rule", RULES)
def test_the_default_keeps_rank_side_factors_only_where_they_are_read(rule):
    model = models.mlp()
    optimizer = GritKFAC(model, lr=1e-2, update=rule)
    models.fit(model, optimizer, 2)
    assert (optimizer.factors() == {}) == (rule == "polar")
    assert optimizer.outer_factors().keys() == {"first", "second", "third"}


def by_gradients(seen: list[torch.Tensor], k: int, decay: float, damping: float) -> tuple[torch.Tensor, ...]:
    """The recursion of functional.outer over gradients with the rank first, one at a time: V, μ and tr S."""
    r, d = seen[0].shape
    V, mu, trace = cosine_rows(k, d)[None], torch.zeros(1, k, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    width = torch.tensor([float(d)], dtype=torch.float64)
    for G in seen:
        both = torch.cat((G[None], V), 1)
        products = G[None] @ both.mT
        M, mu, trace = outer_map(products, mu, trace, width, decay, damping, torch.tensor(0.0))
        V = (M @ both)[:, r:]
    return V[0], mu[0], trace[0]


@pytest.mark.parametrize("k", [1, 3])
def test_outer_factors_are_those_of_the_gradients(k):
    model = models.mlp()
    optimizer = GritKFAC(model, lr=1e-2, outer_rank=k, factor_decay=0.8, damping=0.2)
    assert optimizer.outer_factors() == {}
    seen: dict[tuple[str, str], list[torch.Tensor]] = {}
    for i in range(5):
        optimizer.zero_grad()
        models.loss(model, i).backward()
        for pair in optimizer.pairs[:3]:
            seen.setdefault((pair.name, "A"), []).append(pair.A.grad.clone())
            seen.setdefault((pair.name, "B"), []).append(pair.B.grad.mT.clone())
        optimizer.step()
    found = optimizer.outer_factors()
    assert list(found) == ["first", "second", "third"]
    for (name, side), gradients in seen.items():
        outer = found[name][side]
        V, mu, trace = by_gradients(gradients, k, 0.8, 0.2)
        # the same recursion in another order of summation, five times
        torch.testing.assert_close(outer.basis, V, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(outer.eigenvalues, mu, rtol=1e-8, atol=0)
        r, d = gradients[0].shape
        S = torch.zeros(d, d, dtype=torch.float64)
        for G in gradients:
            S = 0.8 * S + 0.2 * G.mT @ G / r
        # whatever the basis, trace and mean are exact; ρ ≥ 0 because Σμ ≤ tr S
        torch.testing.assert_close(outer.dense().trace(), S.trace(), rtol=1e-9, atol=0)
        torch.testing.assert_close(mu.sum() + outer.rest * (d - k), trace, rtol=1e-9, atol=0)


def test_the_dense_outer_factor_of_a_standing_gradient_is_that_gradients():
    """lr = 0 and one batch: S has rank r, and k ≥ r directions converge to all of it."""
    model = models.mlp()
    optimizer = GritKFAC(model, lr=0.0, outer_rank=4, factor_decay=0.5, damping=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        models.loss(model, 0).backward()
        optimizer.step()
    for pair in optimizer.pairs[:3]:
        for side, G in (("A", pair.A.grad), ("B", pair.B.grad.mT)):
            assert pair.rank <= 4 < G.shape[1]
            S = G.mT @ G / pair.rank  # weights of the average sum to 1 − 2⁻²⁰⁰
            got = optimizer.outer_factors()[pair.name][side].dense()
            # block power iteration: what is left of the start shrinks geometrically with the shift λ tr S / d
            torch.testing.assert_close(got, S, rtol=0, atol=1e-6 * S.norm().item())


@pytest.mark.parametrize("r", [1, 2])
def test_convolutions_give_matrices(r):
    """A factor has the layout of the mathematics, (k, d), whatever the layout of the parameter."""
    torch.manual_seed(0)

    class ConvLora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Conv2d(3, 5, 3)
            self.lora_A = nn.Conv2d(3, r, 3, bias=False)
            self.lora_B = nn.Conv2d(r, 5, 1, bias=False)

        def forward(self, x):
            return self.base(x) + self.lora_B(self.lora_A(x))

    model = ConvLora().double()
    model.base.requires_grad_(False)
    optimizer = GritKFAC(model, lr=1e-2, outer_rank=4)
    model(torch.randn(2, 3, 6, 6, dtype=torch.float64)).square().mean().backward()
    A, B = (p.grad.clone() for p in (model.lora_A.weight, model.lora_B.weight))
    optimizer.step()
    ((_, found),) = optimizer.outer_factors().items()
    for side, G in (("A", A.flatten(1)), ("B", B.flatten(1).mT)):
        V, mu, _ = by_gradients([G], min(4, G.shape[1]), 0.95, 0.1)
        torch.testing.assert_close(found[side].basis, V, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found[side].eigenvalues, mu, rtol=1e-8, atol=1e-15)
