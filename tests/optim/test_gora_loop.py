"""GoRAInit in a loop: the delegate, schedules, scalers, wrappers, quantized bases."""

import logging
import math

import models
import pytest
import torch
from gora_models import SMALL, adamw, build, published, run
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from curvopt import GritKFAC
from curvopt.lora.gradients import base_weight, columns_of, rows_of


@pytest.mark.parametrize("then", [adamw, lambda m: GritKFAC(m, lr=1e-2, inverse_every=2)])
def test_the_delegate_runs_as_if_it_had_been_built_by_hand(then):
    one, one_loss = build("llama")
    optimizer = published(one, **SMALL, then=then)
    run(optimizer, one_loss, 3)
    two, two_loss = build("llama")
    run(published(two, **SMALL), two_loss, 3)
    by_hand = then(two)
    assert run(optimizer, one_loss, 6, 3) == run(by_hand, two_loss, 6, 3)
    models.assert_same(models.snapshot(one), models.snapshot(two))
    assert optimizer.ranks() == {pair.name: pair.rank for pair in optimizer.pairs} == optimizer.plan.ranks
    optimizer.remove_hooks()
    assert models.hooks(one) == 0


def test_without_then_further_steps_are_errors():
    model, loss = build("vit")
    optimizer = published(model, **SMALL)
    run(optimizer, loss, 3)
    with pytest.raises(RuntimeError, match="the calibration is over: build an optimizer"):
        run(optimizer, loss, 1)


@pytest.mark.parametrize("lr", [1.0, 1e-2])
def test_a_schedule_on_this_optimizer_governs_the_delegate(lr):
    def factor(t):
        return (t + 1) / 4 if t < 4 else 3 / t

    found = []
    for scheduled in (True, False):
        model, loss = build("llama")
        optimizer = published(model, **SMALL, lr=lr, then=adamw)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor) if scheduled else None
        for i in range(9):
            if optimizer.ready and not scheduled:
                optimizer.delegate.param_groups[0]["lr"] = 1e-2 * factor(i)
            run(optimizer, loss, 1, i)
            if scheduled:
                schedule.step()
                assert optimizer.param_groups[0]["lr"] == lr * factor(i + 1)
        if scheduled:
            assert optimizer.delegate.param_groups[0]["lr"] == 1e-2  # its own, untouched between steps
        found.append(models.snapshot(model))
    models.assert_near(*found, rtol=1e-9, atol=1e-12)  # lr · factor and (lr · factor)/lr · lr differ by a rounding


def test_each_group_has_its_own_factor():
    model, loss = build("llama")
    A = [p for name, p in model.named_parameters() if "lora_A" in name]
    B = [p for name, p in model.named_parameters() if "lora_B" in name]
    groups = [{"params": A, "lr": 0.5}, {"params": B, "lr": 2.0}]
    optimizer = published(groups, model=model, **SMALL, then=lambda m: torch.optim.SGD([*B, *A], lr=0.1))
    run(optimizer, loss, 3)
    optimizer.param_groups[1]["lr"] = 0.0  # SGD has one group; its first parameter is of ours the second
    before = models.snapshot(model)
    run(optimizer, loss, 1, 3)
    models.assert_same(models.snapshot(model), before)


def test_unused_directions_stay_zero_when_shapes_stay():
    model, loss = build("llama", r=8)
    optimizer = published(model, **SMALL, resize=False, then=adamw)
    identities = {id(p) for p in model.parameters()}
    run(optimizer, loss, 8)
    assert identities == {id(p) for p in model.parameters()}
    for pair in optimizer.pairs:
        r = optimizer.plan.ranks[pair.name]
        assert pair.rank == 8 and rows_of(pair)[:r].any() and columns_of(pair)[:, :r].any()
        assert not rows_of(pair)[r:].any() and not columns_of(pair)[:, r:].any()
    cut, cut_loss = build("llama", r=8)
    sliced = published(cut, **SMALL, then=adamw)
    run(sliced, cut_loss, 8)
    with torch.no_grad():
        # float64: the same arithmetic with zeros in between, AdamW's decay of A and B included
        torch.testing.assert_close(loss(0), cut_loss(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_changes_nothing(unscale):
    """Its scale is divided out, told or not; a step it rejects leaves no trace, whatever layers saw of it."""
    found = []
    for scaled in (True, False):
        model, loss = build("llama")
        optimizer = published(model, **SMALL, then=adamw)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled, growth_interval=1000)
        for i in ["bad", 0, 1, 2, 3, 4] if scaled else range(5):
            optimizer.zero_grad()
            scaler.scale(loss(5 if i == "bad" else i)).backward()
            if i == "bad":
                optimizer.pairs[3].B.grad.fill_(math.inf)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.diagnostics()["dropped"] == 0  # the scaler did not call a step
        found.append((optimizer.plan, models.snapshot(model)))
    assert found[0][0].ranks == found[1][0].ranks
    models.assert_near(found[0][1], found[1][1], rtol=1e-6, atol=1e-9)  # sums in other units, then two steps of AdamW


@pytest.mark.parametrize("resume", [False, True])
def test_in_a_trainer(resume, tmp_path):
    """transformers' Trainer: scheduler on this optimizer, accelerate around it, checkpoints on both sides."""
    transformers = pytest.importorskip("transformers")
    model, _ = build("llama")
    rows = [{"input_ids": ids, "labels": ids} for ids in models.llama_ids(0, rows=24)]

    def trainer(model, steps):
        args = transformers.TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=2, save_steps=2 if resume else 5, report_to=[],
            use_cpu=True, learning_rate=1.0, disable_tqdm=True, logging_steps=1, save_total_limit=5,
        )  # fmt: skip
        optimizer = published(model, **{**SMALL, "max_rank": 4, "min_rank": 1, "rank": 3}, then=adamw)
        return transformers.Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None)), optimizer

    work, optimizer = trainer(model, 7)
    work.train()
    assert optimizer.ready and len(set(optimizer.plan.ranks.values())) > 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0) and optimizer.delegate.param_groups[0]["lr"] == 1e-2
    if resume:  # from a checkpoint in the middle of the calibration
        again, _ = build("llama")
        work, second = trainer(again, 7)
        work.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert second.plan == optimizer.plan
        models.assert_same(models.snapshot(again), models.snapshot(model))


def test_groups_added_later_go_to_the_delegate():
    model, loss = build("vit")
    head = [p for name, p in model.named_parameters() if "classifier" in name]
    optimizer = published(model, **SMALL, then=adamw)
    run(optimizer, loss, 3)
    for p in head:
        p.requires_grad_()
    optimizer.add_param_group({"params": head, "lr": 0.5})
    assert optimizer.delegate.param_groups[1]["lr"] == 0.5 and optimizer.param_groups[1]["lr"] == 1.0
    before = [p.clone() for p in head]
    run(optimizer, loss, 1)
    assert not any(torch.equal(p, old) for p, old in zip(head, before, strict=True))


def test_progress_is_logged(caplog):
    caplog.set_level(logging.INFO, "curvopt")
    model, loss = build("vit")
    run(published(model, **SMALL), loss, 3)
    assert [r.message for r in caplog.records][:2] == ["calibration step 1 of 3", "calibration step 2 of 3"]
    assert "of a budget of" in caplog.records[-1].message


def quantized(r=4):
    """Two NF4 layers with fresh adapters, and the base weights they stand for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")  # has no build for some platforms
    torch.manual_seed(0)
    base = nn.Sequential()
    for name, d_in, d_out in (("first", 64, 64), ("second", 64, 128)):
        layer = bitsandbytes.nn.Linear4bit(d_in, d_out, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.load_state_dict({"weight": torch.randn(d_out, d_in) / 8})
        base.add_module(name, layer.to("cpu"))  # quantizes
        base.add_module(f"{name}_tanh", nn.Tanh())
    base.is_loaded_in_4bit = True  # as transformers marks it, for PEFT
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=8, target_modules=["first", "second"]))


def test_a_4_bit_base(tmp_path):
    """The plan and the start are those of an ordinary base with the dequantized weights; the 4-bit data stays."""
    model, twin = quantized(), quantized()
    for path in ("first", "second"):
        pair = next(p for p in published(model, **SMALL).pairs if p.path.endswith(path))
        assert pair.module.get_base_layer().weight.dtype == torch.uint8
        plain = nn.Linear(*reversed(base_weight(pair).shape), bias=False).requires_grad_(False)
        plain.weight.copy_(base_weight(pair))
        twin.base_model.model.get_submodule(path).base_layer = plain
    plans = []
    data = model.base_model.model.first.base_layer.weight.data.clone()
    for m in (model, twin):
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(32, 64, generator=g), torch.randn(32, 128, generator=g)
        optimizer = published(m, **SMALL, then=adamw)
        losses = run(optimizer, lambda i, m=m, x=x, y=y: (m(x) - y).square().mean(), 6)
        plans.append(optimizer.plan)
        assert losses[3] < losses[0] and losses[5] < losses[3]
    assert torch.equal(data, model.base_model.model.first.base_layer.weight.data)
    assert plans[0].ranks == plans[1].ranks
    for name, value in plans[0].importances.items():
        assert value == pytest.approx(plans[1].importances[name], rel=1e-3)  # float32, another product of 4-bit weights
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized().unload(), tmp_path)
    with torch.no_grad():
        assert torch.equal(model.train()(x), again.train()(x))  # for inference the layers repack their weights
