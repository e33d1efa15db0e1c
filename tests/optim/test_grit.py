"""GritKFAC against autograd, AdamW, PEFT's Riemannian optimizer, and itself written as a loop."""

import copy
import itertools
import warnings

import models
import oracles
import pytest
import torch
from peft.optimizers import create_riemannian_optimizer
from torch import nn
from torch.nn import functional as F

from curvopt import GritKFAC

RULES = ("polar", "eigen", "adam", "whiten", "momentum")
BASES = ("polar", "eigen")  # their moments live in a basis
STATISTICS = ("activation", "gradient", "weight")
# two orders of summation of some hundred float64 products
EXACT = {"rtol": 1e-11, "atol": 1e-14}


def factors(optimizer, pair):
    """(S_u, S_d) as the state has them, whichever side keeps which."""
    a, b = optimizer.state[pair.A]["factor"], optimizer.state[pair.B]["factor"]
    return (b, a) if optimizer.param_groups[0]["sides"] == "kfac" else (a, b)


def observed_backward(model, i, scale=1.0, rows=6):
    """Run one backward pass and return, layer by layer, explicit uᵀu / N and N dᵀd from autograd."""
    for layer in model.layers:
        layer.watch = []
    value = models.loss(model, i, rows) * scale
    us = [layer.watch[0] for layer in model.layers]
    ds = torch.autograd.grad(value, us, retain_graph=True)
    model.zero_grad()
    for layer in model.layers:
        layer.watch = None
    seen = []
    for u, d in zip(us, ds, strict=True):
        u, d = u.detach().flatten(0, -2), d.flatten(0, -2)
        seen.append((u.T @ u / len(u), len(u) * d.T @ d))
    return value, seen


# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.5, 3), (1.0, 2), (0.0, 1)])
@pytest.mark.parametrize("sides", ["kfac", "paper"])
def test_factors_are_the_second_moments_of_u_and_of_N_d(sides, decay, every, drop):
    model = models.mlp(drop=drop)
    optimizer = GritKFAC(model, lr=1e-2, sides=sides, factor_decay=decay, factor_every=every, inverse_every=2)
    history = []
    for i in range(7):
        value, seen = observed_backward(model, i, rows=4 + i)
        optimizer.zero_grad()  # autograd.grad went past the hooks too
        value.backward()
        optimizer.step()
        if i % every == 0:
            history.append(seen)
        for j, pair in enumerate(optimizer.pairs[:3]):
            for got, which in zip(factors(optimizer, pair), (0, 1), strict=True):
                assert got.dtype == torch.float64
                expected = oracles.average([seen[j][which] for seen in history], decay)
                torch.testing.assert_close(got, expected, **EXACT)
    rows = sum(3 * (4 + i) for i in range(0, 7, every))
    for p in (optimizer.pairs[0].A, optimizer.pairs[0].B):
        assert optimizer.state[p]["rows"] == rows and optimizer.state[p]["observed"] == len(history)


def test_s_d_is_a_per_token_moment():
    """The scale of d is that of one token's loss: the same tokens twice give the same factors."""
    found = []
    for copies in (1, 4):
        model = models.mlp()
        optimizer = GritKFAC(model)
        x, y = models.batch(model, 0)
        F.cross_entropy(model(x.repeat(copies, 1, 1)).flatten(0, 1), y.repeat(copies, 1).flatten()).backward()
        optimizer.step()
        found.append([S for pair in optimizer.pairs[:3] for S in factors(optimizer, pair)])
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, **EXACT)


@pytest.mark.parametrize("sides", ["kfac", "paper"])
def test_gradient_statistics(sides):
    model = models.mlp()
    optimizer = GritKFAC(model, lr=1e-2, statistics="gradient", sides=sides, factor_decay=0.7)
    optimizer.remove_hooks()  # nothing is lost: they are not needed
    history = []
    for i in range(4):
        optimizer.zero_grad()
        models.loss(model, i).backward()
        history.append([(p.B.grad.T @ p.B.grad, p.A.grad @ p.A.grad.T) for p in optimizer.pairs[:3]])
        optimizer.step()
    for j, pair in enumerate(optimizer.pairs[:3]):
        for which, got in enumerate(factors(optimizer, pair)):
            torch.testing.assert_close(got, oracles.average([h[j][which] for h in history], 0.7), **EXACT)


@pytest.mark.parametrize("sides", ["kfac", "paper"])
def test_weight_statistics_are_those_of_now(sides):
    model = models.mlp()
    optimizer = GritKFAC(model, lr=1e-2, statistics="weight", sides=sides, factor_decay=0.7)
    models.fit(model, optimizer, 3)
    before = [(p.A.detach() @ p.A.detach().T, p.B.detach().T @ p.B.detach()) for p in optimizer.pairs[:3]]
    models.fit(model, optimizer, 1, 3)
    for pair, expected in zip(optimizer.pairs, before, strict=False):
        for got, S in zip(factors(optimizer, pair), expected, strict=True):
            torch.testing.assert_close(got, S, **EXACT)


def test_names_alone_give_gradient_statistics():
    runs = []
    for named in (True, False):
        model = models.mlp()
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = GritKFAC(trainable, lr=1e-2) if named else GritKFAC(model, lr=1e-2, statistics="gradient")
        models.fit(model, optimizer, 5)
        runs.append(models.snapshot(model, optimizer))
        assert {d["statistics"] for d in optimizer.diagnostics()["pairs"].values() if "rows" in d} == {"gradient"}
    models.assert_same(*runs)


# ---------------------------------------------------------------------------------------------- reductions to AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_warmup_is_fused_adamw_bit_for_bit(rule, dtype, decay):
    model, twin = models.mlp(dtype), models.mlp(dtype)
    hyper = {"lr": 1e-2, "betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": decay}
    optimizer = GritKFAC(model, update=rule, warmup_steps=100, **hyper)
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], fused=True, **hyper)
    for i in range(8):
        models.fit(model, optimizer, 1, i)
        for name, p in twin.named_parameters():  # the same gradients, so that only the step is compared
            p.grad = model.get_parameter(name).grad
        adamw.step()
        for pair in optimizer.pairs[:3]:
            layer = twin.get_submodule(pair.path)
            assert torch.equal(pair.A, layer.lora_A.weight) and torch.equal(pair.B, layer.lora_B.weight), (i, pair)


def test_the_rules_differ_once_the_warmup_is_over():
    ends = []
    for rule in (*RULES, None):
        model = models.mlp()
        models.fit(model, GritKFAC(model, lr=1e-2, update=rule or "adam", warmup_steps=0 if rule else 3), 3)
        ends.append(model.first.lora_A.weight.detach().clone())
    for one, two in itertools.combinations(ends, 2):
        assert (one - two).abs().max() > 1e-4  # the learning rate is 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rule", ["polar", "eigen", "adam", "whiten"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_while_B_is_zero_the_A_side_is_plain_adamw(rule, dtype, start):
    """S_d = 0 says nothing, so it must act as the identity; A gets a made-up gradient, for its own is zero too."""
    model = models.mlp(dtype, start)
    optimizer = GritKFAC(model, lr=1e-2, update=rule, weight_decay=0.1)
    models.loss(model, 0).backward()
    plain = {}
    for pair in optimizer.pairs[:3]:
        assert (pair.A.grad == 0).all() == (start == "zero")
        pair.A.grad.copy_(torch.randn(pair.A.shape, generator=torch.Generator().manual_seed(1)))
        q = plain[pair] = nn.Parameter(pair.A.detach().clone())
        q.grad = pair.A.grad.clone()
    torch.optim.AdamW(plain.values(), lr=1e-2, weight_decay=0.1, fused=True).step()
    optimizer.step()
    for pair, q in plain.items():
        assert torch.equal(pair.A, q) == (start == "zero")


# ---------------------------------------------------------------------------------------------- the whole optimizer


class Loop:
    """GritKFAC once more in float64: pair by pair, side by side, moments kept as lists of observations."""

    def __init__(self, model, rule, statistics, sides, hyper, damping, decay, factor_every, inverse_every, warmup):
        self.model, self.rule, self.statistics, self.sides = model, rule, statistics, sides
        self.hyper, self.damping, self.decay, self.warmup = hyper, damping, decay, warmup
        self.factor_every, self.inverse_every, self.t = factor_every, inverse_every, 0
        self.seen = {(layer, which): [] for layer in model.layers for which in "ud"}
        self.matrix = {}
        self.adams = {}

    def _adam(self, key, shape):
        if key not in self.adams:
            self.adams[key] = oracles.AdamW(shape, *self.hyper["betas"], self.hyper["eps"])
        return self.adams[key]

    def _observe(self, layer, u_and_d):
        A, B = layer.lora_A.weight, layer.lora_B.weight
        if self.statistics == "gradient":
            u_and_d = (B.grad.T @ B.grad, A.grad @ A.grad.T)
        elif self.statistics == "weight":
            u_and_d = (A @ A.T, B.T @ B)
        for which, S in zip("ud", u_and_d, strict=True):
            self.seen[layer, which].append(S.detach().clone())

    def _refresh(self, key, S):
        r, old = len(S), self.matrix.get(key, torch.eye(len(S), dtype=torch.float64))
        if S.trace() == 0:
            new = torch.eye(r, dtype=torch.float64)
        elif self.rule in BASES:
            new = torch.linalg.eigh(S)[1].flip(-1)
        else:
            new = oracles.damped_power(S, self.damping, -0.5 if self.rule == "whiten" else -1.0)
        if self.rule in BASES and key in self.adams:  # the moments turn with the basis
            R = new.T @ old
            self.adams[key].m, self.adams[key].v = R @ self.adams[key].m, R.square() @ self.adams[key].v
        self.matrix[key] = new

    @torch.no_grad()
    def step(self, i):
        with torch.enable_grad():
            value, observed = observed_backward(self.model, i)
            value.backward()
        self.t += 1
        past = self.t - self.warmup
        for layer, u_and_d in zip(self.model.layers, observed, strict=True):
            if (self.t - 1) % self.factor_every == 0:
                self._observe(layer, u_and_d)
            for name, p in (("A", layer.lora_A.weight), ("B", layer.lora_B.weight)):
                which = {"A": "d", "B": "u"}[name] if self.sides == "kfac" else {"A": "u", "B": "d"}[name]
                S = oracles.average(self.seen[layer, which], 0.0 if self.statistics == "weight" else self.decay)
                rank_first = p if name == "A" else p.T
                gradient = p.grad if name == "A" else p.grad.T
                adam = self._adam((layer, name), rank_first.shape)
                if past > 0 and (past - 1) % self.inverse_every == 0:
                    self._refresh((layer, name), S)
                M = self.matrix[layer, name] if past > 0 else torch.eye(len(S), dtype=torch.float64)
                rule = self.rule if past > 0 else "adam"
                rule = "eigen" if rule == "polar" and S.trace() == 0 else rule  # nothing is known of the side
                end = oracles.rule_step(
                    rule, adam, rank_first, gradient, M, self.hyper["lr"], self.hyper["weight_decay"],
                    self.hyper.get("maximize", False), self.damping,
                )  # fmt: skip
                rank_first.copy_(end)
        for name, p in self.model.named_parameters():
            if name.startswith(("norm", "head")):
                adam = self._adam(name, p.shape)
                sign = -1 if self.hyper.get("maximize", False) else 1
                p.mul_(1 - self.hyper["lr"] * self.hyper["weight_decay"]).add_(adam(sign * p.grad, self.hyper["lr"]))


VARIANTS = {
    "plain": {},
    "cadence": {"factor_every": 3, "inverse_every": 4},
    "warm": {"warmup_steps": 5, "inverse_every": 3, "factor_every": 2},
    "paper": {"sides": "paper", "factor_decay": 1.0},
    "decay": {"weight_decay": 0.2, "factor_decay": 0.0, "maximize": True},
}


# the start matters to the first matrices alone
STARTS = [(v, "random") for v in VARIANTS] + [(v, "zero") for v in ("plain", "paper")]


@pytest.mark.parametrize(("variant", "start"), STARTS)
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_equal_the_loop(rule, statistics, variant, start):
    given = VARIANTS[variant]
    hyper = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}
    hyper |= {key: given[key] for key in ("weight_decay", "maximize") if key in given}
    rest = {"sides": "kfac", "factor_decay": 0.9, "factor_every": 1, "inverse_every": 1, "warmup_steps": 0}
    rest |= {key: given[key] for key in rest if key in given}
    model, twin = models.mlp(start=start), models.mlp(start=start)
    optimizer = GritKFAC(model, statistics=statistics, update=rule, damping=0.2, **hyper, **rest)
    loop = Loop(twin, rule, statistics, rest["sides"], hyper, 0.2, *list(rest.values())[1:])
    for i in range(20):
        models.fit(model, optimizer, 1, i)
        loop.step(i)
    # Each step turns rounding (1e-16) into at most lr · 1e-16 / (√v̂ + 1e-6) of a parameter; eigenvectors add the
    # inverse of a relative gap (1e3 here), and twenty steps of a smooth map grow it a little.
    models.assert_near(models.snapshot(model), models.snapshot(twin), rtol=1e-7, atol=1e-9)


def test_the_loop_tells_settings_apart():
    """Negative control: what the loop test compares moves by far more than its tolerance when a setting is wrong."""
    ends = {}
    settings = {"": {}, "damping": {"damping": 0.25}, "decay": {"factor_decay": 0.8}, "inverse": {"inverse_every": 2},
                "factor": {"factor_every": 2}, "sides": {"sides": "paper"}}  # fmt: skip
    for name, given in settings.items():
        model = models.mlp()
        base = {"update": "adam", "damping": 0.2, "factor_decay": 0.9, "inverse_every": 1}
        models.fit(model, GritKFAC(model, lr=1e-2, **{**base, **given}), 20)
        ends[name] = model.first.lora_A.weight.detach().clone()
    for name in settings:
        assert name == "" or (ends[name] - ends[""]).abs().max() > 1e-5, name


# ---------------------------------------------------------------------------------------------- Riemannian reduction


@pytest.mark.parametrize(("steps", "lr"), [(1, 1e-2), (6, 1e-7)])
def test_weight_statistics_with_adam_are_pefts_riemannian_optimizer(steps, lr):
    """λ → 0 gives (tr S / r) · S⁻¹: PEFT's S⁻¹ times a number per matrix and step, which Adam divides out if ε = 0⁺.

    So the first step from B ≠ 0 is exact at any learning rate, and several are while the number stays what it was:
    with lr = 1e-7 the traces move by 1e-6 of themselves in six steps, and the compared updates by as much.
    """
    hyper = {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-30}
    # start in general position: the gradients of float64 models must not be rounding errors for Adam to blow up
    model = models.llama(torch.float64, start="random")
    twin = copy.deepcopy(model)
    begin = models.snapshot(model)
    ours = GritKFAC(model, statistics="weight", update="adam", damping=1e-11, inverse_every=1, **hyper)
    theirs = create_riemannian_optimizer(twin, torch.optim.AdamW, reg=1e-12, weight_decay=0.0, **hyper)
    models.fit(model, ours, steps)
    models.fit(twin, theirs, steps)
    wrong = copy.deepcopy(twin)
    wrong.load_state_dict(begin, strict=False)
    models.fit(wrong, GritKFAC(wrong, statistics="weight", sides="paper", update="adam", damping=1e-11, **hyper), steps)
    off = 0.0
    for pair in ours.pairs:
        for p in (pair.A, pair.B):
            name = next(n for n, q in model.named_parameters() if q is p)
            update, peft = ((m.get_parameter(name) - begin[name]) / lr for m in (model, twin))
            # an update is of order one per step; where a first moment nearly cancels, v̂ does not
            torch.testing.assert_close(update, peft, rtol=0, atol=1e-7 if steps == 1 else 2e-5)
            off = max(off, ((wrong.get_parameter(name) - begin[name]) / lr - peft).abs().max().item())
    assert off > 0.1


# ---------------------------------------------------------------------------------------------- batches, recomputation


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_equal_one_batch(parts, statistics):
    model, twin = models.mlp(), models.mlp()
    make = {"lr": 1e-2, "statistics": statistics, "inverse_every": 2}
    optimizer, other = GritKFAC(model, **make), GritKFAC(twin, **make)
    for i in range(5):
        models.fit(model, optimizer, 1, i)
        other.zero_grad()
        x, y = models.batch(twin, i)
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(twin(x_part).flatten(0, 1), y_part.flatten()) / parts).backward()
        other.step()
    # the same sums in another order, through five steps of Adam
    models.assert_near(models.snapshot(model, optimizer), models.snapshot(twin, other), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(reentrant, drop):
    runs = []
    for checkpointing in (None, reentrant):
        model = models.mlp(drop=drop, checkpointing=checkpointing)
        optimizer = GritKFAC(model, lr=1e-2, inverse_every=2)
        torch.manual_seed(5)
        models.fit(model, optimizer, 4)
        runs.append(models.snapshot(model, optimizer))
    models.assert_same(*runs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_of_a_llama(reentrant):
    runs = []
    for on in (False, True):
        model = models.llama(torch.float64, start="random")
        if on:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        optimizer = GritKFAC(model, lr=1e-2, inverse_every=2)
        models.fit(model, optimizer, 3)
        assert all(d["rows"] == 60 for d in optimizer.diagnostics()["pairs"].values())
        runs.append(models.snapshot(model, optimizer))
    models.assert_same(*runs)


def test_forwards_without_backward_are_not_counted():
    model, twin = models.mlp(), models.mlp()
    optimizer, other = GritKFAC(model, lr=1e-2), GritKFAC(twin, lr=1e-2)
    for i in range(3):
        models.fit(model, optimizer, 1, i)
        with torch.no_grad():
            models.loss(twin, 90 + i)
        models.loss(twin, 95 + i)  # a graph that nobody walks
        models.fit(twin, other, 1, i)
    models.assert_same(models.snapshot(model, optimizer), models.snapshot(twin, other))


# ---------------------------------------------------------------------------------------------- kinds of adapters


def test_convolution_embedding_dora_and_a_frozen_A_train_together():
    model = models.mixed()
    model.front["fc"].lora_A["default"].weight.requires_grad_(False)
    frozen = model.front["fc"].lora_A["default"].weight.detach().clone()
    optimizer = GritKFAC(model, lr=1e-2, inverse_every=2)
    losses = []
    for _ in range(40):  # one batch again and again: it is learnt by heart
        losses += models.fit(model, optimizer, 1)
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(model.front["fc"].lora_A["default"].weight, frozen)
    found = optimizer.diagnostics()
    assert {name: d["statistics"] for name, d in found["pairs"].items()} == {
        "front.embed": "gradient", "front.conv": "activation", "front.fc": "activation", "back.fc": "gradient",
    }  # fmt: skip
    assert "embedding" in found["pairs"]["front.embed"]["note"] and "Dora" in found["pairs"]["back.fc"]["note"]
    assert found["pairs"]["front.conv"]["note"] == "" and found["silent"] == found["idle"] == []
    assert "A" not in found["pairs"]["front.fc"] and "B" in found["pairs"]["front.fc"]
    # positions of the convolution, pixel by pixel, are its tokens; gradients are observed once a step
    assert found["pairs"]["front.conv"]["rows"] == 40 * 6 * 16 and found["pairs"]["front.embed"]["rows"] == 40


def test_a_frozen_A_still_preconditions_B_by_S_u():
    model, twin = models.mlp(), models.mlp()
    model.first.lora_A.weight.requires_grad_(False)
    optimizer, other = GritKFAC(model, lr=1e-2), GritKFAC(twin, lr=1e-2)
    models.fit(model, optimizer, 1)
    models.fit(twin, other, 1)
    assert torch.equal(model.first.lora_B.weight, twin.first.lora_B.weight)
    B, B_twin = model.first.lora_B.weight, twin.first.lora_B.weight
    assert torch.equal(optimizer.state[B]["factor"], other.state[B_twin]["factor"])


# ---------------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("rule", RULES)
def test_diagnostics_by_hand(rule):
    model = models.mlp()
    optimizer = GritKFAC(model, lr=1e-2, update=rule, damping=0.3)
    models.fit(model, optimizer, 3)
    found = optimizer.diagnostics()
    assert found["steps"] == 3 and found["skipped_updates"] == 0 and found["backend"] == "auto"
    assert (
        found["idle"] == ["idle"] and found["silent"] == [] and list(found["pairs"])[:3] == ["first", "second", "third"]
    )
    for pair in optimizer.pairs[:3]:
        d, r = found["pairs"][pair.name], pair.rank
        S_u, S_d = factors(optimizer, pair)
        assert d["rank"] == d["full_rank"] == r and d["rows"] == 3 * 18
        for side, S in (("A", S_d), ("B", S_u)):
            values = torch.linalg.eigvalsh(S * r / S.trace())
            damped = values + 0.3
            assert d[side]["condition"] == pytest.approx((damped[-1] / damped[0]).item(), rel=1e-9)
            M = values if rule in BASES else damped**-0.5 if rule == "whiten" else 1 / damped
            M = torch.diag(M)
            off = M - M.trace() / r * torch.eye(r, dtype=torch.float64)
            assert d[side]["scalar_distance"] == pytest.approx((off.norm() / M.norm()).item(), rel=1e-9)
            assert d[side]["failed"] is False
        shares = oracles.hankel(S_u, S_d).square()
        shares = shares / shares.sum()
        # the balanced basis regularises each factor by 1e-6 of its mean eigenvalue
        assert d["energy"] == pytest.approx(shares.tolist(), abs=1e-4)
        entropy = -(shares * shares.log()).sum()
        assert d["effective_rank"] == pytest.approx(entropy.exp().item(), rel=1e-3)


def test_diagnostics_before_the_first_step_and_in_plain_types():
    model = models.mlp()
    optimizer = GritKFAC(model)
    found = optimizer.diagnostics()
    assert found["steps"] == 0 and len(found["idle"]) == 4 and found["silent"] == []
    models.fit(model, optimizer, 2)

    def plain(x):
        if isinstance(x, dict):
            return all(isinstance(k, str) and plain(v) for k, v in x.items())
        return all(map(plain, x)) if isinstance(x, (list, tuple)) else isinstance(x, (str, int, float))

    assert plain(optimizer.diagnostics())


def test_a_hook_that_never_fires_is_named_and_warned_about_once():
    model = models.mlp()
    model.second.bypass = True
    optimizer = GritKFAC(model, lr=1e-2)
    with pytest.warns(UserWarning, match=r"1 pairs .*second") as caught:
        models.fit(model, optimizer, 5)
    assert len(caught) == 1
    assert optimizer.diagnostics()["silent"] == ["second"]
    twin = models.mlp()
    twin.second.bypass = True
    plain = GritKFAC(twin, lr=1e-2, statistics="gradient")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.fit(twin, plain, 3)
    assert plain.diagnostics()["silent"] == []


def test_an_unseen_pair_gets_plain_adamw():
    model = models.mlp(torch.float32)
    model.second.bypass = True
    optimizer = GritKFAC(model, lr=1e-2)
    copies = {p: nn.Parameter(p.detach().clone()) for p in (model.second.lora_A.weight, model.second.lora_B.weight)}
    adamw = torch.optim.AdamW(copies.values(), lr=1e-2, weight_decay=0.0, fused=True)
    with pytest.warns(UserWarning, match="never seen"):
        for i in range(4):
            models.fit(model, optimizer, 1, i)
            for p, q in copies.items():
                q.grad = p.grad.clone()
            adamw.step()
    assert all(torch.equal(p, q) for p, q in copies.items())


def test_a_model_in_which_no_hook_fires_trains_with_adamw():
    model = models.mlp()
    for layer in model.layers:
        layer.bypass = True
    optimizer = GritKFAC(model, lr=1e-2)
    with pytest.warns(UserWarning, match="3 pairs"):
        models.fit(model, optimizer, 3)
    assert optimizer.diagnostics()["silent"] == ["first", "second", "third"]


# ---------------------------------------------------------------------------------------------- settings in flight


def test_paper_has_the_published_settings():
    group = GritKFAC.paper(models.mlp(), min_rank=2).param_groups[0]
    published = {
        "lr": 2e-5, "sides": "paper", "update": "adam", "damping": 1e-3, "factor_decay": 1.0, "factor_every": 15,
        "inverse_every": 50, "reprojection": "paper", "reproject_every": 50, "rank_threshold": 0.99, "min_rank": 2,
    }  # fmt: skip
    assert {key: group[key] for key in published} == published


def test_every_setting_is_read_at_every_step():
    """A run whose groups are edited after two steps is the run that continues from there with those settings."""
    edits = {
        "damping": 1.0,
        "factor_decay": 0.2,
        "inverse_every": 1,
        "factor_every": 2,
        "betas": (0.5, 0.9),
        "eps": 1e-3,
    }
    for key, value in edits.items():
        base = {"lr": 1e-2, "update": "adam", "inverse_every": 3}
        model = models.mlp()
        optimizer = GritKFAC(model, **base)
        models.fit(model, optimizer, 2)
        other_model = models.copied_into(model, models.mlp())
        other = GritKFAC(other_model, **base)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0][key] = value
        other.load_state_dict(saved)
        optimizer.param_groups[0][key] = value
        models.fit(model, optimizer, 6, 2)
        models.fit(other_model, other, 6, 2)
        models.assert_same(models.snapshot(model, optimizer), models.snapshot(other_model, other))
        untouched = models.mlp()
        models.fit(untouched, GritKFAC(untouched, **base), 8)
        assert models.differences(models.snapshot(untouched), models.snapshot(model)) != [], key


def test_groups_of_A_and_of_B_with_their_own_lr():
    """LoRA+: B's learning rate is a multiple of A's; the first step scales with it and nothing else changes."""
    moved = []
    for ratio in (1.0, 4.0):
        model = models.mlp()
        A, B = (
            [p for n, p in model.named_parameters() if side in n and "idle" not in n] for side in ("lora_A", "lora_B")
        )
        optimizer = GritKFAC([{"params": A}, {"params": B, "lr": 1e-2 * ratio}], lr=1e-2, model=model)
        before = [p.detach().clone() for p in (*A, *B)]
        models.fit(model, optimizer, 1)
        moved.append([p.detach() - q for p, q in zip((*A, *B), before, strict=True)])
    for i, (one, four) in enumerate(zip(*moved, strict=True)):
        torch.testing.assert_close(four, one * (1.0 if i < 3 else 4.0), rtol=1e-9, atol=1e-15)
