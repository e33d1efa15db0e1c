"""Every Python example of README.md and docs/ runs by itself; every file of ours that the texts name exists.

An example is given what its page says: a PEFT ``model`` and a second one, ``batches`` and a ``dataset``. It imports
everything else. Complete programs are given nothing.
"""

import copy
import re
from pathlib import Path

import models
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
EXAMPLES = [
    pytest.param(source, id=f"{name}:{text[: found.start()].count(chr(10)) + 2}")
    for name, text in TEXTS.items()
    for found in re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for source in [found[1]]
]
WHOLE = [example for example in EXAMPLES if "get_peft_model" in example.values[0]]
PARTS = [example for example in EXAMPLES if example not in WHOLE]


def test_there_are_examples():
    for name in ("README.md", "docs/loops.md", "docs/ranks.md", "docs/gora.md", "docs/nested.md", "docs/analysis.md"):
        assert any(example.id.startswith(name) for example in EXAMPLES)
    assert {example.id.partition(":")[0] for example in WHOLE} == {
        "README.md", "docs/quickstart.md", "docs/quantized.md",
    }  # fmt: skip


def given():
    """What the pages promise; fresh for every example."""
    model = models.llama(torch.float32)
    x = torch.randint(0, 64, (2, 8))
    return {
        "model": model, "fresh_model": copy.deepcopy(model),
        "batches": [{"input_ids": x, "labels": x}] * 3, "dataset": [{"input_ids": row, "labels": row} for row in x],
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:torch.optim.lr_scheduler")
@pytest.mark.parametrize("source", PARTS)
def test_example_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    namespace = given()
    before = models.snapshot(namespace["model"])
    exec(source, namespace)
    assert "curvopt" in source and isinstance(namespace["optimizer"], torch.optim.Optimizer)
    assert "step()" not in source or models.differences(before, models.snapshot(namespace["model"])) != []


@pytest.mark.parametrize("source", WHOLE)
def test_complete_program_runs(source, tmp_path, monkeypatch):
    """A loss below that of the start, and a saved adapter whose B has moved."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    exec(source, namespace)
    assert isinstance(namespace["model"], PeftModel) and len(namespace["optimizer"].pairs) >= 2
    if "save_pretrained" in source:
        assert namespace["loss"].item() < 5.3  # at the start log 256 = 5.55; only adapters of a random model train
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert all(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_readme_is_short_and_its_example_too():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 150
    [source] = [example.values[0] for example in WHOLE if example.id.startswith("README.md")]
    assert 20 <= len(source.splitlines()) <= 25


def test_paths_named_in_the_text_exist():
    text = " ".join(TEXTS.values())
    named = re.findall(r"(?:tests|benchmarks|curvopt|kernels|docs)/[\w./-]+\.(?:py|csv|png|md)", text)
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_lead_somewhere(name):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", TEXTS[name])
    assert [target for target in targets if not (ROOT / name).parent.joinpath(target).exists()] == []


# ------------------------------------------------------------------------------------------------- controls


def test_control_an_example_that_leans_on_another_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NameError):
        exec("optimizer = GritKFAC(model, lr=5e-3)", given())
