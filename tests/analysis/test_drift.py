"""Drift against dense d×d oracles: norms, principal angles, shares of energy; all the same in every gauge."""

import math

import models
import pytest
import torch
from grit_kit import rank_side
from hypothesis import given
from hypothesis import strategies as st
from strategies import few, generator, orthogonal, random_spd, seeds

from curvopt.analysis import drift
from curvopt.analysis.core import core_of
from curvopt.analysis.drift import pair_drift, principal_angles
from curvopt.functional.basis import balanced

# float64, products and factorisations of matrices of norm about one and condition below 1e4
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def layer(seed, r=4, d_in=9, d_out=8, s=1.7):
    """Return A, B, the dense second moments E[xxᵀ] and E[ggᵀ], and the S_u and S_d they imply."""
    g = generator(seed)
    A, B = torch.randn(r, d_in, generator=g).double(), torch.randn(d_out, r, generator=g).double()
    (X,), (G,) = random_spd(1, d_in, g), random_spd(1, d_out, g)
    return A, B, X, G, A @ X @ A.mT, s**2 * B.mT @ G @ B


def top(S, k):
    return torch.linalg.eigh(S)[1].flip(-1)[:, :k]


@given(seeds, st.sampled_from([0.25, 0.5, 0.75]))
@few
def test_against_the_dense_layer(seed, leading):
    s = 1.7
    A, B, X, G, S_u, S_d = layer(seed, s=s)
    found = pair_drift(core_of("x", A, B, s, (S_u, S_d)), leading)
    k = round(4 * leading)
    W = s * B @ A
    U, singular, Vh = torch.linalg.svd(W)
    P_A, P_B = A.mT @ torch.linalg.pinv(A.mT), B @ torch.linalg.pinv(B)  # projectors on row and column space
    angles_in = principal_angles(Vh[:k].mT, top(P_A @ X @ P_A, k))
    angles_out = principal_angles(U[:, :k], top(P_B @ G @ P_B, k))
    assert found.norm == pytest.approx(float(W.norm()), rel=1e-12)
    assert found.leading == k
    torch.testing.assert_close(f64(found.angles_in), angles_in, **TIGHT)
    torch.testing.assert_close(f64(found.angles_out), angles_out, **TIGHT)
    rho = float(torch.cat((angles_in, angles_out)).cos().square().mean())
    assert found.rho_align == pytest.approx(rho, abs=1e-8)
    p = singular[:4].square() / singular[:4].square().sum()
    assert found.r_eff == pytest.approx(math.exp(float(-(p * p.log()).sum())) / 4, rel=1e-10)


@given(seeds)
@few
def test_kept_share_is_the_energy_of_the_truncated_update_in_the_fisher_metric(seed):
    """tr(ΔWᵀ E[ggᵀ] ΔW E[xxᵀ]) of the update cut to k balanced directions, over that of all of it."""
    s, k = 1.7, 2
    A, B, X, G, S_u, S_d = layer(seed, s=s)
    found = pair_drift(core_of("x", A, B, s, (S_u, S_d)), 0.5)
    gauge = balanced(S_u[None], S_d[None], damping=0.0)
    TA, BT = gauge.T[0] @ A, B @ gauge.T_inv[0]

    def energy(W):
        return float(torch.trace(W.mT @ G @ W @ X))

    share = energy(s * BT[:, :k] @ TA[:k]) / energy(s * B @ A)
    # the balanced gauge regularises the factors by 1e-6 of their mean eigenvalue
    assert found.pi_proj == pytest.approx(share, rel=1e-4)
    # control: in the gauge that A and B happen to have, a prefix keeps another share
    assert energy(s * B[:, :k] @ A[:k]) / energy(s * B @ A) != pytest.approx(share, rel=1e-2)


@given(seeds)
@few
def test_nothing_depends_on_the_gauge(seed):
    A, B, _, _, S_u, S_d = layer(seed)
    T = torch.eye(4, dtype=torch.float64) + 0.2 * torch.randn(4, 4, generator=generator(seed + 1), dtype=torch.float64)
    T_inv = torch.linalg.inv(T)
    here = pair_drift(core_of("x", A, B, 1.7, (S_u, S_d)))
    there = pair_drift(core_of("x", T @ A, B @ T_inv, 1.7, (T @ S_u @ T.mT, T_inv.mT @ S_d @ T_inv)))
    for key in ("norm", "r_eff", "rho_align"):
        assert getattr(here, key) == pytest.approx(getattr(there, key), abs=1e-8)
    assert here.pi_proj == pytest.approx(there.pi_proj, rel=1e-4)  # regularised by 1e-6, as above
    # control: S_u and S_d of the old gauge with factors of the new one are another layer
    mixed = pair_drift(core_of("x", T @ A, B @ T_inv, 1.7, (S_u, S_d)))
    assert mixed.rho_align != pytest.approx(here.rho_align, abs=1e-6)


def test_aligned_and_orthogonal_by_construction():
    """ΔW = Σ ς_i q_i p_iᵀ; the Fisher has the same vectors, in the same order or the reverse."""
    g = generator(0)
    P, Q = orthogonal(9, g)[:, :4], orthogonal(8, g)[:, :4]
    size = f64([4.0, 3.0, 2.0, 1.0])
    A, B = P.mT, Q * size
    for values, expected in ((size, 1.0), (size.flip(0), 0.0)):
        S_u = torch.diag(values)  # A E[xxᵀ] Aᵀ with E[xxᵀ] = P diag(values) Pᵀ
        S_d = torch.diag(size * values * size)  # Bᵀ E[ggᵀ] B
        found = pair_drift(core_of("x", A, B, 1.0, (S_u, S_d)), 0.5)
        assert found.rho_align == pytest.approx(expected, abs=1e-12)


def test_a_random_update_scores_chance():
    whole = []
    for seed in range(200):
        A, B, X, G, *_ = layer(seed, r=8, d_in=16, d_out=16)
        whole.append(pair_drift(core_of("x", A, B, 1.0, (A @ X @ A.mT, B.mT @ G @ B)), 0.25).rho_align)
    # 200 pairs with 4 angles each, standard deviation of cos² about 0.25: three standard errors are 0.03; the update's
    # singular vectors are those of B A, X and G are nearly isotropic and independent of it
    assert sum(whole) / len(whole) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 0.5, 1.2, math.pi / 2])
def test_principal_angles_of_two_planes(angle):
    """Planes that share one direction and are turned by a known angle in the other; small angles keep their digits."""
    e = torch.eye(5, dtype=torch.float64)
    U = e[:, :2]
    V = torch.stack((e[:, 0], math.cos(angle) * e[:, 1] + math.sin(angle) * e[:, 2]), 1)
    R = orthogonal(2, generator(1))
    found = principal_angles(U @ R, V)
    torch.testing.assert_close(found, f64([0.0, angle]), rtol=1e-6, atol=1e-15)


def test_of_a_run():
    model = models.llama(torch.float64)
    optimizer = rank_side(model, lr=1e-2)
    assert drift(optimizer).norm == 0 and drift(optimizer).rho_align is None
    models.fit(model, optimizer, 3)
    found = drift(optimizer)
    dense = [p.scaling * (p.B @ p.A).detach() for p in optimizer.pairs]
    assert found.norm == pytest.approx(math.sqrt(sum(float(W.square().sum()) for W in dense)), rel=1e-10)
    assert 0 < found.rho_align <= 1 and 0 < found.pi_proj <= 1 and 0.25 <= found.r_eff <= 1
    assert found.rho_chance == pytest.approx(0.25)
    assert len(found.to_dict()["pairs"]) == len(optimizer.pairs) and "ρ_align" in str(found)
    unseen = drift(model)
    assert unseen.norm == found.norm and unseen.rho_align is None and unseen.pi_proj is None


def test_not_finite_is_said_and_not_raised():
    model = models.mlp()
    torch.nn.init.constant_(model.first.lora_A.weight, math.nan)
    pairs = {p.name: p for p in drift(model).pairs}
    assert pairs["first"].norm is None and pairs["second"].norm > 0


@pytest.mark.parametrize("leading", [0, -0.1, 1.5, "half", True])
def test_bad_share(leading):
    with pytest.raises(ValueError, match="leading"):
        drift(models.mlp(), leading=leading)
