"""What a task is: a pre-trained model, batches to fine-tune on, and what is measured afterwards."""

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]  # keyword arguments of the model, which returns an object with .loss and perhaps .logits
CACHE = Path.home() / ".cache" / "curvopt"


class Task(ABC):
    """One fine-tuning task. A model takes a batch by keywords and returns ``.loss`` (and ``.logits``).

    Attributes:
        name: key in `tasks.TASKS`.
        title: what it is, for tables and plots.
        unit: unit of the loss.
        steps: steps of a full run.
        rank: r of every adapter; LoRA's alpha is twice it.
        targets: PEFT's ``target_modules``.
        scaled: IA3's ``target_modules``; ``scaled_inputs``: those of them whose input it scales.
        saved: modules outside the adapters that train as well (``modules_to_save``).
        device: where the model and its batches are.
        rates: the grid of learning rates, the same for every optimizer, ascending.
    """

    name: str
    title: str
    unit: str
    steps: int
    rank: int = 8
    targets: Any = "all-linear"
    scaled: tuple[str, ...] = ()
    scaled_inputs: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    device: str = "cpu"
    rates: tuple[float, ...] = tuple(1e-3 * 2.0**i for i in range(-4, 11))  # nobody's best is at an end

    def __init__(self) -> None:
        self.base = self.pretrained()

    @abstractmethod
    def pretrained(self) -> nn.Module:
        """Return the model before fine-tuning."""

    @abstractmethod
    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Yield ``steps`` batches; the seed alone decides which."""

    @abstractmethod
    def split(self, name: str) -> list[Batch]:
        """Return held-out batches: "valid" (learning rates are chosen by it), "test", "retention"."""

    def build(self, seed: int, kind: str = "lora", rank: int | None = None) -> nn.Module:
        """Return a copy of the model with an adapter; the seed alone decides how it starts.

        Args:
            seed: of the adapter's start, and of a head's.
            kind: "lora", "dora", "orthogonal" (PEFT's orthogonal start of LoRA) or "ia3".
            rank: r, the task's if not given.
        """
        from peft import IA3Config, LoraConfig, get_peft_model

        r = rank or self.rank
        saved = list(self.saved) or None
        if kind == "ia3":
            inputs = list(self.scaled_inputs)
            config = IA3Config(target_modules=list(self.scaled), feedforward_modules=inputs, modules_to_save=saved)
        else:
            start = "orthogonal" if kind == "orthogonal" else True
            config = LoraConfig(
                r=r, lora_alpha=2 * r, target_modules=self.targets, modules_to_save=saved,
                use_dora=kind == "dora", init_lora_weights=start,
            )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(copy.deepcopy(self.base), config)

    @torch.no_grad()
    def loss_on(self, model: nn.Module, name: str) -> tuple[float, float | None]:
        """Return mean loss and accuracy (None if there are no classes) on a split."""
        training = model.training
        model.eval()
        loss, right, rows, labels = 0.0, 0, 0, 0
        for batch in self.split(name):
            out = model(**batch)
            n = len(next(iter(batch.values())))
            loss, rows = loss + float(out.loss) * n, rows + n
            found = self.correct(out, batch)
            if found is not None:
                right, labels = right + int(found.sum()), labels + found.numel()
        model.train(training)
        return loss / rows, right / labels if labels else None

    def correct(self, out: Any, batch: Batch) -> Tensor | None:
        """Return which predictions of a batch are right, or None."""
        return out.logits.argmax(-1) == batch["labels"]

    def measure(self, model: nn.Module) -> dict[str, float | None]:
        """Return the results of a finished run: test loss and accuracy, and what is left of the earlier task."""
        loss, accuracy = self.loss_on(model, "test")
        kept, kept_accuracy = self.loss_on(model, "retention")
        return {"test": loss, "accuracy": accuracy, "retention": kept, "retention_accuracy": kept_accuracy}

    def valid(self, model: nn.Module) -> float:
        """Return the loss that learning rates are chosen by."""
        return self.loss_on(model, "valid")[0]


def cached(name: str, key: Any, make: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """Return ``make()`` trained by ``train``, its weights kept in ``~/.cache/curvopt`` under a hash of ``key``."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = CACHE / f"bench-{name}-{digest}.pt"
    model = make()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        train(model)
        part = path.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.rename(path)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def epochs(n: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield ``steps`` index batches of shuffled passes over n rows; the seed alone decides which."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat((order, torch.randperm(n, generator=generator)))
        yield order[:batch]
        order = order[batch:]


def fit(model: nn.Module, batches: Iterator[Batch], steps: int, lr: float) -> None:
    """Pre-train: AdamW, 5 % linear warm-up, linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (0.05 * steps)) * (1 - step / steps)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
