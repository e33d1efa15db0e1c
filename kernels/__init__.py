"""Fused Triton kernels, installed as ``curvopt.kernels``; importable without a GPU and without triton.

``OPS`` maps the names of ops to kernels of the same signature as the torch reference in ``curvopt.functional``; it is
empty where triton is not installed.
"""

from collections.abc import Callable
from typing import Any

OPS: dict[str, Callable[..., Any]] = {}
