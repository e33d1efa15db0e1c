"""The switch: every op by its name, from the torch reference or from the Triton kernels, tensor by tensor.

``backend="auto"`` takes the kernel for plain CUDA tensors when triton is installed and the reference otherwise;
``"torch"`` always the reference; ``"triton"`` insists. Wrapper subclasses (DTensor) have no single data pointer and
always take the reference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvopt import kernels  # type: ignore[attr-defined]  # mapped from kernels/ by setup.py
from curvopt.functional import inverse, moments, truncate, update

REFERENCE: dict[str, Callable[..., Any]] = {
    "gram": moments.gram,
    "ema_": moments.ema_,
    "damped_inverse": inverse.damped_inverse,
    "damped_inverse_root": inverse.damped_inverse_root,
    "eigenbasis": inverse.eigenbasis,
    "eigen_update": update.eigen_update,
    "adam_update": update.adam_update,
    "whiten_update": update.whiten_update,
    "momentum_update": update.momentum_update,
    "truncate_": truncate.truncate_,
    "scale_rows_": truncate.scale_rows_,
}

BACKENDS = ("auto", "torch", "triton")


class Ops:
    """The ops of one backend.

    Args:
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: an unknown backend, or ``"triton"`` where triton or a CUDA device is missing.
    """

    def __init__(self, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        if backend == "triton" and not (kernels.OPS and torch.cuda.is_available()):
            missing = "a CUDA device is" if kernels.OPS else "the triton kernels are"
            raise ValueError(f"backend='triton' needs triton and a CUDA device: {missing} not available here")
        self.backend = backend

    def __call__(self, name: str, sample: Tensor) -> Callable[..., Any]:
        """Return the implementation of op ``name`` for tensors like ``sample``."""
        fused = self.backend != "torch" and sample.is_cuda and type(sample) in (Tensor, torch.nn.Parameter)
        return (kernels.OPS.get(name) if fused else None) or REFERENCE[name]
