"""GoRAInit: what the calibration leaves alone, and what it writes."""

import math

import models
import pytest
import torch
from gora_models import SMALL, adamw, build, published, run
from peft import PeftModel

from curvopt import GoRAInit
from curvopt.functional.gradient_init import step_size
from curvopt.lora.gradients import columns_of, rows_of

# ---------------------------------------------------------------------------------------------- the calibration


@pytest.mark.parametrize("kind", ["llama", "vit", "conv"])
def test_nothing_moves_until_the_last_step_and_the_base_never_does(kind):
    model, loss = build(kind)
    optimizer = published(model, **SMALL, then=adamw)
    before = models.snapshot(model)
    run(optimizer, loss, 2)
    models.assert_same(models.snapshot(model), before)
    assert not optimizer.ready and optimizer.plan is None and optimizer.delegate is None
    run(optimizer, loss, 1, 2)
    assert optimizer.ready and isinstance(optimizer.delegate, torch.optim.AdamW)
    after = models.snapshot(model)
    base = [name for name in before if "lora" not in name]
    models.assert_same({name: after[name] for name in base}, {name: before[name] for name in base})
    assert models.hooks(model) == 0 and not optimizer.state
    moved = models.snapshot(model)
    run(optimizer, loss, 1, 3)
    assert models.differences(moved, models.snapshot(model))


@pytest.mark.parametrize("kind", ["llama", "vit", "conv"])
@pytest.mark.parametrize("importance", ["mean_abs", "frobenius", "nuclear", "grad_b"])
def test_the_loss_drops_at_the_start_and_rises_with_the_other_sign(kind, importance):
    model, loss = build(kind, r=8 if importance == "grad_b" else 4)
    optimizer = published(model, **SMALL, importance=importance)
    if kind == "conv" and importance == "grad_b":
        run(optimizer, loss, 1)  # the embedding's A is zero: it is drawn first
    before = sum(run(optimizer, loss, 3))
    with torch.no_grad():
        down = sum(loss(i).item() for i in range(3))
        for pair in optimizer.pairs:
            pair.B.neg_()
        up = sum(loss(i).item() for i in range(3))
    assert down < before < up


@pytest.mark.parametrize("kind", ["llama", "vit", "conv"])
def test_it_writes_what_the_formulas_say(kind):
    """From gradients of base weights that autograd gave, and inverses by `pinv`."""
    model, loss = build(kind)
    optimizer = published(model, **SMALL, init_lr=0.3)
    twin, twin_loss = build(kind)
    pairs = {pair.name: pair for pair in published(twin, **SMALL).pairs}
    bases = {name: pair.module.get_base_layer().weight.requires_grad_() for name, pair in pairs.items()}
    for i in range(3):
        (twin_loss(i) / 3).backward()
    run(optimizer, loss, 3)
    plan = optimizer.plan
    for pair in optimizer.pairs:
        mine, W = pairs[pair.name], bases[pair.name]
        G, W = (t.T if pair.kind == "embedding" else t.flatten(1) for t in (W.grad, W))
        importance = (W * G).abs().mean().item()
        assert plan.importances[pair.name] == pytest.approx(importance, rel=1e-6)  # Llama's norms work in float32
        A, r = rows_of(pair), plan.ranks[pair.name]
        assert pair.rank == r and pair.scaling == mine.scaling
        kept = min(r, mine.rank)
        if pair.kind != "embedding":
            assert torch.equal(A[:kept], rows_of(mine)[:kept])
        B = -step_size(0.3, r, A.shape[1]) / pair.scaling * G @ torch.linalg.pinv(A)  # Aᵀ(AAᵀ)⁻¹
        # some A are square, and A Aᵀ squares their condition number (1e3 to 1e4)
        torch.testing.assert_close(columns_of(pair), B, rtol=1e-4, atol=1e-9)
    spent = sum(pair.A.numel() + pair.B.numel() for pair in optimizer.pairs)
    cheapest = min((pair.A.numel() + pair.B.numel()) // pair.rank for pair in optimizer.pairs)
    assert spent == plan.spent and 0 <= plan.budget - spent < 4 * cheapest


def test_B_from_its_own_gradient_is_B_from_that_of_the_base():
    snapshots = []
    for importance in ("grad_b", "frobenius"):
        model, loss = build("llama")
        run(published(model, rank=4, min_rank=4, max_rank=4, calibration_steps=3, importance=importance), loss, 3)
        snapshots.append(models.snapshot(model))
    # float64; ∂L/∂B = s Ḡ Aᵀ in another order of summation
    models.assert_near(*snapshots, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["llama", "vit", "conv"])
def test_a_resized_adapter_is_saved_and_loaded_by_peft(kind, keep, tmp_path):
    model, loss = build(kind, use_rslora=True)
    optimizer = published(model, **SMALL, keep_scaling=keep, then=adamw)
    alpha = model.peft_config["default"].lora_alpha
    run(optimizer, loss, 5)
    ranks = set(optimizer.plan.ranks.values())
    assert min(ranks) < 4 < max(ranks)  # cut and grown
    for pair in optimizer.pairs:
        expected = 8 / math.sqrt(4) if keep else alpha / math.sqrt(pair.rank)
        assert pair.scaling == pytest.approx(expected, rel=1e-12)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    fresh = build(kind, use_rslora=True)[0].unload()
    again = PeftModel.from_pretrained(fresh, tmp_path).double()
    with torch.no_grad():
        expected = loss(0)
        model.__dict__["forward"] = again.forward
        assert torch.equal(loss(0), expected)


def test_micro_batches_in_one_step_are_one_batch():
    found = []
    for parts in (1, 2):
        model, _ = build("llama")
        optimizer = published(model, **SMALL)
        for i in range(3):
            optimizer.zero_grad()
            for ids in models.llama_ids(i, rows=4).chunk(parts):
                (model(input_ids=ids, labels=ids).loss / parts).backward()
            optimizer.step()
        found.append((optimizer.plan.ranks, models.snapshot(model)))
    assert found[0][0] == found[1][0]
    models.assert_near(found[0][1], found[1][1], rtol=1e-8, atol=1e-12)  # float64 sums in another order


def test_offloaded_sums_are_the_same():
    found = []
    for offload in (False, True):
        model, loss = build("vit")
        run(published(model, **SMALL, offload=offload), loss, 3)
        found.append(models.snapshot(model))
    models.assert_same(*found)


def test_checkpointing_is_not_counted_twice():
    found = []
    for use in (False, True):
        model, loss = build("llama")
        if use:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = published(model, **SMALL)
        run(optimizer, loss, 3)
        found.append(optimizer.plan)
    assert found[0] == found[1]


@pytest.mark.parametrize("importance", ["mean_abs", "grad_b"])
def test_a_batch_that_is_not_finite_is_dropped_and_counted(importance):
    found = []
    for steps, bad in ((5, (1, 3)), (3, ())):
        model, loss = build("llama", r=8)
        optimizer = published(model, **{**SMALL, "calibration_steps": steps}, importance=importance)
        good = iter(range(3))
        for i in range(steps):
            optimizer.zero_grad()
            (loss(9) * math.nan if i in bad else loss(next(good))).backward()
            optimizer.step()
        assert optimizer.diagnostics()["dropped"] == len(bad) and optimizer.ready
        found.append((optimizer.plan, models.snapshot(model)))
    assert found[0][0] == found[1][0]
    models.assert_same(found[0][1], found[1][1])


def test_it_goes_on_until_one_batch_was_finite(caplog):
    model, loss = build("vit")
    optimizer = published(model, **{**SMALL, "calibration_steps": 1})
    for factor in (math.inf, math.nan, 1.0):
        assert not optimizer.ready
        optimizer.zero_grad()
        (loss(0) * factor).backward()
        optimizer.step()
    assert optimizer.ready and optimizer.diagnostics()["dropped"] == 2
    assert "2 calibration steps had no finite gradient to sum" in caplog.text


def test_convergence_ends_the_calibration_early():
    model, loss = build("vit")
    steady = published(model, **{**SMALL, "calibration_steps": 50}, convergence=1e-9)
    for _ in range(3):
        assert not steady.ready
        run(steady, lambda i: loss(0), 1)  # the same batch: the mean does not move
    assert steady.ready
    model, loss = build("vit")
    moving = published(model, **{**SMALL, "calibration_steps": 6}, convergence=1e-9)
    run(moving, loss, 5)
    assert not moving.ready


def test_the_best_init_lr_of_the_grid_is_kept():
    model, loss = build("llama")
    optimizer = published(model, **SMALL, init_lr="auto", then=adamw)

    def closure(i):
        def evaluate():
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            return value

        return evaluate

    with pytest.raises(ValueError, match=r"init_lr='auto' .* step\(closure\)"):
        optimizer.step()
    for i in range(3):
        optimizer.step(closure(i))
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        chosen = loss(2)
    trials = []
    for init_lr in GoRAInit.GRID:
        twin, twin_loss = build("llama")
        run(published(twin, **SMALL, init_lr=init_lr), twin_loss, 3)
        with torch.no_grad():
            trials.append(twin_loss(2).item())
    # the closures summed the same numbers in the same order
    assert chosen.item() == pytest.approx(min(trials), rel=1e-12) and min(trials) < trials[0]
    optimizer.step(closure(3))
