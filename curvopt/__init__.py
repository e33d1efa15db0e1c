"""Optimizers for LoRA fine-tuning that use curvature at r×r cost."""

from curvopt.lora import LoraPair, find_lora_pairs
from curvopt.optim import GritKFAC

__all__ = ["GritKFAC", "LoraPair", "find_lora_pairs"]
__version__ = "0.1.0"
