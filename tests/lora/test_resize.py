"""Adapters of another rank: the update they make, what their layers say, and what comes back from disk."""

import math

import pytest
import torch
from export_kit import Toy, X, by_leaf, config, loaded, outputs, peft_toy, ranks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from curvopt.lora import find_lora_pairs, pair_by_name, resize_adapter, resize_pair
from curvopt.lora.resize import alpha_for


def delta(pair):
    """s B A of a pair, as matrices."""
    A, B = pair.matrix("A", pair.A).detach(), pair.matrix("B", pair.B).detach()
    A, B = (A if pair.dim_A == 0 else A.T), (B if pair.dim_B == 1 else B.T)
    return pair.scaling * B @ A


def raw(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def plain_layers():
    """One layer of each style without PEFT."""
    layers = {
        "tune": {"lora_a": nn.Linear(7, 4, bias=False), "lora_b": nn.Linear(4, 5, bias=False), "alpha": 6, "rank": 4},
        "lib": {"lora_A": raw(4, 7), "lora_B": raw(5, 4), "lora_alpha": 6, "r": 4, "scaling": 1.5, "in_features": 4},
        "turned": {"A": raw(7, 4), "B": raw(4, 5), "scale": 0.5},
        "down-up": {"lora_down": nn.Conv2d(3, 4, 2), "lora_up": nn.Conv2d(4, 5, 1), "alpha": torch.tensor(6.0), "r": 4},
    }
    for name, parts in layers.items():
        layers[name] = nn.Module()
        for key, value in parts.items():
            setattr(layers[name], key, value)
    return nn.ModuleDict(layers).double()


@pytest.mark.parametrize("stable", [False, True])
def test_growing_keeps_the_outputs(stable):
    model = peft_toy(use_rslora=stable)
    before, held = outputs(model), [(p, p.A, p.B, p.scaling, delta(p)) for p in find_lora_pairs(model)]
    ranks = {"emb": 9, "up": 7, "down": 6, "conv": 12}
    assert set(resize_adapter(model, by_leaf(model, ranks)).values()) == {6, 7, 9, 12}
    # Only the order of summation changes: a few float64 roundings of outputs of order 100.
    torch.testing.assert_close(outputs(model), before, rtol=1e-12, atol=1e-11)
    for pair, A, B, scaling, update in held:
        assert pair.A is A and pair.B is B and A.grad is None and pair.scaling == scaling
        torch.testing.assert_close(delta(pair), update, rtol=1e-12, atol=1e-12)
        bound = 1 / math.sqrt(A[0].numel())
        assert pair.rank == 6 or 0 < A[6:].abs().max() <= bound
    assert ranks_of(model) == ranks


def test_slicing_keeps_the_leading_part():
    model = peft_toy()
    pairs = find_lora_pairs(model)
    kept = [(p.A[:4].detach().clone(), p.B[:, :4].detach().clone()) for p in pairs]
    outputs(model)
    model(X).sum().backward()
    resize_adapter(model, {p.name: 4 for p in pairs})
    for pair, (A, B) in zip(pairs, kept, strict=True):
        assert torch.equal(pair.A, A) and torch.equal(pair.B, B) and pair.A.grad is pair.B.grad is None
        layer = pair.module
        assert (layer.r["default"], layer.lora_alpha["default"], pair.scaling) == (4, 6, 1.5)
    up, conv = pairs[1].module, pairs[3].module
    assert (up.lora_A["default"].out_features, up.lora_B["default"].in_features) == (4, 4)
    assert (conv.lora_A["default"].out_channels, conv.lora_B["default"].in_channels) == (4, 4)
    model(X).sum().backward()  # gradients of the new shapes arrive
    assert all(p.A.grad.shape == p.A.shape for p in pairs)


def test_the_next_backward_works_while_the_old_loss_lives():
    for resize, works in ((lambda pair: resize_pair(pair, 2), True), (careless, False)):
        model = peft_toy(target_modules=["up"])
        (pair,) = find_lora_pairs(model)
        old_loss = model(X).sum()
        old_loss.backward()
        resize(pair)
        new_loss = model(X).sum()
        if works:
            new_loss.backward()
            assert pair.A.grad.shape == (2, 8) and pair.B.grad.shape == (16, 2)
        else:  # why the parameter's data is not simply assigned
            with pytest.raises(RuntimeError, match="invalid gradient"):
                new_loss.backward()
        assert old_loss.grad_fn is not None


def careless(pair):
    pair.A.grad = pair.B.grad = None
    pair.A.data, pair.B.data = pair.A.data[:2], pair.B.data[:, :2]


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("keep", [True, False])
def test_saved_and_loaded(tmp_path, stable, keep):
    model = peft_toy(use_rslora=stable, rank_pattern={"down": 3}, alpha_pattern={"up": 4})
    first = {"emb": 4, "up": 5, "down": 6, "conv": 3}
    for ranks in (first, {"emb": 2, "up": 7, "down": 3, "conv": 3}):  # twice: patterns are replaced, not piled up
        resize_adapter(model, by_leaf(model, ranks), keep_scaling=keep)
        assert len(model.peft_config["default"].rank_pattern) <= 1 + 4
        model.save_pretrained(tmp_path)
        twin = loaded(tmp_path)
        assert ranks_of(twin) == ranks
        # Under √r some scalings have no exact alpha: one float64 unit.
        close = {"rtol": 1e-14, "atol": 1e-12} if stable and keep else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(outputs(twin), outputs(model), **close)
    expected = {False: 9 / 2, True: 9 / math.sqrt(2)}[stable]
    found = find_lora_pairs(model)[0].scaling
    assert (found == expected) is not keep
    assert "^down" not in model.peft_config["default"].rank_pattern  # the pattern that stood there says 3 again


def test_there_and_back_leaves_the_config():
    model = peft_toy()
    resize_adapter(model, by_leaf(model, {"up": 4, "conv": 8}))
    assert model.peft_config["default"].rank_pattern == {"^up": 4, "^conv": 8}
    assert model.peft_config["default"].alpha_pattern == {"^up": 6, "^conv": 12}
    resize_adapter(model, by_leaf(model, {"up": 6, "conv": 6}))
    assert model.peft_config["default"].rank_pattern == {} == model.peft_config["default"].alpha_pattern


def test_two_adapters_with_one_config_object(tmp_path):
    shared = config(target_modules=["up", "down"])
    model = get_peft_model(Toy(), shared).double().eval()
    model.add_adapter("b", shared)
    model.double()
    resize_adapter(model, {"base_model.model.up": 2, "base_model.model.down:b": 5})
    resize_adapter(model, {"base_model.model.up": 3}, adapter="b")  # a path will do when the adapter is given
    model.save_pretrained(tmp_path)
    for adapter, path, ranks in (
        ("default", tmp_path, {"up": 2, "down": 6}),
        ("b", tmp_path / "b", {"up": 3, "down": 5}),
    ):
        model.set_adapter(adapter)
        twin = loaded(path)
        assert ranks_of(twin) == ranks == ranks_of(model, adapter)
        assert torch.equal(outputs(twin), outputs(model))


def test_a_temporary_scale_is_not_written_down(tmp_path):
    model = peft_toy()
    (pair, *_) = find_lora_pairs(model)
    pair.module.set_scale("default", 2.0)
    resize_pair(pair, 3)
    assert pair.scaling == 3.0
    model.save_pretrained(tmp_path)
    assert find_lora_pairs(loaded(tmp_path))[0].scaling == 1.5


@pytest.mark.parametrize("style", ["tune", "lib", "turned", "down-up"])
@pytest.mark.parametrize("keep", [True, False])
def test_plain_layers(style, keep):
    model = plain_layers()
    (pair,) = [p for p in find_lora_pairs(model) if p.path == style]
    A, scaling, update = pair.A, pair.scaling, delta(pair)
    resize_pair(pair, 5, keep_scaling=keep)
    assert pair.A is A and pair.rank == 5 == pair.B.shape[pair.dim_B]
    expected = scaling if keep or style == "turned" else 6 / 5
    assert pair.scaling == expected
    torch.testing.assert_close(delta(pair) / expected, update / scaling, rtol=1e-12, atol=1e-14)
    said = [int(getattr(pair.module, word)) for word in ("rank", "r") if hasattr(pair.module, word)]
    assert said == ([] if style == "turned" else [5])
    assert getattr(pair.module, "in_features", 4) == 4  # the layer's own width, equal to the rank by chance
    if style == "down-up":
        assert pair.module.lora_up(pair.module.lora_down(torch.ones(1, 3, 2, 2).double())).shape == (1, 5, 1, 1)


def test_pairs_by_name_and_memory_order():
    conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    (pair,) = pair_by_name([("x.lora_down.weight", conv.weight), ("x.lora_up.weight", raw(5, 4, 1, 1))])
    resize_pair(pair, 6)
    assert conv.weight.shape == (6, 3, 2, 2) and conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert pair.matrix("A", torch.zeros_like(pair.A)).shape == (6, 12)


def test_the_generator_decides_the_new_rows():
    drawn = []
    for seed in (0, 0, 1):
        model = peft_toy()
        resize_adapter(model, by_leaf(model, {"up": 8}), generator=torch.Generator().manual_seed(seed))
        drawn.append(find_lora_pairs(model)[1].A.detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_errors_change_nothing():
    model = peft_toy()
    name = find_lora_pairs(model)[0].name
    for ranks, error, text in (
        ({name: 3, "nobody": 2}, ValueError, r"no pair is named 'nobody'; some that are: \['base_model"),
        ({name: 3, find_lora_pairs(model)[1].name: 0}, ValueError, "at least 1, got 0"),
        ({name: 2.0}, TypeError, "int"),
        ({name: True}, TypeError, "int"),
    ):
        with pytest.raises(error, match=text):
            resize_adapter(model, ranks)
    assert set(ranks_of(model).values()) == {6}
    model.base_model.model.up.lora_variant["default"] = type("KasaLinearVariant", (), {})()
    with pytest.raises(ValueError, match="KasaLinearVariant"):
        resize_adapter(model, by_leaf(model, {"up": 3}))


def test_a_merged_pair_is_not_resized_and_unmerges_to_what_it_was():
    model = peft_toy()
    before, name = outputs(model), find_lora_pairs(model)[1].name
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"up cannot be resized while it is merged: .* unmerge_adapter\(\)"):
        resize_adapter(model, {name: 3})
    assert set(ranks_of(model).values()) == {6}
    model.unmerge_adapter()
    # W + s B A − s B A in float64: a few roundings of outputs of order 100
    torch.testing.assert_close(outputs(model), before, rtol=1e-12, atol=1e-11)
    resize_adapter(model, {name: 3})
    assert set(ranks_of(model).values()) == {3, 6} and not torch.allclose(outputs(model), before)


def test_an_adapter_that_is_not_merged_is_resized_beside_one_that_is():
    model = peft_toy()
    model.add_adapter("b", config(target_modules=["up"]))
    model.double().merge_adapter(["default"])
    with pytest.raises(ValueError, match="while it is merged"):
        resize_adapter(model, {p.name: 3 for p in find_lora_pairs(model, "default")})
    resize_adapter(model, {p.name: 3 for p in find_lora_pairs(model, "b")})
    assert ranks_of(model, "b") == {"up": 3} and set(ranks_of(model, "default").values()) == {6}


def test_an_init_that_moved_the_base_is_told():
    model = get_peft_model(Toy().float(), config(target_modules=["up"], init_lora_weights="pissa"))
    with pytest.warns(UserWarning, match="pissa"):
        resize_adapter(model, by_leaf(model, {"up": 3}))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 256), st.integers(1, 128), st.integers(1, 128), st.booleans())
def test_alpha_gives_the_scaling_back(alpha, old, new, stable):
    root = math.sqrt if stable else float
    scaling = alpha / root(old)
    again = alpha_for(scaling, root(new)) / root(new)
    assert abs(again - scaling) <= math.ulp(scaling)  # some quotients have no exact alpha: one unit at most
