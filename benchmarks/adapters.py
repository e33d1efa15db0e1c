"""The adapters that step time and memory are measured on, and every optimizer that is measured."""

from collections.abc import Callable
from typing import Any

import torch
from shapes import Shape
from torch import Tensor, nn

from curvopt import GritKFAC

LR = 1e-4


class Adapters(nn.Module):
    """LoRA pairs on a frozen base that takes no memory; the forward of the benchmark is the adapters alone.

    Args:
        shape: the linears.
        r: rank.
        device: "cpu" or "cuda".
    """

    def __init__(self, shape: Shape, r: int, device: str = "cpu") -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        names = [f"linear_{i}" for i in range(len(shape.linears))]
        blocks = nn.ModuleList(
            nn.ModuleDict({name: _hollow(*d) for name, d in zip(names, shape.linears, strict=True)})
            for _ in range(shape.blocks)
        )
        config = LoraConfig(r=r, lora_alpha=r, target_modules=names, init_lora_weights=False)
        self.r, self.device = r, device
        self.peft = get_peft_model(blocks, config).to(device)
        self.lora = [m for m in self.peft.modules() if hasattr(m, "lora_A")]
        for p in self.trainable():
            p.data.normal_(std=0.02)
        self.params = self.trainable()
        self.grads = [torch.randn_like(p) * 1e-3 for p in self.params]
        self.arrive()

    def arrive(self) -> None:
        """Give every parameter its gradient, as a backward pass would: some optimizers change it in place."""
        for p, g in zip(self.params, self.grads, strict=True):
            if p.grad is None and p.requires_grad:
                p.grad = torch.empty_like(g)
            if p.grad is not None:
                p.grad.copy_(g)

    def trainable(self) -> list[Tensor]:
        """Return the parameters that train."""
        return [p for p in self.peft.parameters() if p.requires_grad]

    def observe(self, tokens: int = 8) -> None:
        """Send ``tokens`` rows forward and a gradient back into every pair, as a training step does, then `arrive`."""
        losses = []
        for layer in self.lora:
            A, B = layer.lora_A["default"], layer.lora_B["default"]
            losses.append(B(A(torch.randn(tokens, A.in_features, device=self.device))).square().mean())
        torch.stack(losses).sum().backward()
        self.arrive()


def _hollow(d_in: int, d_out: int) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    linear.in_features, linear.out_features = d_in, d_out
    linear.weight = nn.Parameter(torch.zeros(1, 1).expand(d_out, d_in), requires_grad=False)
    return linear


Factory = Callable[[Adapters], torch.optim.Optimizer]
BASELINE = "AdamW fused"


def adamw(**options: Any) -> Factory:
    """AdamW of torch with options."""
    return lambda m: torch.optim.AdamW(m.trainable(), lr=LR, **options)


def grit(**options: Any) -> Factory:
    """GritKFAC with options."""
    return lambda m: GritKFAC(m.peft, lr=LR, **options)


def light() -> dict[str, Factory]:
    """Return the optimizers whose state is that of the adapter and r×r, by name."""
    found: dict[str, Factory] = {
        BASELINE: adamw(fused=True),
        "AdamW foreach": adamw(foreach=True),
        **{f"GritKFAC {rule}": grit(update=rule) for rule in ("polar", "eigen", "adam", "whiten", "momentum")},
        "GritKFAC polar, no outer factors": grit(outer_rank=0),
        "GritKFAC eigen, gradient": grit(update="eigen", statistics="gradient"),
        "GritKFAC eigen, weight": grit(update="eigen", statistics="weight"),
        "GritKFAC adam, weight": grit(update="adam", statistics="weight"),
        "PEFT Riemannian": _riemannian,
        "PEFT LoRA-FA": _lora_fa,
        "Muon": lambda m: torch.optim.Muon(m.trainable(), lr=LR, adjust_lr_fn="match_rms_adamw"),
    }
    try:
        from curvopt import MatryoshkaScaledAdam
    except ImportError:
        return found
    return {**found, "MatryoshkaScaledAdam": lambda m: MatryoshkaScaledAdam(m.peft, lr=LR)}


def _riemannian(m: Adapters) -> torch.optim.Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(m.peft, torch.optim.AdamW, lr=LR)


def _lora_fa(m: Adapters) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(m.peft, r=m.r, lora_alpha=m.r, lr=LR)


def heavy() -> dict[str, Factory]:
    """Return the optimizers with Kronecker factors of whole tensors, preconditioners every 10 steps."""
    import pytorch_optimizer as po

    found: dict[str, Factory] = {
        "SOAP": lambda m: po.SOAP(m.trainable(), lr=LR, precondition_frequency=10),
        "SOAP, r side only": lambda m: po.SOAP(
            m.trainable(), lr=LR, precondition_frequency=10, max_precondition_dim=m.r
        ),
        "Shampoo": lambda m: po.Shampoo(m.trainable(), lr=LR, preconditioning_compute_steps=10),
        "ScalableShampoo": lambda m: po.ScalableShampoo(
            m.trainable(), lr=LR, start_preconditioning_step=1, preconditioning_compute_steps=10
        ),
    }
    try:
        import distributed_shampoo as ds
    except ImportError:
        return found

    def distributed(m: Adapters, **options: Any) -> torch.optim.Optimizer:
        grafting = ds.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8)
        return ds.DistributedShampoo(
            m.trainable(), lr=LR, precondition_frequency=10, start_preconditioning_step=10,
            grafting_config=grafting, **options,
        )  # fmt: skip

    def r_side_only(m: Adapters) -> torch.optim.Optimizer:
        return distributed(m, max_preconditioner_dim=m.r)  # its blocks are then r×r on both sides

    return {**found, "Distributed Shampoo": distributed, "Distributed Shampoo, r×r blocks": r_side_only}


def contestants() -> dict[str, Factory]:
    """Return all of them, heavy ones last."""
    return {**light(), **heavy()}
