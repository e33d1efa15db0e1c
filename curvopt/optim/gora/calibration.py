"""What GoRAInit gathers before it decides: per layer a sum of gradients and how many steps are in it."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.distributed import all_reduce_sums, world_size
from curvopt.functional import compute_dtype
from curvopt.functional.gradient_init import compressed_start, frobenius, mean_abs, nuclear, step_size
from curvopt.functional.ranks import RankPlan, allocate
from curvopt.lora import LoraPair, resize_pair
from curvopt.lora.gradients import (
    BaseGradients,
    base_weight,
    columns_of,
    draw_rows,
    layer_shape,
    rows_of,
    write_columns,
)

IMPORTANCES = ("mean_abs", "frobenius", "nuclear", "grad_b")
KEYS = ("gradient", "seen", "skipped", "importance")  # state of one pair, kept under its B


def plan_for(pairs: Sequence[LoraPair], importances: Sequence[float], g: Mapping[str, Any]) -> RankPlan:
    """Return the ranks that a param group's settings give pairs of these importances."""
    shapes = {pair.name: layer_shape(pair) for pair in pairs}
    names = {key: g[key] for key in ("rank", "min_rank", "max_rank", "allocation", "budget_weight")}
    return allocate(dict(zip(shapes, importances, strict=True)), shapes, **names)


class Calibration:
    """Sums of gradients of some pairs: of the base weights by hooks, or of B for ``"grad_b"``.

    Args:
        pairs: the pairs, in an order that every process shares.
        importance: one of `IMPORTANCES`.
        offload: keep sums of base gradients on the CPU.
        group: processes to sum over at the end.
    """

    def __init__(
        self, pairs: Sequence[LoraPair], importance: str, offload: bool, group: dist.ProcessGroup | None
    ) -> None:
        self.pairs = list(pairs)
        self.importance = importance
        self._group = group
        self.capture = None if importance == "grad_b" else BaseGradients(pairs, offload)
        self._own_sums: dict[LoraPair, Tensor] = {}
        self._own_seen: dict[LoraPair, Tensor] = {}
        self.skipped = torch.zeros(())
        self.last: dict[LoraPair, Tensor] = {}  # importances at the step before, for convergence
        if self.capture is not None:
            self.capture.attach()

    @property
    def sums(self) -> dict[LoraPair, Tensor]:
        """Σ gradients by pair: ``(d_out, d_in)``, or shaped like B for ``"grad_b"``."""
        return self._own_sums if self.capture is None else self.capture.sums

    @property
    def seen(self) -> dict[LoraPair, Tensor]:
        """Steps behind each sum, 0-d."""
        return self._own_seen if self.capture is None else self.capture.seen

    @property
    def staged(self) -> bool:
        """Whether gradients wait beside the sums until their step is known to be finite."""
        return self.capture is not None and self.capture.staged

    # ------------------------------------------------------------------ step by step

    def record(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Take in the gradients of one step, divided by the loss scale, and count it if anything was not finite."""
        if self.capture is None:
            self._record_b(found_inf, grad_scale)
            return
        flags = [flag.to(self.skipped.device) for flag in self.capture.broken.values()]
        flags += [] if found_inf is None else [found_inf.bool().any().to(self.skipped.device)]
        if flags:
            self.skipped = self.skipped + torch.stack(flags).any()
        if found_inf is not None and grad_scale is None:
            grad_scale = self._unscaled_by()
        # only a GradScaler drops a step after its backward: from then on what came waits beside the sums
        self.capture.commit(None if found_inf is None else ~found_inf.bool().any(), grad_scale)
        self.capture.staged = self.capture.staged or found_inf is not None

    def _unscaled_by(self) -> Tensor:
        """Return by what ∂L/∂B has been divided since the backward, as least squares of s G Aᵀ over all layers say it.

        After ``scaler.unscale_`` nobody tells the loss scale, which the hooks have seen; clipping is in it as well.
        """
        parts: list[Tensor] = []
        for pair, G in () if self.capture is None else self.capture.fresh().items():
            if pair.B.grad is not None:
                C = pair.scaling * G.to(pair.B.device) @ rows_of(pair).mT.to(G.dtype)
                held = columns_of(pair, pair.B.grad).to(C.dtype)
                parts.append(torch.stack([C.square().sum(), (C * held).sum()]).to(self.skipped.device))
        total = torch.stack(parts).double().sum(0) if parts else torch.zeros(2, dtype=torch.float64)
        return torch.where(total[1] > 0, total[0] / total[1], 1.0)

    def _record_b(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        live = [(pair, pair.B.grad) for pair in self.pairs if pair.B.grad is not None]
        flags = [(~grad.isfinite().all()).to(self.skipped.device) for _, grad in live]
        flags += [] if found_inf is None else [found_inf.bool().any().to(self.skipped.device)]
        if not flags:
            return
        broken = torch.stack(flags).any()
        self.skipped = self.skipped + broken
        for pair, grad in live:
            bad = broken.to(grad.device)
            part = grad.to(compute_dtype(grad.dtype), copy=True)
            part = torch.where(bad, 0.0, part if grad_scale is None else part / grad_scale.to(grad.device))
            self._own_sums[pair] = self._own_sums[pair].add_(part) if pair in self._own_sums else part
            self._own_seen[pair] = self._own_seen.get(pair, torch.zeros((), device=bad.device)) + ~bad

    def start_anew(self, changed: Sequence[LoraPair], generator: torch.Generator | None) -> int:
        """Set B to zero in ``changed``, and draw A where it is zero and B's gradient is wanted (PEFT's embeddings).

        Returns:
            How many pairs that concerned; if any, what was summed is forgotten.
        """
        turned = [pair for pair in self.pairs if self.capture is None and not pair.A.any()]
        for pair in turned:
            draw_rows(pair, generator)
        for pair in (anew := [*changed, *turned]):
            pair.B.data.zero_()
        if anew:
            self.forget()
        return len(anew)

    def forget(self) -> None:
        """Forget all that was summed."""
        for held in (self.sums, self.seen, self.last):
            held.clear()
        if self.capture is not None:
            self.capture.forget()

    def save(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Put views of everything into the optimizer's state, under each B."""
        for pair in self.pairs:
            if pair in self.seen:
                own = {"gradient": self.sums[pair], "seen": self.seen[pair], "skipped": self.skipped}
                states[pair.B].update(own | ({"importance": self.last[pair]} if pair in self.last else {}))

    def load(self, states: Mapping[Tensor, dict[str, Any]], staged: bool) -> None:
        """Take over what `save` has put there."""
        if self.capture is not None:
            self.capture.staged = staged
        for pair in self.pairs:
            state = states.get(pair.B, {})
            if "gradient" in state:
                self.sums[pair], self.seen[pair] = state["gradient"], state["seen"]
                self.skipped = state["skipped"].to(self.skipped.device)
            if "importance" in state:
                self.last[pair] = state["importance"]

    def restore(
        self,
        sums: Sequence[Mapping[str, Tensor]],
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
    ) -> None:
        """Put sums that were saved parameter by parameter back into the state, and take them over."""
        params = [p for g in groups for p in g["params"]]
        for p, kept in zip(params, sums, strict=True):
            for key, value in kept.items():
                device = "cpu" if key == "gradient" and groups[0]["offload"] else p.device
                states[p][key] = value.to(device, copy=True)
        self.load(states, groups[0]["staged"])

    # ------------------------------------------------------------------ at the end

    def complete(self, pairs: Sequence[LoraPair]) -> bool:
        """Whether some step had a finite gradient in some process. ValueError if one had, but not in every layer."""
        if not pairs:
            raise ValueError("all adapters were frozen during the calibration: none is left to start")
        device = pairs[0].B.device
        seen = torch.stack([self.seen.get(pair, torch.zeros(())).to(device, copy=True) for pair in pairs])
        all_reduce_sums([seen], self._group)
        reached = (seen > 0).tolist()
        never = [pair.name for pair, hit in zip(pairs, reached, strict=True) if not hit]
        if never and any(reached):
            raise ValueError(
                f"{len(never)} layers never received a finite gradient ({', '.join(never[:5])}): freeze their adapters "
                "(requires_grad_(False)) to leave them out, and call step again"
            )
        return not never

    def reduce(self, pairs: Sequence[LoraPair]) -> None:
        """Sum over the processes, a layer at a time."""
        if world_size(self._group) == 1:
            return
        for pair in pairs:
            d_in, d_out = layer_shape(pair)
            device, dtype = pair.B.device, compute_dtype(pair.B.dtype)
            empty = torch.zeros(pair.B.shape if self.capture is None else (d_out, d_in), dtype=dtype)
            held = self.sums.get(pair, empty)
            seen = self.seen.get(pair, torch.zeros(())).to(device, copy=True)
            total = held.to(device, dtype, copy=True)
            all_reduce_sums([total, seen], self._group)
            self.sums[pair], self.seen[pair] = total.to(held.device), seen

    def mean(self, pair: LoraPair) -> Tensor:
        """Return the mean gradient over the steps that are in it, on the device of the pair."""
        total = self.sums[pair].to(pair.B.device)
        return total / self.seen[pair].to(total.device).clamp(min=1)

    def importances(self, pairs: Sequence[LoraPair], generator: torch.Generator | None) -> list[Tensor]:
        """Return I_l of each pair as 0-d float64, the same in every process."""
        found = [self._importance(pair, generator).double().to(pairs[0].B.device) for pair in pairs]
        values = torch.stack(found)
        all_reduce_sums([values], self._group)  # of equal numbers after `reduce`, but for the draws of "nuclear"
        return list((values / world_size(self._group)).unbind())

    def _importance(self, pair: LoraPair, generator: torch.Generator | None) -> Tensor:
        if pair not in self.sums:
            return torch.zeros(())
        G = self.mean(pair)
        if self.importance == "mean_abs":
            return mean_abs(base_weight(pair).to(G.device), G)
        return nuclear(G, generator=generator) if self.importance == "nuclear" else frobenius(G)

    def settled(self, tolerance: float, generator: torch.Generator | None) -> bool:
        """Whether every importance has moved by less than ``tolerance`` of itself since the last call."""
        pairs = [pair for pair in self.pairs if pair in self.seen]
        if world_size(self._group) > 1:
            pairs = self.pairs  # what this process has not seen counts as zero here, in all alike
        if not pairs:
            return False
        values = self.importances(pairs, generator)
        before, self.last = self.last, dict(zip(pairs, values, strict=True))
        if any(pair not in before for pair in pairs):
            return False
        old, new = torch.stack([before[pair].to(values[0].device) for pair in pairs]), torch.stack(values)
        return bool(((new - old).abs() <= tolerance * old.abs()).all())

    def place(
        self, pairs: Sequence[LoraPair], ranks: Mapping[str, int], g: Mapping[str, Any], generator: Any
    ) -> dict[LoraPair, Tensor]:
        """Give every pair its rank and its A, and return its B₀ ``(d_out, rank)`` for lr₀ = 1. Ends with the sums."""
        before = {pair: pair.scaling for pair in pairs}
        for pair in pairs:
            if g["resize"]:
                resize_pair(pair, ranks[pair.name], keep_scaling=g["keep_scaling"], generator=generator)
            if not pair.A.any():
                draw_rows(pair, generator)
        share_rows(pairs, self._group)
        starts = {}
        for pair in pairs:
            starts[pair] = self._start(pair, ranks[pair.name], before[pair])
            del self.sums[pair]
        return starts

    def _start(self, pair: LoraPair, rank: int, scaling: float) -> Tensor:
        """B₀ from the first rows of A as they are now; ``scaling`` is s at the time of the gradients."""
        A, G = rows_of(pair)[:rank], self.mean(pair)
        # with B = 0: ∂L/∂B = s Ḡ Aᵀ
        M = columns_of(pair, G)[:, :rank] / scaling if self.capture is None else G @ A.mT.to(G.dtype)
        return compressed_start(M, A, pair.scaling, step_size(1.0, rank, A.shape[1]))


def write_start(pair: LoraPair, start: Tensor, init_lr: float) -> None:
    """Write lr₀ B₀ into B; directions beyond those of ``start`` become zero in both factors and stay so.

    A zero row of A and a zero column of B have no gradient, so any optimizer without noise leaves them alone.
    """
    r = start.shape[1]
    write_columns(pair, torch.nn.functional.pad(init_lr * start, (0, pair.rank - r)))
    pair.A.data.movedim(pair.dim_A, 0)[r:].zero_()


def share_rows(pairs: Sequence[LoraPair], group: dist.ProcessGroup | None) -> None:
    """Give every process the A of the first."""
    if world_size(group) == 1:
        return
    if dist.get_rank(group) != 0:
        for pair in pairs:
            pair.A.data.zero_()
    all_reduce_sums([pair.A.data for pair in pairs], group)
