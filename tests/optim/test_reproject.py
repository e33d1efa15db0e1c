"""Reprojection in a running GritKFAC: what stays, what becomes diagonal, which directions go and stay gone."""

import copy

import models
import oracles
import pytest
import torch
from torch import Tensor

from curvopt import GritKFAC
from curvopt.lora import find_lora_pairs

RULES = ("polar", "eigen", "adam", "whiten", "momentum")
KEYS = {"polar": "basis", "eigen": "basis", "adam": "inverse", "whiten": "root", "momentum": "inverse"}
WIDE = {"width": 12, "r": 6}


def factors(optimizer, pair) -> tuple[Tensor, Tensor]:
    """(S_u, S_d) whichever side keeps which."""
    a, b = (optimizer.state[p]["factor"].clone() for p in (pair.A, pair.B))
    return (b, a) if optimizer.param_groups[0]["sides"] == "kfac" else (a, b)


def fork(model, optimizer, fresh, **edits):
    """Return (model, optimizer) that stand where these stand, with some settings changed from here on."""
    twin = models.copied_into(model, fresh)
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "clock", "param_names")}
    other = GritKFAC(twin, **settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.param_groups[0].update(edits)
    return twin, other


def stepped(dtype=torch.float64, begin=3, **settings):
    """Train to just before a reprojection, then take that step with and without it: the two ends of one step."""
    model = models.mlp(dtype, **WIDE)
    optimizer = GritKFAC(model, lr=1e-2, inverse_every=2, min_rank=1, **settings)
    models.fit(model, optimizer, begin)
    twin, other = fork(model, optimizer, models.mlp(dtype, **WIDE))
    optimizer.param_groups[0]["reproject_every"] = begin + 1
    models.fit(model, optimizer, 1, begin)
    models.fit(twin, other, 1, begin)
    return model, optimizer, twin, other


def delta(pair) -> Tensor:
    return pair.B.detach() @ pair.A.detach()


def gauge(pair, before) -> Tensor:
    """T with A = T A_before, by least squares: A_before has full row rank."""
    return pair.A.detach() @ torch.linalg.pinv(before.A.detach())


# ---------------------------------------------------------------------------------------------- balanced, full rank


@pytest.mark.parametrize("sides", ["kfac", "paper"])
@pytest.mark.parametrize("rule", RULES)
def test_outputs_do_not_change(rule, sides):
    model = models.mlp(**WIDE)
    optimizer = GritKFAC(model, lr=1e-2, update=rule, sides=sides, inverse_every=2)
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
        m, M = rank_first(o.state[p]["exp_avg"]), o.state[p][KEYS[rule]]
        if KEYS[rule] == "basis":
            return M @ m
        return m if rule == "momentum" else torch.linalg.solve(M, m)

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


@pytest.mark.parametrize("start", ["zero"])
def test_with_an_empty_factor_nothing_happens(start):
    model = models.mlp(start=start, **WIDE)
    optimizer = GritKFAC(model, lr=0.0, reproject_every=1, rank_threshold=0.9, min_rank=1)
    before = models.snapshot(model)
    models.fit(model, optimizer, 3)  # with lr = 0, B stays zero and so does S_d
    models.assert_same(models.snapshot(model), before)
    assert set(optimizer.ranks().values()) == {6, 5}


def test_a_pair_with_a_frozen_factor_keeps_its_basis():
    model, twin = models.mlp(**WIDE), models.mlp(**WIDE)
    for m in (model, twin):
        m.first.lora_A.weight.requires_grad_(False)
    frozen = model.first.lora_A.weight.detach().clone()
    models.fit(model, optimizer := GritKFAC(model, lr=1e-2, reproject_every=2, rank_threshold=0.8, min_rank=1), 2)
    models.fit(twin, GritKFAC(twin, lr=1e-2), 2)
    assert torch.equal(model.first.lora_A.weight, frozen)
    torch.testing.assert_close(model.first.lora_B.weight, twin.first.lora_B.weight, rtol=1e-12, atol=1e-14)
    models.fit(model, optimizer, 8, 2)
    assert optimizer.ranks()["first"] == 6 and torch.equal(model.first.lora_A.weight, frozen)


def test_reprojection_none_is_never():
    model, twin = models.mlp(), models.mlp()
    optimizer = GritKFAC(model, lr=1e-2, reprojection=None, reproject_every=2, rank_threshold=0.5, min_rank=1)
    other = GritKFAC(twin, lr=1e-2)
    models.fit(model, optimizer, 6)
    models.fit(twin, other, 6)
    models.assert_near(models.snapshot(model), models.snapshot(twin), rtol=1e-12, atol=1e-14)
    assert optimizer.ranks() == other.ranks()


# ---------------------------------------------------------------------------------------------- the rank


def asked_rank(S_u, S_d, tau, least, k) -> tuple[int, bool]:
    """What the energy rule asks for on the live block, and whether the last live direction is a heavy one."""
    energy = oracles.hankel(S_u[:k, :k], S_d[:k, :k]).square()
    kept = next(n for n in range(1, k + 1) if energy[:n].sum() >= tau * energy.sum() or n == k)
    return min(max(kept, least), k), bool(energy[k - 1] > 2 * (1 - tau) * energy.sum())


@pytest.mark.parametrize(("tau", "least"), [(0.8, 1), (0.95, 2), (0.8, 4)])
def test_ranks_follow_the_rule_with_its_hysteresis(tau, least):
    fresh = lambda: models.mlp(**WIDE)  # noqa: E731
    model = fresh()
    optimizer = GritKFAC(model, lr=2e-2, reproject_every=3, rank_threshold=tau, min_rank=least, factor_decay=0.6)
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
    assert any(k[name] < full[name] for name in k) or least > 3
    assert optimizer.ranks()["idle"] == 6  # never trained, never judged


def masked_are_zero(optimizer) -> int:
    """Assert that dead rows, columns and moments are exactly zero; return how many directions are dead."""
    dead = 0
    for pair in optimizer.pairs[:3]:
        k = optimizer.ranks()[pair.name]
        dead += pair.rank - k
        for X in (pair.A, *(optimizer.state[pair.A][key] for key in ("exp_avg", "exp_avg_sq"))):
            assert (X[k:] == 0).all() and (X[:k] != 0).any()
        for X in (pair.B, *(optimizer.state[pair.B][key] for key in ("exp_avg", "exp_avg_sq"))):
            assert (X[:, k:] == 0).all() and (X[:, :k] != 0).any()
        for p in (pair.A, pair.B):
            S = optimizer.state[p]["factor"]
            assert (S[k:] == 0).all() and (S[:, k:] == 0).all()
    return dead


def cut(rule="eigen", dtype=torch.float64, steps=12, build=models.mlp, **settings):
    """A model of which directions have been masked, and its optimizer; from here on ranks stay."""
    model = build(dtype, **WIDE) if build is models.mlp else build(dtype)
    settings = {"reproject_every": 3, "rank_threshold": 0.7, "min_rank": 1, "weight_decay": 0.1, **settings}
    optimizer = GritKFAC(model, lr=1e-2, update=rule, inverse_every=2, **settings)
    models.fit(model, optimizer, steps)
    optimizer.param_groups[0]["reproject_every"] = 0
    return model, optimizer


@pytest.mark.parametrize("statistics", ["activation", "gradient", "weight"])
@pytest.mark.parametrize("rule", RULES)
def test_masked_directions_stay_exactly_zero(rule, statistics):
    model, optimizer = cut(rule, statistics=statistics)
    dead = masked_are_zero(optimizer)
    assert dead > 0
    models.fit(model, optimizer, 6, 12)
    assert masked_are_zero(optimizer) == dead


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_masked_directions_stay_exactly_zero_in_other_dtypes(dtype):
    # parameters outside pairs are torch's AdamW in their own dtype, where fp16 rounds a small ε to zero
    model, optimizer = cut(dtype=dtype, eps=1e-3 if dtype == torch.float16 else 1e-8)
    assert optimizer.diagnostics()["skipped_updates"] == 0
    assert masked_are_zero(optimizer) > 0
    models.fit(model, optimizer, 6, 12)
    masked_are_zero(optimizer)


def test_truncation_costs_what_the_rule_says():
    """The cut itself moves B A by directions that hold at most 1 − τ of the energy."""
    model = models.mlp(**WIDE)
    optimizer = GritKFAC(model, lr=1e-2, reproject_every=3, rank_threshold=0.8, min_rank=1)
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


# ---------------------------------------------------------------------------------------------- compact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compact_leaves_outputs_and_shrinks_everything(dtype):
    model, optimizer = cut(dtype=dtype)
    live = optimizer.ranks()
    x, _ = models.batch(model, 77)
    with torch.no_grad():
        before = model(x)
    full = {pair.name: (pair.scaling, pair.A.detach().clone(), pair.B.detach().clone()) for pair in optimizer.pairs}
    assert optimizer.compact() == live == optimizer.ranks()
    with torch.no_grad():
        # what was cut is exactly zero; shorter products are summed by other kernels, which round in another order
        torch.testing.assert_close(model(x), before, rtol=0, atol=10 * oracles.EPS[dtype])
    assert any(k < 5 for k in live.values())
    for pair in optimizer.pairs:
        k, (scaling, A, B) = live[pair.name], full[pair.name]
        assert pair.rank == k and pair.scaling == scaling
        assert torch.equal(pair.A, A[:k]) and torch.equal(pair.B, B[:, :k])
        assert (A[k:] == 0).all() and (B[:, k:] == 0).all()
        for p in (pair.A, pair.B):
            for key, value in optimizer.state[p].items() if p in optimizer.state else ():
                assert value.ndim == 0 or value.shape in (p.shape, (k, k)), key
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert {p for pair in optimizer.pairs for p in (pair.A, pair.B)} <= held
    assert set(optimizer.state) <= held
    assert optimizer.compact() == live  # nothing left to cut


@pytest.mark.parametrize("statistics", ["activation", "gradient", "weight"])
@pytest.mark.parametrize("rule", RULES)
def test_training_on_after_compact_is_training_on_masked(rule, statistics):
    model, optimizer = cut(rule, statistics=statistics)
    twin, other = fork(model, optimizer, models.mlp(**WIDE))
    optimizer.compact()
    models.fit(model, optimizer, 6, 12)
    models.fit(twin, other, 6, 12)
    x, _ = models.batch(model, 77)
    with torch.no_grad():
        # shorter sums are summed in another order: 1e-16 through six steps of Adam
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-9)
    for pair, full in zip(optimizer.pairs[:3], other.pairs, strict=False):
        torch.testing.assert_close(pair.A, full.A[: pair.rank], rtol=0, atol=1e-9)
        torch.testing.assert_close(pair.B, full.B[:, : pair.rank], rtol=0, atol=1e-9)


def test_compact_while_an_old_graph_is_alive():
    model, optimizer = cut()
    value = models.loss(model, 12)
    optimizer.compact()
    models.fit(model, optimizer, 2, 12)
    del value
    models.fit(model, optimizer, 1, 14)


def test_after_compact_reprojection_and_further_cuts_go_on():
    model, optimizer = cut()
    optimizer.compact()
    before = optimizer.ranks()
    optimizer.param_groups[0].update(reproject_every=2, rank_threshold=0.5)
    models.fit(model, optimizer, 8, 12)
    after = optimizer.ranks()
    assert all(after[name] <= before[name] for name in before) and after != before
    optimizer.compact()
    assert {pair.name: pair.rank for pair in optimizer.pairs} == optimizer.ranks()


def test_a_compacted_optimizer_resumes():
    model, optimizer = cut()
    optimizer.compact()
    saved = models.round_trip(optimizer.state_dict())
    models.fit(model, optimizer, 3, 12)
    twin, other = cut()
    other.compact()
    other.load_state_dict(saved)
    models.fit(twin, other, 3, 12)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_saves_and_loads_a_compacted_adapter(rslora, tmp_path):
    from peft import PeftModel

    model, optimizer = cut(
        dtype=torch.float32, build=lambda dtype: models.llama(dtype, r=6, start="random", use_rslora=rslora)
    )
    with torch.no_grad():
        before = model(models.llama_ids(5)).logits
    live = optimizer.compact()
    assert len(set(live.values())) > 1
    with torch.no_grad():
        after = model(models.llama_ids(5)).logits
    # rounding only, see above
    torch.testing.assert_close(after, before, rtol=0, atol=50 * oracles.EPS[torch.float32])
    for pair in optimizer.pairs:
        assert pair.module.r["default"] == pair.rank == live[pair.name]
    model.save_pretrained(tmp_path)
    base = models.llama(torch.float32, r=6).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(models.llama_ids(5)).logits, after)
    assert {pair.name: pair.rank for pair in find_lora_pairs(loaded)} == live


# ---------------------------------------------------------------------------------------------- as published


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


# ---------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize("mode", ["balanced", "paper", "paper-one-sided"])
def test_a_skipped_step_does_not_reproject(mode):
    model = models.mlp(**WIDE)
    optimizer = GritKFAC(model, lr=1e-2, reprojection=mode, reproject_every=4, rank_threshold=0.7, min_rank=1)
    models.fit(model, optimizer, 3)
    optimizer.zero_grad()
    models.loss(model, 3).backward()
    model.head.bias.grad[0] = torch.inf
    before = models.snapshot(model, optimizer)
    optimizer.step()  # the fourth
    models.assert_same(models.snapshot(model, optimizer), before, ignore=("skipped",))
    models.fit(model, optimizer, 4, 4)
    assert models.differences(models.snapshot(model), before)


def test_not_during_warmup():
    model, twin = models.mlp(**WIDE), models.mlp(**WIDE)
    models.fit(model, GritKFAC(model, lr=1e-2, warmup_steps=6, reproject_every=2), 6)
    models.fit(twin, GritKFAC(twin, lr=1e-2, warmup_steps=6), 6)
    models.assert_same(models.snapshot(model), models.snapshot(twin))


def test_pairs_whose_A_and_B_are_in_different_groups_are_reprojected_too():
    model = models.mlp(**WIDE)
    A, B = ([p for n, p in model.named_parameters() if side in n] for side in ("lora_A", "lora_B"))
    optimizer = GritKFAC([{"params": A}, {"params": B, "lr": 4e-2}], lr=1e-2, model=model, reproject_every=3,
                         rank_threshold=0.7, min_rank=1)  # fmt: skip
    models.fit(model, optimizer, 12)
    assert masked_are_zero(optimizer) > 0
    for pair in optimizer.pairs[:3]:
        S_u, S_d = factors(optimizer, pair)
        k = optimizer.ranks()[pair.name]
        S_d = S_d * S_u.trace() / S_d.trace()  # equal up to the scale of the loss
        torch.testing.assert_close(S_u[:k, :k], S_d[:k, :k], rtol=0, atol=1e-2 * S_u.max().item())
