"""Where a step's observation of S_u and S_d comes from: three sources, one form, into one average."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.distributed import all_reduce_sums, world_size
from curvopt.functional import compute_dtype
from curvopt.lora import Capture, LoraPair, Sums
from curvopt.ops import Ops
from curvopt.optim.stacks import Side, Stack

# (pair, "u" or "d") → a sum [r, r] and the number (or 0-d tensor) that makes it a moment
Observed = dict[tuple[LoraPair, str], tuple[Tensor, Any]]


class Observer:
    """Watches the pairs of one optimizer and averages what it sees.

    Args:
        sides: the optimizer's sides.
        pairs: their pairs, in an order that every process shares.
        process_group: processes to sum over.
    """

    def __init__(
        self, sides: Sequence[Side], pairs: Sequence[LoraPair], process_group: dist.ProcessGroup | None
    ) -> None:
        self.capture = Capture(pairs)
        self._sides = list(sides)
        self._process_group = process_group
        self._warned = False
        self.capture.attach()
        self.arm()

    def arm(self) -> None:
        """Let the hooks run only on the way to a step that will observe."""
        self.capture.active = any(
            s.group["statistics"] == "activation" and s.group["clock"] % s.group["factor_every"] == 0
            for s in self._sides
        )

    def observe(
        self, stacks: Sequence[Stack], found_inf: dict[torch.device, Tensor], grad_scale: Tensor | None, ops: Ops
    ) -> None:
        """Take this step's S_u and S_d into the factors of ``stacks``: S ← S + w (zᵀz/N − S)."""
        observed: Observed = {}
        rows: dict[LoraPair, Any] = {}
        by_source: dict[str, list[Stack]] = {"activation": [], "gradient": [], "weight": []}
        for stack in stacks:
            by_source[source(stack.sides[0])].append(stack)
        if by_source["activation"]:
            live = {side.pair for s in by_source["activation"] for side in s.sides}
            sums = self.capture.pop()
            pairs = [p for p in self.capture.pairs if p in live]
            observed, rows = from_activations(sums, pairs, grad_scale, self._process_group)
            self._warn([p.name for p in pairs if p not in sums and not self.capture.fired[p]])
        observed |= from_gradients(by_source["gradient"]) | from_weights(by_source["weight"])
        for stack in stacks:
            _take(stack, observed, rows, found_inf[stack.device], ops)

    def _warn(self, never: list[str]) -> None:
        if never and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(never)} pairs received gradients but their activations were never seen ({', '.join(never[:3])}"
                f"{', ...' if len(never) > 3 else ''}): no curvature acts on them. If the forward is fused, "
                'use statistics="gradient"',
                UserWarning,
                stacklevel=5,
            )


def source(side: Side) -> str:
    """Return the statistics a side really has: gradients where there is no module to observe."""
    wanted: str = side.group["statistics"]
    return "gradient" if wanted == "activation" and side.pair.signal is None else wanted


def _take(stack: Stack, observed: Observed, rows: dict[LoraPair, Any], found_inf: Tensor, ops: Ops) -> None:
    state = stack.state
    # a pair nobody observed this step has NaN, which ema_ does not take
    nothing = (torch.full_like(state["factor"][0], torch.nan), 1.0)
    found = [observed.get((s.pair, s.moment()), nothing) for s in stack.sides]
    S_new = torch.stack([S for S, _ in found]) * _column([scale for _, scale in found], stack.device)[:, None, None]
    S_new = S_new.to(state["factor"].dtype)
    decay = 0.0 if stack.group["statistics"] == "weight" else stack.group["factor_decay"]
    took = ops("ema_", state["factor"], S_new, state["observed"], decay, found_inf)
    n = _column([rows.get(s.pair, 1.0) for s in stack.sides], stack.device)
    state["rows"].add_(torch.where(took, n, 0.0))


def _column(numbers: list[Any], device: torch.device) -> Tensor:
    """Return numbers, or 0-d tensors, as one float64 tensor."""
    if any(isinstance(n, Tensor) for n in numbers):
        return torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers])
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)


def from_activations(
    sums: Mapping[LoraPair, Sums],
    pairs: Sequence[LoraPair],
    grad_scale: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Observed, dict[LoraPair, Any]]:
    """S_u = Σ uᵀu / N and S_d = N Σ dᵀd, over all micro-batches and processes since the last step.

    The loss is a mean over N rows, so d carries 1/N: (N d)ᵀ(N d)/N = N dᵀd. Under DDP the loss is also a mean over W
    processes, whose d are therefore W times too large; under a GradScaler they carry its scale.

    Args:
        sums: what each pair's hook summed on this process.
        pairs: all pairs in an order every process shares; a pair that no process saw gets no observation.
        grad_scale: the loss scale, or None.
        process_group: the processes to sum over.

    Returns:
        The observations by pair, and the rows N by pair: numbers, or 0-d tensors if they were summed over processes.
    """
    world = world_size(process_group)
    seen = [pair for pair in pairs if world > 1 or pair in sums]
    if not seen:
        return {}, {}
    totals = [sums[p].total if p in sums else _zeros(p) for p in seen]
    rows: list[Any] = [float(sums[p].n) if p in sums else 0.0 for p in seen]
    if world > 1:
        n = torch.tensor(rows, dtype=torch.float64, device=totals[0].device)
        all_reduce_sums([n, *totals], process_group)
        rows = list(torch.where(n > 0, n, torch.nan).unbind())  # nobody saw it: NaN, which is not taken
    observed: Observed = {}
    unscale = 1.0 if grad_scale is None else grad_scale.double().square().reciprocal()
    for pair, total, n in zip(seen, totals, rows, strict=True):
        r = total.shape[0] // 2
        observed[pair, "u"] = (total[:r, :r], 1 / n)
        observed[pair, "d"] = (total[r:, r:], n * unscale / world**2)
    return observed, dict(zip(seen, rows, strict=True))


def _zeros(pair: LoraPair) -> Tensor:
    """Return the sums of a pair that this process did not see."""
    A = pair.A
    return torch.zeros(2 * pair.rank, 2 * pair.rank, dtype=compute_dtype(A.dtype), device=A.device)


def from_gradients(stacks: Sequence[Stack]) -> Observed:
    """S_u → ∇Bᵀ∇B and S_d → ∇A∇Aᵀ: Shampoo's statistics restricted to the rank side."""
    return _grams(stacks, [s.grads for s in stacks], {"A": "d", "B": "u"})


def from_weights(stacks: Sequence[Stack]) -> Observed:
    """S_u → A Aᵀ and S_d → BᵀB: Riemannian preconditioned LoRA (arXiv 2402.02347)."""
    return _grams(stacks, [torch.stack(s.matrices).to(s.grads.dtype) for s in stacks], {"A": "u", "B": "d"})


def _grams(stacks: Sequence[Stack], matrices: Sequence[Tensor], which: dict[str, str]) -> Observed:
    observed: Observed = {}
    for stack, X in zip(stacks, matrices, strict=True):
        G = X @ X.mT if stack.rank_dim == 1 else X.mT @ X
        observed |= {(s.pair, which[s.name]): (S, 1.0) for s, S in zip(stack.sides, G.unbind(), strict=True)}
    return observed
