"""GoRAInit saved, loaded and copied: in the middle of the calibration, and after the hand-over."""

import copy
import pickle

import models
import pytest
import torch
from gora_models import SMALL, adamw, build, published, run
from peft import PeftModel

from curvopt import GritKFAC

LONG = {**SMALL, "calibration_steps": 4}


def plain_adamw(model):
    """At module level, so that it can be pickled."""
    return adamw(model)


@pytest.mark.parametrize("importance", ["mean_abs", "grad_b"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offload", [False, True])
def test_resume_in_the_middle_of_the_calibration(importance, dtype, offload):
    kwargs = {**LONG, "max_rank": 4, "rank": 3, "importance": importance, "offload": offload, "convergence": 1e-9}

    def start():
        model, _ = build("vit")
        model.to(dtype)
        return model, lambda i: loss_in(model, dtype, i), published(model, **kwargs, then=adamw)

    model, loss, optimizer = start()
    run(optimizer, loss, 2)
    saved = models.round_trip(optimizer.state_dict())
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    sums = [state["gradient"] for state in saved["state"].values()]
    assert len(sums) == len(optimizer.pairs) and {s.dtype for s in sums} == {wanted}
    run(optimizer, loss, 5, 2)

    fresh, fresh_loss, again = start()
    run(again, fresh_loss, 1, 20)  # of which nothing may remain
    again.load_state_dict(saved)
    models.copied_into(fresh, start()[0])
    run(again, fresh_loss, 5, 2)
    assert again.plan == optimizer.plan and again.diagnostics()["steps"] == 4
    models.assert_same(models.snapshot(model), models.snapshot(fresh))


def loss_in(model, dtype, i):
    g = torch.Generator().manual_seed(i)
    out = model(torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64).to(dtype)).logits.double()
    return torch.nn.functional.cross_entropy(out, torch.arange(4))


@pytest.mark.parametrize("order", ["optimizer first", "peft's folder"])
@pytest.mark.parametrize("then", [adamw, lambda m: GritKFAC(m, lr=1e-2, inverse_every=2)])
def test_resume_after_the_hand_over(order, then, tmp_path):
    model, loss = build("llama")
    optimizer = published(model, **SMALL, then=then)
    run(optimizer, loss, 6)
    saved = models.round_trip(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    run(optimizer, loss, 3, 6)

    fresh, _ = build("llama")
    if order == "peft's folder":
        fresh = PeftModel.from_pretrained(fresh.unload(), tmp_path, is_trainable=True)
    again = published(fresh, **SMALL, then=then)  # B is not zero here: no objection before a step
    again.load_state_dict(saved)
    if order == "optimizer first":
        fresh.load_state_dict(weights)
    assert again.ready and again.plan == optimizer.plan and again.ranks() == optimizer.ranks()
    run(again, lambda i: models.llama_loss(fresh, i), 3, 6)
    one, two = models.snapshot(model), models.snapshot(fresh)
    models.assert_same(one, two)
    optimizer.remove_hooks(), again.remove_hooks()
    assert models.hooks(fresh) == 0


def test_what_does_not_fit_is_refused():
    model, loss = build("vit")
    optimizer = published(model, **SMALL)
    middle = copy.deepcopy(optimizer.state_dict())
    run(optimizer, loss, 3)
    over = optimizer.state_dict()
    with pytest.raises(ValueError, match="has handed over already"):
        optimizer.load_state_dict(middle)
    other, _ = build("conv")
    with pytest.raises(ValueError, match="is not a pair here"):
        published(other, **SMALL).load_state_dict(over)
    changed = copy.deepcopy(over)
    changed["gora"]["plan"]["spent"] = 1.0
    with pytest.raises(ValueError, match="its plan is not the one in force"):
        optimizer.load_state_dict(changed)
    optimizer.load_state_dict(over)


@pytest.mark.parametrize("steps", [0, 2, 6])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(steps, way):
    model, _ = build("llama")
    optimizer = published(model, **LONG, then=plain_adamw)
    run(optimizer, lambda i: models.llama_loss(model, i), steps)
    both = (model, optimizer)
    twin, copied = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    before = models.snapshot(model)
    torch.manual_seed(1)  # for the rows that grow
    run(copied, lambda i: models.llama_loss(twin, i), 6 - steps + 2, steps)
    models.assert_same(models.snapshot(model), before)
    torch.manual_seed(1)
    run(optimizer, lambda i: models.llama_loss(model, i), 6 - steps + 2, steps)
    assert copied.plan == optimizer.plan
    models.assert_same(models.snapshot(model), models.snapshot(twin))
    assert models.hooks(model) == 0


def test_a_checkpoint_of_other_ranks_says_what_to_do():
    model, loss = build("llama")
    run(published(model, **SMALL), loss, 3)
    fresh, _ = build("llama")
    optimizer = published(fresh, **SMALL)
    with pytest.raises(ValueError, match=r"PeftModel.from_pretrained\(base, checkpoint, is_trainable=True\)"):
        fresh.load_state_dict(model.state_dict())
    fresh.load_state_dict(build("llama")[0].state_dict())  # equal ranks load
    optimizer.remove_hooks()
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(model.state_dict())
