"""Models with fresh adapters for the tests of GoRAInit: a language model, a ViT, and one with convolutions."""

import functools

import models
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from curvopt import GoRAInit

SMALL = {"rank": 4, "min_rank": 2, "max_rank": 8, "calibration_steps": 3}
# GoRA's start and ranks
published = functools.partial(GoRAInit, start="gora", allocation="exact")


def adamw(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


class Convolutional(nn.Module):
    """An embedding, two convolutions and a linear head, all frozen but for their adapters."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 8), nn.Linear(8, 4)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, stride=2)

    def forward(self, ids):
        h = self.embed(ids).mT.unflatten(-1, (4, 4))
        h = torch.tanh(self.second(torch.tanh(self.first(h))))
        return self.fc(h.flatten(2).mean(-1))


def build(kind, r=4, **kwargs):
    """A model with PEFT adapters, and a function of the number of a batch that returns its loss."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(7)
    if kind == "llama":
        model = models.llama(torch.float64, r=r, **kwargs)
        return model, lambda i: models.llama_loss(model, i)
    if kind == "vit":
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8,
            patch_size=4, num_labels=5,
        )  # fmt: skip
        base, x = ViTForImageClassification(config), torch.randn(6, 3, 8, 8, generator=g).double()
        targets = r"(?!.*classifier).*(query|value|q_proj|v_proj|dense|fc1|fc2|projection)$"
    else:
        base, x, targets = Convolutional(), torch.randint(20, (6, 16), generator=g), ["embed", "first", "second", "fc"]
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **kwargs)).double()
    y = torch.randint(4, (6,), generator=g)

    def loss(i):
        out = model(x.roll(i, -1))
        return F.cross_entropy(getattr(out, "logits", out), y)

    return model, loss


def run(optimizer, loss, steps, begin=0):
    values = []
    for i in range(begin, begin + steps):
        optimizer.zero_grad()
        value = loss(i)
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


# what two processes run; here, because a spawned process imports it by name

SETTINGS = {
    "mean_abs": {},
    "nuclear": {"importance": "nuclear"},
    "converging": {"convergence": 1e9},  # satisfied as soon as it may be
}


def train(optimizer, model, rows):
    for i in range(3):
        optimizer.zero_grad()
        ids = models.llama_ids(i, rows=4)[rows]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def worker(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for name, kwargs in SETTINGS.items():
            model, _ = build("llama")
            torch.manual_seed(rank)  # rows that grow are drawn differently
            if rank == 1 and name == "nuclear":
                for key, p in model.named_parameters():
                    p.requires_grad_(p.requires_grad).data.mul_(2.0 if "lora_A" in key else 1.0)
            optimizer = published(model, **{**SMALL, **kwargs})
            train(optimizer, model, slice(2 * rank, 2 * rank + 2))
            results[name, rank] = (optimizer.plan, models.snapshot(model))
    finally:
        dist.destroy_process_group()
