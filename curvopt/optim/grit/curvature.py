"""What GritKFAC knows of curvature: where S_u and S_d come from, their averages, and the r×r matrices made of them."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.distributed import all_reduce_grams, world_size
from curvopt.functional import compute_dtype
from curvopt.functional.update import RULES, Rule
from curvopt.lora import Capture, LoraPair
from curvopt.lora.capture import Store
from curvopt.ops import Ops
from curvopt.optim.base import PRECONDITIONED_BY, Side
from curvopt.optim.bucket import Bucket, sum_over_pieces
from curvopt.optim.checking import warn
from curvopt.optim.grit import outer

# one observation per side of a bucket [T, r, r], NaN for a pair that was not observed; the rows behind each [T], or
# None for one each
Observation = tuple[Tensor, Tensor | None]
# values of ``reprojection`` that are GRIT's own
PUBLISHED = ("paper", "paper-one-sided")


@dataclass(frozen=True)
class Source:
    """One source of S_u and S_d.

    Attributes:
        name: value of the argument ``statistics``.
        observe: gives an observation of every bucket, in their order; None: there are none, and no factors.
        hooks: whether u and d must be seen on their way through the model.
        averaged: whether observations are averaged; otherwise the newest is the factor.
        data: whether it depends on the data.
    """

    name: str
    observe: Callable[["Curvature", Sequence[Bucket]], list[Observation]] | None
    hooks: bool = False
    averaged: bool = True
    data: bool = True


class Curvature:
    """Observes the pairs of one optimizer, and makes of it what its rules read.

    Args:
        sides: the optimizer's sides.
        pairs: their pairs, in an order that every process shares.
        process_group: processes to sum over.
        ops: the optimizer's ops.
        before: what observed until now, whose sums are taken over.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        pairs: Sequence[LoraPair],
        process_group: dist.ProcessGroup | None,
        ops: Ops,
        before: "Curvature | None" = None,
    ) -> None:
        watched = {s.pair for s in sides if source_of(s).hooks}
        self._static = any(s.group["capturable"] for s in sides)
        self.capture = Capture([p for p in pairs if p in watched], ops, static=self._static)
        self._ops = ops
        self._process_group = process_group
        self._places: weakref.WeakKeyDictionary[Bucket, _Places] = weakref.WeakKeyDictionary()
        self._silent = list(self.capture.pairs)
        self._unseen: dict[LoraPair, int] = {}
        self._warned = self._in_doubt = False
        self._awaited = True  # whether the hooks are on for an observation: alike on all processes, unlike the doubt
        # by pair of a layer not known to be plain: whether its basis mattered at the last reprojection
        self.entangled: dict[LoraPair, Tensor] = {}
        if before is not None:
            known = {id(pair.A): held for pair, held in before.entangled.items() if pair.exists}
            self.entangled = {pair: known[id(pair.A)] for pair in pairs if id(pair.A) in known}
            self._warned = before._warned
            before.capture.remove()
        self.capture.attach()
        if before is not None:
            self.capture.adopt(before.capture)

    def arm(self, buckets: Sequence[Bucket], loose: Sequence[Side]) -> None:
        """End a step: hooks run only on the way to a step that will observe, or may have to. What was seen is gone.

        A side in no bucket is observed with its first gradient, which may come in any step; where a CUDA graph is
        replayed nobody says when it observes.
        """
        ahead = (b for b in buckets if b.traits.hooks)
        coming = any(b.unsettled or b.due("factor_every", ahead=1) for b in ahead)
        self._awaited = self._static or bool(loose) or coming
        self.capture.discard()
        self.capture.watch(self._awaited or self._in_doubt)

    # ------------------------------------------------------------------ observing

    def observe(self, buckets: Sequence[Bucket], found_inf: dict[torch.device, Tensor]) -> None:
        """Take this step's S_u and S_d into the factors: S ← S + w (zᵀz/N − S).

        The decay is per step: an average remembers as many steps, however far apart they are observed. Where the hooks
        were idle although something has come to be due, it stays so.
        """
        if self._silent and self.capture.active:
            self._warn_of_silence([b for b in buckets if b.traits.hooks])
        by_source: dict[Source, list[Bucket]] = {}
        for bucket in buckets:
            if bucket.due("factor_every") and (self._awaited or not bucket.traits.hooks):
                by_source.setdefault(bucket.traits, []).append(bucket)
        for source, of_one in by_source.items():
            if source.observe is None:
                continue
            for bucket, (S_new, rows) in zip(of_one, source.observe(self, of_one), strict=True):
                state, g, flag = bucket.state, bucket.group, found_inf[bucket.device]
                decay = g["factor_decay"] ** g["factor_every"] if source.averaged else 0.0
                took = self._ops("ema_", state["factor"], S_new, state["observed"], decay, flag)
                state["rows"].add_(took if rows is None else torch.where(took, rows, 0.0))
                # where nothing was seen, as in a step whose forward came before the hooks, it stays due
                bucket.did("factor_every", torch.where(took.any(), flag, 1.0))

    def _warn_of_silence(self, buckets: Sequence[Bucket]) -> None:
        """Warn, once, of pairs that had gradients in three steps but whose hooks were silent.

        Until then the hooks stay on, also where the next observation is steps away.
        """
        self._in_doubt = False
        self._silent = [p for p in self._silent if not self.capture.fired[p] and not self.capture.seen(p)]
        if self._warned or not self._silent:
            return
        moving = {s.pair for b in buckets for s in b.sides}
        for pair in (p for p in self._silent if p in moving):
            self._unseen[pair] = self._unseen.get(pair, 0) + 1
            self._in_doubt |= self._unseen[pair] <= 2
        never = [p.name for p, n in self._unseen.items() if n > 2 and not self.capture.fired[p] and _moves(p)]
        if never:
            self._warned = True
            warn(
                f"{len(never)} pairs received gradients but their activations were never seen ({', '.join(never[:3])}"
                f"{', ...' if len(never) > 3 else ''}): their curvature is not used. If the forward is fused, "
                'use statistics="gradient"'
            )

    def summed(self, buckets: Sequence[Bucket]) -> None:
        """Bring Σ uᵀu, Σ dᵀd and N up to date, summed over processes."""
        self.capture.flush()
        if world_size(self._process_group) == 1:
            return
        moving = dict.fromkeys(s.pair for b in buckets for s in b.sides)
        self.capture.prepare(moving)
        sums, counts, rows = [], [], []
        stores = sorted(self.capture.stores, key=_order)  # each process has met them in an order of its own
        for store in stores:  # idle pairs have nothing to add, here or anywhere
            at = [i for pair, i in store.index.items() if pair in moving]
            every = len(at) == len(store.index)
            rows.append(at)
            sums.append(store.sums if every else store.sums[:, at])
            counts.append(_column(store.n if every else [store.n[i] for i in at], store.sums.device))
        n = all_reduce_grams(sums, self._process_group, torch.cat([c.to(sums[0].device) for c in counts]))
        parts = n.split([len(at) for at in rows])
        for store, at, own, count in zip(stores, rows, sums, parts, strict=True):
            if len(at) == len(store.index):
                store.n = count.to(store.sums.device)
            else:
                store.sums[:, at] = own
                spread = dict(zip(at, count.to(store.sums.device).unbind(), strict=True))
                store.n = [spread.get(i, 0) for i in range(len(store.index))]

    def places(self, bucket: Bucket, store: Store) -> "_Places":
        """Return where the sums of a bucket's sides are in a store."""
        found = self._places.get(bucket)
        if found is None or found.store() is not store:
            P = len(store.index)
            which = ["ud".index(s.moment()) for s in bucket.sides]
            pairs = [store.index[s.pair] for s in bucket.sides]
            index = torch.tensor([half * P + i for half, i in zip(which, pairs, strict=True)], device=bucket.device)
            is_u = torch.tensor([half == 0 for half in which], device=bucket.device)
            found = self._places[bucket] = _Places(weakref.ref(store), index, is_u, pairs)
        return found

    @property
    def world(self) -> int:
        """Processes whose sums are in."""
        return world_size(self._process_group)

    # ------------------------------------------------------------------ matrices

    def refresh(self, bucket: Bucket, found_inf: Tensor) -> None:
        """Recompute the rule's matrices, M ← f(Ŝ + λI); moments kept in a basis are rotated with it."""
        rule = rule_of(bucket)
        assert rule.key is not None
        old = bucket.state[rule.key]
        new = torch.where(found_inf == 0, self.made(bucket), old)
        if rule.turns:
            bucket.transform("moments", new.mT @ old, None, found_inf)
        old.copy_(new)
        bucket.did("inverse_every", torch.where(bucket.state["observed"].any(), found_inf, 1.0))

    def made(self, bucket: Bucket) -> Tensor:
        """Return the rule's matrices ``[T, r, r]`` for the factors as they are; a broken factor keeps what it has."""
        rule, k = rule_of(bucket), live_rank(bucket)
        S, old = bucket.state["factor"], bucket.state[rule.key or ""]
        if rule.matrix == "eigenbasis":
            Q: Tensor = self._ops(rule.matrix, S, k, old)[0]
            return Q
        M: Tensor = self._ops(rule.matrix or "", S, bucket.group["damping"], k, old)
        return M


@dataclass
class _Places:
    """Where the sums of a bucket are in a store: ``index`` [T] among its 2P matrices, pairs by number."""

    store: Callable[[], Store | None]
    index: Tensor
    is_u: Tensor
    pairs: list[int]


def rule_of(bucket: Bucket) -> Rule:
    """Return the record of a bucket's rule."""
    return RULES[bucket.group["update"]]


def live_rank(bucket: Bucket) -> Tensor | None:
    """Return ``[T]`` live ranks, or None where ranks never change."""
    return None if bucket.group["rank_threshold"] is None else bucket.state["rank"]


def source_of(side: Side) -> Source:
    """Return the source a side really has: gradients where there is no module to observe."""
    wanted = side.group["statistics"]
    return SOURCES["gradient" if wanted == "activation" and side.pair.signal is None else wanted]


# ---------------------------------------------------------------------- sources


def from_activations(curvature: Curvature, buckets: Sequence[Bucket]) -> list[Observation]:
    """S_u = Σ uᵀu / N and S_d = N Σ dᵀd, over all micro-batches and processes since the last step.

    The loss is a mean over N rows, so d carries 1/N: (N d)ᵀ(N d)/N = N dᵀd. Under DDP the loss is also a mean over W
    processes, whose d are therefore W times too large. Under a GradScaler d carries its scale, which cancels in all
    that is made of S_d until it changes. A pair without rows is not observed.
    """
    curvature.summed(buckets)
    observed: list[Observation] = []
    for bucket in buckets:
        r, T = bucket.r, len(bucket.sides)
        key = (r, bucket.compute_dtype, bucket.device)
        store = next((s for s in curvature.capture.stores if s.key == key), None)
        if store is None:  # nothing was seen of any of them
            S = torch.full((T, r, r), torch.nan, dtype=bucket.compute_dtype, device=bucket.device)
            observed.append((S, S[:, 0, 0].double()))
            continue
        at = curvature.places(bucket, store)
        if isinstance(store.n, Tensor):
            n = store.n[at.index % len(store.index)]
        else:
            # tensors are left alone: to compare them is to read the device
            if set(map(type, store.n)) == {int} and len(set(store.n)) == 1:
                n = torch.full((T,), store.n[0], dtype=torch.float64, device=bucket.device)
            else:
                n = _column([store.n[i] for i in at.pairs], bucket.device)
        n = torch.where(n > 0, n, torch.nan)
        scale = torch.where(at.is_u, 1 / n, n / curvature.world**2)
        S = store.sums.view(-1, r, r)[at.index]
        observed.append(((S * scale[:, None, None]).to(bucket.compute_dtype), n))
    return observed


def from_gradients(curvature: Curvature, buckets: Sequence[Bucket]) -> list[Observation]:
    """S_u → ∇Bᵀ∇B and S_d → ∇A∇Aᵀ: Shampoo's statistics restricted to the rank side. One row a step."""
    return _paired(buckets, [b.plan.grams("gradients") for b in buckets], {"A": "d", "B": "u"})


def from_weights(curvature: Curvature, buckets: Sequence[Bucket]) -> list[Observation]:
    """S_u → A Aᵀ and S_d → BᵀB: Riemannian preconditioned LoRA (arXiv 2402.02347). One row a step."""
    return _paired(buckets, [b.weight_grams() for b in buckets], {"A": "u", "B": "d"})


SOURCES = {
    source.name: source
    for source in (
        Source("activation", from_activations, hooks=True),
        Source("gradient", from_gradients),
        Source("weight", from_weights, averaged=False, data=False),
        Source("none", None, data=False),
    )
}


def _order(store: Store) -> tuple[Any, ...]:
    """Return by what all processes put their stores in the same order."""
    r, dtype, device = store.key
    return r, str(dtype), device.type, device.index or 0


def _paired(buckets: Sequence[Bucket], grams: list[Tensor], which: dict[str, str]) -> list[Observation]:
    """Return the Gram matrices ``[T, r, r]`` where each side wants them: its own, or those of its pair's other side."""
    sum_over_pieces(buckets, grams)
    found: dict[tuple[LoraPair, str], Tensor] = {}
    observed: list[Observation] = []
    own = all(PRECONDITIONED_BY[b.group["sides"]] == which for b in buckets)
    for bucket, G in zip(buckets, grams, strict=True) if not own else ():
        found |= {(s.pair, which[s.name]): S for s, S in zip(bucket.sides, G.unbind(), strict=True)}
    for bucket, G in zip(buckets, grams, strict=True):
        if not own:
            nothing = torch.full_like(bucket.state["factor"][0], torch.nan)  # the partner is frozen or idle
            G = torch.stack([found.get((s.pair, s.moment()), nothing) for s in bucket.sides])
        observed.append((G, None))
    return observed


def _column(numbers: Any, device: torch.device) -> Tensor:
    """Return numbers, or 0-d tensors, as one float64 tensor, made on the device: an upload cannot be captured."""
    if isinstance(numbers, Tensor):
        return numbers.to(device, torch.float64)
    pieces = []
    for _, run in itertools.groupby(numbers, lambda n: (id(n),) if isinstance(n, Tensor) else n):
        first, *others = run
        if isinstance(first, Tensor):
            pieces.append(first.to(device, torch.float64).expand(1 + len(others)))
        else:
            pieces.append(torch.full((1 + len(others),), first, dtype=torch.float64, device=device))
    return torch.cat(pieces)


def _moves(pair: LoraPair) -> bool:
    """Whether a pair has a gradient that is not zero: an idle adapter may be given zeros."""
    return any(p.grad is not None and bool(p.grad.any()) for p in (pair.A, pair.B))


def small_state(side: Side) -> dict[str, Tensor]:
    """Return prototypes of what GritKFAC keeps of a side beside Adam's state."""
    rule, r, device = RULES[side.group["update"]], side.pair.rank, side.param.device
    dtype = compute_dtype(side.param.dtype)
    small: dict[str, Tensor] = {}
    if source_of(side).observe is not None:
        small["factor"] = torch.zeros(r, r, dtype=dtype, device=device)
        small["observed"] = torch.zeros((), dtype=torch.float64, device=device)
        small["rows"] = torch.zeros((), dtype=torch.float64, device=device)
        if rule.key is not None:
            small[rule.key] = torch.eye(r, dtype=dtype, device=device)
    small["rank"] = torch.full((), r, dtype=torch.int64, device=device)
    small["pending"] = torch.zeros((), dtype=torch.int64, device=device)
    if side.group["reprojection"] in PUBLISHED:
        small["kept"] = small["rank"]
    return small | outer.small_state(side)
