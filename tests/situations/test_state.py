"""State that is taken away, adapters that change places, steps that are skipped."""

import copy

import pytest
import torch
from grit_kit import rank_side
from peft import LoraConfig
from situations_kit import X, build, factor, loss, steps, weights

from curvopt import GritKFAC, MatryoshkaScaledAdam, find_lora_pairs
from curvopt.lora import resize_adapter
from curvopt.optim import loading


@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_a_parameter_whose_state_was_taken_starts_anew(which, how):
    """As in AdamW, and as ReLoRA's resets want it; the others go on."""
    model, twin = build(), build()
    optimizer, other = (rank_side(m, lr=1e-2, update="adam", warmup_steps=10**6) for m in (model, twin))
    adamw = torch.optim.AdamW([s.param for s in other.sides], lr=1e-2, weight_decay=0.0, fused=True)
    steps(model, optimizer, 3)
    steps(twin, adamw, 3)
    for o, p in ((optimizer, optimizer.sides[which].param), (adamw, other.sides[which].param)):
        if how == "deleted":
            del o.state[p]
        else:
            o.state[p] = {}
    steps(model, optimizer, 2)
    steps(twin, adamw, 2)
    for a, b in zip(optimizer.sides, other.sides, strict=True):
        assert torch.equal(a.param, b.param), a.name
        assert optimizer.state[a.param]["step"] == adamw.state[b.param]["step"]
    assert len(optimizer.state_dict()["state"]) == 4


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"modules_to_save": ["4"]}, {"bias": "lora_only"}], ids=str)
def test_all_parts_of_a_resting_adapter_train_once_it_is_active(extra):
    """Magnitudes, saved modules and biases too, as ``AdamW(model.parameters())`` trains them."""
    model = build(**extra)
    second = {} if "bias" in extra else extra  # PEFT takes one adapter with biases
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **second))
    model.double()
    model.set_adapter("second")
    optimizer = rank_side(model, lr=1e-2, statistics="gradient")
    steps(model, optimizer)
    model.set_adapter("default")
    before = weights(model)
    steps(model, optimizer, 2)
    active = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("magnitude" in n or "modules_to_save" in n or n.endswith("bias") for n in active)
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == (p.grad is not None and bool(p.grad.any())), name
    assert all(not torch.equal(model.get_parameter(n), before[n]) for n in active)


def test_a_parameter_unfrozen_later_is_told_of():
    model = build()
    optimizer = rank_side(model, lr=1e-2)
    steps(model, optimizer)
    head = model.base_model.model[4]
    head.weight.requires_grad_()
    for p in optimizer.pairs[1].A, optimizer.pairs[1].B:
        p.requires_grad_(False)  # whatever changes which parameters have gradients is a reason to look
    with pytest.warns(UserWarning, match=r"1 parameters have gradients but are in no param group.*4\.weight"):
        steps(model, optimizer)


@pytest.mark.parametrize("skipped", [1, 10, 11])
def test_what_a_skipped_step_should_have_done_stays_due(skipped):
    """Observation and matrices are not put off by a whole period."""
    model = build()
    optimizer = rank_side(model, lr=1e-2, update="eigen", factor_every=10, inverse_every=10)
    observed, bases = [], []
    for i in range(1, 14):
        optimizer.zero_grad()
        loss(model).backward()
        if i == skipped:
            optimizer.pairs[0].A.grad.fill_(torch.nan)
        optimizer.step()
        state = optimizer.state[optimizer.pairs[0].A]
        observed.append(int(state["observed"]))
        bases.append(state["basis"].clone())
    due = [1, 11] if skipped == 10 else [2, 11] if skipped == 1 else [1, 12]
    assert [i + 1 for i in range(13) if observed[i] > ([0, *observed][i])] == due
    assert [i + 1 for i in range(1, 13) if not torch.equal(bases[i], bases[i - 1])] == [i for i in due if i > 1]
    assert int(optimizer.state[optimizer.pairs[0].A]["cadence"][0]) == 13


def test_what_is_due_survives_a_save():
    model = build()
    optimizer = rank_side(model, lr=1e-2, factor_every=10)
    loss(model).backward()
    optimizer.pairs[0].A.grad.fill_(torch.nan)
    optimizer.step()
    other = rank_side(model, lr=1e-2, factor_every=10)
    other.load_state_dict(optimizer.state_dict())
    assert factor(optimizer).trace() == 0
    steps(model, other)
    assert factor(other).trace() > 0


def test_the_sampled_rank_survives_without_group_settings():
    """torch's own flattening keeps what is in ``state``; settings of groups may be the user's to give."""
    ends = []
    for resumed in (False, True):
        model = build(0.0)
        optimizer = MatryoshkaScaledAdam(model, lr=1e-2, nesting="dylora")
        steps(model, optimizer, 3)
        if resumed:
            saved = optimizer.state_dict()
            optimizer = MatryoshkaScaledAdam(model, lr=1e-2, nesting="dylora")
            own = optimizer.state_dict()["param_groups"]
            assert all("generator" not in g and "draw" not in g for g in saved["param_groups"])
            optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
        steps(model, optimizer, 3)
        ends.append(weights(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    assert X.shape == (32, 8)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_replaced_is_the_one_that_counts(key):
    model, twin = build(), build()
    optimizer, other = (rank_side(m, lr=1e-2) for m in (model, twin))
    steps(model, optimizer, 2)
    steps(twin, other, 2)
    p, q = optimizer.sides[0].param, other.sides[0].param
    optimizer.state[p][key] = torch.zeros_like(optimizer.state[p][key])
    other.state[q][key].zero_()  # the same in place
    steps(model, optimizer)
    steps(twin, other)
    assert torch.equal(p, q) and torch.equal(optimizer.state[p][key], other.state[q][key])
    assert optimizer.state[p][key].any()


def test_saved_steps_go_where_the_parameters_are():
    """torch leaves a saved ``step`` on the device that it was saved on, or mapped to."""
    p = torch.nn.Parameter(torch.zeros(2, device="meta"))
    states = {p: {"step": torch.tensor(3.0)}}
    saved = {"param_groups": [{"params": [0]}], "state": {0: {"step": torch.tensor(3.0)}}}
    loading.restore(states, [{"params": [p]}], saved, frozenset())
    assert states[p]["step"].device == p.device and states[p]["step"].dtype == torch.float32


def other(model, **kwargs):
    """Add a resting adapter."""
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **kwargs))
    return model.double()


@pytest.mark.parametrize("make", [GritKFAC, MatryoshkaScaledAdam])
@pytest.mark.parametrize("again", [False, True], ids=["another", "of the same name"])
@pytest.mark.parametrize("by", ["optimizer", "model"])
def test_an_adapter_added_later_is_told_of(make, again, by):
    """Also where the model resets gradients, and those of a deleted adapter stay."""
    model = build()
    optimizer = make(model, lr=1e-2)
    steps(model, optimizer)
    if again:
        model.delete_adapter("default")
        model.add_adapter("default", LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
        model.double().set_adapter("default")
    else:
        other(model).set_adapter("other")
    (optimizer if by == "optimizer" else model).zero_grad()
    loss(model).backward()
    with pytest.warns(UserWarning, match="4 parameters have gradients but are in no param group.*frozen or not there"):
        optimizer.step()


@pytest.mark.parametrize("case", ["the second", "the first of two", "later"])
def test_a_successor_is_told_of_whatever_else_trains(case):
    """The gradients of a deleted adapter stay where the model resets them; what trains elsewhere says nothing of it."""
    model = other(build())
    gone = "other" if case == "the second" else "default"
    model.set_adapter(gone)
    model.base_model.model[4].bias.requires_grad_(True)  # no adapter
    optimizer = GritKFAC(model, lr=1e-2)
    steps(model, optimizer)
    model.delete_adapter(gone)
    if case == "later":
        optimizer.step()
    model.add_adapter("new" if case == "the first of two" else gone, LoraConfig(r=4, target_modules=["0", "2"]))
    model.double().set_adapter("new" if case == "the first of two" else gone)
    model.zero_grad()
    loss(model).backward()
    with pytest.warns(UserWarning, match="4 parameters have gradients but are in no param group"):
        optimizer.step()


@pytest.mark.parametrize("when", ["at first", "after a step", "after a load"])
@pytest.mark.parametrize(
    "make",
    [
        GritKFAC,
        lambda model, **kwargs: GritKFAC(model, statistics="activation", **kwargs),
        lambda model, **kwargs: GritKFAC(model, nested_ranks=[1, 2], **kwargs),
        lambda model, **kwargs: MatryoshkaScaledAdam(model, nesting="stratified", **kwargs),
    ],
    ids=["polar", "activation", "nested", "stratified"],
)
def test_a_resting_adapter_may_be_deleted(make, when):
    """The run goes on as that of a model that never had it."""
    model, twin = other(build()), build()
    optimizer, alone = make(model, lr=1e-2), make(twin, lr=1e-2)
    both = ((model, optimizer), (twin, alone))
    for trained, its in both if when != "at first" else ():
        steps(trained, its)
        if when == "after a load":
            its.load_state_dict(its.state_dict())
    model.delete_adapter("other")
    for trained, its in both:
        steps(trained, its, 2)
    assert weights(model).keys() == weights(twin).keys()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert [p.name for p in optimizer.pairs] == [p.name for p in alone.pairs]
    assert len(optimizer.sides) == 4 and optimizer.diagnostics()["pairs"].keys() == alone.diagnostics()["pairs"].keys()
    optimizer.load_state_dict(optimizer.state_dict())
    steps(model, optimizer)


@pytest.mark.parametrize("nesting", ["matryoshka", "dylora", "stratified"])
def test_nested_ranks_after_an_adapter_was_deleted(nesting):
    model = other(build())
    optimizer = MatryoshkaScaledAdam(model, lr=1e-2, nesting=nesting)
    steps(model, optimizer)
    model.delete_adapter("other")
    with optimizer.truncated(2):
        loss(model)
    optimizer.param_groups[0]["ranks"] = (1, 4)
    steps(model, optimizer, 2)
    assert set(optimizer.nested_ranks().values()) == {(1, 4)}
    with optimizer.truncated(1):
        loss(model)


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("make", [GritKFAC, MatryoshkaScaledAdam])
def test_a_pair_that_was_resized_needs_another_state(make, rank):
    model = build()
    optimizer = make(model, lr=1e-2)
    steps(model, optimizer, 2)
    resize_adapter(model, {pair.name: rank for pair in find_lora_pairs(model)})
    before = weights(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"A of .* must stay \(4, 8\), as its .* state is, got \({rank}, 8"):
            steps(model, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if make is GritKFAC:  # without that state it goes on as a new optimizer
        twin = copy.deepcopy(model)
        for side in optimizer.sides:
            del optimizer.state[side.param]
        steps(model, optimizer, 2)
        steps(twin, make(twin, lr=1e-2), 2)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
