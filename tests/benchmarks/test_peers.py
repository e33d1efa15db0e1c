"""The benchmark's own LoRA-Muon and LoRA-RITE against their formulas and invariances, in float64."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

PATH = Path(__file__).parents[2] / "benchmarks" / "peers.py"
RANK, D_IN, D_OUT = 3, 7, 5


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(seed: int, zero: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(RANK, D_IN, dtype=torch.float64, generator=generator)
    B = torch.randn(D_OUT, RANK, dtype=torch.float64, generator=generator) * (0 if zero else 1)
    return A.requires_grad_(), B.requires_grad_()


def descend(optimizer: torch.optim.Optimizer, A: Tensor, B: Tensor, steps: int) -> Tensor:
    """Fit B A to a moving target and return the product."""
    for i in range(steps):
        optimizer.zero_grad()
        target = torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + i))
        ((B @ A - target) ** 2).sum().backward()
        optimizer.step()
    return (B @ A).detach()


def make(peers: ModuleType, name: str, A: Tensor, B: Tensor, lr: float = 0.1) -> torch.optim.Optimizer:
    return getattr(peers, name)([(A, B)], lr=lr) if hasattr(peers, name) else torch.optim.AdamW([A, B], lr=lr)


@pytest.mark.parametrize(("name", "invariant"), [("LoraMuon", True), ("LoraRite", True), ("AdamW", False)])
def test_product_does_not_depend_on_the_factorisation(peers: ModuleType, name: str, invariant: bool) -> None:
    A, B = pair(0)
    T = torch.randn(RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(RANK)
    other_A = (T @ A).detach().requires_grad_()
    other_B = (B @ torch.linalg.inv(T)).detach().requires_grad_()
    first = descend(make(peers, name, A, B), A, B, 6)
    second = descend(make(peers, name, other_A, other_B), other_A, other_B, 6)
    # roots of Gram matrices lose half of the digits to their condition, about 1e2 here
    assert (torch.dist(first, second) < 1e-8 * first.norm()) == invariant


def test_lora_muon_moves_the_product_by_half_the_rate_in_every_direction(peers: ModuleType) -> None:
    A, B = pair(2)
    before_A, before_B = A.detach().clone(), B.detach().clone()
    descend(peers.LoraMuon([(A, B)], lr=0.3, momentum=0.0), A, B, 1)
    for change in ((B.detach() - before_B) @ before_A, before_B @ (A.detach() - before_A)):
        values = torch.linalg.svdvals(change)[:RANK]
        torch.testing.assert_close(values, torch.full_like(values, 0.15), rtol=1e-9, atol=0)


def test_lora_muon_equals_its_formula_by_svd(peers: ModuleType) -> None:
    A, B = pair(3)
    beta, lr = 0.8, 0.2
    mine = [A.detach().clone(), B.detach().clone()]
    momenta = [torch.zeros_like(A), torch.zeros_like(B)]
    optimizer = peers.LoraMuon([(A, B)], lr=lr, momentum=beta)
    for i in range(3):
        descend_once(optimizer, A, B, i)
        R_A, R_B = (inverse_root_by_svd(M) for M in (mine[0].T, mine[1]))
        momenta = [beta * m + (1 - beta) * p.grad for m, p in zip(momenta, (A, B), strict=True)]
        U, _, Vh = torch.linalg.svd(R_B @ momenta[0], full_matrices=False)
        new_A = mine[0] - lr / 2 * R_B @ U @ Vh
        U, _, Vh = torch.linalg.svd(momenta[1] @ R_A, full_matrices=False)
        mine = [new_A, mine[1] - lr / 2 * U @ Vh @ R_A]
        torch.testing.assert_close([A.detach(), B.detach()], mine, rtol=1e-8, atol=1e-10)


def descend_once(optimizer: torch.optim.Optimizer, A: Tensor, B: Tensor, seed: int) -> None:
    optimizer.zero_grad()
    target = torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ((B @ A - target) ** 2).sum().backward()
    optimizer.step()


def inverse_root_by_svd(M: Tensor) -> Tensor:
    """Return (MᵀM)^(-1/2) of a tall matrix."""
    _, values, Vh = torch.linalg.svd(M, full_matrices=False)
    return Vh.T @ torch.diag(1 / values) @ Vh


def test_first_step_of_lora_rite_is_lora_muons(peers: ModuleType) -> None:
    """V of one gradient equalises its singular values: the step of B is √d_out msign(∇B R_A) R_A."""
    A, B = pair(4)
    before = B.detach().clone()
    descend_once(peers.LoraRite([(A, B)], lr=0.1), A, B, 0)
    other_A, other_B = pair(4)
    descend_once(peers.LoraMuon([(other_A, other_B)], lr=0.2 * D_OUT**0.5, momentum=0.0), other_A, other_B, 0)
    # one rate for both matrices, hence only B can be compared; the pseudo-inverse is of a matrix of full rank
    torch.testing.assert_close(B.detach() - before, other_B.detach() - before, rtol=1e-8, atol=1e-10)


def test_lora_rite_with_a_resting_partner_is_matrix_adam(peers: ModuleType) -> None:
    _, B = pair(5)
    A = torch.linalg.qr(torch.randn(D_IN, RANK, dtype=torch.float64))[0].T.contiguous().requires_grad_()
    beta1, beta2, lr = 0.8, 0.9, 0.05
    mine, M, V = B.detach().clone(), torch.zeros_like(B), torch.zeros(RANK, RANK, dtype=torch.float64)
    optimizer = peers.LoraRite([(A, B)], lr=lr, betas=(beta1, beta2))
    kept = A.detach().clone()
    for t in range(1, 5):
        g = torch.randn(D_OUT, RANK, dtype=torch.float64)
        A.grad, B.grad = torch.zeros_like(A), g
        optimizer.step()
        V = beta2 * V + (1 - beta2) * g.T @ g / D_OUT
        values, vectors = torch.linalg.eigh(V / (1 - beta2**t))
        M = beta1 * M + (1 - beta1) * g @ (vectors / values.sqrt()) @ vectors.T
        mine = mine - lr * M / (1 - beta1**t)
        torch.testing.assert_close(B.detach(), mine, rtol=1e-9, atol=1e-12)
    assert torch.equal(A.detach(), kept)  # a zero gradient is a zero step


def test_lora_rite_keeps_the_mass_that_escapes(peers: ModuleType) -> None:
    """A partner that turns into the orthogonal complement takes V along as ρ, its largest eigenvalue."""
    eye = torch.eye(8, dtype=torch.float64)
    A, B = eye[:RANK].clone().requires_grad_(), torch.zeros(D_OUT, RANK, dtype=torch.float64, requires_grad=True)
    optimizer = peers.LoraRite([(A, B)], lr=0.1, betas=(0.9, 0.9))
    A.grad, B.grad = torch.zeros_like(A), torch.randn(D_OUT, RANK, dtype=torch.float64)
    optimizer.step()
    V = optimizer.state[B]["V"].clone()
    with torch.no_grad():
        A.copy_(eye[RANK : 2 * RANK])
    B.grad = torch.zeros_like(B)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[B]["rho"], 0.9 * torch.linalg.eigvalsh(V)[-1])
    assert optimizer.state[B]["V"].norm() == 0


@pytest.mark.parametrize("name", ["LoraMuon", "LoraRite"])
def test_a_rests_while_b_is_zero(peers: ModuleType, name: str) -> None:
    A, B = pair(6, zero=True)
    kept = A.detach().clone()
    optimizer = make(peers, name, A, B)
    descend_once(optimizer, A, B, 0)
    assert torch.equal(A.detach(), kept)
    assert B.detach().norm() > 0
    descend_once(optimizer, A, B, 1)
    assert torch.dist(A.detach(), kept) > 0
    assert A.detach().isfinite().all()
