"""torch's own properties of an optimizer: its state in files and copies, and hooks around steps and state."""

import copy
import pickle

import models
import torch
from optimizer_info_kit import adapted, build, infos, inputs, linear, minimize
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

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
def test_named_parameters_keep_their_names(info):
    model = models.mlp()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = info.optim_cls(named)
    models.fit(model, optimizer, 2)
    saved = models.round_trip(optimizer.state_dict())
    again = models.mlp()
    other = info.optim_cls([(name, p) for name, p in again.named_parameters() if p.requires_grad])
    other.load_state_dict(saved)
    for state in (saved, other.state_dict()):
        assert state["param_groups"][0]["param_names"] == [name for name, _ in named]


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
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in mine)
