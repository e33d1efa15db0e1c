"""Other libraries' loops. Each module imports its library when it is itself imported, never before."""

from curvopt.integrations.factory import build_optimizer
from curvopt.integrations.options import parse_options

__all__ = ["build_optimizer", "parse_options"]
