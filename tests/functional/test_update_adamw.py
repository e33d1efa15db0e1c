"""Under the identity adam, eigen and whiten are torch's fused AdamW, to the bit; momentum is not."""

from dataclasses import replace

import pytest
import torch
from strategies import DTYPES, generator, random_spd
from update_kit import HYPER, MATRICES, draw, make_slab, schedule, take

ROTATED = ["adam", "eigen", "whiten"]


def against_torch(rule, slab, lr_of, hyper, steps=12):
    """Run torch's fused AdamW beside the rule on the same gradients; return the largest difference."""
    reference = [torch.nn.Parameter(p.clone()) for p in slab.params]
    optimizer = torch.optim.AdamW(
        reference, lr=hyper.lr, betas=(hyper.beta1, hyper.beta2), eps=hyper.eps, weight_decay=hyper.weight_decay,
        maximize=hyper.maximize, fused=True,
    )  # fmt: skip
    g = generator(99)
    for i in range(steps):
        grads = draw(slab, g)
        lr = lr_of(i)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        slab.hyper = replace(hyper, lr=group["lr"])
        for p, x in zip(reference, grads, strict=True):
            p.grad = x.clone()
        optimizer.step()
        take(rule, slab, grads)
    pairs = [(slab.params, reference)]
    pairs.append((slab.exp_avg, [optimizer.state[p]["exp_avg"] for p in reference]))
    pairs.append((slab.exp_avg_sq, [optimizer.state[p]["exp_avg_sq"] for p in reference]))
    assert slab.step.item() == steps
    return max(
        (a.double() - b.double()).abs().max().item()
        for ours, theirs in pairs
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("rule", ROTATED)
@pytest.mark.parametrize("matrix", ["none", "eye"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank_dim", [1, 2])
def test_identity_is_fused_adamw_to_the_bit(rule, matrix, dtype, rank_dim):
    """With and without decay, under maximize, with a schedule.

    Sizes are multiples of any vector width: torch's CPU kernel rounds the scalar tail of a tensor otherwise than its
    vectorised body, so that AdamW itself may be one ulp different after concatenation (see below).
    """
    M = None if matrix == "none" else torch.eye(4).repeat(3, 1, 1)
    for weight_decay, maximize in ((0.0, False), (0.01, False), (0.3, True)):
        hyper = replace(HYPER, weight_decay=weight_decay, maximize=maximize)
        slab = make_slab(3, 4, 32, rank_dim, dtype, matrix=M)
        assert against_torch(rule, slab, schedule, hyper) == 0


@pytest.mark.parametrize("rule", ROTATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
def test_learning_rate_as_tensor(rule, dtype, lr_dtype):
    hyper = replace(HYPER, lr=torch.tensor(1e-2, dtype=lr_dtype), weight_decay=0.1)
    assert against_torch(rule, make_slab(2, 4, 16, 1, dtype), schedule, hyper) == 0


def test_learning_rate_as_tensor_float64_without_decay():
    hyper = replace(HYPER, lr=torch.tensor(1e-2))
    assert against_torch("eigen", make_slab(2, 4, 16, 1, torch.float64), schedule, hyper) == 0


@pytest.mark.parametrize("rule", ROTATED)
def test_learning_rate_as_float32_tensor_decays_float64_parameters_exactly(rule):
    hyper = replace(HYPER, lr=torch.tensor(1e-2), weight_decay=0.3)
    assert against_torch(rule, make_slab(2, 4, 16, 1, torch.float64), schedule, hyper) == 0


@pytest.mark.parametrize("rule", ROTATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identity_is_fused_adamw_to_the_bit_at_odd_sizes(rule, dtype):
    worst = 0.0
    for shape in ((3, 5, 13), (4, 3, 7), (2, 7, 9)):
        for rank_dim in (1, 2):
            slab = make_slab(*shape, rank_dim, dtype)
            worst = max(worst, against_torch(rule, slab, schedule, replace(HYPER, weight_decay=0.1), steps=40))
    assert worst == 0


def test_control_a_matrix_changes_the_update():
    hyper, g = HYPER, generator(3)
    for rule in ROTATED:
        M = MATRICES[rule](random_spd(3, 4, g)).float()
        assert against_torch(rule, make_slab(3, 4, 32, 1, torch.float32, matrix=M), schedule, hyper) > 1e-3


def test_momentum_with_the_identity_has_its_own_direction():
    """It is not AdamW under I: same length, direction m̂ instead of m̂/√v̂."""
    assert against_torch("momentum", make_slab(3, 4, 32, 1, torch.float32), schedule, HYPER) > 1e-3
