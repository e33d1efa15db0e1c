"""How small an adapter may be: its loss and size at every rank, and the smallest rank that is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from curvopt.lora.cut import Basis, Factors, truncated
from curvopt.lora.pair import LoraPair
from curvopt.lora.pairs import find_lora_pairs

Loss = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class RankLoss:
    """One row of the table.

    Attributes:
        rank: The rank of all pairs that have more.
        loss: Mean over the batches, in the unit of the loss.
        bytes: Of A and B of all pairs at that rank, in their dtypes: the tensors of an exported file.
    """

    rank: int
    loss: float
    bytes: int


@dataclass(frozen=True)
class RankChoice:
    """What `smallest_rank` found.

    Attributes:
        rank: The smallest rank measured whose loss is at most `limit`.
        limit: Loss of the full adapter plus the tolerance.
        table: One row per rank measured, ascending; the last is the full adapter.
    """

    rank: int
    limit: float
    table: tuple[RankLoss, ...]


def smallest_rank(
    model: nn.Module,
    batches: Iterable[Any],
    tolerance: float = 0.01,
    *,
    loss: Loss | None = None,
    ranks: Sequence[int] | None = None,
    basis: Basis = "svd",
    factors: Factors | None = None,
    adapter: str | None = None,
) -> RankChoice:
    """Measure a trained adapter at several ranks and pick the smallest that is within a tolerance of its full loss.

    Runs in evaluation mode and without gradients; weights, modes and hooks are restored afterwards. The adapter that is
    measured at a rank is the one that `export_adapter(model, path, ranks=rank, basis=basis)` writes.

    Args:
        model: The model with the adapter, trained by any optimizer.
        batches: Held-out batches, kept in memory while all ranks are measured; all have the same weight.
        tolerance: How much higher the loss may be than the full adapter's, relative to its absolute value, ≥ 0.
        loss: `loss(model, batch)`, a number or a 0-d tensor; None: `model(**batch).loss`.
        ranks: Ranks to measure, ascending, ≥ 1; None: powers of two. The largest rank of a pair is always measured.
        basis: As in `export_adapter`.
        factors: As in `export_adapter`.
        adapter: Only this PEFT adapter; None for all pairs of the model.

    Returns:
        The rank and the table of rank, loss and bytes.

    Raises:
        TypeError: If a batch is not a mapping and no `loss` is given; otherwise as `export_adapter`.
        ValueError: If there is no pair or no batch, the tolerance is negative, ranks do not ascend from at least 1 or
            exceed the largest, or the full adapter's loss is not finite; the model does not compute with the adapter,
            as in `truncated`; otherwise as `export_adapter`.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a finite number ≥ 0, got {tolerance!r}")
    pairs = find_lora_pairs(model, adapter)
    if not pairs:
        raise ValueError("model must have LoRA pairs, found none")
    kept = list(batches)
    if not kept:
        raise ValueError("batches must have at least one batch, got none")
    if loss is None:
        for batch in kept:
            if not isinstance(batch, Mapping):
                raise TypeError(f"batches must be mappings where loss is None, got {type(batch).__name__}")
    top = max(pair.rank for pair in pairs)
    table = []
    for rank in _measured(ranks, top):
        with truncated(model, rank, basis=basis, factors=factors, adapter=adapter):
            table.append(RankLoss(rank, _mean_loss(model, kept, loss), _bytes(pairs, rank)))
    full = table[-1].loss
    if not math.isfinite(full):
        raise ValueError(f"the loss of the full adapter must be finite, got {full!r}")
    limit = full + tolerance * abs(full)
    return RankChoice(next(row.rank for row in table if row.loss <= limit), limit, tuple(table))


def _measured(ranks: Sequence[int] | None, top: int) -> list[int]:
    """Return the ranks to measure, ascending, with the largest; or raise a ValueError."""
    if ranks is None:
        return [*(2**i for i in range((top - 1).bit_length())), top]
    listed = isinstance(ranks, (list, tuple)) and len(ranks) > 0
    whole = listed and all(isinstance(k, int) and not isinstance(k, bool) for k in ranks)
    if not whole or list(ranks) != sorted(set(ranks)) or not 1 <= ranks[0] <= ranks[-1] <= top:
        raise ValueError(f"ranks must be None or integers ascending from at least 1 to at most {top}, got {ranks!r}")
    return [*ranks, *([top] if ranks[-1] < top else [])]


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Sequence[Any], loss: Loss | None) -> float:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return sum(float(model(**b).loss if loss is None else loss(model, b)) for b in batches) / len(batches)
    finally:
        for module, training in modes:
            module.training = training


def _bytes(pairs: Sequence[LoraPair], rank: int) -> int:
    return sum(p.nbytes // pair.rank * min(rank, pair.rank) for pair in pairs for p in (pair.A, pair.B))
