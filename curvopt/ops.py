"""The switch: every op by its name, from the torch reference or from the Triton kernels, call by call.

``"torch"`` is always the reference. ``"triton"`` insists that kernels exist and takes them for CUDA tensors; what a
kernel does not take (wrapper subclasses such as DTensor, float64, ranks above 128, mixed devices) the reference does.
``"auto"`` takes them too, but only those that show on this device that they agree with the reference: each op, rank
and dtype is tried once per process on a small problem. What fails is logged, named in ``fallbacks``, and done without.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.functional import inverse, moments, nested, update

REFERENCE: dict[str, Callable[..., Any]] = {
    "gram": moments.gram,
    "gram_many": moments.gram_many,
    "gram_add_": moments.gram_add_,
    "ema_": moments.ema_,
    "damped_inverse": inverse.damped_inverse,
    "damped_inverse_root": inverse.damped_inverse_root,
    "eigenbasis": inverse.eigenbasis,
    "polar_update": update.polar_update,
    "eigen_update": update.eigen_update,
    "adam_update": update.adam_update,
    "whiten_update": update.whiten_update,
    "momentum_update": update.momentum_update,
    "row_update": nested.row_update,
}

BACKENDS = ("auto", "torch", "triton")


class Ops:
    """The ops of one backend; ``fallbacks`` names those that CUDA tensors had to take from the reference.

    Args:
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: an unknown backend, or ``"triton"`` where triton or a CUDA device is missing.
    """

    def __init__(self, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        if backend == "triton" and not (_kernels().OPS and torch.cuda.is_available()):
            missing = "a CUDA device is" if _kernels().OPS else "the triton kernels are"
            raise ValueError(f"backend='triton' needs triton and a CUDA device: {missing} not available here")
        self.backend = backend
        self.fallbacks: set[str] = set()

    def on_kernels(self, device: torch.device) -> bool:
        """Return whether ops on this device are kernels, as far as these take what they are given."""
        return self.backend != "torch" and device.type == "cuda" and bool(_kernels().OPS)

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run op ``name``. Its first argument is a tensor, or a sequence of tensors or slabs."""
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if self.backend == "torch" or not _sample(first).is_cuda:
            return REFERENCE[name](*args, **kwargs)
        if name.endswith("_update"):
            return self._update(name, *args)
        return self._choose(name, *args, **kwargs)(*args, **kwargs)

    def _update(self, name: str, slabs: Sequence[Any], found_inf: Tensor) -> None:
        """Run an update rule: one call for the slabs the kernel takes, one for the others."""
        parts: dict[Callable[..., Any], list[Any]] = {}
        for slab in slabs:
            parts.setdefault(self._choose(name, [slab], found_inf), []).append(slab)
        for op, part in parts.items():
            op(part, found_inf)

    def _choose(self, name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        kernels = _kernels()
        if kernels.supports(name, *args, **kwargs) and (self.backend == "triton" or _agrees(name, args)):
            kernel: Callable[..., Any] = kernels.OPS[name]
            return kernel
        self.fallbacks.add(name)
        return REFERENCE[name]


def _sample(first: Any) -> Tensor:
    """Return the tensor that stands for an op's first argument, or for the first of a sequence."""
    sample: Tensor = first if isinstance(first, Tensor) else first.exp_avg
    return sample


def _agrees(name: str, args: Sequence[Any]) -> bool:
    """Return whether the kernel has shown on this device, rank and dtype that it does what the reference does."""
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    sample = args[2][0] if name == "gram_add_" else _sample(first)  # sums are float32, whatever the rows are
    r = sample.shape[-1 if isinstance(first, Tensor) else first.rank_dim]
    selfcheck = importlib.import_module("curvopt.kernels.selfcheck")
    return bool(selfcheck.agrees(name, REFERENCE[name], r, sample.dtype, sample.device))


def _kernels() -> Any:
    """Import the kernels when they are first needed: triton is heavy, and optional."""
    return importlib.import_module("curvopt.kernels")
