"""Float64 oracles: every formula of the package once more, written for reading and not for speed.

Matrix by matrix, in loops, by eigendecomposition instead of Cholesky, by enumeration instead of expectation. Nothing
here imports ``curvopt``. The tests cite these equations by number (letters as in ``curvopt.functional``):

====  =====================================================================================================
 (1)  S̄_t = Σ_i β^(t−i) x_i / Σ_i β^(t−i)                       bias-corrected average, written as weights
 (2)  ∂ℓ_n/∂A = d_n x_nᵀ,  ∂ℓ_n/∂B = s g_n u_nᵀ                 one token's gradients, rank one
 (3)  F_A ≈ S_d ⊗ E[x xᵀ],  F_B ≈ E[s² g gᵀ] ⊗ S_u              K-FAC of the two maps, row-major vec
 (4)  (Ŝ + λI)^p with Ŝ = S · k/tr(S), identity on dead directions
 (5)  m ← β₁m + (1−β₁)∇;  v ← β₂v + (1−β₂)∇²;  Δ = −lr · (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε);
      p ← p (1 − lr·wd) + Δ                                      AdamW (arXiv 1711.05101)
 (6)  the rules: P∇ → Adam; Q Adam(Qᵀ∇), its singular values made alike or not; R Adam(R∇); −P m̂ ‖Adam(∇)‖/‖P m̂‖
 (7)  σ_i² = eigenvalues of S_u S_d                              invariants of the gauge A → TA, B → BT⁻¹
 (8)  rise(C) = ½ tr(S_d (C−I) S_u (C−I)ᵀ)                       K-FAC quadratic of replacing B A by B C A
 (9)  min over rank-k C of (8) = ½ Σ_{i>k} σ_i²                  Eckart and Young on S_d^½ᵀ · S_u^½
====  =====================================================================================================
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

# one thread: bitwise comparisons need one order of summation, and small matrices are faster so
torch.set_num_threads(1)

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def bits(x: Tensor) -> Tensor:
    """Return the bit patterns of ``x``: comparing them tells −0 from 0 and holds NaN equal to itself."""
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).clone()


def average(observations: Sequence[Tensor], decay: float) -> Tensor:
    """(1), with the weights spelled out; ``decay=1`` gives equal weights, the running mean."""
    t = len(observations)
    weights = [decay ** (t - 1 - i) for i in range(t)]
    return sum(w * x.double() for w, x in zip(weights, observations, strict=True)) / sum(weights)


# ---------------------------------------------------------------------------------------------- Fisher, K-FAC


def log_likelihood_gradients(
    outputs: Callable[..., Tensor], params: Sequence[Tensor], x: Tensor, likelihood: str
) -> list[list[tuple[float, list[Tensor]]]]:
    """Return per row of ``x`` the gradients that make up its Fisher, with their weights, by enumeration.

    Args:
        outputs: ``outputs(x_n, *params)`` → logits or means, one row.
        params: tensors that require grad.
        x: ``(N, d_in)``.
        likelihood: ``"softmax"``: all labels weighted by their probability. ``"gaussian"`` (unit variance): the
            gradient is Jᵀ(y − t) with E[(y−t)(y−t)ᵀ] = I, so the rows of J with weight one have the same second moment.
    """
    result = []
    for row in x:
        out = outputs(row, *params)
        terms = []
        for c in range(len(out)):
            if likelihood == "softmax":
                weight, value = out.detach().softmax(-1)[c].item(), -out.log_softmax(-1)[c]
            else:
                weight, value = 1.0, out[c]
            terms.append((weight, [g.detach() for g in torch.autograd.grad(value, params, retain_graph=True)]))
        result.append(terms)
    return result


def dense_fisher(samples: list[list[tuple[float, list[Tensor]]]], which: int) -> Tensor:
    """Return E[vec(∇) vec(∇)ᵀ] of parameter ``which``, row-major, one outer product at a time."""
    size = samples[0][0][1][which].numel()
    F = torch.zeros(size, size, dtype=torch.float64)
    for terms in samples:
        for weight, gradients in terms:
            v = gradients[which].double().flatten()
            F += weight * torch.outer(v, v)
    return F / len(samples)


def rank_factor_d(samples: list[list[tuple[float, list[Tensor]]]], x: Tensor) -> Tensor:
    """Return S_d from the per-sample gradients of A alone: by (2) G Gᵀ = |x|² d dᵀ."""
    S = torch.zeros(samples[0][0][1][0].shape[0], samples[0][0][1][0].shape[0], dtype=torch.float64)
    for terms, row in zip(samples, x, strict=True):
        for weight, (G, *_) in terms:
            S += weight * (G @ G.T).double() / row.double().square().sum()
    return S / len(samples)


def rank_factor_u(samples: list[list[tuple[float, list[Tensor]]]], u: Tensor) -> Tensor:
    """Return S_u from the per-sample gradients of B alone: by (2) HᵀH / tr(HᵀH) = u uᵀ / |u|²."""
    r = samples[0][0][1][1].shape[1]
    S = torch.zeros(r, r, dtype=torch.float64)
    for terms, row in zip(samples, u, strict=True):
        H = max((g[1] for _, g in terms), key=lambda H: H.norm().item())
        S += (H.T @ H).double() / H.double().square().sum() * row.double().square().sum()
    return S / len(samples)


def kron(M: Tensor, N: Tensor) -> Tensor:
    """Return the Kronecker product entry by entry, so that (3) is not tested against itself."""
    a, b = M.shape[0], N.shape[0]
    K = torch.zeros(a * b, a * b, dtype=torch.float64)
    for i in range(a):
        for j in range(a):
            for p in range(b):
                for q in range(b):
                    K[i * b + p, j * b + q] = M[i, j] * N[p, q]
    return K


# ---------------------------------------------------------------------------------------------- functions of factors


def damped_power(S: Tensor, damping: float, power: float, k: int | None = None) -> Tensor:
    """(4) of one matrix by numpy's eigendecomposition in float64."""
    r = S.shape[-1]
    k = r if k is None else k
    block = S.double().numpy()[:k, :k]
    result = np.eye(r)
    if k and np.trace(block) != 0:
        values, Q = np.linalg.eigh(block * (k / np.trace(block)) + damping * np.eye(k))
        result[:k, :k] = (Q * values**power) @ Q.T
    return torch.from_numpy(result)


# ---------------------------------------------------------------------------------------------- updates


class AdamW:
    """(5) for one matrix, float64, state inside."""

    def __init__(self, shape: Sequence[int], beta1: float, beta2: float, eps: float) -> None:
        self.beta1, self.beta2, self.eps, self.t = beta1, beta2, eps, 0
        self.m = torch.zeros(*shape, dtype=torch.float64)
        self.v = torch.zeros(*shape, dtype=torch.float64)

    def __call__(self, gradient: Tensor, lr: float) -> Tensor:
        """Return Δ without the decay."""
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return -lr * m_hat / (v_hat**0.5 + self.eps)


class OuterFactor:
    """K-FAC's outer factor of one matrix, with d×d matrices, QR and eigenvalues throughout; see `functional.outer`.

    Args:
        k: directions that are kept.
        d: columns of the gradient.
        decay: β.
        damping: λ.
    """

    def __init__(self, k: int, d: int, decay: float, damping: float) -> None:
        i, j = torch.arange(k, dtype=torch.float64) + 0.5, torch.arange(d, dtype=torch.float64) + 0.5
        self.V = (2 / d) ** 0.5 * torch.cos(torch.pi / d * i[:, None] * j)
        self.mu, self.trace = torch.zeros(k, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        self.decay, self.damping = decay, damping

    def model(self) -> Tensor:
        """Return S as far as it is known, ``(d, d)``."""
        d = self.V.shape[1]
        rest = torch.eye(d, dtype=torch.float64) - self.V.T @ self.V
        return self.V.T @ (self.mu[:, None] * self.V) + (self.trace - self.mu.sum()) / max(1, d - len(self.V)) * rest

    def __call__(self, G: Tensor) -> Tensor:
        """Take a gradient ``(r, d)`` into the average and return it preconditioned."""
        d, new = G.shape[1], G.T @ G / len(G)
        S = self.decay * self.model() + (1 - self.decay) * new
        trace = self.decay * self.trace + (1 - self.decay) * new.trace()
        if trace == 0:
            return G
        Q, R = torch.linalg.qr((self.V @ S + self.damping * trace / d * self.V).T)
        self.V, self.trace = (Q * R.diagonal().sign()).T, trace
        self.mu = (self.V @ S @ self.V.T).diagonal()
        values, U = torch.linalg.eigh(self.model() * (d / trace))
        return G @ (U * ((1 + self.damping) / (values.clamp(min=0) + self.damping)).sqrt()) @ U.T


def rule_step(
    rule: str, adam: AdamW, p: Tensor, gradient: Tensor, M: Tensor, lr: float, weight_decay: float, maximize: bool,
    damping: float = 0.1,
) -> Tensor:  # fmt: skip
    """(6): return one matrix ``(r, d)``, rank first, after one step of a rule; ``damping`` is that of "polar"."""
    gradient = -gradient if maximize else gradient
    if rule == "adam":
        delta = adam(M @ gradient, lr)
    elif rule == "eigen":
        delta = M @ adam(M.T @ gradient, lr)
    elif rule == "polar":
        delta = adam(gradient, lr)
        U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
        alike = sigma / (sigma.square() / sigma.square().sum().clamp(min=1e-300) * len(delta) + damping).sqrt()
        norm = alike.norm()
        delta = U * (alike * (sigma.norm() / norm if norm > 0 else 0.0)) @ Vh
    elif rule == "whiten":
        delta = M @ adam(M @ gradient, lr)
    else:
        length = adam(gradient, lr).square().sum().sqrt()
        direction = M @ adam.m
        norm = direction.square().sum().sqrt()
        delta = -direction * (length / norm if norm > 0 else 0.0)
    return p * (1 - lr * weight_decay) + delta


# ---------------------------------------------------------------------------------------------- balanced truncation


def hankel(S_u: Tensor, S_d: Tensor) -> Tensor:
    """(7) for one pair: square roots of the eigenvalues of the (unsymmetric) product, descending."""
    values = np.linalg.eigvals(S_u.double().numpy() @ S_d.double().numpy())
    return torch.from_numpy(np.sort(np.sqrt(np.clip(values.real, 0, None)))[::-1].copy())


def rise(core: Tensor, S_u: Tensor, S_d: Tensor) -> float:
    """(8) of one pair."""
    E = core.double() - torch.eye(len(core), dtype=torch.float64)
    return 0.5 * torch.trace(S_d.double() @ E @ S_u.double() @ E.T).item()


def rise_sampled(core: Tensor, u: Tensor, d: Tensor) -> float:
    """(8) as an expectation of ½ (dᵀ(C−I)u)² over independent u and d: all pairs of rows, one by one."""
    E = core - torch.eye(len(core), dtype=core.dtype)
    return sum(0.5 * (b @ E @ a).item() ** 2 for a in u for b in d) / (len(u) * len(d))


def best_subset(k: int, T: Tensor, T_inv: Tensor, S_u: Tensor, S_d: Tensor) -> tuple[float, tuple[int, ...]]:
    """Return the smallest rise, and the directions kept, over all k-subsets of the directions of a basis."""
    r = len(T)
    costs = []
    for kept in combinations(range(r), k):
        mask = torch.zeros(r, dtype=torch.float64)
        mask[list(kept)] = 1
        costs.append((rise(T_inv @ (mask[:, None] * T), S_u, S_d), kept))
    return min(costs)


def eckart_young(k: int, S_u: Tensor, S_d: Tensor) -> float:
    """(9) by the singular values of the product of symmetric square roots."""
    roots = [damped_power(S, 0.0, 0.5) * (torch.trace(S.double()) / len(S)).sqrt() for S in (S_d, S_u)]
    values = torch.linalg.svdvals(roots[0] @ roots[1])
    return 0.5 * values[k:].square().sum().item()
