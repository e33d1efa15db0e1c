"""Compacting an adapter with dead directions: the same outputs, smaller tensors, training and saving as before."""

import models
import oracles
import pytest
import torch
from grit_kit import RULES, WIDE, cut, fork
from peft import LoraConfig, get_peft_model

from curvopt import GritKFAC
from curvopt.lora import find_lora_pairs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compact_leaves_outputs_and_shrinks_everything(dtype):
    model, optimizer = cut(dtype=dtype)
    live = optimizer.ranks()
    x, _ = models.batch(model, 77)
    with torch.no_grad():
        before = model(x)
    full = {pair.name: (pair.scaling, pair.A.detach().clone(), pair.B.detach().clone()) for pair in optimizer.pairs}
    assert optimizer.compact() == live == optimizer.ranks()
    with torch.no_grad():
        # what was cut is exactly zero; shorter products are summed by other kernels, which round in another order
        torch.testing.assert_close(model(x), before, rtol=0, atol=10 * oracles.EPS[dtype])
    assert any(k < 5 for k in live.values())
    for pair in optimizer.pairs:
        k, (scaling, A, B) = live[pair.name], full[pair.name]
        assert pair.rank == k and pair.scaling == scaling
        assert torch.equal(pair.A, A[:k]) and torch.equal(pair.B, B[:, :k])
        assert (A[k:] == 0).all() and (B[:, k:] == 0).all()
        for p in (pair.A, pair.B):
            for key, value in optimizer.state[p].items() if p in optimizer.state else ():
                assert value.ndim == 0 or value.shape in (p.shape, (k, k)) or key == "cadence", key
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert {p for pair in optimizer.pairs for p in (pair.A, pair.B)} <= held
    assert set(optimizer.state) <= held
    assert optimizer.compact() == live  # nothing left to cut


@pytest.mark.parametrize("statistics", ["activation", "gradient", "weight"])
@pytest.mark.parametrize("rule", RULES)
def test_training_on_after_compact_is_training_on_masked(rule, statistics):
    model, optimizer = cut(rule, statistics=statistics)
    twin, other = fork(model, optimizer, models.mlp(**WIDE))
    optimizer.compact()
    models.fit(model, optimizer, 6, 12)
    models.fit(twin, other, 6, 12)
    x, _ = models.batch(model, 77)
    with torch.no_grad():
        # shorter sums are summed in another order: 1e-16 through six steps of Adam
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-9)
    for pair, full in zip(optimizer.pairs[:3], other.pairs, strict=False):
        torch.testing.assert_close(pair.A, full.A[: pair.rank], rtol=0, atol=1e-9)
        torch.testing.assert_close(pair.B, full.B[:, : pair.rank], rtol=0, atol=1e-9)


def test_compact_while_an_old_graph_is_alive():
    ends = []
    for alive in (True, False):
        model, optimizer = cut()
        value = models.loss(model, 12) if alive else None
        optimizer.compact()
        models.fit(model, optimizer, 2, 12)
        del value
        models.fit(model, optimizer, 1, 14)
        ends.append(models.snapshot(model, optimizer))
    models.assert_same(*ends)


def test_after_compact_reprojection_and_further_cuts_go_on():
    model, optimizer = cut()
    optimizer.compact()
    before = optimizer.ranks()
    optimizer.param_groups[0].update(reproject_every=2, rank_threshold=0.5)
    models.fit(model, optimizer, 8, 12)
    after = optimizer.ranks()
    assert all(after[name] <= before[name] for name in before) and after != before
    optimizer.compact()
    assert {pair.name: pair.rank for pair in optimizer.pairs} == optimizer.ranks()


def test_a_compacted_optimizer_resumes():
    model, optimizer = cut()
    optimizer.compact()
    saved = models.round_trip(optimizer.state_dict())
    models.fit(model, optimizer, 3, 12)
    twin, other = cut()
    other.compact()
    other.load_state_dict(saved)
    models.fit(twin, other, 3, 12)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_saves_and_loads_a_compacted_adapter(rslora, tmp_path):
    from peft import PeftModel

    model, optimizer = cut(
        dtype=torch.float32, build=lambda dtype: models.llama(dtype, r=6, start="random", use_rslora=rslora)
    )
    with torch.no_grad():
        before = model(models.llama_ids(5)).logits
    live = optimizer.compact()
    assert len(set(live.values())) > 1
    with torch.no_grad():
        after = model(models.llama_ids(5)).logits
    # rounding only, see above
    torch.testing.assert_close(after, before, rtol=0, atol=50 * oracles.EPS[torch.float32])
    for pair in optimizer.pairs:
        assert pair.module.r["default"] == pair.rank == live[pair.name]
    model.save_pretrained(tmp_path)
    base = models.llama(torch.float32, r=6).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(models.llama_ids(5)).logits, after)
    assert {pair.name: pair.rank for pair in find_lora_pairs(loaded)} == live


def test_pairs_known_by_name_alone_are_not_cut():
    """Their layers and their config would go on to say the old rank, and the saved adapter would not load."""
    for given in (False, True):
        model = models.llama(torch.float32, r=6, start="random")
        settings = {"lr": 1e-2, "rank_threshold": 0.5, "reproject_every": 2, "min_rank": 1}
        optimizer = GritKFAC(model.named_parameters(), **settings, model=model if given else None)
        models.fit(model, optimizer, 12)
        before = models.snapshot(model, optimizer)
        if given:
            live = optimizer.compact()
            assert {pair.name: pair.module.r["default"] for pair in optimizer.pairs} == live and min(live.values()) < 6
            continue
        with pytest.raises(ValueError, match=r"found by the names of its parameters.*Give the optimizer the model"):
            optimizer.compact()
        models.assert_same(models.snapshot(model, optimizer), before)


def test_state_that_happens_to_be_square_is_not_cut():
    """r = k = d_in: the basis of the outer factor of A is r×r, and not on the rank side."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    optimizer = GritKFAC(model, lr=1e-2, rank_threshold=0.5, reproject_every=2, min_rank=1)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()

    train(12)
    V = {s.param: optimizer.state[s.param]["outer_basis"].clone() for s in optimizer.sides}
    assert {V[s.param].shape for s in optimizer.sides} == {(8, 8), (64, 16)}
    assert max(optimizer.compact().values()) < 8
    assert all(torch.equal(optimizer.state[p]["outer_basis"], kept) for p, kept in V.items())
    train(2)
    assert all(p.isfinite().all() for p in model.parameters())
