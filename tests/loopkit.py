"""Ways to train: the optimizers, and the loops written with torch alone, each beside what it must equal.

A loop is started on a fresh model and trains it on the batches ``begin, begin + 1, ...`` of `models`. A broken step
is one more batch whose loss, and with it every gradient, is NaN. Loops of libraries are in `loopkit_frameworks`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import models
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import SWALR, AveragedModel

from curvopt import GoRAInit, GritKFAC, MatryoshkaScaledAdam

NAN = float("nan")
# every cadence falls into a run of six steps, and ranks move
MOVING = {"factor_every": 1, "inverse_every": 2, "reproject_every": 3, "rank_threshold": 0.9, "min_rank": 1,
          "weight_decay": 0.1}  # fmt: skip


@dataclass(frozen=True)
class Make:
    """One optimizer: its class, its arguments, and those that make what it does independent of the clock."""

    cls: type
    kwargs: dict[str, Any]
    timeless: dict[str, Any] = field(default_factory=dict)
    observes: bool = False  # it keeps count of the rows its hooks have seen
    not_in: tuple[str, ...] = ()  # loops that make no sense for it
    prepare: Callable[[nn.Module], Any] = lambda model: None  # what it wants done to a model first

    def __call__(self, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if isinstance(params, nn.Module):
            self.prepare(params)
        return self.cls(params, **{**self.kwargs, **kwargs})

    @property
    def __name__(self) -> str:
        return self.cls.__name__


def freeze_idle(model: nn.Module) -> None:
    """Freeze the layer that nobody calls; GoRAInit wants a gradient from every layer it is to rank."""
    for name, p in model.named_parameters():
        if name.startswith("idle"):
            p.requires_grad_(False)


def grit(model: nn.Module) -> GritKFAC:
    """What GoRAInit hands over to."""
    return GritKFAC(model, lr=1e-2, statistics="activation", factor_every=1, inverse_every=2)


# it has no learning rate of its own, takes all trainable adapters at once, and with the handover come new hooks
NOT_GORA = ("`modules_to_save`", "several adapters in turn", "frozen A", "`torch.compile`")
OPTIMIZERS = [
    Make(
        GritKFAC,
        {"lr": 1e-2, **MOVING},
        {"inverse_every": 1, "reproject_every": 0, "statistics": "activation"},
        observes=True,
    ),
    Make(MatryoshkaScaledAdam, {"lr": 1e-2, "weight_decay": 0.1}),
    Make(GoRAInit, {"rank": 2, "min_rank": 1, "max_rank": 3, "calibration_steps": 2, "reset": True, "resize": False,
                    "start": "gora", "allocation": "exact", "then": grit}, not_in=NOT_GORA, prepare=freeze_idle),
]  # fmt: skip


@dataclass
class Run:
    """A loop in progress.

    ``train(begin, end, broken)`` goes on; ``extra`` is what else the loop's checkpoint holds (scheduler, scaler).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: Callable[[int, int, bool], None]
    extra: list[Any] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def snapshot(self) -> dict[str, Tensor]:
        """Return all parameters and all state, also of the optimizer that GoRAInit has handed over to."""
        found = models.snapshot(self.model, self.optimizer)
        then = getattr(self.optimizer, "delegate", None)
        return found if then is None else found | {f"then/{k}": x for k, x in models.snapshot(self.model, then).items()}

    def skipped(self) -> set[float]:
        """Return the counts of skipped updates in the state."""
        acting = getattr(self.optimizer, "delegate", None) or self.optimizer
        return {float(state["skipped"]) for state in acting.state.values() if "skipped" in state}


@dataclass(frozen=True)
class Loop:
    """A way to train, and what it is compared with.

    ``start(make)`` begins it on a fresh model. ``like(make, steps)`` trains the plain way and gives the snapshot that
    ``steps`` steps must lead to, or the losses if ``by_loss``. ``rtol`` is 0 where that holds bit for bit, and
    ``because`` says why where it does not.
    """

    name: str
    start: Callable[[Make], Run]
    like: Callable[[Make, int], Any]
    rtol: float = 0.0
    because: str = ""
    by_loss: bool = False
    turns: int = 1  # every pair is trained in one of so many steps


def stepwise(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[int, bool], Any], *extra: Any) -> Run:
    """Return the Run of a loop given as one step, ``step(i, broken) -> loss``."""

    def train(begin: int, end: int, broken: bool = False) -> None:
        run.losses += [step(i, broken).item() for i in range(begin, end)]

    run = Run(model, optimizer, train, list(extra))
    return run


def value(model: nn.Module, i: int, broken: bool = False) -> Tensor:
    """Return the loss of batch i, NaN if broken."""
    return models.loss(model, i) * (NAN if broken else 1)


def plain(make: Make, build: Callable[[], nn.Module] = models.mlp, **kwargs: Any) -> Run:
    """The loop of the README."""
    model = build()
    optimizer = make(model, **kwargs)

    def step(i: int, broken: bool) -> Tensor:
        optimizer.zero_grad()
        loss = value(model, i, broken)
        loss.backward()
        optimizer.step()
        return loss

    return stepwise(model, optimizer, step)


def like_plain(
    make: Make, steps: int, build: Callable[[], nn.Module] = models.mlp, losses: bool = False, **kwargs: Any
) -> Any:
    """Return the snapshot, or the losses, of so many plain steps."""
    run = plain(make, build, **kwargs)
    run.train(0, steps, False)
    return run.losses if losses else run.snapshot()


def closure(make: Make) -> Run:
    model = models.mlp()
    optimizer = make(model)

    def step(i: int, broken: bool) -> Tensor:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = value(model, i, broken)
            loss.backward()
            return loss

        return optimizer.step(evaluate)

    return stepwise(model, optimizer, step)


def halves(model: nn.Module, i: int) -> list[tuple[Tensor, Tensor]]:
    """Return the two halves of batch i."""
    x, y = models.batch(model, i)
    return list(zip(x.chunk(2), y.chunk(2), strict=True))


def token_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross entropy over the tokens of a batch."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def accumulation(make: Make) -> Run:
    model = models.mlp()
    optimizer = make(model)

    def step(i: int, broken: bool) -> Tensor:
        optimizer.zero_grad()
        for x, y in halves(model, i):
            loss = token_loss(model, x, y) * (NAN if broken else 1)
            (loss / 2).backward()
        optimizer.step()
        return loss

    return stepwise(model, optimizer, step)


def checkpointed(reentrant: bool) -> Callable[[Make], Run]:
    return lambda make: plain(make, lambda: models.mlp(checkpointing=reentrant))


def compiled(make: Make, backend: str = "aot_eager", **options: Any) -> Run:
    torch._dynamo.reset()
    model = models.mlp()
    optimizer = make(model)
    forward = torch.compile(model, backend=backend, **options)

    def step(i: int, broken: bool) -> Tensor:
        optimizer.zero_grad()
        x, y = models.batch(model, i)
        loss = token_loss(forward, x, y) * (NAN if broken else 1)
        loss.backward()
        optimizer.step()
        return loss

    return stepwise(model, optimizer, step)


def narrow() -> nn.Module:
    return models.mlp(torch.float32)


def autocast(make: Make) -> Run:
    model = narrow()
    optimizer = make(model)

    def step(i: int, broken: bool) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = value(model, i, broken)
        loss.backward()
        optimizer.step()
        return loss

    return stepwise(model, optimizer, step)


def scaled(half: bool, unscale: bool) -> Callable[[Make], Run]:
    """Loss scaling: with fp16 autocast or, to see the scale alone, without; with ``unscale_`` or without."""

    def start(make: Make) -> Run:
        model = narrow()
        optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def step(i: int, broken: bool) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = value(model, i, broken)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            return loss

        return stepwise(model, optimizer, step, scaler)

    return start


def clipped(make: Make, limit: float = 0.05, by_hand: bool = False) -> Run:
    """Global-norm clipping, torch's or the formula written out."""
    model = models.mlp()
    optimizer = make(model)
    params = [p for p in model.parameters() if p.requires_grad]

    def step(i: int, broken: bool) -> Tensor:
        optimizer.zero_grad()
        loss = value(model, i, broken)
        loss.backward()
        if by_hand:
            grads = [p.grad for p in params if p.grad is not None]
            norm = sum(g.square().sum() for g in grads).sqrt()
            assert norm > limit  # otherwise nothing is tried
            for g in grads:
                g.mul_(limit / (norm + 1e-6))
        else:
            nn.utils.clip_grad_norm_(params, limit)
        optimizer.step()
        return loss

    return stepwise(model, optimizer, step)


def like_clipped(make: Make, steps: int) -> dict[str, Tensor]:
    run = clipped(make, by_hand=True)
    run.train(0, steps, False)
    return run.snapshot()


def rate(i: int) -> float:
    """The factor on the learning rate at step i."""
    return 0.9**i


def scheduled(tensor: bool) -> Callable[[Make], Run]:
    def start(make: Make) -> Run:
        model = models.mlp()
        lr = torch.tensor(1e-2, dtype=torch.float64) if tensor else 1e-2
        optimizer = make(model, lr=lr)
        scheduler = LambdaLR(optimizer, rate)

        def step(i: int, broken: bool) -> Tensor:
            optimizer.zero_grad()
            loss = value(model, i, broken)
            loss.backward()
            optimizer.step()
            scheduler.step()
            return loss

        return stepwise(model, optimizer, step, scheduler)

    return start


def like_scheduled(make: Make, steps: int) -> dict[str, Tensor]:
    run = plain(make, lr=1e-2)
    for i in range(steps):
        run.optimizer.param_groups[0]["lr"] = 1e-2 * rate(i)
        run.train(i, i + 1, False)
    return run.snapshot()


def averaged(make: Make) -> Run:
    """Stochastic weight averaging: the average looks on, and its copy of the model is used in between."""
    run = plain(make)
    average = AveragedModel(run.model)
    scheduler = SWALR(run.optimizer, swa_lr=run.optimizer.param_groups[0]["lr"], anneal_epochs=1)
    alone = run.train

    def train(begin: int, end: int, broken: bool = False) -> None:
        for i in range(begin, end):
            alone(i, i + 1, broken)
            average.update_parameters(run.model)
            scheduler.step()
            models.loss(average.module, i).backward()  # a copy that nobody watches

    run.train, run.extra = train, [scheduler, average]
    return run


# float64 rounding, grown by Adam's division
ORDER = "another order of the sums"
LOOPS = [
    Loop("plain", plain, like_plain),
    Loop("closure", closure, like_plain),
    Loop("gradient accumulation", accumulation, like_plain, 1e-8, ORDER),
    Loop("activation checkpointing, reentrant", checkpointed(True), like_plain),
    Loop("activation checkpointing, non-reentrant", checkpointed(False), like_plain),
    Loop("`torch.compile`", compiled, like_plain),
    Loop("autocast bf16", autocast, lambda make, n: like_plain(make, n, narrow, losses=True), 1e-2,
         "losses; 8 bits", by_loss=True),
    Loop("`GradScaler`", scaled(False, False), lambda make, n: like_plain(make, n, narrow)),
    Loop("`GradScaler`, autocast fp16", scaled(True, False),
         lambda make, n: like_plain(make, n, narrow, losses=True), 2e-3, "losses; 11 bits",
         by_loss=True),
    Loop("gradient clipping", clipped, like_clipped, 1e-8, ORDER),
    Loop("scheduler", scheduled(False), like_scheduled),
    Loop("scheduler, tensor learning rate", scheduled(True), like_scheduled, 1e-8,
         "lr·x in one rounding or two"),
    Loop("`swa_utils`", averaged, like_plain),
]  # fmt: skip


def resumed(loop: Loop, make: Make, run: Run) -> Run:
    """Return a run of a new model and optimizer that know of ``run`` only what files kept."""
    # of a quantized base a file keeps nothing: it comes from where it came from before
    weights = {name: p for name, p in run.model.named_parameters() if type(p) is nn.Parameter}
    saved = models.round_trip([{name: p.detach() for name, p in weights.items()}, run.optimizer.state_dict()])
    extra = copy.deepcopy([part.state_dict() for part in run.extra])
    fresh = loop.start(make)
    fresh.model.load_state_dict(saved[0], strict=False)
    fresh.optimizer.load_state_dict(saved[1])
    for part, state in zip(fresh.extra, extra, strict=True):
        part.load_state_dict(state)
    return fresh
