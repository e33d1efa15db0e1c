"""16-bit adapters, steps that must not happen, loss scaling and autocast."""

import copy
import itertools

import models
import pytest
import torch
from grit_kit import rank_side
from torch import nn

RULES = ("polar", "eigen", "adam", "whiten", "momentum")
HALF = [torch.bfloat16]
R_BY_R = {"factor", "basis", "inverse", "root"}
REPROJECT = {"reproject_every": 3, "rank_threshold": 0.8, "min_rank": 1}
# pure 16-bit parameters outside pairs are torch's AdamW in their own dtype, where fp16 rounds a small ε to zero


# ---------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_dtypes_of_state(rule, dtype):
    model = models.mlp(dtype)
    optimizer = rank_side(model, lr=1e-2, update=rule, **REPROJECT)
    models.fit(model, optimizer, 6)
    small = torch.float64 if dtype == torch.float64 else torch.float32
    for pair in optimizer.pairs[:3]:
        for p in (pair.A, pair.B):
            state = optimizer.state[p]
            assert p.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
            assert {state[key].dtype for key in R_BY_R & state.keys()} == {small}
            assert state["step"].dtype == torch.float32 and state["rank"].dtype == torch.int64
            assert all(value.isfinite().all() for value in state.values())
    assert optimizer.state[model.head.weight]["exp_avg"].dtype == dtype
    assert optimizer.diagnostics()["skipped_updates"] == 0


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_the_float32_step_rounded_once(rule, dtype):
    """From equal parameters and gradients the 16-bit step is the fp32 step, rounded when it is stored."""
    model, wide = models.mlp(dtype), models.mlp(torch.float32)
    models.copied_into(model, wide)
    optimizer, other = (rank_side(m, lr=1e-2, update=rule, statistics="gradient", eps=1e-3) for m in (model, wide))
    models.loss(model, 0).backward()
    for name, p in wide.named_parameters():
        grad = model.get_parameter(name).grad
        p.grad = None if grad is None else grad.float()
    optimizer.step()
    other.step()
    for pair, same in zip(optimizer.pairs[:3], other.pairs, strict=False):
        assert torch.equal(pair.A, same.A.to(dtype)) and torch.equal(pair.B, same.B.to(dtype))
        assert torch.equal(optimizer.state[pair.A]["factor"], other.state[same.A]["factor"])


# ---------------------------------------------------------------------------------------------- skipped steps


def spoil(model, where, value):
    """Put one non-finite number into the gradients, or into the whole backward."""
    if where == "pair":
        model.first.lora_A.weight.grad.view(-1)[3] = value
    elif where == "head":
        model.head.bias.grad[0] = value
    else:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.fill_(value)


@pytest.mark.parametrize("statistics", ["activation", "gradient", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_with_a_broken_gradient_changes_nothing(rule, dtype, statistics):
    """Neither at once nor later: the run goes on as one whose steps were counted once without a batch."""
    settings = {"lr": 1e-2, "update": rule, "statistics": statistics, "inverse_every": 2, "weight_decay": 0.1,
                **REPROJECT}  # fmt: skip
    spoilt = (("pair", torch.nan), ("head", torch.inf), ("all", torch.nan))
    for where, value in spoilt if statistics == "activation" else spoilt[:1]:
        model, twin = models.mlp(dtype), models.mlp(dtype)
        optimizer, other = rank_side(model, **settings), rank_side(twin, **settings)
        for i in range(12):
            if i in (4, 5, 9):
                optimizer.zero_grad()
                models.loss(model, 50 + i).backward()
                spoil(model, where, value)
                before = models.snapshot(model, optimizer)
                optimizer.step()
                models.assert_same(models.snapshot(model, optimizer), before, ignore=("skipped", "cadence"))
                for bucket in other.buckets:
                    bucket.tick()
            models.fit(model, optimizer, 1, i)
            models.fit(twin, other, 1, i)
        models.assert_same(
            models.snapshot(model, optimizer), models.snapshot(twin, other), ignore=("skipped", "cadence")
        )
        assert optimizer.diagnostics()["skipped_updates"] == 3 and other.diagnostics()["skipped_updates"] == 0


def test_with_matrices_at_every_step_not_even_the_clock_is_seen():
    model, twin = models.mlp(), models.mlp()
    settings = {"lr": 1e-2, "inverse_every": 1, "factor_every": 1}
    optimizer, other = rank_side(model, **settings), rank_side(twin, **settings)
    for i in range(6):
        if i in (0, 3):
            optimizer.zero_grad()
            (models.loss(model, 50) * torch.nan).backward()  # the activations are finite, all gradients are not
            optimizer.step()
        models.fit(model, optimizer, 1, i)
        models.fit(twin, other, 1, i)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other), ignore=("skipped", "cadence"))
    assert optimizer.diagnostics()["skipped_updates"] == 2


def test_a_broken_first_step_leaves_the_start():
    model, twin = models.mlp(), models.mlp()
    optimizer, other = rank_side(model, lr=1e-2, inverse_every=1), rank_side(twin, lr=1e-2, inverse_every=1)
    models.loss(model, 9).backward()
    model.head.bias.grad[0] = torch.nan
    before = models.snapshot(model)
    optimizer.step()
    models.assert_same(models.snapshot(model), before)
    for m, o in ((model, optimizer), (twin, other)):
        models.fit(m, o, 4)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other), ignore=("skipped", "cadence"))


def test_a_skipped_batch_is_not_left_over_for_the_next_observation():
    """With zero_grad() of the model, not of the optimizer, nothing but the step itself can drop the sums."""
    model, twin = models.mlp(), models.mlp()
    optimizer, other = rank_side(model, lr=1e-2, inverse_every=1), rank_side(twin, lr=1e-2, inverse_every=1)
    for i in range(5):
        if i == 2:
            model.zero_grad()
            (models.loss(model, 60) * 1e3).backward()
            model.norm.weight.grad[0] = torch.inf
            optimizer.step()
        for m, o in ((model, optimizer), (twin, other)):
            m.zero_grad()
            models.loss(m, i).backward()
            o.step()
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other), ignore=("skipped", "cadence"))


def test_a_broken_signal_with_finite_gradients_breaks_no_factor():
    """An observation that is not finite is not taken; the pair goes on with the factor it had."""
    model = models.mlp()
    true_d, breaking = [], []

    def overflow(d):
        true_d.append(d)
        return d * torch.inf if breaking else d

    # seen before the optimizer's own hook; what comes after it puts the finite gradient back
    model.first.lora_A.register_forward_hook(lambda module, args, u: u.register_hook(overflow) and None)
    optimizer = rank_side(model, lr=1e-2)
    model.first.lora_A.register_forward_hook(lambda module, args, u: u.register_hook(lambda d: true_d[-1]) and None)
    models.fit(model, optimizer, 2)
    A, B = model.first.lora_A.weight, model.first.lora_B.weight
    before, A_before = optimizer.state[A]["factor"].clone(), A.detach().clone()
    breaking.append(True)
    models.fit(model, optimizer, 1, 2)
    assert torch.equal(optimizer.state[A]["factor"], before) and not torch.equal(A, A_before)
    assert optimizer.state[A]["observed"] == 2 and optimizer.state[B]["observed"] == 3
    assert optimizer.diagnostics()["skipped_updates"] == 0 and all(p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------- loss scaling


def scaled_fit(model, optimizer, steps, scaler, unscale=False, clip=None, overflow=(), begin=0):
    """The usual loop with a GradScaler; batches in ``overflow`` come first, with an infinite loss."""
    for i in range(begin, begin + steps):
        for broken in (True, False) if i in overflow else (False,):
            optimizer.zero_grad()
            value = models.loss(model, 70 + i if broken else i)
            scaler.scale(value * (torch.inf if broken else 1)).backward()
            if unscale:
                scaler.unscale_(optimizer)
                if clip:
                    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
            scaler.step(optimizer)
            scaler.update()


def scaler(scale=2.0**10, **kwargs):
    return torch.amp.GradScaler("cpu", init_scale=scale, **kwargs)


@pytest.mark.parametrize("statistics", ["activation", "gradient", "weight"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scale_of_a_power_of_two_is_invisible(unscale, rule, statistics):
    """Every gradient is multiplied by 2^10 and divided again: exact, so moments and parameters agree.

    The optimizer cannot tell the scale: it stays in S_d, and cancels in all that is made of it.
    """
    settings = {"lr": 1e-2, "update": rule, "statistics": statistics, "inverse_every": 2, "weight_decay": 0.1}
    model, twin = models.mlp(torch.float32), models.mlp(torch.float32)
    optimizer, other = rank_side(model, **settings), rank_side(twin, **settings)
    scaled_fit(model, optimizer, 7, scaler(), unscale)
    models.fit(twin, other, 7)
    ignore = ("factor",) if statistics == "activation" else ()
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other), ignore)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scale_is_invisible_to_reprojection(unscale):
    """The balanced basis depends on the scale of S_d against S_u: a scale left in it would move A against B."""
    model, twin = models.mlp(torch.float32, width=12, r=6), models.mlp(torch.float32, width=12, r=6)
    optimizer, other = rank_side(model, lr=1e-2, **REPROJECT), rank_side(twin, lr=1e-2, **REPROJECT)
    scaled_fit(model, optimizer, 7, scaler(), unscale)
    models.fit(twin, other, 7)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other), ("factor",))


@pytest.mark.parametrize("statistics", ["gradient", "weight"])
def test_a_changing_loss_scale_is_invisible(statistics):
    """Where the statistics are of unscaled gradients or of none; by activations it weighs the averages."""
    model, twin = models.mlp(torch.float32), models.mlp(torch.float32)
    optimizer, other = (rank_side(m, lr=1e-2, statistics=statistics) for m in (model, twin))
    scaled_fit(model, optimizer, 9, growing := scaler(4.0, growth_interval=2, growth_factor=16.0), False)
    assert growing.get_scale() == 4.0 * 16**4
    models.fit(twin, other, 9)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


def test_clipping_between_unscale_and_step():
    model, twin = models.mlp(torch.float32), models.mlp(torch.float32)
    optimizer, other = rank_side(model, lr=1e-2, inverse_every=2), rank_side(twin, lr=1e-2, inverse_every=2)
    scaled_fit(model, optimizer, 6, scaler(), unscale=True, clip=0.05)
    for i in range(6):
        other.zero_grad()
        models.loss(twin, i).backward()
        norm = nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.requires_grad], 0.05)
        assert norm > 0.05
        other.step()
    models.assert_same(models.snapshot(model), models.snapshot(twin))


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_an_overflow_drops_its_statistics_too(rule, unscale):
    # the scale stays in S_d: an average without memory shows that the overflow itself left nothing
    settings = {"lr": 1e-2, "update": rule, "inverse_every": 1, "factor_decay": 0.0}
    model, twin = models.mlp(torch.float32), models.mlp(torch.float32)
    optimizer, other = rank_side(model, **settings), rank_side(twin, **settings)
    shrinking = scaler()
    scaled_fit(model, optimizer, 6, shrinking, unscale, overflow=(0, 3))
    assert shrinking.get_scale() == 2.0**8 and optimizer.diagnostics()["steps"] == 6  # the scaler takes no step then
    models.fit(twin, other, 6)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other), ignore=("factor",))


def test_the_scaler_leaves_nothing_on_the_optimizer():
    model = models.mlp(torch.float32)
    optimizer = rank_side(model, lr=1e-2)
    scaled_fit(model, optimizer, 2, scaler())
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)  # Lightning, Accelerate ask
    twin = models.mlp(torch.float32)
    other = rank_side(twin, lr=1e-2)
    models.fit(twin, other, 2)
    for m, o in ((model, optimizer), (twin, other)):
        models.fit(m, o, 2, 2)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other), ignore=("factor",))


# ---------------------------------------------------------------------------------------------- autocast, hard factors


@pytest.mark.parametrize("build", [models.mlp, models.llama])
def test_autocast_runs_and_follows_float32(build):
    ends, losses = [], []
    for enabled in (False, True):
        model = build(torch.float32)
        optimizer = rank_side(model, lr=1e-2, inverse_every=2)
        run = []
        for i in itertools.islice(itertools.cycle(range(2)), 12):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                value = models.loss(model, i)
            value.backward()
            optimizer.step()
            run.append(value.item())
        losses.append(run)
        ends.append(optimizer)
        state = optimizer.state[optimizer.pairs[0].A]
        assert state["factor"].dtype == state["exp_avg"].dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # bf16 has 8 bits; Adam's signs of tiny gradients may flip
    assert losses[0][-1] < losses[0][0]
    for one, two in zip(ends[0].pairs[:3], ends[1].pairs[:3], strict=True):
        S, S_bf16 = ends[0].state[one.B]["factor"], ends[1].state[two.B]["factor"]
        assert (S - S_bf16).norm() < 0.3 * S.norm()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_singular_factors_do_no_harm(rule, dtype):
    """Fewer tokens than ranks, a dead row of A, duplicated rows: factors of low rank at every step."""
    model = models.mlp(dtype, width=12, r=6)
    with torch.no_grad():
        model.first.lora_A.weight[2] = 0
        model.second.lora_A.weight[1] = model.second.lora_A.weight[0]
    optimizer = rank_side(model, lr=1e-2, update=rule, damping=1e-6, inverse_every=1, factor_decay=0.0)
    for i in range(8):
        optimizer.zero_grad()
        models.loss(model, i, rows=1).backward()  # three tokens
        before = copy.deepcopy([(pair.A, pair.B) for pair in optimizer.pairs[:3]])
        optimizer.param_groups[0]["reproject_every"] = 0 if i < 6 else 2
        optimizer.step()
        for pair, old in zip(optimizer.pairs, before, strict=False):
            for p, q in zip((pair.A, pair.B), old, strict=True):
                assert p.isfinite().all()
                if rule in ("polar", "eigen", "momentum") and i < 6:
                    # an entry of Adam's update is at most lr·(1−β₁)/√(1−β₂) = 3.2 lr; a rotation keeps the norm
                    assert (p.float() - q.float()).norm() < 3.2e-2 * p.numel() ** 0.5
    assert optimizer.diagnostics()["skipped_updates"] == 0
