"""What crosses processes: r×r sums in one flat all-reduce, and the matrices that sharding has split along their rank.

Bytes one process sends, in the terms of a stack of L matrices (r × d) of itemsize b, split over W processes
(all-reduces by their payload; a ring sends 2 (W−1)/W of it):

==================================  =====================================================  ======================
what                                bytes                                                  when
==================================  =====================================================  ======================
statistics of P pairs, activation   P (r (r + 1) + 2) b                                    every factor_every
split along d (lora_B of FSDP2)     none
split along r (lora_A of FSDP2)     L r d b / W · (1 − 1/W), as gradient and as update     every step
the same, reprojected               as much again for the matrices, there and back         every reproject_every
outer factors, k directions         L r (r + k) b                                          every step
gradient or weight statistics       L r (r + 1)/2 b; weight: and the matrices, one way     every factor_every
norms of the rule "momentum"        2 L b                                                  every step
Gram matrices of the rule "polar"   L r² b                                                 every step
rows of DyLoRA's A, to compare      L r d b / W · (1 − 1/W)                                every step
non-finite flag                     4 for each way of splitting                            every step, if sharded
==================================  =====================================================  ======================

Why the exchange: every rule acts on the rank side, so each row of the result needs every row of ∇A, and no r×r product
can stand in for them. An all-gather of ∇A would send L r d b (W − 1)/W, W times as much as exchanging rows for
columns; the way back costs the same again, since no process has the whole update to cut its rows from.
"""

from curvopt.distributed.collectives import agreed, all_reduce_grams, all_reduce_sums, process_index, world_size
from curvopt.distributed.shards import (
    Shards,
    groups_of,
    is_sharded,
    local,
    placed_like,
    reshard,
    shards_of,
    used_directions,
    whole,
)

__all__ = [
    "Shards",
    "agreed",
    "all_reduce_grams",
    "all_reduce_sums",
    "groups_of",
    "is_sharded",
    "local",
    "placed_like",
    "process_index",
    "reshard",
    "shards_of",
    "used_directions",
    "whole",
    "world_size",
]
