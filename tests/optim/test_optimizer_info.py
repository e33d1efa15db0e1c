"""torch's own properties of an optimizer, through its OptimizerInfo: one entry for each of our classes.

The entries say what torch's tests ask of one: valid arguments, invalid ones with what they raise, what is supported.
The parameters are plain tensors in no pair (``require_pairs=False``), and where it matters those of an adapter.
"""

import copy
import pickle
import warnings

import models
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal import common_optimizers as common

from curvopt import GritKFAC, MatryoshkaScaledAdam

ADAMW = [
    ({}, "default"),
    ({"lr": 0.01}, "non-default lr"),
    ({"lr": torch.tensor(0.001)}, "tensor lr"),
    ({"weight_decay": 0.1}, "weight decay"),
    ({"weight_decay": 0.1, "maximize": True}, "maximize"),
    ({"betas": (0.8, 0.9), "eps": 1e-6}, "betas and eps"),
]
OWN = {
    GritKFAC: [
        *(({"update": rule, "statistics": "gradient", "inverse_every": 2}, rule) for rule in ("adam", "whiten")),
        ({"update": "momentum", "warmup_steps": 2}, "momentum with warm-up"),
        ({"reproject_every": 2, "rank_threshold": 0.9, "min_rank": 1}, "moving ranks"),
        ({"capturable": True}, "capturable"),
    ],
    MatryoshkaScaledAdam: [
        ({"nesting": "dylora"}, "dylora"),
        ({"scale": "sqrt"}, "sqrt"),
        ({"ranks": (1, 3, 4)}, "ranks"),
    ],
}
WRONG = [
    ({"lr": -1.0}, "lr must be a number ≥ 0, got -1.0"),
    ({"betas": (1.0, 0.0)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.0\)"),
    ({"eps": -1e-3}, "eps must be a number ≥ 0"),
    ({"weight_decay": -1.0}, "weight_decay must be a number ≥ 0, got -1.0"),
    ({"lr": torch.tensor([0.001, 0.001])}, "lr must be"),
    ({"backend": "fpga"}, "backend"),
]
WRONG_OWN = {
    GritKFAC: [({"update": "newton"}, "update must be one of"), ({"damping": 0.0}, "damping must be a number > 0")],
    MatryoshkaScaledAdam: [({"scale": "cube"}, "scale must be"), ({"nesting": "doll"}, "nesting must be")],
}


def entry(cls):
    """Return torch's description of one of our classes."""

    def inputs(device, dtype=None):
        return [common.OptimizerInput(params=None, kwargs=kwargs, desc=desc) for kwargs, desc in ADAMW + OWN[cls]]

    def errors(device, dtype):
        theirs = common.get_error_inputs_for_all_optims(device, dtype)
        kept = [e for e in theirs if "Tensor lr" not in e.error_regex]  # ours is in WRONG, in our words
        return kept + [
            common.ErrorOptimizerInput(
                common.OptimizerInput(params=None, kwargs=kwargs, desc=words), error_type=ValueError, error_regex=words
            )
            for kwargs, words in WRONG + WRONG_OWN[cls]
        ]

    return common.OptimizerInfo(
        cls, optim_inputs_func=inputs, optim_error_inputs_func=errors, supported_impls=(), supports_complex=False,
        not_og_supported_flags=(), has_capturable_arg=cls is GritKFAC,
        scheduler_inputs=(
            [lambda o: StepLR(o, gamma=0.9, step_size=10), lambda o: ReduceLROnPlateau(o)],
            [lambda o: LinearLR(o, start_factor=0.4, total_iters=4), lambda o: ExponentialLR(o, gamma=0.9)],
        ),
    )  # fmt: skip


INFOS = [entry(cls) for cls in OWN]
infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
inputs = pytest.mark.parametrize(
    ("info", "given"),
    [
        pytest.param(info, given, id=f"{info.name}-{given.desc}")
        for info in INFOS
        for given in info.optim_inputs_func(device="cpu")
    ],
)


def build(info, params, kwargs=None, **more):
    """Return an optimizer of parameters that need be in no pair."""
    return info.optim_cls(params, **{**copy.deepcopy(kwargs or {}), "require_pairs": False, **more})


def linear(dtype=torch.float64):
    """A weight, a bias and a convex problem in them: two columns, one target."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=dtype))
    bias = nn.Parameter(torch.randn(6, generator=generator, dtype=dtype))
    x = torch.randn(4, generator=generator, dtype=dtype)
    return [weight, bias], lambda: (weight.mv(x) + bias).square().sum()


def adapted(kwargs, info, dtype=torch.float64):
    """The same for the parameters of a small model with adapters."""
    model = models.mlp(dtype)
    return model, info.optim_cls(model, **copy.deepcopy(kwargs))


def minimize(optimizer, loss, steps, sign=1.0):
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        values.append(value.item() * sign)
    return values


# ---------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("info", "error"),
    [
        pytest.param(info, error, id=f"{info.name}-{error.optimizer_error_input.desc}")
        for info in INFOS
        for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    ],
)
def test_errors(info, error):
    given = error.optimizer_error_input
    params = linear()[0] if given.params is None else given.params
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            build(info, params, given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            build(info, params, given.kwargs)


@infos
def test_complex_parameters_are_refused_by_name(info):
    with pytest.raises(TypeError, match="params must be real tensors, got a complex parameter"):
        build(info, [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@infos
def test_sparse_gradients_are_refused_before_anything_moves(info):
    table = nn.Embedding(5, 3, sparse=True)
    before = table.weight.detach().clone()
    optimizer = build(info, table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before)


@inputs
def test_repr_names_the_settings(info, given):
    text = repr(build(info, linear()[0], given.kwargs))
    assert text.startswith(info.name) and all(key in text for key in given.kwargs)


# ---------------------------------------------------------------------------------------------- the right direction


@inputs
def test_goes_in_the_right_direction(info, given):
    sign = -1.0 if given.kwargs.get("maximize") else 1.0
    params, loss = linear()
    values = minimize(build(info, params, {**given.kwargs, "lr": 1e-2}), loss, 20, sign)
    assert values[-1] < values[0]
    model, optimizer = adapted({**given.kwargs, "lr": 1e-2}, info)
    values = minimize(optimizer, lambda: models.loss(model, 0), 12, sign)
    assert values[-1] < values[0]


@pytest.mark.parametrize("which", range(2))
@infos
def test_with_schedulers(info, which):
    params, loss = linear()
    optimizer = build(info, params, {"lr": 1e-2})
    schedulers = [make(optimizer) for make in info.scheduler_inputs[which]]
    values = []
    for _ in range(12):
        values += minimize(optimizer, loss, 1)
        for scheduler in schedulers:
            scheduler.step(values[-1]) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    assert values[-1] < values[0] and optimizer.param_groups[0]["lr"] != 1e-2


@infos
def test_parameter_groups_have_their_own_settings(info):
    (weight, bias), loss = linear()
    optimizer = build(info, [{"params": [weight]}, {"params": [bias], "lr": 0.0}], {"lr": 1e-2})
    before = [weight.detach().clone(), bias.detach().clone()]
    values = minimize(optimizer, loss, 10)
    assert values[-1] < values[0] and torch.equal(bias, before[1]) and not torch.equal(weight, before[0])


@inputs
def test_a_tensor_learning_rate_is_its_number(info, given):
    ends = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64), torch.tensor([1e-2], dtype=torch.float64)):
        model, optimizer = adapted({**given.kwargs, "lr": lr}, info)
        models.fit(model, optimizer, 4)
        ends.append(models.snapshot(model))
    for end in ends[1:]:
        # lr·x in one rounding or in two, of parameters of order one
        models.assert_near(ends[0], end, rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------------------------------------- odd parameters


@inputs
def test_non_contiguous_parameters(info, given):
    """Their strides change nothing but the order in memory."""
    ends = []
    for strided in (False, True):
        model = models.mlp()
        if strided:
            for p in model.parameters():
                wide = torch.zeros(*p.shape[:-1], 2 * p.shape[-1], dtype=p.dtype)[..., ::2]
                p.data = wide.copy_(p.data) if p.ndim < 2 else wide.copy_(p.data).mT.contiguous().mT
                assert not p.is_contiguous() or min(p.shape) == 1
        optimizer = info.optim_cls(model, **copy.deepcopy({**given.kwargs, "lr": 1e-2}))
        models.fit(model, optimizer, 5)
        ends.append(models.snapshot(model))
    # the sums of a product run in another order
    models.assert_near(*ends, rtol=1e-8, atol=1e-9)


@inputs
def test_zero_size_parameters(info, given):
    params, loss = linear()
    empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    alone, loss_alone = linear()
    optimizer = build(info, [*params, empty], given.kwargs)
    other = build(info, alone, given.kwargs)
    for _ in range(4):
        optimizer.zero_grad()
        (loss() + empty.sum()).backward()
        optimizer.step()
        minimize(other, loss_alone, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))
    optimizer.load_state_dict(models.round_trip(optimizer.state_dict()))
    optimizer.step()


@infos
def test_nothing_but_zero_size_parameters(info):
    empty = nn.Parameter(torch.zeros(0))
    optimizer = build(info, [empty])
    empty.grad = torch.zeros(0)
    optimizer.step()


@inputs
def test_parameters_without_gradients(info, given):
    params, _ = linear()
    optimizer = build(info, params, given.kwargs)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    for p in params:
        p.requires_grad_(False)
    optimizer.step()


@infos
def test_mixed_dtypes_and_a_scalar(info):
    params = [nn.Parameter(torch.ones(3, 2, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    params.append(nn.Parameter(torch.tensor(2.0)))
    values = minimize(build(info, params, {"lr": 1e-2}), lambda: sum(p.double().square().sum() for p in params), 5)
    assert values[-1] < values[0] and [p.dtype for p in params[:3]] == [torch.float64, torch.float32, torch.bfloat16]


# ---------------------------------------------------------------------------------------------- state


@inputs
def test_state_dict_round_trip(info, given):
    model, optimizer = adapted(given.kwargs, info)
    models.fit(model, optimizer, 4)
    fresh, other = adapted(given.kwargs, info)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(models.round_trip(optimizer.state_dict()))
    for m, o in ((model, optimizer), (fresh, other)):
        models.fit(m, o, 3, 4)
    models.assert_same(models.snapshot(fresh, other), models.snapshot(model, optimizer))


@inputs
def test_deepcopy_and_pickle(info, given):
    model, optimizer = adapted(given.kwargs, info)
    models.fit(model, optimizer, 3)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for m, o in [(model, optimizer), *twins]:
        models.fit(m, o, 3, 3)
    for m, o in twins:
        models.assert_same(models.snapshot(m, o), models.snapshot(model, optimizer))


@inputs
def test_step_is_a_tensor(info, given):
    model, optimizer = adapted(given.kwargs, info)
    models.fit(model, optimizer, 3)
    steps = [state["step"] for state in optimizer.state.values()]
    assert steps and all(isinstance(step, torch.Tensor) and step.ndim == 0 and step == 3 for step in steps)


@infos
def test_a_file_with_numbers_for_steps_loads(info):
    """As torch wrote them before steps were tensors."""
    model, optimizer = adapted({}, info)
    models.fit(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    fresh, other = adapted({}, info)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    for m, o in ((model, optimizer), (fresh, other)):
        models.fit(m, o, 2, 3)
    models.assert_same(models.snapshot(fresh, other), models.snapshot(model, optimizer))


@infos
def test_settings_may_not_have_names_of_parameters_lost(info):
    """Named parameters keep their names through a state_dict."""
    model = models.mlp()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = info.optim_cls(named)
    models.fit(model, optimizer, 2)
    saved = models.round_trip(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"] == [name for name, _ in named]


# ---------------------------------------------------------------------------------------------- hooks


@infos
def test_hooks_around_the_step(info):
    params, loss = linear()
    optimizer = build(info, params)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("post")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("any pre")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("any post")),
    ]
    try:
        minimize(optimizer, loss, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["any pre", "pre", "post", "any post"]
    minimize(optimizer, loss, 1)
    assert len(seen) == 4


@infos
def test_a_pre_hook_may_replace_the_closure(info):
    params, loss = linear()
    optimizer = build(info, params)
    loss().backward()
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: torch.tensor(7.0)), {}))
    assert optimizer.step(lambda: torch.tensor(1.0)) == 7.0
    handle.remove()


@infos
def test_hooks_around_the_state_dict(info):
    model, optimizer = adapted({}, info)
    models.fit(model, optimizer, 2)
    seen = []

    def note(word, result=None):
        return lambda *args: seen.append(word) or result

    handles = [
        optimizer.register_state_dict_pre_hook(note("save")),
        optimizer.register_state_dict_post_hook(lambda o, s: {**s, "note": seen.append("saved") or 1}),
        optimizer.register_state_dict_post_hook(note("first"), prepend=True),
        optimizer.register_load_state_dict_pre_hook(
            lambda o, s: seen.append("load") or {k: v for k, v in s.items() if k != "note"}
        ),
        optimizer.register_load_state_dict_post_hook(note("loaded")),
    ]
    saved = optimizer.state_dict()
    assert saved["note"] == 1 and seen == ["save", "first", "saved"]
    optimizer.load_state_dict(saved)
    assert seen[3:] == ["load", "loaded"]
    for handle in handles:
        handle.remove()
    assert "note" not in optimizer.state_dict()


@infos
def test_a_load_hook_may_bring_another_state(info):
    """What a pre-hook returns is what is loaded, r×r state included."""
    model, optimizer = adapted({}, info)
    models.fit(model, optimizer, 4)
    wanted = copy.deepcopy(optimizer.state_dict())
    model_2, other = adapted({}, info)
    models.fit(model_2, other, 2)
    stale = copy.deepcopy(other.state_dict())
    other.register_load_state_dict_pre_hook(lambda o, s: wanted)
    other.load_state_dict(stale)
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in mine)


# ---------------------------------------------------------------------------------------------- backends


@inputs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_backends_agree(info, given, dtype):
    """Without a device "auto" is the reference, bit for bit, and says nothing."""
    ends = []
    for backend in ("torch", "auto"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, optimizer = adapted({**given.kwargs, "backend": backend}, info, dtype)
            models.fit(model, optimizer, 4)
        ends.append(models.snapshot(model, optimizer))
    models.assert_same(*ends)
