"""MatryoshkaScaledAdam: nests of ranks, the step by rows, the model at one rank."""

from curvopt.optim.matryoshka.optimizer import MatryoshkaScaledAdam

__all__ = ["MatryoshkaScaledAdam"]
