"""The optimizers: param groups, state, and the order of a step."""

from curvopt.optim.base import PairedOptimizer
from curvopt.optim.gora import GoRAInit
from curvopt.optim.grit import GritKFAC
from curvopt.optim.matryoshka import MatryoshkaScaledAdam

__all__ = ["GoRAInit", "GritKFAC", "MatryoshkaScaledAdam", "PairedOptimizer"]
