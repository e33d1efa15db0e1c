"""Samples at ranks of their own, under both optimizers that have them: in training alone, and the same when recomputed
or resumed."""

import contextlib
import copy
import gc

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from curvopt import GritKFAC, MatryoshkaScaledAdam
from curvopt.lora import truncated

# what both name: the optimizer, and how it calls the settings of the schedule
KINDS = {
    "matryoshka": (MatryoshkaScaledAdam, {"nesting": "stratified"}, {}),
    "grit": (GritKFAC, {"nested_ranks": [1, 2]}, {"warmup_steps": "mask_warmup", "reorder_every": "reproject_every"}),
}
KINDS["grit-balanced"] = (GritKFAC, {"nested_ranks": [1, 2], "statistics": "activation"}, KINDS["grit"][2])
SCHEDULE = {"warmup_steps": 2, "reorder_every": 3, "full_share": 0.5}
both = pytest.mark.parametrize("kind", KINDS)


def made(kind, model, **kwargs):
    """An optimizer of a kind, its schedule named as MatryoshkaScaledAdam does. A pair's own rank is always trained."""
    cls, settings, names = KINDS[kind]
    kwargs = {names.get(key, key): value for key, value in {**SCHEDULE, **kwargs}.items()}
    return cls(model, **{"lr": 1e-2, **settings, **kwargs})


@contextlib.contextmanager
def at_rank(model, rank):
    """The model in evaluation mode with its leading directions alone."""
    with truncated(model, rank, basis="stored"):
        model.eval()
        yield
    model.train()


def watch(model):
    """Let every layer list the u of its forwards, after the masks."""
    for layer in model.layers:
        layer.watch = []
    return {name: getattr(model, name).watch for name in ("first", "second", "third")}


def ranks_in(u):
    """The rank of each sample: its last direction that is not exactly zero at any position."""
    used = u.detach()[:, None].transpose(1, -1).flatten(2).ne(0).any(-1)  # (n, r, positions)
    return [int(row.nonzero().max()) + 1 for row in used]


def masks_of(model, i, rows=6):
    seen = watch(model)
    models.loss(model, i, rows).backward()
    return {name: [ranks_in(u) for u in us] for name, us in seen.items()}


@both
def test_samples_have_one_rank_in_all_layers_and_none_before_the_warmup(kind):
    model = models.mlp()
    optimizer = made(kind, model)
    for i in range(8):
        optimizer.zero_grad()
        seen = masks_of(model, i, rows=12)
        ranks = seen["first"][0]
        assert seen["second"] == seen["first"] and seen["third"][0] == [min(k, 3) for k in ranks]
        if i < 2:
            assert set(ranks) == {4}
        else:  # ranks 1, 2, 4: half of 12 at 4, a third at 1, a sixth at 2
            assert sorted(ranks) == [1, 1, 1, 1, 2, 2, 4, 4, 4, 4, 4, 4]
        optimizer.step()


@both
def test_the_loss_is_that_of_each_sample_at_its_rank(kind):
    """Masking u is computing with B[:, :ρ] A[:ρ]: the gradient is the sum of those of truncated models."""
    model = models.mlp()
    optimizer = made(kind, model)
    models.fit(model, optimizer, 3)
    x, _ = models.batch(model, 5)
    seen = watch(model)
    out = model(x)
    ranks = ranks_in(seen["first"][0])
    assert len(set(ranks)) > 1
    for sample, rank in enumerate(ranks):
        with at_rank(model, rank):
            expected = model(x)[sample]
        torch.testing.assert_close(out[sample], expected, rtol=1e-12, atol=1e-13)  # sums in another order


@both
def test_evaluation_and_removed_hooks_are_untouched(kind):
    model, before = models.mlp(), models.hooks(models.mlp())
    optimizer = made(kind, model)
    models.fit(model, optimizer, 4)
    twin = models.copied_into(model, models.mlp(seed=3))
    with torch.no_grad():
        x, _ = models.batch(model, 9)
        assert not torch.equal(model(x), twin(x))  # control: in training mode they differ
        assert torch.equal(model.eval()(x), twin(x))
        model.train()
        optimizer.remove_hooks()
        assert torch.equal(model(x), twin(x))
    models.fit(model, optimizer, 2, 4)
    assert models.hooks(model) == before and not optimizer.watching


@both
def test_hooks_go_with_the_optimizer_and_are_not_copied(kind):
    model = models.mlp()
    optimizer = made(kind, model)
    models.fit(model, optimizer, 4)
    alone = copy.deepcopy(model)
    x, _ = models.batch(model, 9)
    with torch.no_grad():
        assert torch.equal(alone(x), alone.eval()(x))
        del optimizer
        gc.collect()
        assert torch.equal(model(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("reentrant", [False, True])
@both
def test_a_recomputed_block_has_the_masks_it_had(kind, reentrant):
    """Activation checkpointing changes nothing, with accumulation over three micro-batches."""

    def trained(checkpointing):
        model = models.mlp(checkpointing=checkpointing)
        optimizer = made(kind, model)
        for i in range(5):
            optimizer.zero_grad()
            for part in range(3):
                models.loss(model, 3 * i + part).backward()
            optimizer.step()
        return models.snapshot(model)

    models.assert_same(trained(reentrant), trained(None))


@both
def test_a_compiled_model_has_the_masks_of_the_same_one_in_eager_mode(kind):
    """Masks change at every step and are never baked into a graph."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = models.mlp()
        optimizer = made(kind, model)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        losses = []
        for i in range(10):
            optimizer.zero_grad()
            x, y = models.batch(model, i)
            loss = torch.nn.functional.cross_entropy(forward(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
@both
def test_micro_batches_have_strata_of_their_own(kind, set_to_none):
    """Eight micro-batches of one sample: their ranks spread as those of a batch do; the next step draws others."""
    model = models.mlp()
    optimizer = made(kind, model, full_share=0.5)
    models.fit(model, optimizer, 3)
    steps = []
    for i in range(2):
        optimizer.zero_grad(set_to_none)
        steps.append([masks_of(model, i, rows=1)["first"][0][0] for _ in range(8)])
        optimizer.step()
    for ranks in steps:
        assert 3 <= ranks.count(4) <= 5 and 1 <= ranks.count(1) <= 3  # golden-section offsets: within one of 4 and 2
    assert steps[0] != steps[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@both
def test_a_resumed_run_is_the_uninterrupted_one(kind, dtype):
    def trained(split, start=torch.Generator):
        model = models.mlp(dtype, start="zero")
        kwargs = {"eps": 1e-3, "weight_decay": 0.1}
        optimizer = made(kind, model, generator=start().manual_seed(5), **kwargs)
        for i in range(11):
            if i == split:
                saved = models.round_trip(optimizer.state_dict())
                model = models.copied_into(model, models.mlp(dtype, seed=3))
                optimizer = made(kind, model, **kwargs)
                optimizer.load_state_dict(saved)
            elif split and i == split + 2:
                model, optimizer = copy.deepcopy((model, optimizer))
            models.fit(model, optimizer, 1, i)
        return models.snapshot(model, optimizer)

    whole = trained(None)
    for split in (1, 4, 7):
        models.assert_same(trained(split), whole, ignore=("generator", "draw"))
    assert set(made(kind, models.mlp()).param_groups[0]) & {"draw", "generator", "arrived"} == set()


@both
def test_a_broken_gradient_changes_nothing(kind):
    model = models.mlp()
    optimizer = made(kind, model)
    models.fit(model, optimizer, 5)  # the next step would reorder
    before = models.snapshot(model, optimizer)
    models.loss(model, 6).backward()
    model.second.lora_B.weight.grad.view(-1)[3] = torch.nan
    optimizer.step()
    models.assert_same(models.snapshot(model, optimizer), before, ignore=("skipped", "cadence"))


@both
def test_frozen_sides_are_masked_and_not_reordered(kind):
    model = models.mlp()
    for layer in model.layers:
        layer.lora_A.weight.requires_grad_(False)
    A = model.first.lora_A.weight.clone()
    optimizer = made(kind, model)
    models.fit(model, optimizer, 6)
    optimizer.zero_grad()
    assert len(set(masks_of(model, 7)["first"][0])) > 1 and torch.equal(model.first.lora_A.weight, A)


@both
def test_a_forward_that_is_not_masked_is_told(kind):
    model = models.mlp()
    optimizer = made(kind, model)
    models.fit(model, optimizer, 2)
    model.second.bypass = True
    with pytest.warns(UserWarning, match=r"1 pairs received gradients but no sample was masked \(second\)"):
        models.fit(model, optimizer, 2, 2)
    model = models.mlp().eval()
    with pytest.warns(UserWarning, match=r"3 pairs received gradients but no sample was masked"):
        models.fit(model, made(kind, model), 3)


@both
def test_packed_rows_and_single_rows(kind):
    """Of a 2-d u each row is a sample; a 1-d u is one sample."""
    model = models.single()
    optimizer = made(kind, model, warmup_steps=0)
    models.fit(model, optimizer, 2)
    model.watch = []
    model(torch.ones(8, 7, dtype=torch.float64))
    assert sorted(ranks_in(model.watch[0])) == [1, 1, 2, 2, 3, 3, 3, 3]
    model.watch = []
    model(torch.ones(7, dtype=torch.float64))
    assert model.watch[0].shape == (3,) and model.watch[0][0] != 0


# ---------------------------------------------------------------------------------------------- what is refused


REFUSED = {
    "no share": ({"full_share": 0.0}, r"full_share must be a number in \(0, 1\], got 0.0"),
    "too much": ({"full_share": 1.5}, "full_share must be"),
    "a flag": ({"full_share": True}, "full_share must be"),
    "before": ({"warmup_steps": -1}, "warmup(_steps)? must be an integer ≥ 0, got -1"),
    "a fraction": ({"reorder_every": 2.5}, "(reorder|reproject)_every must be an integer ≥ 0, got 2.5"),
}


@both
@pytest.mark.parametrize("case", REFUSED)
def test_bad_schedules_are_named(kind, case):
    model = models.mlp()
    kwargs, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        made(kind, model, **kwargs)
    assert models.hooks(model) == models.hooks(models.mlp())  # nothing is left of those


@both
@pytest.mark.parametrize("ranks", [[], [2, 1], [0, 1], [1, 1.5], "1,2", (1, True)], ids=str)
def test_ranks_ascend(kind, ranks):
    with pytest.raises(ValueError, match="ranks must be None or ascending integers ≥ 1"):
        made(kind, models.mlp(), **{"ranks" if kind == "matryoshka" else "nested_ranks": ranks})


@both
def test_ranks_beyond_every_pair_are_refused(kind):
    name = "ranks" if kind == "matryoshka" else "nested_ranks"
    made(kind, models.mlp(), **{name: [1, 4]})  # the third layer has rank 3: its ranks are 1 and 3
    with pytest.raises(ValueError, match=rf"{name} must be at most 4, the largest rank of a pair, got \(1, 5\)"):
        made(kind, models.mlp(), **{name: [1, 5]})


@both
def test_pairs_without_a_module_for_u_are_refused(kind):
    with pytest.raises(ValueError, match=r"(nesting|nested_ranks) of .* must be .* \(embedding"):
        made(kind, models.mixed())
    settings = {"statistics": "none"} if kind != "matryoshka" else {}
    with pytest.raises(ValueError, match="paired by name"):
        made(kind, models.mlp().named_parameters(), **settings)


@both
def test_a_pair_that_shares_a_matrix_is_refused(kind):
    model = models.mlp()
    model.second.lora_A.weight = model.first.lora_A.weight
    with pytest.raises(ValueError, match=r"(nesting|nested_ranks) of first must be .*, got .*") as error:
        made(kind, model)
    assert "second" in str(error.value)


class Mixer(nn.Module):
    """A matrix between A and B that no package knows of: directions of u are not those that B sees."""

    def __init__(self, layer):
        super().__init__()
        self.lora_A, self.lora_B, self.rank, self.alpha = layer.lora_A, layer.lora_B, layer.rank, layer.alpha
        self.base = layer.base
        self.register_buffer("mixing", torch.linalg.qr(torch.randn(layer.rank, layer.rank, dtype=torch.float64))[0])

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x) @ self.mixing)


@both
def test_directions_that_a_mixer_ties_to_others_stay(kind):
    """Its basis means something, by the gradients: no reordering. The control, without it, is reordered."""
    for mixed in (True, False):
        model, twin = models.mlp(), models.mlp()
        if mixed:
            torch.manual_seed(1)
            model.second = Mixer(model.second)
            twin.second = copy.deepcopy(model.second)
        sorting, leaving = made(kind, model, reorder_every=4), made(kind, twin, reorder_every=0)
        models.fit(model, sorting, 4), models.fit(twin, leaving, 4)
        assert torch.equal(model.second.lora_A.weight, twin.second.lora_A.weight) == mixed
        assert not torch.equal(model.first.lora_A.weight, twin.first.lora_A.weight)


class Reused(nn.Module):
    """One layer called three times, each call a checkpointed block if ``reentrant`` is not None."""

    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.head, self.reentrant = models.LoraLinear(8, 8, 4), nn.Linear(8, 3), reentrant

    def forward(self, x):
        for _ in range(3):
            x = self.layer(x) if self.reentrant is None else checkpoint(self.layer, x, use_reentrant=self.reentrant)
            x = torch.tanh(x)
        return self.head(x)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_used_several_times_is_recomputed_with_its_masks(kind, reentrant):
    """Under reentrant checkpointing a gradient arrives for each use, amid the recomputations."""
    ends = []
    for how in (None, reentrant):
        torch.manual_seed(0)
        model = Reused(how).double()
        nn.init.normal_(model.layer.lora_B.weight, std=0.3)
        optimizer = made(kind, model, warmup_steps=0, reorder_every=0)
        x = torch.randn(12, 5, 8, dtype=torch.float64, requires_grad=True)
        for part in range(4):
            optimizer.zero_grad() if part == 2 else None  # two micro-batches each
            model(x).square().mean().backward()
            if part == 1:
                optimizer.step()
        ends.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)  # sums of the uses in another order


@both
def test_micro_batches_of_an_adapter_that_comes_back_have_masks_of_their_own(kind):
    """Adapters that take turns: each is at rest when the step before ends, and hooks are renewed there."""
    model = peft_of_two()
    optimizer = made(kind, model, warmup_steps=0, reorder_every=0)
    for i in range(4):
        model.set_adapter(("default", "other")[i % 2])
        name = model.active_adapter
        lists = []
        optimizer.zero_grad()
        for _ in range(3):
            seen = []
            A = model.base_model.model[0].lora_A[name]
            handle = A.register_forward_hook(lambda module, args, u, seen=seen: seen.append(ranks_in(u)))
            model(torch.ones(12, 5, 8, dtype=torch.float64)).square().mean().backward()
            handle.remove()
            lists.append(tuple(seen[0]))
        assert len(set(lists)) == (3 if i else 1), i  # the first step has no masks
        optimizer.step()


def peft_of_two():
    """A PEFT model with an active adapter and one at rest."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), config)
    model.add_adapter("other", config)
    return model.double()
