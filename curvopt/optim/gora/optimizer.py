"""GoRAInit: a few batches decide ranks and initial weights of the adapters; then another optimizer takes over."""

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from curvopt.distributed import reshard
from curvopt.functional.ranks import Allocation, BudgetWeight, RankPlan
from curvopt.lora import LoraPair, describe_search
from curvopt.optim.base import PairedOptimizer
from curvopt.optim.checking import check
from curvopt.optim.gora import checks, handover
from curvopt.optim.gora.calibration import (
    KEYS,
    Calibration,
    Compare,
    Importance,
    Start,
    plan_for,
    write_start,
)
from curvopt.optim.locator import describe_names

log = logging.getLogger(__name__)
BETAS = (0.9, 0.999)  # for schedulers that cycle momentum; only edits of it reach the delegate
AT_LEAST = 3  # steps before `convergence` may end the calibration


class GoRAInit(PairedOptimizer):
    r"""Calibrates adapters from gradients (GoRA, arXiv 2502.12171), then hands over to another optimizer.

    .. code-block:: text

        for n steps, with B = 0 and no update:       Ḡ_l ← mean of ∂L/∂W_l          by hooks; W_l stays frozen
        "exact":     r_l ∝ I_l / f(d_in + d_out) within a budget, I_l = mean |W_l ⊙ Ḡ_l|      (curvopt.functional.ranks)
        "whitened":  A ← (leading right singular vectors of R_g Ḡ R_x) R_x,  B = 0       (curvopt.functional.whitening)
        "gora":      A ← its first r_l rows;  B ← −(ξ/s) Ḡ Aᵀ (A Aᵀ)⁻¹,  ξ = lr₀ √(d_in/r_l)    (...gradient_init)
        afterwards every call goes to then(model)

    What to expect (docs/gora.md): on the text tasks of the benchmarks GoRA's ranks and start lowered the first loss and
    raised the last; on images they gained. The defaults are therefore ours: the whitened start at the ranks that the
    adapters have. Before AdamW it gained on images and at rank 32 on text, elsewhere nothing for certain. **Before
    `GritKFAC` no start has paid**: the calibration takes steps away, and preconditioning does what the start does. The
    published method is `paper`.

    Args:
        params: the model, or param groups with ``model``; only ``importance="grad_b"`` with ``start="gora"`` and
            without ``then`` works without a model.
        rank: r of the uniform adapters whose number of parameters is the budget; None: the ranks the adapters have.
        min_rank: smallest rank of a layer; min(d_in, d_out) where that is smaller. None: half of the least ``rank``.
            Like ``max_rank`` not for ``allocation="uniform"``.
        max_rank: largest rank of a layer; min(d_in, d_out) where that is smaller. None: four times the largest
            ``rank``.
        calibration_steps: n, calls of ``step``, including those dropped because of non-finite gradients.
        init_lr: of ``start="gora"``: lr₀ ≥ 0, or ``"auto"``: the value of `GRID` with the smallest loss on the last
            batch; needs ``closure``.
        start: ``"gora"``: B₀ above. ``"whitened"`` (our derivation): B = 0 and A ← (r leading right singular vectors of
            R_g Ḡ R_x) R_x, scaled to the norm that LoRA gave A, with R = (S / mean diag S + 0.01)^(-1/2) of the second
            moments of x and g. It uses sketches, so that no sum is larger than an adapter of rank ``max_rank`` or 64,
            and does not read the base weight. The first batch gives R_x and R_g, the others Ḡ. ``"whitened-random"``:
            B = 0 and A ← A R_x.
        compare: ``"all"`` layers share one budget; ``"role"``: layers whose parents have the same name (``self_attn``,
            ``mlp``) share the budget of their uniform ranks, so that only importances of like layers are compared.
        importance: for ``"exact"`` and ``"paper"``: ``"mean_abs"``, GoRA's; ``"frobenius"`` or ``"nuclear"`` norm of Ḡ;
            ``"grad_b"``: ‖∂L/∂B‖, which needs no Ḡ, but adapters that were created with the largest rank they may get.
        allocation: ``"exact"`` spends the budget in proportion to importance; ``"paper"`` uses the official rounding;
            ``"uniform"`` gives every layer its ``rank``; ``"spectrum"`` takes the largest squared singular values of
            R_g Ḡ R_x per parameter first. The latter two use no importances.
        budget_weight: f: ``"linear"``, ``"sqrt"`` or ``"log1p"``.
        convergence: stop early, after at least 3 steps, when the relative change of every importance is below this
            (published: 0.1); they are then computed at every step. None: never.
        offload: keep Σ Ḡ in host memory.
        then: a callable that takes the model and returns an optimizer, called once the adapters are ready. None: create
            one yourself once `ready` is True; further steps raise an error.
        adapter: only this adapter's pairs; None for all trainable ones.
        lr: the reference for schedules of *this* optimizer: the delegate's learning rates are multiplied by the present
            ``lr`` of the group, divided by this value. With the default, ``lr`` is a factor; for schedules in absolute
            numbers pass the learning rate that ``then`` uses.
        keep_scaling: adapters keep their s whatever their rank; False: alpha is kept and s follows the layer's own rank
            (published, with rank-stabilised scaling).
        resize: False keeps all shapes, for a model inside DistributedDataParallel or FSDP2: unused directions are zero
            in both matrices, and ``max_rank`` must not exceed the rank of the adapters.
        reset: set B to zero at the first step if it is not, instead of raising an error; that batch is not counted.
        generator: source of new rows of A and of the random vectors of ``"nuclear"``; None: torch's global one.
        process_group: processes to average over; None for the default group, if there is one.
        model: the module to search when ``params`` are groups of tensors.

    Adapters with a forward of their own (DoRA and other variants) and those that are frozen when the optimizer is made
    are left as they are; `diagnostics` names them. During the calibration, groups are read and validated at every step;
    ranks, ``importance``, ``allocation``, ``start``, ``offload`` and ``resize`` cannot be edited. Non-finite
    gradients are dropped: with ``"grad_b"`` the whole step, otherwise only those of the layers concerned. Gradients are
    used as they are in ``.grad`` at ``step``: unscaled and clipped if the loop does so, and not used if they were
    discarded before. Σ Ḡ, of ``"gora"``, ``"exact"`` and ``"paper"``, takes 4 bytes per weight of the adapted layers,
    twice that during a step. After the hand-over,
    edits of this optimizer's groups (``weight_decay``, ``betas``; schedulers that cycle momentum) are copied to the
    delegate's groups if these have such a setting. During the calibration, ``state_dict`` holds its sums; afterwards it
    holds the delegate's state.

    Raises:
        TypeError: see `PairedOptimizer`.
        ValueError: no pair, an argument out of range, or a budget that ``min_rank`` and ``max_rank`` do not allow; from
            ``step``: B is not zero, or a layer never had a gradient.
    """

    GRID = tuple(5e-2 * 4.0**k for k in range(-2, 5))

    _process_group: dist.ProcessGroup | None = None
    _generator: torch.Generator | None = None
    _small = frozenset(KEYS)
    _measure_spectra = False

    def __init__(
        self,
        params: ParamsT | nn.Module,
        *,
        rank: int | None = None,
        min_rank: int | None = None,
        max_rank: int | None = None,
        calibration_steps: int = 4,
        init_lr: float | Literal["auto"] = 5e-2,
        importance: Importance = "mean_abs",
        allocation: Allocation = "uniform",
        budget_weight: BudgetWeight = "linear",
        start: Start = "whitened",
        compare: Compare = "all",
        convergence: float | None = None,
        offload: bool = False,
        then: Callable[[Any], torch.optim.Optimizer] | None = None,
        adapter: str | None = None,
        lr: float | Tensor = 1.0,
        keep_scaling: bool = True,
        resize: bool = True,
        reset: bool = False,
        generator: torch.Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
    ) -> None:
        check("then", then, then is None or callable(then), "a callable that takes the model, or None")
        self._then = then
        self._generator, self._process_group = generator, process_group
        self._steps = 0
        self._plan: RankPlan | None = None
        self._passed: list[dict[str, Any]] = []  # settings of our groups as the delegate knows them
        self._delegate: torch.optim.Optimizer | None = None
        defaults = {
            "lr": lr, "rank": rank, "min_rank": min_rank, "max_rank": max_rank,
            "calibration_steps": calibration_steps, "init_lr": init_lr, "importance": importance,
            "allocation": allocation, "budget_weight": budget_weight, "convergence": convergence, "offload": offload,
            "keep_scaling": keep_scaling, "resize": resize, "reset": reset, "start": start, "compare": compare,
            "betas": BETAS,
        }  # fmt: skip
        super().__init__(params, defaults, model=model, adapter=adapter, require_pairs=False)
        if not self._pairs:
            found = describe_names(self.param_groups) if self._model is None else describe_search(self._model)
            raise ValueError(f"no LoRA pair found: {found}. Pass the model that holds the adapters")
        if then is not None and self._model is None:
            self._release()
            raise ValueError("then needs the model: pass it as params, or as model=")
        if not self._measure_spectra:
            checks.warn_of_roles(self.param_groups[0], self._treated())

    @classmethod
    def paper(
        cls, params: ParamsT | nn.Module, *, delegate_lr: float = 5e-5, loraplus_ratio: float = 16.0, **overrides: Any
    ) -> "GoRAInit":
        """Return GoRA as published: its ranks, rounding, start and learning rates.

        Sets ``rank=8``, ``min_rank=4``, ``max_rank=32``, ``calibration_steps=32``, ``init_lr=5e-2``,
        ``importance="mean_abs"``, ``start="gora"``, ``allocation="paper"``, ``budget_weight="linear"``,
        ``keep_scaling=False``, and as ``then`` AdamW without decay whose B learns ``loraplus_ratio`` times as fast as
        everything else (LoRA+). You have to add: ``use_rslora=True`` in the LoraConfig, adapters on the four attention
        projections only, float32, and a warm-up over 3 % of the steps. Not reproduced: the sign of the official code,
        which adds Ḡ where the paper subtracts it; here the loss falls at the start.

        Args:
            params: as for the class.
            delegate_lr: learning rate of A; published: 2e-5 to 5e-5.
            loraplus_ratio: learning rate of B divided by that of A.
            overrides: arguments of the class that replace these.
        """
        then = functools.partial(handover.loraplus, lr=delegate_lr, ratio=loraplus_ratio)
        settings: dict[str, Any] = {
            "rank": 8, "min_rank": 4, "max_rank": 32, "calibration_steps": 32, "init_lr": 5e-2, "start": "gora",
            "importance": "mean_abs", "allocation": "paper", "budget_weight": "linear", "keep_scaling": False,
            "then": then,
        }  # fmt: skip
        return cls(params, **{**settings, **overrides})

    @classmethod
    def plan_only(
        cls, model: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any], **settings: Any
    ) -> RankPlan:
        """Return the ranks that a calibration would choose, and the spectra behind them, without changing the model.

        Forward and backward passes run on ``model`` in its present mode. Gradients, buffers and torch's random state
        are restored afterwards. B need not be zero: Ḡ is then the gradient at the weights as adapted so far.

        Args:
            model: a model with adapters, trained or not.
            loss: returns the 0-d loss of a batch.
            batches: at least two; the first is used for R_x and R_g only.
            settings: arguments of the class; not ``then``, ``calibration_steps``, or ``importance="grad_b"``.

        Returns:
            The plan: print it, or use ``plan.rows()``, ``plan.gain()`` and ``plan.gain(other_ranks)``.

        Raises:
            ValueError: a setting out of range, or fewer than two batches with finite gradients.
        """
        check("importance", settings.get("importance"), settings.get("importance") != "grad_b", "one that needs no B")
        grads = {p: p.grad for p in model.parameters()}
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        devices = {p.device.index for p in grads if p.device.type == "cuda"}
        probe = _Probe(model, **{**settings, "resize": False})  # nothing is changed, so anything may be looked at
        try:
            with torch.random.fork_rng(devices=list(devices)):
                for batch in batches:
                    for p in grads:
                        p.grad = None
                    with torch.enable_grad():
                        loss(batch).backward()
                    with torch.no_grad():
                        probe.look()
                with torch.no_grad():
                    return probe.conclude()
        finally:
            probe.remove_hooks()
            for p, grad in grads.items():
                p.grad = grad
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    # ------------------------------------------------------------------ what a user reads

    @property
    def ready(self) -> bool:
        """Whether the adapters have their final ranks and initial weights."""
        return self._plan is not None

    @property
    def plan(self) -> RankPlan | None:
        """Ranks, importances, budget and how much of it is used; None until `ready`."""
        return self._plan

    @property
    def delegate(self) -> torch.optim.Optimizer | None:
        """The optimizer that ``then`` returned; None until `ready`, or without ``then``."""
        return self._delegate

    def ranks(self) -> dict[str, int]:
        """Return the rank of every pair by name: the delegate's if it adapts ranks, the plan's where there is one."""
        own = getattr(self._delegate, "ranks", None)
        planned = self._plan.ranks if self._plan is not None else {}
        return own() if own is not None else {p.name: planned.get(p.name, p.rank) for p in self._pairs}

    def diagnostics(self) -> dict[str, Any]:
        """Return ``ready``, ``steps`` and ``dropped`` of the calibration (reads the device), and ``left_out`` pairs.

        Left out are pairs that get no rank and no start: variants, pairs whose B is in no group, and those that are
        frozen or were when the optimizer was made.
        """
        if self._plan is None:
            treated = {pair.name for pair in self._calibration.pairs if pair.b_trainable}
        else:
            treated = set(self._plan.ranks)
        return {
            "ready": self.ready,
            "steps": self._steps,
            "dropped": int(self._dropped if self.ready else self._calibration.skipped),
            "left_out": [pair.name for pair in self._pairs if pair.name not in treated],
        }

    # ------------------------------------------------------------------ the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Calibrate, or call the delegate's ``step``; returns what ``closure`` returned, if given."""
        if self.ready:
            if self._delegate is not None:
                self._passed = handover.pass_on(self._delegate, self, self._passed)
            return handover.delegate_step(self._delegate, self, closure)
        watching = self._calibration.capture
        self._read_groups()
        missed = closure is None and self._calibration.capture is not watching  # the hooks are new, the batch is not
        g = self.param_groups[0]
        if g["init_lr"] == "auto" and closure is None:
            raise ValueError("init_lr='auto' evaluates the loss again: call step(closure), or give a number")
        loss = self._evaluate(closure)
        with torch.no_grad():
            if missed or self._replaced() or (self._steps == 0 and not self._begin()):
                return loss
            self._calibration.record()
            self._steps += 1
            log.info("calibration step %d of %d", self._steps, g["calibration_steps"])
            settled = g["convergence"] is not None and self._calibration.settled(g["convergence"], self._generator)
            self._calibration.save(self.state)
            if self._steps >= g["calibration_steps"] or (settled and self._steps >= AT_LEAST):
                self._finish(closure)
        return loss

    def _replaced(self) -> bool:
        """Take parameters that were put in place of ours (fully_shard); returns whether there were any.

        No hook has told of their gradients, so that the batch does not count.
        """
        reshard(self._model)
        if not self._locator.moved(iter(())):
            return False
        self._follow()
        self._check_pairs()
        if self._calibration.capture is not None:
            self._calibration.capture.discard()
            self._calibration.capture.attach()
        log.info("parameters were replaced since the last step; this batch is not counted")
        return True

    def _begin(self) -> bool:
        """See that every adapter adds nothing yet; returns whether this batch counts."""
        changed = checks.check_start(self.param_groups[0], self._calibration.pairs)
        anew = self._calibration.start_anew(changed, self._generator)
        if anew:
            log.info("%d adapters start anew; this batch is not counted", anew)
        return not anew

    def _finish(self, closure: Callable[[], Any] | None) -> None:
        """Allocate, resize, write A and B, free everything, hand over."""
        g, calibration = self.param_groups[0], self._calibration
        pairs = [pair for pair in calibration.pairs if pair.b_trainable]
        if not calibration.complete(pairs, patient=self._steps < 2 * g["calibration_steps"]):
            log.warning("%d calibration steps had no finite gradient to sum, of some layers; going on", self._steps)
            return
        calibration.reduce(pairs)  # Σ Ḡ over processes
        plan = self._decide(pairs)
        starts = calibration.place(pairs, plan.ranks, g, self._generator)  # ranks and A; B₀ for lr₀ = 1
        self._close(plan)
        init_lr = g["init_lr"]
        if init_lr == "auto" and g["start"] != "gora":
            init_lr = 0.0  # B is zero
        elif init_lr == "auto" and closure is not None:
            init_lr = handover.best_of(self.GRID, starts, closure, self._process_group, self._model)
            super().zero_grad()
        for pair, start in starts.items():
            write_start(pair, start, init_lr)
        log.info("%s, init_lr %g", plan.summary(), init_lr)
        self._hand_over()

    def _decide(self, pairs: Sequence[LoraPair]) -> RankPlan:
        """Return ranks from what was summed, the same in every process."""
        importances = torch.stack(self._calibration.importances(pairs, self._generator)).tolist()
        return plan_for(pairs, importances, self.param_groups[0], self._calibration.spectra(pairs))

    def _hand_over(self) -> None:
        """Build the delegate; what was edited in our groups before is its own from now on."""
        self._delegate = handover.build(self._then, self._model)
        if self._delegate is not None:
            self._passed = handover.pass_on(
                self._delegate, self, [handover.settings(self.defaults) for _ in self.param_groups]
            )

    def _close(self, plan: RankPlan) -> None:
        """End the calibration: no hooks, no sums."""
        self._dropped = int(self._calibration.skipped)
        self._plan = plan
        self._calibration.forget()
        self._release()
        self.state.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as torch does, in the delegate too."""
        if self._delegate is not None:
            self._delegate.zero_grad(set_to_none)
        elif not self.ready and self._calibration.capture is not None:
            self._calibration.capture.discard()
        super().zero_grad(set_to_none)

    def remove_hooks(self) -> None:
        """Remove all hooks from the model, the delegate's too."""
        self._release()
        remove = getattr(self._delegate, "remove_hooks", None)
        if remove is not None:
            remove()

    # ------------------------------------------------------------------ plumbing

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state_dict, and under ``"gora"`` the plan and the delegate's; plain tensors and numbers."""
        delegate = None if self._delegate is None else self._delegate.state_dict()
        plan = None if self._plan is None else asdict(self._plan)
        return {**super().state_dict(), "gora": {"plan": plan, "delegate": delegate, "steps": self._steps}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does; a state after the hand-over resizes the adapters and builds the delegate first.

        The values of A and B belong to the model's own checkpoint; load them after this, or before if the checkpoint
        brings the ranks along (PEFT's does).

        Raises:
            ValueError: the calibration is over here but not in the state, or the state does not fit.
        """
        saved = handover.take_apart(state_dict, self._pairs, self._plan)
        if saved.delegate is not None and (self._delegate if self.ready else self._then) is None:
            raise ValueError("state_dict has the state of a delegate: give then=")
        if not self.ready:
            self._calibration.forget()
            self.state.clear()
        super().load_state_dict(saved.groups)
        self._steps = saved.steps
        if saved.plan is None:
            self._calibration.restore(saved.sums, self.param_groups, self.state)
        elif not self.ready:
            handover.resize(self._pairs, saved.plan, self.param_groups[0])
            self._close(saved.plan)
            self._hand_over()
        if self._delegate is not None and saved.delegate is not None:
            self._delegate.load_state_dict(copy.copy(saved.delegate))
            self._passed = [handover.settings(g) for g in self.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__.get(key) for key in ("_then", "_plan", "_delegate", "_dropped", "_steps", "_passed")}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; after the hand-over to the delegate as well, with all its settings."""
        if self._ready and self._delegate is not None:
            self._delegate.add_param_group(dict(param_group))
            param_group = {key: param_group[key] for key in ("params", "param_names") if key in param_group}
        lr = param_group.get("lr", self.defaults["lr"])
        super().add_param_group({"reference_lr": lr.clone() if isinstance(lr, Tensor) else lr, **param_group})

    def _check_group(self, g: dict[str, Any]) -> None:
        checks.check_group(g)

    def _check_edit(self, before: dict[str, Any], g: dict[str, Any]) -> None:
        super()._check_edit(before, g)
        checks.check_edit(before, g)

    def _find_anew(self, before: list[LoraPair], familiar: set[Tensor]) -> None:
        for g in self.param_groups:  # new dicts may hold other settings; all groups agree on what is fixed
            self._check_edit(self._noted[0].settings, g)
        super()._find_anew(before, familiar)

    def _check_pairs(self) -> None:
        checks.check_groups_agree(self.param_groups)
        if self._pairs and not self.ready:
            checks.check_pairs(self.param_groups[0], self._model, self._treated())

    def _treated(self) -> list[LoraPair]:
        """Return the pairs to calibrate: plain ones whose B is trainable and ours."""
        own = {p for g in self.param_groups for p in g["params"]}
        return [pair for pair in self._pairs if pair.b_trainable and not pair.variant and pair.B in own]

    def _index_pairs(self) -> None:
        self._release()
        super()._index_pairs()
        if not self.ready:
            g = self.param_groups[0]
            self._calibration = Calibration(self._treated(), g, self._process_group, self._measure_spectra)
            self._calibration.load(self.state)
            self._guards = handover.watch_loading(self, self._pairs) if g["resize"] else []

    def _release(self) -> None:
        calibration = self.__dict__.get("_calibration")
        if calibration is not None and calibration.capture is not None:
            calibration.capture.remove()
        for guard in self.__dict__.pop("_guards", ()):
            guard.remove()


class _Probe(GoRAInit):
    """A calibration that decides and does nothing."""

    _measure_spectra = True

    def look(self) -> None:
        """Take in the gradients of one batch."""
        self._calibration.record()

    def conclude(self) -> RankPlan:
        """Return the plan."""
        pairs = [pair for pair in self._calibration.pairs if pair.b_trainable]
        if not self._calibration.complete(pairs):
            raise ValueError("batches must be at least 2 with finite gradients: the first measures R_x and R_g alone")
        self._calibration.reduce(pairs)
        return self._decide(pairs)
