"""Prototype for outer.py: Adam preconditioned by the outer Kronecker factors, with equalised singular values.

K-FAC says Fisher(A) ≈ S_x ⊗ S_d and Fisher(B) ≈ S_u ⊗ S_g, with S_x = E[x xᵀ] over inputs and S_g = E[g gᵀ] over
gradients at the outputs. S_x and S_g are the outer factors, d×d. Every A ``(r, d_in)`` and every Bᵀ ``(r, d_out)`` is
treated as a matrix of r rows:

    after Adam:   δ = Adam(∇)            X = δ S̃^(-p)
    before Adam:  δ = Adam(∇ S̃^(-p))     X = δ
    step = msign_λ(X) · ‖δ‖_F / ‖msign_λ(X)‖_F        S̃ = S / mean diag S + λ I

msign_λ(X) = (X Xᵀ / mean eigenvalue + λ I)^(-1/2) X. S is a moving average of y yᵀ over rows y: inputs and output
gradients ("activation", needs hooks), or the rows of ∇A and ∇Bᵀ ("gradient", needs none). It is stored as a matrix, or
as its k leading eigenvectors V, their eigenvalues μ and its trace; the rest is approximated by a multiple of the
identity. Plain torch, one device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Whole:
    """The d×d factor, without bias correction (only its shape is used, not its scale), and the matrix S̃^(-p).

    Args:
        L: number of matrices.
        d: columns.
        decay: of the moving average.
        k: if given, eigenvalues below the k largest are replaced by their mean.
        block: if given, the width of the diagonal blocks that are kept; 1 keeps the diagonal.
    """

    def __init__(self, L: int, d: int, decay: float, k: int | None = None, block: int | None = None) -> None:
        self.S, self.decay, self.k, self.block = torch.zeros(L, d, d), decay, k, block
        self.root = torch.eye(d).repeat(L, 1, 1)

    def add(self, rows: Tensor) -> None:
        """Update the moving average with rows ``[L, n, d]``."""
        self.S.mul_(self.decay).add_(rows.mT @ rows / rows.shape[1], alpha=1 - self.decay)

    def refresh(self, exponent: float, damping: float) -> None:
        """Recompute S̃^(-p)."""
        L, d, _ = self.S.shape
        mean = self.S.diagonal(dim1=1, dim2=2).mean(1)
        S = self.S / torch.where(mean > 0, mean, 1.0)[:, None, None]
        if self.block == 1:
            values = S.diagonal(dim1=1, dim2=2) + damping
            self.root = torch.diag_embed(torch.where(mean[:, None] > 0, values**-exponent, 1.0))
            return
        if self.block is not None:
            part = torch.arange(d) // self.block
            S = S * (part[:, None] == part)
        values, Q = torch.linalg.eigh(S)
        if self.k is not None and self.k < d:
            values = torch.cat(
                (values[:, : -self.k].mean(1, keepdim=True).expand(L, d - self.k), values[:, -self.k :]), 1
            )
        scale = torch.where(mean[:, None] > 0, (values.clamp(min=0) + damping) ** -exponent, 1.0)
        self.root = (Q * scale[:, None, :]) @ Q.mT

    def apply(self, X: Tensor) -> Tensor:
        """Return X S̃^(-p)."""
        return X @ self.root


class LowRank:
    """k eigenvectors V ``[L, k, d]`` (rows) with eigenvalues μ, and the trace; S̃^(-p) = c I + Vᵀ diag(w) V.

    Args:
        L: number of matrices.
        d: columns.
        decay: of the moving average.
        k: eigenvectors kept.
        method: how rows update V and μ. "svd": the k leading right singular vectors of [√(βμ) V; √((1−β)/n) rows], from
            the eigenvectors of its small Gram matrix. "power": one step of orthogonal iteration on
            β Vᵀ μ V + (1−β) rowsᵀ rows / n. "oja": V + the gradient of the captured energy, orthonormalised.
    """

    def __init__(self, L: int, d: int, decay: float, k: int, method: str = "svd") -> None:
        k = min(k, d)
        self.decay, self.method = decay, method
        generator = torch.Generator().manual_seed(d)
        start = torch.linalg.qr(torch.randn(d, k, generator=generator)).Q.mT
        self.V = start.repeat(L, 1, 1) if method != "svd" else torch.zeros(L, k, d)
        self.mu, self.trace = torch.zeros(L, k), torch.zeros(L)
        self.c, self.w = torch.ones(L), torch.zeros(L, k)

    def add(self, rows: Tensor) -> None:
        """Update the moving average with rows ``[L, n, d]``."""
        b, n = self.decay, rows.shape[1]
        k, d = self.V.shape[1:]
        self.trace = b * self.trace + (1 - b) * rows.square().sum((1, 2)) / n
        if self.method == "svd":
            # scaled to trace one: gradients may be so small that their squares underflow in float32
            M = torch.cat(((b * self.mu).sqrt()[:, :, None] * self.V, ((1 - b) / n) ** 0.5 * rows), 1)
            size = self.trace.clamp(min=1e-38)[:, None, None]
            M = M / size.sqrt()
            if k + n < d:  # the smaller of the two Gram matrices
                values, U = torch.linalg.eigh(M @ M.mT)
                values, U = values[:, -k:], U[:, :, -k:]
                kept = values > 1e-6 * values[:, -1:].clamp(min=1e-30)
                self.V = torch.where(kept, values, torch.inf).rsqrt()[:, :, None] * (U.mT @ M)
            else:
                values, U = torch.linalg.eigh(M.mT @ M)
                values, self.V = values[:, -k:], U[:, :, -k:].mT
            self.mu = values.clamp(min=0) * size[:, 0]
            return
        into = (self.V @ rows.mT / n) @ rows  # V rowsᵀ is what `apply` needs too, if rows are the gradient
        if self.method == "power":
            Y = b * self.mu[:, :, None] * self.V + (1 - b) * into
        else:
            Y = self.V + (1 - b) * into / self.trace.clamp(min=1e-38)[:, None, None] * k
        # ∇A is zero at the first step, where B = 0: V stays the random start
        V = torch.linalg.qr(Y.mT).Q.mT if bool((self.trace > 0).all()) else self.V
        old = ((V @ self.V.mT).square() * self.mu[:, None, :]).sum(2)
        self.V, self.mu = V, b * old + (1 - b) * (V @ rows.mT).square().mean(2)

    def refresh(self, exponent: float, damping: float) -> None:
        """Recompute c and w."""
        k, d = self.V.shape[1:]
        mean = torch.where(self.trace > 0, self.trace / d, 1.0)
        mu = self.mu / mean[:, None]
        rest = (d * (self.trace > 0) - mu.sum(1)).clamp(min=0) / max(1, d - k)
        self.c = torch.where(self.trace > 0, (rest + damping) ** -exponent, 1.0)
        self.w = torch.where((self.trace > 0)[:, None], (mu + damping) ** -exponent - self.c[:, None], 0.0)

    def apply(self, X: Tensor) -> Tensor:
        """Return X S̃^(-p)."""
        return self.c[:, None, None] * X + (X @ self.V.mT * self.w[:, None, :]) @ self.V


def equalised(X: Tensor, damping: float) -> Tensor:
    """Return msign_λ(X) = (X Xᵀ / mean eigenvalue + λI)^(-1/2) X of ``[L, r, d]``."""
    G = X @ X.mT
    mean = G.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    values, Q = torch.linalg.eigh(G / torch.where(mean > 0, mean, 1.0))
    return (Q * (values.clamp(min=0) + damping).rsqrt()[:, None, :]) @ (Q.mT @ X)


class Bucket:
    """Matrices ``(r, d)`` of equal width, A or Bᵀ, with their state.

    Args:
        members: for each matrix the parameter, whether it is transposed, and the key of its activation rows.
        factor: the outer factor, or None.
    """

    def __init__(self, members: list[tuple[Tensor, bool, Any]], factor: Whole | LowRank | None) -> None:
        self.members, self.factor = members, factor
        shape = self.read([p for p, _, _ in members]).shape
        self.m, self.v = torch.zeros(shape), torch.zeros(shape)

    def read(self, tensors: list[Tensor]) -> Tensor:
        """Return tensors of the members' shapes as a stack ``[L, r, d]``."""
        turned = [t.mT if turn else t for t, (_, turn, _) in zip(tensors, self.members, strict=True)]
        return torch.stack(turned).flatten(0, -3)

    def take(self, step: Tensor, lr: float | Tensor) -> None:
        """Subtract lr (a number, or a tensor of one per run) times the stack from the parameters."""
        step = step.unflatten(0, (len(self.members), -1)) * torch.as_tensor(lr).reshape(-1, 1, 1)
        for s, (p, turned, _) in zip(step, self.members, strict=True):
            p.sub_((s.mT if turned else s).reshape(p.shape))


class OuterPolar(torch.optim.Optimizer):
    """The update of the module docstring; trainable parameters outside LoRA pairs get Adam.

    Args:
        model: PEFT model with one adapter, "default".
        lr: learning rate, or a tensor of one per run for the stacks of `side_by_side`.
        betas: of Adam.
        eps: of Adam.
        damping: λ of msign; None: no msign.
        source: of the outer factors: "gradient" (rows of ∇A and ∇Bᵀ), "activation" (inputs, output gradients), or None.
        k: eigenvectors kept; None for the full factor.
        method: "exact" (k eigenvectors of the full average), or a method of `LowRank`.
        block: width of diagonal blocks of the full factor; None for all of it.
        sides: LoRA matrices that have an outer factor: "AB", "A" or "B".
        order: "after" Adam, "before" Adam, or "both" (Adam in whitened coordinates).
        exponent: p.
        outer_damping: λ of S̃.
        decay: of the moving average.
        factor_every: steps between updates of the factors.
        root_every: steps between updates of S̃^(-p).
        rows: rows per step of the source "activation"; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.7, 0.99),
        eps: float = 1e-8,
        damping: float | None = 0.1,
        source: str | None = "gradient",
        k: int | None = 16,
        method: str = "svd",
        block: int | None = None,
        sides: str = "AB",
        order: str = "after",
        exponent: float = 0.5,
        outer_damping: float = 0.1,
        decay: float = 0.95,
        factor_every: int = 1,
        root_every: int = 5,
        rows: int | None = None,
    ) -> None:
        self.betas, self.eps, self.damping, self.source, self.order = betas, eps, damping, source, order
        self.exponent, self.outer_damping, self.rows = exponent, outer_damping, rows
        self.factor_every, self.root_every, self.clock = factor_every, root_every, 0
        found: dict[Any, list[tuple[Tensor, bool, Any]]] = {}
        self.seen: dict[Any, Tensor] = {}
        self.handles: list[Any] = []
        paired = set()
        for layer in model.modules():
            if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
                continue
            A, B = layer.lora_A["default"], layer.lora_B["default"]
            for side, module in (("A", A), ("B", B)):
                p = module.weight
                paired.add(p)
                on = source is not None and side in sides
                d = p.shape[-1] if side == "A" else p.shape[-2]
                found.setdefault((d, on), []).append((p, side == "B", p))
                if on and source == "activation":
                    self.handles.append(module.register_forward_hook(self._watch(side, p)))
        self.buckets = []
        for (d, on), members in found.items():
            L = sum(p[..., 0, 0].numel() for p, _, _ in members)
            if not on:
                factor = None
            elif k is None or method == "exact":
                factor = Whole(L, d, decay, k, block)
            else:
                factor = LowRank(L, d, decay, k, method)
            self.buckets.append(Bucket(members, factor))
        others = [p for p in model.parameters() if p.requires_grad and p not in paired]
        self.others = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in others]
        super().__init__([*paired, *others], {"lr": lr})

    def _watch(self, side: str, key: Tensor) -> Callable[..., None]:
        def thin(x: Tensor) -> Tensor:
            x = x.detach().reshape(key.shape[0] if key.dim() == 3 else 1, -1, x.shape[-1])
            n, of = self.rows, x.shape[1]
            if n is None or n >= of:
                return x
            first = self.clock * 7919 % of  # evenly spaced, from a start that varies by step
            return x[:, (first + torch.arange(n) * of // n) % of]

        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if not module.training or self.clock % self.factor_every:
                return
            if side == "A":
                self.seen[key] = thin(args[0])
            elif out.requires_grad:
                out.register_hook(lambda g: self.seen.__setitem__(key, thin(g)))

        return hook

    def remove_hooks(self) -> None:
        """Remove the hooks from the model."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Take one step."""
        lr = self.param_groups[0]["lr"]
        for bucket in self.buckets:
            grads, factor = bucket.read([p.grad for p, _, _ in bucket.members]), bucket.factor
            if factor is not None and self.clock % self.factor_every == 0:
                factor.add(
                    grads if self.source == "gradient" else torch.cat([self.seen[k] for *_, k in bucket.members])
                )
            # at the second step too: ∇A is zero at the first, where B = 0
            if factor is not None and (self.clock % self.root_every == 0 or self.clock == 1):
                factor.refresh(self.exponent, self.outer_damping)
            if factor is not None and self.order in ("before", "both"):
                grads = factor.apply(grads)
            delta = self._adam(grads, bucket.m, bucket.v)
            X = delta if factor is None or self.order == "before" else factor.apply(delta)
            if self.damping is not None:
                X = equalised(X, self.damping)
            length = torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True)
            want = torch.linalg.vector_norm(delta, dim=(1, 2), keepdim=True)
            bucket.take(X * torch.where(length > 0, want / length, 0.0), lr)
        for p, m, v in self.others:
            p.sub_(self._adam(p.grad, m, v), alpha=lr)
        self.clock += 1

    def _adam(self, grad: Tensor, m: Tensor, v: Tensor) -> Tensor:
        b1, b2 = self.betas
        t = self.clock + 1
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
