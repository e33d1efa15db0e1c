"""Every optimizer takes AdamW's arguments, keeps them in its groups and means the same by them."""

import copy
import inspect
from typing import Any

import models
import pytest
import torch
from contract_kit import optimizers
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from curvopt.optim.grit import AdvancedSettings

HYPER = {"lr": 3e-3, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.1}


def outside(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a LoraMLP that belong to no pair."""
    return {name: p for name, p in model.named_parameters() if name.startswith(("norm", "head"))}


class Shadow:
    """torch.optim.AdamW on copies of the outside parameters, fed with the same gradients."""

    def __init__(self, model: nn.Module, **hyper: Any) -> None:
        self.live = outside(model)
        self.copies = {name: nn.Parameter(p.detach().clone()) for name, p in self.live.items()}
        self.adamw = torch.optim.AdamW(self.copies.values(), **hyper)

    def step(self) -> None:
        for name, p in self.live.items():
            self.copies[name].grad = None if p.grad is None else p.grad.detach().clone()
        self.adamw.step()

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        for name, p in self.live.items():
            assert torch.equal(p, self.copies[name]), name
            theirs = self.adamw.state[self.copies[name]]
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[p][key], theirs[key]), (name, key)


# ---------------------------------------------------------------------------------------------- the signature


@optimizers
def test_first_parameters_are_those_of_adamw(make):
    ours = list(inspect.signature(make.cls.__init__).parameters.values())
    theirs = list(inspect.signature(torch.optim.AdamW.__init__).parameters.values())
    shared = 6  # self, params, then lr, betas, eps, weight_decay
    assert [p.name for p in ours[:shared]] == [p.name for p in theirs[:shared]]
    want = [p.default for p in theirs[2:shared]][:3]
    if make.cls.__name__ == "GritKFAC":
        want[1] = (0.7, 0.99)  # what short runs gain by; see docs/outer-factors.md
    assert [p.default for p in ours[2:shared]][:3] == want
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[shared:])


@optimizers
def test_positional_arguments_mean_what_they_mean_in_adamw(make):
    group = make.cls(models.mlp(), 2e-3, (0.8, 0.9), 1e-6, 0.2, **make.kwargs).param_groups[0]
    assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [2e-3, (0.8, 0.9), 1e-6, 0.2]


@optimizers
def test_what_params_may_be(make):
    def forms(model):
        named = list(model.named_parameters())
        trainable = [p for p in model.parameters() if p.requires_grad]
        return {
            "module": (model, {}),
            "named": (model.named_parameters(), {}),
            "named groups": ([{"params": named[:4]}, {"params": named[4:]}], {}),
            "tensors": (trainable, {"model": model}),
            "groups": ([{"params": trainable[:3]}, {"params": trainable[3:]}], {"model": model}),
        }

    first = None
    for form in forms(models.mlp()):
        model = models.mlp()
        params, kwargs = forms(model)[form]
        optimizer = make(params, **kwargs)
        assert [pair.name for pair in optimizer.pairs] == ["first", "second", "third", "idle"], form
        models.fit(model, optimizer, 3)
        if form == "module":
            first = models.snapshot(model)
        elif "named" not in form:  # without a model there are no activations to see
            models.assert_same(models.snapshot(model), first)


@optimizers
def test_pairs_are_the_parameters_of_the_model(make):
    model = models.llama()
    optimizer = make(model)
    names = {p: name for name, p in model.named_parameters()}
    assert len(optimizer.pairs) == 14
    for pair in optimizer.pairs:
        assert names[pair.A] == f"{pair.path}.lora_A.default.weight"
        assert names[pair.B] == f"{pair.path}.lora_B.default.weight"


# ---------------------------------------------------------------------------------------------- hyper-parameters


@optimizers
def test_hyper_parameters_live_in_the_groups(make):
    optimizer = make(models.mlp(), maximize=True)
    elsewhere = {
        "self", "params", "low_rank", "adapter", "backend", "require_pairs", "process_group", "model", "generator",
    }  # fmt: skip
    arguments = set(inspect.signature(make.cls.__init__).parameters)
    if "advanced" in arguments:
        arguments = (arguments - {"advanced"}) | AdvancedSettings.__annotations__.keys()
    arguments -= elsewhere
    for group in optimizer.param_groups:
        assert arguments <= group.keys()
        assert not any(isinstance(value, nn.Module) for value in group.values())


@optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_parameters_outside_pairs_follow_adamw_bit_for_bit(make, dtype, maximize):
    model = models.mlp(dtype)
    optimizer, shadow = make(model, maximize=maximize, **HYPER), Shadow(model, maximize=maximize, **HYPER)
    schedules = [CosineAnnealingLR(o, T_max=6) for o in (optimizer, shadow.adamw)]
    for i in range(8):
        optimizer.zero_grad()
        models.loss(model, i).backward()
        if i == 3:  # an empty seat for one step
            model.norm.bias.grad = None
        shadow.step()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    shadow.check(optimizer)


@optimizers
def test_without_pairs_it_is_adamw(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    optimizer = make(model, require_pairs=False, **HYPER)
    adamw = torch.optim.AdamW(twin.parameters(), **HYPER)
    for i in range(5):
        for m, o in ((model, optimizer), (twin, adamw)):
            o.zero_grad()
            m(torch.randn(6, 5, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            o.step()
    models.assert_same(models.snapshot(model), models.snapshot(twin))
    assert optimizer.pairs == []


@optimizers
def test_a_schedule_is_the_same_as_setting_lr_by_hand(make):
    def factor(t):
        return (t + 1) / 4 if t < 4 else 1 / t

    runs = []
    for scheduled in (True, False):
        model = models.mlp()
        optimizer = make(model, lr=1e-2)
        schedule = LambdaLR(optimizer, factor) if scheduled else None
        for i in range(7):
            if not scheduled:
                optimizer.param_groups[0]["lr"] = 1e-2 * factor(i)
            models.fit(model, optimizer, 1, i)
            if scheduled:
                schedule.step()
        runs.append(models.snapshot(model))
    models.assert_same(*runs)


@optimizers
def test_each_group_has_its_own_lr(make):
    model = models.mlp()
    A = [p for name, p in model.named_parameters() if "lora_A" in name]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and "lora_A" not in name]
    optimizer = make([{"params": A, "lr": 0.0}, {"params": rest}], model=model, weight_decay=0.1)
    before = models.snapshot(model)
    models.fit(model, optimizer, 3)
    after = models.snapshot(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad or "idle" in name or "lora_A" in name}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen


@optimizers
def test_a_tensor_lr_is_its_number(make):
    runs = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        model = models.mlp()
        models.fit(model, make(model, lr=lr, weight_decay=0.1), 4)
        runs.append(models.snapshot(model))
    # the same products in another order: a few rounding errors of float64 on parameters of order one
    models.assert_near(*runs, rtol=1e-12, atol=1e-13)


@optimizers
def test_weight_decay_edited_in_flight_acts_at_the_next_step(make):
    def run(decay):
        model = models.mlp()
        optimizer = make(model, lr=1e-2, weight_decay=0.0)
        models.fit(model, optimizer, 2)
        before = models.snapshot(model)
        optimizer.param_groups[0]["weight_decay"] = decay
        models.fit(model, optimizer, 1, 2)
        return before, models.snapshot(model)

    before, plain = run(0.0)
    _, decayed = run(0.3)
    for name, p in before.items():
        moved = not torch.equal(p, plain[name])
        # decoupled: the step differs by −lr · decay · p and by nothing else; rounding of p of order one
        torch.testing.assert_close(decayed[name] - plain[name], -1e-2 * 0.3 * p * moved, rtol=1e-9, atol=1e-15)
