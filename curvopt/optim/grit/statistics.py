"""What a step observes of S_u and S_d: three sources, one form, into one average."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.distributed import all_reduce_grams, world_size
from curvopt.functional import compute_dtype
from curvopt.lora import Capture, LoraPair
from curvopt.ops import Ops
from curvopt.optim.stacks import Side, Stack

# one observation per side of a stack [L, r, r], and the rows behind each [L]; NaN for a pair nobody observed
Observation = tuple[Tensor, Tensor]


class Observer:
    """Watches the pairs of one optimizer and averages what it sees.

    Args:
        sides: the optimizer's sides.
        pairs: their pairs, in an order that every process shares.
        process_group: processes to sum over.
        ops: the optimizer's ops.
    """

    def __init__(
        self, sides: Sequence[Side], pairs: Sequence[LoraPair], process_group: dist.ProcessGroup | None, ops: Ops
    ) -> None:
        self.capture = Capture(pairs, ops, static=any(s.group["capturable"] for s in sides))
        self._ops = ops
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
        self, stacks: Sequence[Stack], found_inf: dict[torch.device, Tensor], grad_scale: Tensor | None
    ) -> None:
        """Take this step's S_u and S_d into the factors of ``stacks``: S ← S + w (zᵀz/N − S)."""
        by_source: dict[str, list[Stack]] = {"activation": [], "gradient": [], "weight": []}
        for stack in stacks:
            by_source[source(stack.sides[0])].append(stack)
        seen = self._seen(by_source["activation"])
        observed = from_activations(by_source["activation"], seen, grad_scale, world_size(self._process_group))
        observed += from_gradients(by_source["gradient"]) + from_weights(by_source["weight"])
        for stack, (S_new, rows) in zip([s for group in by_source.values() for s in group], observed, strict=True):
            state, g = stack.state, stack.group
            decay = 0.0 if g["statistics"] == "weight" else g["factor_decay"]
            took = self._ops("ema_", state["factor"], S_new, state["observed"], decay, found_inf[stack.device])
            state["rows"].add_(torch.where(took, rows, 0.0))

    def _seen(self, stacks: Sequence[Stack]) -> dict[LoraPair, tuple[Tensor, Any]]:
        """Return Σ uᵀu and Σ dᵀd and N of each pair of ``stacks`` that any process saw since the last step."""
        live = {side.pair for s in stacks for side in s.sides}
        if not live:
            return {}
        sums = self.capture.pop()
        pairs = [p for p in self.capture.pairs if p in live]
        self._warn([p.name for p in pairs if p not in sums and not self.capture.fired[p]])
        if world_size(self._process_group) == 1:
            return {p: (sums[p].both, sums[p].n) for p in pairs if p in sums}
        totals = [sums[p].both if p in sums else _zeros(p) for p in pairs]
        n = _column([sums[p].n if p in sums else 0 for p in pairs], totals[0].device)
        n = all_reduce_grams(totals, self._process_group, n)
        rows = torch.where(n > 0, n, torch.nan).unbind()
        return dict(zip(pairs, zip(totals, rows, strict=True), strict=True))

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


def from_activations(
    stacks: Sequence[Stack],
    seen: Mapping[LoraPair, tuple[Tensor, Any]],
    grad_scale: Tensor | None,
    world: int,
) -> list[Observation]:
    """S_u = Σ uᵀu / N and S_d = N Σ dᵀd, over all micro-batches and processes since the last step.

    The loss is a mean over N rows, so d carries 1/N: (N d)ᵀ(N d)/N = N dᵀd. Under DDP the loss is also a mean over W
    processes, whose d are therefore W times too large; under a GradScaler they carry its scale.

    Args:
        stacks: what to observe.
        seen: Σ uᵀu and Σ dᵀd ``[2, r, r]`` and N by pair.
        grad_scale: the loss scale, or None.
        world: W, the number of processes whose sums are in.
    """
    observed = []
    for stack in stacks:
        r, device = stack.r, stack.device
        nothing = (torch.full((2, r, r), torch.nan, dtype=stack.compute_dtype, device=device), torch.nan)
        found = [seen.get(s.pair, nothing) for s in stack.sides]
        side, n = "ud".index(stack.sides[0].moment()), _column([n for _, n in found], device)
        S = torch.stack([both[side] for both, _ in found])
        if side == 0:
            S = S / n[:, None, None]
        else:
            unscale = 1.0 if grad_scale is None else grad_scale.to(device).double().square()
            S = S * (n / (unscale * world**2))[:, None, None]
        observed.append((S.to(stack.compute_dtype), n))
    return observed


def from_gradients(stacks: Sequence[Stack]) -> list[Observation]:
    """S_u → ∇Bᵀ∇B and S_d → ∇A∇Aᵀ: Shampoo's statistics restricted to the rank side. One row a step."""
    return _grams(stacks, [s.stacked_grads for s in stacks], {"A": "d", "B": "u"})


def from_weights(stacks: Sequence[Stack]) -> list[Observation]:
    """S_u → A Aᵀ and S_d → BᵀB: Riemannian preconditioned LoRA (arXiv 2402.02347). One row a step."""
    return _grams(stacks, [s.weights().to(s.compute_dtype) for s in stacks], {"A": "u", "B": "d"})


def _grams(stacks: Sequence[Stack], matrices: Sequence[Tensor], which: dict[str, str]) -> list[Observation]:
    found: dict[tuple[LoraPair, str], Tensor] = {}
    grams = [X @ X.mT if s.rank_dim == 1 else X.mT @ X for s, X in zip(stacks, matrices, strict=True)]
    shared: dict[Any, list[Tensor]] = {}
    for stack, G in zip(stacks, grams, strict=True):
        if stack.shards is not None and stack.shards.group is not None:
            shared.setdefault(stack.shards.group, []).append(G)  # a sum over the rows that this process holds
    for group, pieces in shared.items():
        all_reduce_grams(pieces, group)
    for stack, G in zip(stacks, grams, strict=True):
        found |= {(s.pair, which[s.name]): S for s, S in zip(stack.sides, G.unbind(), strict=True)}
    observed = []
    for stack in stacks:
        nothing = torch.full_like(stack.state["factor"][0], torch.nan)  # the partner is frozen or idle
        S = torch.stack([found.get((s.pair, s.moment()), nothing) for s in stack.sides])
        observed.append((S, torch.ones(len(stack.sides), dtype=torch.float64, device=stack.device)))
    return observed


def _column(numbers: list[Any], device: torch.device) -> Tensor:
    """Return numbers, or 0-d tensors, as one float64 tensor, made on the device: an upload cannot be captured."""
    pieces = []
    for number, run in itertools.groupby(numbers, lambda n: (id(n),) if isinstance(n, Tensor) else n):
        first, *others = run
        if isinstance(first, Tensor):
            pieces.append(first.to(device, torch.float64).expand(1 + len(others)))
        else:
            pieces.append(torch.full((1 + len(others),), number, dtype=torch.float64, device=device))
    return torch.cat(pieces)


def _zeros(pair: LoraPair) -> Tensor:
    """Return the sums of a pair that this process did not see."""
    A = pair.A
    return torch.zeros(2, pair.rank, pair.rank, dtype=compute_dtype(A.dtype), device=A.device)
