"""The optimizers: param groups, state, and the order of a step."""

from curvopt.optim.base import RankSpaceOptimizer
from curvopt.optim.grit import GritKFAC

__all__ = ["GritKFAC", "RankSpaceOptimizer"]
