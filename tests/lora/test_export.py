"""Adapter folders written whole, cut or padded, and read again; the live model stays as it was."""

import json

import models
import pytest
import torch
from export_kit import Toy, by_leaf, config, loaded, outputs, peft_toy, ranks_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from curvopt.lora import export_adapter, find_lora_pairs, resize_adapter


class Grouped(Toy):
    """The same with a convolution whose adapter is no plain pair."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)


def test_export_as_it_is(tmp_path):
    model = peft_toy()
    model.add_adapter("b", config(target_modules=["up"]))
    model.double()
    assert export_adapter(model, tmp_path / "x" / "y") == tmp_path / "x" / "y"
    assert torch.equal(outputs(loaded(tmp_path / "x" / "y")), outputs(model))
    export_adapter(model, tmp_path / "b", adapter="b")
    model.set_adapter("b")
    assert torch.equal(outputs(loaded(tmp_path / "b")), outputs(model))  # in the folder itself, not below it


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("ranks", [3, {"emb": 1, "up": 4}])
def test_export_truncated(tmp_path, stable, ranks):
    model = peft_toy(use_rslora=stable)
    before, kept = outputs(model), {name: t.clone() for name, t in model.state_dict().items()}
    settings = str(model.peft_config["default"])
    export_adapter(model, tmp_path, ranks=by_leaf(model, ranks) if isinstance(ranks, dict) else ranks)
    assert torch.equal(outputs(model), before) and str(model.peft_config["default"]) == settings
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
    twin, said = loaded(tmp_path), json.loads((tmp_path / "adapter_config.json").read_text())
    resize_adapter(
        model, by_leaf(model, ranks) if isinstance(ranks, dict) else {p.name: 3 for p in find_lora_pairs(model)}
    )
    assert ranks_of(twin) == ranks_of(model)
    # The scaling comes back from alpha and may be one float64 unit away.
    torch.testing.assert_close(outputs(twin), outputs(model), rtol=1e-13, atol=1e-12)
    assert not torch.allclose(outputs(twin), before)
    if isinstance(ranks, int):
        assert said["r"] == 3 and said["rank_pattern"] == said["alpha_pattern"] == {}


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_export_padded(tmp_path, stable, mixed):
    model = peft_toy(use_rslora=stable, lora_bias=False)
    if mixed:
        resize_adapter(model, by_leaf(model, {"emb": 2, "up": 5, "conv": 8}), keep_scaling=False)
    export_adapter(model, tmp_path, pad_to=8)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["r"] == 8 and not said["use_rslora"] and said["rank_pattern"] == said["alpha_pattern"] == {}
    assert isinstance(said["lora_alpha"], int)
    twin = loaded(tmp_path)
    assert set(ranks_of(twin).values()) == {8}
    torch.testing.assert_close(outputs(twin), outputs(model), rtol=1e-12, atol=1e-11)  # scaling moved into B
    export_adapter(model, tmp_path, ranks=2, pad_to=4)
    assert all((p.A[2:] == 0).all() and p.rank == 4 for p in find_lora_pairs(loaded(tmp_path)))


def test_export_folds_the_bias_too(tmp_path):
    model = get_peft_model(Toy(), config(target_modules=["up", "down"], lora_bias=True)).double().eval()
    nn.init.normal_(model.base_model.model.up.lora_B["default"].bias)
    resize_adapter(model, by_leaf(model, {"up": 2}), keep_scaling=False)
    export_adapter(model, tmp_path, pad_to=6)
    torch.testing.assert_close(outputs(loaded(tmp_path)), outputs(model), rtol=1e-12, atol=1e-12)


def test_export_refuses_what_moved_the_base(tmp_path):
    model = get_peft_model(Toy().float(), config(target_modules=["up"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="pissa"):
        export_adapter(model, tmp_path, pad_to=8)


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_a_merged_embedding_is_refused(layer, tmp_path):
    """PEFT saves the weights of embeddings beside their adapters: merged ones would count twice when loaded."""
    base = models.llama().unload()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[layer, "q_proj"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=rf"model must not be merged, but .*{layer} is.*call unmerge_adapter"):
        export_adapter(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    model.unmerge_adapter()
    export_adapter(model, tmp_path)


def test_export_beside_a_layer_that_is_no_pair(tmp_path):
    model = get_peft_model(Grouped(), config(r=4, target_modules=["up", "grouped"])).double().eval()
    with pytest.raises(ValueError, match="grouped convolution"):
        export_adapter(model, tmp_path, pad_to=8)
    export_adapter(model, tmp_path, ranks=3)  # the other layer goes by `r`, so the config keeps it
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["r"], said["rank_pattern"]) == (4, {"^up": 3})
    twin = PeftModel.from_pretrained(Grouped(), tmp_path)
    assert twin.base_model.model.grouped.r == {"default": 4} and ranks_of(twin) == {"up": 3}


def test_export_errors(tmp_path, monkeypatch):
    model = peft_toy()
    for kwargs, error, text in (
        ({"pad_to": 5}, ValueError, "pad_to must be at least 6"),
        ({"pad_to": "8"}, TypeError, "pad_to must be an int"),
        ({"ranks": 0}, ValueError, "at least 1"),
        ({"ranks": by_leaf(model, {"up": 7})}, ValueError, "cannot be cut"),
        ({"ranks": {"nobody": 1}}, ValueError, "no pair is named"),
        ({"adapter": "c"}, ValueError, "'c' is unknown"),
    ):
        with pytest.raises(error, match=text):
            export_adapter(model, tmp_path / "never", **kwargs)
    with pytest.raises(TypeError, match="PeftModel"):
        export_adapter(Toy(), tmp_path / "never")
    assert not (tmp_path / "never").exists()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    live = model.peft_config["default"]
    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_adapter(model, tmp_path / "half", ranks=2)
    assert model.peft_config["default"] is live and set(ranks_of(model).values()) == {6}
    assert list((tmp_path / "half").iterdir()) == [] and [p.name for p in tmp_path.iterdir()] == ["half"]


@pytest.mark.parametrize("kwargs", [{}, {"ranks": 2}, {"ranks": {"emb": 1, "up": 4}}, {"target": "vllm", "pad_to": 8}])
def test_a_compiled_model_is_exported_as_the_one_inside(tmp_path, kwargs):
    model = peft_toy()
    compiled = torch.compile(model, backend="eager")
    files = []
    for i, (own, names) in enumerate([(model, model), (compiled, compiled), (compiled, model)]):
        ranks = kwargs.get("ranks")
        given = {"ranks": by_leaf(names, ranks)} if isinstance(ranks, dict) else {}
        folder = export_adapter(own, tmp_path / str(i), **{**kwargs, **given})
        files.append({p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".safetensors")})
    assert set(files[0]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("ranks", [None, 2])
def test_compiled_layers_are_written_by_the_names_of_plain_ones(tmp_path, ranks):
    model = peft_toy()
    expected = export_adapter(model, tmp_path / "plain", ranks=ranks) / "adapter_model.safetensors"
    model.base_model.model.up = torch.compile(model.base_model.model.up, backend="eager")
    found = export_adapter(model, tmp_path / "compiled", ranks=ranks) / "adapter_model.safetensors"
    assert found.read_bytes() == expected.read_bytes()


def test_factors_by_the_names_of_a_compiled_model(tmp_path):
    model = peft_toy()
    compiled = torch.compile(model, backend="eager")
    expected = None
    for own in (model, compiled):
        factors = {p.name: (torch.eye(6).double(), torch.diag(torch.arange(1.0, 7)).double())
                   for p in find_lora_pairs(own)}  # fmt: skip
        found = outputs(loaded(export_adapter(own, tmp_path / "x", ranks=3, basis="balanced", factors=factors)))
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
    assert not torch.equal(expected, outputs(model))


def test_a_file_without_tensors_is_not_written(tmp_path):
    """PEFT selects by name, and where none fits it writes an empty file."""

    def renamed(module, state, *_):
        for name in [name for name in state if "lora_" in name]:
            state[name.replace("lora_", "low_rank_")] = state.pop(name)

    model = peft_toy()
    handle = model.register_state_dict_post_hook(renamed)
    with pytest.raises(ValueError, match="must have the tensors of adapter 'default' in its state_dict"):
        export_adapter(model, tmp_path / "x")
    assert list((tmp_path / "x").iterdir()) == []
    handle.remove()
    assert torch.equal(outputs(loaded(export_adapter(model, tmp_path / "x"))), outputs(model))
