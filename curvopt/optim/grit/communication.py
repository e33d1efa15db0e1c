"""How many bytes one process gives to collectives: the table of `curvopt.distributed`, counted for one optimizer."""

from curvopt.distributed import Shards, local, world_size
from curvopt.functional.update import RULES
from curvopt.lora import LoraPair
from curvopt.optim.bucket import Block, BucketedOptimizer


def bytes_sent(optimizer: BucketedOptimizer) -> dict[str, int]:
    """Return bytes by occasion, for the matrices that have had gradients; a step sends those of the occasions it has.

    ``"update"`` is sent by every step, ``"statistics"`` by one in ``factor_every``, ``"reprojection"`` by one in
    ``reproject_every``. All-reduces count with their payload, exchanges with what leaves this process. What DDP and
    FSDP send for the gradients is theirs and is not in it.
    """
    sent = {"update": 4 * len(optimizer.shared_by), "statistics": 0, "reprojection": 0}
    observed: dict[LoraPair, int] = {}
    for bucket in optimizer.buckets:
        b, r, g, source = bucket.compute_dtype.itemsize, bucket.r, bucket.group, bucket.traits
        if source.hooks:
            observed |= {side.pair: (r * (r + 1) + 2) * b for side in bucket.sides}
        for block in bucket.blocks:
            shards, L = block.shards, len(block.sides)
            if shards is None or shards.group is None:
                continue
            there, back = _ways(block, shards)
            held = bucket.dtype.itemsize
            basis = block.basis
            k = 0 if basis is None else basis.shape[block.rank_dim]
            numbers = RULES[g["update"]].shared(r) + (r * (r + k) if k else 0)
            sent["update"] += there * held + back * b + numbers * L * b
            if source.observe is not None and not source.hooks:
                sent["statistics"] += L * r * (r + 1) // 2 * b + (0 if source.data else there * held)
            if g["reproject_every"]:
                seeds = g["rank_threshold"] is not None and g["reprojection"] == "balanced"
                seeds = seeds and block.sides[0].name == "A"
                sent["reprojection"] += (there + back) * held + (8 * L if seeds else 0)
                if source.observe is None:  # A Aᵀ and Bᵀ B take the place of the factors
                    sent["reprojection"] += there * held + L * r * (r + 1) // 2 * b
                # whether the basis means anything to layers that are not known: r×r products, and A whole for them
                asked = sum(not side.pair.plain for side in block.sides)
                sent["reprojection"] += asked * r * r * b + (there * held if asked else 0)
    if world_size(getattr(optimizer, "join_process_group", None)) > 1:
        sent["statistics"] += sum(observed.values())
    return sent


def _ways(block: Block, shards: Shards) -> tuple[int, int]:
    """Return how many numbers of a block leave this process on the way to the layout of the state, and back."""
    if not shards.sharded_on_rank:
        return 0, 0
    assert shards.split is not None and shards.work is not None
    side = block.sides[0]
    piece, whole = local(side.param), shards.shape
    mine, width = piece.shape[shards.split], shards.work_shape[shards.work]
    rest = side.param.numel() // (whole[shards.split] * whole[shards.work])
    numbers = len(block.sides) * rest
    return numbers * mine * (whole[shards.work] - width), numbers * width * (whole[shards.split] - mine)
