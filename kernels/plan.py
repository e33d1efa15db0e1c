"""The step of a bucket: everything about its launches decided once, then a few launches a step.

A bucket is a list of slabs (`curvopt.functional.update.Slab`, or `curvopt.functional.nested.RowSlab` for "row") of one
rank, dtype and device that share their hyper-parameters and their 0-d ``step``. A plan keeps their addresses, tiles and
buffers on the device. A step then launches, whatever the number of matrices:

    polar      prepare, advance, (total,) equalise, update          momentum   prepare, moments, graft
    others     prepare, update

With outer factors, the launch that reads the gradient takes what they make of it; see `outer`.

An unchanged step uploads nothing: the learning rate and all other hyper-parameters are scalar arguments of `_prepare`,
or read on the device where the rate is a tensor, and the table of gradients is uploaded when an address has changed.

Hazards. Parameters, moments, step, matrices, ranks and flags are read at the addresses they had when the plan was made:
whoever moves one makes a new plan. Gradients must live until the launches are queued. During a CUDA graph capture the
gradients must be those of the step before, the learning rate and λ should be tensors (a number is recorded as it is),
and the plan must outlive the graph.
"""

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import launch, outer, outer_map, polar, root, tables, whole
from .buckets import MODES, has, plan_supports
from .update_tiles import FIXED, PARAM, SCALARS, _prepare, _update

__all__ = ["UpdatePlan", "plan_supports"]


class UpdatePlan:
    """The launches of one bucket.

    Matrices are numbered slab by slab, T in all; what is said of each is in that order.

    Args:
        rule: "polar", "eigen", "adam", "whiten", "momentum" or "row".
        slabs: the bucket. Of the gradients only shapes and dtype count here; `load` says where they are.

    Attributes:
        hyper: learning rate, betas, eps, decay, maximize; replace or change it between steps.
        damping: λ of "polar", likewise; a number or a 0-d tensor that is read on the device.
        outer_map: the op that makes the maps of the outer factors.

    Raises:
        ValueError: `plan_supports` refuses the bucket.
        RuntimeError: during a CUDA graph capture.
    """

    def __init__(self, rule: str, slabs: Sequence[Any]) -> None:
        if not plan_supports(rule, slabs):
            raise ValueError(f"no kernels take this bucket of {len(slabs)} slabs for {rule!r}")
        first = slabs[0]
        self.hyper, self.damping = first.hyper, getattr(first, "damping", 0.1)
        self._modes = MODES[rule]
        self._r = r = first.exp_avg.shape[first.rank_dim]
        self._rp = launch.padded(r, 16)
        k = first.basis.shape[first.rank_dim] if has(first, "basis") else 0
        widest = launch.padded(max(r, k), 16)
        self._device = device = first.exp_avg.device
        self._step = first.step
        self._dtypes = (first.params[0].dtype, first.grads[0].dtype, first.exp_avg.dtype)
        self._shapes = [s.exp_avg.shape[1:] for s in slabs for _ in s.params]
        self._numels = [math.prod(shape) for shape in self._shapes]
        self._count = len(self._shapes)
        self._c = c = launch.shipped("update", widest)
        self._lengths = tuple(s.exp_avg.shape[3 - s.rank_dim] for s in slabs for _ in s.params)
        tiles, starts = tables.tiling(self._lengths, c.block)
        counts = [-(-n // c.block) for n in self._lengths]
        sides = [s.rank_dim for s in slabs for _ in s.params]
        meta = [x for row in zip(self._lengths, sides, starts, counts, strict=True) for x in row]
        self._most = launch.padded(max(counts), 1)
        self._tiles = tables.upload(tiles, torch.int32, device)
        self._meta = tables.upload(meta, torch.int32, device)
        self._rates = [_rates(s) for s in slabs] if rule == "row" else None
        rates = None if self._rates is None else [(own,) for own in self._rates]
        fixed = [a for n, s in enumerate(slabs) for row in _fixed(s, None if rates is None else rates[n]) for a in row]
        self._fixed = tables.upload(fixed, torch.int64, device)
        self._has_m = any(fixed[3 :: FIXED.value])
        self._has_k = any(fixed[4 :: FIXED.value])
        self._constants = {
            "K": k, "KP": launch.padded(k, 16), "R": r, "RP": self._rp, "HAS_K": self._has_k,
            "GT": launch.TYPES[self._dtypes[1]], "ST": launch.TYPES[self._dtypes[2]],
        }  # fmt: skip
        self._straight = all(a % 16 == 0 for n in range(3) for a in fixed[n :: FIXED.value])
        self._straight = self._straight and all(n % 16 == 0 for n in self._lengths)
        self._outer = outer.Outer(slabs, self._meta) if k else None
        self.outer_map: Callable[..., Any] = outer_map.outer_map
        self._products: Tensor | None = None
        self._maps: Tensor | None = None
        if self._outer is not None:
            self._straight = self._straight and self._outer.straight
        self._scalars = torch.zeros(SCALARS.value, dtype=torch.float32, device=device)
        # where the gradients are
        self._addresses: list[int] = []
        self._gradients = self._scalars
        self._captured: list[Tensor] = []
        self._align = False
        summing = self._summing = launch.shipped("polar", widest)
        self._group = min(summing.group, launch.padded(-(-max(self._lengths) // summing.block), 1))
        self._parts = polar.Parts(self._lengths, summing.block, self._group, r * r, device)
        self._looks = launch.shipped("nonfinite", 0)
        runs = tables.tiling(tuple(self._numels), self._looks.block)[0]
        self._runs = tables.upload(runs, torch.int32, device)
        self._sizes = tables.upload(self._numels, torch.int32, device)
        # what a step works in
        self._partials = self._steps = self._scalars
        if rule == "momentum":
            self._partials = torch.empty(len(tiles), dtype=torch.float32, device=device)
        if rule == "polar":
            wide = torch.float32 if self._dtypes[0] == torch.float16 else self._dtypes[0]
            self._steps = torch.empty(sum(counts) * c.block * r, dtype=wide, device=device)
            self._grams = torch.empty(self._parts.count, r, r, dtype=torch.float32, device=device)
            self._totals = torch.empty(self._count, r, r, dtype=torch.float32, device=device)
            self._partials = torch.empty_like(self._totals)
            self._root = root.constants_of(r)
            self._work = root.workspace(self._count, r, self._totals)
            self._coefficients = root.Coefficients(r, device)
        # everything of a step that is uploaded is uploaded here, so that the first step may be captured after `load`
        if rule == "polar":
            self._coefficients.follow(self.damping)

    def load(self, grads: Sequence[Tensor]) -> bool:
        """Take the gradients of this step, T matrices; upload their addresses if they are not those of the last step.

        Returns:
            False if the plan was made for others: another number, dtype, shape or device, or not contiguous. Then
            nothing has changed.

        Raises:
            RuntimeError: the addresses have changed during a CUDA graph capture.
        """
        self._products = None
        if len(grads) != self._count or not all(map(Tensor.is_contiguous, grads)):
            return False
        addresses = list(map(Tensor.data_ptr, grads))
        if addresses != self._addresses:
            same = list(map(attrgetter("shape"), grads)) == self._shapes
            if not (same and grads[0].device == self._device and launch.plain(grads, (self._dtypes[1],))):
                return False
            self._gradients = tables.upload(addresses, torch.int64, self._device)
            self._addresses = addresses
            self._align = self._straight and not any(map((15).__and__, addresses))
        if tables.capturing(self._device) and not any(t is self._gradients for t in self._captured):
            self._captured.append(self._gradients)  # the graph reads it at every replay
        return True

    def nonfinite_(self, flag: Tensor) -> None:
        """Set ``flag``, 0-d float32, to one if any gradient is not finite; leave it else."""
        if self._outer is not None:  # the pass that makes their products has to read the gradients anyway
            self._products = self._outer.products(self._gradients, self._dtypes[1], self._align, flag)
            return
        c = self._looks
        launch.run(
            whole._nonfinite, (len(self._runs) // 2,), self._runs, self._gradients, self._sizes, flag,
            GT=launch.TYPES[self._dtypes[1]], BLOCK=c.block, ALIGN=self._align, num_warps=c.warps,
        )  # fmt: skip

    def step(self, found_inf: Tensor) -> None:
        """Take the rule's step with the gradients loaded last; nothing changes where ``found_inf`` (0-d) is not 0."""
        h, reads = self.hyper, (self._gradients, self._gradients, self._scalars)
        if self._outer is not None:
            if self._maps is None:
                raise RuntimeError("a plan with outer factors needs take_outer before every step")
            reads = (self._gradients, self._outer.bases, self._maps)
            self._maps = None
        lr_on_device = isinstance(h.lr, Tensor) and h.lr.device == self._device
        logs = [launch.split(math.log(max(float(beta), 1e-300))) for beta in (h.beta1, h.beta2)]
        launch.run(
            _prepare, (1,), self._step, found_inf, self._scalars, h.lr if lr_on_device else float(h.lr),
            *logs[0], *logs[1], 1.0 - float(h.beta1), float(h.beta2), 1.0 - float(h.beta2), float(h.eps),
            float(h.weight_decay), -1.0 if h.maximize else 1.0, LR_ON_DEVICE=lr_on_device, num_warps=1,
        )  # fmt: skip
        if self._modes == MODES["polar"]:
            self._equalise(reads)
        c = self._c
        for mode in self._modes:
            launch.run(
                _update, (len(self._tiles) // 2,), self._tiles, self._fixed, *reads, self._meta,
                self._scalars, self._partials, self._steps,
                MODE=mode.value, BD=c.block, NP=self._most, PT=launch.TYPES[self._dtypes[0]], PREC=c.precision,
                HAS_M=self._has_m, ALIGN=self._align, num_warps=c.warps, num_stages=c.stages, **self._constants,
            )  # fmt: skip

    def _equalise(self, reads: tuple[Tensor, Tensor, Tensor]) -> None:
        """Advance the moments, write u, and make the matrices that act on it."""
        parts, c, r = self._parts, self._summing, self._r
        launch.run(
            polar._advance, (parts.count,), parts.table, self._fixed, *reads, self._meta, self._scalars,
            self._steps, self._grams,
            T=self._group, BD=c.block, UB=self._c.block, UT=launch.TYPES[self._steps.dtype], PREC=c.precision,
            ALIGN=self._align, num_warps=c.warps, num_stages=c.stages, **self._constants,
        )  # fmt: skip
        grams = parts.sums(self._grams, self._totals)
        count = self._coefficients.follow(self.damping)
        launch.run(
            root._equalise, (self._count,), grams, self._fixed, self._coefficients.values, self._coefficients.damping,
            self._work, self._partials,
            HAS_K=self._has_k, ON_DEVICE=self._coefficients.on_device, STAGES=count, R=r, **self._root,
        )  # fmt: skip

    def grams(self, of: str) -> Tensor:
        """Return X Xᵀ, rank first, of every matrix, ``[T, r, r]`` float32; X the "gradients" or the "params".

        The relative error is that of float32 sums: below 1e-6, at 16-bit X as at float32.
        """
        if of not in ("gradients", "params"):
            raise ValueError(f'of must be "gradients" or "params", got {of!r}')
        parts, c, r = self._parts, self._summing, self._r
        gradients = of == "gradients"
        if gradients and self._products is not None:  # made when the gradients were looked at
            return self._products[:, :, :r].contiguous()
        out = torch.empty(parts.count, r, r, dtype=torch.float32, device=self._device)
        launch.run(
            whole._grams, (parts.count,), parts.table, self._gradients if gradients else self._fixed, self._meta, out,
            STRIDE=1 if gradients else FIXED.value, T=self._group, R=r, RP=self._rp, BD=c.block,
            XT=launch.TYPES[self._dtypes[1 if gradients else PARAM.value]], PREC=c.precision,
            ALIGN=self._align if gradients else self._straight, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        return parts.sums(out)

    def outer_products(self) -> Tensor:
        """Return [∇∇ᵀ | ∇Vᵀ] ``[T, r, r + k]`` float32, rank first, V the basis of the outer factors."""
        if self._products is not None:  # since the gradients were looked at
            made, self._products = self._products, None
            return made
        return self._with_outer().products(self._gradients, self._dtypes[1], self._align)

    def take_outer(self, M: Tensor) -> None:
        """Take M ``[T, r + k, r + k]`` of `curvopt.functional.outer` in the next step, and in that alone."""
        shape = self._with_outer().maps_shape
        if M.shape != shape or not launch.plain([M], (torch.float32,)):
            raise ValueError(f"M must be contiguous float32 of shape {shape}, got {M.dtype} {tuple(M.shape)}")
        self._maps = M

    def _with_outer(self) -> outer.Outer:
        if self._outer is None:
            raise ValueError("the slabs of this plan have no basis of outer factors")
        return self._outer

    def transform_(self, of: str, M: Tensor | None, k: Tensor | None, found_inf: Tensor) -> None:
        """Map the rank side of every matrix in place, then clear rows i ≥ k; nothing where ``found_inf`` is not 0.

        Args:
            of: "params": X ← M X; "moments": m ← M m, v ← (M ∘ M) v.
            M: ``[T, r, r]``, or None for the identity.
            k: ``[T]`` int64 ranks; rows from there on become exactly zero, whatever they hold. None clears none.
            found_inf: 0-d.

        Computed in float32: the error of an entry is at most about r · 6e-8 · Σ|M||x|, and one rounding to what is
        stored.
        """
        if of not in ("params", "moments"):
            raise ValueError(f'of must be "params" or "moments", got {of!r}')
        M = None if M is None else M.to(torch.float32).contiguous()
        for given, dtype, shape in ((M, torch.float32, (self._r, self._r)), (k, torch.int64, ())):
            if given is None:
                continue
            fits = given.device == self._device and launch.plain([given], (dtype,))
            if not fits or given.shape != (self._count, *shape):
                raise ValueError(f"expected a contiguous {dtype} tensor of shape {(self._count, *shape)}")
        c, moments = self._c, of == "moments"
        launch.run(
            whole._transform, (len(self._tiles) // 2,), self._tiles, self._fixed, self._meta,
            self._scalars if M is None else M, self._tiles if k is None else k, found_inf,
            MOMENTS=moments, R=self._r, RP=self._rp, BD=c.block, XT=launch.TYPES[self._dtypes[2 if moments else 0]],
            PREC=c.precision, HAS_M=M is not None, HAS_K=k is not None, ALIGN=self._straight,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip


def _rates(s: Any) -> Tensor | None:
    """Return the learning rates of a slab's directions on its device, or None if all are one."""
    return tables.upload(s.rates, torch.float32, s.exp_avg.device) if has(s, "rates") else None


def _fixed(s: Any, rates: tuple[Tensor | None] | None) -> list[tuple[int, ...]]:
    """Return the columns of ``fixed`` for every matrix of a slab: p, m, v, the rule's matrix or its rates, k."""
    L = len(s.params)
    null = [0] * L
    matrix = tables.addresses(s.matrix) if has(s, "matrix") else null
    if rates is not None:
        matrix = [0 if rates[0] is None else rates[0].data_ptr()] * L
    p, m, v = [t.data_ptr() for t in s.params], tables.addresses(s.exp_avg), tables.addresses(s.exp_avg_sq)
    k = tables.addresses(s.k) if has(s, "k") else null
    return list(zip(p, m, v, matrix, k, strict=True))
