"""What GoRAInit gathers before it decides: per layer a sum of gradients and how many steps are in it."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.distributed import (
    all_reduce_sums,
    is_sharded,
    local,
    used_directions,
    whole,
    world_size,
)
from curvopt.functional import compute_dtype
from curvopt.functional.gradient_init import compressed_start, frobenius, mean_abs, nuclear, step_size
from curvopt.functional.ranks import RankPlan, allocate
from curvopt.functional.whitening import Whitening, scaled_like, whitened_rows
from curvopt.lora import LoraPair, resize_pair
from curvopt.lora.gradients import (
    BaseGradients,
    base_weight,
    columns_of,
    draw_rows,
    layer_shape,
    rows_of,
    write_columns,
    write_rows,
)
from curvopt.optim.gora.products import FACTORS, Products

Importance = Literal["mean_abs", "frobenius", "nuclear", "grad_b"]
Start = Literal["gora", "whitened", "whitened-random"]
Compare = Literal["all", "role"]
IMPORTANCES, STARTS, COMPARED = get_args(Importance), get_args(Start), get_args(Compare)
# state of one pair, kept under its B
KEYS = ("gradient", "right", "left", *FACTORS, "seen", "skipped", "importance", "known",
        "input_V", "input_w", "input_c", "output_V", "output_w", "output_c")  # fmt: skip


def plan_for(
    pairs: Sequence[LoraPair],
    importances: Sequence[float],
    g: Mapping[str, Any],
    spectra: Mapping[str, Sequence[float]] | None = None,
) -> RankPlan:
    """Return the ranks that a param group's settings give pairs of these importances and spectra."""
    shapes = {pair.name: layer_shape(pair) for pair in pairs}
    rank = {pair.name: uniform_rank(g, pair) for pair in pairs} if g["rank"] is None else g["rank"]
    least, most = bounds(g, pairs)
    return allocate(
        dict(zip(shapes, importances, strict=True)), shapes, rank=rank, min_rank=least, max_rank=most,
        allocation=g["allocation"], budget_weight=g["budget_weight"], spectra=spectra,
        groups={pair.name: role(pair) for pair in pairs} if g["compare"] == "role" else None,
    )  # fmt: skip


def role(pair: LoraPair) -> str:
    """Return the name of the module that holds the layer, such as "self_attn" or "mlp"; numbers name nothing."""
    words = [word for word in pair.path.split(".")[:-1] if not word.isdigit()]
    return words[-1] if words else ""


def uniform_rank(g: Mapping[str, Any], pair: LoraPair) -> int:
    """Return the rank that uniform adapters would have: the one asked for, or that which the pair was built with."""
    return int(pair.rank if g["rank"] is None else g["rank"])


def stays(g: Mapping[str, Any], pair: LoraPair) -> bool:
    """Return whether a pair keeps its rank and its scaling, whatever is measured."""
    rank = min(uniform_rank(g, pair), *layer_shape(pair))
    return bool(g["allocation"] == "uniform" and rank == pair.rank and g["keep_scaling"])


def bounds(g: Mapping[str, Any], pairs: Sequence[LoraPair]) -> tuple[int, int]:
    """Return the least and the largest rank of a layer: as given, or half and four times the uniform ranks."""
    ranks = [uniform_rank(g, pair) for pair in pairs] or [1]
    least, most = g["min_rank"], g["max_rank"]
    return max(1, min(ranks) // 2) if least is None else least, 4 * max(ranks) if most is None else most


def largest_rank(g: Mapping[str, Any], pairs: Sequence[LoraPair]) -> int:
    """Return the largest rank that a plan under these settings may give."""
    if g["allocation"] == "uniform":
        return max((uniform_rank(g, pair) for pair in pairs), default=1)
    return bounds(g, pairs)[1]


class Calibration:
    """Sums of gradients of some pairs: of the base weights by hooks, or of B for ``"grad_b"``.

    Args:
        pairs: the pairs, in an order that every process shares.
        g: settings, as in a param group of `GoRAInit`.
        group: processes to sum over at the end.
        spectra: measure the spectra of R_g Ḡ R_x, whatever the settings need.
    """

    def __init__(
        self, pairs: Sequence[LoraPair], g: Mapping[str, Any], group: dist.ProcessGroup | None, spectra: bool = False
    ) -> None:
        self.pairs = list(pairs)
        self.importance = g["importance"]
        self._g, self._group = g, group
        ranked = g["allocation"] in ("exact", "paper")
        sketch = spectra or g["start"] == "whitened" or g["allocation"] == "spectrum"
        self.products = Products(
            gradient=ranked or g["start"] == "gora", sketch=sketch,
            factors=g["start"] == "whitened-random" and not sketch, largest=largest_rank(g, pairs),
        )  # fmt: skip
        hooks = self.importance != "grad_b" or not self.products.gradient or spectra
        self.capture = BaseGradients(pairs, g["offload"], self.products, group) if hooks else None
        self._own_sums: dict[LoraPair, dict[str, Tensor]] = {}
        self._own_seen: dict[LoraPair, Tensor] = {}
        self.skipped = torch.zeros((), dtype=torch.float32)
        self.last: dict[LoraPair, Tensor] = {}  # importances at the step before, for convergence
        self.known: dict[LoraPair, Tensor] = {}  # steps that went into R_x and R_g, and not into the sketch
        self._skipped_before = 0.0  # at the last look at the importances
        self._spectra: dict[LoraPair, tuple[Tensor, Tensor]] = {}  # of the present sums
        if self.capture is not None:
            self.capture.attach()

    @property
    def sums(self) -> dict[LoraPair, dict[str, Tensor]]:
        """Sums by pair and name; "gradient" is ``(d_out, d_in)``, or shaped like B for ``"grad_b"``."""
        return self._own_sums if self.capture is None else self.capture.sums

    @property
    def seen(self) -> dict[LoraPair, Tensor]:
        """Steps behind each sum, 0-d."""
        return self._own_seen if self.capture is None else self.capture.seen

    # ------------------------------------------------------------------ step by step

    def record(self) -> None:
        """Take in the gradients of one step, and count it if anything was not finite.

        Raises:
            ValueError: a backward with ``create_graph=True`` went through a layer.
        """
        self._spectra.clear()
        if self.capture is None:
            self._record_b()
            return
        if self.capture.differentiable:
            name = self.capture.differentiable
            self.capture.discard()
            raise ValueError(
                f"importance must be 'grad_b' where a backward runs with create_graph=True (through {name}): the "
                "gradient of a base weight that is differentiated again is not what passes through its layer"
            )
        self.skipped = self.skipped + self.capture.commit().to(self.skipped.device)
        if self.products.sketch:
            self._learn()

    def _learn(self) -> None:
        """Fix R_x and R_g of the layers that were reached for the first time, alike in all processes."""
        new = [pair for pair in self.pairs if pair not in self.products.maps]
        if not new:
            return
        seen = self._seen_anywhere(new)
        for pair, hit in zip(new, (seen > 0).tolist(), strict=True):
            if hit:
                self._sum_over_processes(pair, FACTORS)
                own = self.sums[pair]
                self.products.learn(pair, own)
                for name in FACTORS:
                    del own[name]
                self.known[pair] = self.seen.get(pair, torch.zeros((), dtype=torch.float32)).clone()

    def _record_b(self) -> None:
        live = [(pair, whole(pair.B.grad)) for pair in self.pairs if pair.B.grad is not None]
        if not live:
            return
        flags = [(~grad.isfinite().all()).to(self.skipped.device) for _, grad in live]
        broken = torch.stack(flags).any()
        self.skipped = self.skipped + broken
        for pair, grad in live:
            bad = broken.to(grad.device)
            part = grad.to(compute_dtype(grad.dtype), copy=True)
            part = torch.where(bad, 0.0, part)
            held = self._own_sums.setdefault(pair, {})
            held["gradient"] = held["gradient"].add_(part) if held else part
            self._own_seen[pair] = (~bad).float() + self._own_seen.get(pair, 0.0)

    def start_anew(self, changed: Sequence[LoraPair], generator: torch.Generator | None) -> int:
        """Set B to zero in ``changed``, and draw A where it is zero (PEFT's embeddings) and B's gradient is wanted.

        It is wanted for ``"grad_b"``, and where it alone tells of a scaled or clipped gradient.

        Returns:
            How many pairs that concerned; if any, what was summed is forgotten.
        """
        zero = empty(self.pairs)
        turned = zero if self.capture is None or len(zero) == len(self.pairs) else []
        for pair in turned:
            draw_rows(pair, generator)
        for pair in (anew := [*changed, *turned]):
            local(pair.B.detach()).zero_()
        if anew:
            self.forget()
        return len(anew)

    def forget(self) -> None:
        """Forget all that was summed."""
        for held in (self.sums, self.seen, self.last, self.known, self._spectra):
            held.clear()
        self.products.forget()
        if self.capture is not None:
            self.capture.forget()

    def save(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Put views of everything into the optimizer's state, under each B."""
        for pair in self.pairs:
            if pair in self.seen:
                own = {**self.sums.get(pair, {}), "seen": self.seen[pair], "skipped": self.skipped}
                own |= {"importance": self.last[pair]} if pair in self.last else {}
                if pair in self.products.maps:
                    own["known"] = self.known[pair]
                    for side, R in zip(("input", "output"), self.products.maps[pair], strict=True):
                        own |= {f"{side}_V": R.V, f"{side}_w": R.w, f"{side}_c": R.c}
                states[pair.B] = own

    def load(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Take over what `save` has put there."""
        for pair in self.pairs:
            state = states.get(pair.B, {})
            if "seen" in state:
                self.sums[pair] = {k: state[k] for k in ("gradient", "right", "left", *FACTORS) if k in state}
                self.seen[pair] = state["seen"]
                self.skipped = state["skipped"].to(self.skipped)
                self._skipped_before = float(self.skipped)
            if "importance" in state:
                self.last[pair] = state["importance"]
            if "known" in state:
                self.known[pair] = state["known"]
                R = [Whitening(*(state[f"{side}_{part}"] for part in "Vwc")) for side in ("input", "output")]
                self.products.maps[pair] = (R[0], R[1])

    def restore(
        self,
        sums: Sequence[Mapping[str, Tensor]],
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
    ) -> None:
        """Put sums that were saved parameter by parameter back into the state, and take them over."""
        params = [p for g in groups for p in g["params"]]
        summed = ("gradient", "right", "left", *FACTORS)
        for p, kept in zip(params, sums, strict=True):
            for key, value in kept.items():
                device = "cpu" if key in summed and groups[0]["offload"] else p.device
                states[p][key] = value.to(device, copy=True)
        self.load(states)

    # ------------------------------------------------------------------ at the end

    def complete(self, pairs: Sequence[LoraPair], patient: bool = False) -> bool:
        """Whether some step had a finite gradient in some process; of whitened starts, beside that which made R.

        If ``patient``, layers that had the latter alone are waited for.

        Raises:
            ValueError: one had, but not in every layer; or B had some, but nothing passed through the layer's hook.
        """
        if not pairs:
            raise ValueError("all adapters were frozen during the calibration: none is left to start")
        seen = self._seen_anywhere(pairs)
        reached = (seen > 0).tolist()
        never = [pair for pair, hit in zip(pairs, reached, strict=True) if not hit]
        self._check_reached(never)
        lost = [pair for pair in never if pair not in self.products.maps]
        if never and any(reached) and (lost or not patient):
            names = ", ".join(pair.name for pair in (lost or never)[:5])
            had = "never received a finite gradient" if lost else "received one finite gradient, which measured R alone"
            raise ValueError(
                f"{len(lost or never)} layers {had} ({names}): freeze their adapters (requires_grad_(False)) to leave "
                "them out, or go on with batches that reach them, and call step again"
            )
        return not never

    def _check_reached(self, pairs: Sequence[LoraPair]) -> None:
        """Raise a ValueError if gradients reached the B of such pairs in some process, and no hook was called."""
        if not pairs or self.capture is None:
            return
        none = torch.zeros((), dtype=torch.bool)
        flags = [self.capture.bypassed.get(pair, none).to(pairs[0].B.device, torch.float32) for pair in pairs]
        total = torch.stack(flags)
        all_reduce_sums([total], self._group)
        around = [pair.name for pair, n in zip(pairs, total.tolist(), strict=True) if n]
        if around:
            raise ValueError(
                "importance must be 'grad_b' with start='gora', which need no hooks, where the forward bypasses the "
                f"layers, got {self.importance!r} with {self._g['start']!r}: {len(around)} layers "
                f"({', '.join(around[:5])}) had a gradient of B, but their hooks were not called, as where a fused "
                "forward reads their weights. Where the model was compiled and run before this optimizer was made, "
                "call torch.compiler.reset() instead"
            )

    def _seen_anywhere(self, pairs: Sequence[LoraPair]) -> Tensor:
        """Return by pair the steps of all processes whose gradients are in the sums, without those that made R."""
        none = torch.zeros((), dtype=torch.float32)
        counts = [self.seen.get(pair, none).to(pairs[0].B.device) - self.known.get(pair, none).to(pairs[0].B.device)
                  for pair in pairs]  # fmt: skip
        seen = torch.stack(counts)
        all_reduce_sums([seen], self._group)
        return seen

    def reduce(self, pairs: Sequence[LoraPair]) -> None:
        """Sum over the processes, a layer at a time."""
        for pair in pairs:
            self._sum_over_processes(pair, self._names(pair))
            for counts in (self.seen, self.known):
                if pair in counts or (counts is self.seen and world_size(self._group) > 1):
                    total = counts.get(pair, torch.zeros((), dtype=torch.float32)).to(pair.B.device, copy=True)
                    all_reduce_sums([total], self._group)
                    counts[pair] = total
            if self.products.factors:
                self.products.learn(pair, self.sums[pair])

    def _names(self, pair: LoraPair) -> list[str]:
        """Return what is summed of a pair now, alike in all processes."""
        names = ["gradient"] if self.capture is None or self.products.gradient else []
        if self.products.sketch and pair in self.products.maps:
            names += ["right", "left"]
        return [*names, *(FACTORS if self.products.factors else ())]

    def _sum_over_processes(self, pair: LoraPair, names: Sequence[str]) -> None:
        if world_size(self._group) == 1:
            return
        d_in, d_out = layer_shape(pair)
        left, right = self.products.tests(pair)
        (m, l), dtype = (left.shape[1], right.shape[1]), compute_dtype(pair.B.dtype)
        shapes: dict[str, Any] = {
            "gradient": pair.B.shape if self.capture is None else (d_out, d_in), "right": (d_out, l), "left": (m, d_in),
            "input_sketch": (d_in, l), "output_sketch": (d_out, m), "traces": (2,),
        }  # fmt: skip
        own = self.sums.setdefault(pair, {})
        for name in names:
            held = own.get(name, torch.zeros(shapes[name], dtype=dtype))
            total = held.to(pair.B.device, dtype, copy=True)
            all_reduce_sums([total], self._group)
            own[name] = total.to(held.device)

    def mean(self, pair: LoraPair) -> Tensor:
        """Return the mean gradient over the steps that are in it, on the device of the pair."""
        total = self.sums[pair]["gradient"].to(pair.B.device)
        return total / self.seen[pair].to(total.device).clamp(min=1)

    def spectrum(self, pair: LoraPair) -> tuple[Tensor, Tensor]:
        """Return σ and V of R_g Ḡ R_x with Ḡ the mean over the steps behind the sketch; found once for all sums."""
        if pair not in self._spectra:
            self._spectra[pair] = self._spectrum(pair)
        return self._spectra[pair]

    def _spectrum(self, pair: LoraPair) -> tuple[Tensor, Tensor]:
        steps = (self.seen[pair].to(pair.B.device) - self.known[pair].to(pair.B.device)).clamp(min=1)
        own = self.sums[pair]
        return self.products.spectrum(pair, {k: own[k].to(pair.B.device) / steps for k in ("right", "left")})

    def spectra(self, pairs: Sequence[LoraPair]) -> dict[str, list[float]] | None:
        """Return σ² by name; None if the settings need no sketch."""
        if not self.products.sketch:
            return None
        return {pair.name: self.spectrum(pair)[0].square().tolist() for pair in pairs}

    def importances(self, pairs: Sequence[LoraPair], generator: torch.Generator | None) -> list[Tensor]:
        """Return I_l of each pair as 0-d float64, the same in every process."""
        found = [self._importance(pair, generator).double().to(pairs[0].B.device) for pair in pairs]
        values = torch.stack(found)
        all_reduce_sums([values], self._group)  # of equal numbers after `reduce`, but for the draws of "nuclear"
        return list((values / world_size(self._group)).unbind())

    def _importance(self, pair: LoraPair, generator: torch.Generator | None) -> Tensor:
        W = base_weight(pair) if self.importance == "mean_abs" else None  # of all processes, where it is sharded
        if "gradient" not in self.sums.get(pair, {}):
            return torch.zeros((), dtype=torch.float64)
        G = self.mean(pair)
        if W is not None:
            return mean_abs(W.to(G.device), G)
        return nuclear(G, generator=generator) if self.importance == "nuclear" else frobenius(G)

    def settled(self, tolerance: float, generator: torch.Generator | None) -> bool:
        """Whether every importance has moved by less than ``tolerance`` of itself since the last call.

        Not if a gradient was dropped in between: that none moved then says nothing.
        """
        dropped = (self.skipped - self._skipped_before).to(self.pairs[0].B.device)
        all_reduce_sums([dropped], self._group)
        self._skipped_before = float(self.skipped)
        if dropped > 0:
            return False
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
            if g["resize"] and not stays(g, pair):
                resize_pair(pair, ranks[pair.name], keep_scaling=g["keep_scaling"], generator=generator)
        for pair in empty(pairs):
            draw_rows(pair, generator)
        share([pair.A.data for pair in pairs if not is_sharded(pair.A)], self._group)
        starts, rows = {}, {}
        for pair in pairs:
            if g["start"] == "gora":
                starts[pair] = self._start(pair, ranks[pair.name], before[pair])
            else:
                rows[pair] = self._whitened(pair, ranks[pair.name], g["start"] == "whitened")
                starts[pair] = torch.zeros(layer_shape(pair)[1], ranks[pair.name], device=pair.B.device)
            self.sums.pop(pair, None)
        share(list(rows.values()), self._group)  # decompositions of equal numbers may differ by rounding
        for pair, own in rows.items():
            write_rows(pair, own)
        return starts

    def _whitened(self, pair: LoraPair, rank: int, aimed: bool) -> Tensor:
        """Return A's start ``(rank, d_in)``: Vᵀ R_x, or the rows that are there times R_x; the norm stays."""
        A, (R_x, _) = rows_of(pair)[:rank], self.products.maps[pair]
        if aimed:
            sigma, V = self.spectrum(pair)
            return whitened_rows(V, sigma, A, R_x)
        return scaled_like(R_x(A.double()), A.double())

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
    if r < pair.rank:
        write_rows(pair, rows_of(pair)[:r])


def empty(pairs: Sequence[LoraPair]) -> list[LoraPair]:
    """Return the pairs whose A is zero; reads the device."""
    used = used_directions([pair.A for pair in pairs], [pair.dim_A for pair in pairs])
    return [pair for pair, own in zip(pairs, used, strict=True) if not own.any()]


def share(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Give every process the tensors of the first, in place."""
    if world_size(group) == 1:
        return
    if dist.get_rank(group) != 0:
        for tensor in tensors:
            tensor.zero_()
    all_reduce_sums(tensors, group)
