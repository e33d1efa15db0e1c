"""GritKFAC: AdamW for LoRA, preconditioned by K-FAC's factors; ranks can follow the spectrum."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from curvopt.functional.update import RULES, Slab
from curvopt.lora import LoraPair, resize_pair
from curvopt.lora.resize import check_resize
from curvopt.optim.base import Side
from curvopt.optim.bucket import MOMENTS, Bucket, BucketedOptimizer, on_pieces
from curvopt.optim.checking import check
from curvopt.optim.grit import diagnostics, outer, reproject, settings
from curvopt.optim.grit.curvature import Curvature, Source, live_rank, rule_of, small_state, source_of
from curvopt.optim.grit.factors import OuterFactor, PairFactors, outer_factors, rank_factors
from curvopt.optim.nesting import MaskedPair, SampleMasks, StepDraw, sample_ranks, steps_taken
from curvopt.optim.reordering import entangled, turn_of

T = TypeVar("T", bound="GritKFAC")
WARMUP = "warm-up"  # Adam without a matrix
# the state of a side that is r×r: its factor, and what the rules make of it
MATRICES = {"factor", *(rule.key for rule in RULES.values() if rule.key is not None)}


class GritKFAC(BucketedOptimizer):
    r"""AdamW for LoRA, preconditioned by K-FAC's factors at the cost of the adapter (after GRIT, arXiv 2601.00231).

    K-FAC gives each LoRA matrix two factors. The *outer* factor is as wide as the layer. ``outer_rank`` of its
    directions are tracked, from the gradients alone, and precondition the gradients before Adam uses them. The singular
    values of Adam's step are then made equal, and its length is kept (``update="polar"``). This is the default, and
    needs no hooks. The *rank-side* factors S_u and S_d, r×r, are those that GRIT uses: the other update rules
    precondition with them, and reprojection sorts the directions of the adapter by them. They are collected only if
    something uses them.

    .. code-block:: text

        every step, for each pair (A, B) with u = x Aᵀ and d = ∂L/∂u:
            S ← EMA of ∇Aᵀ∇A (∇B ∇Bᵀ for B),  ∇ ← ∇ S̃^(-1/2)       outer factors, if outer_rank > 0
            S_u ← EMA of uᵀu/N,  S_d ← EMA of N dᵀd                 every factor_every steps
            M_A, M_B ← eigenbasis / inverse / root of S_d, S_u      every inverse_every steps
            A ← A (1 − lr·wd) + Adam's step, preconditioned by M_A; B likewise
            change basis, choose the rank k, zero directions ≥ k    every reproject_every steps

    With ``nested_ranks``, the leading directions serve as adapters of smaller ranks: in training, each sample of a
    batch computes at one of these ranks, by a hook on u, and the directions are kept in order. The trained adapter is
    cut by ``curvopt.lora.export_adapter(model, path, ranks=2)``, or by `curvopt.lora.truncated` with
    ``basis="stored"``.

    The formulas are in `curvopt.functional.outer` and `curvopt.functional.update`.

    Args:
        params: the model (recommended), named parameters, or param groups; see `PairedOptimizer`. Activations can be
            observed only if a module is given; named parameters use gradient statistics.
        lr: learning rate, ≥ 0; a one-element tensor is allowed.
        betas: decay of Adam's moments, in [0, 1). The default suits runs of a few hundred steps; (0.9, 0.999) is as
            good in long ones.
        eps: Adam's ε.
        weight_decay: decoupled decay (AdamW).
        update: ``"polar"``, ``"eigen"``, ``"adam"``, ``"whiten"`` or ``"momentum"``; see `curvopt.functional.update`.
            The moments are kept in the rule's coordinates, so it cannot be changed after the first step.
        statistics: where S_u and S_d come from. ``"auto"``: ``"activation"`` if the update rule or a reprojection uses
            them, else ``"none"``; nested ranks do without. ``"activation"``: K-FAC, by one hook per pair.
            ``"gradient"``: Shampoo on the rank side, no hook. ``"weight"``: the present A Aᵀ and BᵀB, as in Riemannian
            preconditioned LoRA (arXiv 2402.02347). ``"none"``: no factors and no hooks; possible with ``"polar"`` only.
            With DP-SGD, activations bypass the noise: use ``"gradient"`` or ``"weight"``.
        outer_rank: k ≥ 0, number of directions of the outer factors that are kept, at most the width of a matrix; 0
            for none. Each takes one number per column of A and row of B: k = r makes the state 1.5 times AdamW's. It
            cannot be changed after the first step.
        damping: λ > 0, relative to the mean eigenvalue: of the outer factors, of the r×r factors and, for ``"polar"``,
            of the Gram matrix of the step; a 0-d tensor is allowed.
        reproject_every: steps between reprojections; 0 for never; None: 25 with a ``rank_threshold``, 10 with
            ``nested_ranks``, else never.
        rank_threshold: τ in (0, 1]: keep the smallest number of directions with a share τ of the energy; None keeps
            all.
        min_rank: keep at least so many directions; at most the rank of every pair.
        low_rank: ``"names"``: A and B are found in the model, or by their names. ``"shape"``, for tensors without
            names: every matrix whose smaller dimension is at most 128 and less than half of the larger is trained as A
            or B, with the smaller dimension as its rank, and everything else by AdamW; the choice is logged. This
            works with ``update="polar"`` without reprojection, which needs no pairs.
        maximize: maximise the loss.
        capturable: steps may be captured in a CUDA graph, after one or more eager ones and with gradients that stay in
            place. A replay repeats what the captured step did: pass ``lr`` (and ``damping``) as tensors on the
            device, and capture a step with new matrices and one without, or set both cadences to 1. Reprojection needs
            eager steps.
        model: the module to search when ``params`` are groups of tensors.
        advanced: keywords that most runs leave alone: nested ranks, cadences and decay of the factors, the kind of
            reprojection, adapter, backend, process group; see `curvopt.optim.grit.AdvancedSettings`.

    A step with non-finite gradients changes nothing and is counted; see `diagnostics`. Cadences count the steps in
    which a pair has gradients, skipped steps included; periodic work that falls on a skipped step is done at the next
    one. The scale of a GradScaler remains in S_d, and cancels in everything computed from it until it changes. Adapters
    in float16 are refused.

    Raises:
        TypeError: see `PairedOptimizer`; or an unknown keyword.
        ValueError: no pair, or an argument out of range; the message names argument, value and what is allowed.
    """

    # what a copy or a pickle starts with: process groups cannot travel
    _process_group: dist.ProcessGroup | None = None
    _instead = 'Pass the model itself, low_rank="shape" for tensors without names, or require_pairs=False'
    _join_config: Any = None  # by torch's protocol of joinable objects; None outside of Join
    _small = frozenset(
        {"skipped", "cadence", "observed", "rows", "rank", "pending", "kept"} | MATRICES | outer.SMALL | StepDraw.SMALL
    )

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.7, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        update: settings.Update = "polar",
        statistics: settings.Statistics = "auto",
        outer_rank: int = 16,
        damping: float | Tensor = 0.1,
        reproject_every: int | None = None,
        rank_threshold: float | None = None,
        min_rank: int = 4,
        low_rank: settings.LowRank = "names",
        maximize: bool = False,
        capturable: bool = False,
        model: nn.Module | None = None,
        **advanced: Unpack[settings.AdvancedSettings],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "capturable": capturable, "statistics": statistics, "update": update, "outer_rank": outer_rank,
            "damping": damping, "reproject_every": reproject_every, "rank_threshold": rank_threshold,
            "min_rank": min_rank,
        }  # fmt: skip
        others = settings.with_defaults(advanced, [*defaults, "low_rank", "model"])
        self._process_group = others.pop("process_group")
        self._draws = StepDraw(others.pop("generator"))
        check("low_rank", low_rank, low_rank in settings.LOW_RANK, f"one of {settings.LOW_RANK}")
        self._low_rank = low_rank
        search = {name: others.pop(name) for name in ("adapter", "backend", "require_pairs")}
        super().__init__(params, defaults | others, model=model, **search)

    @classmethod
    def paper(cls: type[T], params: ParamsT | nn.Module, lr: float | Tensor = 2e-5, **overrides: Any) -> T:
        """Return an optimizer with GRIT's published settings (its code's defaults), for reproduction.

        Statistics every 15 steps in a running mean, inverses and two-sided reprojection every 50, λ = 1e-3,
        τ = 0.99, at least 4 directions, Adam on the preconditioned gradient, swapped sides. Two published choices are
        not reproduced, because they disable the method: fp16 factors, and absolute damping (λ is relative to the mean
        eigenvalue here). The two small loss penalties of the published code are not part of a step.
        """
        published = {
            "sides": "paper", "update": "adam", "damping": 1e-3, "factor_decay": 1.0, "factor_every": 15,
            "inverse_every": 50, "reprojection": "paper", "reproject_every": 50, "rank_threshold": 0.99,
            "min_rank": 4, "weight_decay": 0.01, "outer_rank": 0,
        }  # fmt: skip
        return cls(params, lr, **{**published, **overrides})

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what ``closure`` returned, if given."""
        self._check_capture()
        loss = self._evaluate(closure)
        if self._join_config is not None:
            self._announce()
        buckets, others = self._read()
        for bucket in buckets:
            bucket.begin(self._rule_now(bucket), self._make_plan)
        for bucket in buckets:  # only now: what is refused counts nowhere
            bucket.tick()
        found_inf = self._found_inf(buckets, others)
        if self._join_config is not None:
            self._agree(found_inf)
        observed = [b for b in buckets if "factor" in b.state]  # of others nothing reads S_u and S_d
        if observed:
            self._curvature.observe(observed, found_inf)  # S ← S + w (zᵀz/N − S)
        for bucket in observed:
            if rule_of(bucket).key is not None and bucket.due("inverse_every"):
                self._curvature.refresh(bucket, found_inf[bucket.device])  # M ← f(Ŝ + λI)
        reprojected = [b for b in buckets if b.due("reproject_every")]
        if reprojected:  # gradients are those of the weights before the step
            turn = turn_of(reprojected, [b for b in buckets if b.steps > b.group["warmup_steps"]])
            self._curvature.entangled |= entangled(turn.buckets, self._masks.pairs)
        for bucket in buckets:
            if bucket.outer_rank:
                self._precondition(bucket, found_inf[bucket.device])  # ∇ ← ∇ S̃^(-1/2), in what the rule reads
            bucket.step(found_inf[bucket.device])  # p ← p (1 − lr·wd) + rule(M, ∇)
        self._update_others(others, found_inf)
        if reprojected:
            reproject.change_basis(turn, found_inf, self._curvature)  # A ← T A, B ← B T⁻¹, mask
            for bucket in reprojected:
                bucket.did("reproject_every", found_inf[bucket.device])
        if self._curvature.capture.pairs:
            self._curvature.arm(self._buckets, self._loose)
        if self._masks.pairs:
            self._masks.advance(self._draws.next(), self._buckets, buckets)  # the ranks of the next step's samples
        return loss

    def _rule_now(self, bucket: Bucket) -> str:
        """Return the bucket's rule in the step that begins; plain Adam until the warm-up is over."""
        return WARMUP if bucket.steps < bucket.group["warmup_steps"] else bucket.group["update"]

    def _precondition(self, bucket: Bucket, found_inf: Tensor) -> None:
        """S ← β S + (1−β) ∇ᵀ∇/r, and let the plan read ∇ S̃^(-1/2) for ∇ in this step; plain ∇ during the warm-up.

        DDP has averaged the gradients, so every process has the same factor; pieces of a sharded matrix are summed.
        """
        state, g, plan = bucket.state, bucket.group, bucket.plan
        products, shards = plan.outer_products(), bucket.blocks[0].shards
        if shards is not None:
            shards.sum_(products)
        S = state["outer_eigenvalues"], state["outer_trace"]
        decay = g["factor_decay"]
        if decay == 1:  # the running mean: the newest of t gradients weighs 1/t
            decay = 1 - 1 / (state["step"] + 1)
        M, *new = plan.outer_map(products, *S, bucket.widths, decay, g["damping"], found_inf)
        torch._foreach_copy_(S, new)
        if bucket.steps <= g["warmup_steps"]:
            M[:, : bucket.r] = torch.eye(bucket.r, M.shape[2], dtype=M.dtype, device=M.device)
        plan.take_outer(M)

    def _make_plan(self, bucket: Bucket, name: str) -> tuple[Any, list[Slab]]:
        """Return a plan of a bucket and its slabs, for as long as parameters and state stay where they are.

        The rule's matrices are views of the state, which `Curvature.refresh` writes in place.
        """
        rule = RULES["adam" if name == WARMUP else name]
        matrix = None if name == WARMUP or rule.key is None else bucket.state.get(rule.key)
        k = live_rank(bucket)
        slabs = []
        for block in bucket.blocks:
            params, hyper = on_pieces(block, bucket.hyper, bucket.compute_dtype)
            slabs.append(
                Slab(
                    params=params,
                    grads=bucket.grads[block.rows],
                    exp_avg=block.exp_avg,
                    exp_avg_sq=block.exp_avg_sq,
                    step=bucket.state["step"],
                    rank_dim=block.rank_dim,
                    matrix=None if matrix is None else matrix[block.rows],
                    hyper=hyper,
                    reduce=block.shards.sum_ if block.shards is not None and rule.shared(bucket.r) else None,
                    damping=bucket.group["damping"],
                    k=None if k is None else k[block.rows],
                    basis=block.basis,
                )
            )
        return self._ops.plan(rule.name, slabs), slabs

    # ------------------------------------------------------------------ ranks, compaction, reading

    def ranks(self) -> dict[str, int]:
        """Return the live rank of every pair by name: the rank of its tensors less the directions masked so far."""
        return {pair.name: diagnostics.live_rank(self, pair) for pair in self.pairs}

    @torch.inference_mode(False)
    @torch.no_grad()
    def compact(self) -> dict[str, int]:
        """Resize every pair and its state to its live rank, permanently, and return the ranks by name.

        ΔW is unchanged: the removed directions are exactly zero. Nothing is removed from a pair whose weights were
        restored from outside with more directions than its mask has. Parameters keep their identity, with new ``.data``
        and no ``.grad``; wrappers that hold views of them (DDP, FSDP) must be rebuilt. PEFT's r, scaling, rank_pattern
        and alpha_pattern are updated, so the model saves and loads as usual.

        Raises:
            ValueError: a pair cannot be resized, for instance because it is sharded, or known by the names of its
                parameters alone; nothing has been changed then.
        """
        live = self.ranks()
        smaller = [pair for pair in self.pairs if live[pair.name] != pair.rank]
        for pair in smaller:
            check_resize(pair, live[pair.name])
            if pair.module is None:
                raise ValueError(
                    f"{pair.name} cannot be resized: it was found by the names of its parameters, and what its layer "
                    "and PEFT's config say of the rank would not follow. Give the optimizer the model, or model="
                )
        for pair in smaller:
            k = live[pair.name]
            sides = [s for s in self._sides if s.pair is pair]
            states = [_sliced(s, self.state[s.param], k) for s in sides]
            resize_pair(pair, k)
            for s, state in zip(sides, states, strict=True):
                self.state[s.param] = state
        if smaller:
            self._index_pairs()
        return self.ranks()

    @torch.no_grad()
    def factors(self) -> dict[str, PairFactors]:
        """Return copies of the rank-side factors, by pair name: ``S_u, S_d = optimizer.factors()[name]``.

        Empty until the first step, and where nothing reads them, so that none are kept: with ``"polar"`` and without
        reprojection, unless ``statistics`` asks for them.

        Returns:
            By pair name ``(S_u, S_d)``, each ``(r, r)`` in float32 (float64 for float64 adapters); None for one that no
            trained side of the pair is preconditioned by. Directions that have been masked are zero.
        """
        return rank_factors(self)

    @torch.no_grad()
    def outer_factors(self) -> dict[str, dict[str, OuterFactor]]:
        """Return copies of the outer factors, by pair name and side: ``optimizer.outer_factors()[name]["A"].basis``.

        Empty until the first step, and with ``outer_rank=0``. Bases of sharded parameters are gathered: every process
        must call this then.
        """
        return outer_factors(self)

    def diagnostics(self) -> dict[str, Any]:
        """Return a report in plain Python types; synchronises with the device.

        Keys: ``steps``, ``skipped_updates`` (how many of the steps changed nothing), ``backend``, ``fallbacks`` (ops
        computed by the reference for CUDA tensors), ``silent`` (pairs with gradients whose hook never fired), ``idle``
        (pairs that never had a gradient), ``skipped_layers`` (layers that look like adapters but are not plain pairs,
        with the reason), ``bytes_sent`` (by this process, by occasion), and ``pairs``: for each, ``rank``,
        ``full_rank``, ``statistics``, ``note``, ``rows``, ``energy``, ``effective_rank``, ``outer``, and for ``A`` and
        ``B`` the ``condition``, ``scalar_distance`` and ``failed`` of the rank-side factor.
        """
        return diagnostics.diagnose(self, self.entangled)

    def mask_rows(self, mask: Tensor | None) -> None:
        """Mark the real rows of the following forward passes, so that padding is excluded from the sums and from N.

        Call it before each forward pass, or from a forward pre-hook of the model; it applies until the next ``step`` or
        ``zero_grad``. Layers with another number of rows count all of theirs.

        Args:
            mask: one number per row of the layers' input, for example the attention mask ``(batch, length)``: 1 for a
                real row and 0 for padding; values in between are weights. None for all rows.
        """
        self._curvature.capture.mask = None if mask is None else mask.reshape(-1).float()

    def entangled(self, pair: LoraPair) -> str:
        """Return why a pair keeps its basis and its rank; empty if it does not. Synchronises with the device."""
        found = self._curvature.entangled.get(pair)
        if pair.bound or found is None or not found:
            return pair.bound
        return "at the last reprojection the loss did not depend on A and B through B A alone: basis and rank are kept"

    @property
    def watching(self) -> bool:
        """Whether hooks of this optimizer are registered on the model."""
        return self._curvature.capture.attached or self._masks.attached

    def remove_hooks(self) -> None:
        """Remove the hooks from the model. Training continues with the factors as they are, and without masks."""
        self._curvature.capture.remove()
        self._masks.remove()

    def nested_ranks(self) -> dict[str, tuple[int, ...]]:
        """Return the ranks at which the samples of every pair are trained, by name; empty without ``nested_ranks``."""
        return {own.pair.name: own.ranks for own in self._masks.pairs}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as torch does, and discard the statistics of the backward passes since the last step."""
        self._curvature.capture.discard()
        super().zero_grad(set_to_none)

    # ------------------------------------------------------------------ uneven numbers of batches

    def join_hook(self, **kwargs: Any) -> Any:
        """Return the hook for ``torch.distributed.algorithms.join.Join([model, optimizer])``, for uneven batches.

        ``model.join()`` of DistributedDataParallel does not cover the all-reduces of a step with activation statistics;
        ``Join`` with both does. At the end every process has the weights and the state of one of the processes with the
        most batches.

        Raises:
            ValueError: parameters are sharded.
        """
        from curvopt.optim.grit.join import StepsOfOthers

        if self._shared_by:
            raise ValueError("Join needs whole parameters, got sharded ones: give every process as many batches")
        return StepsOfOthers(self, self._process_group)

    @property
    def join_device(self) -> torch.device:
        """The device of the first parameter."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """The processes over which statistics are summed."""
        return dist.group.WORLD if self._process_group is None else self._process_group

    def _announce(self) -> None:
        """Inside of ``Join``, which sets ``_join_config``: tell the others of a step."""
        from torch.distributed.algorithms.join import Join, Joinable

        Join.notify_join_context(cast(Joinable, self))  # the protocol is by attributes

    def _agree(self, found_inf: dict[torch.device, Tensor]) -> None:
        """Inside of ``Join``: let a step count only if it does so on every process."""
        for flag in found_inf.values():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._process_group)

    # ------------------------------------------------------------------ plumbing

    def _release(self) -> None:
        if hasattr(self, "_curvature"):
            self._curvature.capture.remove()
        if hasattr(self, "_masks"):
            self._masks.remove()

    def _check_group(self, g: dict[str, Any]) -> None:
        super()._check_group(g)
        settings.check_group(g)
        if self._low_rank == "shape":
            settings.check_alone(g)

    def _check_edit(self, before: dict[str, Any], g: dict[str, Any]) -> None:
        super()._check_edit(before, g)
        stepped = any("step" in self.state.get(s.param, ()) for s in self._sides if s.group is g)
        # looked for only where it is asked: schedulers edit groups at every step
        published = before["reprojection"] == g["reprojection"]
        published = published or any("kept" in self.state.get(s.param, ()) for s in self._sides if s.group is g)
        settings.check_edit(before, g, stepped, published)
        if any(before[key] != g[key] for key in ("statistics", "nested_ranks")):
            self._index_pairs()
        if before["damping"] is not g["damping"] or before["rank_threshold"] != g["rank_threshold"]:
            for bucket in self._buckets:
                bucket.forget_plan()

    def _check_pairs(self) -> None:
        super()._check_pairs()
        settings.check_pairs(self._sides)

    def _note_params(self) -> None:
        super()._note_params()
        before: Curvature | None = self.__dict__.get("_curvature")
        self._curvature = Curvature(self._sides, self._pairs, self._process_group, self._ops, before)
        # After those of the capture: it sees all of u, and d behind the mask. Σ u² d² then counts a direction for the
        # samples that use it, once: what dropping it costs in the training with masks.
        nested = [s for s in self._sides if s.group["nested_ranks"] is not None and s.pair.signal is not None]
        masked = {
            s.pair: MaskedPair(s.pair, sample_ranks(s.group["nested_ranks"], s.pair.rank), s.group) for s in nested
        }
        masks: SampleMasks | None = self.__dict__.get("_masks")
        self._masks = SampleMasks(masked.values(), "mask_warmup", masks)
        self._masks.arm(self._draws.last, steps_taken(self.state.values()))

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; with nested ranks it has the generator of the masks, and its last number."""
        self._draws.save((s for s in self._sides if s.group["nested_ranks"] is not None), self.state)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, and the generator of the masks; see `PairedOptimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        if self._draws.load(self.state.values()):
            self._index_pairs()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_draws": self._draws}

    def _complete_group(self, g: dict[str, Any]) -> None:
        settings.complete(g)

    def _outer_rank(self, side: Side) -> int:
        return outer.outer_rank(side)

    def _traits(self, side: Side) -> Source:
        return source_of(side)

    def _small_state(self, side: Side) -> dict[str, Tensor]:
        return small_state(side)


def _sliced(side: Side, state: dict[str, Any], k: int) -> dict[str, Any]:
    """Return copies of a parameter's state cut to its first k directions."""
    cut = {}
    for key, value in state.items():
        if key in MOMENTS:
            value = value.narrow(side.rank_dim - 1, 0, k)
        elif key in MATRICES:
            value = value[:k, :k]
        cut[key] = value.clone()
    return cut
