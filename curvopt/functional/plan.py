"""The reference of a bucket's plan: what a step does with all sides of one rank, in plain torch.

A plan is made once for a bucket's slabs; ``curvopt.kernels.UpdatePlan`` is its twin, with the same methods.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.functional import any_nonfinite, compute_dtype, left, rank_gram
from curvopt.functional.outer import outer_map
from curvopt.functional.truncate import truncate_
from curvopt.functional.update import Slab


class ReferencePlan:
    """A bucket's step in plain torch, on any device and dtype.

    Args:
        update: changes slabs in place, ``update(slabs, found_inf)``.
        slabs: `functional.update.Slab` or `functional.nested.RowSlab`, T matrices in all, of one rank and dtype.

    Attributes:
        outer_map: the op `functional.outer.outer_map`, as the backend has it.
    """

    def __init__(self, update: Callable[[Sequence[Any], Tensor], None], slabs: Sequence[Any]) -> None:
        self._update = update
        self.slabs = list(slabs)
        self.outer_map: Callable[..., Any] = outer_map
        self._dtype, self._given = compute_dtype(slabs[0].exp_avg.dtype), slabs[0].grads[0].dtype
        # by slab: whether the update changes gradients before it reads them, and a workspace as large as they are
        self._stacked = [_stacked(s, self._dtype) for s in self.slabs]
        self._workspaces: list[Tensor | None] = [None] * len(self.slabs)
        if slabs[0].exp_avg.is_cpu and isinstance(slabs[0], Slab):
            self._reserve()

    def _reserve(self) -> None:
        """Give the slabs what they work in, in place of pages that would be faulted in at every step.

        Off the CPU there is no need, since torch's allocator keeps memory itself.
        """
        spare = torch.empty(max(s.exp_avg.numel() for s in self.slabs), dtype=self._dtype)
        bases = [s.basis.numel() for s in self.slabs if s.basis is not None]
        spare_basis = torch.empty(max(bases, default=0), dtype=self._dtype)
        for i, s in enumerate(self.slabs):
            own = self._workspaces[i] = torch.empty_like(s.exp_avg, dtype=self._dtype)
            s.spare = spare[: s.exp_avg.numel()].view(s.exp_avg.shape)
            s.delta = None if self._stacked[i] else own
            if s.basis is not None:
                s.spare_basis = spare_basis[: s.basis.numel()].view(s.basis.shape)

    def load(self, grads: Sequence[Tensor]) -> bool:
        """Take the T gradients of this step in the order of the slabs; False if they do not fit the plan.

        They must be contiguous, of the dtype of those that it was made with.
        """
        if grads[0].dtype != self._given or not all(map(Tensor.is_contiguous, grads)):
            return False
        at = 0
        for s, stacked, out in zip(self.slabs, self._stacked, self._workspaces, strict=True):
            own = list(grads[at : at + len(s.params)])
            at += len(own)
            s.grads = own
            if stacked:  # in the compute dtype
                s.grads = torch.stack(own).to(self._dtype) if out is None else torch.stack(own, out=out)
        return True

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
        r = self.slabs[0].exp_avg.shape[self.slabs[0].rank_dim]
        if M is not None:
            M = torch.where(found_inf == 0, M, torch.eye(r, dtype=M.dtype, device=M.device))
        if k is not None:
            k = torch.where(found_inf == 0, k, r)
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
        """Run the update, and let go of the gradients."""
        self._update(self.slabs, found_inf)
        for s in self.slabs:
            s.grads = []


def _stacked(s: Any, dtype: torch.dtype) -> bool:
    """Whether an update changes gradients before it reads them."""
    return isinstance(s, Slab) and (s.matrix is not None or s.basis is not None or s.grads[0].dtype != dtype)


def mapped(M: Tensor | None, X: Tensor, k: Tensor | None, rank_dim: int) -> Tensor:
    """Return M X in the dtype of X, computed in the wider of both, with directions ≥ k at zero."""
    if M is not None:
        wide = torch.promote_types(M.dtype, compute_dtype(X.dtype))
        X = left(M.to(wide), X.to(wide), rank_dim).to(X.dtype)
    return X if k is None else truncate_(X.clone() if M is None else X, k, rank_dim)
