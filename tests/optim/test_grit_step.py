"""The step of GritKFAC against AdamW, PEFT's Riemannian optimizer, and itself written as a loop."""

import copy
import itertools

import models
import oracles
import pytest
import torch
from grit_kit import BASES, RULES, STATISTICS, observed_backward, rank_side
from peft.optimizers import create_riemannian_optimizer
from torch import nn

# ---------------------------------------------------------------------------------------------- reductions to AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_warmup_is_fused_adamw_bit_for_bit(rule, dtype, decay):
    model, twin = models.mlp(dtype), models.mlp(dtype)
    hyper = {"lr": 1e-2, "betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": decay}
    optimizer = rank_side(model, update=rule, warmup_steps=100, **hyper)
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
        models.fit(model, rank_side(model, lr=1e-2, update=rule or "adam", warmup_steps=0 if rule else 3), 3)
        ends.append(model.first.lora_A.weight.detach().clone())
    for one, two in itertools.combinations(ends, 2):
        assert (one - two).abs().max() > 1e-4  # the learning rate is 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rule", ["eigen", "adam", "whiten"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_while_B_is_zero_the_A_side_is_plain_adamw(rule, dtype, start):
    """S_d = 0 says nothing, so it must act as the identity; A gets a made-up gradient, for its own is zero too."""
    model = models.mlp(dtype, start)
    optimizer = rank_side(model, lr=1e-2, update=rule, outer_rank=0, weight_decay=0.1)
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
    ours = rank_side(model, statistics="weight", update="adam", damping=1e-11, inverse_every=1, **hyper)
    theirs = create_riemannian_optimizer(twin, torch.optim.AdamW, reg=1e-12, weight_decay=0.0, **hyper)
    models.fit(model, ours, steps)
    models.fit(twin, theirs, steps)
    wrong = copy.deepcopy(twin)
    wrong.load_state_dict(begin, strict=False)
    models.fit(
        wrong, rank_side(wrong, statistics="weight", sides="paper", update="adam", damping=1e-11, **hyper), steps
    )
    off = 0.0
    for pair in ours.pairs:
        for p in (pair.A, pair.B):
            name = next(n for n, q in model.named_parameters() if q is p)
            update, peft = ((m.get_parameter(name) - begin[name]) / lr for m in (model, twin))
            # an update is of order one per step; where a first moment nearly cancels, v̂ does not
            torch.testing.assert_close(update, peft, rtol=0, atol=1e-7 if steps == 1 else 2e-5)
            off = max(off, ((wrong.get_parameter(name) - begin[name]) / lr - peft).abs().max().item())
    assert off > 0.1


# ---------------------------------------------------------------------------------------------- the whole optimizer


class Loop:
    """GritKFAC once more in float64: pair by pair, side by side, moments kept as lists of observations."""

    def __init__(
        self, model, rule, statistics, sides, hyper, damping, decay, factor_every, inverse_every, warmup, outer_rank
    ):  # fmt: skip
        self.model, self.rule, self.statistics, self.sides = model, rule, statistics, sides
        self.hyper, self.damping, self.decay, self.warmup = hyper, damping, decay, warmup
        self.factor_every, self.inverse_every, self.t = factor_every, inverse_every, 0
        self.seen = {(layer, which): [] for layer in model.layers for which in "ud"}
        self.matrix = {}
        self.adams = {}
        self.outer_rank, self.outer = outer_rank, {}

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
                decay = 0.0 if self.statistics == "weight" else self.decay**self.factor_every
                S = oracles.average(self.seen[layer, which], decay)
                rank_first = p if name == "A" else p.T
                gradient = p.grad if name == "A" else p.grad.T
                adam = self._adam((layer, name), rank_first.shape)
                if past > 0 and (past - 1) % self.inverse_every == 0:
                    self._refresh((layer, name), S)
                M = self.matrix[layer, name] if past > 0 else torch.eye(len(S), dtype=torch.float64)
                rule = self.rule if past > 0 else "adam"
                if self.outer_rank:
                    key, d = (layer, name), gradient.shape[1]
                    made = oracles.OuterFactor(min(self.outer_rank, d), d, self.decay, self.damping)
                    preconditioned = self.outer.setdefault(key, made)(gradient)
                    gradient = preconditioned if past > 0 else gradient
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
    "paper": {"sides": "paper", "factor_decay": 1.0, "outer_rank": 0},
    "wide": {"outer_rank": 1000},
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
    rest |= {"outer_rank": 3}
    rest |= {key: given[key] for key in rest if key in given}
    model, twin = models.mlp(start=start), models.mlp(start=start)
    optimizer = rank_side(model, statistics=statistics, update=rule, damping=0.2, **hyper, **rest)
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
                "factor": {"factor_every": 2}, "sides": {"sides": "paper"},
                "outer": {"outer_rank": 4}, "no outer": {"outer_rank": 0}}  # fmt: skip
    for name, given in settings.items():
        model = models.mlp()
        base = {"update": "adam", "outer_rank": 3, "damping": 0.2, "factor_decay": 0.9, "inverse_every": 1}
        models.fit(model, rank_side(model, lr=1e-2, **{**base, **given}), 20)
        ends[name] = model.first.lora_A.weight.detach().clone()
    for name in settings:
        assert name == "" or (ends[name] - ends[""]).abs().max() > 1e-5, name
