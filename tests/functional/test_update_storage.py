"""Steps in place: views, 16 bits, dead rows, spare buffers, gradients that are only read; and steps skipped."""

from dataclasses import replace

import pytest
import torch
from oracles import EPS, bits
from strategies import DTYPES, generator, random_spd
from update_kit import FINE, FOUND, HYPER, MATRICES, all_rules, draw, make_slab, take

from curvopt.functional import compute_dtype
from curvopt.functional.inverse import damped_inverse, damped_inverse_root, eigenbasis
from curvopt.functional.update import RULES

# ------------------------------------------------------------------------------------------------- storage


@all_rules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_land_in_the_parameter(rule, dtype):
    """Stacked experts, column blocks and transposes of one parameter are updated in place."""
    g = generator(13)
    r, d = 4, 16
    matrix = MATRICES[rule](random_spd(3, r, g)).to(compute_dtype(dtype))
    experts = torch.nn.Parameter(torch.randn(3, r, d, generator=g).to(dtype))
    packed = torch.nn.Parameter(experts.detach().transpose(0, 1).reshape(r, 3 * d).clone())
    turned = torch.nn.Parameter(experts.detach().mT.contiguous())
    grads = 0.01 * torch.randn(3, r, d, generator=g).to(dtype)
    outcomes = []
    for views in (experts.detach().unbind(), packed.detach().split(d, 1), turned.detach().mT.unbind()):
        slab = make_slab(3, r, d, 1, dtype, replace(HYPER, weight_decay=0.1), matrix)
        start = torch.stack(list(views))
        slab.params = list(views)
        take(rule, slab, list(grads))
        outcomes.append(torch.stack(list(views)))
        assert not torch.equal(outcomes[-1], start)
    assert torch.equal(outcomes[0], experts) and torch.equal(outcomes[1], outcomes[0])
    assert torch.equal(outcomes[2], outcomes[0]) and torch.equal(turned.mT, experts)
    assert torch.equal(packed.reshape(r, 3, d).transpose(0, 1), experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@all_rules
def test_sixteen_bit_parameters_round_once(rule, dtype):
    """From equal 16-bit state, the step is the float32 step rounded: no rounding of the update before the sum."""
    g = generator(14)
    M = MATRICES[rule](random_spd(2, 4, g)).float()
    hyper = replace(HYPER, weight_decay=0.1)
    narrow, wide = make_slab(2, 4, 16, 1, dtype, hyper, M), make_slab(2, 4, 16, 1, torch.float32, hyper, M)
    wide.params = [p.float() for p in narrow.params]
    grads = draw(narrow, g)
    take(rule, narrow, grads)
    take(rule, wide, grads)
    for p, q in zip(narrow.params, wide.params, strict=True):
        if rule == "momentum":  # its direction is read from the stored (rounded) moment
            torch.testing.assert_close(p, q.to(dtype), rtol=2 * EPS[dtype], atol=4 * HYPER.lr * EPS[dtype])
        else:
            assert torch.equal(p, q.to(dtype))
    assert torch.equal(narrow.exp_avg, wide.exp_avg.to(dtype))
    assert torch.equal(narrow.exp_avg_sq, wide.exp_avg_sq.to(dtype))


@all_rules
def test_dead_rows_stay_dead(rule):
    """Zero rows of p, ∇ and moments stay exactly zero when the matrix is the identity on them."""
    g = generator(15)
    k, S = torch.tensor([2, 3]), random_spd(2, 5, g)
    S[0, 2:], S[0, :, 2:], S[1, 3:], S[1, :, 3:] = 0, 0, 0, 0
    matrix = {
        "eigen": lambda: eigenbasis(S, k)[0],
        "whiten": lambda: damped_inverse_root(S, 0.1, k),
        "adam": lambda: damped_inverse(S, 0.1, k),
    }.get(rule, lambda: damped_inverse(S, 0.1, k))()
    slab = make_slab(2, 5, 8, 1, torch.float64, replace(HYPER, weight_decay=0.1), matrix)
    dead = [slice(2, 5), slice(3, 5)]
    for n in range(2):
        slab.params[n][dead[n]] = 0
    for _ in range(3):
        grads = [x.double() for x in draw(slab, g)]
        for n in range(2):
            grads[n][dead[n]] = 0
        take(rule, slab, grads)
    for n in range(2):
        assert not slab.params[n][dead[n]].any() and not slab.exp_avg[n][dead[n]].any()
        assert slab.params[n][: dead[n].start].abs().min() > 0


@all_rules
@pytest.mark.parametrize("rank_dim", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("identity", [True, False])
def test_the_spare_buffer_is_only_a_place_to_work_in(rule, rank_dim, dtype, identity):
    """The same bits with a buffer given, whatever it held, and with the next gradients in the overwritten stack."""
    g = generator(17)
    M = None if identity else MATRICES[rule](random_spd(2, 4, g)).float()
    one, two = (make_slab(2, 4, 16, rank_dim, dtype, replace(HYPER, weight_decay=0.1), M) for _ in range(2))
    kept = torch.empty(one.exp_avg.shape)
    for _ in range(3):
        grads = draw(one, g)
        take(rule, one, grads)
        two.spare = torch.full_like(kept, torch.nan)
        two.grads = kept.copy_(torch.stack(grads))
        RULES[rule]([two], FINE)
    for ours, theirs in ((one.params, two.params), (one.exp_avg, two.exp_avg), (one.exp_avg_sq, two.exp_avg_sq)):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))


@all_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_as_a_list_are_the_stack_and_only_read(rule, dtype):
    g = generator(17)
    matrix = MATRICES[rule](random_spd(3, 4, g)).float()
    whole, listed = (make_slab(3, 4, 16, 1, dtype, HYPER, matrix) for _ in range(2))
    grads = [x.to(dtype) for x in draw(whole, g)]
    before = torch.stack(grads)
    take(rule, whole, grads)
    listed.grads = grads
    RULES[rule]([listed], FINE)
    assert torch.equal(torch.stack(grads), before)
    for a, b in zip([*whole.params, whole.exp_avg], [*listed.params, listed.exp_avg], strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------- found_inf


@all_rules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("identity", [True, False])
def test_found_inf_changes_nothing(rule, dtype, poison, identity):
    g = generator(12)
    M = None if identity else MATRICES[rule](random_spd(2, 4, g)).to(compute_dtype(dtype))
    slab = make_slab(2, 4, 6, 1, dtype, replace(HYPER, weight_decay=0.3), M)
    take(rule, slab, draw(slab, g))
    tensors = [*slab.params, slab.exp_avg, slab.exp_avg_sq, slab.step]
    before = [bits(x) for x in tensors]
    grads = draw(slab, g)
    grads[1][2, 3] = poison
    take(rule, slab, grads, FOUND)
    assert all(torch.equal(bits(x), b) for x, b in zip(tensors, before, strict=True))
    take(rule, slab, draw(slab, g))  # and life goes on
    assert slab.step.item() == 2 and all(p.isfinite().all() for p in slab.params)
    assert not torch.equal(bits(slab.params[0]), before[0])


@all_rules
def test_matrix_and_buffers_of_found_inf_do_not_leak(rule):
    """A skipped step over a poisoned buffer and poisoned gradients is skipped all the same."""
    g = generator(18)
    slab = make_slab(2, 4, 8, 1, torch.float32, HYPER, MATRICES[rule](random_spd(2, 4, g)).float())
    slab.spare = torch.full((2, 4, 8), torch.nan)
    before = [bits(p) for p in slab.params]
    take(rule, slab, [torch.full((4, 8), torch.inf)] * 2, FOUND)
    assert all(torch.equal(bits(p), b) for p, b in zip(slab.params, before, strict=True))
