import pytest
import torch
from curvopt.kernels import coefficients, inverse, root

from curvopt import kernels
from curvopt.functional import inverse as reference

RANKS = (4, 6, 8, 12, 16, 24, 32)
SLOW = [pytest.param(r, marks=pytest.mark.slow) for r in (48, 64, 128)]

OPS = [
    (inverse.damped_inverse, reference.damped_inverse),
    (root.damped_inverse_root, reference.damped_inverse_root),
]


def error(X, exact):
    return (X.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))


def bound(r, damping):
    # forward error of elimination ~ condition · ε; 6 for the growth seen over matrices (9.1e-6 at r = 4, λ = 1e-2 on an
    # H200, whose divisions are not the interpreter's), and a floor of a few ε·√r
    condition = r / damping + 1
    return 6 * 6e-8 * (condition**0.5 + 0.02 * condition) + 1e-6


def check(op, twin, S, damping, device, **options):
    got = op(S.to(device), damping, **{n: v.to(device) for n, v in options.items()}).cpu()
    exact = twin(S.double(), damping, **options)
    assert torch.equal(got, got.mT), "symmetric to the bit"
    assert error(got, exact).max() <= bound(S.shape[-1], damping)


@pytest.mark.parametrize("op, twin", OPS, ids=["inverse", "root"])
@pytest.mark.parametrize("r", [*RANKS, *SLOW])
def test_matches_float64_on_both_spectra(op, twin, r, spd, device):
    L = 4 if r < 16 else 1
    for S in (spd.power_law(L, r), spd.log_spaced(L, r)):
        check(op, twin, S * 1e-7, 1e-2, device)


@pytest.mark.parametrize("r", [48, 64, 128])
def test_large_ranks(r, spd, device):
    check(inverse.damped_inverse, reference.damped_inverse, spd.power_law(1, r), 1e-2, device)


@pytest.mark.parametrize("op, twin", OPS, ids=["inverse", "root"])
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_damping_from_the_device(op, twin, damping, spd, device):
    S, given = spd.power_law(2, 6), torch.tensor(damping, device=device)
    assert kernels.supports("damped_inverse", S.to(device), given)
    got, exact = op(S.to(device), given).cpu(), twin(S.double(), damping)
    assert error(got, exact).max() <= bound(6, damping)
    host = twin(S.double(), float(torch.tensor(damping)))
    torch.testing.assert_close(twin(S.double(), torch.tensor(damping).double()), host, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("op, twin", OPS, ids=["inverse", "root"])
@pytest.mark.parametrize("damping", [1e-1, 1e-3])
@pytest.mark.parametrize("r", [*RANKS, 48, 64, 128])
def test_matches_float64_over_dampings(op, twin, damping, r, spd, device):
    for S in (spd.power_law(3, r), spd.log_spaced(3, r)):
        check(op, twin, S, damping, device)


@pytest.mark.parametrize("op, twin", OPS, ids=["inverse", "root"])
@pytest.mark.parametrize("L, r", [(69, 4), (21, 6), (5, 12)])
def test_many_pairs_and_live_ranks(op, twin, L, r, spd, device):
    S, k = spd.power_law(L, r), torch.arange(L) % r + 1
    S[1, 2, :] = S[1, :, 2] = float("nan")  # k[1] = 2: dead rows may hold anything
    S[2] = 0
    S[2, 3, 3] = 1  # k[2] = 3: nothing in the live block is empty, whatever previous is given
    check(op, twin, S, 1e-2, device, k=k, previous=torch.full_like(S, 7.0))
    got = op(S.to(device), 1e-2, k=k.to(device)).cpu()
    dead = torch.arange(r) >= k[:, None]
    assert torch.equal(got[dead], torch.eye(r).expand(L, r, r)[dead]), "the identity on dead directions, exactly"


@pytest.mark.parametrize("op, twin", OPS, ids=["inverse", "root"])
@pytest.mark.parametrize("r", [4, 8])
def test_failures_are_the_references(op, twin, r, spd, device):
    S, previous = spd.power_law(8, r), torch.randn(8, r, r)
    S[0] = 0  # empty
    S[1, 0, 0] = float("nan")
    S[2, 1, 2] = S[2, 2, 1] = float("inf")
    S[3] = -S[3]  # negative trace
    S[4] = torch.eye(r) - 2 * (torch.arange(r) == 1).diag().float()  # indefinite, positive trace
    S[5] *= 1e30
    S[6] *= 1e-30
    for options in ({}, {"previous": previous}):
        got = op(S.to(device), 1e-2, **{n: v.to(device) for n, v in options.items()}).cpu()
        exact = twin(S.double(), 1e-2, **options)
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=bound(r, 1e-2) * exact.abs().max().item())
        expected = previous if options else torch.eye(r).expand(8, r, r)
        assert torch.equal(got[0], torch.eye(r)), "empty is the identity, whatever was there"
        assert torch.equal(got[1:5], expected[1:5]), "broken keeps the previous, else is the identity"


def test_wrong_matrix_fails_the_check(spd, device):
    S = spd.power_law(2, 8)
    wrong = S.clone()
    wrong[1, 3, 3] *= 1.01
    with pytest.raises(AssertionError):
        check(lambda _, lam: inverse.damped_inverse(wrong.to(device), lam), reference.damped_inverse, S, 1e-2, device)


@pytest.mark.parametrize("smallest", [1.0, 0.3, 1e-2, 1e-4, 1e-8])
def test_coefficients_are_the_references(smallest):
    tolerance = coefficients.TOLERANCE
    assert coefficients.stages(smallest, tolerance) == reference.stages(smallest, tolerance)


def test_supports(spd, device):
    S = spd.power_law(2, 8).to(device)
    assert kernels.supports("damped_inverse", S, 1e-2)
    assert kernels.supports("damped_inverse_root", S, 1e-2, torch.tensor([1, 2], device=device), S)
    for refused in (S.double(), S.mT, S.half(), torch.zeros(1, 129, 129, device=device), S[:, :4, :4], S[:0]):
        assert not kernels.supports("damped_inverse", refused, 1e-2)
    assert not kernels.supports("damped_inverse_root", S, 0.0), "float32 cannot, float64 can"
    wrapped = S.as_subclass(type("Wrapped", (torch.Tensor,), {}))
    assert not kernels.supports("damped_inverse", wrapped, 1e-2)
    assert not kernels.supports("damped_inverse", S, 1e-2, torch.tensor([1.0, 2.0], device=device))
