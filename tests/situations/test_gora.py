"""GoRAInit where loops are not plain: dropped batches, several backward passes, schedulers, half precision."""

import copy
import re

import pytest
import torch
from gora_models import published
from peft import LoraConfig, get_peft_model
from situations_kit import X, Y, build, loss, steps, weights
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from transformers import LlamaConfig, LlamaForCausalLM

from curvopt import GoRAInit, find_lora_pairs

SET = {"rank": 3, "min_rank": 1, "max_rank": 6, "calibration_steps": 2}
DROPS = {
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer.zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "by hand": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
}
KINDS = {
    "gora": {},
    "grad_b": {"importance": "grad_b", "max_rank": 4},
    "whitened": {"start": "whitened", "allocation": "spectrum", "calibration_steps": 3},
}


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def result(spoil, kind="gora", steps=None, after=None):
    """Plan and weights after a calibration; ``spoil(model, optimizer)`` comes before each batch."""
    torch.manual_seed(3)
    model = build(0)
    optimizer = published(model, **{**SET, **KINDS[kind]})
    torch.manual_seed(4)
    for i in range(steps or optimizer.param_groups[0]["calibration_steps"]):
        optimizer.zero_grad()
        spoil(model, optimizer)
        loss(model, X.roll(i, 0)).backward()
        if after is not None:
            after(model, optimizer)
        optimizer.step()
    assert optimizer.ready
    return optimizer.plan, weights(model)


def same(one, two, rtol=0.0):
    assert one[0].ranks == two[0].ranks
    for name, p in one[1].items():
        torch.testing.assert_close(p, two[1][name], rtol=rtol, atol=rtol * 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", DROPS)
def test_a_dropped_batch_leaves_no_trace(drop, kind):
    def spoil(model, optimizer):
        (1e4 * loss(model)).backward()
        DROPS[drop](model, optimizer)

    same(result(spoil, kind), result(lambda m, o: None, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_was_kept_leaves_one(kind):
    """The negative control."""
    kept = result(lambda m, o: (1e4 * loss(m)).backward(), kind)
    clean = result(lambda m, o: None, kind)
    assert any(not torch.equal(p, clean[1][name]) for name, p in kept[1].items())


def test_gradients_dropped_right_before_the_step_are_not_counted():
    model = build(0)
    optimizer = published(model, **SET)
    (1e4 * loss(model)).backward()
    model.zero_grad()
    optimizer.step()
    loss(model).backward()
    optimizer.step()
    twin = build(0)
    once = published(twin, **{**SET, "calibration_steps": 1})
    loss(twin).backward()
    once.step()
    assert optimizer.plan == once.plan


def test_a_backward_that_broke_off_leaves_nothing():
    """An out-of-memory error inside the backward: what came by then belongs to no gradient."""

    def spoil(model, optimizer):
        def broken(g):
            raise RuntimeError("out of memory")

        y = model.base_model.model[:2](X)
        y.register_hook(broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.base_model.model[2:](y).square().sum().mul(1e4).backward()
        model.zero_grad()

    same(result(spoil), result(lambda m, o: None))


def sum_of_two(model, way):
    y = model(X)
    one, two = nn.functional.cross_entropy(y, Y), y.square().mean()
    if way == "sum":
        (one + two).backward()
    elif way == "two passes":
        one.backward(retain_graph=True)
        two.backward()
    else:
        torch.autograd.grad(one, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
        (one + two).backward()


@pytest.mark.parametrize("way", ["two passes", "autograd.grad first"])
def test_several_backward_passes_over_one_graph_are_that_of_their_sum(way):
    found = []
    for each in ("sum", way):
        model = build(0)
        optimizer = published(model, **SET)
        for _ in range(2):
            optimizer.zero_grad()
            sum_of_two(model, each)
            optimizer.step()
        found.append((optimizer.plan, weights(model)))
    same(*found, rtol=1e-9)  # two orders of summation of float64 products


def test_a_penalty_by_autograd_grad_on_another_graph_counts_nothing():
    def spoil(model, optimizer):
        torch.autograd.grad(1e4 * loss(model), [p for p in model.parameters() if p.requires_grad])

    same(result(spoil), result(lambda m, o: None))


def force_loss(model):
    x = X.clone().requires_grad_()
    (force,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return force.square().mean()


def test_a_gradient_that_is_differentiated_again_is_refused_by_hooks_and_right_from_B():
    model = build(0)
    optimizer = published(model, **SET)
    force_loss(model).backward()
    with pytest.raises(ValueError, match="importance must be 'grad_b' where a backward runs with create_graph=True"):
        optimizer.step()
    optimizer = published(model, **{**SET, **KINDS["grad_b"], "calibration_steps": 1})
    model.zero_grad()
    before = force_loss(model)
    before.backward()
    optimizer.step()
    assert force_loss(model) < before


def test_clipping_acts_on_the_mean_gradient_as_on_that_of_B():
    def clip(model, optimizer):
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e-3)

    fixed = {"rank": 4, "min_rank": 4, "max_rank": 4, "calibration_steps": 2}
    found = []
    for importance in ("frobenius", "grad_b"):
        model = build(0)
        optimizer = published(model, **fixed, importance=importance)
        for i in range(2):
            optimizer.zero_grad()
            loss(model, X.roll(i, 0)).backward()
            clip(model, optimizer)
            optimizer.step()
        found.append((optimizer.plan, weights(model)))
    same(*found, rtol=1e-8)


def test_steps_are_counted_beyond_256_under_a_bf16_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        for importance in ("frobenius", "grad_b"):
            model = build(0)
            optimizer = published(model, **{**SET, "max_rank": 4, "calibration_steps": 400}, importance=importance)
            for _ in range(300):
                optimizer.zero_grad()
                loss(model).backward()
                optimizer.step()
            seen = [state["seen"] for state in optimizer.state.values() if "seen" in state]
            assert seen and all(float(n) == 300 for n in seen)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("sgd", [False, True], ids=["betas", "momentum"])
@pytest.mark.parametrize("cls", [OneCycleLR, CyclicLR])
def test_schedulers_that_cycle_momentum_reach_the_delegate(cls, sgd):
    model = build(0)
    params = [p for p in model.parameters() if p.requires_grad]
    made = (lambda m: torch.optim.SGD(params, lr=0.1, momentum=0.5)) if sgd else adamw
    optimizer = published(model, **SET, then=made)
    schedule = OneCycleLR(optimizer, 1.0, 12) if cls is OneCycleLR else CyclicLR(optimizer, 0.1, 1.0, 3)
    seen = set()
    for _ in range(10):
        optimizer.zero_grad()
        loss(model).backward()
        wanted = optimizer.param_groups[0]["betas"][0]
        optimizer.step()
        if optimizer.delegate is not None and optimizer.ready:
            g = optimizer.delegate.param_groups[0]
            assert (g["momentum"] if sgd else g["betas"][0]) == wanted
            seen.add(wanted)
        schedule.step()
    assert len(seen) > 3


def test_what_is_edited_in_a_group_reaches_the_delegate_and_what_is_not_does_not():
    model = build(0)
    optimizer = published(model, **SET, then=adamw)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    g = optimizer.delegate.param_groups[0]
    assert g["betas"] == (0.9, 0.999) and g["weight_decay"] == 0.01
    optimizer.param_groups[0]["weight_decay"] = 0.5
    g["eps"] = 1e-5  # its own groups may be edited, too
    optimizer.step()
    assert g["weight_decay"] == 0.5 and g["eps"] == 1e-5
    g["weight_decay"] = 0.25
    optimizer.step()
    assert g["weight_decay"] == 0.25


def test_no_adapters_is_said_without_advice_that_does_not_apply():
    with pytest.raises(ValueError, match="no LoRA pair found") as error:
        published(nn.Linear(4, 4))
    assert "require_pairs" not in str(error.value)


def test_groups_hold_nothing_internal_and_old_states_load():
    model = build(0)
    optimizer = published(model, **{**SET, "calibration_steps": 3})
    assert not {"clock", "staged"} & optimizer.param_groups[0].keys()
    loss(model).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    old = {**saved, "gora": {"plan": None, "delegate": None},
           "param_groups": [{**g, "clock": 1, "staged": False} for g in saved["param_groups"]]}  # fmt: skip
    for state in (saved, old):
        again = published(build(0), **{**SET, "calibration_steps": 3})
        again.load_state_dict(state)
        assert again.diagnostics()["steps"] == 1 and "clock" not in again.param_groups[0]


# ---------------------------------------------------------------------------------------------- no hook is called


class Fused(nn.Module):
    """Computes what the model does, without calling its layers: no hook of theirs runs."""

    def __init__(self, model, around=("0", "2")):
        super().__init__()
        self.model, self.around = model, around

    def forward(self, x):
        for name, layer in self.model.base_model.model.named_children():
            x = layer.forward(x) if name in self.around else layer(x)
        return x


def compiled_before(model):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    loss(compiled).backward()
    model.zero_grad()
    return compiled


def skip_where_compiled_models_call_later_hooks():
    """As torch 2.6 does: nothing is bypassed then."""
    model, called = build(0), []
    forward = compiled_before(model)
    model.base_model.model[0].register_forward_hook(lambda *_: called.append(True))
    forward(X)
    if called:
        pytest.skip("hooks that come after the compilation are called")


@pytest.mark.parametrize("kind", ["gora", "whitened"])
@pytest.mark.parametrize(
    ("around", "layers"),
    [(Fused, 2), (lambda model: Fused(model, ("2",)), 1), (compiled_before, 2)],
    ids=["fused", "one of two", "compiled before"],
)
def test_a_forward_that_bypasses_the_layers_ends_in_an_error_that_says_so(around, layers, kind):
    if around is compiled_before:
        skip_where_compiled_models_call_later_hooks()
    model = build(0)
    forward = around(model)
    optimizer = published(model, **{**SET, **KINDS[kind]})
    before = weights(model)
    for i in range(optimizer.param_groups[0]["calibration_steps"]):
        loss(forward).backward()
        if i + 1 < optimizer.param_groups[0]["calibration_steps"]:
            optimizer.step()
    with pytest.raises(ValueError, match=f"importance must be 'grad_b' with start='gora', .*: {layers} layers .*fused"):
        optimizer.step()
    assert not optimizer.ready
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_after_a_reset_of_the_compiler_the_hooks_are_called():
    skip_where_compiled_models_call_later_hooks()
    model = build(0)
    forward = compiled_before(model)
    optimizer = GoRAInit(model, start="gora", calibration_steps=2)
    for i in range(2):
        if i == 1:
            with pytest.raises(ValueError, match=r"call torch\.compiler\.reset\(\) instead"):
                optimizer.zero_grad(), loss(forward).backward(), optimizer.step()
            torch.compiler.reset()
        optimizer.zero_grad(), loss(forward).backward(), optimizer.step()
    assert optimizer.ready
    twin = build(0)
    plain = GoRAInit(twin, start="gora", calibration_steps=1)
    loss(twin).backward()
    plain.step()
    same((optimizer.plan, weights(model)), (plain.plan, weights(twin)), rtol=1e-12)


@pytest.mark.parametrize("around", [Fused, compiled_before], ids=["fused", "compiled before"])
def test_what_that_error_advises_needs_no_hooks(around):
    same(*(calibrated_by_B(each) for each in (around, lambda model: model)))


def calibrated_by_B(around):
    model = build(0)
    forward = around(model)
    optimizer = GoRAInit(model, importance="grad_b", start="gora", calibration_steps=2)
    for i in range(2):
        optimizer.zero_grad()
        loss(forward, X.roll(i, 0)).backward()
        optimizer.step()
    assert optimizer.ready and all(pair.B.any() for pair in optimizer.pairs)
    return optimizer.plan, weights(model)


@pytest.mark.parametrize("spoil", ["nan", "zero", "none"])
def test_gradients_that_count_nothing_are_no_bypass(spoil, caplog):
    """Not finite, or zero as those of a penalty on B alone are at the start: the calibration goes on."""
    model = build(0)
    optimizer = published(model, **SET)
    for _ in range(3):
        optimizer.zero_grad()
        if spoil == "zero":
            sum(pair.B.square().sum() for pair in optimizer.pairs).backward()
        elif spoil == "nan":
            (torch.nan * loss(model)).backward()
        optimizer.step()
    assert not optimizer.ready and "3 calibration steps had no finite gradient to sum" in caplog.text
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()
    assert optimizer.ready


# ---------------------------------------------------------------------------------------------- edited groups


def calibrated(edit=None, at=1, **settings):
    """Plan and weights after calibration of one and the same batch; ``edit(optimizer)`` comes before step ``at``."""
    model = build(0)
    optimizer = GoRAInit(model, generator=torch.Generator().manual_seed(2), **settings)
    for i in range(8):
        if i == at and edit is not None:
            edit(optimizer)
        if not optimizer.ready:
            steps(model, optimizer)
    return optimizer.plan, weights(model), optimizer.diagnostics()["steps"]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"start": "gora"}, "start must be what it was when the optimizer was made, 'whitened'"),
        ({"start": "none"}, "start must be one of 'gora', 'whitened', 'whitened-random', got 'none'"),
        ({"importance": "grad_b"}, "importance must be what it was when the optimizer was made, 'mean_abs'"),
        ({"allocation": "spectrum"}, "allocation must be what it was when the optimizer was made, 'uniform'"),
        ({"rank": 2}, "rank must be what it was when the optimizer was made, None"),
        ({"min_rank": 2}, "min_rank must be None with allocation='uniform'"),
        ({"resize": False}, "resize must be what it was when the optimizer was made, True"),
        ({"offload": True}, "offload must be what it was when the optimizer was made, False"),
        ({"calibration_steps": "x"}, "calibration_steps must be an integer ≥ 1, got 'x'"),
        ({"calibration_steps": 1}, "calibration_steps must be at least 2"),
        ({"convergence": 0}, "convergence must be None or a number > 0, got 0"),
        ({"lr": -1.0}, "lr must be a number ≥ 0, got -1.0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("new", [False, True], ids=["edited", "new dict"])
def test_edits_during_the_calibration_are_validated(edit, message, at, new):
    """At every step until they are taken back; the result then is that of a run without."""

    def spoil(optimizer):
        model, kept = optimizer.model, dict(optimizer.param_groups[0])
        before = weights(model)
        if new:
            optimizer.param_groups = [{**kept, **edit}]
        else:
            optimizer.param_groups[0].update(edit)
        for _ in range(2):
            with pytest.raises(ValueError, match=re.escape(message)):
                steps(model, optimizer)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        optimizer.param_groups[0].update({key: kept[key] for key in edit})

    spoiled, clean = calibrated(spoil, at), calibrated()
    same(spoiled, clean)
    assert spoiled[2] == clean[2] == 4


@pytest.mark.parametrize(
    "edit",
    [{"calibration_steps": 3}, {"calibration_steps": 6}, {"init_lr": 0.3}, {"convergence": 0.5},
     {"keep_scaling": False}],
    ids=str,
)  # fmt: skip
def test_edits_of_what_is_read_later_count(edit):
    settings = {"start": "gora", "allocation": "exact", "rank": 2, "max_rank": 6}
    edited = calibrated(lambda optimizer: optimizer.param_groups[0].update(edit), **settings)
    made, plain = calibrated(**{**settings, **edit}), calibrated(**settings)
    same(edited, made)
    assert edited[2] == made[2]
    assert edited[2] != plain[2] or any(not torch.equal(p, plain[1][name]) for name, p in made[1].items())


@pytest.mark.parametrize("kind", [{"start": "gora"}, {}, {"importance": "grad_b", "start": "gora"}], ids=str)
def test_new_group_dicts_go_on_with_the_sums(kind):
    def renew(optimizer):
        optimizer.param_groups = [dict(optimizer.param_groups[0])]

    same(calibrated(renew, 2, **kind), calibrated(**kind), rtol=1e-12)


def test_a_pair_that_was_unfrozen_later_is_named_as_left_out():
    model = build(0)
    pairs = find_lora_pairs(model)
    for p in (pairs[1].A, pairs[1].B):
        p.requires_grad_(False)
    optimizer = GoRAInit(model, start="gora", calibration_steps=2)
    assert optimizer.diagnostics()["left_out"] == [pairs[1].name]
    for p in (pairs[1].A, pairs[1].B):
        p.requires_grad_(True)
    for _ in range(2):
        assert optimizer.diagnostics()["left_out"] == [pairs[1].name]
        steps(model, optimizer)
    assert optimizer.ready and optimizer.diagnostics()["left_out"] == [pairs[1].name]
    assert pairs[0].B.any() and not pairs[1].B.any()
    assert copy.deepcopy((model, optimizer))[1].diagnostics() == optimizer.diagnostics()
    whole = GoRAInit(build(0), start="gora")
    assert whole.diagnostics()["left_out"] == []


class Experts(nn.Module):
    """Ids through an embedding, a common layer and one of two experts."""

    def __init__(self):
        super().__init__()
        self.embed, self.common = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, ids, expert=0):
        return self.experts[expert](torch.tanh(self.common(self.embed(ids))))


IDS = torch.arange(32) * 7 % 12


def experts(*targets):
    torch.manual_seed(0)
    return get_peft_model(Experts(), LoraConfig(r=4, target_modules=list(targets))).double()


def step(model, optimizer, scale=1.0, clip=None, expert=0, factor=1.0):
    """One step, its loss times ``factor`` and its gradients unscaled and clipped as a loop would."""
    optimizer.zero_grad()
    (nn.functional.cross_entropy(model(IDS, expert), Y) * scale * factor).backward()
    for p in (p for p in model.parameters() if p.grad is not None):
        p.grad.div_(scale)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


@pytest.mark.parametrize("targets", [("embed", "common"), ("embed",)], ids=["with others", "alone"])
@pytest.mark.parametrize("kind", ["gora", "exact", "spectrum"])
def test_scaling_and_clipping_act_on_embeddings_too(kind, targets):
    """PEFT starts their A at zero, so that B's gradient, zero as well, tells of neither."""
    settings = {
        "gora": {"start": "gora"},
        "exact": {"start": "gora", "allocation": "exact", "compare": "role"},
        "spectrum": {"allocation": "spectrum", "min_rank": 1, "max_rank": 8},
    }[kind]

    def outcome(**loop):
        model = experts(*targets)
        optimizer = GoRAInit(model, calibration_steps=3, generator=torch.Generator().manual_seed(1), **settings)
        while not optimizer.ready:
            step(model, optimizer, **loop)
        return optimizer.plan, weights(model)

    plain = outcome()
    same(outcome(scale=2.0**16), plain, rtol=1e-9)
    smaller, clipped = outcome(factor=1e-3), outcome(clip=1e-6)
    for plan, _ in (smaller, clipped):
        assert plan.ranks == plain[0].ranks
    if kind != "spectrum":
        norm = {name: p.norm() for name, p in plain[1].items() if "embedding_B" in name}
        for _, found in (smaller, clipped):
            assert all(found[name].norm() < 0.01 * n and n > 0 for name, n in norm.items())


def test_a_dropped_gradient_is_no_sign_that_importances_have_settled():
    def taken(at=None, tolerance=1e-12):
        model = build(0)
        optimizer = GoRAInit(model, start="gora", allocation="exact", calibration_steps=9, convergence=tolerance)
        for i in range(9):
            optimizer.zero_grad()
            (loss(model, X.roll(i, 0)) * (torch.nan if i == at else 1)).backward()
            optimizer.step()
            if optimizer.ready:
                return i + 1
        raise AssertionError("it never ends")

    assert taken() == taken(2) == taken(3) == 9
    assert taken(tolerance=10.0) < taken(at=taken(tolerance=10.0) - 1, tolerance=10.0) < 9


def test_a_layer_that_was_reached_once_is_waited_for(caplog):
    """Its one gradient went into R_x and R_g."""
    model = experts("common", "0", "1")
    optimizer = GoRAInit(model, calibration_steps=3)
    for expert in (0, 1, 0, 0):
        step(model, optimizer, expert=expert)
        assert not optimizer.ready
    assert "4 calibration steps had no finite gradient to sum, of some layers; going on" in caplog.text
    early = copy.deepcopy((model, optimizer))
    step(model, optimizer, expert=1)
    assert optimizer.ready and len(optimizer.plan.ranks) == 3
    step(*early)
    with pytest.raises(ValueError, match=r"1 layers received one finite gradient, .* \(.*experts\.1\): freeze"):
        step(*early)


def test_tied_embeddings_need_no_other_rank():
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(LlamaForCausalLM(shape), config)
    assert any(pair.shared for pair in find_lora_pairs(model))
    optimizer, ids = GoRAInit(model, calibration_steps=2), torch.arange(16)[None]
    while not optimizer.ready:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert set(optimizer.ranks().values()) == {4}
    with pytest.raises(ValueError, match="cannot be resized"):
        GoRAInit(model, allocation="spectrum", min_rank=1, max_rank=8, reset=True)


def test_uniform_ranks_are_those_of_the_plan():
    """A layer narrower than the rank gets what fits it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "2"])).double()
    optimizer = GoRAInit(model, calibration_steps=2)
    steps(model, optimizer, 2)
    assert optimizer.ready and list(optimizer.ranks().values()) == [4, 3]
    assert {pair.name: pair.rank for pair in find_lora_pairs(model)} == optimizer.ranks() == optimizer.plan.ranks


def test_gradients_of_embeddings_that_were_dropped_in_place_do_not_count():
    def start(dropped):
        model = experts("embed", "common")
        optimizer = GoRAInit(model, start="gora", calibration_steps=2, generator=torch.Generator().manual_seed(1))
        for i in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(IDS), Y).backward()
            if i == dropped:
                model.zero_grad(set_to_none=False)
            optimizer.step()
        return {name: p for name, p in weights(model).items() if "_B" in name}

    whole, half = start(None), start(1)
    for name, p in whole.items():  # a step without a gradient counts as one: the mean is half
        torch.testing.assert_close(half[name], p / 2, rtol=1e-9, atol=0)
        assert p.any()
