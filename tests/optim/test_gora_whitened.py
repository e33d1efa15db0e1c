"""GoRAInit's whitened starts, allocations, the published recipe and the dry run."""

import copy
import warnings

import models
import pytest
import torch
from gora_models import SMALL, adamw, build, published, run

from curvopt import GoRAInit
from curvopt.functional.whitening import DAMPING, scaled_like
from curvopt.lora import find_lora_pairs
from curvopt.lora.gradients import rows_of


def root(S):
    S = S / S.diagonal().mean() + DAMPING * torch.eye(len(S), dtype=S.dtype)
    mu, V = torch.linalg.eigh(S)
    return V * mu.rsqrt() @ V.mT


def dense(model, loss, path, steps):
    """x and g of a layer by plain hooks: S_x and S_g of the first step, Ḡ of the others."""
    layer = next(p for p in find_lora_pairs(model) if p.path.endswith(path)).module
    seen = {}

    def watch(module, args, y):
        seen.update(x=args[0].detach().flatten(0, -2))
        y.register_hook(lambda g: seen.update(g=g.flatten(0, -2)))

    layer.register_forward_hook(watch)
    for i in range(steps):
        loss(i).backward()
        x, g = seen["x"].double(), seen["g"].double()
        if i == 0:
            R_x, R_g, G = root(x.mT @ x), root(g.mT @ g), 0.0
        else:
            G = G + g.mT @ x / (steps - 1)
    return R_x, R_g @ G @ R_x


@pytest.mark.parametrize("path", ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"])
def test_the_start_is_the_dense_formula(path):
    """The layers are narrower than the sketches, so that nothing is lost."""
    twin, twin_loss = build("llama")
    R_x, M = dense(twin, twin_loss, path, 3)
    model, loss = build("llama")
    optimizer = published(model, rank=4, min_rank=2, max_rank=32, calibration_steps=3, start="whitened",
                         allocation="spectrum")  # fmt: skip
    pair = next(p for p in optimizer.pairs if p.path.endswith(path))
    before = pair.A.detach().clone()
    run(optimizer, loss, 3)
    sigma2 = torch.linalg.svdvals(M).square()
    found = torch.tensor(optimizer.plan.spectra[pair.name], dtype=torch.float64)
    # Llama's norms work in float32, and the roots of the sketched factors amplify rounding by their condition, 1e2
    torch.testing.assert_close(found[:4], sigma2[:4], rtol=1e-3, atol=0)
    r = pair.rank
    wanted = torch.linalg.svd(M).Vh[:r] @ R_x
    A = rows_of(pair)
    if r <= 4:
        assert A.norm() == pytest.approx(before[:r].norm().item(), rel=1e-9)
    wanted = scaled_like(wanted, A)
    signs = (A * wanted).sum(1).sign()[:, None]
    torch.testing.assert_close((signs * A)[:2], wanted[:2], rtol=1e-2, atol=1e-3 * float(A.abs().max()))
    assert not any(p.B.any() for p in optimizer.pairs)


@pytest.mark.parametrize("kind", ["llama", "vit", "conv"])
@pytest.mark.parametrize("start", ["whitened", "whitened-random"])
def test_B_stays_zero_and_sums_stay_small(kind, start):
    model, loss = build(kind)
    optimizer = GoRAInit(model, rank=4, calibration_steps=3, start=start, then=adamw)
    with torch.no_grad():
        before = loss(0).item()
    run(optimizer, loss, 2)
    for pair in optimizer.pairs:
        d = pair.A.numel() // pair.rank + pair.B.numel() // pair.rank
        held = sum(t.numel() for k, t in optimizer.state[pair.B].items())
        assert held <= 170 * d  # 64 columns of either side, 32 of the maps, a handful of scalars
    run(optimizer, loss, 1, 2)
    assert optimizer.ready and set(optimizer.ranks().values()) == {4}
    with torch.no_grad():
        assert loss(0).item() == before
    run(optimizer, loss, 3, 3)


@pytest.mark.parametrize("steps", [1, 2])
def test_resume_in_the_middle(steps):
    kwargs = {**SMALL, "calibration_steps": 4, "max_rank": 4, "rank": 3, "start": "whitened", "allocation": "spectrum"}
    model, loss = build("vit")
    optimizer = published(model, **kwargs, then=adamw)
    run(optimizer, loss, steps)
    saved = models.round_trip(optimizer.state_dict())
    run(optimizer, loss, 6 - steps, steps)
    fresh, fresh_loss = build("vit")
    again = published(fresh, **kwargs, then=adamw)
    again.load_state_dict(saved)
    run(again, fresh_loss, 6 - steps, steps)
    assert again.plan == optimizer.plan
    models.assert_same(models.snapshot(model), models.snapshot(fresh))


def test_layers_of_one_role_share_a_budget():
    model, loss = build("llama")
    optimizer = published(model, **SMALL, compare="role")
    run(optimizer, loss, 3)
    for word in ("self_attn", "mlp"):
        own = [p for p in optimizer.pairs if word in p.path]
        cost = {p.name: (p.A.numel() + p.B.numel()) // p.rank for p in own}
        budget = 4 * sum(cost.values())
        assert 0 <= budget - sum(cost[p.name] * p.rank for p in own) < 4 * max(cost.values())


def test_the_published_recipe():
    model, loss = build("llama", use_rslora=True, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    optimizer = GoRAInit.paper(model, delegate_lr=1e-4, calibration_steps=2, max_rank=16)
    g = optimizer.param_groups[0]
    assert (g["rank"], g["allocation"], g["keep_scaling"], g["start"]) == (8, "paper", False, "gora")
    run(optimizer, loss, 3)
    slow, fast = optimizer.delegate.param_groups
    assert fast["lr"] == 16 * slow["lr"] == pytest.approx(16e-4)
    assert {id(p) for p in fast["params"]} == {id(pair.B) for pair in optimizer.pairs}


@pytest.mark.parametrize("allocation", ["exact", "spectrum", "uniform"])
def test_a_dry_run_leaves_everything_as_it_is(allocation):
    model, loss = build("llama")
    loss(5).backward()
    before, state = models.snapshot(model), torch.random.get_rng_state()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    clamps = {} if allocation == "uniform" else {"min_rank": 2, "max_rank": 8}
    kwargs = {"rank": 4, **clamps, "allocation": allocation}
    plan = GoRAInit.plan_only(model, loss, range(3), **kwargs)
    models.assert_same(models.snapshot(model), before)
    assert torch.equal(torch.random.get_rng_state(), state) and models.hooks(model) == 0
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if n in grads)
    twin, twin_loss = build("llama")
    optimizer = published(twin, **kwargs, calibration_steps=3)
    run(optimizer, twin_loss, 3)
    assert plan.ranks == optimizer.plan.ranks
    uniform = dict.fromkeys(plan.ranks, 4)
    assert 0 < plan.gain() <= 1 and str(plan).count("\n") == len(plan.ranks) + 1
    if allocation == "spectrum":
        assert plan.gain() >= plan.gain(uniform)
    assert copy.deepcopy(plan) == plan


def test_what_does_not_go_together_is_refused():
    model, _ = build("llama")
    for kwargs in ({"start": "whitened"}, {"start": "gora", "allocation": "spectrum"}):
        with pytest.raises(ValueError, match="importance must be 'mean_abs', 'frobenius' or 'nuclear' with"):
            published(model, **SMALL, importance="grad_b", **kwargs)
    with pytest.raises(ValueError, match="calibration_steps must be at least 2"):
        published(model, **{**SMALL, "calibration_steps": 1}, start="whitened")
    with pytest.raises(ValueError, match="batches must be at least 2"):
        GoRAInit.plan_only(model, build("llama")[1], [])
    for name in ("min_rank", "max_rank"):
        with pytest.raises(ValueError, match=f"{name} must be None with allocation='uniform'"):
            GoRAInit(model, **{name: 4})


def test_by_default_the_ranks_stay_and_A_alone_moves():
    """Adapters of several ranks keep them; A keeps its norm and B stays zero."""
    model, loss = build("llama", rank_pattern={"q_proj": 2})
    pairs = find_lora_pairs(model)
    ranks, norms = {p.name: p.rank for p in pairs}, [p.A.norm().item() for p in pairs]
    before = [p.A.detach().clone() for p in pairs]
    assert set(ranks.values()) == {2, 4}
    optimizer = GoRAInit(model, then=adamw)
    run(optimizer, loss, 4)
    assert optimizer.ready and optimizer.plan.ranks == ranks == {p.name: p.rank for p in pairs}
    assert optimizer.plan.spent == optimizer.plan.budget == sum(p.A.numel() + p.B.numel() for p in pairs)
    assert not any(p.B.any() for p in pairs) and not any(
        torch.equal(p.A, a) for p, a in zip(pairs, before, strict=True)
    )
    assert [p.A.norm().item() for p in pairs] == pytest.approx(norms, rel=1e-9)


def test_the_budget_of_adapters_of_several_ranks_is_theirs():
    model, loss = build("llama", rank_pattern={"q_proj": 2})
    parameters = sum(p.A.numel() + p.B.numel() for p in find_lora_pairs(model))
    optimizer = published(model, calibration_steps=2, compare="role")
    run(optimizer, loss, 2)
    assert optimizer.plan.budget == parameters and set(optimizer.plan.ranks.values()) != {2, 4}
    after = sum(p.A.numel() + p.B.numel() for p in optimizer.pairs)
    largest = max(sum(p.A.shape[1:]) + p.B.shape[0] for p in optimizer.pairs)
    assert parameters - 2 * largest < after <= parameters  # a remainder in each of the two roles
    assert min(optimizer.plan.ranks.values()) >= 1 and max(optimizer.plan.ranks.values()) <= 16


def test_ranks_across_roles_are_warned_of_before_it_starts():
    model, attention = build("llama")[0], build("llama", target_modules=["q_proj", "v_proj"])[0]
    with pytest.warns(UserWarning, match=r"importances of layers of 2 roles \('mlp', 'self_attn'\)"):
        GoRAInit(model, allocation="exact").remove_hooks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GoRAInit(model, allocation="exact", compare="role").remove_hooks()
        GoRAInit(model, start="gora").remove_hooks()
        GoRAInit(attention, allocation="exact").remove_hooks()
