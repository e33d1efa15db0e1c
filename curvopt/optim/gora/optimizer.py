"""GoRAInit: a few batches decide the rank and the start of every adapter; then another optimizer goes on."""

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvopt.functional.ranks import RankPlan
from curvopt.lora import LoraPair
from curvopt.optim.base import PairedOptimizer
from curvopt.optim.checking import check
from curvopt.optim.gora import checks, handover
from curvopt.optim.gora.calibration import KEYS, Calibration, plan_for, write_start

log = logging.getLogger(__name__)
AT_LEAST = 3  # steps before `convergence` may end the calibration


class GoRAInit(PairedOptimizer):
    r"""Calibrates adapters by gradients (GoRA, arXiv 2502.12171), then hands over to the optimizer ``then`` makes.

    .. code-block:: text

        for n steps, with B = 0 and nothing moving:  Ḡ_l ← mean of ∂L/∂W_l          by hooks; W_l stays frozen
        I_l = mean |W_l ⊙ Ḡ_l|;  r_l ∝ I_l / f(d_in + d_out) within a budget          (curvopt.functional.ranks)
        A ← its first r_l rows;  B ← −(ξ/s) Ḡ Aᵀ (A Aᵀ)⁻¹,  ξ = lr₀ √(d_in/r_l)      (...functional.gradient_init)
        from then on every call goes to then(model)

    Args:
        params: the model, or param groups with ``model``; only ``importance="grad_b"`` without ``then`` needs none.
        rank: r of the uniform adapters whose parameters are the budget.
        min_rank: no layer gets less ...
        max_rank: ... or more; or more than min(d_in, d_out), to which ``min_rank`` yields too.
        calibration_steps: n, calls of ``step``; those dropped as not finite count.
        init_lr: lr₀ ≥ 0, or ``"auto"``: of `GRID` the one with the least loss on the last batch; needs ``closure``.
        importance: ``"mean_abs"``, GoRA's; ``"frobenius"`` or ``"nuclear"`` norm of Ḡ; ``"grad_b"``: ‖∂L/∂B‖, which
            needs no Ḡ, but adapters built with the largest rank they may get.
        allocation: ``"exact"`` spends the budget; ``"paper"`` has the official rounding.
        budget_weight: f: ``"linear"``, ``"sqrt"`` or ``"log1p"``.
        convergence: stop early, after 3 steps or more, when all importances moved by less than this, relatively
            (published: 0.1); computes them at every step. None: never.
        offload: keep Σ Ḡ in host memory.
        then: a callable that takes the model and returns an optimizer, called once the adapters are ready. None: build
            one yourself when `ready` says so; further steps are errors.
        adapter: only this adapter's pairs; None for all trainable ones.
        lr: what schedules of *this* optimizer are relative to: the delegate runs at its own rates times the present
            ``lr`` of the group over this one. The default makes it a factor; for schedules in absolute numbers give
            the learning rate that ``then`` gives.
        keep_scaling: adapters keep their s whatever their rank; False: alpha stays and s follows the layer's own rank
            (published, with rank-stabilised scaling).
        resize: False keeps all shapes, for DistributedDataParallel around the model: unused directions are zero in
            both factors, and ``max_rank`` must not exceed the rank that is built.
        reset: set B to zero at the first step where it is not, instead of an error; that batch is not counted.
        generator: source of new rows of A and of the draws of ``"nuclear"``; torch's global one if None.
        process_group: processes to average over; None for the default group, if there is one.
        model: the module to search when ``params`` are groups of tensors.

    Adapters whose forward is not the plain one (DoRA and other variants) and frozen ones are left as they are. A
    contribution that is not finite is dropped: with ``"grad_b"`` or a GradScaler the whole batch, else what the layers
    concerned saw of it. Σ Ḡ takes 4 bytes per weight of the adapted layers (twice that under a GradScaler).
    ``state_dict`` in the middle of the calibration has all of it; afterwards it has the delegate's.

    Raises:
        TypeError: see `PairedOptimizer`.
        ValueError: no pair, an argument out of range, or a budget the clamps cannot meet; from ``step``: B not zero,
            or a layer without any gradient.
    """

    GRID = tuple(5e-2 * 4.0**k for k in range(-2, 5))

    _process_group: dist.ProcessGroup | None = None
    _generator: torch.Generator | None = None
    _small = frozenset(KEYS)

    def __init__(
        self,
        params: Any,
        *,
        rank: int = 8,
        min_rank: int = 4,
        max_rank: int = 32,
        calibration_steps: int = 32,
        init_lr: float | str = 5e-2,
        importance: str = "mean_abs",
        allocation: str = "exact",
        budget_weight: str = "linear",
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
        self._plan: RankPlan | None = None
        self._delegate: torch.optim.Optimizer | None = None
        defaults = {
            "lr": lr, "rank": rank, "min_rank": min_rank, "max_rank": max_rank,
            "calibration_steps": calibration_steps, "init_lr": init_lr, "importance": importance,
            "allocation": allocation, "budget_weight": budget_weight, "convergence": convergence, "offload": offload,
            "keep_scaling": keep_scaling, "resize": resize, "reset": reset, "clock": 0, "staged": False,
        }  # fmt: skip
        super().__init__(params, defaults, model=model, adapter=adapter)
        if then is not None and self._model is None:
            self._release()
            raise ValueError("then needs the model: pass it as params, or as model=")

    # ------------------------------------------------------------------ what a user reads

    @property
    def ready(self) -> bool:
        """Whether the adapters have their ranks and their start."""
        return self._plan is not None

    @property
    def plan(self) -> RankPlan | None:
        """Ranks, importances, budget and what of it is spent; None until `ready`."""
        return self._plan

    @property
    def delegate(self) -> torch.optim.Optimizer | None:
        """The optimizer that ``then`` made; None until `ready`, or without ``then``."""
        return self._delegate

    def ranks(self) -> dict[str, int]:
        """Return the rank of every pair by name: the delegate's if it adapts ranks, the plan's where there is one."""
        own = getattr(self._delegate, "ranks", None)
        planned = self._plan.ranks if self._plan is not None else {}
        return own() if own is not None else {p.name: planned.get(p.name, p.rank) for p in self._pairs}

    def diagnostics(self) -> dict[str, Any]:
        """Return ``ready``, ``steps`` and ``dropped`` of the calibration (reads the device), and ``left_out`` pairs."""
        treated = {pair.name for pair in self._treated()}
        return {
            "ready": self.ready,
            "steps": self.param_groups[0]["clock"],
            "dropped": int(self._dropped if self.ready else self._calibration.skipped),
            "left_out": [pair.name for pair in self._pairs if pair.name not in treated],
        }

    # ------------------------------------------------------------------ the step

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return not self.ready or getattr(self._delegate, "_step_supports_amp_scaling", False)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Calibrate, or let the delegate step; returns what ``closure`` returned, if given."""
        if self.ready:
            return handover.delegate_step(self._delegate, self, closure)
        g = self.param_groups[0]
        if g["init_lr"] == "auto" and closure is None:
            raise ValueError("init_lr='auto' evaluates the loss again: call step(closure), or give a number")
        loss = self._evaluate(closure)
        with torch.no_grad():
            if g["clock"] == 0 and not self._begin():
                return loss
            self._calibration.record(getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
            for group in self.param_groups:
                group.update(clock=group["clock"] + 1, staged=self._calibration.staged)
            log.info("calibration step %d of %d", g["clock"], g["calibration_steps"])
            settled = g["convergence"] is not None and self._calibration.settled(g["convergence"], self._generator)
            self._calibration.save(self.state)
            if g["clock"] >= g["calibration_steps"] or (settled and g["clock"] >= AT_LEAST):
                self._finish(closure)
        return loss

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
        if not calibration.complete(pairs):
            log.warning("none of %d calibration steps had a finite gradient; going on", g["clock"])
            return
        calibration.reduce(pairs)  # Σ Ḡ over processes
        plan = plan_for(pairs, torch.stack(calibration.importances(pairs, self._generator)).tolist(), g)
        starts = calibration.place(pairs, plan.ranks, g, self._generator)  # ranks and A; B₀ for lr₀ = 1
        self._close(plan)
        init_lr = g["init_lr"]
        if init_lr == "auto" and closure is not None:
            init_lr = handover.best_of(self.GRID, starts, closure, self._process_group)
            super().zero_grad()
        for pair, start in starts.items():
            write_start(pair, start, init_lr)
        log.info("%s, init_lr %g", plan, init_lr)
        self._delegate = handover.build(self._then, self._model)

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
        return {**super().state_dict(), "gora": {"plan": plan, "delegate": delegate}}

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
        if saved.plan is None:
            self._calibration.restore(saved.sums, self.param_groups, self.state)
        elif not self.ready:
            handover.resize(self._pairs, saved.plan, self.param_groups[0])
            self._close(saved.plan)
            self._delegate = handover.build(self._then, self._model)
        if self._delegate is not None and saved.delegate is not None:
            self._delegate.load_state_dict(copy.copy(saved.delegate))

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__.get(key) for key in ("_then", "_plan", "_delegate", "_dropped")}
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
            self._calibration = Calibration(self._treated(), g["importance"], g["offload"], self._process_group)
            self._calibration.load(self.state, g["staged"])

    def _release(self) -> None:
        calibration = self.__dict__.get("_calibration")
        if calibration is not None and calibration.capture is not None:
            calibration.capture.remove()
