"""What the step may not depend on: signs of a basis, storage, how matrices share slabs, rotations of the rank space."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import EPS
from strategies import DTYPES, few, generator, orthogonal, random_spd, rank_dims, seeds, some
from update_kit import FINE, HYPER, MATRICES, all_rules, draw, make_slab, take

from curvopt.functional import compute_dtype
from curvopt.functional.inverse import eigenbasis
from curvopt.functional.update import CHUNK, RULES, Slab


@given(seeds, rank_dims, st.sampled_from([torch.float32, torch.float64]), st.integers(1, 8))
@few
def test_eigen_does_not_depend_on_signs_of_the_basis(seed, rank_dim, dtype, r):
    """Q → QD with D = diag(±1), moments carried (m → Dm, v → v): bit for bit, since signs do not round."""
    g = generator(seed)
    L, d = 2, 6
    Q = eigenbasis(random_spd(L, r, g).to(dtype))[0]
    one, two = (make_slab(L, r, d, rank_dim, dtype, replace(HYPER, weight_decay=0.1), Q) for _ in range(2))
    signs = torch.ones(L, r)
    for _ in range(5):
        D = torch.randint(0, 2, (L, r), generator=g) * 2.0 - 1
        two.matrix = Q * D[:, None, :].to(dtype)
        two.exp_avg.mul_((signs * D).to(dtype).unsqueeze(2 if rank_dim == 1 else 1))
        signs = D
        grads = draw(one, g)
        take("eigen", one, grads)
        take("eigen", two, grads)
    assert all(torch.equal(a, b) for a, b in zip(one.params, two.params, strict=True))
    assert torch.equal(one.exp_avg_sq, two.exp_avg_sq)


def test_control_signs_matter_when_the_moments_are_not_carried():
    g = generator(5)
    Q = eigenbasis(random_spd(1, 4, g))[0]
    one, two = (make_slab(1, 4, 6, 1, torch.float64, HYPER, Q) for _ in range(2))
    for i in range(3):
        two.matrix = Q * (-1.0) ** i
        grads = [x.double() for x in draw(one, g)]
        take("eigen", one, grads)
        take("eigen", two, grads)
    assert (one.params[0] - two.params[0]).abs().max() > 1e-3


@given(seeds, st.sampled_from(sorted(RULES)), st.sampled_from(DTYPES), st.integers(1, 9), st.integers(1, 24))
@some
def test_both_storages_give_the_transposed_result(seed, rule, dtype, r, d):
    """A as (r, d) and B as (d, r): the same numbers in another order, so equal up to the order of sums."""
    g = generator(seed)
    L = 2
    M = MATRICES[rule](random_spd(L, r, g)).to(compute_dtype(dtype))
    hyper = replace(HYPER, weight_decay=0.05)
    a, b = make_slab(L, r, d, 1, dtype, hyper, M), make_slab(L, r, d, 2, dtype, hyper, M)
    b.params = [p.T.clone() for p in a.params]
    for _ in range(4):
        grads = draw(a, g)
        take(rule, a, grads)
        take(rule, b, [x.T.contiguous() for x in grads])
    if dtype in (torch.bfloat16, torch.float16):  # stored values may fall to either side of a rounding boundary
        rtol, atol = 8 * EPS[dtype], 4 * EPS[dtype]
    else:  # Adam turns a relative error of a small rotated gradient into one of the update, which is ≤ ~2·lr per step
        rtol, atol = 0, 4 * 512 * r * EPS[dtype]
    for p, q in zip(a.params, b.params, strict=True):
        torch.testing.assert_close(p, q.T, rtol=rtol, atol=atol)


@all_rules
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("chunk", [1, CHUNK])
def test_slabs_and_matrices_are_independent(rule, identity, chunk, monkeypatch):
    """One call over three slabs of two matrices each, in one buffer, is six calls over one matrix."""
    monkeypatch.setattr("curvopt.functional.update.CHUNK", chunk)
    g = generator(8)
    hyper = replace(HYPER, weight_decay=0.1)
    spare = torch.empty(2 * 4 * 16, dtype=torch.float64)
    slabs, singles = [], []
    for i, (rank_dim, damping) in enumerate(((1, 0.1), (2, 0.1), (1, 0.5))):
        M = None if identity else MATRICES[rule](random_spd(2, 4, g))
        s = make_slab(2, 4, 16, rank_dim, torch.float64, hyper, M, 10 * i)
        s.damping, s.spare = damping, spare.view(s.exp_avg.shape)
        slabs.append(s)
        for n in range(2):
            moments = (s.exp_avg[n : n + 1].clone(), s.exp_avg_sq[n : n + 1].clone())
            single = (s.step.clone(), rank_dim, None if M is None else M[n : n + 1], hyper)
            singles.append(Slab([s.params[n].clone()], torch.empty(0), *moments, *single, damping=damping))
    for _ in range(3):
        grads = [[x.double() for x in draw(s, g)] for s in slabs]
        for s, x in zip(slabs, grads, strict=True):
            s.grads = torch.stack(x)
        RULES[rule](slabs, FINE)
        for s, x in zip(singles, [x for part in grads for x in part], strict=True):
            take(rule, s, [x])
    for p, single in zip([p for s in slabs for p in s.params], singles, strict=True):
        torch.testing.assert_close(p, single.params[0], rtol=0, atol=100 * EPS[torch.float64])
    assert [s.step.item() for s in slabs] == [3, 3, 3]


@all_rules
def test_rotation_of_the_rank_space(rule):
    """A ← VA, S ← VSVᵀ: eigen and momentum turn with it; adam, whiten and polar act in Adam's axes and do not."""
    g = generator(16)
    V = orthogonal(4, g)
    S = random_spd(1, 4, g)
    one = make_slab(1, 4, 8, 1, torch.float64, HYPER, MATRICES[rule](S))
    two = make_slab(1, 4, 8, 1, torch.float64, HYPER, MATRICES[rule](V @ S @ V.T))
    two.params = [V @ p for p in one.params]
    start = one.params[0].clone()
    grads = [x.double() for x in draw(one, g)]
    take(rule, one, grads)
    take(rule, two, [V @ x for x in grads])
    a, b = one.params[0] - start, V.T @ two.params[0] - start
    cosine = (a * b).sum() / a.norm() / b.norm()
    assert (1 - cosine < 1e-12) if rule in ("momentum", "eigen") else (1 - cosine > 1e-6)
