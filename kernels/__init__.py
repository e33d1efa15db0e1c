"""Fused Triton kernels, installed as ``curvopt.kernels``; importable without a GPU and without triton.

``OPS`` maps the names of ops to kernels of the same signature as the torch reference in ``curvopt.functional``; it is
empty where triton is not installed, and triton is imported when it is first asked for. A kernel takes only what
`supports` grants; everything else is the reference's.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

OPS: dict[str, Callable[..., Any]]


@lru_cache(maxsize=1)
def _loaded() -> dict[str, tuple[Callable[..., Any], Callable[..., bool]]]:
    """Return every op with the predicate of its arguments."""
    if find_spec("triton") is None:
        return {}
    from . import eigen, inverse, moments, truncate, update

    return {
        "gram": (moments.gram, moments.supports_gram),
        "gram_many": (moments.gram_many, moments.supports_gram_many),
        "ema_": (moments.ema_, moments.supports_ema),
        "damped_inverse": (inverse.damped_inverse, inverse.supports),
        "damped_inverse_root": (inverse.damped_inverse_root, inverse.supports),
        "eigenbasis": (eigen.eigenbasis, eigen.supports),
        "polar_update": (update.polar_update, update.supports_polar),
        "eigen_update": (update.eigen_update, update.supports),
        "adam_update": (update.adam_update, update.supports),
        "whiten_update": (update.whiten_update, update.supports),
        "momentum_update": (update.momentum_update, update.supports),
        "row_update": (update.row_update, update.supports),
        "truncate_": (truncate.truncate_, truncate.supports_truncate),
        "scale_rows_": (truncate.scale_rows_, truncate.supports_scale),
    }


def __getattr__(name: str) -> Any:
    if name != "OPS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault("OPS", {op: kernel for op, (kernel, _) in _loaded().items()})


def supports(name: str, *args: Any, **kwargs: Any) -> bool:
    """Return whether ``OPS[name]`` takes these arguments (given exactly as for the op).

    It refuses wrapper subclasses, non-contiguous or mixed-device tensors, float64, ranks above 128, host tensors
    outside Triton's interpreter, and ranks not shipped on the device's architecture.
    """
    return name in _loaded() and _loaded()[name][1](*args, **kwargs)
