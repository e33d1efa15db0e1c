"""Stratified nesting: masks by sample in training alone, the same when recomputed or resumed; ΔW stays."""

import copy
import gc

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from strategies import generator, seeds, some

from curvopt import MatryoshkaScaledAdam, find_lora_pairs
from curvopt.functional.nested import stratified_ranks

KWARGS = {"lr": 1e-2, "nesting": "stratified", "warmup_steps": 2, "reorder_every": 3, "full_share": 0.5}


def made(model, **kwargs):
    return MatryoshkaScaledAdam(model, **{**KWARGS, **kwargs})


def watch(model):
    """Let every layer list the u of its forwards, after the masks."""
    for layer in model.layers:
        layer.watch = []
    return {name: getattr(model, name).watch for name in ("first", "second", "third")}


def ranks_in(u):
    """The rank of each sample: its last direction that is not exactly zero at any position."""
    used = u.detach()[:, None].transpose(1, -1).flatten(2).ne(0).any(-1)  # (n, r, positions)
    return [int(row.nonzero().max()) + 1 for row in used]


def masks_of(model, i, rows=6):
    seen = watch(model)
    models.loss(model, i, rows).backward()
    return {name: [ranks_in(u) for u in us] for name, us in seen.items()}


# ---------------------------------------------------------------------------------------------- the draw


@some
@given(st.sets(st.integers(1, 32), min_size=1, max_size=6).map(sorted), st.floats(0.01, 1.0), st.integers(1, 40),
       st.floats(0, 1, exclude_max=True), seeds)  # fmt: skip
def test_no_batch_strays_by_more_than_a_sample_from_the_shares(ranks, share, n, offset, seed):
    found = stratified_ranks(ranks, share, n, offset, generator(seed)).tolist()
    assert len(found) == n and set(found) <= set(ranks)
    if len(ranks) > 1:
        for k in ranks:
            expected = n * (share if k == ranks[-1] else (1 - share) / (len(ranks) - 1))
            assert abs(found.count(k) - expected) < 1 + 1e-9 * n
    else:
        assert set(found) == {ranks[0]}


def test_one_sample_at_a_time_meets_every_rank_in_its_share():
    """Batches of one over evenly spread offsets: probabilities are the shares."""
    found = [stratified_ranks((1, 2, 4), 0.5, 1, i / 400, generator(i)).item() for i in range(400)]
    assert [found.count(k) for k in (1, 2, 4)] == [100, 100, 200]


# ---------------------------------------------------------------------------------------------- the masks


def test_samples_have_one_rank_in_all_layers_and_none_before_the_warmup():
    model = models.mlp()
    optimizer = made(model)
    for i in range(8):
        optimizer.zero_grad()
        seen = masks_of(model, i, rows=12)
        ranks = seen["first"][0]
        assert seen["second"] == seen["first"] and seen["third"][0] == [min(k, 3) for k in ranks]
        if i < 2:
            assert set(ranks) == {4}
        else:  # ranks 1, 2, 4: half of 12 at 4, a quarter at 1 and at 2
            assert sorted(ranks) == [1, 1, 1, 2, 2, 2, 4, 4, 4, 4, 4, 4]
        optimizer.step()


def test_the_loss_is_that_of_each_sample_at_its_rank():
    """Masking u is computing with B[:, :ρ] A[:ρ]: the gradient is the sum of those of truncated models."""
    model = models.mlp()
    optimizer = made(model)
    models.fit(model, optimizer, 3)
    x, _ = models.batch(model, 5)
    seen = watch(model)
    out = model(x)
    ranks = ranks_in(seen["first"][0])
    assert len(set(ranks)) > 1
    for sample, rank in enumerate(ranks):
        with optimizer.truncated(rank):
            model.eval()
            expected = model(x)[sample]
            model.train()
        torch.testing.assert_close(out[sample], expected, rtol=1e-12, atol=1e-13)  # sums in another order


def test_evaluation_and_removed_hooks_are_untouched():
    model, before = models.mlp(), models.hooks(models.mlp())
    optimizer = made(model)
    models.fit(model, optimizer, 4)
    twin = models.copied_into(model, models.mlp(seed=3))
    with torch.no_grad():
        x, _ = models.batch(model, 9)
        assert not torch.equal(model(x), twin(x))  # control: in training mode they differ
        assert torch.equal(model.eval()(x), twin(x))
        model.train()
        optimizer.remove_hooks()
        assert torch.equal(model(x), twin(x))
    models.fit(model, optimizer, 2, 4)
    assert models.hooks(model) == before and not optimizer.watching


def test_hooks_go_with_the_optimizer_and_are_not_copied():
    model = models.mlp()
    optimizer = made(model)
    models.fit(model, optimizer, 4)
    alone = copy.deepcopy(model)
    x, _ = models.batch(model, 9)
    with torch.no_grad():
        assert torch.equal(alone(x), alone.eval()(x))
        del optimizer
        gc.collect()
        assert torch.equal(model(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_block_has_the_masks_it_had(reentrant):
    """Activation checkpointing changes nothing, with accumulation over three micro-batches."""

    def trained(checkpointing):
        model = models.mlp(checkpointing=checkpointing)
        optimizer = made(model)
        for i in range(5):
            optimizer.zero_grad()
            for part in range(3):
                models.loss(model, 3 * i + part).backward()
            optimizer.step()
        return models.snapshot(model)

    models.assert_same(trained(reentrant), trained(None))


def test_a_compiled_model_has_the_masks_of_the_same_one_in_eager_mode():
    """Masks change at every step and are never baked into a graph."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = models.mlp()
        optimizer = made(model)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        losses = []
        for i in range(10):
            optimizer.zero_grad()
            x, y = models.batch(model, i)
            loss = torch.nn.functional.cross_entropy(forward(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_have_strata_of_their_own(set_to_none):
    """Eight micro-batches of one sample: their ranks spread as those of a batch do; the next step draws others."""
    model = models.mlp()
    optimizer = made(model, full_share=0.5)
    models.fit(model, optimizer, 3)
    steps = []
    for i in range(2):
        optimizer.zero_grad(set_to_none)
        steps.append([masks_of(model, i, rows=1)["first"][0][0] for _ in range(8)])
        optimizer.step()
    for ranks in steps:
        assert 3 <= ranks.count(4) <= 5 and 1 <= ranks.count(1) <= 3  # golden-section offsets: within one of 4 and 2
    assert steps[0] != steps[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(dtype):
    def trained(split, start=torch.Generator):
        model = models.mlp(dtype, start="zero")
        kwargs = {"eps": 1e-3, "weight_decay": 0.1}
        optimizer = made(model, generator=start().manual_seed(5), **kwargs)
        for i in range(11):
            if i == split:
                saved = models.round_trip(optimizer.state_dict())
                model = models.copied_into(model, models.mlp(dtype, seed=3))
                optimizer = made(model, **kwargs)
                optimizer.load_state_dict(saved)
            elif split and i == split + 2:
                model, optimizer = copy.deepcopy((model, optimizer))
            models.fit(model, optimizer, 1, i)
        return models.snapshot(model, optimizer)

    whole = trained(None)
    for split in (1, 4, 7):
        models.assert_same(trained(split), whole, ignore=("generator", "draw"))
    assert set(MatryoshkaScaledAdam(models.mlp()).param_groups[0]) & {"draw", "generator", "arrived"} == set()


# ---------------------------------------------------------------------------------------------- the step


def test_without_masks_and_reorderings_it_is_fused_adamw_bit_for_bit():
    model, twin = models.mlp(torch.float32), models.mlp(torch.float32)
    optimizer = made(model, full_share=1.0, reorder_every=0, weight_decay=0.1)
    pairs = [p for name, p in twin.named_parameters() if "lora" in name]
    others = [p for name, p in twin.named_parameters() if name.startswith(("norm", "head"))]
    adamw = [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=f) for ps, f in ((pairs, True), (others, None))]
    for i in range(6):
        models.fit(model, optimizer, 1, i)
        twin.zero_grad()
        models.loss(twin, i).backward()
        for o in adamw:
            o.step()
    models.assert_same(models.snapshot(model), models.snapshot(twin))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_reordering_keeps_the_adapter_and_carries_the_moments(dtype):
    """ΔW is what AdamW left; A Aᵀ and Bᵀ B are σ of ΔW; m ↦ T⁻ᵀ m and v ↦ (T⁻ᵀ)² v, T from the tensors themselves."""
    model, plain = models.mlp(dtype), models.mlp(dtype)
    turned, straight = made(model, reorder_every=4, full_share=1.0), made(plain, reorder_every=0, full_share=1.0)
    models.fit(model, turned, 4), models.fit(plain, straight, 4)
    rtol = 1e-9 if dtype == torch.float64 else 2e-3  # T of condition up to 1e2, and its inverse, on rounded tensors
    for layer, other in zip(model.layers, plain.layers, strict=True):
        A, B = layer.lora_A.weight.detach().double(), layer.lora_B.weight.detach().double()
        A_0, B_0 = other.lora_A.weight.detach().double(), other.lora_B.weight.detach().double()
        assert not torch.allclose(A, A_0)
        scale = torch.linalg.matrix_norm(B_0 @ A_0)
        assert torch.linalg.matrix_norm(B @ A - B_0 @ A_0) <= 20 * torch.finfo(dtype).eps * 10 * scale
        sigma = torch.linalg.svdvals(B_0 @ A_0)[: layer.rank]
        for gram in (A @ A.mT, B.mT @ B):  # the same diagonal up to a scalar, to the damping of 1e-6
            expected = torch.diag(sigma * (gram.trace() / sigma.sum()))
            torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-5 * gram.trace().item())
        T = A @ torch.linalg.pinv(A_0)
        ours, before = turned.state[layer.lora_A.weight], straight.state[other.lora_A.weight]
        M = torch.linalg.inv(T).mT
        m, v = (before[key].double() for key in ("exp_avg", "exp_avg_sq"))
        for got, want in ((ours["exp_avg"], M @ m), (ours["exp_avg_sq"], M.square() @ v)):
            torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * want.abs().max().item())
        ours, before = turned.state[layer.lora_B.weight], straight.state[other.lora_B.weight]
        want = before["exp_avg"].double() @ T.mT
        torch.testing.assert_close(ours["exp_avg"].double(), want, rtol=rtol, atol=rtol * want.abs().max().item())


def test_prefixes_are_the_best_of_their_rank_after_a_reordering(tmp_path):
    """The truncated model is the SVD's cut of ΔW, and the export the truncated model."""
    model = models.llama(torch.float64, start="random")
    optimizer = made(model, reorder_every=5)
    models.fit(model, optimizer, 5)
    whole = {p.name: p.B.detach() @ p.A.detach() for p in find_lora_pairs(model)}
    with optimizer.truncated(2):
        model.eval()
        expected = models.loss(model, 9).item()
        model.train()
        for pair in find_lora_pairs(model):
            error = torch.linalg.matrix_norm(whole[pair.name] - pair.B @ pair.A).item()
            best = torch.linalg.svdvals(whole[pair.name])[2:].square().sum().sqrt().item()
            assert error == pytest.approx(best, rel=1e-4)  # the damping of 1e-6, by its square root at worst
    folder = optimizer.export(tmp_path / "2", 2)
    twin = PeftModel.from_pretrained(models.llama(torch.float64).unload(), folder).double().eval()
    assert models.loss(twin, 9).item() == pytest.approx(expected, rel=1e-12)


def test_a_broken_gradient_changes_nothing():
    model = models.mlp()
    optimizer = made(model)
    models.fit(model, optimizer, 5)  # the next step would reorder
    before = models.snapshot(model, optimizer)
    models.loss(model, 6).backward()
    model.second.lora_B.weight.grad.view(-1)[3] = torch.nan
    optimizer.step()
    models.assert_same(models.snapshot(model, optimizer), before, ignore=("skipped", "cadence"))


def test_frozen_sides_are_masked_and_not_reordered():
    model = models.mlp()
    for layer in model.layers:
        layer.lora_A.weight.requires_grad_(False)
    A = model.first.lora_A.weight.clone()
    optimizer = made(model)
    models.fit(model, optimizer, 6)
    optimizer.zero_grad()
    assert len(set(masks_of(model, 7)["first"][0])) > 1 and torch.equal(model.first.lora_A.weight, A)


# ---------------------------------------------------------------------------------------------- what is said


def test_a_forward_that_is_not_masked_is_told():
    model = models.mlp()
    optimizer = made(model)
    models.fit(model, optimizer, 2)
    model.second.bypass = True
    with pytest.warns(UserWarning, match=r"1 pairs received gradients but no sample was masked \(second\)"):
        models.fit(model, optimizer, 2, 2)
    model = models.mlp().eval()
    with pytest.warns(UserWarning, match=r"3 pairs received gradients but no sample was masked"):
        models.fit(model, made(model), 3)


REFUSED = [
    ({"full_share": 0.0}, r"full_share must be a number in \(0, 1\], got 0.0"),
    ({"full_share": 1.5}, "full_share must be"),
    ({"full_share": True}, "full_share must be"),
    ({"warmup_steps": -1}, "warmup_steps must be an integer ≥ 0, got -1"),
    ({"reorder_every": 2.5}, "reorder_every must be an integer ≥ 0, got 2.5"),
    ({"scale": "sqrt"}, "scale must be 'none' for nesting='stratified'"),
]


@pytest.mark.parametrize(("kwargs", "text"), REFUSED, ids=str)
def test_bad_arguments_are_named(kwargs, text):
    model = models.mlp()
    with pytest.raises(ValueError, match=text):
        made(model, **kwargs)
    assert models.hooks(model) == models.hooks(models.mlp())  # nothing is left of those


def test_pairs_without_a_module_for_u_are_refused():
    with pytest.raises(ValueError, match=r"nesting of .* must be another than 'stratified' \(embedding"):
        made(models.mixed())
    with pytest.raises(ValueError, match="paired by name"):
        made(models.mlp().named_parameters())


def test_packed_rows_and_single_rows():
    """Of a 2-d u each row is a sample; a 1-d u is one sample."""
    model = models.single()
    optimizer = MatryoshkaScaledAdam(model, **{**KWARGS, "warmup_steps": 0, "full_share": 0.5})
    models.fit(model, optimizer, 2)
    model.watch = []
    model(torch.ones(8, 7, dtype=torch.float64))
    assert sorted(ranks_in(model.watch[0])) == [1, 1, 2, 2, 3, 3, 3, 3]
    model.watch = []
    model(torch.ones(7, dtype=torch.float64))
    assert model.watch[0].shape == (3,) and model.watch[0][0] != 0
