"""The update rules. Each takes slabs of matrices of equal shape and changes parameters and moments in place.

All are Adam with decoupled decay (AdamW), with an r×r matrix on the rank side of the gradient, of the step, or both:

========  ==========================================  =====================================================
rule      matrix, of the side's factor S              update, with Adam(·) = −lr · m̂ / (√v̂ + ε) of its argument
========  ==========================================  =====================================================
polar     none                                        (Ĝ + λI)^(-1/2) δ, of the length of δ = Adam(∇)
adam      P = (Ŝ + λI)⁻¹                              Adam(P ∇)                 GRIT: precondition, then AdamW
eigen     Q, eigenvectors of S                        Q Adam(Qᵀ ∇)              SOAP (2409.11321) on the rank side
whiten    R = (Ŝ + λI)^(-1/2)                         R Adam(R ∇)               Adam in whitened coordinates
momentum  P = (Ŝ + λI)⁻¹                              −P m̂ · ‖Adam(∇)‖_F / ‖P m̂‖_F     grafted, per matrix
========  ==========================================  =====================================================

then ``p ← p (1 − lr · weight_decay) + update``. Adam itself is torch's fused kernel, run against a zero parameter, so
with the matrix equal to I (or None) adam, eigen and whiten are ``AdamW(fused=True)`` to the bit. With an outer factor,
∇ is what `functional.outer` makes of the gradient.

In "polar", our derivation, G = δδᵀ on the rank side, Ĝ has a mean eigenvalue of one, and lengths are Frobenius norms.
λ → ∞ gives AdamW. λ → 0 gives the polar factor of δ: of all steps with the same spectral norm, the one with the largest
inner product with Adam's, since it moves all r directions equally. It does to Adam's step what Muon does to the
momentum, at r×r cost.

In "eigen" a direction of the rank side that no row of the statistics reaches has a coordinate of its own, whose
gradient is rounding, of which Adam makes a step of full length. With fewer rows than r in a step, or a layer that uses
fewer than r directions, take another rule: in the others such a direction shares its coordinates with what is alive.

``found_inf`` is torch's convention: a 0-d float tensor, non-zero when this step must change nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvopt.functional import compute_dtype, left, rank_gram, trace
from curvopt.functional.inverse import damped_inverse_root
from curvopt.functional.outer import through


@dataclass
class Hyper:
    """What AdamW takes from a param group; ``lr`` may be a 0-d tensor."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False


class Undecayed(Hyper):
    """Another's settings, as they are at any time, but without weight decay."""

    def __init__(self, other: Hyper) -> None:
        self.other = other

    def __getattribute__(self, name: str) -> Any:
        if name == "weight_decay":
            return 0.0
        return object.__getattribute__(self, name) if name == "other" else getattr(self.other, name)


@dataclass
class Slab:
    """L matrices of equal shape and dtype, and their state.

    Attributes:
        params: L matrices ``(m, n)``, views of the parameters.
        grads: ``[L, m, n]`` in the compute dtype, overwritten; or a list of L matrices ``(m, n)``, only read.
        exp_avg: ``[L, m, n]`` first moment, in the coordinates of the rule.
        exp_avg_sq: ``[L, m, n]`` second moment, likewise.
        step: 0-d float32, updates applied so far; slabs that share it are steps of one bucket.
        rank_dim: 1 if the stack is ``[L, r, d]``, 2 if it is ``[L, d, r]``.
        matrix: ``[L, r, r]`` the rule's matrix, or None for the identity.
        hyper: learning rate, betas, eps, decay.
        spare: a workspace like ``grads``, which slabs may share, or None to allocate one.
        spare_basis: a workspace like ``basis`` in the compute dtype, which slabs may share, or None to allocate one.
        delta: a workspace of the slab's own for a step made of listed ``grads``, or None to allocate one.
        reduce: sums a tensor in place over the processes that hold other pieces of the matrices; None: there are none.
        damping: λ > 0 of "polar", a number or a 0-d tensor.
        k: ``[L]`` int64 live ranks, or None for all; only "polar" has to know.
        basis: V of the outer factors, ``[L, k, d]`` or ``[L, d, k]`` as the matrices are; None: there are none.
        outer: ``[L, r + k, r + k]`` M of `functional.outer` in this step; with ``basis`` alone.
    """

    params: list[Tensor]
    grads: Tensor | list[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    rank_dim: int
    matrix: Tensor | None
    hyper: Hyper
    spare: Tensor | None = None
    delta: Tensor | None = None
    reduce: Callable[[Tensor], None] | None = None
    damping: float | Tensor = 0.1
    k: Tensor | None = None
    basis: Tensor | None = None
    outer: Tensor | None = None
    spare_basis: Tensor | None = None


# elements that a pass may write and the next still finds in a CPU's cache
CHUNK = 2**19


def adam_update(slabs: Sequence[Slab], found_inf: Tensor) -> None:
    """Adam on the preconditioned gradient."""
    for s in _pieces(slabs):
        delta, _, _ = _adam(s, s.matrix, found_inf)
        apply_delta(s.params, s.hyper, delta, found_inf)


def polar_update(slabs: Sequence[Slab], found_inf: Tensor) -> None:
    """Adam, then its step with equalised singular values, matrix by matrix."""
    batches: dict[Any, list[Slab]] = {}
    for s in slabs:
        damping = id(s.damping) if isinstance(s.damping, Tensor) else s.damping
        like = (s.exp_avg.shape[s.rank_dim], compute_dtype(s.exp_avg.dtype), s.exp_avg.device)
        batches.setdefault((like, damping, s.k is None), []).append(s)
    for batch in batches.values():
        _polar(batch, found_inf)


def _polar(slabs: Sequence[Slab], found_inf: Tensor) -> None:
    """Update slabs of one rank and damping: the r×r work, many short calls, is done once for all of them."""
    steps, grams = [], []
    for s in slabs:
        own = []
        for p in _pieces([s]):
            delta, _, _ = _adam(p, None, found_inf)
            steps.append((p, delta))
            own.append(rank_gram(delta, s.rank_dim))
        grams.append(torch.cat(own))
        if s.reduce is not None:
            s.reduce(grams[-1])
    ranks = [s.k for s in slabs if s.k is not None]
    M = equalising(torch.cat(grams), slabs[0].damping, torch.cat(ranks) if ranks else None)
    for (p, delta), own in zip(steps, M.split([len(p.params) for p, _ in steps]), strict=True):
        apply_delta(p.params, p.hyper, left(own, delta, p.rank_dim, out=p.spare), found_inf)


def equalising(G: Tensor, damping: float | Tensor, k: Tensor | None = None) -> Tensor:
    """Return c (Ĝ + λI)^(-1/2) ``[L, r, r]`` for the Gram matrices G of δ, c so that the product has the norm of δ.

    With δ = U Σ Vᵀ the product is ∝ U Σ (Σ² + λ mean σ²)^(-1/2) Vᵀ: directions far above √λ of the root mean square
    become equally long.
    """
    R = damped_inverse_root(G, damping, k)
    lengths = ((R @ G) * R).sum((-2, -1))  # tr R G R, R being symmetric
    c = torch.where(lengths > 0, trace(G) / lengths, 1.0).sqrt()
    return R * c[:, None, None]


def eigen_update(slabs: Sequence[Slab], found_inf: Tensor) -> None:
    """Adam in the eigenbasis of the factor; both moments live in that basis."""
    for s in _pieces(slabs):
        _through_and_back(s, None if s.matrix is None else s.matrix.mT, s.matrix, found_inf)


def whiten_update(slabs: Sequence[Slab], found_inf: Tensor) -> None:
    """Adam in whitened coordinates; both moments live there."""
    for s in _pieces(slabs):
        _through_and_back(s, s.matrix, s.matrix, found_inf)


def momentum_update(slabs: Sequence[Slab], found_inf: Tensor) -> None:
    """Preconditioned momentum with the Frobenius norm of the AdamW update, matrix by matrix.

    With the identity it is AdamW's step length along the first moment, not AdamW.
    """
    for s in _pieces(slabs):
        delta, exp_avg, _ = _adam(s, None, found_inf)
        direction = -exp_avg
        if s.matrix is not None:
            direction = left(s.matrix.to(delta.dtype), direction, s.rank_dim)
        length = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
        graft = torch.linalg.vector_norm(delta, dim=(1, 2), keepdim=True)
        if s.reduce is not None:
            squares = torch.stack([length, graft]).square_()
            s.reduce(squares)
            length, graft = squares.sqrt_()
        apply_delta(s.params, s.hyper, direction.mul_(torch.where(length > 0, graft / length, 0.0)), found_inf)


def _pieces(slabs: Sequence[Slab]) -> Iterator[Slab]:
    """Cut slabs on the CPU into pieces that stay in its cache from the first product to the last sum."""
    for s in slabs:
        L, n = len(s.params), max(1, CHUNK // max(1, s.exp_avg[0].numel()))
        if n >= L or not s.exp_avg.is_cpu or s.reduce is not None:  # every process reduces as often
            yield s
            continue
        for i in range(0, L, n):
            cut = slice(i, min(i + n, L))
            yield replace(
                s,
                params=s.params[cut],
                grads=s.grads[cut],
                exp_avg=s.exp_avg[cut],
                exp_avg_sq=s.exp_avg_sq[cut],
                matrix=None if s.matrix is None else s.matrix[cut],
                basis=None if s.basis is None else s.basis[cut],
                outer=None if s.outer is None else s.outer[cut],
                spare=None if s.spare is None else s.spare[: cut.stop - i],
                spare_basis=None if s.spare_basis is None else s.spare_basis[: cut.stop - i],
                delta=None if s.delta is None else s.delta[cut],
            )


def _through_and_back(s: Slab, forward: Tensor | None, back: Tensor | None, found_inf: Tensor) -> None:
    """Run Adam on ``forward ∇`` and apply ``back`` of its update."""
    delta, _, spare = _adam(s, forward, found_inf)
    if back is not None:
        delta = left(back.to(delta.dtype), delta, s.rank_dim, out=spare)
    apply_delta(s.params, s.hyper, delta, found_inf)


def _adam(s: Slab, M: Tensor | None, found_inf: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Advance the moments with M ∇; return −lr · m̂ / (√v̂ + ε), zero if ``found_inf``, m unrounded, and a buffer.

    Stacks are as large as the adapter, so the two that a step needs are used twice: the update takes the place of the
    gradients, and the buffer, which slabs share, is free again. Without a map the gradients are read where they are.
    """
    wide = compute_dtype(s.exp_avg.dtype)
    exp_avg, exp_avg_sq = s.exp_avg.to(wide), s.exp_avg_sq.to(wide)
    given: Any = s.grads
    listed = isinstance(given, list)
    grads: Any  # a stack, or the matrices where they are
    if M is None and s.outer is None and listed and given[0].dtype == wide:
        # torch's kernel walks through memory: all of it must be in one order
        grads, spare = [g.contiguous() for g in given], s.spare
        delta = torch.zeros_like(exp_avg) if s.delta is None else s.delta.zero_()
    else:
        own = torch.stack(given).to(wide) if listed else given
        spare = torch.empty_like(own) if s.spare is None else s.spare
        if s.outer is not None:
            precondition_(s, own, spare, found_inf)
            grads = spare if M is None else spare.copy_(left(M.to(own.dtype), spare, s.rank_dim))
        else:
            grads = spare.copy_(own) if M is None else left(M.to(own.dtype), own, s.rank_dim, out=spare)
        delta = own.zero_()
    # torch's CPU kernel rounds what is left over after its vectors otherwise: to the bit AdamW's only matrix by matrix
    whole = not isinstance(grads, list) and (delta[0].numel() % 64 == 0 or not delta.is_cpu)
    stacks = (delta, grads, exp_avg, exp_avg_sq)
    p, g, m, v = ([X] if whole else X if isinstance(X, list) else X.unbind() for X in stacks)
    fused_adamw(p, g, m, v, s.step, s.hyper, found_inf, weight_decay=0.0)
    if exp_avg is not s.exp_avg:
        s.exp_avg.copy_(exp_avg)
        s.exp_avg_sq.copy_(exp_avg_sq)
    return delta, exp_avg, spare


def precondition_(s: Slab, G: Tensor, out: Tensor, found_inf: Tensor) -> None:
    """Write ∇ S̃^(-1/2) into ``out`` and the next V into the basis, as `functional.outer`; V stays if ``found_inf``."""
    assert s.outer is not None and s.basis is not None
    V = s.basis.to(G.dtype)
    _, new = through(s.outer.to(G.dtype), G, V, s.rank_dim, out=out, out_V=s.spare_basis)
    # torch.where by a 0-d condition is several times slower on the CPU
    s.basis.copy_(V.lerp_(new.nan_to_num_(0.0, 0.0, 0.0), (found_inf == 0).to(V.dtype)))


def fused_adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    step: Tensor, hyper: Hyper, found_inf: Tensor, weight_decay: float, rate: float = 1.0,
) -> None:  # fmt: skip
    """Run torch's fused AdamW on lists that share ``step``, which `count_update` has counted up.

    The op, not torch.optim's wrapper of it: sorting lists by dtype and device takes longer than small arithmetic.

    Args:
        params: changed in place, as are the moments.
        grads: only read.
        exp_avg: first moments.
        exp_avg_sq: second moments.
        step: 0-d float32, with this update counted.
        hyper: learning rate, betas, eps; its own weight decay is not read.
        found_inf: 0-d float; non-zero: nothing changes.
        weight_decay: decoupled.
        rate: q: learning rate q lr, ε / q and decay wd / q, so that the decay per step stays lr wd.
    """
    torch._fused_adamw_(
        list(params), list(grads), list(exp_avg), list(exp_avg_sq), [], [step] * len(params),
        lr=hyper.lr * rate, beta1=float(hyper.beta1), beta2=float(hyper.beta2), weight_decay=float(weight_decay) / rate,
        eps=float(hyper.eps) / rate, amsgrad=False, maximize=hyper.maximize, found_inf=found_inf,
    )  # fmt: skip


def count_update(slabs: Sequence[Any], found_inf: Tensor) -> None:
    """Count one update for every distinct ``step`` of the slabs; none if ``found_inf`` is set."""
    for step in {id(s.step): s.step for s in slabs}.values():
        step.add_(found_inf == 0)


def apply_delta(params: list[Tensor], hyper: Hyper, delta: Tensor, found_inf: Tensor) -> None:
    """Take p ← p (1 − lr · weight_decay) + delta ``[L, m, n]``, rounding 16-bit parameters once."""
    lr = hyper.lr.double().reshape(()) if isinstance(hyper.lr, Tensor) else hyper.lr
    decay = lr * hyper.weight_decay
    keep = 1 - decay * (found_inf == 0).double() if hyper.weight_decay != 0 else None
    if params[0].dtype == delta.dtype:
        if keep is not None:
            torch._foreach_mul_(params, keep)
        torch._foreach_add_(params, delta.unbind())
        return
    p = torch.stack(params).to(delta.dtype)
    if keep is not None:
        p.mul_(keep)
    torch._foreach_copy_(params, p.add_(delta).unbind())


@dataclass(frozen=True)
class Rule:
    """One update rule: all that the rest of the package asks of it. Calling it is its reference.

    Attributes:
        name: value of the argument ``update``, and of its kernel's mode.
        reference: updates slabs in place, ``reference(slabs, found_inf)``.
        matrix: the op that makes its matrix from a factor; None: it has none.
        key: what the matrix is called in the state.
        coordinates: from the matrix to the map C that takes a gradient to where the moments live; None: they live in
            plain coordinates.
        turns: whether the moments are transformed when the matrix is recomputed.
        acting: what acts on a gradient along eigenvectors of Ŝ, from the eigenvalues and those of Ŝ + λI; the former
            where it is a basis that acts, or nothing.
        shared: how many numbers a matrix of rank r sums over the processes that hold its pieces.
    """

    name: str
    reference: Callable[[Sequence[Slab], Tensor], None]
    matrix: str | None
    key: str | None
    coordinates: Callable[[Tensor], Tensor] | None
    turns: bool
    acting: Callable[[Tensor, Tensor], Tensor]
    shared: Callable[[int], int] = lambda r: 0

    def __call__(self, slabs: Sequence[Slab], found_inf: Tensor) -> None:
        """Update slabs in place, and count their step; nothing changes where ``found_inf`` is set."""
        count_update(slabs, found_inf)
        self.reference(slabs, found_inf)

    def carried(self, new: Tensor | None, old: Tensor | None, M: Tensor) -> Tensor:
        """Return the map of the moments ``[L, r, r]`` when gradients map by M and the matrix ``old`` becomes ``new``.

        R C(old) = C(new) M. First moments map by R and second ones by its squared entries, see `functional.basis`.
        """
        if self.coordinates is None or new is None or old is None:
            return M
        # solve_ex: nothing raises, and nothing waits for the device
        return torch.linalg.solve_ex(self.coordinates(old), self.coordinates(new) @ M, left=False).result


def _transposed(Q: Tensor) -> Tensor:
    return Q.mT


def _itself(P: Tensor) -> Tensor:
    return P


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            "polar", polar_update, None, None, None, False, lambda values, damped: values,
            shared=lambda r: r * r,
        ),
        Rule("eigen", eigen_update, "eigenbasis", "basis", _transposed, True, lambda values, damped: values),
        Rule("adam", adam_update, "damped_inverse", "inverse", _itself, False, lambda values, damped: 1 / damped),
        Rule("whiten", whiten_update, "damped_inverse_root", "root", _itself, False, lambda v, damped: damped.rsqrt()),
        Rule(
            "momentum", momentum_update, "damped_inverse", "inverse", None, False, lambda values, damped: 1 / damped,
            shared=lambda r: 2,
        ),
    )
}  # fmt: skip
