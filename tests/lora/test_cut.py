"""Smaller ranks of any adapter: optimal among all of their rank, written as plain adapters, measured by their loss."""

import json
import math

import models
import oracles
import pytest
import torch
from export_kit import Toy, X, by_leaf, config, loaded, outputs, peft_toy, ranks_of
from grit_kit import rank_side
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from strategies import few, generator, seeds
from torch import nn

from curvopt.functional.nested import product_svd
from curvopt.lora import export_adapter, find_lora_pairs, order_pair, resize_adapter, smallest_rank, truncated


def product(pair):
    """s B A of a pair in float64, d_out × d_in."""
    A, B = pair.matrix("A", pair.A.detach().double()), pair.matrix("B", pair.B.detach().double())
    return pair.scaling * (B @ A if (pair.dim_A, pair.dim_B) == (0, 1) else (A @ B).mT)


# ---------------------------------------------------------------------------------------------- the mathematics


@few
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), seeds)
def test_product_svd_is_the_svd_of_the_product(r, d_in, d_out, seed):
    """Wide, tall and over-complete (r above a width) matrices; values as LAPACK has them of the product itself."""
    g = generator(seed)
    A, B = torch.randn(r, d_in, generator=g, dtype=torch.float64), torch.randn(d_out, r, generator=g).double()
    A_new, B_new, sigma = product_svd(A, B)
    expected = torch.linalg.svdvals(B @ A)
    expected = torch.cat([expected, expected.new_zeros(max(0, r - len(expected)))])[:r]
    # float64 rounding of a product with norm of order ten
    torch.testing.assert_close(sigma, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(B_new @ A_new, B @ A, rtol=1e-11, atol=1e-12)
    assert A_new.shape == A.shape and B_new.shape == B.shape
    for gram in (A_new @ A_new.mT, B_new.mT @ B_new):  # both sides carry Σ, so neither is needlessly large
        torch.testing.assert_close(gram, torch.diag(sigma), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_no_adapter_of_the_rank_is_nearer(rank):
    """Eckart–Young: the error is that of the float64 SVD of ΔW, on embeddings, linears and convolutions."""
    model = peft_toy()
    before = {pair.name: product(pair) for pair in find_lora_pairs(model)}
    worse = 0.0
    for basis in ("svd", "stored"):
        with truncated(model, rank, basis=basis) as ranks:
            assert set(ranks.values()) == {rank}
            for pair in find_lora_pairs(model):
                W = before[pair.name]
                error = torch.linalg.matrix_norm(W - product(pair)).item()
                best = torch.linalg.svdvals(W)[rank:].square().sum().sqrt().item()
                if basis == "svd":
                    assert error == pytest.approx(best, rel=1e-10)
                worse = max(worse, error / best)
    assert worse > 1.05  # the stored order is not optimal, so the first assertion could fail


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("energy", [None, 1.0])
def test_at_full_rank_nothing_changes(energy, dtype):
    model = peft_toy().to(dtype)
    before = models.snapshot(model)
    expected = {pair.name: product(pair) for pair in find_lora_pairs(model)}
    eps = torch.finfo(dtype).eps
    with truncated(model, energy=energy):
        for pair in find_lora_pairs(model):
            W = expected[pair.name]
            # a rounding of A and of B; in float64 also the backward error of two QRs and an SVD, a few of ‖ΔW‖
            error = torch.linalg.matrix_norm(product(pair) - W, ord=2)
            assert error <= 16 * eps * torch.linalg.matrix_norm(W, ord=2)
    models.assert_same(models.snapshot(model), before)


def trained(steps=8):
    model = models.llama(torch.float64, start="random")
    optimizer = rank_side(model, lr=1e-2, inverse_every=2)
    models.fit(model, optimizer, steps)
    return model, {p.name: (optimizer.state[p.B]["factor"], optimizer.state[p.A]["factor"]) for p in optimizer.pairs}


def test_the_balanced_cut_costs_least_under_the_kfac_quadratic():
    """½ tr(S_d Δ S_u Δᵀ) of the coefficients Δ that are dropped is ½ Σ_{i ≥ ρ} σ_i², the least of any cut."""
    model, factors = trained()
    for pair in find_lora_pairs(model):
        S_u, S_d = factors[pair.name]
        A, B = pair.A.detach().clone(), pair.B.detach().clone()
        own = order_pair(pair, "balanced", (S_u, S_d))
        torch.testing.assert_close(own.B @ own.A, B @ A, rtol=1e-9, atol=1e-10)  # T T⁻¹ with condition up to 1e3
        for rank in range(1, pair.rank):
            tail = own.energy[rank:].sum().item() / 2
            # 1e-4 is what the relative damping of 1e-6 leaves of small eigenvalues
            assert tail == pytest.approx(oracles.eckart_young(rank, S_u, S_d), rel=1e-3)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("ranks", [3, {"emb": 1, "up": 4}])
def test_an_export_is_the_truncated_model(tmp_path, stable, ranks):
    """rsLoRA and alphas by pattern: the rank changes, the scaling of every layer does not."""
    model = peft_toy(use_rslora=stable, alpha_pattern={"up": 5}, rank_pattern={"down": 5})
    chosen = by_leaf(model, ranks) if isinstance(ranks, dict) else ranks
    whole, kept = outputs(model), models.snapshot(model)
    twin = loaded(export_adapter(model, tmp_path, ranks=chosen, basis="svd"))
    models.assert_same(models.snapshot(model), kept)
    with truncated(model, chosen):
        # the scaling comes back from alpha and may be one float64 unit away
        torch.testing.assert_close(outputs(twin), outputs(model), rtol=1e-12, atol=1e-11)
        assert not torch.allclose(outputs(twin), whole)
    assert all(p.rank == (3 if isinstance(ranks, int) else chosen.get(p.name, p.rank)) for p in find_lora_pairs(twin))
    if ranks == 3 and not stable:
        said = json.loads((tmp_path / "adapter_config.json").read_text())
        assert said["r"] == 3 and said["rank_pattern"] == {}
    scalings = {p.name: p.scaling for p in find_lora_pairs(model)}
    assert {p.name: p.scaling for p in find_lora_pairs(twin)} == pytest.approx(scalings, rel=1e-15)


@pytest.mark.parametrize("basis", ["svd", "balanced"])
def test_a_full_export_in_another_basis_is_the_same_adapter(tmp_path, basis):
    model, factors = trained()
    folder = export_adapter(model, tmp_path, basis=basis, factors=factors if basis == "balanced" else None)
    twin = PeftModel.from_pretrained(models.llama(torch.float64, start="random").unload(), folder).double()
    assert models.loss(twin, 9).item() == pytest.approx(models.loss(model, 9).item(), rel=1e-9)
    ours, theirs = (dict(zip(map(str, range(99)), find_lora_pairs(m), strict=False)) for m in (model, twin))
    assert not any(torch.allclose(ours[k].A, theirs[k].A) for k in ours)  # another basis it is


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_share_is_the_smallest_rank_that_holds_it(tmp_path, energy):
    model = peft_toy()
    twin = loaded(export_adapter(model, tmp_path, energy=energy, basis="svd"))
    for pair, cut in zip(find_lora_pairs(model), find_lora_pairs(twin), strict=True):
        values = torch.linalg.svdvals(product(pair)).square()
        share = values.cumsum(0) / values.sum()
        assert share[cut.rank - 1] >= energy and (cut.rank == 1 or share[cut.rank - 2] < energy)
    assert energy != 0.9 or len(set(ranks_of(twin).values())) > 1  # ranks by pair, through rank_pattern


def test_a_cut_composes_with_padding_and_targets(tmp_path):
    model = peft_toy()
    with truncated(model, 2):
        expected = outputs(model)
    for kwargs in ({"pad_to": 5}, {"target": "vllm"}, {"target": "tensorrt-llm"}):
        twin = loaded(export_adapter(model, tmp_path / str(kwargs), ranks=2, basis="svd", **kwargs))
        torch.testing.assert_close(outputs(twin), expected, rtol=1e-12, atol=1e-10)  # the scaling folded into B


def test_one_adapter_of_two_is_cut():
    model = peft_toy()
    model.add_adapter("b", config(target_modules=["up"]))
    before = models.snapshot(model)
    with truncated(model, 2, adapter="default") as ranks:
        assert set(ranks.values()) == {2}
        changed = models.differences(before, models.snapshot(model))
    assert changed and not any(".b." in name for name in changed)


def rest(model, how):
    """Let a model not compute with its adapter "default"; returns what undoes it."""
    if how == "merged":
        model.merge_adapter()
        return model.unmerge_adapter
    if how == "inactive":
        model.add_adapter("b", config(target_modules=["up"]))
        model.double().set_adapter("b")
        return lambda: model.set_adapter("default")
    if how == "disabled":
        context = model.disable_adapter()
        context.__enter__()
        return lambda: context.__exit__(None, None, None)
    return lambda: None


@pytest.mark.parametrize("how", ["merged", "disabled", "inactive", ""])
def test_an_adapter_that_the_model_does_not_compute_with_is_not_measured(how):
    model = peft_toy()
    back = rest(model, how)
    before = models.snapshot(model)
    for use in (
        lambda: truncated(model, 2, adapter="default").__enter__(),
        lambda: smallest_rank(model, [X], loss=lambda m, x: m(x).square().mean(), adapter="default"),
    ):
        if how:
            with pytest.raises(ValueError, match=f"emb is {how}: cutting it would change nothing that the model"):
                use()
            models.assert_same(models.snapshot(model), before)
    back()
    full = outputs(model)
    # unmerging rounds the base weights
    torch.testing.assert_close(full, outputs(peft_toy()), rtol=1e-12, atol=1e-10)
    with truncated(model, 2, adapter="default"):
        assert not torch.allclose(outputs(model), full)
    assert smallest_rank(model, [X], loss=lambda m, x: m(x).square().mean(), adapter="default").table[-1].rank == 6


def test_resting_adapters_are_cut_beside_active_ones_and_not_alone():
    model = peft_toy()
    model.add_adapter("b", config(target_modules=["up"]))
    model.double()
    with truncated(model, 2) as ranks:
        assert len(ranks) == 5 and set(ranks.values()) == {2}
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match="is inactive"), truncated(model, 2):
        pass


def test_a_merged_adapter_is_exported_cut(tmp_path):
    """Its matrices are as they were, so that the file is too."""
    model, files = peft_toy(), []
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        folder = export_adapter(model, tmp_path / str(merged), ranks=2, basis="svd")
        files.append((folder / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_bad_arguments_are_named(tmp_path):
    model, factors = peft_toy(), {}
    name = find_lora_pairs(model)[0].name
    for kwargs, error, text in (
        ({"basis": "pca"}, ValueError, "basis must be one of 'stored', 'svd', 'balanced', got 'pca'"),
        ({"basis": "balanced"}, ValueError, "factors must be given"),
        ({"basis": "svd", "factors": factors}, ValueError, "factors must be given for basis='balanced' and for it"),
        ({"basis": "balanced", "factors": factors}, ValueError, "factors must have all pairs"),
        ({"basis": "balanced", "factors": {name: (torch.eye(2),) * 2}}, ValueError, "must be two of shape"),
        ({"basis": "balanced", "factors": 3}, TypeError, "factors must be a mapping"),
        ({"ranks": 2, "energy": 0.5}, ValueError, "ranks and energy cannot both"),
        ({"energy": 0.5, "basis": "stored"}, ValueError, "needs basis='svd'"),
        ({"energy": 0.0}, ValueError, r"energy must be in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, ValueError, "energy must be in"),
        ({"energy": "most"}, TypeError, "energy must be a number"),
        ({"ranks": True}, TypeError, "ranks must be an int"),
        ({"ranks": 0}, ValueError, "at least 1"),
    ):
        kwargs = {"basis": "svd", **kwargs}
        with pytest.raises(error, match=text):
            export_adapter(model, tmp_path / "never", **kwargs)
        with pytest.raises(error, match=text), truncated(model, **kwargs):
            pass
    assert not (tmp_path / "never").exists()


def test_an_A_with_a_bias_keeps_its_basis():
    model = models.mlp()
    model.first.lora_A.bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    with (
        pytest.raises(
            ValueError, match=r"A has a bias, which no change of basis carries .first.; basis=.stored. keeps it"
        ),
        truncated(model, 2),
    ):
        pass
    with truncated(model, 2, basis="stored") as ranks:
        assert ranks == {"first": 2, "second": 2, "third": 2, "idle": 2}


def test_an_error_inside_restores():
    model = peft_toy()
    before = models.snapshot(model)
    with pytest.raises(KeyError), truncated(model, 1):
        raise KeyError
    models.assert_same(models.snapshot(model), before)


# ---------------------------------------------------------------------------------------------- the smallest rank


class Quadratic(nn.Module):
    """One layer whose loss is ½ ‖ΔW − goal‖²: with ΔW = goal, a cut costs exactly half its discarded energy."""

    def __init__(self, goal):
        super().__init__()
        self.layer = nn.Linear(7, 5, bias=False)
        self.goal = goal

    def forward(self, offset):
        return self.layer(torch.eye(7, dtype=torch.float64)).mT - self.goal, offset


def quadratic(sigma=(8.0, 4.0, 2.0, 1.0)):
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(5, 4).double())[0], torch.linalg.qr(torch.randn(7, 4).double())[0]
    goal = U * torch.tensor(sigma).double() @ V.mT
    model = get_peft_model(Quadratic(goal), LoraConfig(r=4, lora_alpha=4, target_modules=["layer"])).double()
    model.base_model.model.layer.base_layer.weight.data.zero_()
    pair, mix = find_lora_pairs(model)[0], torch.randn(4, 4).double()
    pair.A.data.copy_(torch.linalg.solve(mix, V.mT)), pair.B.data.copy_(U * torch.tensor(sigma).double() @ mix)
    return model


def distance(model, batch):
    difference, offset = model(batch)
    return 0.5 * difference.square().sum() + offset


@pytest.mark.parametrize(("tolerance", "rank"), [(0.0, 4), (0.0049, 4), (0.0051, 3), (0.026, 2), (0.11, 1), (9.0, 1)])
def test_smallest_rank_against_the_closed_form(tolerance, rank):
    """Losses 100 + ½ Σ_{i ≥ ρ} σ²: 110.5, 102.5, 100.5, 100."""
    model = quadratic()
    before, mode = models.snapshot(model), model.training
    found = smallest_rank(model, [99.0, 101.0], tolerance, loss=distance, ranks=[1, 2, 3])
    assert [row.rank for row in found.table] == [1, 2, 3, 4]
    assert [row.loss for row in found.table] == pytest.approx([110.5, 102.5, 100.5, 100.0], rel=1e-12)
    assert [row.bytes for row in found.table] == [8 * (5 + 7) * k for k in (1, 2, 3, 4)]
    assert found.rank == rank and found.limit == pytest.approx(100 * (1 + tolerance), rel=1e-12)
    models.assert_same(models.snapshot(model), before)
    assert model.training == mode


def test_the_table_is_that_of_the_files(tmp_path):
    """Each row's loss is that of the exported adapter, its bytes those of the file's tensors; in evaluation mode."""
    from safetensors.torch import load_file

    model = models.llama(torch.float64, r=6, lora_dropout=0.5, start="random")
    batches = [{"input_ids": models.llama_ids(i), "labels": models.llama_ids(i)} for i in (7, 8)]
    found = smallest_rank(model.train(), batches, 0.05)
    assert [row.rank for row in found.table] == [1, 2, 4, 6] and model.training
    base = models.llama(torch.float64).unload()
    for row in found.table:
        folder = export_adapter(model, tmp_path / str(row.rank), ranks=row.rank, basis="svd")
        tensors = load_file(folder / "adapter_model.safetensors")
        assert sum(t.nbytes for t in tensors.values()) == row.bytes
        twin = PeftModel.from_pretrained(base, folder, adapter_name=str(row.rank)).double().eval()
        expected = sum(twin(**b).loss.item() for b in batches) / 2
        assert row.loss == pytest.approx(expected, rel=1e-9)
        base = twin.unload()


def test_smallest_rank_refuses():
    model = quadratic()
    for kwargs, error, text in (
        ({"tolerance": -0.1}, ValueError, "tolerance must be a finite number"),
        ({"tolerance": math.nan}, ValueError, "tolerance must be a finite number"),
        ({"ranks": [2, 1]}, ValueError, "ranks must be None or integers ascending from at least 1 to at most 4"),
        ({"ranks": [0, 1]}, ValueError, "ranks must be"),
        ({"ranks": [8]}, ValueError, "ranks must be"),
        ({"ranks": []}, ValueError, "ranks must be"),
        ({"batches": []}, ValueError, "batches must have at least one"),
        ({"loss": None}, TypeError, "batches must be mappings where loss is None, got float"),
        ({"loss": lambda *_: math.nan}, ValueError, "loss of the full adapter must be finite"),
    ):
        with pytest.raises(error, match=text):
            smallest_rank(model, **{"batches": [1.0], "loss": distance, **kwargs})
    with pytest.raises(ValueError, match="must have LoRA pairs"):
        smallest_rank(nn.Linear(2, 2), [1.0], loss=distance)


def test_pairs_of_several_ranks(tmp_path):
    model = peft_toy()
    resize_adapter(model, by_leaf(model, {"emb": 2, "conv": 5}))
    with truncated(model, 3) as ranks:
        assert sorted(ranks.values()) == [2, 3, 3, 3]
    assert isinstance(Toy(), nn.Module) and set(ranks_of(loaded(export_adapter(model, tmp_path, ranks=3))).values())
