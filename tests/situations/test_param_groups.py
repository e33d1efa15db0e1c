"""What stands in ``param_groups`` at a step is what trains, whoever put it there; or an error says why it does not."""

import copy

import pytest
import torch
from grit_kit import rank_side
from situations_kit import build, loss, steps, weights
from torch import nn

from curvopt import GritKFAC, MatryoshkaScaledAdam

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
        ({"damping": -1.0}, "damping must be a number > 0, got -1.0"),
        ({"lr": -1.0}, "lr must be a number ≥ 0, got -1.0"),
        ({"update": "adam"}, "update must be what it was at the first step, 'polar'"),
        ({"sides": "paper"}, "sides must be what it was at the first step, 'kfac'"),
        ({"statistics": "gradient"}, "statistics must be what it was at the first step, 'activation'"),
        ({"inverse_every": 0}, "inverse_every must be an integer ≥ 1, got 0"),
    ],
    ids=str,
)
def test_edits_are_validated(edit, message):
    model = build()
    optimizer = rank_side(model, lr=1e-2)
    steps(model, optimizer)
    before = weights(model)
    optimizer.param_groups[0].update(edit)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        steps(model, optimizer)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


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
