"""MatryoshkaScaledAdam on plain modules is AdamW on modules that compute B P A; LoRA and DyLoRA by P alone."""

import copy

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import few
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from curvopt import MatryoshkaScaledAdam
from curvopt.functional.nested import diagonal, sampled_diagonal, sampled_rank
from curvopt.optim.matryoshka import nested_ranks

S = 1.5  # the scaling of models.LoraLinear
HYPER = {"lr": 1e-2, "betas": (0.8, 0.97), "weight_decay": 0.3}


class Explicit(models.LoraLinear):
    """The same layer computing B P A, without a scaling."""

    P: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x) * self.P)


def set_P(layer: nn.Module, P) -> None:
    layer.P = torch.tensor(P, dtype=layer.lora_A.weight.dtype)


def explicit(model: models.LoraMLP, P) -> models.LoraMLP:
    """Return a twin that computes with P(r) between the factors."""
    twin = copy.deepcopy(model)
    for layer in [*twin.layers, twin.idle]:
        layer.__class__ = Explicit
        set_P(layer, P(layer.rank))
    return twin


def deltas(model: models.LoraMLP) -> list[Tensor]:
    """Return every layer's ΔW."""
    middle = [layer.P if isinstance(layer, Explicit) else torch.full((layer.rank,), S) for layer in model.layers]
    factors = [(layer.lora_B.weight.detach(), layer.lora_A.weight.detach()) for layer in model.layers]
    return [(B * m.to(B.dtype)) @ A for (B, A), m in zip(factors, middle, strict=True)]


def fit_together(model, twin, optimizer, adamw, steps, begin=0, schedule=None):
    schedules = [LambdaLR(o, schedule) for o in (optimizer, adamw)] if schedule else []
    for i in range(begin, begin + steps):
        first, second = models.fit(model, optimizer, 1, i), models.fit(twin, adamw, 1, i)
        assert first == pytest.approx(second, rel=1e-11)
        for s in schedules:
            s.step()


def cosine(t: int) -> float:
    return 0.1 if t < 3 else 0.5 + 0.5 * (0.95**t)


CHOICES = {"ranks": None, "scale": "none"}, {"ranks": (1, 3), "scale": "rank"}, {"ranks": [2, 4], "scale": "sqrt"}


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_fifty_steps_equal_the_explicit_form(choice, eps):
    """B is B, Ã is P A / s, and what is outside pairs the same, with decay, a schedule, and an ε that matters."""

    def P(r):
        ranks = {4: (1, 2, 4), 3: (1, 2, 3)}[r] if choice["ranks"] is None else choice["ranks"]
        return diagonal(ranks, r, choice["scale"])

    model = models.mlp(start="zero")
    twin = explicit(model, P)
    optimizer = MatryoshkaScaledAdam(model, eps=eps, **choice, **HYPER)
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], eps=eps, **HYPER)
    fit_together(model, twin, optimizer, adamw, 55, schedule=cosine)
    for layer, other in zip(model.layers, twin.layers, strict=True):
        A, Q = other.lora_A.weight, other.P[:, None] / S
        # rounding of 55 steps in another order, on numbers of order one
        torch.testing.assert_close(layer.lora_A.weight, Q * A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.lora_B.weight * (Q.T != 0), other.lora_B.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.head.weight, twin.head.weight, rtol=1e-10, atol=1e-12)
    assert deltas(twin)[0].abs().max() > 1e-3  # it went somewhere


@few
@given(st.sets(st.integers(1, 4), min_size=1).map(sorted), st.sampled_from(["none", "rank", "sqrt"]))
def test_any_ranks_and_scale(ranks, scale):
    if not any(k <= 3 for k in ranks):  # the third layer has rank 3
        ranks = [1, *ranks]
    model = models.mlp(start="zero")
    twin = explicit(model, lambda r: diagonal(ranks, r, scale))
    optimizer = MatryoshkaScaledAdam(model, ranks=ranks, scale=scale, **HYPER)
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **HYPER)
    fit_together(model, twin, optimizer, adamw, 4)
    for ours, theirs in zip(deltas(model), deltas(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", ["none", "rank"])
def test_lora_is_P_equal_to_s_of_r(scale):
    model = models.mlp(start="zero")
    twin = explicit(model, lambda r: diagonal((r,), r, scale))
    one_rank = copy.deepcopy(model)
    optimizer = MatryoshkaScaledAdam(model, nesting="lora", scale=scale, **HYPER)
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **HYPER)
    fit_together(model, twin, optimizer, adamw, 20)
    for ours, theirs in zip(deltas(model), deltas(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    # and by ranks alone: {r} for the layers of rank 4
    models.fit(one_rank, MatryoshkaScaledAdam(one_rank, ranks=[3, 4], scale=scale, **HYPER), 20)
    assert not torch.equal(one_rank.first.lora_A.weight, model.first.lora_A.weight)


def test_lora_with_a_scaling_of_one_is_fused_adamw_bit_for_bit():
    model = models.mlp(torch.float32, start="zero")
    for layer in [*model.layers, model.idle]:
        layer.alpha = layer.rank
    twin = copy.deepcopy(model)
    pairs = [p for name, p in twin.named_parameters() if "lora" in name]
    others = [p for name, p in twin.named_parameters() if name.startswith(("norm", "head"))]
    adamw = [torch.optim.AdamW(pairs, fused=True, **HYPER), torch.optim.AdamW(others, **HYPER)]
    optimizer = MatryoshkaScaledAdam(model, nesting="lora", **HYPER)
    for i in range(6):
        models.fit(model, optimizer, 1, i)
        twin.zero_grad()
        models.loss(twin, i).backward()
        for o in adamw:
            o.step()
    models.assert_same(models.snapshot(model), models.snapshot(twin))


@pytest.mark.parametrize("scale", ["none", "rank"])
def test_dylora_is_a_P_drawn_each_step(scale):
    """The first step is at the largest rank, then the generator draws one for all pairs."""
    model, ranks = models.mlp(start="zero"), {4: (1, 2, 4), 3: (1, 2, 3)}
    twin = explicit(model, lambda r: sampled_diagonal(r, r, scale))
    draws, seen = torch.Generator().manual_seed(7), set()
    optimizer = MatryoshkaScaledAdam(
        model, nesting="dylora", scale=scale, generator=torch.Generator().manual_seed(7), **HYPER
    )
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **HYPER)
    for i in range(50):
        fit_together(model, twin, optimizer, adamw, 1, i)
        u = torch.rand((), generator=draws, dtype=torch.float64).item()
        for layer in twin.layers:
            rank = sampled_rank(ranks[layer.rank], u)
            set_P(layer, sampled_diagonal(rank, layer.rank, scale))
        seen.add(sampled_rank(ranks[4], u))
    assert seen == {1, 2, 4}
    for layer, other in zip(model.layers, twin.layers, strict=True):
        full = optimizer.state[layer.lora_A.weight]["full"]
        torch.testing.assert_close(full, other.lora_A.weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.lora_A.weight, other.P[:, None] / S * full, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layer.lora_B.weight, other.lora_B.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cut", ["rates", "start", "scaling"])
def test_control_without_its_parts_it_is_not_the_explicit_form(cut, monkeypatch):
    """Plain AdamW on Ã, a start without P, and a forgotten scaling all train something else."""
    model = models.mlp(start="zero")
    twin = explicit(model, lambda r: diagonal((1, 2, r), r))
    if cut == "rates":
        monkeypatch.setattr(nested_ranks.NestedRanks, "row_rates", lambda self, name: None)
    if cut == "start":  # B that is not quite zero: the adapter is taken as it is
        for layer in model.layers:
            nn.init.constant_(layer.lora_B.weight, 1e-12)
    if cut == "scaling":
        monkeypatch.setattr(type(MatryoshkaScaledAdam(models.mlp()).pairs[0]), "scaling", 1.0)
    models.fit(model, MatryoshkaScaledAdam(model, **HYPER), 10)
    models.fit(twin, torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **HYPER), 10)
    assert max((a - b).abs().max() for a, b in zip(deltas(model), deltas(twin), strict=True)) > 1e-3


# ---------------------------------------------------------------------------------------------- the start, and later


@pytest.mark.parametrize("nesting", ["matryoshka", "dylora", "lora"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_the_effective_adapter_is_changed_by_steps_alone(nesting, start):
    """Neither construction nor a step of zero length moves ΔW, wherever B is, twice neither."""
    model = models.mlp(start=start)
    before = deltas(model)
    snapshot = models.snapshot(model)
    optimizer = MatryoshkaScaledAdam(model, lr=0.0, nesting=nesting)
    models.assert_same(models.snapshot(model), snapshot)
    models.fit(model, optimizer, 1)
    if nesting == "dylora" and start == "random":  # the module holds one of the ranks now
        with optimizer.truncated(4):
            after = deltas(model)
    else:
        after = deltas(model)
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)  # dylora: A = s Ã and back
    once = models.snapshot(model)
    if nesting != "dylora":
        models.fit(model, optimizer, 3, 1)
        models.assert_same(models.snapshot(model), once)


def test_a_frozen_A_is_refused_where_it_had_to_become_P_A():
    """Nothing but plain LoRA would be trained. An A that was brought to P A before may be frozen; B ≠ 0 tells that."""
    for nesting in ("matryoshka", "dylora", "stratified", "lora"):
        for start, allowed in (("zero", {"stratified", "lora"}), ("random", {"stratified", "lora", "matryoshka"})):
            model = models.mlp(start=start)
            optimizer = MatryoshkaScaledAdam(model, lr=1e-2, nesting=nesting)
            for layer in model.layers:
                layer.lora_A.weight.requires_grad_(False)
            if nesting in allowed:
                models.fit(model, optimizer, 2)
                continue
            before = models.snapshot(model)
            with pytest.raises(ValueError, match="nesting of first must be 'stratified' where A is frozen"):
                models.fit(model, optimizer, 1)
            models.assert_same(models.snapshot(model), before)
            assert {int(own["cadence"][0]) for own in optimizer.state.values() if "cadence" in own} == {0}
            for layer in model.layers:
                layer.lora_A.weight.requires_grad_(True)
            models.fit(model, optimizer, 1)
            for layer in model.layers:
                layer.lora_A.weight.requires_grad_(False)
            held = set()
            for i in range(12):
                models.fit(model, optimizer, 1, i)
                held.add(int(model.first.lora_A.weight.any(1).sum()))
            assert held == ({1, 2, 4} if nesting == "dylora" else {4})  # the draws go on


def test_A_becomes_P_A_also_where_B_trains_later():
    model = models.mlp(start="zero")
    A = [layer.lora_A.weight.detach().clone() for layer in model.layers]
    optimizer = MatryoshkaScaledAdam(model, lr=0.0)
    for frozen in (True, False):
        for layer in model.layers:
            layer.lora_B.weight.requires_grad_(not frozen)
        models.fit(model, optimizer, 1)
        for layer, start in zip(model.layers, A, strict=True):
            Q = torch.tensor(diagonal((1, 2, layer.rank), layer.rank), dtype=torch.float64) / S
            torch.testing.assert_close(layer.lora_A.weight, Q[:, None] * start, rtol=1e-14, atol=0)


def test_an_adapter_that_comes_with_b_keeps_its_bits_and_trains_with_its_rates():
    model = models.mlp(start="random")
    twin = explicit(model, lambda r: diagonal((1, 2, r), r))
    for layer in [*twin.layers, twin.idle]:  # the A that belongs to the Ã at hand
        layer.lora_A.weight.data.mul_(S / layer.P[:, None])
    optimizer = MatryoshkaScaledAdam(model, **HYPER)
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **HYPER)
    fit_together(model, twin, optimizer, adamw, 10)


def test_a_broken_first_step_scales_nothing():
    model, twin = models.mlp(start="zero"), models.mlp(start="zero")
    optimizer = MatryoshkaScaledAdam(model, **HYPER)
    models.loss(model, 77).backward()
    model.head.bias.grad[0] = torch.nan
    before = models.snapshot(model)
    optimizer.step()
    models.assert_same(models.snapshot(model), before)
    assert optimizer.diagnostics()["skipped_updates"] == 1
    models.fit(model, optimizer, 5)
    models.fit(twin, MatryoshkaScaledAdam(twin, **HYPER), 5)
    models.assert_same(models.snapshot(model), models.snapshot(twin))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_gradient_later_changes_nothing_either(dtype, value):
    model = models.mlp(dtype, start="zero")
    optimizer = MatryoshkaScaledAdam(model, lr=1e-2, eps=1e-3)
    models.fit(model, optimizer, 2)
    before = models.snapshot(model, optimizer)
    models.loss(model, 2).backward()
    model.second.lora_B.weight.grad.view(-1)[5] = value
    optimizer.step()
    models.assert_same(models.snapshot(model, optimizer), before, ignore=("skipped", "cadence"))


def test_resume_before_anything_moved_scales_once():
    """Saved after a step of lr 0, B is still zero and A is Ã: loading must not scale it again."""

    def schedule(t):
        return min(1.0, t / 2)

    def trained(split):
        model = models.mlp(start="zero")
        optimizer = MatryoshkaScaledAdam(model, **HYPER)
        for i in range(8):
            optimizer.param_groups[0]["lr"] = HYPER["lr"] * schedule(i)
            models.fit(model, optimizer, 1, i)
            if i == split:
                saved = models.round_trip(optimizer.state_dict())
                model = models.copied_into(model, models.mlp(seed=3))
                assert not model.first.lora_B.weight.any()
                optimizer = MatryoshkaScaledAdam(model, **HYPER)
                optimizer.load_state_dict(saved)
        return models.snapshot(model)

    models.assert_same(trained(0), trained(None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dylora_resumes_with_its_generator(dtype):
    def trained(split):
        model = models.mlp(dtype, start="zero")
        kwargs = {**HYPER, "nesting": "dylora", "eps": 1e-3}
        optimizer = MatryoshkaScaledAdam(model, generator=torch.Generator().manual_seed(5), **kwargs)
        for i in range(9):
            if i == split:
                saved = models.round_trip(optimizer.state_dict())
                model = models.copied_into(model, models.mlp(dtype, seed=3))
                optimizer = MatryoshkaScaledAdam(model, **kwargs)
                optimizer.load_state_dict(saved)
            elif i == 6:
                model, optimizer = copy.deepcopy((model, optimizer))
            models.fit(model, optimizer, 1, i)
        return models.snapshot(model, optimizer)

    models.assert_same(trained(4), trained(None), ignore=("generator", "draw"))


def test_settings_edited_in_flight_keep_the_adapter():
    model = models.mlp(start="zero")
    optimizer = MatryoshkaScaledAdam(model, **HYPER)
    models.fit(model, optimizer, 3)
    group = optimizer.param_groups[0]
    group["ranks"], group["scale"], before = (2, 3, 4), "sqrt", deltas(model)
    group["lr"] = 0.0
    models.fit(model, optimizer, 1, 3)
    assert all(map(torch.equal, deltas(model), before))
    assert optimizer.nested_ranks() == {"first": (2, 3, 4), "second": (2, 3, 4), "third": (2, 3), "idle": (2, 3, 4)}
    assert optimizer.state[model.first.lora_A.weight]["step"] == 4
    group["nesting"] = "dylora"
    with pytest.raises(ValueError, match="nesting must be what it was when the optimizer was made, 'matryoshka'"):
        models.fit(model, optimizer, 1, 4)


@pytest.mark.parametrize(
    ("start", "edit"),
    [
        ({}, {"ranks": (1, 3, 4)}),
        ({}, {"ranks": (2, 3, 4)}),
        ({"ranks": (1, 2), "scale": "rank"}, {"ranks": (1, 2, 4)}),
        ({"scale": "rank"}, {"scale": "none"}),
        ({"scale": "none"}, {"scale": "sqrt", "ranks": (1, 3, 4)}),
    ],
)
@pytest.mark.parametrize("steps", [3, 4, 5, 6])
def test_settings_of_dylora_edited_in_flight_keep_the_adapter(start, edit, steps):
    """Whatever rank the module holds then: ΔW at the largest rank, the proportions of A, and what Adam has of it."""
    model = models.mlp(start="zero")
    optimizer = MatryoshkaScaledAdam(model, **HYPER, nesting="dylora", **start)
    models.fit(model, optimizer, steps)

    def state():
        with optimizer.truncated(max(ranks[-1] for ranks in optimizer.nested_ranks().values())):
            shown = deltas(model)
        own = [optimizer.state[layer.lora_A.weight] for layer in (model.first, model.second, model.third)]
        return shown, [{key: own[key].clone() for key in ("full", "exp_avg", "exp_avg_sq")} for own in own]

    before, kept = state()
    if steps % 2:
        optimizer.param_groups = [{**optimizer.param_groups[0]}]  # another dict
    optimizer.param_groups[0].update(edit, lr=0.0)
    for p in model.parameters():
        p.grad = None if p.grad is None else torch.zeros_like(p)
    optimizer.step()
    after, now = state()
    for X, Y, was, own in zip(after, before, kept, now, strict=False):
        torch.testing.assert_close(X, Y, rtol=1e-12, atol=1e-15)
        c = own["full"].norm() / was["full"].norm()
        b1, b2 = HYPER["betas"]
        for key, factor in (("full", c), ("exp_avg", b1 / c), ("exp_avg_sq", b2 / c**2)):
            torch.testing.assert_close(own[key], factor * was[key], rtol=1e-12, atol=1e-15)
    models.fit(model, optimizer, 2, steps)


def test_ranks_in_use_cannot_be_edited_away():
    for nesting in ("matryoshka", "dylora"):
        model = models.mlp(start="zero")
        optimizer = MatryoshkaScaledAdam(model, nesting=nesting, **HYPER)
        models.fit(model, optimizer, 4)
        optimizer.param_groups[0]["ranks"], before = (1, 2), models.snapshot(model)
        for _ in range(2):
            with pytest.raises(ValueError, match="ranks must be up to 4 where that many directions are in use"):
                optimizer.step()
        models.assert_same(models.snapshot(model), before)
        optimizer.param_groups[0]["ranks"] = (4,)
        with pytest.raises(ValueError, match="ranks must be such that one is at most 3, the rank of third"):
            optimizer.step()
        optimizer.param_groups = [{**optimizer.param_groups[0], "ranks": (1, 2)}]  # another dict
        for _ in range(2):
            with pytest.raises(ValueError, match="ranks must be up to 4 where that many directions are in use"):
                optimizer.step()
        models.assert_same(models.snapshot(model), before)
        optimizer.param_groups[0]["ranks"] = (1, 3, 4)
        models.fit(model, optimizer, 1, 4)
        assert optimizer.nested_ranks()["first"] == (1, 3, 4)


def test_an_edit_that_was_refused_and_corrected_is_as_if_it_had_not_been():
    """Of one of the two groups of a pair; later one side freezes, and buckets are made anew."""

    def run(edited):
        model = models.mlp(start="zero")
        sides = [[p for name, p in model.named_parameters() if word in name] for word in ("lora_A", "lora_B")]
        optimizer = MatryoshkaScaledAdam([{"params": own} for own in sides], model=model, **HYPER)
        models.fit(model, optimizer, 4)
        if edited:
            optimizer.param_groups[0]["ranks"] = (1, 3, 4)
            with pytest.raises(ValueError, match="the same in the groups of its A and B"):
                optimizer.step()
            optimizer.param_groups[0]["ranks"] = None
        models.fit(model, optimizer, 2, 4)
        model.first.lora_A.weight.requires_grad_(False).grad = None
        models.fit(model, optimizer, 3, 6)
        return models.snapshot(model)

    models.assert_same(run(True), run(False))


def test_bf16_follows_the_explicit_form():
    """To the rounding of bf16, 2⁻⁸ a step: the same losses to a few parts in a thousand after 20 steps."""
    model = models.mlp(torch.bfloat16, start="zero")
    twin = explicit(models.mlp(torch.float32, start="zero"), lambda r: diagonal((1, 2, r), r))
    optimizer = MatryoshkaScaledAdam(model, lr=1e-2, eps=1e-6)
    first = models.fit(model, optimizer, 20)
    second = models.fit(twin, torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2), 20)
    assert first == pytest.approx(second, rel=3e-2)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert optimizer.state[model.first.lora_A.weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("build", [models.mixed, lambda: models.llama(torch.float64, start="random")])
def test_peft_layers_of_all_kinds(build):
    """Embeddings, convolutions, DoRA and linears, all of scaling 2: with one band it is AdamW with three settings."""
    model = build()
    twin = copy.deepcopy(model)
    optimizer = MatryoshkaScaledAdam(model, nesting="lora", eps=1e-4, **HYPER)
    names = {p: name for name, p in model.named_parameters()}
    A = [twin.get_parameter(names[pair.A]) for pair in optimizer.pairs]
    others = [p for p in twin.parameters() if p.requires_grad and all(p is not a for a in A)]
    halved = {"params": A, "lr": HYPER["lr"] / 2, "eps": 2e-4, "weight_decay": 2 * HYPER["weight_decay"]}
    models.fit(model, optimizer, 6)
    models.fit(twin, torch.optim.AdamW([{"params": others}, halved], eps=1e-4, **HYPER), 6)
    models.assert_near(models.snapshot(model), models.snapshot(twin), rtol=1e-9, atol=1e-12)  # six steps' rounding


def test_a_grad_scaler_changes_nothing():
    runs = []
    for scale in (1.0, 1024.0):
        model = models.mlp(start="zero", dtype=torch.float32)
        optimizer = MatryoshkaScaledAdam(model, **HYPER)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for i in range(3):
            optimizer.zero_grad()
            scaler.scale(models.loss(model, i)).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(models.snapshot(model))
    models.assert_near(*runs, rtol=1e-6, atol=1e-7)  # a power of two: exact but for the order


def test_release_is_a_call_too_many():
    optimizer = MatryoshkaScaledAdam(models.mlp())
    with pytest.warns(FutureWarning, match="remove the call"):
        optimizer.release()
