"""Two small byte-level Llamas, each pre-trained on one kind of text and fine-tuned on another."""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.demo import task as demo
from tasks.base import Batch, Task, cached, fit

# Llamas of about so many parameters, for the ladder of model sizes; the steps of their training are those of "headers"
SIZES = {
    "0.8 M": demo.PretrainConfig(hidden=128, layers=4, heads=4, intermediate=344, length=64, seed=1),
    "4 M": demo.PretrainConfig(hidden=256, layers=5, heads=4, intermediate=688, length=64, seed=1),
    "25 M": demo.PretrainConfig(hidden=512, layers=8, heads=8, intermediate=1376, length=64, seed=1),
    "100 M": demo.PretrainConfig(hidden=1024, layers=8, heads=16, intermediate=2752, length=64, seed=1),
}


class Language(Task):
    """Next-byte prediction; a batch is windows of one long text."""

    unit = "nats per byte"
    scaled = ("k_proj", "v_proj", "down_proj")
    scaled_inputs = ("down_proj",)
    batch: int
    length: int
    texts: dict[str, Tensor]  # train, test, retention: 1-d uint8

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Random windows of the text to train on."""
        for x in demo.batches(self.texts["train"], self.batch, self.length, steps, seed):
            yield self._both(x)

    def split(self, name: str) -> list[Batch]:
        """Evenly spaced windows; the first half of the held-out text is "valid", the second "test"."""
        held = self.texts["test"]
        half = len(held) // 2
        text = {"valid": held[:half], "test": held[half:], "retention": self.texts["retention"]}[name]
        count = {"valid": 64, "test": 128, "retention": 128}[name]
        starts = torch.linspace(0, len(text) - self.length, count, dtype=torch.float64).long()
        windows = text[starts[:, None] + torch.arange(self.length)].long()
        return [self._both(x) for x in windows.split(32)]

    def _both(self, x: Tensor) -> Batch:
        x = x.to(self.device)
        return {"input_ids": x, "labels": x}

    def correct(self, out: Any, batch: Batch) -> Tensor:
        """Next bytes that were the most probable."""
        return out.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]


class SourceToTopics(Language):
    """The demo's task: from Python source to the English of ``pydoc_data.topics``."""

    name, title = "language", "Python source → English topics (Llama, 0.8 M)"
    steps, batch, length = 150, 4, 96

    def pretrained(self) -> nn.Module:
        """The demo's model, from the demo's cache."""
        domains = demo.load_text_domains()
        self.texts = {"train": domains.topics, "test": domains.topics_heldout, "retention": domains.source_heldout}
        return demo.pretrained_model(domains=domains)


class DocsToHeaders(Language):
    """From the standard library's docstrings to the C++ headers that every torch carries."""

    name, title = "headers", "docstrings → C++ headers (Llama, 0.14 M)"
    steps, batch, length = 150, 6, 64
    shape = demo.PretrainConfig(hidden=64, layers=2, heads=4, intermediate=172, length=64, seed=1)
    peak = 4e-3  # of the learning rate before fine-tuning

    def pretrained(self) -> nn.Module:
        """Train (once, then cached) a Llama on the docstrings."""
        docs, held_docs = _divided(docstrings())
        headers, held_headers = _divided(cpp_headers())
        self.texts = {"train": headers, "test": held_headers, "retention": held_docs}
        shape, steps, lr = self.shape, 1500, self.peak

        def train(model: nn.Module) -> None:
            windows = demo.batches(docs, 16, 64, steps, seed=0)
            fit(model, map(self._both, windows), steps, lr)

        key = [hashlib.sha256(docs.numpy().tobytes()).hexdigest(), asdict(shape), steps, lr]
        return cached("headers", key, lambda: demo.untrained_model(shape).to(self.device), train)


class DocsToHeadersRank32(DocsToHeaders):
    """The same at rank 32, where the order of the optimizers may be another."""

    name, title = "headers32", "docstrings → C++ headers, rank 32 (Llama, 0.14 M)"
    rank = 32


def docstrings() -> list[str]:
    """Return the docstrings of the standard library, one text a file, files in order."""
    found = []
    for path in demo.source_files():
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # files that are broken on purpose
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found.append("\n\n".join(text for text in texts if text))
    return [text for text in found if text]


def cpp_headers() -> list[str]:
    """Return the headers of torch's c10 and ATen/core, one text a file, files in order."""
    root = Path(torch.__file__).parent / "include"
    paths = sorted([*(root / "c10").rglob("*.h"), *(root / "ATen" / "core").rglob("*.h")])
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def _divided(texts: list[str], stride: int = 8) -> tuple[Tensor, Tensor]:
    """Return bytes to train on, and those of every eighth text."""
    kept = [text for i, text in enumerate(texts) if i % stride]
    return demo.byte_tokens("\n".join(kept)), demo.byte_tokens("\n".join(texts[::stride]))
