"""How many directions are worth keeping: energy rule, hysteresis, entropy rank."""

import torch
from torch import Tensor


def energy_rank(energy: Tensor, threshold: float, min_rank: int = 1, k: Tensor | None = None) -> Tensor:
    """Return the smallest rank that holds a share ``threshold`` of the energy.

    ``energy`` is σ² for the balanced basis (GRIT's eigenvalues of S_u for the published one); the rule is
    Σ_{i≤k} energy_i ≥ τ Σ energy_i, clamped to [min_rank, k].

    Args:
        energy: ``[L, r]``, non-negative, in descending order.
        threshold: τ in (0, 1].
        min_rank: lower clamp; where fewer directions are live, that many.
        k: ``[L]`` live ranks (upper clamp), or None for r.

    Returns:
        ``[L]`` int64. Where there is no energy at all: the upper clamp, since nothing is known.
    """
    r = energy.shape[-1]
    top = torch.full(energy.shape[:-1], r, device=energy.device) if k is None else k.long()
    total = energy.sum(-1)
    # the last direction that still adds something is enough, also where rounding leaves the sum below total
    cumulative = energy.cumsum(-1)
    target = torch.minimum(threshold * total, cumulative[..., -1])
    asked = (cumulative < target.unsqueeze(-1)).sum(-1) + 1
    asked = torch.minimum(asked.clamp(min=min_rank), top)
    return torch.where(total > 0, asked, top)


def entropy_rank(energy: Tensor) -> Tensor:
    """Return exp(H(p)) with p = energy / Σ energy: between 1 and r, r for a flat spectrum, 0 without energy.

    Args:
        energy: ``[..., r]``, non-negative.
    """
    total = energy.sum(-1, keepdim=True)
    p = energy / torch.where(total > 0, total, 1.0)
    H = -torch.xlogy(p, p).sum(-1)
    return torch.where(total.squeeze(-1) > 0, H.exp(), 0.0)


def hysteresis(k: Tensor, asked: Tensor, pending: Tensor, room: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Decide the next rank so that one noisy spectrum does not cut a direction.

    The rank goes down only when the rule asked for fewer directions in two checks in a row, and then to the larger
    of the two. It goes up by one when the rule wants all live directions and there is ``room`` for another.

    Args:
        k: ``[L]`` live ranks.
        asked: ``[L]`` ranks the energy rule asks for now, at most ``k``.
        pending: ``[L]`` what it asked for at the last check if that was below ``k``, else 0.
        room: ``[L]`` booleans: whether the spectrum is still heavy at its end (`heavy_tail`).
        r: full rank of the tensors.

    Returns:
        The new ``k`` and the new ``pending``, both ``[L]``.
    """
    down = (asked < k) & (pending > 0)
    up = (asked >= k) & room & (k < r)
    new_k = torch.where(down, torch.maximum(asked, pending), torch.where(up, k + 1, k))
    new_pending = torch.where((asked < k) & ~down, asked, torch.zeros_like(pending))
    return new_k, new_pending


def heavy_tail(energy: Tensor, threshold: float, k: Tensor) -> Tensor:
    """Return ``[L]`` booleans: the last live direction alone holds more than twice what the rule may drop, 2(1 − τ)."""
    last = energy.gather(-1, (k.long() - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return last > 2 * (1 - threshold) * energy.sum(-1)
