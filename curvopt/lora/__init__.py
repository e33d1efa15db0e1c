"""The model side: finding, observing, resizing and exporting the LoRA pairs of a model."""

from curvopt.lora.capture import Capture, Sums
from curvopt.lora.choose import RankChoice, RankLoss, smallest_rank
from curvopt.lora.cut import OrderedPair, order_pair, truncated
from curvopt.lora.export import export_adapter
from curvopt.lora.pair import LoraPair
from curvopt.lora.pairs import (
    describe_search,
    find_lora_pairs,
    find_skipped,
    low_rank_by_shape,
    pair_by_name,
)
from curvopt.lora.resize import resize_adapter, resize_pair

__all__ = [
    "Capture",
    "LoraPair",
    "OrderedPair",
    "RankChoice",
    "RankLoss",
    "Sums",
    "describe_search",
    "export_adapter",
    "find_lora_pairs",
    "find_skipped",
    "low_rank_by_shape",
    "order_pair",
    "pair_by_name",
    "resize_adapter",
    "resize_pair",
    "smallest_rank",
    "truncated",
]
