"""Hypothesis strategies: shapes, spectra and live ranks as LoRA meets them, and as it had better not.

Tensors come from a drawn seed, so that a failing example is small to print and to repeat.
"""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

few = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
some = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

ranks = st.one_of(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 31, 32, 63, 64]), st.integers(1, 64))
small_ranks = st.integers(1, 9)
stack_sizes = st.integers(1, 4)
dims = st.sampled_from([1, 3, 8, 17, 33, 64])
rank_dims = st.sampled_from([1, 2])
seeds = st.integers(0, 2**31 - 1)
dampings = st.sampled_from([1e-6, 1e-3, 1e-1, 1.0])
conditions = st.floats(0, 12).map(lambda x: 10.0**x)
spectra_kinds = ("log", "power", "flat", "cliff")


def generator(seed: int) -> torch.Generator:
    """Return a generator of its own for each example."""
    return torch.Generator().manual_seed(seed)


def orthogonal(r: int, g: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, float64."""
    Q, R = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))
    return Q * R.diagonal().sign()


def spectrum(kind: str, r: int, condition: float) -> Tensor:
    """Return r positive eigenvalues, descending from 1, of a kind, with the given ratio of first to last."""
    i = torch.arange(r, dtype=torch.float64)
    last = 1 / condition
    if kind == "log":
        return torch.full((), last, dtype=torch.float64) ** (i / max(r - 1, 1))
    if kind == "power":  # i^(−a) with a such that the last is 1/condition
        return (i + 1) ** (-torch.tensor(condition).log() / torch.tensor(max(r, 2)).log()).double()
    if kind == "cliff":
        return torch.where(i < (r + 1) // 2, 1.0, last).double()
    return torch.ones(r, dtype=torch.float64)


def spd(values: Tensor, g: torch.Generator) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors, float64."""
    Q = orthogonal(len(values), g)
    S = (Q * values) @ Q.T
    return (S + S.T) / 2


def random_spd(L: int, r: int, g: torch.Generator, rows: int | None = None) -> Tensor:
    """Return L second moments of ``rows`` normal vectors (default 2r + 2: well conditioned), float64."""
    z = torch.randn(L, 2 * r + 2 if rows is None else rows, r, generator=g, dtype=torch.float64)
    return z.mT @ z / z.shape[1]


@st.composite
def spd_stacks(draw, ranks: st.SearchStrategy[int] = ranks, conditions: st.SearchStrategy[float] = conditions):
    """Stacks ``[L, r, r]`` float64 of every kind of spectrum and scale (1e-12 to 1e6), full rank."""
    r, L, g = draw(ranks), draw(stack_sizes), generator(draw(seeds))
    kinds = [draw(st.sampled_from(spectra_kinds)) for _ in range(L)]
    scales = [10.0 ** draw(st.integers(-12, 6)) for _ in range(L)]
    condition = draw(conditions)
    return torch.stack([c * spd(spectrum(kind, r, condition), g) for c, kind in zip(scales, kinds, strict=True)])


@st.composite
def psd_stacks(draw, ranks: st.SearchStrategy[int] = small_ranks):
    """Stacks of second moments of fewer rows than r, zero rows (an empty factor) included."""
    r, L, g = draw(ranks), draw(stack_sizes), generator(draw(seeds))
    rows = [draw(st.integers(0, r)) for _ in range(L)]
    z = [torch.randn(n, r, generator=g, dtype=torch.float64) for n in rows]
    return torch.stack([m.T @ m for m in z])


@st.composite
def live_stacks(draw, ranks: st.SearchStrategy[int] = small_ranks):
    """A stack of well-conditioned second moments with live ranks k: zero on dead rows and columns."""
    r, L, g = draw(ranks), draw(stack_sizes), generator(draw(seeds))
    k = torch.tensor([draw(st.integers(1, r)) for _ in range(L)])
    S = random_spd(L, r, g)
    alive = torch.arange(r) < k[:, None]
    return torch.where(alive[:, :, None] & alive[:, None, :], S, 0.0), k


@st.composite
def energies(draw, ranks: st.SearchStrategy[int] = small_ranks):
    """Energies ``[L, r]``: non-negative, descending, with zeros, ties and wide ranges."""
    r, L = draw(ranks), draw(stack_sizes)
    value = st.one_of(st.just(0.0), st.sampled_from([1.0, 0.5]), st.floats(-12, 6).map(lambda x: 10.0**x))
    rows = [sorted((draw(value) for _ in range(r)), reverse=True) for _ in range(L)]
    return torch.tensor(rows, dtype=torch.float64)
