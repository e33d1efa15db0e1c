"""The adapters that step time and memory are measured on, and every optimizer that is measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvopt import GritKFAC

# one transformer block: (d_in, d_out) of its seven linears, in units chosen by --hidden and --intermediate
PROJECTIONS = {"q": "hh", "k": "hh", "v": "hh", "o": "hh", "gate": "hi", "up": "hi", "down": "ih"}


class Adapters(nn.Module):
    """LoRA pairs of ``layers`` blocks on a frozen base that takes no memory; its forward is the adapters alone.

    Args:
        layers: number of blocks; seven pairs each.
        hidden: hidden size.
        intermediate: inner size of the feed-forward part.
        r: rank.
    """

    def __init__(self, layers: int, hidden: int, intermediate: int, r: int) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        size = {"h": hidden, "i": intermediate}
        blocks = nn.ModuleList(
            nn.ModuleDict({name: _hollow(size[d[0]], size[d[1]]) for name, d in PROJECTIONS.items()})
            for _ in range(layers)
        )
        config = LoraConfig(r=r, lora_alpha=r, target_modules=list(PROJECTIONS), init_lora_weights=False)
        self.peft = get_peft_model(blocks, config)
        self.lora = [m for m in self.peft.modules() if hasattr(m, "lora_A")]
        for p in self.trainable():
            p.data.normal_(std=0.02)
            p.grad = torch.randn_like(p) * 1e-3

    def trainable(self) -> list[Tensor]:
        """Return the parameters that train."""
        return [p for p in self.peft.parameters() if p.requires_grad]

    def observe(self, tokens: int = 32) -> None:
        """Send ``tokens`` rows forward and a gradient back through every pair, without touching ``.grad``."""
        losses = []
        for layer in self.lora:
            A, B = layer.lora_A["default"], layer.lora_B["default"]
            losses.append(B(A(torch.randn(tokens, A.in_features))).square().mean())
        torch.autograd.grad(torch.stack(losses).sum(), self.trainable())


def _hollow(d_in: int, d_out: int) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    linear.in_features, linear.out_features = d_in, d_out
    linear.weight = nn.Parameter(torch.zeros(1, 1).expand(d_out, d_in), requires_grad=False)
    return linear


Factory = Callable[[Adapters], torch.optim.Optimizer]


def contestants(heavy: bool) -> dict[str, Factory]:
    """Return the optimizers by name; ``heavy`` adds those with d×d blocks, which want few pairs."""
    lr = 1e-4
    all_: dict[str, Factory] = {
        "AdamW fused": lambda m: torch.optim.AdamW(m.trainable(), lr=lr, fused=True),
        "AdamW foreach": lambda m: torch.optim.AdamW(m.trainable(), lr=lr, foreach=True),
        "AdamW": lambda m: torch.optim.AdamW(m.trainable(), lr=lr, foreach=False),
        **{f"GritKFAC {rule}": _grit(lr, update=rule) for rule in ("eigen", "adam", "whiten", "momentum")},
        "GritKFAC eigen, gradient": _grit(lr, statistics="gradient"),
        "GritKFAC adam, weight": _grit(lr, statistics="weight", update="adam"),
        "PEFT Riemannian AdamW": _riemannian(lr),
    }
    return {**all_, **_blockwise(lr)} if heavy else all_


def _grit(lr: float, **options: Any) -> Factory:
    return lambda m: GritKFAC(m.peft, lr=lr, **options)


def _riemannian(lr: float) -> Factory:
    def make(m: Adapters) -> torch.optim.Optimizer:
        from peft.optimizers import create_riemannian_optimizer

        return create_riemannian_optimizer(m.peft, torch.optim.AdamW, lr=lr)

    return make


def _blockwise(lr: float) -> dict[str, Factory]:
    import pytorch_optimizer as po

    found: dict[str, Factory] = {
        "SOAP (pytorch-optimizer)": lambda m: po.SOAP(m.trainable(), lr=lr),
        "Shampoo (pytorch-optimizer)": lambda m: po.Shampoo(m.trainable(), lr=lr, preconditioning_compute_steps=10),
        "ScalableShampoo (pytorch-optimizer)": lambda m: po.ScalableShampoo(
            m.trainable(), lr=lr, start_preconditioning_step=1, preconditioning_compute_steps=10
        ),
    }
    try:
        from distributed_shampoo import AdamPreconditionerConfig, DistributedShampoo
    except ImportError:
        return found
    found["Distributed Shampoo"] = lambda m: DistributedShampoo(
        m.trainable(),
        lr=lr,
        precondition_frequency=10,
        start_preconditioning_step=1,
        grafting_config=AdamPreconditionerConfig(beta2=0.999),
    )
    return found
