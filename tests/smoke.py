"""Use the installed package as a user would, whatever else is installed; `dist_check.py` runs it in fresh environments.

python tests/smoke.py [WHERE CURVOPT MUST LIE]
"""

import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import curvopt.kernels
import torch
from torch import nn

import curvopt
from curvopt import GoRAInit, GritKFAC, MatryoshkaScaledAdam
from curvopt.analysis import doctor, drift, effective_rank
from curvopt.lora import export_adapter, resize_adapter

if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
else:
    PeftModel = None


class Layer(nn.Module):
    """A frozen linear map with a LoRA adapter written by hand."""

    def __init__(self, d: int, r: int):
        super().__init__()
        self.base = nn.Linear(d, d).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(d, r, bias=False), nn.Linear(r, d, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.rank, self.alpha = r, 2 * r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.alpha / self.rank * self.lora_B(self.lora_A(x))


def plain(optimizer_of, steps=12):
    """Return the losses of an optimizer on two hand-written layers, and the optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(16, 4), nn.Tanh(), Layer(16, 4))
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    optimizer, losses = optimizer_of(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    return model, optimizer


def with_peft():
    """GoRA, GritKFAC, compact, save and load on a tiny Llama; a nested adapter beside it."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))

    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

    def trained(optimizer_of):
        model = get_peft_model(base(), lora)
        optimizer = optimizer_of(model)
        for _ in range(4):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        return model, optimizer

    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = trained(lambda m: GoRAInit(
            m, rank=4, min_rank=2, calibration_steps=1, start="gora", allocation="exact",
            then=lambda m: GritKFAC(m, lr=5e-3, reproject_every=1, rank_threshold=0.9, min_rank=1),
        ))  # fmt: skip
        optimizer.delegate.compact()
        model.save_pretrained(f"{folder}/grit")
        again = PeftModel.from_pretrained(base(), f"{folder}/grit")
        torch.testing.assert_close(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
        export_adapter(model, f"{folder}/rank-1", ranks=1)
        _, nested = trained(lambda m: MatryoshkaScaledAdam(m, lr=5e-3, ranks=[1, 2, 4]))
        nested.export(f"{folder}/nested", 2)
        assert json.loads(Path(f"{folder}/nested/adapter_config.json").read_text())["r"] == 2


def main() -> None:
    """Run everything; an assertion or an exception is a failure."""
    where = Path(curvopt.__file__).parent
    if len(sys.argv) > 1:
        assert where.is_relative_to(sys.argv[1]), f"curvopt is imported from {where}"
    assert (where / "py.typed").exists() and Path(curvopt.kernels.__file__).parent.name == "kernels"
    assert curvopt.__version__ == importlib.metadata.version("curvopt-lora")
    for update in ("polar", "eigen", "adam", "whiten", "momentum"):
        for statistics in ("activation", "gradient", "weight"):
            model, optimizer = plain(
                lambda m, u=update, s=statistics: GritKFAC(m, lr=1e-2, update=u, statistics=s, reproject_every=4)
            )
    assert doctor(model, optimizer).to_dict() and drift(optimizer)
    assert effective_rank(torch.ones(4)) > 3.9
    resize_adapter(model, dict.fromkeys([pair.name for pair in optimizer.pairs], 2))
    plain(lambda m: MatryoshkaScaledAdam(m, lr=1e-2))
    plain(lambda m: GoRAInit(m, then=lambda m: GritKFAC(m, lr=1e-2)))
    if PeftModel is not None:
        with_peft()
    names = ("torch", "numpy", "peft", "transformers", "triton")
    found = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    print("smoke: fine on Python", sys.version.split()[0], *(f"{name} {version}" for name, version in found.items()))


if __name__ == "__main__":
    main()
