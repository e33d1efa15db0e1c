"""The mathematics: pure functions of tensors, with torch only. Also the specification of every kernel.

Notation, used by all modules of this package (one LoRA layer, one adapter: "a pair")

=========  ==========  ==============================================================
symbol     shape       meaning
=========  ==========  ==============================================================
x          (N, d_in)   input rows (tokens), after the adapter's dropout
A          (r, d_in)   first LoRA matrix
B          (d_out, r)  second LoRA matrix
s          scalar      adapter scaling; the layer computes W x + s B A x
u = x Aᵀ   (N, r)      output of A, input of B
g          (N, d_out)  gradient of the loss at the layer's output
d = s g B  (N, r)      gradient of the loss at u
S_u        (r, r)      second moment of u, uᵀu / N
S_d        (r, r)      second moment per token of d, N dᵀd: the loss is a token mean, so d carries 1/N
=========  ==========  ==============================================================

``∂L/∂A = dᵀx`` and ``∂L/∂B = s gᵀu``; the K-FAC factors on the rank side are S_d for A and S_u for B
(Fisher(A) ≈ E[x xᵀ] ⊗ S_d, Fisher(B) ≈ S_u ⊗ E[g gᵀ]).

**Stacks.** Matrices of equal shape are stacked: ``X`` is ``[L, r, d]`` with ``rank_dim=1`` (A as stored by
``nn.Linear``) or ``[L, d, r]`` with ``rank_dim=2`` (B). An r×r matrix acts on the rank side from either storage
(`left`), so A and B share every formula below, read with the rank first: ``X ← M X``.

**Rank in use.** ``k`` (``[L]``, integers): directions ``i < k`` are live, those ``i ≥ k`` dead; ``None`` means all are
live. Dead rows of every stack are exactly zero, and r×r maps act on them as the identity.

**Precision.** r×r matrices are float32 (float64 beside float64 parameters); 16-bit matrices are computed on in
float32 and rounded once when stored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values stored as ``dtype`` are computed on: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def left(M: Tensor, X: Tensor, rank_dim: int, out: Tensor | None = None) -> Tensor:
    """Apply r×r maps on the rank side of a stack.

    Args:
        M: ``[L, r, r]``.
        X: ``[L, r, d]`` if ``rank_dim`` is 1, ``[L, d, r]`` if it is 2.
        rank_dim: the dimension of ``X`` that is the rank.
        out: where to write the result, if given.

    Returns:
        A stack shaped like ``X``: ``M X``, or ``X Mᵀ`` when the rank comes last.
    """
    return torch.matmul(M, X, out=out) if rank_dim == 1 else torch.matmul(X, M.mT, out=out)


def rank_gram(X: Tensor, rank_dim: int) -> Tensor:
    """Return X Xᵀ on the rank side ``[L, r, r]`` of a stack ``[L, r, d]`` (``rank_dim`` 1) or ``[L, d, r]`` (2)."""
    return X @ X.mT if rank_dim == 1 else X.mT @ X


def trace(S: Tensor) -> Tensor:
    """Return the traces ``[L]`` of ``[L, r, r]``."""
    return S.diagonal(dim1=-2, dim2=-1).sum(-1)


def live_rows(k: Tensor, r: int) -> Tensor:
    """Return the boolean mask ``[L, r]`` of directions ``i < k``."""
    return torch.arange(r, device=k.device) < k.unsqueeze(-1)


def any_nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """Return a 0-d boolean: whether any value of these tensors of one device is not finite; one read of each.

    On the CPU by sums, which a value that is not finite makes not finite; so does a sum above the range of float32.
    """
    if tensors[0].is_cuda:
        found = [n.float() for n in torch._foreach_norm(list(tensors), torch.inf)]
    else:
        found = [X.sum(dtype=compute_dtype(X.dtype)) for X in tensors]
    return ~torch.stack([f.double() for f in found]).isfinite().all()
