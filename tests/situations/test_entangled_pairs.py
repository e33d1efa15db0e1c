"""Pairs that are not s·B·A with matrices of their own: a change of basis would change them, so they keep theirs."""

import models
import pytest
import torch
from situations_kit import X, build, loss, steps
from torch import nn
from torch.nn import functional as F

from curvopt import GritKFAC, MatryoshkaScaledAdam
from curvopt.functional.basis import asymmetry
from curvopt.lora import find_lora_pairs, pair_by_name, resize_adapter, resize_pair

R = 4


class Between(models.LoraLinear):
    """A hand-written adapter with something between A and B; ``plain`` has nothing there."""

    def __init__(self, kind):
        super().__init__(8, 8, R)
        self.kind = kind
        self.mixer = nn.Parameter(torch.randn(R, R)) if kind == "mixer" else None
        self.gate = nn.Parameter(torch.rand(R) * 2) if kind == "gate" else None
        self.lora_A.bias = nn.Parameter(0.02 * torch.randn(R)) if kind == "bias" else None

    def forward(self, x):
        u = self.lora_A(x)
        u = {
            "mixer": lambda: u @ self.mixer,
            "gate": lambda: u * self.gate,
            "nonlinearity": lambda: torch.tanh(3 * u),
            "plain": lambda: u,
            "bias": lambda: u,
        }[self.kind]()
        return self.base(x) + self.lora_B(u)


def handmade(kind):
    torch.manual_seed(0)
    model = nn.Sequential(Between(kind), nn.Tanh(), Between(kind), nn.Tanh(), nn.Linear(8, 3)).double()
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B.weight, std=0.3)
    return model


def shared_by_peft(side, module=False):
    model = build(0.3)
    layers = model.base_model.model
    one, two = (getattr(layers[i], f"lora_{side}") for i in (0, 2))
    if module:
        two["default"] = one["default"]
    else:
        two["default"].weight = one["default"].weight
    return model


def blockdiagonal():
    from peft import BdLoraConfig

    config = BdLoraConfig(target_modules_bd_a=["0", "2"], nblocks=2, match_strict=False)
    return build(0.3, use_bdlora=config)


MODELS = {
    "one A": lambda: shared_by_peft("A"),
    "one B": lambda: shared_by_peft("B"),
    "one module for A": lambda: shared_by_peft("A", module=True),
    "BD-LoRA": blockdiagonal,
    "mixer": lambda: handmade("mixer"),
    "gate": lambda: handmade("gate"),
    "nonlinearity": lambda: handmade("nonlinearity"),
    "bias": lambda: handmade("bias"),
}
kinds = pytest.mark.parametrize("kind", MODELS)


@kinds
@pytest.mark.parametrize("reprojection", ["balanced", "paper"])
@pytest.mark.parametrize("statistics", ["activation", "gradient"])
def test_outputs_stay(kind, reprojection, statistics):
    """At learning rate 0 a reprojection must not move anything, and masks nothing whatever the threshold."""
    model = MODELS[kind]()
    optimizer = GritKFAC(
        model, lr=0.0, reproject_every=2, rank_threshold=0.5, min_rank=1,
        reprojection=reprojection, statistics=statistics,
    )  # fmt: skip
    before = model(X).detach()
    steps(model, optimizer, 4)
    assert torch.equal(model(X), before)
    assert set(optimizer.ranks().values()) == {R}
    assert optimizer.compact() == optimizer.ranks()
    assert torch.equal(model(X), before)


def test_control_a_plain_handmade_layer_is_reprojected():
    model = handmade("plain")
    optimizer = GritKFAC(model, lr=0.0, reproject_every=2)
    before, A = model(X).detach(), model[0].lora_A.weight.detach().clone()
    steps(model, optimizer, 2)
    assert not torch.allclose(model[0].lora_A.weight, A, rtol=1e-3)
    # T and T⁻¹ meet in the product: rounding times the condition of T, at most 1e4
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-11)
    assert all(pair["note"] == "" for pair in optimizer.diagnostics()["pairs"].values())


def test_a_library_s_layer_is_reprojected_whatever_its_gradients():
    """Clipping by value, noise for privacy and penalties on A change gradients, not what the layer computes."""
    model = build(0.3)
    optimizer = GritKFAC(model, lr=0.0, reproject_every=1)
    before, A = model(X).detach(), optimizer.pairs[0].A.detach().clone()
    (loss(model) + optimizer.pairs[0].A.square().sum()).backward()
    optimizer.step()
    assert not torch.allclose(optimizer.pairs[0].A, A, rtol=1e-3)
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-11)


@kinds
def test_diagnostics_say_why(kind):
    model = MODELS[kind]()
    optimizer = GritKFAC(model, lr=1e-2, reproject_every=1)
    steps(model, optimizer)
    notes = [pair["note"] for pair in optimizer.diagnostics()["pairs"].values()]
    said = ("one parameter with", "uses its parameters", "through B A alone", "A has a bias")
    assert all(any(words in note for words in said) for note in notes), notes


@kinds
def test_resizing_refuses(kind):
    model = MODELS[kind]()
    pair = find_lora_pairs(model)[0]
    if kind in ("nonlinearity", "bias"):  # have nothing of the rank's length but what is cut with A
        assert resize_adapter(model, {pair.name: 3})[pair.name] == 3
        model(X)
        return
    before = [p.shape for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"cannot be resized: .*(uses its parameters|one parameter|mixer|along the rank)"
    ):
        resize_pair(pair, 3)
    with pytest.raises(ValueError, match="cannot be resized"):
        resize_adapter(model, {pair.name: 3})
    assert [p.shape for p in model.parameters()] == before


def test_nested_ranks_refuse_an_A_with_a_bias():
    """What its directions above a rank add is not cut with the rows of A."""
    for make in (
        lambda m: GritKFAC(m, nested_ranks=[1, 2]),
        *(lambda m, n=n: MatryoshkaScaledAdam(m, nesting=n) for n in ("matryoshka", "dylora", "stratified")),
    ):
        with pytest.raises(ValueError, match="A has a bias, which no change of basis carries"):
            make(handmade("bias"))
    MatryoshkaScaledAdam(handmade("bias"), nesting="lora")


class Raw(nn.Linear):
    """A layer that is its own base, with the matrices beside its weight and bias, as loralib has it."""

    def __init__(self):
        super().__init__(8, 8)
        self.weight.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(R, 8)), nn.Parameter(0.3 * torch.randn(8, R))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


def test_the_bias_of_a_base_is_none_of_A():
    torch.manual_seed(0)
    model = nn.Sequential(Raw(), nn.Tanh(), nn.Linear(8, 3)).double()
    assert [pair.bound for pair in find_lora_pairs(model)] == [""]
    optimizer = GritKFAC(model, lr=1e-2, reproject_every=2, rank_threshold=0.5, min_rank=1)
    steps(model, optimizer, 12)
    assert max(optimizer.ranks().values()) < R
    MatryoshkaScaledAdam(model)


def test_nested_ranks_of_shared_matrices_need_no_other_basis():
    """P stands between B and A wherever they are."""
    for nesting in ("matryoshka", "dylora"):
        model = shared_by_peft("A", module=True)
        steps(model, MatryoshkaScaledAdam(model, nesting=nesting), 2)
    with pytest.raises(ValueError, match=r"nesting of .* must be another than 'stratified'"):
        MatryoshkaScaledAdam(shared_by_peft("A"), nesting="stratified")


def test_a_view_of_a_parameter_is_the_same_memory():
    """As PEFT ties the adapter of a head to that of its embedding."""
    model = handmade("plain")
    model[2].lora_B.weight = nn.Parameter(model[0].lora_A.weight.detach().T)
    assert [bool(pair.shared) for pair in find_lora_pairs(model)] == [True]


def test_names_alone_are_checked_by_gradients():
    model = handmade("mixer")
    optimizer = GritKFAC(list(model.named_parameters()), lr=0.0, reproject_every=1)
    assert [p.module for p in pair_by_name(model.named_parameters())] == [None, None]
    before = model(X).detach()
    steps(model, optimizer, 2)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_of_a_product_are_symmetric(dtype):
    """∇A Aᵀ = Bᵀ ∇B for a loss of B A alone; with a mixer it fails by order one."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    A, B, M, x = draw(8, 64), draw(48, 8), draw(8, 8), draw(100, 64).detach()
    found = []
    for mixer in (None, M):
        u = F.linear(x, A)
        y = (u if mixer is None else u @ mixer) @ B.T
        gA, gB = torch.autograd.grad(y.tanh().square().mean(), (A, B))
        wide = [t.detach().double() for t in (A, B, gA, gB)]
        found.append(float(asymmetry((wide[2] @ wide[0].T)[None], (wide[1].T @ wide[3])[None])))
    # some roundings of every gradient, of independent sign
    assert found[0] < 8 * torch.finfo(dtype).eps and found[1] > 0.5
    zero = torch.zeros(1, 8, 8)
    assert asymmetry(zero, zero) == torch.inf and asymmetry(zero, zero + torch.nan) == torch.inf


def test_what_one_reprojection_found_outlasts_that_of_other_pairs():
    model = handmade("nonlinearity")
    groups = [
        {"params": [layer.lora_A.weight, layer.lora_B.weight], "reproject_every": every}
        for layer, every in ((model[0], 2), (model[2], 3))
    ]
    optimizer = GritKFAC(groups, lr=1e-2, model=model)
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 8, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        found.append([bool(optimizer.entangled(pair)) for pair in optimizer.pairs])
    optimizer.add_param_group({"params": list(model[4].parameters())})  # pairs are found again
    found.append([bool(optimizer.entangled(pair)) for pair in optimizer.pairs])
    assert found == [[False, False], [True, False], [True, True], [True, True], [True, True]]
