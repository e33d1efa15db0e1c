"""What only a device can show: repeatability to the bit, and that a captured graph does what eager steps do."""

import copy
from dataclasses import replace

import models
import pytest
import torch
from torch import nn

from curvopt import GritKFAC, kernels
from curvopt.functional.update import RULES, Hyper, Slab
from curvopt.ops import REFERENCE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def slab(side, lr, r=16, d=512, L=8):
    g = torch.Generator().manual_seed(side)
    shape = (L, r, d) if side == 1 else (L, d, r)
    p, grads, m = (torch.randn(shape, generator=g).cuda() for _ in range(3))
    Q = torch.linalg.qr(torch.randn(L, r, r, generator=g)).Q.contiguous().cuda()
    step = torch.tensor(0.0, device="cuda")
    return Slab(list(p.unbind()), grads, m, m.square(), step, side, Q, Hyper(lr, 0.9, 0.999, 1e-8, 0.1))


def copied(s):
    c = copy.copy(s)
    c.params = [p.clone() for p in s.params]
    c.grads, c.exp_avg, c.exp_avg_sq, c.step = (t.clone() for t in (s.grads, s.exp_avg, s.exp_avg_sq, s.step))
    return c


def tensors(slabs):
    return [t for s in slabs for t in (*s.params, s.exp_avg, s.exp_avg_sq, s.step)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_every_op_once_against_the_reference():
    from curvopt.kernels import selfcheck

    wrong = [(n, e, b) for n, e, b in selfcheck.run(REFERENCE, torch.device("cuda")) if not e <= b]
    assert not wrong


@pytest.mark.parametrize("rule", RULES)
def test_updates_are_repeatable_to_the_bit(rule):
    slabs = [slab(1, 1e-3), slab(2, 1e-3)]
    found = torch.zeros((), device="cuda")
    runs = [[copied(s) for s in slabs] for _ in range(5)]
    for run in runs:
        for _ in range(3):
            kernels.OPS[f"{rule}_update"](run, found)
    assert all(same(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r, N", [(8, 70_001), (48, 9000), (128, 20_000)])
def test_grams_are_repeatable_to_the_bit(r, N, dtype):
    from curvopt.kernels import moments

    zs = [torch.randn(N, r, device="cuda").to(dtype) for _ in range(3)]
    first = moments.gram_many(zs)
    assert all(torch.equal(moments.gram_many(zs), first) for _ in range(20))
    exact = torch.stack([z.double().mT @ z.double() for z in zs])
    # tensor cores cut the sum of a product of 16-bit numbers where the interpreter rounds it; 1.3e-6 was seen
    assert ((first - exact).norm() / exact.norm()) < 3e-6


def planned(rule, slabs):
    """Return a plan whose slabs share their step, as those of a bucket do."""
    for s in slabs:
        s.step = slabs[0].step
    plan = kernels.UpdatePlan(rule, slabs)
    assert plan.load([g for s in slabs for g in s.grads])
    return plan


def captured(rule, start, found):
    """Return slabs for eager steps and for replays, a plan of the former, and the graph of a step of the latter."""
    eager, graphed = ([copied(s) for s in start] for _ in range(2))
    plans = [planned(rule, slabs) for slabs in (eager, graphed)]
    plans[1].step(found)  # compiles
    for s, original in zip(graphed, start, strict=True):
        for t, o in zip(tensors([s]), tensors([original]), strict=True):
            t.copy_(o)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plans[1].load([g for s in graphed for g in s.grads])
        plans[1].step(found)
    return eager, graphed, *plans, graph


@pytest.mark.parametrize("rule", RULES)
def test_captured_steps_are_eager_steps(rule):
    lr = torch.tensor(1e-3, device="cuda")
    found = torch.zeros((), device="cuda")
    start = [slab(1, lr), slab(2, lr)]
    eager, graphed, plan, _kept, graph = captured(rule, start, found)
    for n in range(20):
        lr.fill_(1e-3 / (n + 1))
        found.fill_(float(n == 7))
        for a, b in zip(eager, graphed, strict=True):
            a.grads.copy_(torch.randn_like(a.grads)), b.grads.copy_(a.grads)
        plan.step(found)
        graph.replay()
        assert same(eager, graphed), f"step {n}"
    assert eager[0].step.item() == 19


def test_a_captured_polar_step_reads_damping_and_ranks_at_replay():
    damping, k, found = (torch.tensor(x, device="cuda") for x in (0.1, [16] * 8, 0.0))
    start = [replace(slab(side, torch.tensor(1e-3, device="cuda"), d=2000), damping=damping) for side in (1, 2)]
    start[1].hyper = start[0].hyper
    start[0].k = k
    eager, graphed, plan, _kept, graph = captured("polar", start, found)
    for n in range(6):
        damping.fill_(0.5 / (n + 1)), k[n].fill_(12), found.fill_(float(n == 3))
        plan.step(found)
        graph.replay()
        assert same(eager, graphed), f"step {n}"


def test_a_polar_step_waits_for_nothing():
    s, found = replace(slab(1, 1e-3), damping=torch.tensor(0.1, device="cuda")), torch.zeros((), device="cuda")
    plan = planned("polar", [s])
    plan.step(found)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.load([g.clone() for g in s.grads])
        plan.nonfinite_(found)
        plan.step(found)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_capture_with_other_gradients_says_so():
    s, found = slab(1, 1e-3, d=80), torch.zeros((), device="cuda")
    plan = planned("eigen", [s])
    plan.step(found)
    with pytest.raises(RuntimeError, match="eager step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        plan.load([g.clone() for g in s.grads])


def adapted(capturable):
    torch.manual_seed(0)
    model = nn.Sequential(models.LoraLinear(64, 64, 8), nn.Tanh(), models.LoraLinear(64, 32, 8)).cuda()
    lr = torch.tensor(1e-2, device="cuda")
    return model, lr, GritKFAC(model, lr=lr, inverse_every=1, capturable=capturable, backend="triton")


def backward(model, optimizer, n):
    optimizer.zero_grad(set_to_none=False)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(n)).cuda()
    model(x).square().mean().backward()


def test_a_captured_optimizer_is_the_eager_one():
    """Forward and backward eagerly, the step from a graph: observations, matrices and rates are read at replay."""
    (model, lr, optimizer), (twin, twin_lr, eager) = adapted(True), adapted(False)
    for n in range(3):
        for m, o in ((model, optimizer), (twin, eager)):
            backward(m, o, n)
            o.step()
    graph = torch.cuda.CUDAGraph()
    backward(model, optimizer, 3)
    with torch.cuda.graph(graph):
        optimizer.step()
    for n in range(3, 20):
        lr.fill_(1e-2 / n), twin_lr.fill_(1e-2 / n)
        backward(model, optimizer, n), backward(twin, eager, n)
        graph.replay()
        eager.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            # sums of rows are made by different kernels, which Adam's division passes on
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_capture_is_asked_for():
    model, _, optimizer = adapted(False)
    backward(model, optimizer, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
