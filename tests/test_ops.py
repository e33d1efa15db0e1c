"""The switch: which implementation a call gets, with a stand-in for the kernels where there is no CUDA device."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from curvopt import ops
from curvopt.functional import inverse, moments
from curvopt.functional.plan import ReferencePlan
from curvopt.ops import REFERENCE, Ops


class OnDevice(torch.Tensor):
    """A host tensor that says it is on a CUDA device."""

    is_cuda = True


@pytest.fixture
def calls(monkeypatch):
    """Kernels for two ops that note how they were called; they take tensors of rank 4 and slabs marked as fitting."""
    seen = []
    kernels = SimpleNamespace(
        OPS={
            "gram": lambda z: seen.append(("gram", z.shape)),
            "eigen_update": lambda slabs, found_inf: seen.append(("eigen_update", [s.name for s in slabs])),
        },
        supports=lambda name, first, *rest: (
            name in kernels.OPS and (all(s.fits for s in first) if isinstance(first, list) else first.shape[-1] == 4)
        ),
    )
    monkeypatch.setattr(ops, "_kernels", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return seen


def on_device(*shape):
    return torch.randn(*shape).as_subclass(OnDevice)


def test_host_tensors_take_the_reference(calls):
    z = torch.randn(9, 4)
    assert torch.equal(Ops("triton")("gram", z), moments.gram(z))
    assert calls == []


def test_device_tensors_take_the_kernel_where_it_supports_them(calls):
    triton = Ops("triton")
    triton("gram", on_device(9, 4))
    assert calls == [("gram", (9, 4))] and triton.fallbacks == set()


def test_what_a_kernel_refuses_falls_back_and_is_named(calls):
    triton, z = Ops("triton"), on_device(9, 5)
    torch.testing.assert_close(triton("gram", z).as_subclass(torch.Tensor), moments.gram(z.as_subclass(torch.Tensor)))
    S = torch.eye(4)[None].as_subclass(OnDevice)
    torch.testing.assert_close(
        triton("damped_inverse", S, 1.0).as_subclass(torch.Tensor), inverse.damped_inverse(torch.eye(4)[None], 1.0)
    )
    assert calls == [] and triton.fallbacks == {"gram", "damped_inverse"}


def test_the_reference_on_every_device(calls):
    Ops("torch")("gram", on_device(9, 4))
    assert calls == []


@pytest.fixture
def shown(monkeypatch):
    """What the self-check is asked for, and a set of ops that it finds wrong."""
    asked, wrong = [], set()

    def agrees(name, reference, r, dtype, device, k):
        assert reference is REFERENCE[name]
        asked.append((name, r, dtype))
        return name not in wrong

    monkeypatch.setattr(importlib.import_module("curvopt.kernels.selfcheck"), "agrees", agrees)
    return asked, wrong


def test_auto_takes_a_kernel_that_agrees_with_the_reference(calls, shown):
    auto = Ops("auto")
    auto("gram", on_device(9, 4))
    auto(
        "eigen_update", [SimpleNamespace(name="a", fits=True, exp_avg=on_device(2, 7, 4), rank_dim=2)], torch.zeros(())
    )
    assert calls == [("gram", (9, 4)), ("eigen_update", ["a"])] and auto.fallbacks == set()
    assert shown[0] == [("gram", 4, torch.float32), ("eigen_update", 4, torch.float32)]


def test_auto_does_without_a_kernel_that_disagrees(calls, shown):
    shown[1].add("gram")
    auto, z = Ops("auto"), on_device(9, 4)
    torch.testing.assert_close(auto("gram", z).as_subclass(torch.Tensor), moments.gram(z.as_subclass(torch.Tensor)))
    assert calls == [] and auto.fallbacks == {"gram"}
    Ops("triton")("gram", z)
    assert calls == [("gram", (9, 4))]  # who insists is not second-guessed


def test_a_sequence_of_tensors_is_one_op(calls):
    zs = [on_device(5, 4), on_device(3, 4)]
    got = Ops("triton")("gram_many", zs)  # the stand-in has no such kernel
    want = [moments.gram(z.as_subclass(torch.Tensor)) for z in zs]
    torch.testing.assert_close(got.as_subclass(torch.Tensor), torch.stack(want))


def test_a_plan_is_chosen_once_for_a_bucket(calls, monkeypatch):
    """The kernels' where they take all of it, else the reference's, and that is named."""
    made = []
    kernels = ops._kernels()
    kernels.plan_supports = lambda rule, slabs: all(s.fits for s in slabs)

    def plan(rule, slabs):
        made.append((rule, [s.name for s in slabs]))
        return SimpleNamespace()

    kernels.UpdatePlan = plan
    state = {"exp_avg": on_device(1, 2, 2), "grads": [torch.zeros(2, 2)], "rank_dim": 2}
    slabs = {n: SimpleNamespace(name=n, fits=n in "ac", **state) for n in "abc"}
    triton = Ops("triton")
    triton.plan("eigen", [slabs["a"], slabs["c"]])
    assert made == [("eigen", ["a", "c"])] and triton.fallbacks == set()
    plan = triton.plan("eigen", [slabs["a"], slabs["b"]])
    assert isinstance(plan, ReferencePlan) and len(made) == 1 and triton.fallbacks == {"eigen_update"}
    assert isinstance(Ops("torch").plan("eigen", [slabs["a"]]), ReferencePlan)


def test_backends_are_named_in_the_error():
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'torch', 'triton', got 'cuda'"):
        Ops("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_triton_insists():
    with pytest.raises(ValueError, match="a CUDA device is not available"):
        Ops("triton")
