"""Bringing pairs into the order of the singular values of B A, with the moments of Adam carried along."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvopt.functional import basis
from curvopt.lora import LoraPair
from curvopt.optim.bucket import Bucket, sum_over_pieces

Place = tuple[Bucket, int]


def reorder(buckets: Sequence[Bucket], found_inf: Mapping[torch.device, Tensor]) -> None:
    """A ← T A, B ← B T⁻¹ such that A Aᵀ and Bᵀ B are one diagonal, σ₁ ≥ … ≥ σ_r of B A, up to a scalar.

    That is `functional.basis.balanced` with the Gram matrices of the sides in the place of the factors: they map as
    factors do. First moments map as gradients do, second moments by the squared entries. ΔW is unchanged to a rounding
    of the parameters. Pairs with a frozen or idle side, and those whose B is still zero, stay as they are, and so does
    all of a step whose gradients were not finite.
    """
    own = [bucket.weight_grams() for bucket in buckets]
    sum_over_pieces(buckets, own)
    grams = dict(zip(buckets, own, strict=True))
    places: dict[LoraPair, dict[str, Place]] = {}
    for bucket in buckets:
        for i, side in enumerate(bucket.sides):
            places.setdefault(side.pair, {})[side.name] = (bucket, i)
    alike: dict[tuple[object, ...], list[tuple[Place, Place]]] = {}
    for found in places.values():
        if len(found) == 2:
            (b, i), (other, j) = found["A"], found["B"]
            alike.setdefault((b.r, b.device, b.compute_dtype), []).append(((b, i), (other, j)))
    M = {b: [torch.eye(b.r, dtype=torch.float64, device=b.device).repeat(len(b.sides), 1, 1) for _ in "pg"]
         for b in buckets}  # fmt: skip
    for pairs in alike.values():
        G_A, G_B = (torch.stack([grams[b][i] for b, i in column]) for column in zip(*pairs, strict=True))
        gauge = basis.balanced(G_A, G_B, keep_scale=False)
        for k, ((a, i), (b, j)) in enumerate(pairs):
            T, T_inv = gauge.T[k], gauge.T_inv[k]
            M[a][0][i], M[a][1][i] = T, T_inv.mT
            M[b][0][j], M[b][1][j] = T_inv.mT, T
    for bucket in buckets:
        of_params, of_grads = M[bucket]
        bucket.transform("params", of_params, None, found_inf[bucket.device])
        bucket.transform("moments", of_grads, None, found_inf[bucket.device])
