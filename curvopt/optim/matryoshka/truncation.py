"""One rank out of nested ranks: what the model computes for a while, and what is written as an adapter of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.distributed import placed_like, reshard, whole
from curvopt.lora import LoraPair, export_adapter, find_lora_pairs
from curvopt.optim.bucket import FULL
from curvopt.optim.checking import check, is_whole
from curvopt.optim.matryoshka.nested_ranks import NestedRanks, scaled_rows


def resolve(nests: Mapping[LoraPair, NestedRanks], rank: Any, strict: bool) -> dict[LoraPair, int]:
    """Return what ``rank`` means for every pair: itself, or the pair's own largest where that is smaller.

    Raises:
        ValueError: it is not a rank of any pair or, if ``strict``, was not trained.
    """
    whole = is_whole(rank)
    known = sorted({k for nest in nests.values() for k in nest.ranks})
    # of pairs with fewer directions the largest of their own stands for more
    trained = [k for k in known if all(min(k, nest.ranks[-1]) in nest.ranks for nest in nests.values())]
    most = max((trained if strict else [nest.pair.rank for nest in nests.values()]), default=0)
    if strict:
        fits = whole and rank in trained
        check("rank", rank, fits, f"one of the ranks trained of all pairs, {trained} (strict=False takes others)")
    check("rank", rank, whole and 1 <= rank <= most, f"an integer from 1 to {most}")
    return {pair: min(rank, nest.ranks[-1] if strict else pair.rank) for pair, nest in nests.items()}


@contextmanager
def truncated(
    model: nn.Module | None,
    nests: Mapping[LoraPair, NestedRanks],
    state: Mapping[Tensor, Mapping[str, Any]],
    ranks: Mapping[LoraPair, int],
    keep_P: bool,
    before: dict[LoraPair, Tensor],
) -> Iterator[None]:
    """Hold every pair at its rank; see `MatryoshkaScaledAdam.truncated`.

    Args:
        model: that holds the pairs, if there is one.
        nests: of every pair.
        state: the optimizer's.
        ranks: of every pair.
        keep_P: the first directions as they were trained.
        before: what every pair held when the outermost context began, kept by it for the inner ones; empty outside.
    """
    reshard(model)  # a forward may have left matrices that FSDP2 forgets
    held = {pair: pair.A.detach().clone() for pair in ranks}
    outermost = not before
    if outermost:
        before.update(held)
    try:
        with torch.no_grad():
            for pair, rank in ranks.items():
                own = state.get(pair.A, {})
                if FULL in own and own["step"] > 0:
                    A, factors = own[FULL], nests[pair].prefix(rank, full=True)
                else:
                    A, factors = before[pair], nests[pair].prefix(rank, full=False)
                    factors = tuple(float(f > 0) for f in factors) if keep_P else factors
                pair.A.copy_(placed_like(pair.A, scaled_rows(whole(A), factors, pair.dim_A)))
        yield
    finally:
        reshard(model)
        with torch.no_grad():
            for pair, A in held.items():
                pair.A.copy_(A)
        if outermost:
            before.clear()


def export(
    model: Any, path: str | Path, ranks: Mapping[LoraPair, int], adapter: str | None, pad_to: int | None
) -> Path:
    """Write ``model``'s adapter as it computes now, with every pair cut to its rank."""
    chosen = getattr(model, "active_adapter", None) if adapter is None else adapter
    pairs = find_lora_pairs(model, chosen) if isinstance(model, nn.Module) and isinstance(chosen, str) else []
    own = {id(pair.A): rank for pair, rank in ranks.items()}
    cut = {pair.name: own[id(pair.A)] for pair in pairs if id(pair.A) in own}
    return export_adapter(model, path, adapter=adapter, ranks=cut, pad_to=pad_to)
