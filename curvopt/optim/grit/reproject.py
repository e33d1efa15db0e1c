"""Changing the basis of live pairs: the balanced gauge with its masks, and GRIT's published projections."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvopt.functional import basis, left, live_rows, ranks
from curvopt.functional.inverse import eigenbasis, normalised
from curvopt.functional.truncate import truncate_
from curvopt.lora import LoraPair
from curvopt.ops import Ops
from curvopt.optim.grit.matrices import MATRICES, make
from curvopt.optim.stacks import Side, Stack

# rows of u and d before the published code lets d have a basis of its own
MIN_SAMPLES = 64

Place = tuple[Stack, int]


def balanced(stacks: Sequence[Stack], found_inf: dict[torch.device, Tensor], ops: Ops) -> None:
    """Bring every live pair into the balanced gauge and, with a threshold, set its cheapest directions to zero.

    Parameters, both moments, factors and matrices change together, so that without truncation ΔW and what the
    optimizer believes about it are unchanged. Pairs with a frozen or idle factor keep their basis.
    """
    maps: dict[Side, tuple[Tensor, Tensor]] = {}
    lifted: dict[Side, Tensor] = {}
    for pairs in _buckets(stacks):
        a = [places[0] for places in pairs.values()]
        stack = a[0][0]
        S_u, S_d = _factors(pairs)
        k = _rows("rank", a)
        gauge = basis.balanced(S_u, S_d, k=k, keep_scale=False)
        fine = found_inf[stack.device] == 0
        eye = torch.eye(stack.r, dtype=gauge.T.dtype, device=stack.device)
        T, T_inv = torch.where(fine, gauge.T, eye), torch.where(fine, gauge.T_inv, eye)
        k_new, pending = k, _rows("pending", a)
        tau = stack.group["rank_threshold"]
        if tau is not None:
            energy = gauge.sigma.square()
            asked = ranks.energy_rank(energy, tau, stack.group["min_rank"], k)
            k_new, pending = ranks.hysteresis(k, asked, pending, ranks.heavy_tail(energy, tau, k), stack.r)
            k_new, pending = torch.where(fine, k_new, k), torch.where(fine, pending, _rows("pending", a))
        for i, ((s_a, i_a), (s_b, i_b)) in enumerate(pairs.values()):
            maps[s_a.sides[i_a]] = (T[i], T_inv[i].mT)
            maps[s_b.sides[i_b]] = (T_inv[i].mT, T[i])
            lifted[s_a.sides[i_a]] = k_new[i] > k[i]
            for s, j in ((s_a, i_a), (s_b, i_b)):
                s.state["rank"][j].copy_(k_new[i])
                s.state["pending"][j].copy_(pending[i])
    for stack in stacks:
        _transform(stack, maps, lifted, found_inf[stack.device], ops)


def _transform(
    stack: Stack, maps: dict[Side, tuple[Tensor, Tensor]], lifted: dict[Side, Tensor], found_inf: Tensor, ops: Ops
) -> None:
    """Apply the maps of parameters and of gradients to one stack and all of its state."""
    wide = torch.float64
    eye = torch.eye(stack.r, dtype=wide, device=stack.device)
    M = torch.stack([maps.get(s, (eye, eye))[0] for s in stack.sides])
    M_grad = torch.stack([maps.get(s, (eye, eye))[1] for s in stack.sides])
    state, k = stack.state, stack.state["rank"]

    X = truncate_(left(M, stack.weights().to(wide), stack.rank_dim), k, stack.rank_dim)
    if stack.group["rank_threshold"] is not None and any(s in lifted for s in stack.sides):
        up = torch.stack([lifted.get(s, torch.zeros((), dtype=torch.bool, device=k.device)) for s in stack.sides])
        X = _seed_rows(X, k, up, stack)
    stack.assign(X)

    M_factor = M_grad if stack.group["sides"] == "kfac" else M
    alive = live_rows(k, stack.r)
    factor = torch.where(alive[:, :, None] & alive[:, None, :], basis.congruence(M_factor, state["factor"]), 0.0)
    state["factor"].copy_(torch.where(found_inf == 0, factor, state["factor"]))

    rule = stack.group["update"]
    key = MATRICES[rule][1]
    old, new = state[key].to(wide), torch.where(found_inf == 0, make(stack, ops), state[key])
    if key == "basis":
        R = new.to(wide).mT @ M_grad @ old
    elif rule == "momentum":
        R = M_grad
    else:
        R = torch.linalg.solve(old, new.to(wide) @ M_grad, left=False)
    state[key].copy_(new)
    stack.carry(torch.where(found_inf == 0, R, eye), k)


def _seed_rows(X: Tensor, k: Tensor, lifted: Tensor, stack: Stack) -> Tensor:
    """Give each direction that just re-entered (row k−1 of A; its B is zero) a random row as long as the one before.

    The numbers depend on the step alone, so every process and every resumed run draws the same.
    """
    rows = X if stack.rank_dim == 1 else X.mT
    generator = torch.Generator(X.device).manual_seed(stack.group["clock"])
    noise = torch.randn(rows.shape[0], stack.width, dtype=X.dtype, device=X.device, generator=generator)
    index = torch.arange(rows.shape[1], device=X.device)
    before = torch.where((index == k[:, None] - 2)[:, :, None], rows, 0.0).sum(1).square().sum(1)
    if stack.shards is not None:
        stack.shards.sum_(before)
    noise = noise * (before.sqrt() / torch.linalg.vector_norm(noise, dim=1))[:, None]
    noise = noise if stack.shards is None else stack.shards.columns(noise)
    at = (index == k[:, None] - 1) & lifted[:, None]
    rows = torch.where(at[:, :, None], noise[:, None, :], rows)
    return rows if stack.rank_dim == 1 else rows.mT


def published(stacks: Sequence[Stack], found_inf: dict[torch.device, Tensor]) -> None:
    """A ← P_a A and B ← B P_g as GRIT publishes it: moments and factors stay, tensors and masks too.

    The number of directions kept is noted in the state as ``kept``.
    """
    maps: dict[Side, Tensor] = {}
    for pairs in _buckets(stacks):
        a = [places[0] for places in pairs.values()]
        g, r = a[0][0].group, a[0][0].r
        S_u, S_d = _factors(pairs)
        S_d = torch.where((_rows("rows", a) >= MIN_SAMPLES)[:, None, None], S_d, 0.0)
        _, energy = eigenbasis(S_u)
        k = torch.full((len(pairs),), r, device=S_u.device)
        if g["rank_threshold"] is not None:
            k = ranks.energy_rank(energy, g["rank_threshold"], g["min_rank"])
        P_a, P_g = basis.projectors(S_u, S_d, k, two_sided=g["reprojection"] == "paper")
        keep = (found_inf[S_u.device] == 0) & normalised(S_u)[1][:, None, None]
        eye = torch.eye(r, dtype=S_u.dtype, device=S_u.device)
        P_a, P_g = torch.where(keep, P_a, eye), torch.where(keep, P_g, eye)
        for i, places in enumerate(pairs.values()):
            for (stack, j), P in zip(places, (P_a[i], P_g[i]), strict=True):
                maps[stack.sides[j]] = P
                kept = stack.state["kept"][j]
                kept.copy_(torch.where(keep[i].squeeze(), k[i], kept))
    for stack in stacks:
        eye = torch.eye(stack.r, dtype=stack.compute_dtype, device=stack.device)
        P = torch.stack([maps.get(side, eye) for side in stack.sides])
        stack.assign(left(P, stack.weights().to(P.dtype), stack.rank_dim))


def _buckets(stacks: Sequence[Stack]) -> list[dict[LoraPair, tuple[Place, Place]]]:
    """Group the pairs that have both factors in ``stacks`` by rank, device, dtype and settings."""
    places: dict[LoraPair, dict[str, Place]] = {}
    for stack in stacks:
        for i, side in enumerate(stack.sides):
            places.setdefault(side.pair, {})[side.name] = (stack, i)
    buckets: dict[tuple[object, ...], dict[LoraPair, tuple[Place, Place]]] = {}
    for pair, found in places.items():
        if len(found) == 2:
            stack = found["A"][0]
            key = (stack.r, stack.device, stack.compute_dtype, id(stack.group))
            buckets.setdefault(key, {})[pair] = (found["A"], found["B"])
    return list(buckets.values())


def _rows(key: str, places: Sequence[Place]) -> Tensor:
    return torch.stack([stack.state[key][i] for stack, i in places])


def _factors(pairs: dict[LoraPair, tuple[Place, Place]]) -> tuple[Tensor, Tensor]:
    """Return S_u and S_d ``[P, r, r]``, whichever side each is kept with."""
    by_moment: dict[str, list[Tensor]] = {"u": [], "d": []}
    for places in pairs.values():
        for stack, i in places:
            by_moment[stack.sides[i].moment()].append(stack.state["factor"][i])
    return torch.stack(by_moment["u"]), torch.stack(by_moment["d"])
