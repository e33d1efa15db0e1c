"""transformers' Trainer on a PEFT model: resume, precision, checkpointing, and how the optimizer gets in."""

import loopkit
import models
import pytest
import torch
from loopkit_frameworks import arguments
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from curvopt import GritKFAC

optimizers = pytest.mark.parametrize("make", loopkit.OPTIMIZERS, ids=lambda make: make.__name__)
DATA = [{"input_ids": ids, "labels": ids} for i in range(8) for ids in models.llama_ids(i)]


def llama(**kwargs):
    """A model as a user has it before the optimizer: PEFT's config knows no path, so that nothing is looked up."""
    return models.llama(start="random", **kwargs)


def trainer(folder, model, optimizer=None, **kwargs):
    scheduler = optimizer and LambdaLR(optimizer, lambda i: 1 / (1 + i))
    given = {"optimizers": (optimizer, scheduler)} if optimizer is not None else {}
    given |= {key: kwargs.pop(key) for key in ("optimizer_cls_and_kwargs", "callbacks") if key in kwargs}
    args = arguments(str(folder), **{"max_steps": 6, "per_device_train_batch_size": 2, **kwargs})
    return Trainer(model, args, train_dataset=DATA, **given)


def resumed(folder, make, at, dtype=torch.float32):
    """A run of six steps, and one that had only the folder of its step ``at``: (model, optimizer) of both."""
    model = llama(dtype=dtype)
    optimizer = make(model)
    trainer(folder / "whole", model, optimizer, save_strategy="steps", save_steps=1).train()
    fresh = llama(dtype=dtype)
    other = make(fresh)
    with torch.no_grad():  # what is not in the files is lost
        for pair in other.pairs:
            pair.A.zero_()
    checkpoint = str(folder / "whole" / f"checkpoint-{at}")
    trainer(folder / "resumed", fresh, other).train(resume_from_checkpoint=checkpoint)
    return (model, optimizer), (fresh, other)


@optimizers
@pytest.mark.parametrize("at", [1, 4])
def test_resume_from_checkpoint(make, at, tmp_path):
    whole, again = resumed(tmp_path, make, at)
    models.assert_same(models.snapshot(*again), models.snapshot(*whole))


@pytest.mark.parametrize("make", loopkit.OPTIMIZERS[:2], ids=lambda make: make.__name__)
def test_resume_of_bf16_adapters_goes_on_in_float32_as_peft_loads_them(make, tmp_path):
    """PEFT puts new float32 parameters in place of 16-bit ones when Trainer loads an adapter; ours follows them."""
    (_, optimizer), (fresh, other) = resumed(tmp_path, make, 4, torch.bfloat16)
    adapters = [p for name, p in fresh.named_parameters() if "lora_" in name]
    assert {p.dtype for p in adapters} == {torch.float32}
    assert {id(p) for g in other.param_groups for p in g["params"]} == {id(p) for p in adapters}
    for one, two in zip(optimizer.pairs, other.pairs, strict=True):
        assert other.state[two.A]["step"] == optimizer.state[one.A]["step"] == 6
        # two steps of at most 3.2 lr each, and a rounding to 8 bits
        assert (two.A - one.A.float()).abs().max() < 0.07 and not torch.equal(two.A, one.A.float())


def test_bf16_training_follows_float32(tmp_path):
    losses = []
    for bf16 in (False, True):
        model = llama()
        run = trainer(tmp_path, model, GritKFAC(model, lr=1e-2), bf16=bf16, logging_strategy="steps", logging_steps=1)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]  # bf16 has 8 bits


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, tmp_path):
    ends = []
    for on in (False, True):
        model = llama()
        if on:
            model.enable_input_require_grads()
        optimizer = GritKFAC(model, lr=1e-2, statistics="activation", factor_every=1, inverse_every=2)
        kwargs = {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer(tmp_path, model, optimizer, **(kwargs if on else {})).train()
        assert not on or model.base_model.model.model.gradient_checkpointing
        ends.append(models.snapshot(model, optimizer))
        rows = {pair["rows"] for pair in optimizer.diagnostics()["pairs"].values()}
        assert rows == {6 * 20.0}
    models.assert_same(*ends)


def test_the_trainer_s_learning_rate_is_not_the_optimizer_s(tmp_path):
    """Trainer applies its arguments to optimizers of its own only; ours has the one it was given."""
    model = llama()
    kwargs = {"model": model, "lr": 3e-3}
    run = trainer(tmp_path, model, optimizer_cls_and_kwargs=(GritKFAC, kwargs), learning_rate=0.7, max_steps=1)
    assert run.create_optimizer().param_groups[0]["lr"] == 3e-3
    assert "model" not in kwargs  # Trainer takes it out: a second Trainer needs a new dict, or OptimizerFactory


def test_groups_without_names_are_refused_with_what_to_do(tmp_path):
    run = trainer(tmp_path, llama(), optimizer_cls_and_kwargs=(GritKFAC, {"lr": 3e-3}))
    with pytest.raises(ValueError, match=r"no LoRA pair found.*Pass the model itself"):
        run.create_optimizer()


def test_compacted_adapters_are_saved_small_and_load(tmp_path):
    from peft import PeftModel

    model = llama(r=6)
    optimizer = GritKFAC(model, lr=1e-2, reproject_every=2, rank_threshold=0.5, min_rank=1)
    run = trainer(tmp_path, model, optimizer)
    run.train()
    ids = models.llama_ids(50)
    with torch.no_grad():
        before = model(ids).logits
    ranks = optimizer.compact()
    assert max(ranks.values()) < 6
    run.save_model(str(tmp_path / "small"))
    base = models.llama(r=6).unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "small"))
    with torch.no_grad():
        # the same sums over fewer terms
        torch.testing.assert_close(loaded(ids).logits, before, rtol=1e-4, atol=1e-5)
