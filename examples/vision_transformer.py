"""Teach a small vision transformer that knows upright digits to read digits turned by 90 degrees.

    python examples/vision_transformer.py

The ViT is made from a transformers config and learns scikit-learn's digits (8 × 8 pixels) with AdamW; a LoRA adapter
and a new head then learn the turned ones with GritKFAC. The head is outside the adapters: it gets torch's AdamW, in the
same optimizer.
"""

import common
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from curvopt import GritKFAC


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [0, 1] and labels to train on, and others to test on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    return images[400:], labels[400:], images[:400], labels[:400]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, batch: int, what: str
) -> list[float]:
    """Train on random batches; return the losses."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for _ in tqdm(range(steps), desc=what):
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        loss = model(pixel_values=x[rows], labels=y[rows]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that are read correctly."""
    return (model.eval()(pixel_values=x).logits.argmax(-1) == y).float().mean().item()


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses."""
    args = common.parser(__doc__, "vision_transformer", lr=5e-3, batch=32).parse_args(argv)
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    x, y, x_test, y_test = digits()
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), x, y, 40 if args.tiny else 500, 32, "upright digits")

    turned, turned_test = x.rot90(dims=(2, 3)), x_test.rot90(dims=(2, 3))
    adapted = get_peft_model(
        model,
        LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", modules_to_save=["classifier"]),
    )
    before = accuracy(adapted, turned_test, y_test)
    optimizer = GritKFAC(adapted, lr=args.lr)
    losses = train(adapted, optimizer, turned, y, args.steps, args.batch, "turned digits")

    adapted.save_pretrained(args.out)
    common.report(
        args.out, losses, before, accuracy(adapted, turned_test, y_test), "accuracy on held-out turned digits"
    )
    return losses


if __name__ == "__main__":
    main()
