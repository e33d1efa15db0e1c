"""update.py: the rules; AdamW to the bit under the identity, and their formulas in float64 under anything else."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import EPS, AdamW, bits, rule_step
from strategies import DTYPES, few, generator, orthogonal, random_spd, rank_dims, seeds, some

from curvopt.functional import compute_dtype
from curvopt.functional.inverse import damped_inverse, damped_inverse_root, eigenbasis
from curvopt.functional.update import CHUNK, RULES, Hyper, Slab

ROTATED = ["adam", "eigen", "whiten"]
HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
FINE, FOUND = torch.tensor(0.0), torch.tensor(1.0)
MATRICES = {
    "polar": lambda S: eigenbasis(S)[0],
    "adam": lambda S: damped_inverse(S, 0.1),
    "eigen": lambda S: eigenbasis(S)[0],
    "whiten": lambda S: damped_inverse_root(S, 0.1),
    "momentum": lambda S: damped_inverse(S, 0.1),
}
all_rules = pytest.mark.parametrize("rule", RULES)


def make_slab(L, r, d, rank_dim, dtype, hyper=HYPER, matrix=None, seed=0):
    """A slab of random parameters with empty moments; gradients are to be set."""
    shape = (r, d) if rank_dim == 1 else (d, r)
    params = [torch.randn(shape, generator=generator(seed + i), dtype=torch.float64).to(dtype) for i in range(L)]
    moments = [torch.zeros(L, *shape, dtype=dtype) for _ in range(2)]
    return Slab(params, torch.empty(0), *moments, torch.tensor(0.0), rank_dim, matrix, hyper)


def draw(slab, g):
    """Gradients for one step, of the scale of token means, one list per parameter dtype."""
    return [0.01 * torch.randn(p.shape, generator=g).to(p.dtype) for p in slab.params]


def take(rule, slab, grads, found_inf=FINE):
    wide = compute_dtype(slab.params[0].dtype)
    slab.grads = torch.stack([g.to(wide) for g in grads])
    RULES[rule]([slab], found_inf)


# ------------------------------------------------------------------------------------------------- reduction to AdamW


def against_torch(rule, slab, lr_of, hyper, steps=12):
    """Run torch's fused AdamW beside the rule on the same gradients; return the largest difference."""
    reference = [torch.nn.Parameter(p.clone()) for p in slab.params]
    optimizer = torch.optim.AdamW(
        reference, lr=hyper.lr, betas=(hyper.beta1, hyper.beta2), eps=hyper.eps, weight_decay=hyper.weight_decay,
        maximize=hyper.maximize, fused=True,
    )  # fmt: skip
    g = generator(99)
    for i in range(steps):
        grads = draw(slab, g)
        lr = lr_of(i)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        slab.hyper = replace(hyper, lr=group["lr"])
        for p, x in zip(reference, grads, strict=True):
            p.grad = x.clone()
        optimizer.step()
        take(rule, slab, grads)
    pairs = [(slab.params, reference)]
    pairs.append((slab.exp_avg, [optimizer.state[p]["exp_avg"] for p in reference]))
    pairs.append((slab.exp_avg_sq, [optimizer.state[p]["exp_avg_sq"] for p in reference]))
    assert slab.step.item() == steps
    return max(
        (a.double() - b.double()).abs().max().item()
        for ours, theirs in pairs
        for a, b in zip(ours, theirs, strict=True)
    )


def schedule(i):
    return 1e-2 * (1 - i / 20)


@pytest.mark.parametrize("rule", ROTATED)
@pytest.mark.parametrize("matrix", ["none", "eye"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank_dim", [1, 2])
def test_identity_is_fused_adamw_to_the_bit(rule, matrix, dtype, rank_dim):
    """With and without decay, under maximize, with a schedule.

    Sizes are multiples of any vector width: torch's CPU kernel rounds the scalar tail of a tensor otherwise than its
    vectorised body, so that AdamW itself may be one ulp different after concatenation (see below).
    """
    M = None if matrix == "none" else torch.eye(4).repeat(3, 1, 1)
    for weight_decay, maximize in ((0.0, False), (0.01, False), (0.3, True)):
        hyper = replace(HYPER, weight_decay=weight_decay, maximize=maximize)
        slab = make_slab(3, 4, 32, rank_dim, dtype, matrix=M)
        assert against_torch(rule, slab, schedule, hyper) == 0


@pytest.mark.parametrize("rule", ROTATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
def test_learning_rate_as_tensor(rule, dtype, lr_dtype):
    hyper = replace(HYPER, lr=torch.tensor(1e-2, dtype=lr_dtype), weight_decay=0.1)
    assert against_torch(rule, make_slab(2, 4, 16, 1, dtype), schedule, hyper) == 0


def test_learning_rate_as_tensor_float64_without_decay():
    hyper = replace(HYPER, lr=torch.tensor(1e-2))
    assert against_torch("eigen", make_slab(2, 4, 16, 1, torch.float64), schedule, hyper) == 0


@pytest.mark.parametrize("rule", ROTATED)
def test_learning_rate_as_float32_tensor_decays_float64_parameters_exactly(rule):
    hyper = replace(HYPER, lr=torch.tensor(1e-2), weight_decay=0.3)
    assert against_torch(rule, make_slab(2, 4, 16, 1, torch.float64), schedule, hyper) == 0


@pytest.mark.parametrize("rule", ROTATED)
def test_identity_is_fused_adamw_to_the_bit_at_odd_sizes(rule):
    worst = 0.0
    for shape in ((3, 5, 13), (4, 3, 7), (2, 7, 9)):
        for rank_dim in (1, 2):
            slab = make_slab(*shape, rank_dim, torch.float32)
            worst = max(worst, against_torch(rule, slab, schedule, replace(HYPER, weight_decay=0.1), steps=40))
    assert worst == 0


@pytest.mark.parametrize("rule", ROTATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identity_is_fused_adamw_to_an_ulp_at_odd_sizes(rule, dtype):
    """What holds at any size today: each step may round the last bit of lr·m̂/√v̂ + p otherwise."""
    slab = make_slab(3, 5, 13, 1, dtype)
    assert against_torch(rule, slab, schedule, replace(HYPER, weight_decay=0.1)) <= 12 * 4 * EPS[dtype]


def test_control_a_matrix_changes_the_update():
    hyper, g = HYPER, generator(3)
    for rule in ROTATED:
        M = MATRICES[rule](random_spd(3, 4, g)).float()
        assert against_torch(rule, make_slab(3, 4, 32, 1, torch.float32, matrix=M), schedule, hyper) > 1e-3


def test_momentum_with_the_identity_has_its_own_direction():
    """The fourth rule is not AdamW under I: same length, direction m̂ instead of m̂/√v̂."""
    assert against_torch("momentum", make_slab(3, 4, 32, 1, torch.float32), schedule, HYPER) > 1e-3


# ------------------------------------------------------------------------------------------------- formulas


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


def both(seed, rank_dim, r, d, damping, L=2, **fields):
    """The steps of polar and of eigen, rank first, from the same three gradients, and the slab of polar."""
    g = generator(seed)
    Q = eigenbasis(random_spd(L, r, g))[0]
    slabs = [make_slab(L, r, d, rank_dim, torch.float64, HYPER, Q, seed % 1000) for _ in range(2)]
    slabs[0].damping = damping
    for name, value in fields.items():
        setattr(slabs[0], name, value)
    for _ in range(3):
        grads = [x.double() for x in draw(slabs[0], g)]
        before = [torch.stack(s.params) for s in slabs]
        for rule, s in zip(("polar", "eigen"), slabs, strict=True):
            take(rule, s, grads)
    steps = [torch.stack(s.params) - b for s, b in zip(slabs, before, strict=True)]
    return *(x if rank_dim == 1 else x.mT for x in steps), slabs[0]


# a step of 1e-2 is read off as a difference of parameters of order one
READ = 1e3 * EPS[torch.float64]


@given(seeds, rank_dims, st.integers(1, 8), st.integers(0, 30))
@some
def test_polar_without_damping_is_the_polar_factor_of_eigens_step(seed, rank_dim, r, more):
    """U Vᵀ ‖δ‖_F/√r for δ = U Σ Vᵀ: of all steps with that spectral norm none has a larger ⟨·, δ⟩."""
    polar, eigen, _ = both(seed, rank_dim, r, r + 4 + more, damping=1e-12)
    U, sigma, Vh = torch.linalg.svd(eigen, full_matrices=False)
    size = (sigma.square().mean(-1)).sqrt()
    gap = (sigma[:, :1] / sigma[:, -1:]).max().item() ** 2  # what the inverse root makes of a rounding of G
    torch.testing.assert_close(polar, size[:, None, None] * U @ Vh, rtol=0, atol=gap * READ)
    best = (polar * eigen).sum((1, 2))
    torch.testing.assert_close(best, size * sigma.sum(-1), rtol=1e-6, atol=gap * READ)
    if r > 1:  # eigen's own step, cut to the same spectral norm, is worse
        assert ((eigen * size[:, None, None] / sigma[:, :1, None] * eigen).sum((1, 2)) < best).all()


@given(seeds, rank_dims, st.integers(1, 8), st.integers(1, 30))
@some
def test_polar_with_all_damping_is_eigen(seed, rank_dim, r, d):
    polar, eigen, _ = both(seed, rank_dim, r, d, damping=1e12)
    torch.testing.assert_close(polar, eigen, rtol=1e-9, atol=READ)


@given(seeds, rank_dims, st.integers(2, 8), st.integers(1, 30), st.sampled_from([1e-3, 0.1, 1.0]))
@some
def test_polar_has_eigens_length_and_a_flatter_spectrum(seed, rank_dim, r, d, damping):
    polar, eigen, slab = both(seed, rank_dim, r, d, damping)
    torch.testing.assert_close(polar.norm(dim=(1, 2)), eigen.norm(dim=(1, 2)), rtol=1e-9, atol=READ)
    values, flatter = torch.linalg.svdvals(eigen), torch.linalg.svdvals(polar)
    assert (flatter[:, 0] <= values[:, 0] * (1 + 1e-9) + READ).all()
    if d > 1:
        assert (flatter[:, 0] < values[:, 0] * 0.9999).all()
    # the moments are those of eigen: equalising is of the step alone
    assert slab.step.item() == 3


def test_polar_leaves_alone_what_it_knows_nothing_of():
    """``known`` is False: Adam in the given basis to the bit; the neighbour in the slab is equalised."""
    polar, eigen, _ = both(3, 1, 4, 16, 0.1, known=torch.tensor([False, True]))
    assert torch.equal(polar[0], eigen[0]) and (polar[1] - eigen[1]).abs().max() > 1e-4


@pytest.mark.parametrize("rank_dim", [1, 2])
def test_polar_of_live_directions_is_that_of_the_sliced_pair(rank_dim):
    """With k the damping is relative to the mean over live directions, so cutting dead ones off changes nothing."""
    g, r, k = generator(4), 6, 4
    Q = torch.eye(r, dtype=torch.float64).repeat(1, 1, 1)
    Q[:, :k, :k] = eigenbasis(random_spd(1, k, g))[0]
    rows = (slice(None, k), slice(None)) if rank_dim == 1 else (slice(None), slice(None, k))
    whole = make_slab(1, r, 9, rank_dim, torch.float64, HYPER, Q)
    cut = make_slab(1, k, 9, rank_dim, torch.float64, HYPER, Q[:, :k, :k].contiguous())
    naive = make_slab(1, r, 9, rank_dim, torch.float64, HYPER, Q)
    whole.k = torch.tensor([k])
    start = whole.params[0].clone()
    cut.params = [start[rows].clone()]
    for _ in range(3):
        grad = torch.zeros_like(start)
        grad[rows] = 0.01 * torch.randn(grad[rows].shape, generator=g, dtype=torch.float64)
        for s, x in ((whole, grad), (naive, grad), (cut, grad[rows])):
            take("polar", s, [x])
    torch.testing.assert_close(whole.params[0][rows], cut.params[0], rtol=0, atol=READ)
    assert (naive.params[0][rows] - cut.params[0]).abs().max() > 1e-5  # control: without k it does change


# ------------------------------------------------------------------------------------------------- symmetries


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
def test_matrix_and_buffers_of_found_inf_do_not_leak(rule):
    """A skipped step over a poisoned buffer and poisoned gradients is skipped all the same."""
    g = generator(18)
    slab = make_slab(2, 4, 8, 1, torch.float32, HYPER, MATRICES[rule](random_spd(2, 4, g)).float())
    slab.spare = torch.full((2, 4, 8), torch.nan)
    before = [bits(p) for p in slab.params]
    take(rule, slab, [torch.full((4, 8), torch.inf)] * 2, FOUND)
    assert all(torch.equal(bits(p), b) for p, b in zip(slab.params, before, strict=True))


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
        "polar": lambda: eigenbasis(S, k)[0],
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
def test_rotation_of_the_rank_space(rule):
    """A ← VA, S ← VSVᵀ: polar, eigen and momentum turn with it; adam and whiten end in Adam's axes and do not."""
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
    assert (1 - cosine < 1e-12) if rule in ("polar", "momentum", "eigen") else (1 - cosine > 1e-6)


@all_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
