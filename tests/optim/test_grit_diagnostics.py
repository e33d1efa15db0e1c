"""GritKFAC's diagnostics by hand, and pairs that no hook sees: named, warned about, trained with AdamW."""

import warnings

import models
import oracles
import pytest
import torch
from grit_kit import BASES, RULES, factors, rank_side
from torch import nn


@pytest.mark.parametrize("rule", RULES)
def test_diagnostics_by_hand(rule):
    model = models.mlp()
    optimizer = rank_side(model, lr=1e-2, update=rule, damping=0.3)
    models.fit(model, optimizer, 3)
    found = optimizer.diagnostics()
    assert found["steps"] == 3 and found["skipped_updates"] == 0 and found["backend"] == "auto"
    assert (
        found["idle"] == ["idle"] and found["silent"] == [] and list(found["pairs"])[:3] == ["first", "second", "third"]
    )
    for pair in optimizer.pairs[:3]:
        d, r = found["pairs"][pair.name], pair.rank
        S_u, S_d = factors(optimizer, pair)
        assert d["rank"] == d["full_rank"] == r and d["rows"] == 3 * 18
        for side, S in (("A", S_d), ("B", S_u)):
            values = torch.linalg.eigvalsh(S * r / S.trace())
            damped = values + 0.3
            assert d[side]["condition"] == pytest.approx((damped[-1] / damped[0]).item(), rel=1e-9)
            M = values if rule in (*BASES, "polar") else damped**-0.5 if rule == "whiten" else 1 / damped
            M = torch.diag(M)
            off = M - M.trace() / r * torch.eye(r, dtype=torch.float64)
            assert d[side]["scalar_distance"] == pytest.approx((off.norm() / M.norm()).item(), rel=1e-9, abs=1e-12)
            assert d[side]["failed"] is False
        shares = oracles.hankel(S_u, S_d).square()
        shares = shares / shares.sum()
        # the balanced basis regularises each factor by 1e-6 of its mean eigenvalue
        assert d["energy"] == pytest.approx(shares.tolist(), abs=1e-4)
        entropy = -(shares * shares.log()).sum()
        assert d["effective_rank"] == pytest.approx(entropy.exp().item(), rel=1e-3)


def test_diagnostics_before_the_first_step_and_in_plain_types():
    model = models.mlp()
    optimizer = rank_side(model)
    found = optimizer.diagnostics()
    assert found["steps"] == 0 and len(found["idle"]) == 4 and found["silent"] == []
    models.fit(model, optimizer, 2)

    def plain(x):
        if isinstance(x, dict):
            return all(isinstance(k, str) and plain(v) for k, v in x.items())
        return all(map(plain, x)) if isinstance(x, (list, tuple)) else isinstance(x, (str, int, float))

    assert plain(optimizer.diagnostics())


def test_a_hook_that_never_fires_is_named_and_warned_about_once():
    model = models.mlp()
    model.second.bypass = True
    optimizer = rank_side(model, lr=1e-2)
    with pytest.warns(UserWarning, match=r"1 pairs .*second") as caught:
        models.fit(model, optimizer, 5)
    assert len(caught) == 1
    assert optimizer.diagnostics()["silent"] == ["second"]
    twin = models.mlp()
    twin.second.bypass = True
    plain = rank_side(twin, lr=1e-2, statistics="gradient")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.fit(twin, plain, 3)
    assert plain.diagnostics()["silent"] == []


def test_an_unseen_pair_gets_plain_adamw():
    model = models.mlp(torch.float32)
    model.second.bypass = True
    optimizer = rank_side(model, lr=1e-2, update="eigen")
    copies = {p: nn.Parameter(p.detach().clone()) for p in (model.second.lora_A.weight, model.second.lora_B.weight)}
    adamw = torch.optim.AdamW(copies.values(), lr=1e-2, weight_decay=0.0, fused=True)
    with pytest.warns(UserWarning, match="never seen"):
        for i in range(4):
            models.fit(model, optimizer, 1, i)
            for p, q in copies.items():
                q.grad = p.grad.clone()
            adamw.step()
    assert all(torch.equal(p, q) for p, q in copies.items())


def test_a_model_in_which_no_hook_fires_trains_with_adamw():
    model = models.mlp()
    for layer in model.layers:
        layer.bypass = True
    optimizer = rank_side(model, lr=1e-2)
    with pytest.warns(UserWarning, match="3 pairs"):
        models.fit(model, optimizer, 3)
    assert optimizer.diagnostics()["silent"] == ["first", "second", "third"]
