"""Ranks in a running GritKFAC: which directions go, that they stay exactly zero, and what the cut costs."""

import models
import oracles
import pytest
import torch
from grit_kit import RULES, WIDE, cut, delta, factors, fork, masked_are_zero, rank_side


def asked_rank(S_u, S_d, tau, least, k) -> tuple[int, bool]:
    """What the energy rule asks for on the live block, and whether the last live direction is a heavy one."""
    energy = oracles.hankel(S_u[:k, :k], S_d[:k, :k]).square()
    kept = next(n for n in range(1, k + 1) if energy[:n].sum() >= tau * energy.sum() or n == k)
    return min(max(kept, least), k), bool(energy[k - 1] > 2 * (1 - tau) * energy.sum())


@pytest.mark.parametrize(("tau", "least"), [(0.8, 1), (0.95, 2), (0.8, 4)])
def test_ranks_follow_the_rule_with_its_hysteresis(tau, least):
    fresh = lambda: models.mlp(**WIDE)  # noqa: E731
    model = fresh()
    optimizer = rank_side(model, lr=2e-2, reproject_every=3, rank_threshold=tau, min_rank=least, factor_decay=0.6)
    k = {pair.name: pair.rank for pair in optimizer.pairs[:3]}
    full, pending = dict(k), dict.fromkeys(k, 0)
    history = [dict(k)]
    for i in range(30):
        due = i % 3 == 2
        if due:
            twin, other = fork(model, optimizer, fresh(), reproject_every=0)
            models.fit(twin, other, 1, i)
        models.fit(model, optimizer, 1, i)
        if due:
            for pair in other.pairs[:3]:
                name = pair.name
                asked, heavy = asked_rank(*factors(other, pair), tau, least, k[name])
                if asked < k[name] and pending[name]:
                    k[name], pending[name] = max(asked, pending[name]), 0
                elif asked < k[name]:
                    pending[name] = asked
                else:
                    pending[name] = 0
                    k[name] += heavy and k[name] < full[name]
            history.append(dict(k))
        assert {name: optimizer.ranks()[name] for name in k} == k, i
    first_check = history[1]
    assert first_check == full  # one ask alone cuts nothing
    assert min(min(h.values()) for h in history) >= least
    assert any(k[name] < full[name] for name in k)
    assert optimizer.ranks()["idle"] == 6  # never trained, never judged


@pytest.mark.parametrize("statistics", ["activation", "gradient", "weight"])
@pytest.mark.parametrize("rule", RULES)
def test_masked_directions_stay_exactly_zero(rule, statistics):
    model, optimizer = cut(rule, statistics=statistics)
    dead = masked_are_zero(optimizer)
    assert dead > 0
    models.fit(model, optimizer, 6, 12)
    assert masked_are_zero(optimizer) == dead


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masked_directions_stay_exactly_zero_in_other_dtypes(dtype):
    # parameters outside pairs are torch's AdamW in their own dtype, where fp16 rounds a small ε to zero
    model, optimizer = cut(dtype=dtype)
    assert optimizer.diagnostics()["skipped_updates"] == 0
    dead = masked_are_zero(optimizer)
    assert dead > 0
    models.fit(model, optimizer, 6, 12)
    assert masked_are_zero(optimizer) == dead


def test_truncation_costs_what_the_rule_says():
    """The cut itself moves B A by directions that hold at most 1 − τ of the energy."""
    model = models.mlp(**WIDE)
    optimizer = rank_side(model, lr=1e-2, reproject_every=3, rank_threshold=0.8, min_rank=1)
    models.fit(model, optimizer, 5)
    twin, other = fork(model, optimizer, models.mlp(**WIDE), reproject_every=0)
    models.fit(model, optimizer, 1, 5)
    models.fit(twin, other, 1, 5)
    judged = 0
    for pair, before in zip(optimizer.pairs[:3], other.pairs, strict=False):
        k = optimizer.ranks()[pair.name]
        if k < pair.rank:
            S_u, S_d = factors(other, before)
            core = torch.linalg.pinv(before.B.detach()) @ delta(pair) @ torch.linalg.pinv(before.A.detach())
            least = oracles.eckart_young(k, S_u, S_d)
            # the optimum of its rank, up to the regularisation of both factors
            assert oracles.rise(core, S_u, S_d) == pytest.approx(least, rel=1e-3)
            judged += 1
    assert judged > 0
