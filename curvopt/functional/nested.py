"""Nested ranks: Matryoshka's diagonal P between B and A, and the step of (B, P A) that equals AdamW's step of (A, B).

ΔW = B P A with P_i = Σ_{ρ ∈ ranks, ρ > i} s(ρ), i from 0 (MatryoshkaLoRA, arXiv 2605.07850); at rank ρ the adapter is
s(ρ) B[:, :ρ] A[:ρ]. LoRA is ranks = {r}; DyLoRA (arXiv 2210.07558) draws one ρ a step: P_i = s(ρ) [i < ρ].

A plain module with scaling s computes s B Ã, so it is given Ã = Q A with Q = P / s. Then ∂L/∂Ã = Q⁻¹ ∂L/∂A while
∂L/∂B is unchanged, and of Adam's m and v only the scale changes:

    Ã_i ← Ã_i (1 − lr·wd) − (Q_i lr) m̂_i / (√v̂_i + ε / Q_i)     is     A_i ← A_i (1 − lr·wd) − lr m̂_i / (√v̂_i + ε)

row by row, ε included. Rows of equal Q are neighbours (`bands`), so the step is torch's fused AdamW once per band.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from curvopt.functional.update import Hyper, count_update, fused_adamw

Scale = Literal["none", "rank", "sqrt"]
SCALES = get_args(Scale)


def rank_scale(rank: int, scale: str) -> float:
    """Return s(ρ): 1 for "none", 1/ρ for "rank", 1/√ρ for "sqrt"; ValueError for anything else."""
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))}, got {scale!r}")
    return {"none": 1.0, "rank": 1.0 / rank, "sqrt": rank**-0.5}[scale]


def powers_of_two(r: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... below r, and r itself."""
    return (*(2**j for j in range((r - 1).bit_length())), r)


def diagonal(ranks: Sequence[int], r: int, scale: str = "none") -> tuple[float, ...]:
    """Return P_0 … P_{r−1}, P_i = Σ s(ρ) over the ranks ρ > i; ranks above r are dropped.

    The sum runs from the largest rank down, so that neighbours in one band are equal to the bit.
    """
    kept = sorted((k for k in set(ranks) if k <= r), reverse=True)
    return tuple(sum(rank_scale(k, scale) for k in kept if k > i) for i in range(r))


def sampled_diagonal(rank: int, r: int, scale: str = "none") -> tuple[float, ...]:
    """Return DyLoRA's P for the drawn rank: s(ρ) for i < ρ, else 0."""
    return diagonal((rank,), r, scale)


def sampled_rank(ranks: Sequence[int], draw: float) -> int:
    """Return the rank that a uniform ``draw`` in [0, 1) picks; every rank is as likely as the others."""
    return ranks[min(int(draw * len(ranks)), len(ranks) - 1)]


def rank_shares(ranks: Sequence[int], full_share: float) -> tuple[float, ...]:
    """Return the share of the samples at each rank: ``full_share`` at the largest, the rest over the others as 1/ρ.

    By 1/ρ as many directions are trained at each of the smaller ranks, and the first directions, which a small adapter
    has nothing but, are trained most often on their own.
    """
    if len(ranks) == 1:
        return (1.0,)
    total = sum(1 / k for k in ranks[:-1])
    return (*((1 - full_share) / k / total for k in ranks[:-1]), full_share)


def stratified_ranks(
    ranks: Sequence[int], full_share: float, n: int, offset: float, generator: torch.Generator
) -> Tensor:
    """Return a rank for each of n samples: the share ``full_share`` at the largest, the rest over the others as 1/ρ.

    The samples stand at (π(i) + offset) / n with a random permutation π, one in each n-th of [0, 1), so no batch
    strays by more than one sample from the shares of each rank, which stratified sampling has a smaller variance for
    than n draws. With ``offset`` uniform on [0, 1) each sample is at each rank with the right probability.

    Args:
        ranks: ascending.
        full_share: in (0, 1].
        n: samples.
        offset: in [0, 1).
        generator: on the CPU; draws π.

    Returns:
        ``[n]`` int64 on the CPU.
    """
    u = (torch.randperm(n, generator=generator).double() + offset) / n
    ends = torch.tensor(rank_shares(ranks, full_share), dtype=torch.float64).cumsum(0)[:-1]  # the last ends at 1
    return torch.tensor(ranks)[torch.searchsorted(ends, u, right=True)]


def prefix(P: Sequence[float], rank: int, scale: str = "none") -> tuple[float, ...]:
    """Return the diagonal that takes Q A to the adapter of one rank, s(ρ) / P_i for i < ρ, else 0 (0 where P_i is)."""
    top = rank_scale(rank, scale)
    return tuple(top / p if i < rank and p > 0 else 0.0 for i, p in enumerate(P))


def bands(P: Sequence[float]) -> list[tuple[int, int, float]]:
    """Return the runs of equal, non-zero entries as (start, stop, value)."""
    found: list[tuple[int, int, float]] = []
    for i, p in enumerate(P):
        if found and found[-1][1] == i and found[-1][2] == p:
            found[-1] = (found[-1][0], i + 1, p)
        elif p > 0:
            found.append((i, i + 1, p))
    return found


def product_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same product with its directions in order: (A', B', σ) with B' A' = B A = Σ σ_i u_i v_iᵀ.

    A' = Σ^½ Vᵀ and B' = U Σ^½, so the first ρ directions are the best matrix of that rank in the Frobenius norm, and
    what they leave out is (Σ_{i ≥ ρ} σ_i²)^½ (Eckart and Young, 1936). Two thin QRs and one SVD of the rank's size;
    the product itself is never formed.

    Args:
        A: ``(r, d_in)``.
        B: ``(d_out, r)``.

    Returns:
        A' ``(r, d_in)``, B' ``(d_out, r)``, σ ``(r,)`` in descending order, all float64; zero where r exceeds a width.
    """
    r, wide = A.shape[0], torch.float64
    Q_a, R_a = torch.linalg.qr(A.to(wide).mT)
    Q_b, R_b = torch.linalg.qr(B.to(wide))
    U, sigma, Vh = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
    root = sigma.sqrt()
    A_new, B_new = A.new_zeros(A.shape, dtype=wide), B.new_zeros(B.shape, dtype=wide)
    A_new[: len(sigma)] = root[:, None] * (Vh @ Q_a.mT)
    B_new[:, : len(sigma)] = (Q_b @ U) * root
    return A_new, B_new, torch.cat([sigma, sigma.new_zeros(r - len(sigma))])


Blocks = list[list[Tensor]]


@dataclass
class RowSlab:
    """L matrices of equal shape and dtype with one learning rate per direction, and their state.

    Attributes:
        params: L matrices ``(m, n)``, views of the parameters.
        grads: L gradients ``(m, n)``; only read.
        exp_avg: ``[L, m, n]`` first moment.
        exp_avg_sq: ``[L, m, n]`` second moment.
        step: 0-d float32, updates applied so far.
        rank_dim: 1 if the matrices are ``(r, d)``, 2 if they are ``(d, r)``.
        rates: Q, r numbers; 0 leaves a direction as it is. None: all one.
        hyper: learning rate, betas, eps, decay.
        views: blocks of params and moments by band, kept from call to call by whoever keeps the slab.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    rank_dim: int
    rates: tuple[float, ...] | None
    hyper: Hyper
    views: list[tuple[Blocks, float]] = field(default_factory=list, repr=False)


def row_update(slabs: Sequence[RowSlab], found_inf: Tensor) -> None:
    """AdamW with learning rate Q_i·lr, ε/Q_i and decay lr·wd in direction i; changes params, moments and step.

    A step with ``found_inf`` (0-d float) non-zero changes nothing. All matrices are held to one shape; what is not
    contiguous with the rank first is copied there and back.
    """
    count_update(slabs, found_inf)
    for s in slabs:
        straight = s.params[0].is_contiguous() and s.exp_avg.is_contiguous() and s.exp_avg_sq.is_contiguous()
        if straight and (s.rank_dim == 1 or s.rates is None):
            _advance(s, found_inf)
        else:
            _advance_copies(s, found_inf)


def _advance(s: RowSlab, found_inf: Tensor) -> None:
    """The step of a slab whose bands are contiguous blocks."""
    sizes, keep = _sizes(s)
    if not s.views:
        s.views = _views(s, sizes, keep)
    grads = [g if g.is_contiguous() else g.contiguous() for g in s.grads]
    cut = [grads] if len(sizes) == 1 else list(zip(*(torch.split_with_sizes(g, sizes) for g in grads), strict=True))
    for ((params, exp_avg, exp_avg_sq), q), i in zip(s.views, keep, strict=True):
        decay = s.hyper.weight_decay
        fused_adamw(params, cut[i], exp_avg, exp_avg_sq, s.step, s.hyper, found_inf, weight_decay=decay, rate=q)


def _sizes(s: RowSlab) -> tuple[list[int], list[int]]:
    """Return the sizes of all blocks along the first dimension, and which of them move."""
    m = s.exp_avg.shape[1]
    if s.rates is None:
        return [m], [0]
    sizes, keep, at = [], [], 0
    for start, stop, _ in bands(s.rates):
        if start > at:
            sizes.append(start - at)
        keep.append(len(sizes))
        sizes.append(stop - start)
        at = stop
    return (sizes if at == m else [*sizes, m - at]), keep


def _views(s: RowSlab, sizes: list[int], keep: list[int]) -> list[tuple[Blocks, float]]:
    rates = [1.0] if s.rates is None else [q for _, _, q in bands(s.rates)]
    shape = s.exp_avg.shape[1:]
    for p in s.params:
        if p.shape != shape:
            raise ValueError(f"params must have the shape of their state, {tuple(shape)}, got {tuple(p.shape)}")
    stacks = ([p.detach() for p in s.params], s.exp_avg.unbind(), s.exp_avg_sq.unbind())
    cut = [[X.split(sizes) for X in stack] for stack in stacks]
    return [([[X[i] for X in stack] for stack in cut], q) for i, q in zip(keep, rates, strict=True)]


def _advance_copies(s: RowSlab, found_inf: Tensor) -> None:
    turn = s.rank_dim == 2 and s.rates is not None

    def straightened(X: Tensor) -> Tensor:
        return (X.mT if turn else X).clone(memory_format=torch.contiguous_format)

    copy = replace(
        s,
        params=[straightened(p.detach()) for p in s.params],
        grads=[straightened(g) for g in s.grads],
        exp_avg=straightened(s.exp_avg),
        exp_avg_sq=straightened(s.exp_avg_sq),
        rank_dim=1 if turn else s.rank_dim,
        views=[],
    )
    _advance(copy, found_inf)
    pairs = [*zip(s.params, copy.params, strict=True), (s.exp_avg, copy.exp_avg), (s.exp_avg_sq, copy.exp_avg_sq)]
    for X, Y in pairs:
        X.detach().copy_(Y.mT if turn else Y)
