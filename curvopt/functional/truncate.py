"""Masked rank truncation of stacks, in place."""

from torch import Tensor

from curvopt.functional import live_rows


def truncate_(X: Tensor, k: Tensor, rank_dim: int) -> Tensor:
    """Set directions ``i ≥ k`` of a stack to exactly zero, whatever they held (NaN too).

    Args:
        X: ``[L, r, d]`` (``rank_dim=1``) or ``[L, d, r]`` (``rank_dim=2``), written in place.
        k: ``[L]`` live ranks.
        rank_dim: the dimension of ``X`` that is the rank.

    Returns:
        ``X``.
    """
    dead = ~live_rows(k, X.shape[rank_dim])
    return X.masked_fill_(dead.unsqueeze(3 - rank_dim), 0)
