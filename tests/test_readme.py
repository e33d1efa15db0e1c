"""Every Python example of README.md runs, in order, on a tiny PEFT model; every benchmark file it names exists."""

import re
from pathlib import Path

import models
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("source", EXAMPLES, ids=lambda source: source.strip().splitlines()[0][:40])
def test_example_runs(source, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    model = models.llama(torch.float32)
    x = torch.randint(0, 64, (2, 8))
    namespace = {"model": model, "batches": [{"input_ids": x, "labels": x}] * 3, "torch": torch}
    exec("from curvopt import GritKFAC\n" + source, namespace)  # a later example builds on the first one's import
    assert namespace["optimizer"].pairs


def test_paths_named_in_the_text_exist():
    named = set(re.findall(r"(?:benchmarks|curvopt|kernels|docs)/[\w./-]+\.(?:py|csv|png|md)", README))
    assert {path for path in named if not (ROOT / path).exists()} == set()
