"""Every Python example of README.md and docs/ runs on a tiny PEFT model; every file of ours they name exists."""

import copy
import re
from pathlib import Path

import models
import pytest
import torch

ROOT = Path(__file__).parent.parent
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}  # fmt: skip
EXAMPLES = [
    pytest.param(source, id=f"{name}:{text[: found.start()].count(chr(10)) + 2}")
    for name, text in TEXTS.items()
    for found in re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for source in [found[1]]
]


def test_there_are_examples():
    for name in ("README.md", "docs/loops.md"):
        assert sum(example.id.startswith(name) for example in EXAMPLES) >= 2


@pytest.mark.filterwarnings("ignore::UserWarning:torch.optim.lr_scheduler")
@pytest.mark.parametrize("source", EXAMPLES)
def test_example_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    model = models.llama(torch.float32)
    x = torch.randint(0, 64, (2, 8))
    namespace = {
        "model": model, "fresh_model": copy.deepcopy(model), "torch": torch,
        "batches": [{"input_ids": x, "labels": x}] * 3, "dataset": [{"input_ids": row, "labels": row} for row in x],
    }  # fmt: skip
    before = models.snapshot(model)
    exec("from curvopt import GritKFAC\n" + source, namespace)  # a later example builds on the first one's import
    assert namespace["optimizer"].pairs
    assert "step()" not in source or models.differences(before, models.snapshot(namespace["model"])) != []


def test_paths_named_in_the_text_exist():
    text = " ".join(TEXTS.values())
    named = re.findall(r"(?:tests|benchmarks|curvopt|kernels|docs)/[\w./-]+\.(?:py|csv|png|md)", text)
    assert {path for path in named if not (ROOT / path).exists()} == set()
