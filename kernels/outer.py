"""Outer factors on the device: the products [G Gᵀ | G Vᵀ] of all matrices, and where the maps of [G; V] are.

G is the gradient and V the basis of its outer factor, rank first, ``(R, D)`` and ``(K, D)``; B and its V are stored
the other way round. The algebra between the two, of size R + K, is the op `outer_map`.

    products:  H = G Gᵀ,  P = G Vᵀ          as [R, R + K], summed over programs as the Gram matrices of "polar" are
    maps:      V ← M₂₁ G + M₂₂ V,  G' = c G + M₁₂ V     where the rule reads the gradient: `update_tiles._gradient`

The pass that makes the products looks for what is not finite, too. Bytes an element of float32, with k = r: 8 for the
products; in the rule's launch 8 beside those of the gradient, for V there and back. All arithmetic is float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, polar, tables
from .update_tiles import LENGTH, META, SIDE_OF, _dot, _places
from .whole import _raise


@triton.jit
def _part(
    G, V, to, flag, begin, D,
    SIDE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr,
    BD: tl.constexpr, PREC: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Write [G Gᵀ | G Vᵀ] of T tiles from column ``begin`` on; LOOK: set ``flag`` if G is not finite there."""
    H, P = tl.zeros([RP, RP], tl.float32), tl.zeros([RP, KP], tl.float32)
    for n in range(T):
        at, inside, _ = _places(begin + n * BD, D, SIDE, R, RP, BD)
        g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
        at, inside, _ = _places(begin + n * BD, D, SIDE, K, KP, BD)
        v = tl.load(V + at, mask=inside, other=0.0).to(tl.float32)
        H = _dot(tl.trans(g), g, H, PREC)
        P = _dot(tl.trans(g), v, P, PREC)
    i, h, p = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :], tl.arange(0, KP)[None, :]
    tl.store(to + i * (R + K) + h, H, mask=(i < R) & (h < R))
    tl.store(to + i * (R + K) + R + p, P, mask=(i < R) & (p < K))
    if LOOK:
        # the diagonal from memory: triton 3.7 does not compile a sum over H itself for tensor memory (sm_100)
        tl.debug_barrier()
        d = tl.arange(0, RP)
        trace = tl.sum(tl.load(to + d * (R + K + 1), mask=d < R, other=0.0), 0)
        _look(G, flag, trace, begin, D, SIDE, T, R, RP, BD)


@triton.jit
def _look(
    G, flag, trace, begin, D, SIDE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Set ``flag`` if G is not finite in T tiles, whose tr G Gᵀ then is not: neither where a square overflows."""
    if not tl.abs(trace) < float("inf"):
        bad = 0
        for n in range(T):
            at, inside, _ = _places(begin + n * BD, D, SIDE, R, RP, BD)
            g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
            bad += tl.sum(tl.sum(tl.where(tl.abs(g) < float("inf"), 0, 1), 1), 0)
        _raise(flag, bad)


@triton.jit
def _products(
    parts, gradients, bases, meta, out, flag,
    T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr,
    GT: tl.constexpr, VT: tl.constexpr, PREC: tl.constexpr, LOOK: tl.constexpr, ALIGN: tl.constexpr,
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
        _part(G, V, to, flag, begin, D, 1, T, R, K, RP, KP, BD, PREC, LOOK)
    else:
        _part(G, V, to, flag, begin, D, 2, T, R, K, RP, KP, BD, PREC, LOOK)


class Outer:
    """What a plan has of the outer factors of its bucket.

    Args:
        slabs: the bucket; every slab has a ``basis``.
        meta: the plan's table, see `update_tiles`.

    Attributes:
        k: directions of a basis.
        maps_shape: that of the maps of a step, ``[T, R + K, R + K]``.
        bases: ``[T]`` where the bases are.
        straight: whether they are aligned to 16 bytes.
    """

    def __init__(self, slabs: Sequence[Any], meta: Tensor) -> None:
        first = slabs[0]
        device = meta.device
        self._meta = meta
        self._r, self.k = first.exp_avg.shape[first.rank_dim], first.basis.shape[first.rank_dim]
        self._rp, self._kp = launch.padded(self._r, 16), launch.padded(self.k, 16)
        c = launch.shipped("outer", max(self._rp, self._kp))
        self._c, self._type = c, launch.TYPES[first.basis.dtype]
        lengths = tuple(s.exp_avg.shape[3 - s.rank_dim] for s in slabs for _ in s.params)
        self.maps_shape = (len(lengths), self._r + self.k, self._r + self.k)
        self._group = min(c.group, launch.padded(-(-max(lengths) // c.block), 1))
        self.parts = polar.Parts(lengths, c.block, self._group, self._r * (self._r + self.k), device)
        bases = [a for s in slabs for a in tables.addresses(s.basis)]
        self.bases = tables.upload(bases, torch.int64, device)
        self.straight = all(a % 16 == 0 for a in bases)

    def products(self, gradients: Tensor, dtype: torch.dtype, align: bool, flag: Tensor | None = None) -> Tensor:
        """Return [G Gᵀ | G Vᵀ] ``[T, R, R + K]`` of the gradients at these addresses.

        ``flag``, 0-d float32, becomes one if any of them is not finite.
        """
        c = self._c
        out = torch.empty(self.parts.count, self._r, self._r + self.k, dtype=torch.float32, device=gradients.device)
        launch.run(
            _products, (self.parts.count,), self.parts.table, gradients, self.bases, self._meta, out,
            out if flag is None else flag,
            T=self._group, R=self._r, K=self.k, RP=self._rp, KP=self._kp, BD=c.block, GT=launch.TYPES[dtype],
            VT=self._type, PREC=c.precision, LOOK=flag is not None, ALIGN=align,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        return self.parts.sums(out)
