"""torch's own properties of an optimizer: errors, the right direction, odd parameters, backends."""

import copy
import warnings

import models
import pytest
import torch
from optimizer_info_kit import INFOS, adapted, build, infos, inputs, linear, minimize
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

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
    assert optimizer.state[empty]["step"] == 1 and optimizer.state[empty]["exp_avg"].shape == (0,)


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
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@infos
def test_mixed_dtypes_and_a_scalar(info):
    params = [nn.Parameter(torch.ones(3, 2, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    params.append(nn.Parameter(torch.tensor(2.0)))
    values = minimize(build(info, params, {"lr": 1e-2}), lambda: sum(p.double().square().sum() for p in params), 5)
    assert values[-1] < values[0] and [p.dtype for p in params[:3]] == [torch.float64, torch.float32, torch.bfloat16]


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
