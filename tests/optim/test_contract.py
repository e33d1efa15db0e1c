"""What every optimizer of the package promises to a loop written for torch.optim.AdamW."""

import copy
import inspect
import pickle
from dataclasses import dataclass, field
from typing import Any

import models
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from curvopt import GritKFAC, MatryoshkaScaledAdam


@dataclass
class Case:
    """One optimizer class and what a call of it needs beside params and AdamW's own arguments."""

    cls: type
    kwargs: dict[str, Any] = field(default_factory=dict)
    adamw_like: bool = True  # takes AdamW's positional arguments

    def __call__(self, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
        return self.cls(params, **{**({"lr": 1e-2} if self.adamw_like else {}), **self.kwargs, **kwargs})


CASES = [
    Case(GritKFAC, {"inverse_every": 3}),
    Case(MatryoshkaScaledAdam),
]

optimizers = pytest.mark.parametrize("make", CASES, ids=lambda case: case.cls.__name__)
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
    shared = 6 if make.adamw_like else 2  # self, params, then lr, betas, eps, weight_decay
    assert [p.name for p in ours[:shared]] == [p.name for p in theirs[:shared]]
    assert [p.default for p in ours[2:shared]][:3] == [p.default for p in theirs[2:shared]][:3]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[shared:])


@optimizers
def test_positional_arguments_mean_what_they_mean_in_adamw(make):
    if not make.adamw_like:
        pytest.skip("takes no learning rate")
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
    elsewhere = {"self", "params", "adapter", "backend", "require_pairs", "process_group", "model", "generator"}
    arguments = set(inspect.signature(make.cls.__init__).parameters) - elsewhere
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


# ---------------------------------------------------------------------------------------------- the step


@optimizers
def test_closure_is_called_once_with_gradients_enabled(make):
    models_ = [models.mlp() for _ in range(2)]
    first, second = (make(model) for model in models_)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        second.zero_grad()
        value = models.loss(models_[1], len(calls) - 1)
        value.backward()
        return value

    for i in range(3):
        (expected,) = models.fit(models_[0], first, 1, i)
        with torch.no_grad():
            assert second.step(closure).item() == expected
    models.assert_same(models.snapshot(models_[0]), models.snapshot(models_[1]))
    assert calls == [True] * 3 and first.step() is None


@optimizers
def test_parameters_without_gradient_are_left_alone_and_stateless(make):
    model = models.mlp()
    optimizer = make(model, weight_decay=0.5)
    before = models.snapshot(model)
    optimizer.step()  # no gradient anywhere
    models.assert_same(models.snapshot(model, optimizer), before)
    models.fit(model, optimizer, 3)
    after = models.snapshot(model, optimizer)
    for name in before:
        if name.startswith("idle"):
            assert torch.equal(before[name], after[name])
    assert not any(name.startswith("idle") and "/" in name for name in after)
    assert any(name.startswith("first") and "/" in name for name in after)


@optimizers
def test_a_pair_that_joins_late_and_rests_keeps_its_own_count(make):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 2)
    second = optimizer.pairs[1]
    for i in (2, 3):  # the pair rests: its bits stay, state included
        optimizer.zero_grad()
        models.loss(model, i).backward()
        second.A.grad = second.B.grad = None
        before = {k: torch.as_tensor(v).clone() for p in (second.A, second.B) for k, v in optimizer.state[p].items()}
        kept = [p.detach().clone() for p in (second.A, second.B)]
        optimizer.step()
        after = {k: torch.as_tensor(v) for p in (second.A, second.B) for k, v in optimizer.state[p].items()}
        models.assert_same(before, after)
        assert all(torch.equal(p, q) for p, q in zip(kept, (second.A, second.B), strict=True))
    models.fit(model, optimizer, 1, 4)
    assert optimizer.state[second.A]["step"] == 3 and optimizer.state[optimizer.pairs[0].A]["step"] == 5


@optimizers
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make, set_to_none):
    model = models.mlp()
    optimizer = make(model)
    models.loss(model, 0).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in model.first.lora_A.parameters()]
    assert (grads == [None]) if set_to_none else (grads[0] == 0).all()
    # what was thrown away leaves no trace in the step that follows
    models.fit(model, optimizer, 3)
    twin = models.mlp()
    models.fit(twin, other := make(twin), 3)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


@optimizers
def test_gradients_are_never_modified(make):
    model = models.mlp()
    optimizer = make(model, maximize=True, weight_decay=0.1)
    for i in range(4):
        optimizer.zero_grad()
        models.loss(model, i).backward()
        before = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, p in model.named_parameters():
            if name in before:
                assert p.grad is before[name][0] and torch.equal(p.grad, before[name][1]), name
            else:
                assert p.grad is None


@optimizers
def test_step_hooks(make):
    model = models.mlp()
    optimizer = make(model)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o is optimizer))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o is optimizer))),
    ]
    models.fit(model, optimizer, 2)
    for handle in handles:
        handle.remove()
    models.fit(model, optimizer, 1)
    assert seen == [("before", True), ("after", True)] * 2


@optimizers
@pytest.mark.filterwarnings("error")
def test_nothing_is_printed_and_nothing_warned(make, capfd):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 6)
    repr(optimizer)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


# ---------------------------------------------------------------------------------------------- traces on the model


@optimizers
@pytest.mark.parametrize("build", [models.mlp, models.llama, models.mixed])
def test_nothing_but_hooks_is_left_on_the_model(make, build):
    def inventory(model):
        modules = {
            name: {key: id(value) for key, value in vars(m).items() if key not in ("training", "_forward_hooks")}
            for name, m in model.named_modules()
        }
        tensors = {
            name: (id(p), p.requires_grad, sorted(vars(p)), p._backward_hooks, p._post_accumulate_grad_hooks)
            for name, p in model.named_parameters()
        }
        return modules, tensors, list(model.state_dict())

    model = build()
    before, count = inventory(model), models.hooks(model)
    optimizer = make(model)
    models.fit(model, optimizer, 3)
    assert inventory(model) == before
    if hasattr(optimizer, "remove_hooks"):
        assert sum(len(m._forward_hooks) for m in model.modules()) > 0
        optimizer.remove_hooks()
    assert models.hooks(model) == count and not any(m._forward_hooks for m in model.modules())
    moved = models.snapshot(model)
    models.fit(model, optimizer, 2, 3)
    assert models.differences(models.snapshot(model), moved) != []
    optimizer.remove_hooks() if hasattr(optimizer, "remove_hooks") else None  # twice does no harm


@optimizers
def test_an_optimizer_that_is_gone_has_no_say(make):
    model, twin = models.mlp(), models.mlp()
    make(model)  # dropped at once
    optimizers_ = [make(m) for m in (model, twin)]
    for m, o in zip((model, twin), optimizers_, strict=True):
        models.fit(m, o, 3)
    models.assert_same(*(models.snapshot(m, o) for m, o in zip((model, twin), optimizers_, strict=True)))


# ---------------------------------------------------------------------------------------------- groups


@optimizers
def test_add_param_group_completes_a_pair(make):
    model = models.mlp()
    layers = [model.first, model.second, model.third]
    A = [layer.lora_A.weight for layer in layers]
    optimizer = make([{"params": A[:2]}], model=model)
    assert [pair.name for pair in optimizer.pairs] == ["first", "second"]
    models.fit(model, optimizer, 2)
    optimizer.add_param_group({"params": [A[2], *(layer.lora_B.weight for layer in layers)], "lr": 3e-3})
    assert [pair.name for pair in optimizer.pairs] == ["first", "second", "third"]
    assert optimizer.param_groups[1]["lr"] == 3e-3 and optimizer.param_groups[1]["eps"] == 1e-8
    before = models.snapshot(model)
    models.fit(model, optimizer, 2, 2)
    moved = set(models.differences(before, models.snapshot(model)))
    assert moved == {f"{name}.lora_{side}.weight" for name in ("first", "second", "third") for side in "AB"}


@optimizers
def test_a_refused_group_leaves_nothing_behind(make):
    model, twin = models.mlp(), models.mlp()

    def all_but_head(model):
        return [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head")]

    optimizer, other = (make([{"params": all_but_head(m)}], model=m) for m in (model, twin))
    models.fit(model, optimizer, 2)
    models.fit(twin, other, 2)
    standing = models.hooks(model)
    for group in ({"lr": -1.0}, {"betas": (0.9, 1.5)}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=next(iter(group))):
            optimizer.add_param_group({"params": [model.head.weight], **group})
    with pytest.raises(TypeError, match="complex"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.norm.weight]})
    assert len(optimizer.param_groups) == 1 and models.hooks(model) == standing
    models.fit(model, optimizer, 2, 2)
    models.fit(twin, other, 2, 2)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


# ---------------------------------------------------------------------------------------------- several adapters


@optimizers
def test_adapter_selects(make):
    model = models.llama(adapters=("default", "other"))
    model.set_adapter("other")
    optimizer = make(model, adapter="other")
    assert {pair.adapter for pair in optimizer.pairs} == {"other"} and len(optimizer.pairs) == 14
    before = models.snapshot(model)
    models.fit(model, optimizer, 2)
    moved = models.differences(before, models.snapshot(model))
    assert moved and all(".other." in name for name in moved)


@optimizers
def test_switching_adapters_trains_each_as_if_alone(make):
    model = models.llama(adapters=("default", "other"), start="random")
    both = make(model)
    assert len(both.pairs) == 28
    models.fit(model, both, 2)
    model.set_adapter("other")
    models.fit(model, both, 3, 2)
    assert {float(both.state[pair.A]["step"]) for pair in both.pairs if pair.adapter == "other"} == {3.0}
    assert {float(both.state[pair.A]["step"]) for pair in both.pairs if pair.adapter == "default"} == {2.0}
    alone = models.llama(adapters=("default", "other"), start="random")
    models.fit(alone, make(alone, adapter="default"), 2)
    together, apart = models.snapshot(model), models.snapshot(alone)
    for name in apart:
        if ".default." in name:
            assert torch.equal(together[name], apart[name]), name


# ---------------------------------------------------------------------------------------------- copies and files


def go_on_together(model, optimizer, model_2, optimizer_2):
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(model_2, optimizer_2))
    for i in range(4, 10):  # alternately, so that a shared tensor or hook would show
        models.fit(model, optimizer, 1, i)
        models.fit(model_2, optimizer_2, 1, i)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(model_2, optimizer_2))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in model_2.parameters()}


@optimizers
@pytest.mark.parametrize("build", [models.mlp, models.llama])
def test_deepcopy_of_model_and_optimizer(make, build):
    model = build()
    optimizer = make(model)
    models.fit(model, optimizer, 4)
    go_on_together(model, optimizer, *copy.deepcopy((model, optimizer)))


@optimizers
def test_deepcopy_of_the_optimizer_alone_brings_its_model(make):
    model = models.single()
    optimizer = make(model)
    models.fit(model, optimizer, 4)
    twin = copy.deepcopy(optimizer)
    (pair,) = twin.pairs
    assert pair.module is not model
    go_on_together(model, optimizer, pair.module, twin)


@optimizers
def test_deepcopy_of_the_model_alone_is_unwatched(make):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 2)
    twin, other = models.mlp(), None
    other = make(twin)
    models.fit(twin, other, 2)
    stranger = copy.deepcopy(model)
    for i in range(3):
        models.loss(stranger, i).backward()  # must not be counted by anyone
    models.fit(model, optimizer, 3, 2)
    models.fit(twin, other, 3, 2)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


@optimizers
def test_pickle(make):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 4)
    go_on_together(model, optimizer, *pickle.loads(pickle.dumps((model, optimizer))))


@optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_dict_through_a_file(make, dtype):
    model = models.mlp(dtype)
    optimizer = make(model)
    models.fit(model, optimizer, 4)
    saved = models.round_trip(optimizer.state_dict())
    fresh = models.copied_into(model, models.mlp(dtype))
    other = make(fresh)
    other.load_state_dict(saved)
    go_on_together(model, optimizer, fresh, other)


@optimizers
def test_state_dict_has_torch_s_form(make):
    model = models.mlp()
    optimizer = make(model)
    models.fit(model, optimizer, 2)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    for state in saved["state"].values():
        assert {"step", "exp_avg", "exp_avg_sq"} <= state.keys()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    for p, state in optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape


@optimizers
def test_state_is_live(make):
    """Writing into ``optimizer.state`` acts on the next step, as it does in torch."""
    model, twin = models.mlp(), models.mlp()
    optimizer, other = make(model), make(twin)
    models.fit(model, optimizer, 2)
    models.fit(twin, other, 2)
    p = optimizer.pairs[0].A
    optimizer.state[p]["exp_avg"].zero_()
    models.fit(model, optimizer, 1, 2)
    models.fit(twin, other, 1, 2)
    assert not torch.equal(p, other.pairs[0].A)
    torch.testing.assert_close(model.second.lora_A.weight, twin.second.lora_A.weight, rtol=0, atol=0)
