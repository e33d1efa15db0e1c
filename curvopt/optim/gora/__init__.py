"""GoRAInit: gather gradients, decide ranks and start, hand over."""

from curvopt.optim.gora.optimizer import GoRAInit

__all__ = ["GoRAInit"]
