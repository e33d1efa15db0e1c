r"""A layer's gradient in whitened coordinates, M = R_g Ḡ R_x, from sums of low rank alone (our derivation).

.. code-block:: text

    S_x = E[x xᵀ],  S_g = E[g gᵀ];   R = (S / mean diag S + λ)^(-1/2)
    S Ω → V diag(μ) Vᵀ + ρ (I − V Vᵀ)  (Nyström)   ⇒   R = c I + V diag(w) Vᵀ,  c = (ρ+λ)^(-1/2), w = (μ+λ)^(-1/2) − c
    M Ω = R_g (Ḡ R_x Ω),  Ψᵀ M = (Ψᵀ R_g Ḡ) R_x   ⇒   M ≈ Q (Ψᵀ Q)⁺ Ψᵀ M,  Q = orth(M Ω)

The last line is the single-pass decomposition of Tropp, Yurtsever, Udell and Cevher (arXiv 1609.00048). All sums are
linear, so that batches and processes add up, and no d×d matrix is ever formed.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # λ, relative to the mean diagonal


@dataclass(frozen=True)
class Whitening:
    """R = c I + V diag(w) Vᵀ.

    Attributes:
        V: ``(d, k)``, orthonormal columns.
        w: ``(k,)``.
        c: 0-d.
    """

    V: Tensor
    w: Tensor
    c: Tensor

    def __call__(self, X: Tensor) -> Tensor:
        """Return X R for ``X`` ``(..., d)``, in its dtype."""
        V, w, c = (t.to(X.dtype) for t in (self.V, self.w, self.c))
        return c * X + ((X @ V) * w) @ V.mT


def whitening(SO: Tensor, Omega: Tensor, trace: Tensor, rank: int, damping: float = DAMPING) -> Whitening:
    """Return R = (S / mean diag S + λ)^(-1/2) of a positive semidefinite S known by ``SO`` = S Ω and its trace.

    The ``rank`` leading eigenpairs come from Nyström's approximation, S Ω (Ωᵀ S Ω)⁺ (S Ω)ᵀ, which is S itself where S
    has no higher rank than Ω columns; all others are taken as equal. The scale of S does not matter.

    Args:
        SO: ``(d, l)``.
        Omega: ``(d, l)``, a Gaussian test matrix.
        trace: tr S, 0-d.
        rank: eigenpairs to keep; at most l are.
        damping: λ > 0.

    Returns:
        The map, in float64; the identity where S is zero.
    """
    d, eps = len(SO), torch.finfo(SO.dtype).eps
    SO, Omega, trace = SO.double(), Omega.double(), trace.double()
    scale = torch.where(trace > 0, d / trace, 0.0)  # S with mean diagonal 1
    core = Omega.mT @ SO
    mu, U = torch.linalg.eigh((core + core.mT) / 2 * scale)
    # what rounding left of a zero eigenvalue is no direction
    keep = mu > mu[-1] * len(mu) * 10 * eps
    half = torch.where(keep, mu, 1.0).rsqrt() * keep
    V, sigma, _ = torch.linalg.svd((SO * scale) @ (U * half), full_matrices=False)
    V, mu = V[:, :rank], sigma[:rank].square()
    rest = d - V.shape[1]
    rho = ((trace * scale - mu.sum()) / max(rest, 1)).clamp(min=0)
    c = torch.where(trace > 0, (rho + damping).rsqrt(), 1.0)
    return Whitening(V, torch.where(trace > 0, (mu + damping).rsqrt() - c, 0.0), c)


def gaussian(d: int, columns: int, name: str, like: Tensor) -> Tensor:
    """Return a Gaussian ``(d, columns)`` that depends on its arguments alone: every process and every resume agrees."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(d, columns, generator=generator, dtype=torch.float64).to(like)


def right_singular(MO: Tensor, PM: Tensor, Psi: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading singular values and right singular vectors of M known by M Ω and Ψᵀ M.

    Exact, but for rounding, where M has no higher rank than Ω columns and Ψ at least as many columns as Ω.

    Args:
        MO: ``(d_out, l)``, M Ω.
        PM: ``(m, d_in)``, Ψᵀ M.
        Psi: ``(d_out, m)``, m ≥ l; both test matrices are Gaussian.
        rank: how many; at most l.

    Returns:
        σ ``(rank,)`` in descending order and V ``(d_in, rank)`` with orthonormal columns, in float64.
    """
    MO, PM, Psi = MO.double(), PM.double(), Psi.double()
    Q = torch.linalg.qr(MO).Q
    core = torch.linalg.lstsq(Psi.mT @ Q, PM, driver="gelsd" if PM.device.type == "cpu" else None).solution
    _, sigma, Vh = torch.linalg.svd(core, full_matrices=False)
    return sigma[:rank], Vh[:rank].mT


def whitened_rows(V: Tensor, sigma: Tensor, A: Tensor, R_x: Whitening) -> Tensor:
    """Return A's start ``(r, d_in)``: Vᵀ R_x, of the Frobenius norm of ``A``.

    Rows beyond the rank of M, where V is noise, are rows of ``A R_x`` instead.

    Args:
        V: ``(d_in, n)`` right singular vectors of M.
        sigma: ``(n,)`` its singular values, descending.
        A: ``(r, d_in)``, as LoRA starts it.
        R_x: of the layer's input.
    """
    A = A.double()
    r, n = len(A), V.shape[1]
    lead = torch.zeros_like(A)
    lead[: min(r, n)] = V.mT[:r].double()
    known = torch.zeros(r, dtype=torch.bool, device=A.device)
    known[: min(r, n)] = (sigma > sigma[:1] * 1e-6)[:r]
    random = A / torch.linalg.vector_norm(A, dim=1, keepdim=True).clamp(min=1e-300)
    return scaled_like(R_x(torch.where(known[:, None], lead, random)), A)


def scaled_like(X: Tensor, A: Tensor) -> Tensor:
    """Return X with the Frobenius norm of A; zero where X is zero."""
    size = torch.linalg.vector_norm(X)
    return X * torch.where(size > 0, torch.linalg.vector_norm(A) / size, 0.0)
