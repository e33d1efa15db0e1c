"""For trainers that import a class by its path and pass it bare tensors: sd-scripts, musubi-tuner, torchtune recipes.

.. code-block:: shell

    --optimizer_type curvopt.integrations.by_shape.GritKFAC --optimizer_args reproject_every=20 'update="polar"'

A bare tensor has neither a name nor a module, so pairs are found by shape: A of (r, ...) is followed by B of (d, r),
as modules with ``lora_down`` and ``lora_up`` (or ``lora_a`` and ``lora_b``) list them. Without modules no
hook can be registered: statistics come from gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

import curvopt
from curvopt.integrations.options import parse_options


class GritKFAC(curvopt.GritKFAC):
    """`curvopt.GritKFAC` on bare tensors, paired by shape.

    Args:
        params: Tensors, or param groups of tensors (any iterables). A and B of a pair follow one another in a group,
            or all A stand in one group and all B, in the same order, in another (LoRA+).
        lr: Learning rate.
        options: The other arguments of `curvopt.GritKFAC`; strings are parsed by `curvopt.integrations.parse_options`.

    Raises:
        ValueError: No two tensors fit together, or an option that is unknown or out of range.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[Mapping[str, Any]], lr: float | Tensor | str = 1e-3, **options: Any
    ) -> None:
        options = parse_options({"lr": lr, **options}, curvopt.GritKFAC)
        options.setdefault("statistics", "gradient")
        super().__init__(name_by_shape(params), **options)


def name_by_shape(params: Iterable[Tensor] | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give tensors names that say which are A and B of one pair.

    Args:
        params: Tensors or param groups, as an optimizer takes them.

    Returns:
        Param groups of (name, tensor): ``pair3.lora_A``, ``pair3.lora_B``, and ``other5`` for what fits nothing.
    """
    given: list[Any] = list(params)
    groups = [dict(g) for g in given] if given and isinstance(given[0], Mapping) else [{"params": given}]
    tensors = [[p] if isinstance(p := g["params"], Tensor) else list(p) for g in groups]
    names: dict[Tensor, str] = {}

    def pair(a: Tensor, b: Tensor) -> None:
        number = len(names) // 2
        names[a], names[b] = f"pair{number}.lora_A", f"pair{number}.lora_B"

    for members in tensors:
        for a, b in itertools.pairwise(members):
            if a not in names and _fit(a, b):
                pair(a, b)
    for one, two in itertools.pairwise(tensors):
        downs, ups = ([p for p in members if p not in names] for members in (one, two))
        if downs and len(downs) == len(ups) and all(map(_fit, downs, ups)):
            for a, b in zip(downs, ups, strict=True):
                pair(a, b)
    others = (p for members in tensors for p in members if p not in names)
    names.update({p: f"other{i}" for i, p in enumerate(others)})
    return [{**g, "params": [(names[p], p) for p in members]} for g, members in zip(groups, tensors, strict=True)]


def _fit(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors can be A (r, ...) and B (d, r, ...) of one pair."""
    if a.ndim != b.ndim or a.ndim < 2 or a.shape[0] != b.shape[1]:
        return False
    return a.shape[0] <= min(a.shape[1:].numel(), b.shape[0])
