"""MatryoshkaScaledAdam: one training run of plain LoRA modules, an accurate adapter at every nested rank."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvopt.distributed import any_nonfinite, is_sharded
from curvopt.functional.nested import RowSlab
from curvopt.lora import LoraPair
from curvopt.optim.base import RankSpaceOptimizer
from curvopt.optim.matryoshka import nests, truncation
from curvopt.optim.matryoshka.nests import RowSide, given, scaled_rows, trace
from curvopt.optim.stacks import Stack


class MatryoshkaScaledAdam(RankSpaceOptimizer):
    r"""AdamW of (A, B) in ΔW = B P A, on plain modules that hold Ã = P A (MatryoshkaLoRA, arXiv 2605.07850).

    .. code-block:: text

        P_i = Σ s(ρ) over the nested ranks ρ > i,   Q = P / s with s the module's own scaling: s B Ã = B P A
        before a pair's first step, while B = 0:    A ← Q A     (∂L/∂B follows; ΔW stays 0)
        every step:    Ã_i ← Ã_i (1 − lr·wd) − Q_i lr m̂_i / (√v̂_i + ε / Q_i),   B as AdamW
        dylora:        A is kept in the state and gets AdamW; the module holds P_ρ A for one drawn ρ

    The forward pass is untouched and the module always computes the trained adapter. An adapter that comes with B ≠ 0
    is taken as B Ã, so that its ΔW is what it was and a saved one goes on, with its optimizer state or without.
    Clipping by the global norm before the step is the one thing that a module which computes B P A itself would see
    otherwise: its ∂L/∂A is Q times ours.

    Args:
        params: the model (recommended), named parameters, or param groups; see `RankSpaceOptimizer`.
        lr: learning rate, ≥ 0; a 0-d tensor is allowed.
        betas: decay of Adam's moments, in [0, 1).
        eps: Adam's ε, as if on A.
        weight_decay: decoupled decay (AdamW).
        ranks: nested ranks, ascending; those above a pair's r are dropped for it. None: powers of two, and r.
            Directions above a pair's largest must be zero in its ΔW; they stay so.
        scale: s(ρ): ``"none"`` 1, ``"rank"`` 1/ρ, ``"sqrt"`` 1/√ρ.
        nesting: ``"matryoshka"``; ``"dylora"``: one ρ a step, drawn anew after each, skipped ones included
            (arXiv 2210.07558); ``"lora"``: r alone, P = s(r) I, whatever ``ranks`` says.
        generator: draws DyLoRA's ρ, on the CPU; its state travels in ``state_dict``. None: one seeded with 0. All
            processes must draw alike.
        adapter: only this adapter's pairs; None for all.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see `curvopt.ops`.
        require_pairs: raise when no pair is found; otherwise everything gets AdamW.
        maximize: ascend.
        model: the module to search when ``params`` are groups of tensors.

    A step with a non-finite gradient changes nothing and is counted (on the CPU gradients are summed to see it, so that
    a sum above the dtype's range counts as one). ``ranks`` and ``scale`` may be edited: ΔW stays, the rates follow.

    Raises:
        TypeError: see `RankSpaceOptimizer`; or ``generator`` is no CPU generator.
        ValueError: no pair, an argument out of range, or another optimizer of this class has one of the adapters.
    """

    _stacked = False
    _live: ClassVar[weakref.WeakSet["MatryoshkaScaledAdam"]] = weakref.WeakSet()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ranks: Sequence[int] | None = None,
        scale: str = "none",
        nesting: str = "matryoshka",
        generator: torch.Generator | None = None,
        adapter: str | None = None,
        backend: str = "auto",
        require_pairs: bool = True,
        maximize: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
            raise TypeError(f"generator must be None or a torch.Generator on the CPU, got {generator!r}")
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._whole: dict[LoraPair, Tensor] = {}  # what truncated() took away; empty outside
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "ranks": ranks, "scale": scale, "nesting": nesting, "draw": None,
        }  # fmt: skip
        super().__init__(params, defaults, model=model, adapter=adapter, backend=backend, require_pairs=require_pairs)
        self._live.add(self)

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what ``closure`` returned, if given."""
        if self._whole:
            raise RuntimeError("no step inside of truncated(): the model holds one of its ranks")
        loss = self._evaluate(closure)
        self._follow_settings()
        stacks, others = self._gather()  # live matrices by shape and rates
        found_inf = self._found_inf(stacks, others)
        self._enter(stacks, found_inf)  # A ← Q A, once a pair
        self._update(stacks, found_inf)  # row by row: lr Q_i, ε / Q_i
        self._update_others(others, found_inf)
        self._draw()  # DyLoRA: Ã ← P_ρ A / s for the next ρ
        return loss

    def _found_inf(self, stacks: Sequence[Stack], others: dict[int, list[Tensor]]) -> dict[torch.device, Tensor]:
        """Return, per device, a 0-d float that is 1 if any gradient of this step is not finite, on any device."""
        grads = [p.grad for ps in others.values() for p in ps if p.grad is not None]
        grads += [trace([s.grad for s in stack.sides]) for stack in stacks]
        devices = {s.device for s in stacks} | {p.device for ps in others.values() for p in ps}
        return any_nonfinite(grads, getattr(self, "found_inf", None), list(devices), self._shared_by)

    def _enter(self, stacks: Sequence[Stack], found_inf: dict[torch.device, Tensor]) -> None:
        """Give A its start Q A where a pair takes its first step with B = 0. Reads the device, once a stack."""
        new = [stack for stack in stacks if stack not in self._entered]
        if not new or any(found_inf[stack.device] != 0 for stack in new):
            return
        first = [s for stack in new if stack.state["step"] == 0 for s in stack.sides]
        if any(is_sharded(s.param) for stack in new for s in stack.sides):
            raise RuntimeError("MatryoshkaScaledAdam does not take sharded parameters (FSDP2)")
        A = {s.pair: s for s in first if s.name == "A"}
        B = {s.pair: s for s in first if s.name == "B" and not s.pair.B.any()}
        for pair in (pair for pair in A if pair not in B):  # ΔW as it came is that of the largest rank
            self._nests[pair].check_unused()
            self._nests[pair].drawn = None
        for pair, side in A.items():
            Q = self._nests[pair].rates
            if "full" in self.state[side.param]:
                back = [1.0 if pair in B or q == 0 else 1 / q for q in Q]
                self.state[side.param]["full"].copy_(side.matrix(scaled_rows(side.param, back, pair.dim_A)))
            elif pair in B:
                side.param.copy_(scaled_rows(side.param, Q, pair.dim_A))
            if pair in B:
                B[pair].grad = scaled_rows(given(B[pair].grad), Q, pair.dim_B)
        self._entered.update(new)

    def _update(self, stacks: Sequence[Stack], found_inf: dict[torch.device, Tensor]) -> None:
        """Run the slabs, a device at a time."""
        for device in {stack.device for stack in stacks}:
            slabs = [self._slab(stack) for stack in stacks if stack.device == device]
            self._ops("row_update", slabs, found_inf[device])
        for stack in stacks:
            stack.state["skipped"].add_(found_inf[stack.device])
            stack.release_grads()

    def _slab(self, stack: Stack) -> RowSlab:
        """Return this stack as `row_update` takes it; views of parameters and moments are kept between steps."""
        s, hyper = stack.state, stack.hyper
        addresses = [side.param.data_ptr() for side in stack.sides]
        slab, known = self._slabs.get(stack, (None, []))
        if slab is None or known != addresses:
            first = stack.sides[0]
            params = list(s["full"].unbind()) if "full" in s else stack.matrices
            rates = self._nests[first.pair].row_rates(first.name)
            slab = RowSlab(params, [], s["exp_avg"], s["exp_avg_sq"], s["step"], stack.rank_dim, rates, hyper)
            self._slabs[stack] = slab, addresses
        slab.hyper = hyper
        slab.grads = [side.matrix(given(side.grad)) for side in stack.sides]
        if "full" in s:  # ∂L/∂A = Q ∂L/∂Ã
            Q = [self._nests[side.pair].rates for side in stack.sides]
            slab.grads = [scaled_rows(grad, q, stack.rank_dim - 1) for grad, q in zip(slab.grads, Q, strict=True)]
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            slab.grads = [grad.div(scale.to(grad.device)) for grad in slab.grads]
        return slab

    def _draw(self) -> None:
        """Draw the next ρ, if any group samples, and give the modules that rank of A."""
        sampling = [g for g in self.param_groups if g["nesting"] == "dylora"]
        if not sampling:
            return
        u = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        for g in sampling:
            g["draw"] = u
        for stack in self._stacks:
            if "full" not in stack.state or not (stack in self._entered or stack.state["step"] > 0):
                continue
            for side, full in zip(stack.sides, stack.state["full"], strict=True):
                nest = self._nests[side.pair]
                nest.draw(u)
                side.matrix(side.param).copy_(scaled_rows(full, nest.rates, stack.rank_dim - 1))

    # ------------------------------------------------------------------ one rank

    def truncated(self, rank: int, *, strict: bool = True, keep_P: bool = False) -> AbstractContextManager[None]:
        """Let the model compute at one rank, s(ρ) B[:, :ρ] A[:ρ], inside the context; afterwards it is what it was.

        A pair whose largest rank is smaller computes at that one. Contexts may be nested: the innermost rank holds.

        Args:
            rank: ρ.
            strict: refuse a rank that was not trained.
            keep_P: compute B[:, :ρ] (P A)[:ρ] instead, the first directions of what was trained, at full strength.
                Under DyLoRA the two are one.

        Raises:
            ValueError: the rank is below 1, above every pair's, or was not trained.
        """
        ranks = truncation.resolve(self._nests, rank, strict)
        return truncation.truncated(self._nests, self.state, ranks, keep_P, self._whole)

    def export(
        self, path: str | Path, rank: int, *, strict: bool = True, keep_P: bool = False, pad_to: int | None = None,
        model: Any = None,
    ) -> Path:  # fmt: skip
        """Write the adapter of one rank as a plain PEFT adapter folder; the model is left as it is.

        Args:
            path: the folder.
            rank: ρ; a pair whose largest rank is smaller is written at that one.
            strict: as in `truncated`.
            keep_P: likewise.
            pad_to: as in `curvopt.lora.export_adapter`, for programs that read one rank for all.
            model: the `PeftModel`; None: the one the optimizer was made from.

        Raises:
            TypeError, ValueError: see `truncated` and `curvopt.lora.export_adapter`.
        """
        ranks = truncation.resolve(self._nests, rank, strict)
        with truncation.truncated(self._nests, self.state, ranks, keep_P, self._whole):
            return truncation.export(self._model if model is None else model, path, ranks, self._adapter, pad_to)

    # ------------------------------------------------------------------ reading

    def nested_ranks(self) -> dict[str, tuple[int, ...]]:
        """Return the ranks that every pair is trained at, by name."""
        return {pair.name: nest.ranks for pair, nest in self._nests.items()}

    def diagnostics(self) -> dict[str, Any]:
        """Return plain numbers: skipped updates, ops that fell back, and by pair its ranks, P and scaling."""
        return nests.diagnose(self, self._nests)

    def release(self) -> None:
        """Let another optimizer of this class have the adapters; this one is not to be used any more."""
        self._live.discard(self)

    # ------------------------------------------------------------------ plumbing

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; the first group has DyLoRA's generator."""
        saved = super().state_dict()
        if any(g["nesting"] == "dylora" for g in self.param_groups):
            saved["param_groups"][0]["generator"] = self._generator.get_state()
        return saved

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_generator_state": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._whole = {}
        copied = state.pop("_generator_state", None)
        if copied is not None:
            self._generator = torch.Generator()
        for saved in (copied, *(g.pop("generator", None) for g in state.get("param_groups", ()))):
            if saved is not None:
                self._generator.set_state(saved.cpu())
        super().__setstate__(state)
        self._live.add(self)

    def _check_group(self, g: dict[str, Any]) -> None:
        super()._check_group(g)
        nests.check_group(g)

    def _check_pairs(self) -> None:
        nests.check_pairs(self._sides)
        nests.check_unclaimed(self._sides, [other._sides for other in self._live if other is not self])

    def _index_pairs(self) -> None:
        super()._index_pairs()
        self._nests = nests.nests(self._sides)
        self._sides = [RowSide(s.pair, s.name, s.group, s.param, nest=self._nests[s.pair]) for s in self._sides]
        self._noted = nests.noted(self.param_groups)

    def _note_params(self) -> None:
        super()._note_params()
        self._entered: weakref.WeakSet[Stack] = weakref.WeakSet()
        self._slabs: weakref.WeakKeyDictionary[Stack, tuple[RowSlab, list[int]]] = weakref.WeakKeyDictionary()

    def _follow_settings(self) -> None:
        """Take ranks and scales that were edited in the groups."""
        now = nests.noted(self.param_groups)
        if now == self._noted:
            return
        nests.check_edited(self._noted, now)
        for g in self.param_groups:
            self._check_group(g)
        self._index_pairs()
        self._check_pairs()

    def _small_state(self, stack: Stack) -> dict[str, Tensor]:
        if stack.sides[0].name == "B" or stack.group["nesting"] != "dylora":
            return {}
        return {"full": torch.zeros_like(stack.matrices[0], memory_format=torch.contiguous_format)}
