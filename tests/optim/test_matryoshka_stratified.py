"""Stratified nesting of MatryoshkaScaledAdam: the draw, the step, the order of the directions."""

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from strategies import generator, seeds, some

from curvopt import MatryoshkaScaledAdam, find_lora_pairs
from curvopt.functional.nested import rank_shares, stratified_ranks

KWARGS = {"lr": 1e-2, "nesting": "stratified", "warmup_steps": 2, "reorder_every": 3, "full_share": 0.5}


def made(model, **kwargs):
    return MatryoshkaScaledAdam(model, **{**KWARGS, **kwargs})


# ---------------------------------------------------------------------------------------------- the draw


@some
@given(st.sets(st.integers(1, 32), min_size=1, max_size=6).map(sorted), st.floats(0.01, 1.0), st.integers(1, 40),
       st.floats(0, 1, exclude_max=True), seeds)  # fmt: skip
def test_no_batch_strays_by_more_than_a_sample_from_the_shares(ranks, share, n, offset, seed):
    found = stratified_ranks(ranks, share, n, offset, generator(seed)).tolist()
    assert len(found) == n and set(found) <= set(ranks)
    if len(ranks) > 1:
        for k in ranks:
            weight = (1 - share) / k / sum(1 / smaller for smaller in ranks[:-1])
            expected = n * (share if k == ranks[-1] else weight)
            assert abs(found.count(k) - expected) < 1 + 1e-9 * n
    else:
        assert set(found) == {ranks[0]}


def test_one_sample_at_a_time_meets_every_rank_in_its_share():
    """Batches of one over evenly spread offsets: probabilities are the shares."""
    found = [stratified_ranks((1, 2, 4), 0.55, 1, i / 400, generator(i)).item() for i in range(400)]
    assert [found.count(k) for k in (1, 2, 4)] == [120, 60, 220]
    assert rank_shares((1, 2, 4), 0.55) == pytest.approx((0.3, 0.15, 0.55)) and rank_shares((3,), 0.2) == (1.0,)


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


# ---------------------------------------------------------------------------------------------- what is refused


def test_samples_keep_the_scaling_of_the_module():
    with pytest.raises(ValueError, match="scale must be 'none' for nesting='stratified'"):
        made(models.mlp(), scale="sqrt")
