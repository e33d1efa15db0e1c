"""GritKFAC(nested_ranks=...): directions in order with and without factors, prefixes as adapters, settings."""

import copy
import itertools

import models
import pytest
import torch
from peft import PeftModel

from curvopt import GritKFAC, MatryoshkaScaledAdam, find_lora_pairs
from curvopt.lora import export_adapter, truncated

NESTED = {"lr": 1e-2, "nested_ranks": (1, 2), "mask_warmup": 1, "reproject_every": 4}
WIDE = {"width": 12, "r": 6}
SUMS = {"rtol": 1e-10, "atol": 1e-13}  # float64 sums in another order, divided by their scale


def ended(model, steps=4, **settings):
    """Train up to and including a reordering, and a twin that leaves its directions as they are."""
    twin = copy.deepcopy(model)
    settings = {**NESTED, **settings}
    turned, straight = GritKFAC(model, **settings), GritKFAC(twin, **{**settings, "reproject_every": 0})
    models.fit(model, turned, steps), models.fit(twin, straight, steps)
    return turned, straight


# ---------------------------------------------------------------------------------------------- what is kept


def test_factors_are_kept_only_where_something_else_reads_them():
    made = {
        "plain": GritKFAC(models.mlp(), nested_ranks=(1, 2)),
        "rule": GritKFAC(models.mlp(), nested_ranks=(1, 2), update="eigen"),
        "asked": GritKFAC(models.mlp(), nested_ranks=(1, 2), statistics="gradient"),
        "unnested": GritKFAC(models.mlp(), reproject_every=10),
    }
    kept = {name: o.param_groups[0]["statistics"] for name, o in made.items()}
    assert kept == {"plain": "none", "rule": "activation", "asked": "gradient", "unnested": "activation"}
    assert {o.param_groups[0]["reproject_every"] for o in made.values()} == {10}
    assert made["plain"].nested_ranks()["third"] == (1, 2, 3) and made["unnested"].nested_ranks() == {}


def test_the_schedule_is_that_of_the_other_optimizer():
    """The same defaults, the same draws: both mask the same samples at the same ranks."""
    models_, seen = [models.mlp(), models.mlp()], []
    made = [GritKFAC(models_[0], lr=0.0, nested_ranks=(1, 2), mask_warmup=0),
            MatryoshkaScaledAdam(models_[1], lr=0.0, ranks=(1, 2), nesting="stratified", warmup_steps=0)]  # fmt: skip
    pairs = {"full_share": "full_share", "mask_warmup": "warmup_steps", "reproject_every": "reorder_every"}
    usual = [GritKFAC(models.mlp(), nested_ranks=(1, 2)), MatryoshkaScaledAdam(models.mlp(), nesting="stratified")]
    assert all(usual[0].param_groups[0][a] == usual[1].param_groups[0][b] for a, b in pairs.items())
    for model, optimizer in zip(models_, made, strict=True):
        model.first.watch = []
        models.fit(model, optimizer, 4)
        seen.append(model.first.watch)
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours == 0, theirs == 0)
    assert (seen[0][-1] == 0).any()  # control: something is masked


# ---------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize(
    ("rule", "statistics"), [("polar", "none"), *itertools.product(["polar", "eigen"], ["activation", "gradient"])]
)
def test_a_reordering_keeps_the_adapter_and_carries_the_moments(rule, statistics):
    """ΔW is what the step left, m ↦ T⁻ᵀ m and v ↦ (T⁻ᵀ)² v, T from the tensors; the outer factors stay as they are."""
    turned, straight = ended(models.mlp(**WIDE), update=rule, statistics=statistics)
    for pair, before in zip(turned.pairs[:3], straight.pairs, strict=False):
        A, B, A_0, B_0 = (p.detach() for p in (pair.A, pair.B, before.A, before.B))
        assert not torch.allclose(A, A_0)
        torch.testing.assert_close(B @ A, B_0 @ A_0, rtol=1e-9, atol=1e-12)  # rounding times the condition of T, ≤ 1e4
        if statistics == "none":
            sigma = torch.linalg.svdvals(B_0 @ A_0)[: pair.rank]
            for gram in (A @ A.mT, B.mT @ B):  # one diagonal up to a scalar, to the damping of 1e-6
                expected = torch.diag(sigma * (gram.trace() / sigma.sum()))
                torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-5 * gram.trace().item())
        ours, theirs = turned.state[pair.A], straight.state[before.A]
        for key in ("outer_basis", "outer_eigenvalues", "outer_trace"):
            assert torch.equal(ours[key], theirs[key]) and theirs[key].any()
        if rule == "polar":
            M = torch.linalg.inv(A @ torch.linalg.pinv(A_0)).mT
            for key, m in (("exp_avg", M), ("exp_avg_sq", M.square())):
                want = m @ theirs[key]
                torch.testing.assert_close(ours[key], want, rtol=1e-8, atol=1e-8 * want.abs().max().item())


def test_with_factors_the_basis_is_the_balanced_one_and_masks_count_once():
    """S_u is of all of u, S_d of what the masks let through; after the reordering both are one diagonal."""
    model = models.mlp(**WIDE)
    optimizer = GritKFAC(model, **{**NESTED, "reproject_every": 0}, statistics="activation", factor_every=1)
    models.fit(model, optimizer, 2)
    optimizer.zero_grad()
    x, _ = models.batch(model, 2)
    layer = model.first
    layer.watch = []
    value = models.loss(model, 2)
    u = (x @ layer.lora_A.weight.mT).detach().flatten(0, -2)
    masked = layer.watch[0]
    mask = (masked != 0).flatten(0, -2).double()
    assert 0 < mask.mean() < 1
    d = torch.autograd.grad(value, masked, retain_graph=True)[0].flatten(0, -2) * mask
    layer.watch = None
    decay = optimizer.param_groups[0]["factor_decay"]
    was = [S.clone() for S in optimizer.factors()["first"]]
    value.backward()
    optimizer.step()
    weight = (1 - decay) / (1 - decay**3)  # the newest of three in a bias-corrected average
    for now, before, new in zip(optimizer.factors()["first"], was, (u.T @ u / len(u), len(d) * d.T @ d), strict=True):
        torch.testing.assert_close(now, before + weight * (new - before), **SUMS)
    assert not torch.allclose(optimizer.factors()["first"][0], u.T @ u / len(u))  # control: it is an average
    optimizer.param_groups[0]["reproject_every"] = 1
    models.fit(model, optimizer, 1, 3)
    S_u, S_d = optimizer.factors()["first"]
    S_u, S_d = S_u / S_u.trace(), S_d / S_d.trace()
    torch.testing.assert_close(S_u, S_d, rtol=1e-4, atol=1e-5)  # the damping of 1e-6
    torch.testing.assert_close(S_u, torch.diag(S_u.diagonal().sort(descending=True).values), rtol=1e-4, atol=1e-5)


def test_without_masks_and_reorderings_it_is_the_same_optimizer_bit_for_bit():
    model, twin = models.mlp(torch.float32), models.mlp(torch.float32)
    one = GritKFAC(model, lr=1e-2, nested_ranks=(1, 2), full_share=1.0, reproject_every=0)
    two = GritKFAC(twin, lr=1e-2)
    models.fit(model, one, 6), models.fit(twin, two, 6)
    models.assert_same(models.snapshot(model), models.snapshot(twin))


def test_statistics_none_can_be_put_in_order_without_nested_ranks():
    turned, straight = ended(models.mlp(), nested_ranks=None, statistics="none")
    for pair, before in zip(turned.pairs[:3], straight.pairs, strict=False):
        torch.testing.assert_close(pair.B @ pair.A, before.B @ before.A, rtol=1e-9, atol=1e-12)
        gram = (pair.A @ pair.A.mT).detach()
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-5 * gram.trace().item())
        assert (gram.diagonal().diff() <= 0).all() and not torch.allclose(pair.A, before.A)


# ---------------------------------------------------------------------------------------------- adapters


def test_every_nested_rank_reloads_in_peft(tmp_path):
    """The exported prefix is the model computing with it, and the best of its rank after a reordering."""
    model = models.llama(torch.float64, start="random")
    optimizer = GritKFAC(model, **NESTED)
    models.fit(model, optimizer, 4)
    whole = {p.name: (p.B @ p.A).detach() for p in find_lora_pairs(model)}
    ranks = sorted({k for own in optimizer.nested_ranks().values() for k in own})
    assert ranks == [1, 2, 4]
    losses = []
    for rank in ranks:
        with truncated(model, rank, basis="stored"):
            losses.append(models.loss(model.eval(), 9).item())
            for pair in find_lora_pairs(model):
                error = torch.linalg.matrix_norm(whole[pair.name] - pair.B @ pair.A).item()
                best = torch.linalg.svdvals(whole[pair.name])[rank:].square().sum().sqrt().item()
                assert error == pytest.approx(best, rel=1e-4, abs=1e-12)  # the damping of 1e-6, by its root at worst
        folder = export_adapter(model, tmp_path / str(rank), ranks=rank)
        twin = PeftModel.from_pretrained(models.llama(torch.float64).unload(), folder).double().eval()
        assert {p.rank for p in find_lora_pairs(twin)} == {rank}
        assert models.loss(twin, 9).item() == pytest.approx(losses[-1], rel=1e-12)
        model.train()
    assert len(set(losses)) == 3


# ---------------------------------------------------------------------------------------------- settings


REFUSED = {
    "rank_threshold": ({"rank_threshold": 0.9, "min_rank": 1, "statistics": "activation"}, "must be None with nested"),
    "reprojection": ({"reprojection": "paper", "statistics": "activation"}, "must be 'balanced' or None with nested"),
    "capturable": ({"capturable": True}, "must be False with nested_ranks: a replay draws no masks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_compose_is_refused(case):
    settings, text = REFUSED[case]
    model = models.mlp()
    with pytest.raises(ValueError, match=f"{case} {text}"):
        GritKFAC(model, **{**NESTED, **settings})
    assert models.hooks(model) == models.hooks(models.mlp())


def test_a_rank_threshold_needs_factors():
    with pytest.raises(ValueError, match='reproject_every must be 0 with statistics="none", but for'):
        GritKFAC(models.mlp(), statistics="none", rank_threshold=0.9, min_rank=1)


def test_tensors_without_pairs_have_no_nested_ranks():
    tensors = [torch.nn.Parameter(torch.randn(4, 64)), torch.nn.Parameter(torch.randn(64, 4))]
    with pytest.raises(ValueError, match='nested_ranks must be None with low_rank="shape"'):
        GritKFAC(tensors, low_rank="shape", nested_ranks=(1, 2))


def test_edits_are_taken_and_those_that_come_too_late_refused():
    model = models.mlp()
    optimizer = GritKFAC(model, **NESTED)
    models.fit(model, optimizer, 3)
    optimizer.param_groups[0]["nested_ranks"] = [3]
    models.fit(model, optimizer, 1, 3)
    assert optimizer.nested_ranks()["first"] == (3, 4)
    optimizer.param_groups[0]["full_share"] = 1.0
    x, _ = models.batch(model, 4)
    with torch.no_grad():
        assert torch.equal(model(x), copy.deepcopy(model).eval()(x))
    optimizer.param_groups[0]["nested_ranks"] = None
    models.loss(model, 5).backward()
    with pytest.raises(ValueError, match="nested_ranks must be other ranks, as at the first step, got None"):
        optimizer.step()


def test_groups_of_a_pair_agree():
    model = models.mlp()
    pairs = find_lora_pairs(model)
    groups = [{"params": [p.A for p in pairs], "full_share": 0.25}, {"params": [p.B for p in pairs]}]
    with pytest.raises(ValueError, match="full_share of first must be the same in the groups of its A and B"):
        GritKFAC(groups, model=model, **NESTED)


def test_a_broken_generator_is_refused():
    with pytest.raises(TypeError, match=r"generator must be None or a torch.Generator on the CPU, got 5"):
        GritKFAC(models.mlp(), nested_ranks=(1, 2), generator=5)
