"""Optimizers for LoRA fine-tuning that use curvature at r×r cost."""

from curvopt.lora import LoraPair, find_lora_pairs
from curvopt.optim import GoRAInit, GritKFAC, MatryoshkaScaledAdam

__all__ = ["GoRAInit", "GritKFAC", "LoraPair", "MatryoshkaScaledAdam", "find_lora_pairs"]
__version__ = "0.1.0"
