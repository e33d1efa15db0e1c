"""Every rule is its formula in float64 under any matrix; grafting keeps the length of Adam's step."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import EPS, AdamW, rule_step
from strategies import generator, random_spd, rank_dims, seeds, some
from update_kit import HYPER, MATRICES, all_rules, draw, make_slab, schedule, take

from curvopt.functional.inverse import damped_inverse


@all_rules
@pytest.mark.parametrize("rank_dim", [1, 2])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rule_is_its_formula(rule, rank_dim, maximize, weight_decay):
    """Each rule against (6) written as a loop over matrices: 25 steps, changing matrices and learning rates."""
    L, r, d, steps = 3, 5, 7, 25
    g = generator(11)
    slab = make_slab(L, r, d, rank_dim, torch.float64, replace(HYPER, maximize=maximize, weight_decay=weight_decay))
    first = (lambda x: x) if rank_dim == 1 else (lambda x: x.T)
    expected = [first(p).clone() for p in slab.params]
    adams = [AdamW((r, d), 0.9, 0.99, 1e-8) for _ in range(L)]
    for i in range(steps):
        if i % 8 == 0:  # moments stay where they are when the matrix moves: carrying is not the rule's business
            slab.matrix = MATRICES[rule](random_spd(L, r, g))
        slab.hyper = replace(slab.hyper, lr=schedule(i))
        grads = [x.double() for x in draw(slab, g)]
        take(rule, slab, grads)
        for n in range(L):
            args = (rule, adams[n], expected[n], first(grads[n]), slab.matrix[n], schedule(i), weight_decay, maximize)
            expected[n] = rule_step(*args)
    for n in range(L):
        # parameters of order one, 25 steps of a few roundings each; √v̂ ≥ 1e-3 against eps 1e-8 keeps Δ well conditioned
        torch.testing.assert_close(first(slab.params[n]), expected[n], rtol=0, atol=steps * 40 * EPS[torch.float64])
        moved = (expected[n] - first(make_slab(L, r, d, rank_dim, torch.float64).params[n])).abs().max()
        assert moved > 0.01
        torch.testing.assert_close(first(slab.exp_avg[n]), adams[n].m, rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(first(slab.exp_avg_sq[n]), adams[n].v, rtol=1e-11, atol=1e-18)


@given(seeds, rank_dims, st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.0, 0.2]))
@some
def test_momentum_has_adamw_length_and_preconditioned_direction(seed, rank_dim, r, d, weight_decay):
    """‖update‖_F is AdamW's, matrix by matrix, and the update is a negative multiple of P m."""
    g = generator(seed)
    L = 2
    P = damped_inverse(random_spd(L, r, g), 0.1)
    hyper = replace(HYPER, weight_decay=weight_decay)
    slab, plain = (make_slab(L, r, d, rank_dim, torch.float64, hyper, M, seed % 1000) for M in (P, None))
    for _ in range(3):
        grads = [x.double() for x in draw(slab, g)]
        before, before_plain = torch.stack(slab.params), torch.stack(plain.params)
        take("momentum", slab, grads)
        take("adam", plain, grads)
        keep = 1 - hyper.lr * weight_decay
        update, reference = torch.stack(slab.params) - before * keep, torch.stack(plain.params) - before_plain * keep
        length, expected = update.norm(dim=(1, 2)), reference.norm(dim=(1, 2))
        # the update is recovered as a difference of numbers of order one, so it is known to √(rd)·eps only
        tolerance = 8 * (r * d) ** 0.5 * 4 * EPS[torch.float64]
        torch.testing.assert_close(length, expected, rtol=1e-12, atol=tolerance)
        m = slab.exp_avg
        direction = -(P @ m if rank_dim == 1 else m @ P.mT)
        scale = (length / direction.norm(dim=(1, 2)))[:, None, None]
        torch.testing.assert_close(update, direction * scale, rtol=1e-11, atol=tolerance)


@pytest.mark.parametrize("rule", ["momentum", "polar"])
def test_grafting_onto_nothing_is_nothing(rule):
    slab = make_slab(2, 3, 4, 1, torch.float32, matrix=torch.eye(3).repeat(2, 1, 1))
    before = [p.clone() for p in slab.params]
    take(rule, slab, [torch.zeros(3, 4)] * 2)
    assert all(torch.equal(p, q) for p, q in zip(slab.params, before, strict=True))
