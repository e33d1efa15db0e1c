"""GoRAInit refuses what it cannot use, names it, and leaves no hook."""

import math

import models
import pytest
import torch
from gora_models import published
from situations_kit import build, steps
from torch.nn.parallel import DistributedDataParallel

from curvopt import GoRAInit

FIT = {"rank": 3, "min_rank": 1, "max_rank": 4, "calibration_steps": 2}

REFUSED = [
    ("rank", [0, 2.5, True], "an integer ≥ 1, or None"),
    ("rank", [5], "between min_rank (1) and max_rank (4)"),
    ("min_rank", [0, -1, "4"], "an integer ≥ 1"),
    ("min_rank", [5], "at most max_rank (4)"),
    ("max_rank", [0, 8.0], "an integer ≥ 1"),
    ("calibration_steps", [0, -3, 1.5, None], "an integer ≥ 1"),
    ("init_lr", [-0.1, math.nan, "best", None], "a number ≥ 0 or 'auto'"),
    ("importance", ["l1", None], "'mean_abs', 'frobenius', 'nuclear', 'grad_b'"),
    ("allocation", ["greedy", None], "'exact', 'paper'"),
    ("budget_weight", ["log", None], "'linear', 'sqrt', 'log1p'"),
    ("convergence", [0, -0.1, math.nan, "x"], "None or a number > 0"),
    ("offload", [1, None], "True or False"),
    ("then", [3, "adamw"], "a callable that takes the model, or None"),
    ("lr", [-1.0, math.nan, None], "a number ≥ 0"),
    ("lr", [0.0], "a number > 0: it is what schedules are relative to"),
]


@pytest.mark.parametrize(("name", "values", "allowed"), REFUSED, ids=lambda x: str(x)[:24])
def test_a_refused_argument_is_named_with_its_value(name, values, allowed):
    model = models.mlp(start="zero")
    for value in values:
        with pytest.raises(ValueError) as error:
            published(model, **{**FIT, name: value})
        message = str(error.value)
        assert message.startswith(name) and repr(value) in message and allowed in message
        assert models.hooks(model) == 0


def test_groups_share_one_budget():
    model = models.mlp(start="zero")
    params = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"rank must be the same in all groups, got \(3, 2\)"):
        published([{"params": params[:3]}, {"params": params[3:], "rank": 2}], model=model, **FIT)
    assert models.hooks(model) == 0


def test_a_budget_that_the_clamps_cannot_meet():
    model = models.mlp(start="zero")  # its layers are 8 × 8 and 8 × 6
    with pytest.raises(ValueError, match="rank=8 asks for a budget of"):
        published(model, rank=8, min_rank=4, max_rank=32)
    assert models.hooks(model) == 0
    published(model, rank=8, min_rank=4, max_rank=32, allocation="paper")  # published: clamped, whatever it costs


def test_a_layer_without_a_gradient_is_named_and_can_be_left_out():
    model = models.mlp(start="zero")
    optimizer = published(model, **FIT)
    models.fit(model, optimizer, 1)
    with pytest.raises(ValueError, match=r"1 layers never received a finite gradient \(idle\)"):
        models.fit(model, optimizer, 1, 1)
    assert not optimizer.ready and model.first.lora_B.weight.any() == False  # noqa: E712
    for p in model.idle.parameters():
        p.requires_grad_(False)
    models.fit(model, optimizer, 1, 2)
    assert optimizer.ready and set(optimizer.plan.ranks) == {"first", "second", "third"}
    assert models.hooks(model) == 0 and optimizer.diagnostics()["left_out"] == ["idle"]


@pytest.mark.parametrize("importance", ["mean_abs", "grad_b"])
def test_B_must_be_zero_or_is_reset(importance):
    kwargs = {**FIT, "max_rank": 3, "importance": importance}
    model = models.llama(torch.float64, start="random")
    with pytest.raises(ValueError, match=r"B must be zero when the calibration begins, but it is not in 14 pairs"):
        models.fit(model, published(model, **kwargs), 1)
    model.zero_grad()
    optimizer = published(model, **kwargs, reset=True)
    models.fit(model, optimizer, 1, 9)  # seen by the old adapter: not counted
    assert not any(pair.B.any() for pair in optimizer.pairs) and optimizer.diagnostics()["steps"] == 0
    models.fit(model, optimizer, 2)
    fresh = models.llama(torch.float64)
    again = published(fresh, **kwargs)
    models.fit(fresh, again, 2)
    assert again.plan == optimizer.plan
    models.assert_same(models.snapshot(model), models.snapshot(fresh))


@pytest.mark.parametrize("kwargs", [{"importance": "grad_b"}, {"resize": False}])
def test_a_rank_above_the_built_one_that_could_not_be_grown(kwargs):
    model = models.llama(r=4)
    optimizer = published(model, rank=4, min_rank=2, max_rank=8, calibration_steps=2, **kwargs)
    with pytest.raises(ValueError, match=r"max_rank must be at most the rank built .*q_proj: 4\), got 8"):
        models.fit(model, optimizer, 1)


def test_names_without_a_model():
    model = models.mlp(start="zero")
    with pytest.raises(ValueError, match="importance must be 'grad_b' with start='gora' where parameters"):
        published(model.named_parameters(), **FIT)
    with pytest.raises(ValueError, match="then needs the model"):
        published(model.named_parameters(), **FIT, importance="grad_b", then=torch.optim.AdamW)
    model.idle.requires_grad_(False)
    optimizer = published(model.named_parameters(), **{**FIT, "max_rank": 3}, importance="grad_b")
    models.fit(model, optimizer, 2)
    assert optimizer.ready and optimizer.plan.spent <= optimizer.plan.budget


def test_no_pair():
    with pytest.raises(ValueError, match="no LoRA pair found"):
        published(torch.nn.Linear(3, 3))


def test_no_base_weight_is_noticed_before_the_calibration():
    model = models.mlp(start="zero")
    model.first.base.weight = torch.nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    with pytest.raises(ValueError, match=r"importance must be 'frobenius', .* where no base weight is found \(first\)"):
        published(model, **FIT)


class NoWeight(torch.nn.Linear):
    """Keeps its weight packed, as quantized layers do that PEFT cannot dequantize."""

    def pack(self):
        self.packed = self.weight.detach()
        del self.weight
        return self

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed, self.bias)


def test_a_peft_base_without_a_weight_is_noticed_before_the_calibration():
    model = build(0)
    settings = {"start": "gora", "rank": 4}
    layer = model.base_model.model[0]
    layer.base_layer = NoWeight(8, 8).double()
    GoRAInit(model, allocation="exact", **settings).remove_hooks()
    layer.base_layer.pack()
    with pytest.raises(ValueError, match=r"importance must be 'frobenius', .* where no base weight is found \(.*0\)"):
        GoRAInit(model, allocation="exact", **settings)
    assert models.hooks(model) == 0
    GoRAInit(model, allocation="uniform", **settings)  # which reads no weight


def test_a_base_that_loses_its_weight_during_the_calibration_is_named():
    model = build(0)
    optimizer = GoRAInit(model, start="gora", allocation="exact", rank=4, calibration_steps=1)
    layer = model.base_model.model[0]
    layer.base_layer = NoWeight(8, 8).double().pack()
    with pytest.raises(ValueError, match=r"model\.0: no base weight of 8 × 8 entries \(found none\)"):
        steps(model, optimizer)


def test_then_must_return_an_optimizer():
    model = models.llama()
    optimizer = published(model, **FIT, then=lambda m: None)
    with pytest.raises(TypeError, match="then must return a torch Optimizer, got NoneType"):
        models.fit(model, optimizer, 2)


def test_a_wrapper_that_holds_on_to_shapes(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(models.llama(r=4))
        with pytest.raises(ValueError, match="resize must be False around DistributedDataParallel"):
            published(model, **FIT)
        optimizer = published(model, **FIT, resize=False, then=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        for i in range(4):
            optimizer.zero_grad()
            ids = models.llama_ids(i)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert optimizer.ready
    finally:
        torch.distributed.destroy_process_group()
