"""The snippets of docs/trainers.md: those marked `py` run, option strings and YAML are read by what will read them."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import models
import pytest
import torch
import yaml

import curvopt
from curvopt import GritKFAC
from curvopt.demo import task
from curvopt.integrations import build_optimizer, parse_options

TEXT = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")


def blocks(language):
    found = re.finditer(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
    return [pytest.param(m[1], id=f"line {TEXT[: m.start()].count(chr(10)) + 1}") for m in found]


def tokenizer():
    path = Path(__file__).parents[2] / "examples" / "common.py"
    spec = importlib.util.spec_from_file_location("examples_common", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.byte_tokenizer()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", blocks("py"))
def test_snippet_runs(source, tmp_path, monkeypatch):
    for name in re.findall(r"^(?:from|import) (\w+)", source, flags=re.MULTILINE):
        pytest.importorskip(name, reason=f"{name} is not installed (extra: trainers)")
    monkeypatch.chdir(tmp_path)
    model = task.lora_model(task.untrained_model(task.QUICK), rank=4)
    ids = torch.randint(1, 256, (4, 12), generator=torch.Generator().manual_seed(0))
    namespace = {
        "model": model, "torch": torch, "tokenizer": tokenizer(),
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "batches": [{"input_ids": ids, "labels": ids}] * 3,
    }  # fmt: skip
    if "texts" in source or "preferences" in source:
        datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra: trainers)")
        namespace["texts"] = datasets.Dataset.from_list([{"text": "a text to learn"}] * 4)
        rows = [{"prompt": "is it? ", "chosen": "it is", "rejected": "no"}] * 4
        namespace["preferences"] = datasets.Dataset.from_list(rows)
    before = models.snapshot(model)
    exec(source, namespace)
    after = models.snapshot(model)
    moved = [name for name in before if name in after and not torch.equal(before[name], after[name])]
    assert bool(moved) == ("train()" in source or "step()" in source or ".fit(" in source)
    assert all("lora_" in name for name in moved)
    made = namespace.get("optimizer") or getattr(namespace.get("trainer"), "optimizer", None)
    if made is not None:
        assert type(getattr(made, "optimizer", made)) is GritKFAC


def test_yaml_options_are_arguments():
    found = [yaml.safe_load(block.values[0]) for block in blocks("yaml")]
    axolotl, llamafactory, torchtune = found
    assert axolotl["plugins"] == ["curvopt.integrations.axolotl.CurvoptPlugin"]
    section = axolotl["curvopt"]
    assert type(build_optimizer(models.llama(), **section)) is GritKFAC
    options = llamafactory["optim_config"]
    assert build_optimizer(models.llama(), options.pop("name"), **options).param_groups[0]["lr"] == 5e-3
    options = torchtune["optimizer"]
    path, _, name = options.pop("_component_").rpartition(".")
    optimizer = getattr(importlib.import_module(path), name)(models.mlp(width=8, r=3).parameters(), **options)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99) and len(optimizer.sides) == 8


def test_option_strings_are_arguments():
    said = [
        word for block in blocks("shell") for word in shlex.split(block.values[0].replace("\\\n", " "), comments=True)
    ]
    swift = said[said.index("--optim_args") + 1]
    assert parse_options(swift, GritKFAC) == {"reproject_every": 20, "rank_threshold": 0.99}
    kohya = said[said.index("--optimizer_args") + 1 :]
    options = {"outer_rank": 8, "weight_decay": 0.01, "betas": (0.9, 0.99)}
    assert parse_options(kohya, GritKFAC) == options
    path, _, name = said[said.index("--optimizer_type") + 1].rpartition(".")
    cls = getattr(importlib.import_module(path), name)
    assert issubclass(cls, curvopt.GritKFAC)
    group = cls(models.mlp(width=8, r=3).parameters(), **dict(word.split("=") for word in kohya)).param_groups[0]
    assert {key: group[key] for key in options} == options
    assert "curvopt.integrations.ms_swift" in TEXT


def test_versions_in_the_table_are_those_that_are_pinned():
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M))
    for title, package in (("transformers", "transformers"), ("TRL", "trl"), ("accelerate", "accelerate"),
                           ("Lightning", "lightning"), ("timm", "timm"), ("diffusers", "diffusers")):  # fmt: skip
        said = re.findall(rf"{title} (\d[\d.]*\d)", TEXT)
        assert said and all(pinned[package].startswith(version) for version in said), title


def test_modules_named_in_the_text_exist():
    for name in re.findall(r"curvopt\.integrations\.(\w+)", TEXT):
        assert importlib.util.find_spec(f"curvopt.integrations.{name}")
