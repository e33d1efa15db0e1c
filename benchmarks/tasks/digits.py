"""scikit-learn's handwritten digits: a small vision transformer learns them upright, then turned by a quarter."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tasks.base import Batch, Task, cached, epochs, fit

# 1797 images: 900 upright to pre-train on, then turned ones; retention is the upright images of the test part
PARTS = {"pretrain": slice(0, 900), "train": slice(900, 1400), "valid": slice(1400, 1600), "test": slice(1600, 1797)}


class TurnedDigits(Task):
    """Ten classes, 8×8 pixels, patches of 2×2."""

    name, title, unit = "digits", "digits, upright → turned (ViT, 0.1 M)", "nats per image"
    steps, batch = 200, 32
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    scaled, scaled_inputs = ("k_proj", "v_proj", "fc2"), ("fc2",)

    def pretrained(self) -> nn.Module:
        """Train (once, then cached) on the upright images."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        self.images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
        self.labels = torch.tensor(digits.target)[order]
        steps, lr = 500, 2e-3
        upright = self.images[PARTS["pretrain"]], self.labels[PARTS["pretrain"]]

        def train(model: nn.Module) -> None:
            rows = epochs(len(upright[1]), 32, steps, seed=0)
            fit(model, ({"pixel_values": upright[0][i], "labels": upright[1][i]} for i in rows), steps, lr)

        return cached("digits", [len(self.labels), steps, lr, 2], _untrained, train)

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Shuffled passes over the turned images."""
        images, labels = _turned(self.images[PARTS["train"]]), self.labels[PARTS["train"]]
        for i in epochs(len(labels), self.batch, steps, seed):
            yield {"pixel_values": images[i], "labels": labels[i]}

    def split(self, name: str) -> list[Batch]:
        """Turned images; upright ones for "retention"."""
        part = PARTS["test" if name == "retention" else name]
        images = self.images[part] if name == "retention" else _turned(self.images[part])
        return [{"pixel_values": images, "labels": self.labels[part]}]


def _turned(images: Tensor) -> Tensor:
    return torch.rot90(images, 1, (-2, -1))


def _untrained() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(config)
