"""The update rules over slabs: all matrices A and B of a rank in one launch (two for "momentum", five for "polar").

In front runs one program that advances the steps and computes learning rates and bias corrections on the device. The
formulas and hazards are in `update_tiles` and `polar`. Slabs of "polar" share launches where ``damping`` is the same
number or tensor. Beyond the reference's arguments a slab of any rule may have ``k``, ``[L]`` int64 live ranks: dead
directions of the parameter and both moments become exactly zero; ``row_update`` reads ``rates`` instead of ``matrix``.
Gradients may be a list of matrices: nothing has to be stacked. ``rounding`` is a 0-d int64 seed on the device for
stochastic rounding of bfloat16 parameters; noise differs by seed, matrix, element and step.

A learning rate that is a float is uploaded when it changes; under a CUDA graph it must be a tensor on the device. What
`supports` refuses falls back: float64, wrapper subclasses, non-contiguous views, mixed devices, rank > 128.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import inverse, launch, polar, tables
from .update_tiles import ADAM, COLUMNS, EIGEN, GRAFT, MOMENTS, POLAR, ROWS, WHITEN, _prepare, _update

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def adam_update(slabs: Sequence[Any], found_inf: Tensor, rounding: Tensor | None = None) -> None:
    """Adam on the preconditioned gradient."""
    _run(slabs, found_inf, (ADAM,), rounding)


def polar_update(slabs: Sequence[Any], found_inf: Tensor, rounding: Tensor | None = None) -> None:
    """Adam in the eigenbasis, then its step with singular values made alike, matrix by matrix."""
    _run(slabs, found_inf, (POLAR,), rounding)


def eigen_update(slabs: Sequence[Any], found_inf: Tensor, rounding: Tensor | None = None) -> None:
    """Adam in the eigenbasis of the factor; both moments live in that basis."""
    _run(slabs, found_inf, (EIGEN,), rounding)


def whiten_update(slabs: Sequence[Any], found_inf: Tensor, rounding: Tensor | None = None) -> None:
    """Adam in whitened coordinates; both moments live there."""
    _run(slabs, found_inf, (WHITEN,), rounding)


def momentum_update(slabs: Sequence[Any], found_inf: Tensor, rounding: Tensor | None = None) -> None:
    """Preconditioned momentum with the Frobenius norm of the AdamW update, matrix by matrix."""
    _run(slabs, found_inf, (MOMENTS, GRAFT), rounding)


def row_update(slabs: Sequence[Any], found_inf: Tensor, rounding: Tensor | None = None) -> None:
    """AdamW with learning rate p_i · lr and ε/p_i in direction i, p_i from ``slab.rates``; p_i = 0 is left alone."""
    _run(slabs, found_inf, (ROWS,), rounding)


def supports(slabs: Sequence[Any], found_inf: Tensor, rounding: Tensor | None = None) -> bool:
    """Return whether the kernels here take these arguments; all slabs must be on the device of ``found_inf``."""
    return bool(slabs) and found_inf.dtype.is_floating_point and all(_fits(s, found_inf.device) for s in slabs)


def supports_polar(slabs: Sequence[Any], found_inf: Tensor, rounding: Tensor | None = None) -> bool:
    """Return whether `polar_update` takes these arguments."""
    device = found_inf.device
    flags = [s.known for s in slabs if s.known is not None]
    return (
        supports(slabs, found_inf, rounding)
        and all(inverse.damps(s.damping, device) for s in slabs)
        and (not flags or (launch.plain(flags, (torch.bool,)) and flags[0].device == device))
    )


def _fits(s: Any, device: torch.device) -> bool:
    r, k = s.exp_avg.shape[s.rank_dim], _live(s)
    parts = [*s.params, *s.grads] if isinstance(s.grads, (list, tuple)) else [*s.params, s.grads]
    matrix = _matrix(s)
    small = [s.step] if matrix is None else [s.step, matrix]
    return (
        all(t.device == device for t in (s.exp_avg, *small))
        and getattr(s, "reduce", None) is None  # pieces of matrices: their norms need the other processes
        and r <= launch.MAX_RANK
        and launch.config("update", launch.padded(r, 16)) is not None
        and 0 < s.exp_avg[0].numel() < 2**31
        and s.exp_avg.dtype == s.exp_avg_sq.dtype
        and len({p.dtype for p in s.params}) == 1
        and launch.plain([s.exp_avg, s.exp_avg_sq, *parts])
        and launch.plain(small, (torch.float32,))
        and (k is None or (k.device == device and launch.plain([k], (torch.int64,))))
        and (not _on_device(s.hyper.lr) or _scalar(s.hyper.lr, device))
    )  # fmt: skip


def _scalar(lr: Any, device: torch.device) -> bool:
    return lr.device == device and launch.plain([lr], (torch.float32,))


def _live(s: Any) -> Tensor | None:
    return getattr(s, "k", None)


def _matrix(s: Any) -> Tensor | None:
    return getattr(s, "matrix", None)


def _rates(s: Any) -> Sequence[float] | None:
    return getattr(s, "rates", None)


def _run(slabs: Sequence[Any], found_inf: Tensor, modes: tuple[int, ...], rounding: Tensor | None) -> None:
    scalars = _scalars(slabs, found_inf)
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for n, s in enumerate(slabs):
        damping = _same(s.damping) if POLAR in modes else None
        kind = (damping, s.exp_avg.shape[s.rank_dim], s.params[0].dtype, s.grads[0].dtype, s.exp_avg.dtype)
        buckets.setdefault(kind, []).append(n)
    for (_, r, *dtypes), members in buckets.items():
        _launch([(n, slabs[n]) for n in members], scalars, modes, r, dtypes, rounding)


def _same(damping: float | Tensor) -> tuple[bool, float]:
    """Return what is equal for dampings that are known to be equal on the host."""
    return (True, damping.data_ptr()) if isinstance(damping, Tensor) else (False, damping)


def _scalars(slabs: Sequence[Any], found_inf: Tensor) -> Tensor:
    """Advance the steps and return what each slab's tiles multiply with, on the device."""
    device = found_inf.device
    hyper: list[float] = []
    for h in (s.hyper for s in slabs):
        lr = 0.0 if _on_device(h.lr) else float(h.lr)
        logs = (math.log(max(beta, 1e-300)) for beta in (h.beta1, h.beta2))
        hyper += (lr, *logs, h.beta1, h.beta2, h.eps, h.weight_decay, -1.0 if h.maximize else 1.0)
    rates = [s.hyper.lr.data_ptr() if _on_device(s.hyper.lr) else 0 for s in slabs]
    steps = [s.step.data_ptr() for s in slabs]
    scalars = torch.empty(len(slabs) * COLUMNS, dtype=torch.float32, device=device)
    _prepare[(1,)](
        tables.on_device(hyper, torch.float64, device),
        tables.on_device(rates, torch.int64, device),
        tables.on_device(steps, torch.int64, device),
        found_inf, scalars, len(slabs), BLOCK=launch.padded(len(slabs), 1), num_warps=1,
    )  # fmt: skip
    return scalars


def _on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and (lr.device.type != "cpu" or launch.interpreting())


def _launch(
    slabs: list[tuple[int, Any]],
    scalars: Tensor,
    modes: tuple[int, ...],
    r: int,
    dtypes: Sequence[torch.dtype],
    rounding: Tensor | None,
) -> None:
    rp = launch.padded(r, 16)
    c = launch.config("update", rp)
    assert c is not None, "refused by supports()"
    b = _bucket(slabs, r, c.block, ROWS in modes, scalars.device)
    tiles = tables.tiling(b.lengths, c.block)[0]
    operand = _rates if ROWS in modes else _matrix
    has_m = any(operand(s) is not None for _, s in slabs)
    has_k = any(_live(s) is not None for _, s in slabs)
    types = [TYPES[dtype] for dtype in dtypes]
    partials = steps = scalars
    if MOMENTS in modes:
        partials = torch.empty(len(tiles), dtype=torch.float32, device=scalars.device)
    if POLAR in modes:
        wide = torch.float32 if dtypes[0] == torch.float16 else dtypes[0]
        steps = torch.empty(sum(b.counts) * b.block * r, dtype=wide, device=scalars.device)
        k = _joined([(len(s.params), _live(s)) for _, s in slabs], r, torch.int64, scalars)
        known = _joined([(len(s.params), s.known) for _, s in slabs], 1, torch.bool, scalars)
        partials = polar.advance(b, scalars, steps, slabs[0][1].damping, k, known, types[1:], has_m)
    stochastic = rounding is not None and dtypes[0] == torch.bfloat16
    for mode in modes:
        _update[(len(tiles) // 2,)](
            tables.on_device(tiles, torch.int32, scalars.device, key=("tiles", b.lengths, c.block)),
            b.pointers, b.meta, scalars, partials, rounding if stochastic else scalars, steps,
            MODE=mode, R=r, RP=rp, BD=c.block, NP=launch.padded(max(b.counts), 1),
            PT=types[0], GT=types[1], ST=types[2], PREC=c.precision,
            HAS_M=has_m, HAS_K=has_k, STOCHASTIC=stochastic, ALIGN=b.aligned, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip


def _bucket(slabs: list[tuple[int, Any]], r: int, block: int, of_rows: bool, device: torch.device) -> tables.Bucket:
    """Upload (p, g, m, v, M, k) and (d, side, slab, first tile, tiles) of every matrix."""
    owners = [(n, s) for n, s in slabs for _ in s.params]
    lengths = tuple(_length(s) for _, s in owners)
    first = tables.tiling(lengths, block)[1]
    counts = [-(-n // block) for n in lengths]
    meta: list[int] = []
    for t, (n, s) in enumerate(owners):
        meta += (lengths[t], s.rank_dim, n, first[t], counts[t])
    pointers = [a for _, s in slabs for row in _pointers(s, of_rows) for a in row]
    aligned = all(n % 16 == 0 for n in lengths) and all(a % 16 == 0 for t in range(4) for a in pointers[t::6])
    return tables.Bucket(
        r, lengths, block, first, counts,
        tables.on_device(pointers, torch.int64, device), tables.on_device(meta, torch.int32, device), aligned,
    )  # fmt: skip


def _joined(given: list[tuple[int, Tensor | None]], default: int, dtype: torch.dtype, like: Tensor) -> Tensor | None:
    """Return what is ``given`` as (how many matrices, a value for each, or None for ``default``); None if all are."""
    if all(values is None for _, values in given):
        return None
    every = [tables.on_device([default] * L, dtype, like.device) for L, _ in given]
    return torch.cat([d if values is None else values for d, (_, values) in zip(every, given, strict=True)])


def _length(s: Any) -> int:
    return int(s.exp_avg.shape[3 - s.rank_dim])


def _pointers(s: Any, of_rows: bool) -> list[tuple[int, ...]]:
    """Return (p, g, m, v, M, k) of every matrix of a slab, M being the rates ``of_rows``; 0 for no M or k."""
    L, k = len(s.params), _live(s)
    p = [t.data_ptr() for t in s.params]
    g = [t.data_ptr() for t in s.grads] if isinstance(s.grads, (list, tuple)) else tables.addresses(s.grads)
    m, v = tables.addresses(s.exp_avg), tables.addresses(s.exp_avg_sq)
    matrix, rates = _matrix(s), _rates(s)
    if of_rows:
        M = [0 if rates is None else tables.on_device(rates, torch.float32, s.exp_avg.device).data_ptr()] * L
    else:
        M = [0] * L if matrix is None else tables.addresses(matrix)
    live = [0] * L if k is None else tables.addresses(k)
    return list(zip(p, g, m, v, M, live, strict=True))
