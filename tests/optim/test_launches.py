"""What a step launches on a device, with launches left out: a number that does not grow with the adapters."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

from curvopt import GritKFAC, MatryoshkaScaledAdam, ops

pytest.importorskip("triton")

from curvopt.kernels import launch, tables


class Pair(nn.Module):
    def __init__(self, d, r):
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(d, r, bias=False), nn.Linear(r, d + 16, bias=False)


@contextmanager
def as_on_a_device():
    """CPU tensors count as device tensors; launches and uploads are noted, and nothing is launched."""
    launched, uploads = [], []
    upload = tables.upload

    def noted(values, *args):
        uploads.append(len(values))
        return upload(values, *args)

    with (
        mock.patch.object(launch, "run", lambda kernel, grid, *args, **constants: launched.append(kernel)),
        mock.patch.object(launch, "runs_on", lambda device: True),
        mock.patch.object(tables, "upload", noted),
        mock.patch.object(ops, "on_device", lambda sample: True),
        mock.patch.object(ops.Ops, "trusts", lambda *_: True),
    ):
        yield launched, uploads


def third_step(make, pairs):
    """Return launches and uploads of a step in which nothing has changed but the learning rate."""
    model = nn.ModuleList([Pair(32 if i % 2 else 48, 16) for i in range(pairs)])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with as_on_a_device() as (launched, uploads):
        optimizer = make(model)
        for i in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * (i + 1)
            launched.clear()
            uploads.clear()
            optimizer.step()
        assert optimizer.diagnostics()["fallbacks"] == []
    return len(launched), len(uploads)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda m: GritKFAC(m, statistics="none"), 9),
        (lambda m: GritKFAC(m, statistics="gradient", inverse_every=100), 12),
        (lambda m: GritKFAC(m, statistics="gradient", update="eigen", inverse_every=100), 9),
        (lambda m: GritKFAC(m, statistics="gradient", update="momentum", inverse_every=1), 12),
        (MatryoshkaScaledAdam, 3),
    ],
    ids=["polar", "polar, gradient", "eigen", "momentum", "matryoshka"],
)
def test_launches_do_not_grow_with_the_adapters(make, most):
    few, many = third_step(make, 2), third_step(make, 12)
    assert few == many and few[0] <= most and few[1] == 0


def test_the_count_sees_a_second_bucket():
    def two_groups(model):
        half = len(model) // 2
        groups = [{"params": [p for pair in part for p in pair.parameters()]} for part in (model[:half], model[half:])]
        return GritKFAC(groups, model=model, statistics="none")

    assert third_step(two_groups, 4)[0] == 2 * third_step(lambda m: GritKFAC(m, statistics="none"), 4)[0]


def test_one_gradient_in_another_order_does_not_cost_the_kernels():
    model = nn.ModuleList([Pair(32, 16) for _ in range(2)])
    with as_on_a_device() as (launched, _):
        optimizer = GritKFAC(model)
        for i in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            if i == 1:
                p.grad = p.grad.T.contiguous().T
            launched.clear()
            optimizer.step()
            assert len(launched) == 6, i
        assert optimizer.diagnostics()["fallbacks"] == []


def test_a_launch_is_made_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, which is another where a model is spread over several."""
    current, used = [0], []

    class OnTheSecond(torch.Tensor):
        device = torch.device("cuda", 1)

    @contextmanager
    def entered(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: used.append(current[0])

    monkeypatch.setattr(launch, "_KEEPS", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", entered)
    launch.run(Kernel(), (1,), OnTheSecond(torch.zeros(1)), 1.0)
    assert used == [1] and current == [0]


def test_a_learning_rate_on_the_host_is_refused_in_a_capture(monkeypatch):
    """A graph would keep the value that it has now, whatever a schedule makes of it."""
    optimizer = GritKFAC(nn.ModuleList([Pair(32, 16)]), lr=torch.tensor(1e-3), capturable=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"lr must be a number, or a tensor on the device, to capture a step, got"):
        optimizer.step()
