"""Adapters written for programs that read less than PEFT: what each computes from the files is what the model has.

The readers below are the arithmetic of each program's loader as documented in November 2026, over the files alone:
vLLM, SGLang, TensorRT-LLM, llama.cpp (``convert_lora_to_gguf.py`` and ``llama-adapter``), none of which was run.
diffusers and PEFT's hotswap are run themselves.
"""

import json
import math
from typing import get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn

from curvopt.lora import export_adapter, find_lora_pairs, resize_adapter
from curvopt.lora.export import Target

ENGINES = [target for target in get_args(Target) if target != "peft"]
PREFIX = "base_model.model."


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.up = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 16)
        self.embed = nn.Embedding(4, 8)
        self.double()

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.up(x)], -1)


def adapted(kind="mixed", **kwargs):
    """A model with ranks and scalings that are uniform, mixed in rank, or mixed in both; under rsLoRA too."""
    settings = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "k_proj", "up"], "use_rslora": "stable" in kind}
    model = get_peft_model(Toy(), LoraConfig(**{**settings, **kwargs})).double().eval()
    if "uniform" not in kind:
        ranks = {pair.name: rank for pair, rank in zip(find_lora_pairs(model), (2, 6, 5), strict=True)}
        resize_adapter(model, ranks, keep_scaling="mixed scalings" not in kind)
    torch.manual_seed(1)
    for pair in find_lora_pairs(model):
        nn.init.normal_(pair.A), nn.init.normal_(pair.B)
    return model


def updates(model):
    """ΔW of every layer, by its path in the base model, as the model computes it."""
    return {pair.base_path: pair.scaling * pair.B.detach() @ pair.A.detach() for pair in find_lora_pairs(model)}


def files(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = sorted({name.rpartition(".lora_")[0] for name in tensors})
    return config, {p: (tensors[f"{p}.lora_A.weight"], tensors[f"{p}.lora_B.weight"]) for p in paths}


def read_by_vllm(folder, max_lora_rank=16):
    """One scaling, from `r` and `lora_alpha`, multiplied into B; patterns are dropped, large ranks refused."""
    config, pairs = files(folder)
    if config["r"] > max_lora_rank or config["modules_to_save"] or config["use_dora"] or config["bias"] != "none":
        raise ValueError("not legal")
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    assert isinstance(config["lora_alpha"], int)
    return {path.removeprefix(PREFIX): (scaling * b) @ a for path, (a, b) in pairs.items()}


def read_by_sglang(folder):
    """One scaling, `lora_alpha` over `r`, whatever `use_rslora` and the patterns say; q, k, v are stacked by `r`."""
    config, pairs = files(folder)
    found = {}
    for path, (a, b) in pairs.items():
        assert a.shape[0] == b.shape[1] == config["r"]  # slices of a stacked buffer
        found[path.removeprefix(PREFIX)] = config["lora_alpha"] / config["r"] * (b @ a)
    return found


def read_by_tensorrt_llm(folder):
    """`lora_alpha` over the rank of each tensor, or its root under rsLoRA."""
    config, pairs = files(folder)
    alpha, stable = float(config["lora_alpha"]), config["use_rslora"]
    return {
        path.removeprefix(PREFIX): b * (alpha / (math.sqrt(a.shape[0]) if stable else a.shape[0])) @ a
        for path, (a, b) in pairs.items()
    }


def read_by_llama_cpp(folder):
    """`lora_alpha` over the rank of each B; without an alpha nothing is multiplied."""
    config, pairs = files(folder)
    alpha = float(config["lora_alpha"])
    return {path.removeprefix(PREFIX): (alpha / b.shape[1] if alpha else 1.0) * (b @ a)
            for path, (a, b) in pairs.items()}  # fmt: skip


def read_by_peft(folder):
    return updates(PeftModel.from_pretrained(Toy(), folder).double())


def read_by_hotswap(folder):
    """Swapped into a model whose adapter has another scaling and was padded to rank 8."""
    first = folder.parent / "first"
    export_adapter(adapted("uniform", lora_alpha=3, r=3), first, target="hotswap")
    model = PeftModel.from_pretrained(Toy(), first).double()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, str(folder), "default")
    return updates(model)


def read_by_diffusers(folder):
    """Names below a prefix, and no alpha: nothing is multiplied."""
    (file,) = folder.iterdir()
    tensors = load_file(file)
    assert file.name == "pytorch_lora_weights.safetensors" and not any("alpha" in name for name in tensors)
    names = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in tensors}
    return {p: tensors[f"transformer.{p}.lora_B.weight"] @ tensors[f"transformer.{p}.lora_A.weight"] for p in names}


READERS = {
    "vllm": read_by_vllm, "sglang": read_by_sglang, "tensorrt-llm": read_by_tensorrt_llm,
    "llama.cpp": read_by_llama_cpp, "hotswap": read_by_hotswap, "diffusers": read_by_diffusers,
}  # fmt: skip
KINDS = ["uniform", "mixed", "mixed scalings", "uniform stable", "mixed stable", "mixed scalings stable"]


def assert_equal_updates(found, model, exact=False):
    wanted = updates(model)
    assert found.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=0 if exact else 1e-14, atol=0 if exact else 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ENGINES)
def test_the_engine_computes_the_update_of_the_model(target, kind, tmp_path):
    model = adapted(kind)
    assert export_adapter(model, tmp_path / "out", target=target) == tmp_path / "out"
    assert_equal_updates(READERS[target](tmp_path / "out"), model)
    if target != "diffusers":
        assert_equal_updates(read_by_peft(tmp_path / "out"), model)  # each of them is a plain PEFT folder too


@pytest.mark.parametrize(
    ("target", "kind"),
    [("vllm", "mixed scalings"), ("sglang", "mixed"), ("tensorrt-llm", "mixed"), ("llama.cpp", "mixed"),
     ("sglang", "uniform stable"), ("llama.cpp", "uniform stable")],
)  # fmt: skip
def test_control_the_readers_misread_what_is_written_for_peft(target, kind, tmp_path):
    model = adapted(kind)
    export_adapter(model, tmp_path)
    assert_equal_updates(read_by_peft(tmp_path), model)
    with pytest.raises(AssertionError):
        assert_equal_updates(READERS[target](tmp_path), model)


def test_nothing_is_scaled_where_r_and_alpha_say_it_all(tmp_path):
    model = adapted("uniform")
    for target in ("vllm", "sglang", "hotswap", "tensorrt-llm", "llama.cpp"):
        export_adapter(model, tmp_path / target, target=target)
        config, pairs = files(tmp_path / target)
        assert (config["r"], config["lora_alpha"]) == (6, 9)
        for pair in find_lora_pairs(model):
            a, b = pairs[PREFIX + pair.base_path]
            assert torch.equal(a, pair.A) and torch.equal(b, pair.B)


def test_what_each_folder_says(tmp_path):
    model = adapted("mixed")
    for target in ("vllm", "sglang", "hotswap"):
        export_adapter(model, tmp_path / target, target=target)
        config, pairs = files(tmp_path / target)
        assert config["r"] == 6 and config["rank_pattern"] == config["alpha_pattern"] == {}
        assert {a.shape[0] for a, _ in pairs.values()} == {6} and not config["use_rslora"]
    for target in ("tensorrt-llm", "llama.cpp"):
        export_adapter(model, tmp_path / target, target=target)
        config, pairs = files(tmp_path / target)
        assert sorted(a.shape[0] for a, _ in pairs.values()) == [2, 5, 6] and config["alpha_pattern"] == {}
    export_adapter(model, tmp_path / "unet", target="diffusers", prefix="unet")
    assert all(name.startswith("unet.") for name in load_file(tmp_path / "unet" / "pytorch_lora_weights.safetensors"))


@pytest.mark.parametrize("target", get_args(Target))
def test_targets_go_with_ranks_and_padding(target, tmp_path):
    model = adapted("mixed")
    export_adapter(model, tmp_path / "out", target=target, ranks=2, pad_to=4)
    found = {**READERS, "peft": read_by_peft}[target](tmp_path / "out")
    with torch.no_grad():
        for pair in find_lora_pairs(model):
            pair.A[2:] = 0
    assert_equal_updates(found, model)


def test_bfloat16_stays_and_is_rounded_once(tmp_path):
    model = adapted("mixed scalings").to(torch.bfloat16)
    export_adapter(model, tmp_path, target="vllm")
    config, pairs = files(tmp_path)
    for pair in find_lora_pairs(model):
        a, b = pairs[PREFIX + pair.base_path]
        assert a.dtype == b.dtype == torch.bfloat16
        exact = pair.B.double() * pair.scaling / (config["lora_alpha"] / config["r"])
        assert (b[:, : pair.rank].double() / exact - 1).abs().max() <= 2.0**-8


@pytest.mark.parametrize("target", ENGINES)
def test_the_model_stays_as_it_is(target, tmp_path):
    model = adapted("mixed stable")
    before, settings = {k: v.clone() for k, v in model.state_dict().items()}, str(model.peft_config)
    export_adapter(model, tmp_path, target=target)
    assert str(model.peft_config) == settings
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_unknown_targets_are_refused_with_the_list(tmp_path):
    with pytest.raises(ValueError, match=r"target must be one of 'peft', 'vllm', .*'diffusers', got 'tgi'"):
        export_adapter(adapted(), tmp_path / "never", target="tgi")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("target", "kwargs"),
    [("vllm", {"use_dora": True}), ("sglang", {"modules_to_save": ["up"], "target_modules": ["q_proj"]}),
     ("llama.cpp", {"bias": "lora_only"}), ("tensorrt-llm", {"lora_bias": True}),
     ("vllm", {"trainable_token_indices": {"embed": [1, 2]}}), ("diffusers", {"alora_invocation_tokens": [5]})],
)  # fmt: skip
def test_parts_that_the_engine_does_not_read_are_refused(target, kwargs, tmp_path):
    model = adapted("uniform", **kwargs)
    with pytest.raises(ValueError, match=f"{target} does not read {next(iter(kwargs))}="):
        export_adapter(model, tmp_path / "never", target=target)
    export_adapter(model, tmp_path)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("kind", ["mixed", "mixed scalings stable"])
def test_diffusers_itself_loads_it(kind, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    shape = {"sample_size": 4, "patch_size": 1, "in_channels": 4, "num_layers": 1, "attention_head_dim": 4,
             "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 8,
             "pooled_projection_dim": 8, "out_channels": 4}  # fmt: skip
    base = diffusers.SD3Transformer2DModel(**shape).double().eval()
    kept = {name: x.clone() for name, x in base.state_dict().items()}
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v"], "use_rslora": "stable" in kind}
    model = get_peft_model(base, LoraConfig(**settings)).double().eval()
    first, *_ = find_lora_pairs(model)
    resize_adapter(model, {first.name: 2}, keep_scaling=kind == "mixed")
    for pair in find_lora_pairs(model):
        nn.init.normal_(pair.A), nn.init.normal_(pair.B)
    export_adapter(model, tmp_path, target="diffusers")
    fresh = diffusers.SD3Transformer2DModel(**shape).double().eval()
    fresh.load_state_dict(kept)
    fresh.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    found = {pair.path: pair.scaling * pair.B.detach() @ pair.A.detach() for pair in find_lora_pairs(fresh.double())}
    wanted = updates(model)
    assert found.keys() == wanted.keys() and len(found) == 2
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=1e-6, atol=1e-6)  # loaded as float32
