"""Putting the directions of pairs in order: which pairs have a basis to choose, and the order by B A alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curvopt.functional import basis
from curvopt.lora import LoraPair
from curvopt.optim.bucket import Bucket, sum_over_pieces
from curvopt.optim.nesting import MaskedPair

# a side: its bucket, and its number there
Place = tuple[Bucket, int]
# by pair a 0-d boolean, whether its basis means something; pairs that are known to be plain are not in it
Entangled = dict[LoraPair, Tensor]

# above it a loss depends on more than B A: far above the rounding of bfloat16 gradients, below what mixers do
ASYMMETRY = 0.1


class Turn(NamedTuple):
    """Whose basis changes in a step.

    Attributes:
        pairs: those pairs.
        buckets: with gradients in this step, that hold their sides.
    """

    pairs: set[LoraPair]
    buckets: list[Bucket]


def turn_of(due: Sequence[Bucket], able: Sequence[Bucket]) -> Turn:
    """Return whose basis changes where the buckets ``due`` ask for it; ``able`` are those that can take part.

    A pair goes by its side with more steps. Its other side, which was frozen or idle for a while, counts otherwise, and
    would be due in other steps.
    """
    places: dict[LoraPair, list[Bucket]] = {}
    for bucket in able:
        for side in bucket.sides:
            places.setdefault(side.pair, []).append(bucket)
    pairs = {pair for pair, own in places.items() if max(own, key=lambda bucket: (bucket.steps, bucket in due)) in due}
    return Turn(pairs, [bucket for bucket in able if not pairs.isdisjoint(side.pair for side in bucket.sides)])


def entangled(buckets: Sequence[Bucket], masked: Iterable[MaskedPair] = ()) -> Entangled:
    """Return which pairs the loss sees otherwise than through B A, by the gradients of this step, before it is taken.

    Only pairs of layers that are not known to be plain are looked at. Of ``masked`` pairs, whose samples are at ranks
    of their own, only directions that no rank separates are compared: with m the mask of a sample,
    ∇A Aᵀ = Σ (m ∘ d) uᵀ and Bᵀ ∇B = Σ d (m ∘ u)ᵀ agree where m_i = m_j.
    """
    ranks = {own.pair: own.ranks for own in masked}
    products: dict[LoraPair, dict[str, Tensor]] = {}
    for bucket in buckets:
        for block in bucket.blocks:
            asked = [i for i, s in enumerate(block.sides) if not s.pair.plain]
            if not asked:
                continue
            W, G = (torch.stack(X).to(bucket.compute_dtype) for X in (list(block.weights()), bucket.grads[block.rows]))
            P = W.new_zeros(len(asked), bucket.r, bucket.r)
            torch.matmul(*((G[asked], W[asked].mT) if block.rank_dim == 1 else (W[asked].mT, G[asked])), out=P)
            if block.shards is not None:
                block.shards.sum_(P)
            for i, own in zip(asked, P, strict=True):
                if block.sides[i].pair in ranks:
                    own.mul_(_together(ranks[block.sides[i].pair], own))
                products.setdefault(block.sides[i].pair, {})[block.sides[i].name] = own
    return {
        pair: ~(basis.asymmetry(P["A"][None], P["B"][None])[0] <= ASYMMETRY)
        for pair, P in products.items()
        if len(P) == 2
    }


def _together(ranks: Sequence[int], like: Tensor) -> Tensor:
    """Return ``[r, r]`` ones for the pairs of directions that no rank is between, else zeros."""
    ends = torch.tensor(ranks, device=like.device)
    band = torch.searchsorted(ends, torch.arange(len(like), device=like.device), right=True)
    return (band[:, None] == band).to(like.dtype)


def free(pairs: Iterable[LoraPair], held: Entangled, device: torch.device) -> Tensor:
    """Return ``[P]`` booleans, which pairs' outputs do not depend on their basis."""
    no = torch.zeros((), dtype=torch.bool, device=device)
    return ~torch.stack([held.get(pair, no) for pair in pairs])


def alike(turn: Turn, buckets: Sequence[Bucket]) -> list[dict[LoraPair, tuple[Place, Place]]]:
    """Group the pairs of a turn with both sides, theirs alone, in ``buckets`` by rank, device, dtype and settings."""
    places: dict[LoraPair, dict[str, Place]] = {}
    for bucket in buckets:
        for i, side in enumerate(bucket.sides):
            places.setdefault(side.pair, {})[side.name] = (bucket, i)
    grouped: dict[tuple[object, ...], dict[LoraPair, tuple[Place, Place]]] = {}
    for pair, found in places.items():
        if len(found) == 2 and pair in turn.pairs and not pair.bound:
            bucket = found["A"][0]
            key = (bucket.r, bucket.device, bucket.compute_dtype, id(bucket.group))
            grouped.setdefault(key, {})[pair] = (found["A"], found["B"])
    return list(grouped.values())


def weight_factors(buckets: Sequence[Bucket]) -> dict[Bucket, Tensor]:
    """Return A Aᵀ and Bᵀ B of the sides of each bucket ``[T, r, r]``, summed over the pieces of sharded matrices.

    They change with the basis as S_u and S_d do, A Aᵀ → T A Aᵀ Tᵀ and Bᵀ B → T⁻ᵀ Bᵀ B T⁻¹. In their place the balanced
    gauge is the order of the singular values of B A: A Aᵀ and Bᵀ B become one diagonal, σ₁ ≥ … ≥ σ_r of B A, up to a
    scalar. They are what is left where no factors are kept.
    """
    found = [bucket.weight_grams() for bucket in buckets]
    sum_over_pieces(buckets, found)
    return dict(zip(buckets, found, strict=True))


def reorder(turn: Turn, found_inf: Mapping[torch.device, Tensor], held: Entangled) -> None:
    """A ← T A, B ← B T⁻¹ into the order of the singular values of B A, and Adam's moments with them.

    First moments map as gradients do, second moments by the squared entries. ΔW is unchanged to a rounding of the
    parameters. Pairs with a frozen or idle side, those whose B is still zero, and those that ``held`` says stay as they
    are, and so does all of a step whose gradients were not finite.
    """
    buckets = turn.buckets
    grams = weight_factors(buckets)
    M = {b: [torch.eye(b.r, dtype=torch.float64, device=b.device).repeat(len(b.sides), 1, 1) for _ in "pg"]
         for b in buckets}  # fmt: skip
    for pairs in alike(turn, buckets):
        G_A, G_B = (torch.stack([grams[b][i] for b, i in column]) for column in zip(*pairs.values(), strict=True))
        gauge = basis.balanced(G_A, G_B, keep_scale=False)
        chosen = free(pairs, held, G_A.device)[:, None, None]
        eye = torch.eye(G_A.shape[-1], dtype=gauge.T.dtype, device=G_A.device)
        T, T_inv = (torch.where(chosen, X, eye) for X in (gauge.T, gauge.T_inv))
        for k, ((a, i), (b, j)) in enumerate(pairs.values()):
            M[a][0][i], M[a][1][i] = T[k], T_inv[k].mT
            M[b][0][j], M[b][1][j] = T_inv[k].mT, T[k]
    for bucket in buckets:
        of_params, of_grads = M[bucket]
        bucket.transform("params", of_params, None, found_inf[bucket.device])
        bucket.transform("moments", of_grads, None, found_inf[bucket.device])
