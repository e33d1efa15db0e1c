"""What the r×r factors are: the rank side of the layer's Fisher, and so, undamped, a natural gradient in rank space.

Numbers in parentheses are equations of ``oracles``.
"""

import pytest
import torch
from oracles import EPS, dense_fisher, kron, log_likelihood_gradients, rank_factor_d, rank_factor_u
from strategies import generator, orthogonal, random_spd, spectrum
from torch import nn

from curvopt.functional import left
from curvopt.functional.inverse import damped_inverse
from curvopt.functional.moments import gram

F64 = torch.float64
SCALING = 2.0


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


class Layer(nn.Module):
    """A frozen linear layer with an adapter, as adapters are written everywhere."""

    def __init__(self, d_in, r, d_out, g):
        super().__init__()
        self.base = nn.Linear(d_in, d_out).double().requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(d_in, r, bias=False).double(), nn.Linear(r, d_out, bias=False).double()
        for p in self.parameters():
            nn.init.normal_(p, std=0.5, generator=g)

    def forward(self, x):
        return self.base(x) + SCALING * self.lora_B(self.lora_A(x))


class Toy(nn.Module):
    """The layer under a nonlinearity and a head, so that d depends on the token."""

    def __init__(self, d_in, r, d_out, outputs, g, tanh=True):
        super().__init__()
        self.layer, self.act = Layer(d_in, r, d_out, g), nn.Tanh() if tanh else nn.Identity()
        self.head = nn.Linear(d_out, outputs).double().requires_grad_(False)
        nn.init.normal_(self.head.weight, generator=g)

    def forward(self, x):
        return self.head(self.act(self.layer(x)))


def signals(model, x, likelihood):
    """Return u ``(N, r)`` and the weighted rows of d whose second moment is S_d, as a hook on lora_A would see them.

    The labels are enumerated: with softmax each weighs its probability; Gaussian, the rows of the Jacobian do.
    """
    seen = []
    handle = model.layer.lora_A.register_forward_hook(lambda module, args, output: seen.append(output))
    out = model(x)
    handle.remove()
    u = seen[0]
    rows = []
    for c in range(out.shape[-1]):
        if likelihood == "softmax":
            weight, value = out.detach().softmax(-1)[..., c], -out.log_softmax(-1)[..., c]
        else:
            weight, value = torch.ones_like(out[..., c]), out[..., c]
        (d,) = torch.autograd.grad(value.sum(), u, retain_graph=True)
        rows.append((weight.sqrt()[..., None] * d).flatten(0, -2))
    return u.detach().flatten(0, -2), torch.cat(rows)


def factors(model, x, likelihood):
    u, d = signals(model, x, likelihood)
    return gram(u) / len(u), gram(d) / len(u)


def per_sample(model, x, likelihood):
    """Per-sample gradients of A and B by enumeration of the labels."""
    layer = model.layer

    def outputs(row, A, B):
        return model.head(model.act(layer.base(row) + SCALING * (row @ A.T) @ B.T))

    weights = [layer.lora_A.weight, layer.lora_B.weight]
    return log_likelihood_gradients(outputs, weights, x, likelihood)


# ------------------------------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
@pytest.mark.parametrize("r", [1, 3, 5])
def test_factors_are_those_of_the_per_sample_gradients(likelihood, r):
    """S_u and S_d from the hook's signals against (2): taken out of the explicit per-sample gradients of A and B."""
    g = generator(r)
    model, x = Toy(6, r, 4, 3, g), torch.randn(7, 6, generator=g, dtype=F64)
    S_u, S_d = factors(model, x, likelihood)
    samples = per_sample(model, x, likelihood)
    # sums of a few dozen products
    torch.testing.assert_close(S_d, rank_factor_d(samples, x), rtol=1e-12, atol=100 * EPS[F64] * S_d.norm().item())
    oracle = rank_factor_u(samples, model.layer.lora_A(x).detach())
    torch.testing.assert_close(S_u, oracle, rtol=1e-12, atol=100 * EPS[F64] * S_u.norm().item())


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
def test_partial_trace_of_the_dense_fisher(likelihood):
    """Inputs of equal length: the trace of the dense Fisher of A over its input side is |x|² S_d, exactly."""
    g = generator(20)
    model, x = Toy(6, 3, 4, 3, g), torch.randn(8, 6, generator=g, dtype=F64)
    x = 2.5 * x / x.norm(dim=1, keepdim=True)
    F = dense_fisher(per_sample(model, x, likelihood), 0).reshape(3, 6, 3, 6)
    S_u, S_d = factors(model, x, likelihood)
    traced = torch.einsum("iaja->ij", F) / 2.5**2
    torch.testing.assert_close(S_d, traced, rtol=1e-12, atol=1e-14)
    assert relative(S_u * S_d.trace() / S_u.trace(), traced) > 0.2  # the other factor is another matrix


def test_dense_fisher_of_a_linear_model_is_the_kronecker_product():
    """Squared loss, linear above the layer: g does not depend on the token, and (3) is exact; swapped sides are not."""
    g = generator(21)
    model, x = Toy(5, 3, 4, 4, g, tanh=False), torch.randn(9, 5, generator=g, dtype=F64)
    samples = per_sample(model, x, "gaussian")
    S_u, S_d = factors(model, x, "gaussian")
    gradient_side = SCALING**2 * model.head.weight.T @ model.head.weight  # E[s² g gᵀ]
    F_A, F_B = dense_fisher(samples, 0), dense_fisher(samples, 1)
    assert relative(kron(S_d, x.T @ x / 9), F_A) < 1e-13
    assert relative(kron(gradient_side, S_u), F_B) < 1e-13
    for exact, wrong in ((F_A, kron(S_u, x.T @ x / 9)), (F_B, kron(gradient_side, S_d))):
        assert relative(wrong * exact.trace() / wrong.trace(), exact) > 0.3


@pytest.mark.parametrize(("likelihood", "tokens"), [("softmax", 1), ("gaussian", 1), ("gaussian", 4)])
def test_curvlinops_kfac_has_the_same_rank_side(likelihood, tokens):
    """An independent K-FAC ("expand" with weight sharing): its blocks are kron(S_d, E xxᵀ) and kron(·, S_u)."""
    curvlinops = pytest.importorskip("curvlinops")
    g = generator(22)
    d_in, r, d_out, C, n = 5, 3, 4, 3, 6
    model = Toy(d_in, r, d_out, C, g)
    if likelihood == "softmax":
        x, y, loss = torch.randn(n, d_in, generator=g, dtype=F64), torch.arange(n) % C, nn.CrossEntropyLoss()
    else:
        shape = (n, tokens) if tokens > 1 else (n,)
        x, y = (torch.randn(*shape, size, generator=g, dtype=F64) for size in (d_in, C))
        loss = nn.MSELoss()  # the mean over C outputs of (y−t)²: the Hessian in the outputs is 2/C
    weights = [model.layer.lora_A.weight, model.layer.lora_B.weight]
    kfac = curvlinops.KFACLinearOperator(
        model, loss, weights, [(x, y)], fisher_type=curvlinops.FisherType.TYPE2, check_deterministic=False
    )
    F = kfac @ torch.eye(kfac.shape[1], dtype=F64)
    size = r * d_in
    S_u, S_d = factors(model, x, likelihood)
    flat = x.reshape(-1, d_in)
    scale = 1.0 if likelihood == "softmax" else 2 / C
    assert relative(scale * kron(S_d, flat.T @ flat / len(flat)), F[:size, :size]) < 1e-12
    block = F[size:, size:].reshape(d_out, r, d_out, r)
    rank_side = torch.einsum("oioj->ij", block)
    assert relative(S_u * rank_side.trace() / S_u.trace(), rank_side) < 1e-12
    output_side = torch.einsum("oipi->op", block) / S_u.trace()
    assert relative(kron(output_side, S_u), F[size:, size:]) < 1e-12
    assert relative(S_d * rank_side.trace() / S_d.trace(), rank_side) > 0.2


def test_token_means_need_their_count():
    """The loss of a batch is a token mean: its d is 1/N of the per-token one, so N·d is what goes into S_d."""
    g = generator(23)
    model, x = Toy(5, 3, 4, 3, g), torch.randn(10, 5, generator=g, dtype=F64)
    labels = torch.arange(10) % 3
    u = model.layer.lora_A(x).detach().requires_grad_()
    out = model.head(model.act(model.layer.base(x) + SCALING * model.layer.lora_B(u)))
    (d,) = torch.autograd.grad(nn.functional.cross_entropy(out, labels), u)
    rows = [
        next(G for c, (_, G) in enumerate(terms) if c == label)
        for terms, label in zip(per_sample(model, x, "softmax"), labels.tolist(), strict=True)
    ]
    expected = sum(G[0] @ G[0].T / row.square().sum() for G, row in zip(rows, x, strict=True)) / 10
    torch.testing.assert_close(gram(10 * d) / 10, expected, rtol=1e-11, atol=1e-15)


# ------------------------------------------------------------------------------------------------- Newton


def solve(S, damping):
    """(S + λ tr(S)/r I)⁻¹ by way of the package: its inverse is that of Ŝ, and has unit scale."""
    r = S.shape[-1]
    return damped_inverse(S[None], damping)[0] * r / S.trace()


def linear_problem(seed, r=4, d_in=6, d_out=5, n=40, noise=0.5):
    g = generator(seed)
    x = torch.randn(n, d_in, generator=g, dtype=F64) * spectrum("log", d_in, 10.0)
    A, B = torch.randn(r, d_in, generator=g, dtype=F64), torch.randn(d_out, r, generator=g, dtype=F64)
    t = x @ torch.randn(d_in, d_out, generator=g, dtype=F64)
    return A, B, x, t + noise * torch.randn(n, d_out, generator=g, dtype=F64)  # Gaussian targets


def loss_of(A, B, x, t):
    return 0.5 * (SCALING * (x @ A.T) @ B.T - t).square().sum() / len(x)


def gradients(A, B, x, t):
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    return torch.autograd.grad(loss_of(A, B, x, t), (A, B))


def linear_factors(A, B, x):
    """S_u, and the exact S_d of unit-variance Gaussian targets: E[ggᵀ] = I, so s² BᵀB."""
    u = x @ A.T
    rows = SCALING * B  # d for g = e_c, one row per output c
    return gram(u) / len(u), gram(rows)


@pytest.mark.parametrize("seed", range(3))
def test_natural_gradient_of_B_is_the_newton_step(seed):
    """The Hessian in B is I ⊗ s²S_u: ∇B S_u⁻¹/s² with λ → 0 lands on the least-squares solution, linearly in λ."""
    A, B, x, t = linear_problem(seed)
    S_u, _ = linear_factors(A, B, x)
    _, grad = gradients(A, B, x, t)
    u = SCALING * x @ A.T
    optimum = torch.linalg.lstsq(u, t).solution.T
    errors = []
    for damping in (1e-2, 1e-4, 1e-6, 1e-12):
        step = left(solve(S_u, damping)[None], grad[None], rank_dim=2)[0] / SCALING**2
        errors.append(relative(B - step, optimum))
    assert errors[3] < 1e-9
    assert errors[1] < 0.05 * errors[0] and errors[2] == pytest.approx(errors[1] / 100, rel=0.05)
    assert relative(B - grad / grad.norm(), optimum) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_natural_gradient_of_A_is_the_newton_step_in_rank_space(seed):
    """The Hessian in A is S_d ⊗ E[xxᵀ]. The factor undoes the rank side: with white x it is all of Newton's step."""
    A, B, x, t = linear_problem(seed, r=3)
    C = x.T @ x / len(x)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(C)).T
    for inputs in (x, white):
        _, S_d = linear_factors(A, B, inputs)
        grad, _ = gradients(A, B, inputs, t)
        H = torch.autograd.functional.hessian(lambda a, z=inputs: loss_of(a, B, z, t), A).reshape(A.numel(), A.numel())
        assert relative(kron(S_d, inputs.T @ inputs / len(inputs)), H) < 1e-12
        newton = torch.linalg.solve(H, grad.flatten()).reshape(A.shape)
        step = left(solve(S_d, 1e-13)[None], grad[None], rank_dim=1)[0]
        # what is left to Newton is the input side, which the rank side does not touch
        assert relative(step @ torch.linalg.inv(inputs.T @ inputs / len(inputs)), newton) < 1e-9
        if inputs is white:
            assert relative(step, newton) < 1e-9
            assert loss_of(A - step, B, inputs, t) <= loss_of(A, B, inputs, t)
            residual, _ = gradients(A - step, B, inputs, t)
            assert residual.norm() < 1e-9 * grad.norm()
        else:
            assert relative(step, newton) > 0.1


def test_sampled_gaussian_targets_give_the_same_factor():
    """t ~ N(y, I): the empirical S_d of N·d tends to s²BᵀB; six standard errors of a second moment."""
    A, B, x, _ = linear_problem(5, r=3)
    g, n = generator(6), 40_000
    rows = x[torch.randint(len(x), (n,), generator=g)]
    u = (rows @ A.T).requires_grad_()
    y = SCALING * u @ B.T
    t = y.detach() + torch.randn(y.shape, generator=g, dtype=F64)
    (d,) = torch.autograd.grad(0.5 * (y - t).square().sum() / n, u)
    _, S_d = linear_factors(A, B, x)
    assert relative(gram(n * d) / n, S_d) < 6 * (2 / n) ** 0.5


# ------------------------------------------------------------------------------------------------- gauge


@pytest.mark.parametrize("condition", [1.0, 3.0, 30.0])
def test_natural_gradient_step_does_not_depend_on_the_gauge(condition):
    """(A, B) → (RA, BR⁻¹) leaves the ΔW after a step as it was, with each factor on its own side; with the sides
    swapped, as published, only when R is orthogonal."""
    A, B, x, t = linear_problem(7)
    g = generator(8)
    R = orthogonal(4, g) * spectrum("log", 4, condition) @ orthogonal(4, g)
    products = {}
    for gauge, (a, b) in {"plain": (A, B), "moved": (R @ A, B @ torch.linalg.inv(R))}.items():
        S_u, S_d = linear_factors(a, b, x)
        grad_a, grad_b = gradients(a, b, x, t)
        for sides, (for_a, for_b) in {"kfac": (S_d, S_u), "paper": (S_u, S_d)}.items():
            step_a = left(solve(for_a, 1e-14)[None], grad_a[None], rank_dim=1)[0]
            step_b = left(solve(for_b, 1e-14)[None], grad_b[None], rank_dim=2)[0]
            products[gauge, sides] = (b - 0.1 * step_b) @ (a - 0.1 * step_a)
    # λ = 1e-14 is relative to factors of condition up to ~1e3·condition², and moves with the gauge
    assert relative(products["moved", "kfac"], products["plain", "kfac"]) < 1e-7
    paper = relative(products["moved", "paper"], products["plain", "paper"])
    assert paper < 1e-7 if condition == 1.0 else paper > 0.05
    assert relative(products["plain", "kfac"], B @ A) > 1e-3


def test_control_a_gradient_step_depends_on_the_gauge():
    A, B, x, t = linear_problem(7)
    g = generator(8)
    R = orthogonal(4, g) * spectrum("log", 4, 3.0) @ orthogonal(4, g)
    results = []
    for a, b in ((A, B), (R @ A, B @ torch.linalg.inv(R))):
        grad_a, grad_b = gradients(a, b, x, t)
        results.append((b - 1e-3 * grad_b) @ (a - 1e-3 * grad_a))
    assert relative(results[1] - B @ A, results[0] - B @ A) > 0.05


def test_damping_breaks_the_equivariance_by_its_own_size():
    """Relative damping is not a tensor: the ΔW of damped steps differ in two gauges, less with less damping."""
    A, B, x, t = linear_problem(9)
    g = generator(10)
    R = orthogonal(4, g) * spectrum("log", 4, 5.0) @ orthogonal(4, g)
    errors = []
    for damping in (1e-1, 1e-3, 1e-5):
        steps = []
        for a, b in ((A, B), (R @ A, B @ torch.linalg.inv(R))):
            S_u, S_d = linear_factors(a, b, x)
            grad_a, grad_b = gradients(a, b, x, t)
            steps.append((b - 0.1 * grad_b @ solve(S_u, damping)) @ (a - 0.1 * solve(S_d, damping) @ grad_a))
        errors.append(relative(steps[1] - B @ A, steps[0] - B @ A))
    assert errors[0] > 1e-3 and errors[2] < 0.05 * errors[1] < 0.05 * errors[0]


def test_random_factors_have_nothing_to_do_with_it():
    """Control of the controls: an unrelated factor of the same size breaks Newton's step."""
    A, B, x, t = linear_problem(0)
    _, grad = gradients(A, B, x, t)
    optimum = torch.linalg.lstsq(SCALING * x @ A.T, t).solution.T
    unrelated = random_spd(1, 4, generator(11))[0]
    S_u, _ = linear_factors(A, B, x)
    unrelated *= S_u.trace() / unrelated.trace()
    assert relative(B - grad @ solve(unrelated, 1e-12) / SCALING**2, optimum) > 0.1
