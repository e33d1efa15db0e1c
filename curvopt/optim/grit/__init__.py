"""GritKFAC: what it observes, what it makes of it, how it changes basis, what it reports."""

from curvopt.optim.grit.optimizer import GritKFAC

__all__ = ["GritKFAC"]
