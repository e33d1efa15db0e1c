"""The reference of a bucket's plan: what a step does with all sides of one rank, in plain torch.

A plan is made once for a bucket's slabs; ``curvopt.kernels.UpdatePlan`` is its twin, with the same methods.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.functional import compute_dtype, left, rank_gram
from curvopt.functional.moments import any_nonfinite
from curvopt.functional.truncate import truncate_
from curvopt.functional.update import Slab


class ReferencePlan:
    """A bucket's step in plain torch, on any device and dtype.

    Args:
        update: changes slabs in place, ``update(slabs, found_inf)``.
        slabs: `functional.update.Slab` or `functional.nested.RowSlab`, T matrices in all, of one rank and dtype.
    """

    def __init__(self, update: Callable[[Sequence[Any], Tensor], None], slabs: Sequence[Any]) -> None:
        self._update = update
        self.slabs = list(slabs)
        self._dtype = compute_dtype(slabs[0].exp_avg.dtype)
        self._own: dict[int, Tensor] = {}
        self._shared: Tensor | None = None
        self._shared_basis = torch.empty(0)

    def load(self, grads: Sequence[Tensor]) -> bool:
        """Take the T gradients of this step in the order of the slabs; False if they do not fit the plan."""
        at = 0
        for i, s in enumerate(self.slabs):
            own = list(grads[at : at + len(s.params)])
            at += len(own)
            if isinstance(s, Slab) and (_mapped(s) or own[0].dtype != self._dtype):
                s.grads = self._stacked(i, own)
            else:
                s.grads = own
        return True

    def _stacked(self, i: int, own: list[Tensor]) -> Tensor:
        """Return gradients as one stack in the compute dtype, which the update may overwrite."""
        if own[0].dtype != self._dtype:
            return torch.stack(own).to(self._dtype)
        buffer = self._buffer(i)
        return torch.stack(own) if buffer is None else torch.stack(own, out=buffer)

    def _buffer(self, i: int) -> Tensor | None:
        """Return a workspace of a slab's own; none off the CPU, where torch's allocator keeps memory itself."""
        like = self.slabs[i].exp_avg
        if like.is_cpu and i not in self._own:
            self._own[i] = torch.empty_like(like, dtype=self._dtype)
        return self._own.get(i)

    def _workspaces(self) -> None:
        """Give the slabs what they work in: it takes the place of pages that would be faulted in at every step."""
        if not self.slabs[0].exp_avg.is_cpu:
            return
        if self._shared is None:
            most = max(s.exp_avg.numel() for s in self.slabs)
            self._shared = torch.empty(most, dtype=self._dtype)
            widest = max(0 if s.basis is None else s.basis.numel() for s in self.slabs)
            self._shared_basis = torch.empty(widest, dtype=self._dtype)
        for i, s in enumerate(self.slabs):
            if s.basis is not None:
                s.spare_basis = self._shared_basis[: s.basis.numel()].view(s.basis.shape)
            s.spare = self._shared[: s.exp_avg.numel()].view(s.exp_avg.shape)
            s.delta = None if isinstance(s.grads, Tensor) else self._buffer(i)

    def nonfinite_(self, flag: Tensor) -> None:
        """Set a 0-d float32 to 1 if any gradient is not finite; else it stays as it is."""
        stacks = [[s.grads] if isinstance(s.grads, Tensor) else s.grads for s in self.slabs]
        flag.copy_(torch.maximum(flag, any_nonfinite([g for stack in stacks for g in stack])))

    def grams(self, of: str) -> Tensor:
        """Return X Xᵀ on the rank side ``[T, r, r]``, X the ``"gradients"`` or ``"params"``, in the compute dtype."""
        found = []
        for s in self.slabs:
            X: Tensor | list[Tensor] = s.grads if of == "gradients" else s.params
            X = X if isinstance(X, Tensor) else torch.stack(X).to(self._dtype)
            found.append(rank_gram(X, s.rank_dim))
        return torch.cat(found)

    def outer_products(self) -> Tensor:
        """Return [∇∇ᵀ | ∇Vᵀ] on the rank side ``[T, r, r + k]``, V the basis of the outer factors."""
        found = []
        for s in self.slabs:
            V = s.basis.to(self._dtype)
            P = s.grads @ V.mT if s.rank_dim == 1 else s.grads.mT @ V
            found.append(torch.cat((rank_gram(s.grads, s.rank_dim), P), 2))
        return torch.cat(found)

    def take_outer(self, M: Tensor) -> None:
        """Take M ``[T, r + k, r + k]`` of `functional.outer` in this step."""
        for s, own in zip(self.slabs, M.split([len(s.params) for s in self.slabs]), strict=True):
            s.outer = own

    def transform_(self, of: str, M: Tensor | None, k: Tensor | None, found_inf: Tensor) -> None:
        """Map all matrices on the rank side, then set directions ``i ≥ k`` to exactly zero; nothing if ``found_inf``.

        Args:
            of: ``"params"``: X ← M X; ``"moments"``: m ← M m, v ← (M ∘ M) v.
            M: ``[T, r, r]``, or None for the identity: masked rank truncation alone.
            k: ``[T]`` int64 live ranks, or None for all.
            found_inf: 0-d float.
        """
        if M is not None:
            M = torch.where(found_inf == 0, M, torch.eye(M.shape[-1], dtype=M.dtype, device=M.device))
        at = 0
        for s in self.slabs:
            rows = slice(at, at + len(s.params))
            at += len(s.params)
            own, live = (None if X is None else X[rows] for X in (M, k))
            if of == "params":
                X = mapped(own, torch.stack(s.params), live, s.rank_dim)
                torch._foreach_copy_(s.params, X.unbind())
                continue
            s.exp_avg.copy_(mapped(own, s.exp_avg, live, s.rank_dim))
            s.exp_avg_sq.copy_(mapped(None if own is None else own.square(), s.exp_avg_sq, live, s.rank_dim))

    def step(self, found_inf: Tensor) -> None:
        """Run the update."""
        if isinstance(self.slabs[0], Slab):
            self._workspaces()
        self._update(self.slabs, found_inf)

    def release(self) -> None:
        """Let go of the gradients."""
        for s in self.slabs:
            s.grads = []


def _mapped(s: Slab) -> bool:
    """Whether an update changes gradients before it reads them."""
    return s.matrix is not None or s.basis is not None


def mapped(M: Tensor | None, X: Tensor, k: Tensor | None, rank_dim: int) -> Tensor:
    """Return M X in the dtype of X, computed in the wider of both, with directions ≥ k at zero."""
    if M is not None:
        wide = torch.promote_types(M.dtype, compute_dtype(X.dtype))
        X = left(M.to(wide), X.to(wide), rank_dim).to(X.dtype)
    return X if k is None else truncate_(X.clone() if M is None else X, k, rank_dim)
