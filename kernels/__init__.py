"""Fused Triton kernels, installed as ``curvopt.kernels``; importable without a GPU and without triton.

``OPS`` maps the names of ops to kernels of the same signature as the torch reference in ``curvopt.functional``; it is
empty where triton is not installed, and triton is imported when it is first asked for. A kernel takes only what
`supports` grants; everything else is the reference's. An optimizer makes an `UpdatePlan` (``kernels.UpdatePlan``) of
each bucket for which `plan_supports` is true, and keeps it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

OPS: dict[str, Callable[..., Any]]
UpdatePlan: Any


@lru_cache(maxsize=1)
def _loaded() -> dict[str, tuple[Callable[..., Any], Callable[..., bool]]]:
    """Return every op with the predicate of its arguments."""
    if find_spec("triton") is None:
        return {}
    from . import eigen, inverse, moments, outer_map, root, update

    return {
        "gram": (moments.gram, moments.supports_gram),
        "gram_many": (moments.gram_many, moments.supports_gram_many),
        "gram_add_": (moments.gram_add_, moments.supports_gram_add),
        "ema_": (moments.ema_, moments.supports_ema),
        "damped_inverse": (inverse.damped_inverse, inverse.supports),
        "damped_inverse_root": (root.damped_inverse_root, root.supports),
        "outer_map": (outer_map.outer_map, outer_map.supports),
        "eigenbasis": (eigen.eigenbasis, eigen.supports),
        **update.OPS,
    }


def __getattr__(name: str) -> Any:
    if name == "UpdatePlan" and find_spec("triton") is not None:
        from .plan import UpdatePlan

        return globals().setdefault("UpdatePlan", UpdatePlan)
    if name != "OPS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault("OPS", {op: kernel for op, (kernel, _) in _loaded().items()})


def supports(name: str, *args: Any, **kwargs: Any) -> bool:
    """Return whether ``OPS[name]`` takes these arguments (given exactly as for the op).

    It refuses wrapper subclasses, non-contiguous or mixed-device tensors, float64, ranks above 128, host tensors
    outside Triton's interpreter, and ranks not shipped on the device's architecture.
    """
    return name in _loaded() and _loaded()[name][1](*args, **kwargs)


def plan_supports(rule: str, slabs: Sequence[Any]) -> bool:
    """Return whether ``UpdatePlan(rule, slabs)`` takes this bucket; False where triton is not installed."""
    if find_spec("triton") is None:
        return False
    from . import buckets

    return buckets.plan_supports(rule, slabs)
