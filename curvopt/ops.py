"""The dispatcher: every op by its name, from the torch reference or from the Triton kernels.

``"torch"`` always uses the reference. ``"triton"`` requires that kernels exist and uses them for CUDA tensors; inputs
that a kernel does not support (wrapper subclasses such as DTensor, float64, ranks above 128, mixed devices) go to the
reference. ``"auto"`` uses the kernels too, but checks each op, rank and dtype on a small problem before its first use
in a process. An op that fails the check is logged, listed in ``fallbacks``, and computed by the reference.

The update of a bucket is a *plan*, made once by `Ops.plan`; small r×r ops are chosen at each call.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from curvopt.functional import compute_dtype, inverse, moments, nested, outer
from curvopt.functional.plan import ReferencePlan
from curvopt.functional.update import RULES

UPDATES: dict[str, Callable[..., Any]] = {**RULES, "row": nested.row_update}

REFERENCE: dict[str, Callable[..., Any]] = {
    "gram": moments.gram,
    "gram_many": moments.gram_many,
    "gram_add_": moments.gram_add_,
    "ema_": moments.ema_,
    "damped_inverse": inverse.damped_inverse,
    "damped_inverse_root": inverse.damped_inverse_root,
    "eigenbasis": inverse.eigenbasis,
    "outer_map": outer.outer_map,
    **{f"{name}_update": update for name, update in RULES.items()},
    "row_update": nested.row_update,
}

Backend = Literal["auto", "torch", "triton"]
BACKENDS = get_args(Backend)


class Plan(Protocol):
    """What a bucket's step is made of; see `functional.plan.ReferencePlan` for the meaning of each."""

    outer_map: Callable[..., Any]

    def load(self, grads: Sequence[Tensor]) -> bool: ...  # noqa: D102
    def nonfinite_(self, flag: Tensor) -> None: ...  # noqa: D102
    def grams(self, of: str) -> Tensor: ...  # noqa: D102
    def outer_products(self) -> Tensor: ...  # noqa: D102
    def take_outer(self, M: Tensor) -> None: ...  # noqa: D102
    def transform_(self, of: str, M: Tensor | None, k: Tensor | None, found_inf: Tensor) -> None: ...  # noqa: D102
    def step(self, found_inf: Tensor) -> None: ...  # noqa: D102


class Ops:
    """The ops of one backend; ``fallbacks`` names those that CUDA tensors had to take from the reference.

    Args:
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: an unknown backend, or ``"triton"`` where triton or a CUDA device is missing.
    """

    def __init__(self, backend: Backend = "auto") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        if backend == "triton" and not (_kernels().OPS and torch.cuda.is_available()):
            missing = "a CUDA device is" if _kernels().OPS else "the triton kernels are"
            raise ValueError(f"backend='triton' needs triton and a CUDA device: {missing} not available here")
        self.backend: Backend = backend
        self.fallbacks: set[str] = set()

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run op ``name``. Its first argument is a tensor, or a sequence of tensors or slabs."""
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        sample = first if isinstance(first, Tensor) else first.exp_avg
        if not self._on_kernels(sample):
            return REFERENCE[name](*args, **kwargs)
        rank = sample.shape[-1] if isinstance(first, Tensor) else sample.shape[first.rank_dim]
        rows = args[2][0] if name == "gram_add_" else sample  # sums are float32, whatever the rows are
        return self._chosen(name, rank, rows, 0, *args, **kwargs)(*args, **kwargs)

    def plan(self, rule: str, slabs: Sequence[Any]) -> Plan:
        """Return what runs ``rule`` on a bucket's slabs, for as long as parameters and state stay where they are.

        Args:
            rule: a key of `RULES`, or ``"row"``.
            slabs: matrices of one rank and dtype that share ``step`` and ``hyper``.
        """
        s = slabs[0]
        basis = getattr(s, "basis", None)  # rows have none
        r, k = s.exp_avg.shape[s.rank_dim], 0 if basis is None else basis.shape[s.rank_dim]
        on_kernels, name = self._on_kernels(s.exp_avg), f"{rule}_update"
        fits = on_kernels and _kernels().plan_supports(rule, slabs)
        if fits and self.trusts(name, r, s.exp_avg, k) and self.trusts("plan", r, s.exp_avg, k):
            made: Plan = _kernels().UpdatePlan(rule, slabs)
        else:
            if on_kernels:
                self.fallbacks.add(name)
            made = ReferencePlan(UPDATES[rule], slabs)
        if k and on_kernels:
            like = {"dtype": compute_dtype(s.exp_avg.dtype), "device": s.exp_avg.device}
            given = [torch.zeros(shape, **like) for shape in ((1, r, r + k), (1, k), (1,), (1,))]
            made.outer_map = self._chosen("outer_map", r, given[0], k, *given, 0.9, s.damping, torch.zeros((), **like))
        return made

    def _chosen(self, name: str, rank: int, sample: Tensor, k: int, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Return the kernel of an op if it takes these arguments, else the reference."""
        if _kernels().supports(name, *args, **kwargs) and self.trusts(name, rank, sample, k):
            kernel: Callable[..., Any] = _kernels().OPS[name]
            return kernel
        self.fallbacks.add(name)
        return REFERENCE[name]

    def _on_kernels(self, sample: Tensor) -> bool:
        return self.backend != "torch" and on_device(sample) and bool(_kernels().OPS)

    def trusts(self, name: str, rank: int, sample: Tensor, k: int = 0) -> bool:
        """Return whether the kernel has shown on this device, rank and dtype that it does what the reference does.

        For updates, for ``"plan"``, which is what a plan does besides, and for the map of outer factors: with ``k``
        directions of them.
        """
        if self.backend == "triton":
            return True
        selfcheck = importlib.import_module("curvopt.kernels.selfcheck")
        return bool(selfcheck.agrees(name, REFERENCE.get(name), rank, sample.dtype, sample.device, k))


def on_device(sample: Tensor) -> bool:
    """Return whether a tensor is where kernels run."""
    return sample.is_cuda


@functools.cache
def _kernels() -> Any:
    """Import the kernels when they are first needed: triton is heavy, and optional."""
    return importlib.import_module("curvopt.kernels")
