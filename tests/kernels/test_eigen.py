import pytest
import torch
from curvopt.kernels import eigen

from curvopt import kernels
from curvopt.functional import inverse as reference

EPS = 6e-8
RANKS = [4, 6, 8, 12, 16]
SLOW = [pytest.param(r, marks=pytest.mark.slow) for r in (24, 32, 48, 64, 128)]


def off_diagonal(M):
    return M - torch.diag_embed(M.diagonal(dim1=1, dim2=2))


def check(Q, values, S, k=None):
    """Orthonormal, diagonalising, descending; each to what float32 rotations can give."""
    r = S.shape[-1]
    S_hat, _ = reference.normalised(S, k)
    Q = Q.double()
    eye = torch.eye(r, dtype=torch.float64)
    # each of some 5r rotations of a row rounds it by ε; errors add up like a walk, over r rows
    assert (Q.mT @ Q - eye).norm(dim=(1, 2)).max() <= 10 * EPS * r
    residual = off_diagonal(Q.mT @ S_hat @ Q).norm(dim=(1, 2)) / S_hat.norm(dim=(1, 2))
    assert residual.max() <= 20 * EPS * r**0.5, "as good as LAPACK's in float32"
    _, exact = reference.eigenbasis(S.double(), k)
    # an eigenvalue moves by at most the residual, which is relative to the largest
    assert ((values.double() - exact).abs() / S_hat.norm(dim=(1, 2))[:, None]).max() <= 20 * EPS * r
    assert (values.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("r", [*RANKS, *SLOW])
@pytest.mark.parametrize("spectrum", ["power_law", "log_spaced"])
def test_eigenbasis(r, spectrum, spd, device):
    S = getattr(spd, spectrum)(2, r) * 1e-8
    Q, values = eigen.eigenbasis(S.to(device))
    check(Q.cpu(), values.cpu(), S)


@pytest.mark.parametrize("r", [8, 12])
def test_leading_subspace(r, spd, device):
    S = spd.log_spaced(3, r, 1e4)
    Q, _ = eigen.eigenbasis(S.to(device))
    exact, _ = reference.eigenbasis(S.double())
    half = r // 2
    overlap = torch.linalg.svdvals(Q.cpu().double()[:, :, :half].mT @ exact[:, :, :half])
    # sin of the largest angle ≤ residual / gap; the gap at half of four decades over r values is above 1e-3 · largest
    assert (1 - overlap.min() ** 2).clamp(min=0).sqrt() < 20 * EPS * r**0.5 * 1e3


@pytest.mark.parametrize("L, r", [(101, 4), (5, 12)])
def test_many_pairs_and_live_ranks(L, r, spd, device):
    S, k = spd.power_law(L, r), torch.arange(L) % r + 1
    S[1, 2, :] = S[1, :, 2] = float("nan")  # k[1] = 2
    Q, values = (t.cpu() for t in eigen.eigenbasis(S.to(device), k.to(device)))
    check(Q, values, S, k)
    dead = torch.arange(r) >= k[:, None]
    eye = torch.eye(r).expand_as(Q)
    assert torch.equal(Q.mT[dead], eye[dead]), "dead directions last and untouched, in their own order"
    assert torch.equal(Q[dead], eye[dead])
    assert (values[dead] == 0).all()


@pytest.mark.parametrize("r", [4, 16])
def test_special_factors(r, spd, device):
    S = torch.eye(r).repeat(4, 1, 1)
    S[1] = torch.diag(torch.arange(r) + 1.0)  # diagonal and ascending: only the order changes
    S[2] = torch.ones(r, r)  # rank one
    S[3] = S[3] * 1e-30
    Q, values = (t.cpu() for t in eigen.eigenbasis(S.to(device)))
    check(Q, values, S)
    assert torch.equal(Q[0], torch.eye(r)), "nothing to rotate"
    assert torch.equal(Q[1], torch.eye(r).flip(-1))


def test_failures_are_the_references(spd, device):
    r = 6
    S, previous = spd.power_law(4, r), torch.randn(4, r, r)
    S[0] = 0
    S[1, 0, 0] = float("nan")
    S[2] = -S[2]
    for old in (None, previous):
        Q, values = eigen.eigenbasis(S.to(device), previous=None if old is None else old.to(device))
        expected, zero = reference.eigenbasis(S, previous=old)
        assert torch.equal(Q[:3].cpu(), expected[:3])
        assert torch.equal(values[:3].cpu().double(), zero[:3])


def test_an_unrotated_basis_fails_the_check(spd, device):
    S = spd.power_law(2, 8)
    Q, values = (t.cpu() for t in eigen.eigenbasis(S.to(device)))
    angle = torch.tensor(1e-4)
    turn = torch.eye(8)
    turn[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    with pytest.raises(AssertionError):
        check(Q @ turn, values, S)


def test_supports(spd, device):
    S = spd.power_law(2, 8).to(device)
    assert kernels.supports("eigenbasis", S)
    assert kernels.supports("eigenbasis", S, torch.tensor([1, 2], device=device), S)
    assert not kernels.supports("eigenbasis", S.double())
    assert not kernels.supports("eigenbasis", S, None, S.double())
