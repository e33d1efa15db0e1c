"""Accelerate: precision, state on disk, schedulers and clipping, with the optimizer inside its wrapper."""

import loopkit
import models
import pytest
import torch
from loopkit_frameworks import accelerator
from torch.optim.lr_scheduler import LambdaLR

from curvopt import GritKFAC

optimizers = pytest.mark.parametrize("make", loopkit.OPTIMIZERS, ids=lambda make: make.__name__)


def loop(accelerate, model, optimizer, scheduler, steps, begin=0, clip=None):
    losses = []
    for i in range(begin, begin + steps):
        optimizer.zero_grad()
        loss = loopkit.token_loss(model, *models.batch(accelerate.unwrap_model(model), i))
        accelerate.backward(loss)
        if clip and accelerate.sync_gradients:
            accelerate.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def started(make, dtype=torch.float64, **kwargs):
    accelerate = accelerator(**kwargs)
    model = models.mlp(dtype)
    optimizer = make(model)
    return accelerate, *accelerate.prepare(model, optimizer, LambdaLR(optimizer, lambda i: 1 / (1 + i)))


@optimizers
def test_state_saved_and_loaded_by_accelerate(make, tmp_path):
    accelerate, model, optimizer, scheduler = started(make)
    loop(accelerate, model, optimizer, scheduler, 4)
    accelerate.save_state(str(tmp_path))
    loop(accelerate, model, optimizer, scheduler, 3, 4)
    end = models.snapshot(model, optimizer.optimizer)
    accelerate, fresh, other, scheduler = started(make)
    loop(accelerate, fresh, other, scheduler, 2, 50)  # what it did before must not matter
    accelerate.load_state(str(tmp_path))
    loop(accelerate, fresh, other, scheduler, 3, 4)
    models.assert_same(models.snapshot(fresh, other.optimizer), end)


@optimizers
def test_scheduler_and_clipping(make):
    accelerate, model, optimizer, scheduler = started(make)
    loop(accelerate, model, optimizer, scheduler, 4, clip=0.05)
    plain = loopkit.clipped(make)
    first = plain.optimizer.param_groups[0]["lr"]
    for i in range(4):
        plain.optimizer.param_groups[0]["lr"] = first * (1 / (1 + i))
        plain.train(i, i + 1, False)
    models.assert_same(models.snapshot(model), models.snapshot(plain.model))


def test_bf16_follows_float32():
    losses, rows = [], []
    for precision in ("no", "bf16"):
        accelerate, model, optimizer, scheduler = started(
            lambda model: GritKFAC(model, lr=1e-2, statistics="activation", factor_every=1),
            torch.float32,
            mixed_precision=precision,
        )
        losses.append(loop(accelerate, model, optimizer, scheduler, 6))
        rows.append({pair.get("rows") for pair in optimizer.optimizer.diagnostics()["pairs"].values()})
    accelerator()  # leave no precision behind
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[1] != losses[0]  # bf16 has 8 bits
    assert rows[0] == rows[1] == {6 * 18.0, None}


def test_pairs_are_found_through_the_wrapper():
    accelerate, model, optimizer, _ = started(lambda model: GritKFAC(model, lr=1e-2))
    assert optimizer.optimizer.pairs[0].A is accelerate.unwrap_model(model).first.lora_A.weight
