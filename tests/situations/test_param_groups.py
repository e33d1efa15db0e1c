"""What stands in ``param_groups`` at a step is what trains, whoever put it there; or an error says why it does not."""

import copy
import re

import pytest
import torch
from grit_kit import rank_side
from situations_kit import build, loss, steps, weights
from torch import nn

from curvopt import GritKFAC, MatryoshkaScaledAdam, find_lora_pairs

optimizers = pytest.mark.parametrize("make", [GritKFAC, MatryoshkaScaledAdam])


@optimizers
@pytest.mark.parametrize("kind", ["flat", "copies"])
def test_flat_and_master_copies_are_refused(make, kind):
    """DeepSpeed's ZeRO puts one flat tensor into the groups, bf16 masters put float32 twins there."""
    model = build()
    optimizer = make(model, lr=1e-2)
    old = optimizer.param_groups[0]["params"]
    loss(model).backward()
    if kind == "flat":
        new = [nn.Parameter(torch.cat([p.detach().flatten() for p in old]))]
        new[0].grad = torch.cat([p.grad.flatten() for p in old])
    else:
        new = [nn.Parameter(p.detach().clone()) for p in old]
        for p, q in zip(new, old, strict=True):
            p.grad = q.grad.clone()
    optimizer.param_groups[0]["params"] = new
    before = [p.detach().clone() for p in new]
    with pytest.raises(RuntimeError, match=r"2 LoRA pairs \(.*DeepSpeed ZeRO.*DistributedDataParallel or FSDP2"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(new, before, strict=True))


@optimizers
def test_an_appended_tensor_trains_as_adamw_trains_it(make):
    model, extra = build(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = make(model, lr=1e-2)
    steps(model, optimizer)
    optimizer.param_groups[0]["params"].append(extra)
    twin = nn.Parameter(extra.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=1e-2, betas=optimizer.param_groups[0]["betas"], weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        extra.grad = twin.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        optimizer.step()
        adamw.step()
    assert torch.equal(extra, twin)


@optimizers
def test_a_pair_that_was_appended_is_found(make):
    model, twin = build(), build()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    first = [p for n, p in model.named_parameters() if p.requires_grad and ".0." in n]
    kind = {"statistics": "gradient"} if make is GritKFAC else {}  # a hook sees a layer from the next batch on
    optimizer = make([{"params": first}], lr=1e-2, model=model, **kind)
    optimizer.param_groups[0]["params"].extend(p for p in model.parameters() if p.requires_grad and p not in set(first))
    steps(model, optimizer, 3)
    steps(twin, make(twin, lr=1e-2, **kind), 3)
    assert len(optimizer.pairs) == 2
    for name in names:
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name)), name


@optimizers
def test_what_was_removed_does_not_train(make):
    model = build()
    optimizer = make(model, lr=1e-2)
    steps(model, optimizer)
    kept = [p for n, p in model.named_parameters() if p.requires_grad and ".0." in n]
    optimizer.param_groups[0]["params"][:] = kept
    before = weights(model)
    steps(model, optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad or ".0." not in name), name


@optimizers
def test_new_group_dicts_go_on(make):
    model, twin = build(), build()
    optimizer, other = make(model, lr=1e-2), make(twin, lr=1e-2)
    steps(model, optimizer, 2)
    steps(twin, other, 2)
    optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 3e-3}]
    other.param_groups[0]["lr"] = 3e-3
    steps(model, optimizer, 2)
    steps(twin, other, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"damping": -1.0}, "damping must be a number > 0, or a 0-d tensor, got -1.0"),
        ({"lr": -1.0}, "lr must be a number ≥ 0, got -1.0"),
        ({"update": "adam"}, "update must be what it was at the first step, 'polar'"),
        ({"sides": "paper"}, "sides must be what it was at the first step, 'kfac'"),
        ({"statistics": "gradient"}, "statistics must be what it was at the first step, 'activation'"),
        ({"inverse_every": 0}, "inverse_every must be an integer ≥ 1, got 0"),
        ({"betas": (2, 0)}, "betas must be two numbers in [0, 1), got (2, 0)"),
        ({"outer_rank": 4}, "outer_rank must be what it was at the first step, 0"),
        ({"reprojection": "paper"}, "reprojection must be none of ('paper', 'paper-one-sided'), as at the first step"),
        ({"outer_rank": "4"}, "outer_rank must be an integer ≥ 0, got '4'"),
        ({"eps": None}, "eps must be a number ≥ 0, got None"),
        ({"rank_threshold": 2}, "rank_threshold must be None or a number in (0, 1], got 2"),
        ({"min_rank": 99}, "min_rank must be at most the rank of every pair"),
    ],
    ids=str,
)
def test_edits_are_validated(edit, message):
    """At every step until they are taken back; the run then is that of a twin whose groups were never edited."""
    model, twin = build(), build()
    optimizer, other = rank_side(model, lr=1e-2), rank_side(twin, lr=1e-2)
    steps(model, optimizer), steps(twin, other)
    before = weights(model)
    kept = {key: optimizer.param_groups[0][key] for key in edit}
    optimizer.param_groups[0].update(edit)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            steps(model, optimizer)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    optimizer.param_groups[0].update(kept)
    steps(model, optimizer, 2), steps(twin, other, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"betas": [0.9, 1.0]}, "betas must be two numbers in [0, 1)"),
        ({"ranks": [2, 1]}, "ranks must be None or ascending integers ≥ 1"),
        ({"nesting": "dylora"}, "nesting must be what it was when the optimizer was made, 'matryoshka'"),
        ({"scale": "half"}, "scale must be one of 'none', 'rank', 'sqrt'"),
    ],
    ids=str,
)
def test_edits_of_nested_settings_are_validated(edit, message):
    model = build()
    optimizer = MatryoshkaScaledAdam(model, lr=1e-2)
    steps(model, optimizer)
    before = weights(model)
    optimizer.param_groups[0].update(edit)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            steps(model, optimizer)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_edits_that_set_the_two_sides_of_a_pair_at_odds_are_refused_until_taken_back():
    model = build()
    first = find_lora_pairs(model)[0]
    groups = [
        {"params": [first.A]},
        {"params": [p for p in model.parameters() if p.requires_grad and p is not first.A]},
    ]
    optimizer = GritKFAC(groups, lr=1e-2, model=model)
    steps(model, optimizer)
    optimizer.param_groups[0]["damping"] = 0.5
    for _ in range(2):
        with pytest.raises(ValueError, match=r"damping of .* must be the same in the groups of its A and B"):
            steps(model, optimizer)
    optimizer.param_groups[1]["damping"] = 0.5
    steps(model, optimizer)


def test_a_list_in_a_group_cannot_change_unseen():
    """torch takes betas as a list; one that is changed in place would pass every comparison by identity."""
    model = build()
    betas = [0.9, 0.99]
    optimizer = GritKFAC(model, lr=1e-2, betas=betas)
    betas[0] = 2.0
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match="betas must be two numbers"):
        steps(model, optimizer)


@optimizers
@pytest.mark.parametrize("edit", [{"betas": (2, 0)}, {"lr": -1.0}], ids=str)
def test_files_are_validated(make, edit):
    """A file whose groups are out of range is refused, and nothing of it is loaded."""
    model = build()
    optimizer = make(model, lr=1e-2)
    steps(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer)
    now = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(edit)
    with pytest.raises(ValueError, match=f"{next(iter(edit))} must be"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == now["param_groups"]
    for index, state in now["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())


def test_an_edited_value_holds_from_the_next_step_on():
    """Damping before the second step is the damping of a run that always had it, from equal states."""
    ends = []
    for late in (True, False):
        model = build()
        optimizer = rank_side(model, lr=1e-2, damping=0.1 if late else 10.0, warmup_steps=1)
        steps(model, optimizer)  # plain Adam: damping has no say yet
        optimizer.param_groups[0]["damping"] = 10.0
        steps(model, optimizer, 2)
        ends.append(weights(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@optimizers
def test_a_parameter_that_changes_its_dtype_is_named(make):
    model = build()
    optimizer = make(model, lr=1e-2)
    steps(model, optimizer)
    model.float()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.arange(4) % 3).backward()
    with pytest.raises(ValueError, match=r"A of .*0 must stay torch\.float64 on cpu.*got torch\.float32"):
        optimizer.step()


@optimizers
def test_float16_adapters_are_refused(make):
    with pytest.raises(ValueError, match=r"A of .* must be float32 or bfloat16.*got torch\.float16"):
        make(build().half())


@optimizers
def test_copies_are_independent(make):
    model = build()
    optimizer = make(model, lr=1e-2)
    steps(model, optimizer, 2)
    twin, other = copy.deepcopy((model, optimizer))
    steps(twin, other, 2)
    steps(model, optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("after", ["a load", "a new group", "an edit of another group"])
def test_edits_of_what_the_state_was_made_for_are_refused_at_any_time(after):
    """Also where the pairs have been found anew since the last step."""
    model = build()
    pairs = find_lora_pairs(model)
    groups = [{"params": [pair.A, pair.B]} for pair in pairs]
    optimizer = GritKFAC(groups, lr=1e-2, model=model, update="adam", statistics="gradient")
    steps(model, optimizer)
    if after == "a load":
        optimizer.load_state_dict(optimizer.state_dict())
    elif after == "a new group":
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    else:
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer._index_pairs()
    for group in optimizer.param_groups:
        group["update"] = "momentum"
    with pytest.raises(ValueError, match="update must be what it was at the first step, 'adam'"):
        steps(model, optimizer)


def test_a_published_reprojection_may_be_left_and_taken_up_again():
    model = build()
    optimizer = GritKFAC.paper(model, lr=1e-2, reproject_every=2)
    for reprojection in ("balanced", "paper"):
        steps(model, optimizer, 3)
        optimizer.param_groups[0]["reprojection"] = reprojection
    steps(model, optimizer, 3)
