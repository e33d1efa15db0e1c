"""What every argument is checked with, and how users are warned."""

import inspect
import math
import warnings
from typing import Any

from torch import Tensor


def check(name: str, value: Any, fine: bool, allowed: str) -> None:
    """Raise a ValueError that names the argument, its value and what is allowed, unless ``fine``."""
    if not fine:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite real number or a one-element tensor (whose value is not read)."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_scalar(value: Any) -> Any:
    """Return a one-element tensor as a 0-d view of it, and anything else as it is.

    torch before 2.7 multiplies parameters by such a learning rate with broadcasting, which not every shape survives.
    """
    return value.reshape(()) if isinstance(value, Tensor) and value.ndim else value


def is_whole(value: Any) -> bool:
    """Whether ``value`` is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def warn(text: str) -> None:
    """Warn at the line that led here from outside of this package and of torch, whose wrappers surround ``step``."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and (frame.f_globals.get("__name__") or "").partition(".")[0] in ("curvopt", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)
