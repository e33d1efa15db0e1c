"""Outer factors on the device: the products [G Gᵀ | G Vᵀ] of all matrices, and the maps [G; V] ← M [G; V].

G is the gradient and V the basis of its outer factor, rank first, ``(R, D)`` and ``(K, D)``; B and its V are stored
the other way round. The algebra between the two, of size R + K, is the op `outer_map`.

    products:  H = G Gᵀ,  P = G Vᵀ          as [R, R + K], summed over programs as the Gram matrices of "polar" are
    maps:      G' = M₁₁ G + M₁₂ V  (to a buffer that the update reads in place of the gradients),
               V  ← M₂₁ G + M₂₂ V  (in place)

Bytes an element of float32, with k = r: 8 for the products, 16 for the maps, 4 for the update's reading G' in place of
G. All arithmetic is float32.

Hazards. Never autotune: V is changed in place. A program owns its columns of G and V, and reads all it needs of them
before it writes. Nothing is written where ``found_inf`` is set. Masked entries are selected away, not multiplied.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, polar, tables
from .update_tiles import LENGTH, META, SIDE_OF


@triton.jit
def _loaded(X, i, j, D, SIDE: tl.constexpr, N: tl.constexpr):
    """Return entries of rows i and columns j, rank first whatever the storage, of N rows; zero outside."""
    at = i * D + j if SIDE == 1 else j * N + i
    return tl.load(X + at, mask=(i < N) & (j < D), other=0.0).to(tl.float32)


@triton.jit
def _part(
    G, V, to, begin, D,
    SIDE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr,
    BD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Write [G Gᵀ | G Vᵀ] of T tiles from column ``begin`` on."""
    H, P = tl.zeros([RP, RP], tl.float32), tl.zeros([RP, KP], tl.float32)
    for n in range(T):
        j = begin + n * BD + tl.arange(0, BD)
        if SIDE == 1:
            g = _loaded(G, tl.arange(0, RP)[:, None], j[None, :], D, SIDE, R)
            v = _loaded(V, tl.arange(0, KP)[:, None], j[None, :], D, SIDE, K)
            H = tl.dot(g, tl.trans(g), H, input_precision=PREC)
            P = tl.dot(g, tl.trans(v), P, input_precision=PREC)
        else:
            g = _loaded(G, tl.arange(0, RP)[None, :], j[:, None], D, SIDE, R)
            v = _loaded(V, tl.arange(0, KP)[None, :], j[:, None], D, SIDE, K)
            H = tl.dot(tl.trans(g), g, H, input_precision=PREC)
            P = tl.dot(tl.trans(g), v, P, input_precision=PREC)
    i, h, p = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :], tl.arange(0, KP)[None, :]
    tl.store(to + i * (R + K) + h, H, mask=(i < R) & (h < R))
    tl.store(to + i * (R + K) + R + p, P, mask=(i < R) & (p < K))


@triton.jit
def _products(
    parts, gradients, bases, meta, out,
    T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr,
    GT: tl.constexpr, VT: tl.constexpr, PREC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out[pid] ← [G Gᵀ | G Vᵀ] of ``parts[pid]`` = (tensor, block of T tiles)."""
    pid = tl.program_id(0)
    tensor = tl.load(parts + 2 * pid)
    begin = tl.multiple_of(tl.load(parts + 2 * pid + 1) * (T * BD), BD)
    G = tl.load(gradients + tensor).to(tl.pointer_type(GT))
    V = tl.load(bases + tensor).to(tl.pointer_type(VT))
    D = tl.load(meta + tensor * META + LENGTH)
    if ALIGN:
        G, V, D = tl.multiple_of(G, 16), tl.multiple_of(V, 16), tl.multiple_of(D, 16)
    to = out + pid.to(tl.int64) * (R * (R + K))
    if tl.load(meta + tensor * META + SIDE_OF) == 1:
        _part(G, V, to, begin, D, 1, T, R, K, RP, KP, BD, PREC)
    else:
        _part(G, V, to, begin, D, 2, T, R, K, RP, KP, BD, PREC)


@triton.jit
def _added(
    Y, M, X, d0, D,
    SIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RP: tl.constexpr, CP: tl.constexpr,
    WIDE: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Return Y + M X of one tile: M ``(ROWS, COLS)`` in rows of WIDE, padded to RP and CP, X with COLS rows.

    In slices of at most 32 of the inner dimension, read anew from memory, as `whole._mapped`.
    """
    C: tl.constexpr = CP if CP < 64 else 32
    i, c, j = tl.arange(0, RP), tl.arange(0, C), d0 + tl.arange(0, BD)
    for n in range(CP // C):
        q = n * C + c
        if SIDE == 1:
            m = tl.load(M + i[:, None] * WIDE + q[None, :], mask=(i[:, None] < ROWS) & (q[None, :] < COLS), other=0.0)
            Y = tl.dot(m, _loaded(X, q[:, None], j[None, :], D, SIDE, COLS), Y, input_precision=PREC)
        else:
            m = tl.load(M + i[None, :] * WIDE + q[:, None], mask=(i[None, :] < ROWS) & (q[:, None] < COLS), other=0.0)
            Y = tl.dot(_loaded(X, q[None, :], j[:, None], D, SIDE, COLS), m, Y, input_precision=PREC)
    return Y


@triton.jit
def _both(
    G, V, to, M, d0, D,
    SIDE: tl.constexpr, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr,
    VT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Map one tile of G, into ``to``, and of V, in place."""
    N: tl.constexpr = R + K
    g = tl.zeros([RP, BD] if SIDE == 1 else [BD, RP], tl.float32)
    g = _added(g, M, G, d0, D, SIDE, R, R, RP, RP, N, BD, PREC)
    g = _added(g, M + R, V, d0, D, SIDE, R, K, RP, KP, N, BD, PREC)
    v = tl.zeros([KP, BD] if SIDE == 1 else [BD, KP], tl.float32)
    v = _added(v, M + R * N, G, d0, D, SIDE, K, R, KP, RP, N, BD, PREC)
    v = _added(v, M + R * N + R, V, d0, D, SIDE, K, K, KP, KP, N, BD, PREC)
    tl.debug_barrier()  # other warps read what this one writes
    r, k, j = tl.arange(0, RP), tl.arange(0, KP), d0 + tl.arange(0, BD)
    if SIDE == 1:
        tl.store(to + r[:, None] * D + j[None, :], g, mask=(r[:, None] < R) & (j[None, :] < D))
        tl.store(V + k[:, None] * D + j[None, :], v.to(VT), mask=(k[:, None] < K) & (j[None, :] < D))
    else:
        tl.store(to + j[:, None] * R + r[None, :], g, mask=(r[None, :] < R) & (j[:, None] < D))
        tl.store(V + j[:, None] * K + k[None, :], v.to(VT), mask=(k[None, :] < K) & (j[:, None] < D))


@triton.jit
def _precondition(
    tiles, gradients, bases, results, meta, maps, found_inf,
    R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr,
    GT: tl.constexpr, VT: tl.constexpr, PREC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Run `_both` for tile ``tiles[pid]`` = (tensor, block); ``maps`` [tensors, R + K, R + K]."""
    pid = tl.program_id(0)
    tensor = tl.load(tiles + 2 * pid)
    d0 = tl.multiple_of(tl.load(tiles + 2 * pid + 1) * BD, BD)
    G = tl.load(gradients + tensor).to(tl.pointer_type(GT))
    V = tl.load(bases + tensor).to(tl.pointer_type(VT))
    to = tl.load(results + tensor).to(tl.pointer_type(tl.float32))
    D = tl.load(meta + tensor * META + LENGTH)
    if ALIGN:
        G, V, D = tl.multiple_of(G, 16), tl.multiple_of(V, 16), tl.multiple_of(D, 16)
        to = tl.multiple_of(to, 16)
    M = maps + tensor.to(tl.int64) * ((R + K) * (R + K))
    if tl.load(found_inf).to(tl.float32) == 0:
        if tl.load(meta + tensor * META + SIDE_OF) == 1:
            _both(G, V, to, M, d0, D, 1, R, K, RP, KP, BD, VT, PREC)
        else:
            _both(G, V, to, M, d0, D, 2, R, K, RP, KP, BD, VT, PREC)


class Outer:
    """The two launches of one bucket, and what they work in.

    Args:
        slabs: the bucket; every slab has a ``basis``.
        meta: the plan's table, see `update_tiles`.

    Attributes:
        addresses: ``[T]`` where the preconditioned gradients are, in float32.
    """

    def __init__(self, slabs: Sequence[Any], meta: Tensor) -> None:
        first = slabs[0]
        device = meta.device
        self._meta = meta
        self._r, self._k = first.exp_avg.shape[first.rank_dim], first.basis.shape[first.rank_dim]
        self._rp, self._kp = launch.padded(self._r, 16), launch.padded(self._k, 16)
        c = launch.shipped("outer", max(self._rp, self._kp))
        self._c, self._type = c, launch.TYPES[first.basis.dtype]
        lengths = tuple(s.exp_avg.shape[3 - s.rank_dim] for s in slabs for _ in s.params)
        self._count = len(lengths)
        self._tiles = tables.upload(tables.tiling(lengths, c.block)[0], torch.int32, device)
        self._group = min(c.group, launch.padded(-(-max(lengths) // c.block), 1))
        self.parts = polar.Parts(lengths, c.block, self._group, self._r * (self._r + self._k), device)
        bases = [a for s in slabs for a in tables.addresses(s.basis)]
        self._bases = tables.upload(bases, torch.int64, device)
        self._straight = all(a % 16 == 0 for a in bases) and all(n % 16 == 0 for n in lengths)
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + -(-n * self._r // 4) * 4)
        self._buffer = torch.empty(starts[-1], dtype=torch.float32, device=device)
        begins = [self._buffer.data_ptr() + 4 * n for n in starts[:-1]]
        self.addresses = tables.upload(begins, torch.int64, device)
        self._maps: Tensor | None = None

    def _constants(self, gradient: torch.dtype, align: bool) -> dict[str, Any]:
        c = self._c
        return {
            "R": self._r, "K": self._k, "RP": self._rp, "KP": self._kp, "BD": c.block, "GT": launch.TYPES[gradient],
            "VT": self._type, "PREC": c.precision, "ALIGN": align and self._straight,
            "num_warps": c.warps, "num_stages": c.stages,
        }  # fmt: skip

    def products(self, gradients: Tensor, dtype: torch.dtype, align: bool) -> Tensor:
        """Return [G Gᵀ | G Vᵀ] ``[T, R, R + K]`` of the gradients at these addresses."""
        out = torch.empty(self.parts.count, self._r, self._r + self._k, dtype=torch.float32, device=gradients.device)
        launch.run(
            _products, (self.parts.count,), self.parts.table, gradients, self._bases, self._meta, out,
            T=self._group, **self._constants(dtype, align),
        )  # fmt: skip
        return self.parts.sums(out)

    def take(self, maps: Tensor) -> None:
        """Take the maps ``[T, R + K, R + K]`` of the next `precondition`."""
        n = self._r + self._k
        if maps.shape != (self._count, n, n) or not launch.plain([maps], (torch.float32,)):
            need = f"contiguous float32 of shape {(self._count, n, n)}"
            raise ValueError(f"maps must be {need}, got {maps.dtype} {tuple(maps.shape)}")
        self._maps = maps

    def precondition(self, gradients: Tensor, dtype: torch.dtype, align: bool, found_inf: Tensor) -> None:
        """Map gradients into the buffer and V in place; each ``take`` is used once.

        Raises:
            RuntimeError: no maps were taken since the last step.
        """
        if self._maps is None:
            raise RuntimeError("a plan with outer factors needs take_outer before every step")
        launch.run(
            _precondition, (len(self._tiles) // 2,), self._tiles, gradients, self._bases, self.addresses, self._meta,
            self._maps, found_inf, **self._constants(dtype, align),
        )  # fmt: skip
        self._maps = None
