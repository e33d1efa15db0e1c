"""Spectra of hand-built pairs: singular values of ΔW, energies of S_u S_d, and their ranks."""

import math

import models
import pytest
import torch
from grit_kit import rank_side
from hypothesis import given
from hypothesis import strategies as st
from strategies import few, generator, orthogonal, random_spd, seeds
from torch import nn

from curvopt import find_lora_pairs
from curvopt.analysis import effective_rank, spectra
from curvopt.analysis.core import core_of, known_factors, layer_of, observe
from curvopt.analysis.spectra import cumulative, spectrum

# float64, a handful of r×r products and factorisations of matrices of norm about one
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def planted(values, d_in=11, d_out=9, seed=0):
    """Return A and B whose product has these singular values, in a random gauge."""
    g, r = generator(seed), len(values)
    V, U = orthogonal(d_in, g)[:, :r], orthogonal(d_out, g)[:, :r]
    T = torch.eye(r, dtype=torch.float64) + 0.3 * torch.randn(r, r, generator=g, dtype=torch.float64)
    root = torch.tensor(values, dtype=torch.float64).sqrt()
    return T @ (root[:, None] * V.mT), (U * root) @ torch.linalg.inv(T)


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6), seeds)
@few
def test_singular_values_are_those_of_the_product(values, seed):
    A, B = planted(values, seed=seed)
    found = spectrum(core_of("x", A, B, 1.5)).singular
    torch.testing.assert_close(f64(found), 1.5 * f64(sorted(values, reverse=True)), **TIGHT)


def test_rank_above_the_width_of_the_layer():
    A, B = torch.randn(5, 3, generator=generator(0)).double(), torch.randn(4, 5, generator=generator(1)).double()
    found = spectrum(core_of("x", A, B)).singular
    dense = torch.linalg.svdvals(B @ A)
    torch.testing.assert_close(f64(found)[:3], dense, **TIGHT)
    assert len(found) == 5 and max(found[3:]) < 1e-12


@given(seeds, st.integers(1, 5))
@few
def test_energy_is_the_spectrum_of_the_product_of_the_factors_in_every_gauge(seed, r):
    g = generator(seed)
    S_u, S_d = random_spd(2, r, g)
    A, B = torch.randn(r, 8, generator=g).double(), torch.randn(7, r, generator=g).double()
    T = torch.eye(r, dtype=torch.float64) + 0.2 * torch.randn(r, r, generator=g, dtype=torch.float64)
    T_inv = torch.linalg.inv(T)
    exact = torch.linalg.eigvals(S_u @ S_d).real.sort(descending=True).values
    here = core_of("x", A, B, 1.0, (S_u, S_d)).energy
    there = core_of("x", T @ A, B @ T_inv, 1.0, (T @ S_u @ T.mT, T_inv.mT @ S_d @ T_inv)).energy
    # the balanced gauge regularises the factors by 1e-6 of their mean eigenvalue
    torch.testing.assert_close(here, exact, rtol=1e-4, atol=1e-4 * float(exact[0]))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4 * float(exact[0]))


def test_effective_rank_of_known_spectra():
    assert effective_rank([2.0] * 5) == pytest.approx(5)
    assert effective_rank([3.0, 0.0, 0.0]) == pytest.approx(1)
    assert effective_rank([0.0, 0.0]) == 0
    assert effective_rank([1e308] * 4) == pytest.approx(4)
    p = [0.5, 0.25, 0.25]
    assert effective_rank([4 * x for x in p]) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert effective_rank(torch.tensor([2.0] * 5), normalised=True) == pytest.approx(1)
    assert cumulative([3.0, 1.0]) == [0.75, 1.0] and cumulative([0.0]) == [0.0]


@pytest.mark.parametrize("energy", [[], [-1.0], [float("nan")], [[1.0]]], ids=str)
def test_effective_rank_refuses(energy):
    with pytest.raises(ValueError, match="energy"):
        effective_rank(energy)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.layers.12.mlp.up_proj", (12, "up_proj")),
        ("h.3.attn.c_attn:second", (3, "c_attn")),
        ("encoder.layer.0.attention.2", (0, "attention")),
        ("first", (None, "first")),
        ("(root)", (None, "(root)")),
        ("0.1", (0, "0.1")),
    ],
)
def test_layer_and_projection(name, expected):
    assert layer_of(name) == expected


def test_of_an_optimizer_a_model_and_pairs():
    model = models.llama(torch.float64, start="random")
    optimizer = rank_side(model, lr=1e-3)
    models.fit(model, optimizer, 2)
    by_optimizer, by_model, by_pairs = spectra(optimizer), spectra(model), spectra(find_lora_pairs(model))
    assert [s.singular for s in by_optimizer] == [s.singular for s in by_model] == [s.singular for s in by_pairs]
    assert all(s.energy is not None for s in by_optimizer) and all(s.energy is None for s in by_model)
    pair, first = find_lora_pairs(model)[0], by_model[0]
    dense = torch.linalg.svdvals(pair.scaling * pair.B.detach() @ pair.A.detach())[: pair.rank]
    torch.testing.assert_close(f64(first.singular), dense, **TIGHT)
    assert (first.layer, first.projection) == (0, "q_proj")


def test_masked_directions_are_left_out():
    model = models.llama(torch.float64, start="random")
    optimizer = rank_side(model, lr=1e-3, reproject_every=1, rank_threshold=0.5, min_rank=1)
    models.fit(model, optimizer, 4)
    found = spectra(optimizer)
    assert {s.name: s.rank for s in found} == optimizer.ranks()
    assert min(s.rank for s in found) < 4
    assert all(len(s.energy) == len(s.singular) == s.rank for s in found)


def test_transposed_raw_factors():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(9, 2)), nn.Parameter(torch.randn(2, 7))

    torch.manual_seed(0)
    model = Raw().double()
    dense = torch.linalg.svdvals((model.lora_A @ model.lora_B).detach())[:2]
    torch.testing.assert_close(f64(spectra(model)[0].singular), dense, **TIGHT)


def test_a_plain_optimizer_has_no_pairs_to_offer():
    with pytest.raises(TypeError, match="AdamW"):
        spectra(torch.optim.AdamW(models.mlp().parameters()))


def test_weight_statistics_are_no_curvature():
    model = models.mlp()
    optimizer = rank_side(model, statistics="weight", update="adam")
    models.fit(model, optimizer, 2)
    assert known_factors(optimizer) == {} and all(s.energy is None for s in spectra(optimizer))


# ------------------------------------------------------------------------------------------- observing


def test_observe_is_what_the_optimizer_sees():
    """One batch, first step: the average of the optimizer is that observation itself."""
    model = models.mlp(torch.float64)
    seen = observe(model, [0], models.loss)
    optimizer = rank_side(model)
    models.loss(model, 0).backward()
    optimizer.step()
    expected = known_factors(optimizer)
    assert seen.keys() == expected.keys() == {"first", "second", "third"}
    for name, factors in expected.items():
        for S, T in zip(seen[name], factors, strict=True):
            torch.testing.assert_close(S, T, **TIGHT)


def test_observe_averages_over_batches_and_leaves_the_model_alone():
    model = models.mlp(torch.float64)
    models.loss(model, 5).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    one, two, both = (observe(model, batches, models.loss) for batches in ([0], [1], [0, 1]))
    for name in both:
        for a, b, mean in zip(one[name], two[name], both[name], strict=True):
            torch.testing.assert_close(mean, (a + b) / 2, **TIGHT)
    assert models.hooks(model) == 0
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == after.keys() and all(torch.equal(grads[name], after[name]) for name in grads)


def test_observe_removes_hooks_when_the_loss_raises():
    model = models.mlp()
    with pytest.raises(ZeroDivisionError):
        observe(model, [0], lambda m, b: 1 / 0)
    assert models.hooks(model) == 0


def test_observe_says_what_is_missing():
    with pytest.raises(ValueError, match="no LoRA pair"):
        observe(models.mlp(), [], models.loss)
    with pytest.raises(ValueError, match="LoRA pair"):
        observe(nn.Linear(3, 3), [0], models.loss)
