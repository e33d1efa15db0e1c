"""Changing the basis of pairs: the balanced gauge with its masks, and GRIT's published projections."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvopt.distributed import local
from curvopt.functional import basis, live_rows, ranks
from curvopt.functional.inverse import eigenbasis, normalised
from curvopt.lora import LoraPair
from curvopt.optim.base import Side
from curvopt.optim.bucket import Block, Bucket
from curvopt.optim.grit.curvature import PUBLISHED, Curvature, rule_of
from curvopt.optim.reordering import Entangled, Place, Turn, alike, free, weight_factors

# rows of u and d before the published code lets d have a basis of its own
MIN_SAMPLES = 64


def change_basis(turn: Turn, found_inf: dict[torch.device, Tensor], curvature: Curvature) -> None:
    """Change the basis, and with it the rank, as each group asks; not that of entangled pairs."""
    held = curvature.entangled
    gauged = [b for b in turn.buckets if b.group["reprojection"] == "balanced"]
    projected = [b for b in turn.buckets if b.group["reprojection"] in PUBLISHED]
    if gauged:
        balanced(turn, gauged, found_inf, curvature, held)
    if projected:
        published(turn, projected, found_inf, held)


def balanced(
    turn: Turn,
    buckets: Sequence[Bucket],
    found_inf: dict[torch.device, Tensor],
    curvature: Curvature,
    held: Entangled,
) -> None:
    """Bring every pair with gradients into the balanced gauge and, with a threshold, zero its cheapest directions.

    Parameters, both moments, factors and matrices change together, so that without truncation ΔW and what the
    optimizer believes about it are unchanged. Pairs with a frozen or idle side keep their basis, and those that share
    a matrix with another layer. Where no factors are kept, A Aᵀ and BᵀB take their place: the order is then that of the
    singular values of B A; see `curvopt.optim.reordering.weight_factors`.

    Outer factors stay as they are. S_x = E[x xᵀ] is a second moment of the layer's input, which no basis of the rank
    side changes. Its estimate E[∇Aᵀ∇A] becomes E[∇Aᵀ T⁻¹T⁻ᵀ ∇A]: the same for an orthogonal T and, where K-FAC's
    E[∇Aᵀ∇A] = tr(S_d) S_x holds, the same up to a scalar for any T. Only its shape acts. For B likewise.
    """
    grams = weight_factors([bucket for bucket in buckets if "factor" not in bucket.state])
    maps: dict[Side, tuple[Tensor, Tensor]] = {}
    lifted: dict[Side, Tensor] = {}
    for pairs in alike(turn, buckets):
        a = [places[0] for places in pairs.values()]
        bucket = a[0][0]
        S_u, S_d = _factors(pairs, grams)
        k, pending = _rows("rank", a), _rows("pending", a)
        tau = bucket.group["rank_threshold"]
        if tau is not None:  # a mask that the weights do not bear out is none
            stale = _beyond(pairs, k)
            k, pending = torch.where(stale, bucket.r, k), torch.where(stale, 0, pending)
        gauge = basis.balanced(S_u, S_d, k=k, keep_scale=False)
        fine = (found_inf[bucket.device] == 0) & free(pairs, held, bucket.device)
        eye = torch.eye(bucket.r, dtype=gauge.T.dtype, device=bucket.device)
        T, T_inv = (torch.where(fine[:, None, None], M, eye) for M in (gauge.T, gauge.T_inv))
        k_new, agreed = k, pending
        if tau is not None:
            energy = gauge.sigma.square()
            asked = ranks.energy_rank(energy, tau, bucket.group["min_rank"], k)
            k_new, agreed = ranks.hysteresis(k, asked, pending, ranks.heavy_tail(energy, tau, k), bucket.r)
            k_new, agreed = torch.where(fine, k_new, k), torch.where(fine, agreed, pending)
        for i, ((b_a, i_a), (b_b, i_b)) in enumerate(pairs.values()):
            maps[b_a.sides[i_a]] = (T[i], T_inv[i].mT)
            maps[b_b.sides[i_b]] = (T_inv[i].mT, T[i])
            lifted[b_a.sides[i_a]] = k_new[i] > k[i]
            for b, j in ((b_a, i_a), (b_b, i_b)):
                b.state["rank"][j].copy_(k_new[i])
                b.state["pending"][j].copy_(agreed[i])
    for bucket in buckets:
        _transform(bucket, maps, lifted, found_inf[bucket.device], curvature)


def _transform(
    bucket: Bucket,
    maps: dict[Side, tuple[Tensor, Tensor]],
    lifted: dict[Side, Tensor],
    found_inf: Tensor,
    curvature: Curvature,
) -> None:
    """Apply the maps of parameters and of gradients to one bucket and all of its state."""
    wide = torch.float64
    eye = torch.eye(bucket.r, dtype=wide, device=bucket.device)
    M = torch.stack([maps.get(s, (eye, eye))[0] for s in bucket.sides])
    M_grad = torch.stack([maps.get(s, (eye, eye))[1] for s in bucket.sides])
    state, k = bucket.state, bucket.state["rank"]
    seeds = bucket.group["rank_threshold"] is not None and any(s in lifted for s in bucket.sides)

    def seeded(block: Block, X: Tensor) -> Tensor:
        return _seeded(block, X, k[block.rows], lifted, bucket.steps) if block.sides[0].name == "A" else X

    bucket.transform("params", M, k, found_inf, seeded if seeds else None)

    if "factor" in state:
        M_factor = M_grad if bucket.group["sides"] == "kfac" else M
        alive = live_rows(k, bucket.r)
        factor = torch.where(alive[:, :, None] & alive[:, None, :], basis.congruence(M_factor, state["factor"]), 0.0)
        state["factor"].copy_(torch.where(found_inf == 0, factor, state["factor"]))

    rule, old, new = rule_of(bucket), None, None
    if rule.key is not None:
        old = state[rule.key].to(wide)
        turned = torch.tensor([s in maps for s in bucket.sides], device=bucket.device)[:, None, None]
        new = torch.where((found_inf == 0) & turned, curvature.made(bucket).to(wide), old)
    bucket.transform("moments", rule.carried(new, old, M_grad), k, found_inf)
    if rule.key is not None and new is not None:
        state[rule.key].copy_(new)


def _seeded(block: Block, X: Tensor, k: Tensor, lifted: dict[Side, Tensor], steps: int) -> Tensor:
    """Give each direction that just re-entered (row k−1 of A; its B is zero) a random row as long as the one before.

    The numbers depend on the step alone, so every process and every resumed run draws the same.
    """
    no = torch.zeros((), dtype=torch.bool, device=k.device)
    up = torch.stack([lifted.get(s, no) for s in block.sides])
    X = X.to(torch.float64)
    rows = X if block.rank_dim == 1 else X.mT
    generator = torch.Generator(X.device).manual_seed(steps)
    noise = torch.randn(rows.shape[0], block.width, dtype=X.dtype, device=X.device, generator=generator)
    index = torch.arange(rows.shape[1], device=X.device)
    before = torch.where((index == k[:, None] - 2)[:, :, None], rows, 0.0).sum(1).square().sum(1)
    if block.shards is not None:
        block.shards.sum_(before)
    noise = noise * (before.sqrt() / torch.linalg.vector_norm(noise, dim=1))[:, None]
    noise = noise if block.shards is None else block.shards.columns(noise)
    at = (index == k[:, None] - 1) & up[:, None]
    rows = torch.where(at[:, :, None], noise[:, None, :], rows)
    return rows if block.rank_dim == 1 else rows.mT


def published(turn: Turn, buckets: Sequence[Bucket], found_inf: dict[torch.device, Tensor], held: Entangled) -> None:
    """A ← P_a A and B ← B P_g as GRIT publishes it: moments and factors stay, tensors and masks too.

    The number of directions kept is noted in the state as ``kept``.
    """
    maps: dict[Side, Tensor] = {}
    for pairs in alike(turn, buckets):
        a = [places[0] for places in pairs.values()]
        g, r = a[0][0].group, a[0][0].r
        S_u, S_d = _factors(pairs, {})
        S_d = torch.where((_rows("rows", a) >= MIN_SAMPLES)[:, None, None], S_d, 0.0)
        _, energy = eigenbasis(S_u)
        k = torch.full((len(pairs),), r, device=S_u.device)
        if g["rank_threshold"] is not None:
            k = ranks.energy_rank(energy, g["rank_threshold"], g["min_rank"])
        P_a, P_g = basis.projectors(S_u, S_d, k, two_sided=g["reprojection"] == "paper")
        fine = (found_inf[S_u.device] == 0) & free(pairs, held, S_u.device)
        keep = (fine & normalised(S_u)[1])[:, None, None]
        eye = torch.eye(r, dtype=S_u.dtype, device=S_u.device)
        P_a, P_g = torch.where(keep, P_a, eye), torch.where(keep, P_g, eye)
        for i, places in enumerate(pairs.values()):
            for (bucket, j), P in zip(places, (P_a[i], P_g[i]), strict=True):
                maps[bucket.sides[j]] = P
                kept = bucket.state["kept"][j]
                kept.copy_(torch.where(keep[i].squeeze(), k[i], kept))
    for bucket in buckets:
        eye = torch.eye(bucket.r, dtype=bucket.compute_dtype, device=bucket.device)
        P = torch.stack([maps.get(side, eye) for side in bucket.sides])
        bucket.transform("params", P, None, found_inf[bucket.device])


def _beyond(pairs: dict[LoraPair, tuple[Place, Place]], k: Tensor) -> Tensor:
    """Return ``[P]`` booleans, which pairs use directions ≥ k in both matrices, which then are not what was masked."""
    used = []
    for places in zip(*pairs.values(), strict=True):
        nonzero = []
        for bucket, i in places:
            side = bucket.sides[i]
            X = local(side.param).detach()
            dim = side.rank_dim - 1
            # an own piece along the rank says nothing of the whole: sharded masks are believed
            nonzero.append(torch.zeros(bucket.r, dtype=torch.bool, device=X.device) if side.shards is not None
                           else (X != 0).movedim(dim, 0).flatten(1).any(1))  # fmt: skip
        used.append(torch.stack(nonzero))
    return (used[0] & used[1] & ~live_rows(k, used[0].shape[1])).any(1)


def _rows(key: str, places: Sequence[Place]) -> Tensor:
    return torch.stack([bucket.state[key][i] for bucket, i in places])


def _factors(pairs: dict[LoraPair, tuple[Place, Place]], grams: Mapping[Bucket, Tensor]) -> tuple[Tensor, Tensor]:
    """Return S_u and S_d ``[P, r, r]``, whichever side each is kept with; A Aᵀ and BᵀB of buckets in ``grams``."""
    found: dict[str, list[Tensor]] = {"u": [], "d": []}
    for places in pairs.values():
        for (bucket, i), own in zip(places, "ud", strict=True):
            if bucket in grams:
                found[own].append(grams[bucket][i])
            else:
                found[bucket.sides[i].moment()].append(bucket.state["factor"][i])
    return torch.stack(found["u"]), torch.stack(found["d"])
