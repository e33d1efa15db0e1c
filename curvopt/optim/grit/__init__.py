"""GritKFAC: what it observes, what it makes of it, how it changes basis, what it reports."""

from curvopt.optim.grit.factors import OuterFactor, PairFactors
from curvopt.optim.grit.optimizer import GritKFAC
from curvopt.optim.grit.settings import AdvancedSettings

__all__ = ["AdvancedSettings", "GritKFAC", "OuterFactor", "PairFactors"]
