"""One rank out of a nested adapter: truncated forwards, exports, what is refused, and prefixes of GritKFAC's basis."""

import copy
import json
import re

import models
import oracles
import pytest
import torch
from gora_models import published
from grit_kit import rank_side
from peft import PeftModel

from curvopt import MatryoshkaScaledAdam, find_lora_pairs
from curvopt.functional.nested import diagonal
from curvopt.lora import export_adapter

NESTINGS = ("matryoshka", "dylora", "lora")


def trained(nesting="matryoshka", dtype=torch.float64, steps=6, **kwargs):
    """Return a trained LoraMLP (ranks 4, 4, 3) and its optimizer."""
    model = models.mlp(dtype, start="zero")
    optimizer = MatryoshkaScaledAdam(model, lr=3e-2, nesting=nesting, **kwargs)
    models.fit(model, optimizer, steps)
    return model, optimizer


def by_hand(model, optimizer, rank):
    """Return a copy of the model whose layers compute s(ρ) B[:, :ρ] A[:ρ], A taken from what the optimizer keeps."""
    twin = copy.deepcopy(model)
    group = optimizer.param_groups[0]
    for layer, other in zip(model.layers, twin.layers, strict=True):
        ranks = {"lora": (layer.rank,)}.get(group["nesting"]) or tuple(sorted({1, 2, layer.rank}))
        own = min(rank, layer.rank)
        s = {"none": 1.0, "rank": 1 / own}[group["scale"]]
        if group["nesting"] == "dylora":
            A = optimizer.state[layer.lora_A.weight]["full"]
        else:
            P = torch.tensor(diagonal(ranks, layer.rank, group["scale"]), dtype=torch.float64)
            A = layer.lora_A.weight.detach() * 1.5 / P[:, None]
        other.lora_A.weight.data = s / 1.5 * A * (torch.arange(layer.rank) < own)[:, None]
    return twin


@pytest.mark.parametrize("scale", ["none", "rank"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_truncated_computes_at_the_rank(nesting, scale):
    model, optimizer = trained(nesting, scale=scale)
    before, whole = models.snapshot(model), models.loss(model, 9).item()
    for rank in (4,) if nesting == "lora" else (1, 2, 4):
        expected = models.loss(by_hand(model, optimizer, rank), 9).item()
        with optimizer.truncated(rank):
            assert models.loss(model, 9).item() == pytest.approx(expected, rel=1e-12)
        models.assert_same(models.snapshot(model), before)
        assert rank == 4 or abs(expected - whole) > 1e-6  # the ranks differ at all


def test_with_P_kept_it_is_a_prefix_of_what_was_trained():
    model, optimizer = trained()
    whole, before = models.loss(model, 9).item(), models.snapshot(model)
    with optimizer.truncated(4, keep_P=True):
        models.assert_same(models.snapshot(model), before)
        assert models.loss(model, 9).item() == whole
    with optimizer.truncated(2, keep_P=True):
        for name in ("first", "second", "third"):
            A, cut = before[f"{name}.lora_A.weight"], model.get_submodule(name).lora_A.weight
            assert torch.equal(cut[:2], A[:2]) and not cut[2:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nesting", ["matryoshka", "dylora"])
def test_truncated_nests_and_restores_to_the_bit(nesting, dtype):
    model, optimizer = trained(nesting, dtype)
    before = models.snapshot(model)

    def at(rank):
        with optimizer.truncated(rank):
            return models.snapshot(model)

    one, two = at(1), at(2)
    with optimizer.truncated(2):
        with optimizer.truncated(1):
            models.assert_same(models.snapshot(model), one)
        models.assert_same(models.snapshot(model), two)
        with optimizer.truncated(2):
            models.assert_same(models.snapshot(model), two)
    models.assert_same(models.snapshot(model), before)
    with pytest.raises(KeyError), optimizer.truncated(2), optimizer.truncated(1):
        raise KeyError
    models.assert_same(models.snapshot(model), before)
    models.fit(model, optimizer, 1, 20)  # and training goes on


def test_no_step_while_truncated():
    _, optimizer = trained()
    with optimizer.truncated(2), pytest.raises(RuntimeError, match=r"step\(\) was called inside truncated\(\)"):
        optimizer.step()


@pytest.mark.parametrize("rank", [3, 0, -1, 5, 2.0, True, None, "2"])
def test_ranks_that_were_not_trained(rank, tmp_path):
    """The layers of rank 4 are trained at 1, 2, 4; 3 is one of the third layer's alone."""
    _, optimizer = trained(ranks=[1, 2, 4])
    for use in (optimizer.truncated, lambda k: optimizer.export(tmp_path / "never", k)):
        with pytest.raises(ValueError, match="rank must be one of the ranks trained"):
            use(rank)
    if rank in (0, -1, 5, 2.0, None, "2"):
        with pytest.raises(ValueError, match="rank must be an integer from 1 to 4"):
            optimizer.truncated(rank, strict=False)


def test_the_ranks_that_all_pairs_have_are_named():
    """The layers have ranks 4, 4 and 3: 3 is trained of the third, and of "lora" 4 alone stands for all."""
    for nesting, named in (("matryoshka", "[1, 2, 4]"), ("lora", "[4]")):
        _, optimizer = trained(nesting)
        with pytest.raises(ValueError, match=re.escape(f"one of the ranks trained of all pairs, {named}")):
            optimizer.truncated(3)
        with optimizer.truncated(4):
            pass


def test_an_untrained_rank_if_asked():
    model, optimizer = trained()
    with optimizer.truncated(3, strict=False):
        for layer in model.layers:
            assert not layer.lora_A.weight[3:].any() and layer.lora_A.weight[:3].all()


@pytest.mark.parametrize("how", ["merged", "disabled", "inactive"])
def test_an_adapter_that_is_not_at_work_is_exported_and_not_truncated(how, tmp_path):
    model = models.llama(torch.float64, adapters=("default", "other"), start="random")
    optimizer = MatryoshkaScaledAdam(model, lr=3e-2, adapter="default")
    models.fit(model, optimizer, 2)
    if how == "merged":
        model.merge_adapter()
    elif how == "disabled":
        model.base_model.disable_adapter_layers()
    else:
        model.set_adapter("other")
    before = models.snapshot(model)
    with pytest.raises(ValueError, match=f"is {how}: cutting it would change nothing that the model computes"):
        optimizer.truncated(2)
    folder = optimizer.export(tmp_path, 2)
    models.assert_same(models.snapshot(model), before)
    if how == "merged":
        model.unmerge_adapter()
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    with optimizer.truncated(2):
        # unmerging rounds the base weights
        assert models.loss(loaded(model, folder), 9).item() == pytest.approx(models.loss(model, 9).item(), rel=1e-10)


def test_pairs_of_smaller_rank_drop_the_larger_ranks():
    model, optimizer = trained(ranks=[2, 4])
    assert optimizer.nested_ranks() == {"first": (2, 4), "second": (2, 4), "third": (2,), "idle": (2, 4)}
    assert not model.third.lora_A.weight[2:].any() and not model.third.lora_B.weight[:, 2:].any()
    with optimizer.truncated(4):
        assert model.third.lora_A.weight[:2].all() and model.first.lora_A.weight.all()


# ---------------------------------------------------------------------------------------------- export


def loaded(model, folder):
    base = copy.deepcopy(model).unload()
    return PeftModel.from_pretrained(base, folder).to(next(model.parameters()).dtype)


@pytest.mark.parametrize("pad_to", [None, 8])
@pytest.mark.parametrize("nesting", ["matryoshka", "dylora"])
def test_an_export_is_the_truncated_model(nesting, pad_to, tmp_path):
    model = models.llama(torch.float64, rank_pattern={"q_proj": 2, "down_proj": 6})
    optimizer = MatryoshkaScaledAdam(model, lr=3e-2, nesting=nesting, scale="sqrt")
    models.fit(model, optimizer, 5)
    before = models.snapshot(model)
    for rank in (1, 2, 6):
        folder = optimizer.export(tmp_path / str(rank), rank, pad_to=pad_to, strict=rank != 6)
        with optimizer.truncated(rank, strict=rank != 6):
            expected = models.loss(model, 9).item()
        twin = loaded(model, folder)
        # the file holds float64; the scaling is alpha / r, a rounding away
        assert models.loss(twin, 9).item() == pytest.approx(expected, rel=1e-12)
        said = json.loads((folder / "adapter_config.json").read_text())
        ranks = {p.shape[0] for name, p in twin.named_parameters() if "lora_A" in name}
        assert ranks == ({8} if pad_to else {1: {1}, 2: {2}, 6: {2, 4, 6}}[rank])
        assert not pad_to or (said["r"] == 8 and not said["rank_pattern"])
    models.assert_same(models.snapshot(model), before)


def test_export_wants_a_peft_model(tmp_path):
    _, optimizer = trained()
    with pytest.raises(TypeError, match="model must be an unwrapped PeftModel, got LoraMLP"):
        optimizer.export(tmp_path, 2)
    named = models.llama()
    optimizer = MatryoshkaScaledAdam(named.named_parameters())
    with pytest.raises(TypeError, match="NoneType"):
        optimizer.export(tmp_path, 2)


def test_export_of_one_adapter_of_two(tmp_path):
    model = models.llama(adapters=("default", "other"), start="random")
    optimizer = MatryoshkaScaledAdam(model, lr=1e-2, adapter="other")
    folder = optimizer.export(tmp_path / "other", 2)
    twin = loaded(model, folder)
    model.set_adapter("other")
    with optimizer.truncated(2):
        assert models.loss(twin, 3).item() == pytest.approx(models.loss(model, 3).item(), rel=1e-5)  # float32


def test_export_of_a_compiled_model_is_that_of_the_one_inside(tmp_path):
    model = models.llama(torch.float64, start="random")
    files = []
    for own in (model, torch.compile(model, backend="eager")):
        folder = MatryoshkaScaledAdam(own, lr=1e-2).export(tmp_path / str(len(files)), 2)
        files.append((folder / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert models.loss(loaded(model, folder), 3).item() != models.loss(model, 3).item()


# ---------------------------------------------------------------------------------------------- what is refused

REFUSED = [
    ("ranks", [[], (), [2, 1], [1, 1], [0, 1], [-1], [1.0, 2], [True, 2], "12", 4, {1, 2}], "None or ascending"),
    ("ranks", [[1, 5], [8]], "at most"),
    ("ranks", [[4]], "such that one is at most 3, the rank of third"),
    ("scale", ["alpha", None, 1.0, ""], "one of 'none', 'rank', 'sqrt'"),
    ("nesting", ["russian", None, "DyLoRA"], "one of 'matryoshka', 'dylora', 'lora'"),
    ("lr", [-1.0], "a number ≥ 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "allowed"), REFUSED, ids=lambda x: repr(x)[:20])
def test_bad_arguments_are_named(name, values, allowed):
    model = models.mlp()
    for value in values:
        with pytest.raises(ValueError) as error:
            MatryoshkaScaledAdam(model, **{name: value})
        message = str(error.value)
        shown = repr(value) in message or (isinstance(value, list) and repr(tuple(value)) in message)
        assert message.startswith(name) and shown and allowed in message, message
    MatryoshkaScaledAdam(model)  # nothing is left of those


def test_a_generator_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"generator must be None or a torch.Generator on the CPU, got 0"):
        MatryoshkaScaledAdam(models.mlp(), generator=0)


def test_a_scaling_of_zero_is_refused():
    model = models.mlp()
    model.second.alpha = 0.0
    with pytest.raises(ValueError, match=r"scaling of second must be above 0, got 0\.0"):
        MatryoshkaScaledAdam(model)


def test_the_groups_of_a_pair_must_agree():
    model = models.mlp()
    A = [p for name, p in model.named_parameters() if "lora_A" in name]
    B = [p for name, p in model.named_parameters() if "lora_B" in name]
    with pytest.raises(ValueError, match=r"ranks of first must be the same in the groups of its A and B"):
        MatryoshkaScaledAdam([{"params": A, "ranks": (1, 2)}, {"params": B}], model=model)


def test_an_optimizer_made_twice_scales_once():
    """A notebook's cell that is run again makes a second one; the first, alive or not, has done nothing."""
    model, twin = models.mlp(start="zero"), models.mlp(start="zero")
    first = MatryoshkaScaledAdam(model, lr=1e-2)
    models.fit(model, MatryoshkaScaledAdam(model, lr=1e-2), 3)
    models.fit(twin, MatryoshkaScaledAdam(twin, lr=1e-2), 3)
    models.assert_same(models.snapshot(model), models.snapshot(twin))
    assert first.pairs


def test_a_second_optimizer_after_the_first_scales_nothing_again():
    """What one has trained, another goes on with: B is not zero any more."""
    model = models.mlp(start="zero")
    optimizer = MatryoshkaScaledAdam(model, lr=1e-2)
    models.fit(model, optimizer, 3)
    before = models.snapshot(model)
    models.fit(model, MatryoshkaScaledAdam(model, lr=0.0), 1, 3)
    models.assert_same(models.snapshot(model), before)


def test_a_direction_in_use_above_the_largest_rank_is_refused():
    model = models.mlp(start="random")
    optimizer = MatryoshkaScaledAdam(model, ranks=[1, 2])
    with pytest.raises(ValueError, match=r"ranks must be up to 4 where that many directions are in use \(first\)"):
        models.fit(model, optimizer, 1)


# ---------------------------------------------------------------------------------------------- GritKFAC's basis


def test_prefixes_of_the_balanced_basis_are_the_best_adapters_of_their_rank():
    """After a balanced reprojection the cheapest ρ directions to keep, by the K-FAC quadratic, are the first ρ."""
    model = models.mlp(start="zero")
    optimizer = rank_side(model, lr=1e-2, damping=1e-6, inverse_every=2, reproject_every=10)
    models.fit(model, optimizer, 10)  # the tenth step ends with a reprojection
    for pair in optimizer.pairs[:3]:
        S_d, S_u = (optimizer.state[p]["factor"] for p in (pair.A, pair.B))
        eye = torch.eye(pair.rank, dtype=torch.float64)
        for rank in range(1, pair.rank):
            cost, kept = oracles.best_subset(rank, eye, eye, S_u, S_d)
            assert kept == tuple(range(rank))
            # (9): no other subspace of that dimension is cheaper either; 1e-4 is what the damping leaves
            assert cost == pytest.approx(oracles.eckart_young(rank, S_u, S_d), rel=1e-4)


def test_control_before_the_reprojection_they_are_not():
    model = models.mlp(start="zero")
    optimizer = rank_side(model, lr=1e-2, damping=1e-6, inverse_every=2)
    models.fit(model, optimizer, 10)
    pair = optimizer.pairs[0]
    S_d, S_u = (optimizer.state[p]["factor"] for p in (pair.A, pair.B))
    eye = torch.eye(pair.rank, dtype=torch.float64)
    cost, _ = oracles.best_subset(2, eye, eye, S_u, S_d)
    assert cost > 1.01 * oracles.eckart_young(2, S_u, S_d)


@pytest.mark.parametrize("gora", [False, True])
def test_a_nested_export_of_gritkfac(gora, tmp_path):
    """GoRA's start or LoRA's, steps, a reprojection: each prefix is a plain adapter of the model's directions < ρ."""
    model = models.llama(torch.float64, r=8)
    calibration = 2 if gora else 0
    if gora:

        def then(model):
            return rank_side(model, lr=1e-2, reproject_every=10)

        optimizer = published(model, rank=8, min_rank=4, max_rank=12, calibration_steps=calibration, then=then)
    else:
        optimizer = rank_side(model, lr=1e-2, reproject_every=10)
    models.fit(model, optimizer, calibration + 10)
    before, pairs = models.loss(model, 9).item(), find_lora_pairs(model)
    assert not gora or len({pair.rank for pair in pairs}) > 1
    for rank in (2, 6, 12):
        twin = loaded(model, export_adapter(model, tmp_path / str(rank), ranks=rank))
        cut = copy.deepcopy(model)
        with torch.no_grad():
            for pair in find_lora_pairs(cut):
                pair.A[rank:] = 0
        # the file holds float64; the scaling is alpha / r, a rounding away
        assert models.loss(twin, 9).item() == pytest.approx(models.loss(cut, 9).item(), rel=1e-12)
        assert (rank == 12) == (abs(models.loss(cut, 9).item() - before) < 1e-12)


def test_on_top_of_gritkfac_s_basis_nested_training_goes_on():
    """GritKFAC's adapter is taken as it is and trained on as a nested one."""
    model = models.mlp(start="zero")
    grit = rank_side(model, lr=1e-2, reproject_every=5)
    models.fit(model, grit, 5)
    grit.remove_hooks()
    before = models.loss(model, 9).item()
    nested = MatryoshkaScaledAdam(model, lr=1e-2)
    assert models.loss(model, 9).item() == before
    losses = models.fit(model, nested, 40, 5)
    assert sum(losses[-5:]) < sum(losses[:5])
