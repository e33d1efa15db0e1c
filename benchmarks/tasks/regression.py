"""One linear layer with Gaussian inputs and targets: loss and natural gradient are known in closed form."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tasks.base import Batch, Task

D_IN, D_OUT, NOISE = 64, 48, 0.1


class Layer(nn.Module):
    """y = W x with loss ½‖y − t‖², a mean over rows: the negative log-likelihood of unit Gaussian targets."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(D_IN, D_OUT, bias=False)
        self.linear.weight.data.copy_(weight)

    def forward(self, x: Tensor, target: Tensor) -> Any:
        """Return an object with ``loss``."""
        return SimpleNamespace(loss=0.5 * (self.linear(x) - target).square().sum(-1).mean())


class Regression(Task):
    """Targets of another layer: W plus a low-rank and a small dense change; inputs with a power-law spectrum."""

    name, title, unit = "regression", "linear layer, Gaussian targets (3 k)", "excess nats per row"
    steps, batch = 300, 32
    targets = ("linear",)
    scaled = ("linear",)

    def pretrained(self) -> nn.Module:
        """Draw the layer, its goal and the covariance of the inputs."""
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        spectrum = torch.arange(1, D_IN + 1).float() ** -1.5
        Q = torch.linalg.qr(normal(D_IN, D_IN)).Q
        self.root = Q * (spectrum * D_IN / spectrum.sum()).sqrt()  # x = root z
        self.covariance = self.root @ self.root.T
        W = normal(D_OUT, D_IN) / D_IN**0.5
        sizes = torch.arange(1, 9).float() ** -1.0
        self.goal = W + normal(D_OUT, 8) * sizes @ normal(8, D_IN) / D_IN**0.5 + 0.02 * normal(D_OUT, D_IN)
        self.start = W
        left_over = torch.linalg.svdvals(((self.goal - W) @ self.root).double())[self.rank :]
        self.least = float(0.5 * left_over.square().sum())
        return Layer(W)

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Fresh rows at every step."""
        g = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = torch.randn(self.batch, D_IN, generator=g) @ self.root.T
            yield {"x": x, "target": x @ self.goal.T + NOISE * torch.randn(self.batch, D_OUT, generator=g)}

    def split(self, name: str) -> list[Batch]:
        """Nothing is sampled: `valid` and `measure` are exact."""
        raise NotImplementedError(name)

    @torch.no_grad()
    def valid(self, model: nn.Module) -> float:
        """Excess of the expected loss, ½ tr((W − W*) Σ (W − W*)ᵀ), over that of the best adapter of this rank."""
        return self._excess(model, self.goal) - self.least

    def measure(self, model: nn.Module) -> dict[str, float | None]:
        """Retention: the same, towards the layer before fine-tuning."""
        kept = self._excess(model, self.start)
        return {"test": self.valid(model), "accuracy": None, "retention": kept, "retention_accuracy": None}

    @torch.no_grad()
    def _excess(self, model: nn.Module, goal: Tensor) -> float:
        model.eval()
        E = (model.base_model.model.linear(torch.eye(D_IN)).T - goal).double()
        model.train()
        return float(0.5 * torch.einsum("oi,ij,oj->", E, self.covariance.double(), E))


class NaturalGradient(torch.optim.Optimizer):
    """The oracle: lr · (F + λ mean(diag F))⁻¹ ∇ with the exact Fisher F of (A, B) under unit Gaussian targets.

    With J the Jacobian of y, F = E[JᵀJ]: the A block is s² BᵀB ⊗ Σ, the B block s² (A Σ Aᵀ) ⊗ I, and between them
    s² B ⊗ ΣAᵀ. Damped, because F is singular along the gauge of the pair.

    Args:
        model: PEFT model with one adapter on `Layer`.
        lr: 1 would be a Newton step.
        covariance: Σ of the inputs.
        damping: λ.
    """

    def __init__(self, model: nn.Module, lr: float, covariance: Tensor, damping: float = 1e-3) -> None:
        layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
        self.A, self.B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        self.s, self.covariance, self.damping = layer.scaling["default"], covariance.double(), damping
        super().__init__([self.A, self.B], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Take one step."""
        if self.A.grad is None or self.B.grad is None:
            return
        A, B, C = self.A.double(), self.B.double(), self.covariance
        r, n = A.shape[0], A.numel()
        AC = A @ C
        cross = torch.einsum("oa,bi->aiob", B, AC).reshape(n, -1)  # A entries (a, i) against B entries (o, b)
        F = torch.cat((
            torch.cat((torch.kron(B.T @ B, C), cross), 1),
            torch.cat((cross.T, torch.kron(torch.eye(len(B)).double(), AC @ A.T)), 1),
        ))  # fmt: skip
        F *= self.s**2
        F.diagonal().add_(self.damping * F.diagonal().mean())
        grad = torch.cat((self.A.grad.flatten(), self.B.grad.flatten())).double()
        step = self.param_groups[0]["lr"] * torch.linalg.solve(F, grad)
        self.A -= step[:n].view(r, -1).float()
        self.B -= step[n:].view(-1, r).float()
