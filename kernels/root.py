"""Inverse square roots of damped factors by products alone, and the matrices of "polar" made of them.

    M = (Ŝ + λI)/F, F its Frobenius norm;   R ← M, Q ← I;   Z = aI + bR + cR²:  Q ← QZ, R ← ZRZ;   M^(-1/2) ≈ Q

s(a + bs² + cs⁴) is the odd quintic that brings the singular values s of what R is the square of closest to one, stage
by stage the best for the interval that the stage before left (Chebyshev's alternation; the composition is optimal too,
arXiv 2505.16932). tr(Ŝ) = k ≤ r bounds the spectrum of M by [λ/(r + λ√r), 1] beforehand, so the coefficients are
constants that the host computes from r and λ (`coefficients.stages`), and nothing is read back. Products are written
with W = bR + cR²: QZ = aQ + QW.

With X = Q/√F, tr(X(Ŝ + λI)X) = r if every eigenvalue was in the interval, and an eigenvalue that was not positive
takes one or more off: that is how "not positive definite" is seen, to about λ/100. c of "polar" needs tr(XĜX), which
is a part of that trace.

Hazards. Only float32: float64 factors fall back. Ranks above `REGISTER_RANK` keep their matrices in ``work``, one
program a matrix, with a barrier after every product. Failures as the reference decides them: empty →
identity, broken → previous or identity. The relative error is 5e-7 (r = 16, λ = 0.1) to some 5e-5 (r = 128, λ = 1e-3);
it is that of the rounding of M, amplified by r/λ, the condition that the coefficients are made for.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .coefficients import Coefficients
from .inverse import _normalise, _offsets, _rank, supports
from .update_tiles import FIXED, RANK

__all__ = ["Coefficients", "damped_inverse_root", "supports"]

REGISTER_RANK = 32


@triton.jit
def _stages(M, coefficients, STAGES: tl.constexpr, RP: tl.constexpr, PREC: tl.constexpr):
    """Return Q ≈ M^(-1/2)."""
    i = tl.arange(0, RP)
    R, Q = M, tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for n in range(STAGES - 1):
        a, b, c = tl.load(coefficients + 3 * n), tl.load(coefficients + 3 * n + 1), tl.load(coefficients + 3 * n + 2)
        W = b * R + c * tl.dot(R, R, input_precision=PREC)
        Q = a * Q + tl.dot(Q, W, input_precision=PREC)
        R = a * R + tl.dot(R, W, input_precision=PREC)
        R = a * R + tl.dot(R, W, input_precision=PREC)
    at = coefficients + 3 * (STAGES - 1)
    a, b, c = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    W = b * R + c * tl.dot(R, R, input_precision=PREC)
    Q = a * Q + tl.dot(Q, W, input_precision=PREC)
    return 0.5 * (Q + tl.trans(Q))


@triton.jit
def _product(A, B, base, out, alpha, beta, RP: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
    """Out ← alpha · base + beta · A B, all [RP, RP] in memory, BD columns at a time; ``out`` is none of the others."""
    C: tl.constexpr = 32
    i, c = tl.arange(0, RP)[:, None], tl.arange(0, C)
    for q in range(RP // BD):
        j = q * BD + tl.arange(0, BD)[None, :]
        Y = tl.zeros([RP, BD], tl.float32)
        for n in range(RP // C):
            a = tl.load(A + i * RP + n * C + c[None, :])
            b = tl.load(B + (n * C + c[:, None]) * RP + j)
            Y = tl.dot(a, b, Y, input_precision=PREC)
        tl.store(out + i * RP + j, alpha * tl.load(base + i * RP + j) + beta * Y)
    tl.debug_barrier()


@triton.jit
def _in_memory(
    S_hat, M, F, rank, damping, coefficients, work,
    STAGES: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Leave X, the identity on dead directions, at the start of ``work``; return tr(XŜX) of the live ones, and of all.

    ``work`` [6, RP, RP] holds R, Q, W, Y, the other Q, Ŝ.
    """
    N: tl.constexpr = RP * RP
    i, whole = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    tl.store(work + i * RP + whole, M)
    tl.store(work + N + i * RP + whole, tl.where(i == whole, 1.0, 0.0))
    tl.store(work + 5 * N + i * RP + whole, S_hat)
    tl.debug_barrier()
    R, W, Y, Q, other = work, work + 2 * N, work + 3 * N, work + N, work + 4 * N
    for n in range(STAGES):
        a, b, c = tl.load(coefficients + 3 * n), tl.load(coefficients + 3 * n + 1), tl.load(coefficients + 3 * n + 2)
        _product(R, R, R, W, b, c, RP, BD, PREC)
        _product(Q + (n % 2) * 3 * N, W, Q + (n % 2) * 3 * N, other - (n % 2) * 3 * N, a, 1.0, RP, BD, PREC)
        if n + 1 < STAGES:
            _product(R, W, R, Y, a, 1.0, RP, BD, PREC)
            _product(Y, W, Y, R, a, 1.0, RP, BD, PREC)
    Q = Q + (STAGES % 2) * 3 * N
    for q in range(RP // BD):
        j = q * BD + tl.arange(0, BD)[None, :]
        x = (0.5 / tl.sqrt(F)) * (tl.load(Q + i * RP + j) + tl.load(Q + j * RP + i))
        tl.store(R + i * RP + j, x)
    tl.debug_barrier()
    _product(R, work + 5 * N, R, Y, 0.0, 1.0, RP, BD, PREC)
    energy, total = 0.0, 0.0
    for q in range(RP // BD):
        j = q * BD + tl.arange(0, BD)[None, :]
        x = tl.load(R + i * RP + j)
        y = tl.load(Y + i * RP + j) * x
        live = (i < rank) & (j < rank)
        energy += tl.sum(tl.sum(tl.where(live, y, 0.0), 1), 0)
        total += tl.sum(tl.sum(y + damping * x * x, 1), 0)
        tl.store(Y + i * RP + j, tl.where(live, x, tl.where(i == j, 1.0, 0.0)))
    tl.debug_barrier()
    return energy, total


@triton.jit
def _inverse_root(
    S_hat, rank, usable, damping, coefficients, work,
    STAGES: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """Return X = (Ŝ + λI)^(-1/2) with the identity on dead directions, tr(XŜX) of the live ones, and what is good.

    ``S_hat`` [RP, RP] is the identity on dead directions and where it is not usable. IN_MEMORY leaves X in ``work``.
    """
    i = tl.arange(0, RP)
    eye = i[:, None] == i[None, :]
    live = (i < rank)[:, None] & (i < rank)[None, :]
    M = tl.where(eye, S_hat + damping, S_hat)
    F = tl.sqrt(tl.sum(tl.sum(tl.where(live, M * M, 0.0), 1), 0))
    F = tl.maximum(F, 1.0 + damping)  # nothing is live
    if IN_MEMORY:
        X = S_hat
        energy, total = _in_memory(S_hat, M / F, F, rank, damping, coefficients, work, STAGES, RP, BD, PREC)
    else:
        X = _stages(M / F, coefficients, STAGES, RP, PREC) * (1.0 / tl.sqrt(F))
        Y = tl.dot(X, S_hat, input_precision=PREC) * X
        energy = tl.sum(tl.sum(tl.where(live, Y, 0.0), 1), 0)
        total = tl.sum(tl.sum(Y + damping * X * X, 1), 0)
        X = tl.where(live, X, tl.where(eye, 1.0, 0.0))
    return X, energy, usable & (tl.abs(total - RP) < 0.5)


@triton.jit
def _given(damping, ON_DEVICE: tl.constexpr):
    """Return λ, given as a number or as a pointer to one."""
    return tl.load(damping).to(tl.float32) if ON_DEVICE else damping


@triton.jit
def _root(
    S, k, previous, coefficients, damping, work, out, L,
    HAS_K: tl.constexpr, HAS_PREVIOUS: tl.constexpr, ON_DEVICE: tl.constexpr, STAGES: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """Out ← (Ŝ + λI)^(-1/2) of one matrix a program."""
    l, start, at, inside = _offsets(L, R, RP, 1)
    rank = _rank(k, l, L, HAS_K, R)
    S_hat, usable, empty = _normalise(S + start, at, inside, rank, R, RP)
    own = work + tl.program_id(0).to(tl.int64) * (6 * RP * RP)
    X, _, good = _inverse_root(
        tl.reshape(S_hat, (RP, RP)), tl.sum(rank, 0), tl.sum(usable.to(tl.int32), 0) > 0, _given(damping, ON_DEVICE),
        coefficients, own, STAGES, RP, BD, PREC, IN_MEMORY,
    )  # fmt: skip
    nothing = tl.sum(empty.to(tl.int32), 0) > 0
    i = tl.arange(0, RP)[:, None]
    for n in range(RP // BD):
        j = n * BD + tl.arange(0, BD)[None, :]
        x = tl.load(own + 3 * RP * RP + i * RP + j) if IN_MEMORY else X
        to, within = start + i * R + j, (i < R) & (j < R)
        unit = tl.where(i == j, 1.0, 0.0)
        if HAS_PREVIOUS:
            old = tl.load(previous + to, mask=within, other=0.0).to(tl.float32)
            unit = tl.where(nothing, unit, old)
        tl.store(out + to, tl.where(good & (tl.abs(x) < float("inf")), x, unit), mask=within)


@triton.jit
def _equalise(
    grams, fixed, coefficients, damping, work, out,
    HAS_K: tl.constexpr, ON_DEVICE: tl.constexpr, STAGES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BD: tl.constexpr, PREC: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """Out ← √(tr G / tr(X G X)) X with X = (Ĝ + λI)^(-1/2) for every matrix."""
    tensor = tl.program_id(0)
    row = fixed + tensor * FIXED
    l, start, at, inside = _offsets(tl.num_programs(0), R, RP, 1)
    rank = tl.where(l >= 0, R, 0)
    if HAS_K:
        k_ptr = tl.load(row + RANK).to(tl.pointer_type(tl.int64))
        if k_ptr.to(tl.int64) != 0:
            rank = tl.minimum(rank, tl.load(k_ptr).to(tl.int32))
    G_hat, usable, _ = _normalise(grams + start, at, inside, rank, R, RP)
    live = tl.sum(rank, 0)
    own = work + tensor.to(tl.int64) * (6 * RP * RP)
    X, energy, good = _inverse_root(
        tl.reshape(G_hat, (RP, RP)), live, tl.sum(usable.to(tl.int32), 0) > 0, _given(damping, ON_DEVICE),
        coefficients, own, STAGES, RP, BD, PREC, IN_MEMORY,
    )  # fmt: skip
    # tr Ĝ is the live rank
    c = tl.where(good & (energy > 0), tl.sqrt(live.to(tl.float32) / tl.where(energy > 0, energy, 1.0)), 1.0)
    i = tl.arange(0, RP)[:, None]
    for n in range(RP // BD):
        j = n * BD + tl.arange(0, BD)[None, :]
        x = tl.load(own + 3 * RP * RP + i * RP + j) if IN_MEMORY else X
        y = c * tl.where(good, x, tl.where(i == j, 1.0, 0.0))
        tl.store(out + start + i * R + j, y, mask=(i < R) & (j < R))


def damped_inverse_root(
    S: Tensor, damping: float | Tensor, k: Tensor | None = None, previous: Tensor | None = None
) -> Tensor:
    """Return (Ŝ + λI)^(-1/2) ``[L, r, r]``; arguments and failures as the reference.

    A tensor λ is not read on the host: the coefficients are then those of all λ from `coefficients.LEAST_ON_DEVICE` on.
    """
    L, r = S.shape[0], S.shape[-1]
    table = Coefficients(r, S.device)
    out = torch.empty_like(S)
    count = table.follow(damping)
    launch.run(
        _root, (L,), S, S if k is None else k, S if previous is None else previous, table.values, table.damping,
        workspace(L, r, out), out, L,
        HAS_K=k is not None, HAS_PREVIOUS=previous is not None, ON_DEVICE=table.on_device, STAGES=count,
        R=r, **constants_of(r),
    )  # fmt: skip
    return out


def constants_of(r: int) -> dict[str, Any]:
    """Return what the kernels here take of a rank and its configuration."""
    rp = launch.padded(r, 16)
    c = launch.shipped("root", rp)
    memory = rp > REGISTER_RANK
    return {
        "RP": rp, "BD": c.block if memory else rp, "IN_MEMORY": memory, "PREC": c.precision,
        "num_warps": c.warps, "num_stages": c.stages,
    }  # fmt: skip


def workspace(L: int, r: int, like: Tensor) -> Tensor:
    """Return room for the matrices of L programs, or ``like`` where they stay in registers."""
    rp = launch.padded(r, 16)
    return like.new_empty(L, 6, rp, rp, dtype=torch.float32) if rp > REGISTER_RANK else like
