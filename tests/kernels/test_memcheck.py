"""No kernel leaves the tensors it was given, races, or reads what nobody wrote; and kernels that do are noticed."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from curvopt.kernels import coefficients, eigen, launch, moments, root
from memcheck import watched
from update_cases import BF16, F16, F32, gradients, moved, slab

from curvopt import kernels
from curvopt.functional.outer import cosine_rows

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="looks into the interpreter")

# a tile of one, odd ones, full ones, and one more than full
slow = partial(pytest.param, marks=pytest.mark.slow)
RANKS = [1, 3, 4, 8, 16, 17, 32, 33, *map(slow, (64, 100, 128))]
UPDATES = [name for name in kernels.OPS if name.endswith("_update")]


@contextmanager
def clean(*names, rubbish=()):
    """Expect these kernels to run and to do nothing wrong."""
    with watched(rubbish) as watch:
        yield
    assert not watch.faults and set(watch.accesses) == set(names)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Few stages and sweeps: every one of them takes the same ways through memory."""
    monkeypatch.setattr(coefficients, "TOLERANCE", 0.5)
    monkeypatch.setattr(eigen, "SWEEPS", 1)


@pytest.fixture
def _tensor_ranges():
    if triton.__version__ < "3.7":
        pytest.skip("the interpreter of triton 3.6 cannot loop up to a tensor with numpy 2.4")


@triton.jit
def _copy(x, y, loaded, stored, BLOCK: tl.constexpr):
    e = tl.arange(0, BLOCK)
    tl.store(y + e, tl.load(x + e, mask=e < loaded, other=0.0), mask=e < stored)


@triton.jit
def _shift(x, to, begin, step):
    pid = tl.program_id(0)
    tl.store(x + pid * to, tl.load(x + begin + pid * step) + pid)


@triton.jit
def _turn(x, BLOCK: tl.constexpr, to, BARRIER: tl.constexpr):
    e = tl.arange(0, BLOCK)
    tl.store(x + e * to, e.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + BLOCK + e, tl.load(x + (BLOCK - 1 - e)))


@triton.jit
def _through(table, out, n):
    x = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(out, tl.load(tl.multiple_of(x, 16)) + tl.multiple_of(n, 16))


@triton.jit
def _hand_over(work, counter, out, N: tl.constexpr, SEM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    tl.store(work + tl.program_id(0), 1.0)
    if BEFORE:
        tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1.0, sem=SEM)
    if AFTER:
        tl.debug_barrier()
    if arrived == N - 1:
        tl.store(out, tl.sum(tl.load(work + tl.arange(0, N)), 0))
        tl.store(counter, 0.0)


def copy(make, loaded=8, stored=8):
    _copy[(1,)](make(), torch.zeros(8), loaded, stored, 16)


def through(offset, n=16, keep=True):
    x = torch.zeros(8)
    table, x = torch.tensor([x.data_ptr() + offset]), keep and x
    _through[(1,)](table, torch.zeros(1), n)


shift = lambda programs, *steps, warps=1: _shift[(programs,)](torch.zeros(8), *steps, num_warps=warps)  # noqa: E731
turn = lambda *how: _turn[(1,)](torch.zeros(16), 8, *how)  # noqa: E731
hand_over = lambda *how: _hand_over[(4,)](*map(torch.zeros, (4, 1, 1)), 4, *how)  # noqa: E731

# what is done: what is wrong with it, or None
CONTROLS = {
    (copy, partial(torch.zeros, 8)): None,
    (copy, lambda: torch.zeros(3, 8)[1]): None,
    (copy, lambda: torch.empty(8).fill_(2.0)): None,
    (copy, lambda: torch.empty(8)): "loads what was never written",
    (copy, partial(torch.zeros, 8), 9): "lies outside",
    (copy, partial(torch.zeros, 8), 8, 9): "lies outside",
    (copy, lambda: torch.zeros(31, dtype=torch.uint8)[:28].view(F32)): "lies outside",  # half an element
    (shift, 8, 1, 0, 1): None,
    (partial(shift, warps=2), 8, 1, 0, 1): "stores what its other warps may still load",
    (shift, 1, 0, 1, 1): None,
    (shift, 2, 1, 0, -1): "lies outside",
    (shift, 2, 0, 0, 1): "stores what another program writes",
    (shift, 2, 1, 0, 0): "loads what another program writes",
    (shift, 2, 1, 1, 1): "stores what another program loads",
    (turn, 1, True): None,
    (turn, 1, False): "loads its own store without a barrier",
    (turn, 0, True): "stores twice to an address",
    (through, 16): None,
    (through, 32): "lies outside",
    (through, 0, 16, False): "lies outside",  # the tensor is gone
    (through, 4): "is not the multiple it is said to be",
    (through, 0, 17): "is not the multiple it is said to be",
    (hand_over, "acq_rel", True, True): None,
    (hand_over, "relaxed", True, True): "loads what another program writes",
    (hand_over, "acq_rel", False, True): "loads what another program writes",
    (hand_over, "acq_rel", True, False): "loads what another program writes",
}


@pytest.mark.parametrize("n", range(len(CONTROLS)))
def test_control(n):
    (do, *arguments), expected = list(CONTROLS.items())[n]
    with watched() as watch:
        do(*arguments)
    assert watch.accesses and (expected in {f.kind for f in watch.faults} if expected else not watch.faults)


def test_control_other_tensors_and_equal_values():
    x = torch.zeros(8)
    with watched() as watch:
        copy(lambda: x)
        _shift[(2,)](torch.tensor([1.0, 0.0]), 0, 0, 1, num_warps=1)  # both store 1
    found = [(f.kernel, f.kind) for f in watch.faults]
    assert found[:2] == [("_copy", "lies outside"), ("_shift", "stores what another program writes")]


def launched(rule, *more):
    return ("_prepare", "_update", *(("_advance", "_equalise", *more) if "polar" in rule else ()))


def updated(rule, slabs, found=0.0, damping=(1.0,), together=False):
    """Run the rule on copies, every matrix of which has fences of its own; in one bucket if together."""
    ours = [moved(s, "cpu") for s in slabs]
    for s in ours if together else ():
        s.step = ours[0].step
    for n, s in enumerate(ours):
        s.grads = [g.clone() for g in s.grads] if n % 2 else s.grads
        s.damping = damping[n % len(damping)]
    assert kernels.supports(rule, ours, torch.tensor(found))
    kernels.OPS[rule](ours, torch.tensor(found))


@pytest.mark.parametrize("rule", UPDATES)
@pytest.mark.parametrize("r", RANKS)
def test_updates(rule, r):
    with clean(*launched(rule)):
        slabs = [slab(2, r, 5, 1), slab(1, r, 70, 2, seed=1), slab(1, r, 33, 1, matrix=False, seed=2)]
        slabs[0].k, slabs[1].k = torch.tensor([0, (r + 1) // 2]), torch.tensor([r])
        slabs[0].rates = tuple(float((i + 2) % 3) for i in range(r))
        updated(rule, slabs, together=True)


@pytest.mark.parametrize("rule", UPDATES)
@pytest.mark.parametrize("r, d", [(3, 45), (16, 48), slow(24, 64)])
def test_updates_of_all_dtypes(rule, r, d):
    """Several buckets, with and without the alignment hint."""
    with clean(*launched(rule)):
        types = ((BF16, BF16), (BF16, BF16), (F16, F32), (F32, F16))
        slabs = [slab(1, r, d, 1 + n % 2, *t, lr=torch.tensor(1e-3) if n else 1e-3) for n, t in enumerate(types)]
        slabs[1].grads = slabs[1].grads.to(BF16)
        updated(rule, slabs)


@pytest.mark.parametrize("rule", UPDATES)
def test_updates_that_must_change_nothing(rule):
    # kernels/polar.py says so: the matrices are then made of what stands in the buffers, and not applied
    with clean(*launched(rule, "_total"), rubbish=("_total", "_equalise")):
        updated(rule, [slab(2, 8, 600, 1), slab(1, 8, 33, 2)], found=1.0, together=True)


def test_parameters_that_are_not_aligned():
    with clean("_prepare", "_update"):
        s = replace(slab(1, 8, 32, 1), params=[torch.zeros(8 * 32 + 1)[1:].view(8, 32)])
        kernels.OPS["adam_update"]([s], torch.zeros(()))


@pytest.mark.parametrize("rule", ["momentum_update", "eigen_update", "polar_update"])
@pytest.mark.parametrize("target", [slow("sm_80"), "sm_100", "gfx942"])
@pytest.mark.parametrize("r", [33, *map(slow, (64, 100, 128))])
def test_tiles_of_other_devices(rule, r, target, monkeypatch):
    own = launch.config
    monkeypatch.setattr(launch, "config", lambda op, rp, _=None: own(op, rp, target))
    with clean(*launched(rule)):
        updated(rule, [slab(1, r, 90, 1), slab(1, r, 77, 2)], together=True)


@pytest.mark.parametrize("r, d", [(3, 1100), (16, 700), slow(31, 600), slow(64, 530)])
def test_polar_over_many_programs(r, d):
    slabs = [slab(2, r, d, 1), slab(1, r, d // 4, 2, seed=1)]
    with clean(*launched("polar_update", "_total")):
        slabs[0].k, slabs[0].known = torch.tensor([r, 1]), torch.tensor([False, True])
        updated("polar_update", slabs, together=True)


def test_polar_with_several_dampings():
    with clean(*launched("polar_update")):
        slabs = [slab(1, 8, 40, side, seed=n) for n, side in enumerate((1, 2, 1))]
        updated("polar_update", slabs, damping=(1.0, 2.0, torch.tensor(0.3)))


def factors(L, r):
    S = (torch.eye(r) + torch.ones(r, r)).repeat(L, 1, 1)
    S[0], S[-1, 0, 0] = 0, float("nan")  # empty and broken
    return S


def function(op, L, r, damping):
    with clean({"eigenbasis": "_jacobi", "damped_inverse": "_inverse"}.get(op, "_root")):
        S, damping = factors(L, r), [] if op == "eigenbasis" else [damping()]
        kernels.OPS[op](S, *damping, torch.arange(L) % (r + 1), torch.ones_like(S))
        if r <= 16:
            kernels.OPS[op](S, *damping, torch.full((L,), r, dtype=torch.int32))


@pytest.mark.parametrize("op", ["damped_inverse", "damped_inverse_root", "eigenbasis"])
@pytest.mark.parametrize("r", RANKS)
def test_functions_of_factors(op, r):
    L = {1: 35, 3: 35, 4: 35, 8: 5, 16: 2, 17: 2}.get(r, 1)  # not a multiple of what a program takes
    function(op, L, r, lambda: 1.0)


@pytest.mark.parametrize("op", ["damped_inverse_root", "eigenbasis"])
@pytest.mark.parametrize("r", [9, slow(16), slow(65)])
def test_functions_of_factors_in_memory(op, r, monkeypatch):
    """The branch of ranks above 64, which smaller ones take too if they are told to."""
    monkeypatch.setattr(eigen, "SWEEPS", 2)
    monkeypatch.setattr(eigen, "REGISTER_RANK", 8)
    monkeypatch.setattr(root, "REGISTER_RANK", 8)
    monkeypatch.setattr(
        launch, "config", lambda *key, own=launch.config: replace(own(*key), block=own(*key).block or 8)
    )
    function(op, 2, r, lambda: torch.tensor(0.5))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("r, d", [(1, 1), (3, 300), (16, 64), (17, 40), slow(12, 4097), slow(64, 90), slow(128, 40)])
def test_whole_buckets(r, d, dtype):
    """Plans: a look for non-finite numbers, Gram matrices, and maps of parameters and moments."""
    with clean("_nonfinite", "_grams", "_transform", *(("_total",) if d >= 300 else ())):
        ours = [moved(slab(n, r, d + n - 1, n, dtype, dtype, seed=n), "cpu") for n in (1, 2)]
        for s in ours:
            s.step, s.grads = ours[0].step, [g.to(dtype) for g in s.grads]
        plan = kernels.UpdatePlan("adam", ours)
        plan.load(gradients(ours))
        flag = torch.zeros(())
        plan.nonfinite_(flag)
        for g in gradients(ours):
            g[0, 0] = torch.nan  # several programs set the flag
        plan.nonfinite_(flag)
        M, k = torch.randn(3, r, r), torch.tensor([0, r // 2, r])
        for of in ("params", "moments"):
            plan.grams("gradients" if of == "params" else "params")
            for found, matrices, ranks in ((0.0, M, k), (0.0, None, k), (0.0, M, None), (1.0, M, k)):
                plan.transform_(of, matrices, ranks, torch.tensor(found))


@pytest.mark.parametrize("r, k, d", [(3, 5, 300), (16, 16, 64), (33, 4, 40), (4, 33, 40)])
def test_outer_factors(r, k, d):
    """The products, the map made of them, and a step through it."""
    total = ("_total",) if d >= 300 else ()
    with clean("_products", "_outer_map", *launched("polar_update", *total)):
        ours = [moved(slab(n, r, d + n - 1, n, matrix=False, seed=n), "cpu") for n in (1, 2)]
        for s in ours:
            V = cosine_rows(k, s.exp_avg.shape[3 - s.rank_dim]).float().expand(len(s.params), -1, -1)
            s.step, s.basis = ours[0].step, (V if s.rank_dim == 1 else V.mT).contiguous()
        plan = kernels.UpdatePlan("polar", ours)
        plan.load(gradients(ours))
        numbers = torch.ones(3, k), torch.full((3,), k + 1.0), torch.tensor([d, d + 1.0, d + 1])
        M, *_ = kernels.OPS["outer_map"](plan.outer_products(), *numbers, 0.9, torch.tensor(0.1), torch.zeros(()))
        plan.take_outer(M)
        plan.step(torch.zeros(()))


def tall(r, dtype, whole=True):
    """Matrices of few rows, and one whose rows are split over two programs; if whole, they fill their packed rows."""
    pack = moments.PACKED.get(r, 1) if dtype != F32 else 1
    return [torch.randn(pack * n - (not whole), r).to(dtype) for n in (1, 3, 37, 530)]


@pytest.mark.usefixtures("_tensor_ranges")
@pytest.mark.parametrize("dtype", [F32, BF16, slow(F16)])
@pytest.mark.parametrize("r", RANKS)
def test_grams(r, dtype):
    with clean("_gram"):
        zs, S = tall(r, dtype), torch.zeros(6, r, r)
        counts = torch.tensor([0, 1, len(zs[2]) - 2, len(zs[3])])
        kernels.OPS["gram"](zs[2])  # one program, which hands over to itself
        kernels.OPS["gram_many"](zs, counts, [torch.rand(len(z)) for z in zs], torch.rand(4))  # these are not packed
        kernels.OPS["gram_add_"](S, [3, 5, 0, 1], zs, None, -1.0)


@pytest.mark.usefixtures("_tensor_ranges")
@pytest.mark.parametrize("r", moments.PACKED)
def test_grams_of_rows_that_do_not_fill_a_packed_row(r):
    with clean("_gram"):
        kernels.OPS["gram_many"](tall(r, BF16, whole=False))


@pytest.mark.parametrize("r", RANKS)
def test_averages(r):
    with clean("_average"):
        S, t = factors(3, r), torch.zeros(3, dtype=torch.int64)
        for found in (None, torch.tensor(1.0)):
            kernels.OPS["ema_"](S, factors(3, r), t, 0.9, found)


def test_every_op_is_here():
    others = {"gram", "gram_many", "gram_add_", "ema_", "damped_inverse", "damped_inverse_root", "eigenbasis"}
    others |= {"outer_map"}
    assert set(kernels.OPS) == {*UPDATES, *others}
