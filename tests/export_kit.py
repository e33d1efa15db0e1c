"""Small PEFT models with adapters on several kinds of layer, for tests of what is written to files."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from curvopt.lora import find_lora_pairs

X = torch.arange(12).reshape(2, 6)


class Toy(nn.Module):
    """Embedding, two linears and a convolution in a row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(12, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.conv = nn.Conv2d(2, 6, (3, 2))
        self.double()

    def forward(self, x):
        return self.conv(self.down(self.up(self.emb(x)).tanh())[:, None].expand(-1, 2, -1, -1))


def config(**kwargs):
    settings = {"r": 6, "lora_alpha": 9, "target_modules": ["emb", "up", "down", "conv"], "init_lora_weights": False}
    return LoraConfig(**{**settings, **kwargs})


def peft_toy(**kwargs):
    model = get_peft_model(Toy(), config(**kwargs)).double().eval()
    torch.manual_seed(1)
    for pair in find_lora_pairs(model):
        nn.init.normal_(pair.A), nn.init.normal_(pair.B)
    return model


def loaded(path, adapter="default"):
    return PeftModel.from_pretrained(Toy(), path, adapter_name=adapter).double().eval()


def outputs(model):
    with torch.no_grad():
        return model(X)


def ranks_of(model, adapter=None):
    return {pair.path.rpartition(".")[2]: pair.rank for pair in find_lora_pairs(model, adapter)}


def by_leaf(model, ranks, adapter=None):
    return {
        p.name: ranks[leaf] for p in find_lora_pairs(model, adapter) if (leaf := p.path.rpartition(".")[2]) in ranks
    }
