"""How many bytes one process gives to collectives: the table of `curvopt.distributed`, counted for one optimizer."""

from curvopt.distributed import Shards, world_size
from curvopt.lora import LoraPair
from curvopt.optim.base import RankSpaceOptimizer
from curvopt.optim.grit.statistics import source
from curvopt.optim.stacks import Stack


def bytes_sent(optimizer: RankSpaceOptimizer) -> dict[str, int]:
    """Return bytes by occasion, for the matrices that have had gradients; a step sends those of the occasions it has.

    ``"update"`` is sent by every step, ``"statistics"`` by one in ``factor_every``, ``"reprojection"`` by one in
    ``reproject_every``. All-reduces count with their payload, exchanges with what leaves this process. What DDP and
    FSDP send for the gradients is theirs and is not in it.
    """
    sent = {"update": 4 * len(optimizer._shared_by), "statistics": 0, "reprojection": 0}
    observed: dict[LoraPair, int] = {}
    for stack in optimizer._stacks:
        b, L, r, g = stack.compute_dtype.itemsize, len(stack.sides), stack.r, stack.group
        statistics = source(stack.sides[0])
        if statistics == "activation":
            observed |= {side.pair: (r * (r + 1) + 2) * b for side in stack.sides}
        shards = stack.shards
        if shards is None or shards.group is None:
            continue
        there, back = _ways(stack, shards)
        held = stack.sides[0].param.dtype.itemsize
        sent["update"] += there * held + back * b + {"momentum": 2, "polar": r * r}.get(g["update"], 0) * L * b
        if statistics != "activation":
            sent["statistics"] += L * r * (r + 1) // 2 * b + (there * held if statistics == "weight" else 0)
        if g["reproject_every"]:
            seeds = g["rank_threshold"] is not None and g["reprojection"] == "balanced" and stack.sides[0].name == "A"
            sent["reprojection"] += (there + back) * held + (8 * L if seeds else 0)
    if world_size(getattr(optimizer, "_process_group", None)) > 1:
        sent["statistics"] += sum(observed.values())
    return sent


def _ways(stack: Stack, shards: Shards) -> tuple[int, int]:
    """Return how many numbers of a stack leave this process on the way to the layout of the state, and back."""
    if not shards.crossed:
        return 0, 0
    piece, whole = stack.sides[0].param.to_local(), shards.shape
    mine, width = piece.shape[shards.split], shards.work_shape[shards.work]  # type: ignore[index]
    rest = stack.sides[0].param.numel() // (whole[shards.split] * whole[shards.work])  # type: ignore[index]
    numbers = len(stack.sides) * rest
    return numbers * mine * (whole[shards.work] - width), numbers * width * (whole[shards.split] - mine)  # type: ignore[index]
