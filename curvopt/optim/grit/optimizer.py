"""GritKFAC: AdamW for LoRA with K-FAC's factors on both sides, reprojection and a rank that follows the spectrum."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvopt.functional.update import RULES, Slab
from curvopt.lora import LoraPair, resize_pair
from curvopt.lora.resize import check_resize
from curvopt.optim.base import Side
from curvopt.optim.bucket import Bucket, BucketedOptimizer, on_pieces
from curvopt.optim.checking import check
from curvopt.optim.grit import diagnostics, outer, reproject, settings
from curvopt.optim.grit.curvature import Curvature, Source, due, live_rank, small_state, source_of

T = TypeVar("T", bound="GritKFAC")


class GritKFAC(BucketedOptimizer):
    r"""AdamW for LoRA, preconditioned by K-FAC's factors at the cost of the adapter (after GRIT, arXiv 2601.00231).

    K-FAC gives each LoRA matrix two factors. The *outer* one is as wide as the layer; ``outer_rank`` of its directions
    are followed, from the gradients alone, and precondition them before Adam sees them. Then Adam's step is given equal
    singular values, at its own length (``update="polar"``). That is the default, and needs no hooks. The *rank-side*
    factors S_u and S_d, r×r, are what GRIT uses: the other rules precondition by them, and reprojection orders the
    directions of the adapter by them. They are observed where something reads them.

    .. code-block:: text

        every step, for each pair (A, B) with u = x Aᵀ and d = ∂L/∂u:
            S ← EMA of ∇Aᵀ∇A (of ∇B ∇Bᵀ for B),  ∇ ← ∇ S̃^(-1/2)           if outer_rank (curvopt.functional.outer)
            S_u ← EMA of uᵀu/N,  S_d ← EMA of N dᵀd                        every factor_every steps
            M_A, M_B ← eigenbasis / inverse / root of S_d, S_u             every inverse_every steps
            A ← A (1 − lr·wd) + Adam seen through M_A of ∇A,  B likewise   (curvopt.functional.update)
            change basis, decide the rank k, set directions ≥ k to zero    every reproject_every steps

    Args:
        params: the model (recommended), named parameters, or param groups; see `PairedOptimizer`. Only with a
            module can activations be observed; named parameters use gradient statistics.
        lr: learning rate, ≥ 0; a 0-d tensor is allowed.
        betas: decay of Adam's moments, in [0, 1). The default suits runs of some hundred steps; (0.9, 0.999) is as good
            in long ones.
        eps: Adam's ε.
        weight_decay: decoupled decay (AdamW).
        statistics: ``"activation"`` (K-FAC, by one hook per pair), ``"gradient"`` (Shampoo on the rank side, no hook),
            ``"weight"`` (A Aᵀ and BᵀB now: Riemannian preconditioned LoRA, arXiv 2402.02347), or ``"none"``: neither
            factors nor hooks; only ``"polar"`` takes it, and equalises the singular values of Adam's step. Under
            DP-SGD activations bypass the noise: use ``"gradient"`` or ``"weight"`` there.
        sides: ``"kfac"``: S_d preconditions A and S_u preconditions B, the K-FAC factors of the two maps;
            ``"paper"``: the other way round, as GRIT publishes it.
        update: ``"polar"``, ``"eigen"``, ``"adam"``, ``"whiten"`` or ``"momentum"``; see `curvopt.functional.update`.
            The moments live in the rule's coordinates, so it stays what it was at the first step.
        outer_rank: k ≥ 0, directions of the outer factors that are kept, at most the width of a matrix; 0 for none.
            Each costs one number per column of A and row of B: k = r makes AdamW's state half as large again.
        damping: λ > 0, relative to the mean eigenvalue: of the outer factors, of the r×r factors and, under
            ``"polar"``, of the step's own Gram matrix; a 0-d tensor is allowed.
        factor_decay: EMA decay β in [0, 1], bias-corrected; 1 is GRIT's running mean that never forgets.
        factor_every: steps between observations; the hooks are idle in between.
        inverse_every: steps between new matrices.
        warmup_steps: plain AdamW for so many steps while the factors fill.
        reprojection: ``"balanced"`` (ours: leaves ΔW alone and orders directions by energy), GRIT's ``"paper"``
            (two-sided) or ``"paper-one-sided"``, or None.
        reproject_every: steps between reprojections; 0 for never; None: 25 with a ``rank_threshold``, else never.
        rank_threshold: τ in (0, 1]: keep the fewest directions with a share τ of the energy; None keeps all.
        min_rank: never fewer directions than this; at most the rank of every pair.
        adapter: only this adapter's pairs; None for all.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see `curvopt.ops`.
        low_rank: ``"names"``: A and B are found by the model, or by names. ``"shape"``, for tensors without names: each
            matrix whose smaller dimension is at most 128 and less than half of the other is taken as one of the two,
            with that dimension as its rank, and everything else gets AdamW; what was taken as what is logged. That
            suits rules that need no partner: ``update="polar"`` without reprojection.
        require_pairs: raise when no pair is found; otherwise everything gets AdamW.
        maximize: ascend.
        capturable: steps may be captured in a CUDA graph, after one or more eager ones and with gradients that stay in
            place. A replay repeats what the captured step did: give ``lr`` (and ``damping``) as tensors, and capture a
            step with matrices and one without, or take both cadences as 1. Reprojection needs eager steps.
        process_group: processes to sum the statistics over; None for the default group, if there is one.
        model: the module to search when ``params`` are groups of tensors.

    A step with non-finite gradients changes nothing and is counted; see `diagnostics`. Cadences count the steps in
    which a pair has gradients, such ones included, and what a skipped step should have done stays due. A GradScaler's
    scale stays in S_d, and cancels in all that is made of it until it changes. Adapters in float16 are refused.

    Raises:
        TypeError: see `PairedOptimizer`.
        ValueError: no pair, or an argument out of range; the message names argument, value and what is allowed.
    """

    # what a copy or a pickle starts with: process groups cannot travel
    _process_group: dist.ProcessGroup | None = None
    _instead = 'Pass the model itself, low_rank="shape" for tensors without names, or require_pairs=False'
    _join_config: Any = None  # by torch's protocol of joinable objects; None outside of Join
    _small = frozenset(
        {"skipped", "cadence", "factor", "observed", "rows", "rank", "pending", "kept"}
        | outer.SMALL
        | {rule.key for rule in RULES.values() if rule.key is not None}
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.7, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        statistics: str = "auto",
        sides: str = "kfac",
        update: str = "polar",
        outer_rank: int = 16,
        damping: float | Tensor = 0.1,
        factor_decay: float = 0.95,
        factor_every: int = 1,
        inverse_every: int = 10,
        warmup_steps: int = 0,
        reprojection: str | None = "balanced",
        reproject_every: int | None = None,
        rank_threshold: float | None = None,
        min_rank: int = settings.MIN_RANK,
        low_rank: str = "names",
        adapter: str | None = None,
        backend: str = "auto",
        require_pairs: bool = True,
        maximize: bool = False,
        capturable: bool = False,
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "capturable": capturable, "statistics": statistics, "sides": sides, "update": update,
            "outer_rank": outer_rank,
            "damping": damping, "factor_decay": factor_decay, "factor_every": factor_every,
            "inverse_every": inverse_every, "warmup_steps": warmup_steps, "reprojection": reprojection,
            "reproject_every": reproject_every, "rank_threshold": rank_threshold, "min_rank": min_rank,
        }  # fmt: skip
        self._process_group = process_group
        check("low_rank", low_rank, low_rank in settings.LOW_RANK, f"one of {settings.LOW_RANK}")
        self._low_rank = low_rank
        super().__init__(
            params, defaults, model=model, adapter=adapter, backend=backend, require_pairs=require_pairs
        )  # fmt: skip

    @classmethod
    def paper(cls: type[T], params: Any, lr: float = 2e-5, **overrides: Any) -> T:
        """Return an optimizer with GRIT's published settings (its code's defaults), for reproduction.

        Statistics every 15 steps in a running mean, inverses and two-sided reprojection every 50, λ = 1e-3,
        τ = 0.99, at least 4 directions, Adam on the preconditioned gradient, swapped sides. Two published traits are
        not reproduced, because they switch the method off: fp16 factors, and damping relative to nothing (λ here is
        relative to the mean eigenvalue). The two small loss penalties of the published code are not part of a step.
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
        self._joining(None)
        buckets, others = self._read()
        for bucket in buckets:
            bucket.tick()
            bucket.begin(self._planned(bucket), self._make_plan)
        found_inf = self._found_inf(buckets, others)
        self._joining(found_inf)
        self._curvature.observe(due(buckets, "factor_every"), found_inf)  # S ← S + w (zᵀz/N − S)
        for bucket in due(buckets, "inverse_every"):
            self._curvature.refresh(bucket, found_inf[bucket.device])  # M ← f(Ŝ + λI)
        reprojected = due(buckets, "reproject_every")
        if reprojected:  # gradients are those of the weights before the step
            self._curvature.entangled = reproject.entangled(reprojected)
        for bucket in buckets:
            if bucket.outer_rank:
                outer.precondition(bucket, found_inf[bucket.device])  # ∇ ← ∇ S̃^(-1/2), in what the rule reads
            bucket.step(found_inf[bucket.device])  # p ← p (1 − lr·wd) + rule(M, ∇)
        self._update_others(others, found_inf)
        if reprojected:
            held = self._curvature.entangled
            reproject.change_basis(reprojected, found_inf, self._curvature, held)  # A ← T A, B ← B T⁻¹, mask
        self._curvature.arm(self._buckets, self._sides)
        return loss

    def _planned(self, bucket: Bucket) -> str:
        """Return the name of the bucket's plan in this step: its rule's, or plain Adam until the warm-up is over."""
        g = bucket.group
        if bucket.steps <= g["warmup_steps"]:
            return "adam"
        return f"{g['update']} with its matrix, {'live ranks' if g['rank_threshold'] is not None else 'all ranks'}"

    def _make_plan(self, bucket: Bucket, name: str) -> tuple[Any, list[Slab]]:
        """Return a plan of a bucket and its slabs, for as long as parameters and state stay where they are."""
        rule = RULES["adam" if name == "adam" else bucket.group["update"]]
        matrix = None if name == "adam" or rule.key is None else bucket.state.get(rule.key)
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
        return {pair.name: diagnostics.live_rank(self, pair) for pair in self._pairs}

    @torch.inference_mode(False)
    @torch.no_grad()
    def compact(self) -> dict[str, int]:
        """Slice every pair and its state to its live rank for good, and return the ranks by name.

        ΔW is unchanged: what is cut is exactly zero, and nothing is cut of a pair whose weights were put back from
        outside with more directions than its mask has. Parameters keep their identity, with new ``.data`` and no
        ``.grad``; wrappers that hold views of them (DDP, FSDP) must be built anew. PEFT's r, scaling, rank_pattern
        and alpha_pattern are kept true, so the model saves and loads as usual.

        Raises:
            ValueError: a pair cannot be resized, for instance because it is sharded; nothing has changed then.
        """
        live = self.ranks()
        smaller = [pair for pair in self._pairs if live[pair.name] != pair.rank]
        for pair in smaller:
            check_resize(pair, live[pair.name])
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

    def diagnostics(self) -> dict[str, Any]:
        """Return what the optimizer knows of itself; reads the device. Keys are described in `diagnostics.diagnose`."""
        return diagnostics.diagnose(self, self.entangled)

    def mask_rows(self, mask: Tensor | None) -> None:
        """Say which rows of the coming forward passes are real, so that padding enters neither the sums nor N.

        Call it before each forward, or from a forward pre-hook of the model; it holds until the next ``step`` or
        ``zero_grad``. Layers that see another number of rows count all of theirs.

        Args:
            mask: as many numbers as the layers see rows (the attention mask ``(batch, length)``, say), 1 for a real
                row and 0 for padding; weights between are allowed. None for all rows.
        """
        self._curvature.capture.mask = None if mask is None else mask.reshape(-1).float()

    def entangled(self, pair: LoraPair) -> str:
        """Return why a pair keeps its basis and its rank; empty if it does not. Reads the device."""
        found = self._curvature.entangled.get(pair)
        if pair.shared or found is None or not found:
            return pair.shared
        return "at the last reprojection the loss did not depend on A and B through B A alone: basis and rank are kept"

    @property
    def watching(self) -> bool:
        """Whether hooks of this optimizer are on the model."""
        return self._curvature.capture.attached

    def remove_hooks(self) -> None:
        """Remove the hooks from the model. Factors then stay as they are; the optimizer goes on working."""
        self._curvature.capture.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as torch does, and forget what backward passes since the last step have shown."""
        self._curvature.capture.discard()
        super().zero_grad(set_to_none)

    # ------------------------------------------------------------------ uneven numbers of batches

    def join_hook(self, **kwargs: Any) -> Any:
        """Return what ``torch.distributed.algorithms.join.Join([model, optimizer])`` runs where batches have run out.

        ``model.join()`` of DistributedDataParallel knows nothing of the sums that a step with activation statistics
        makes over processes; ``Join`` with both does. In the end every process has the weights and the state of one
        that had most batches.

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
        """The processes that statistics are summed over."""
        return dist.group.WORLD if self._process_group is None else self._process_group

    def _joining(self, found_inf: dict[torch.device, Tensor] | None) -> None:
        """Inside of ``Join``, which sets ``_join_config``: announce a step, and agree on whether it counts."""
        if self._join_config is None:
            return
        if found_inf is None:
            from torch.distributed.algorithms.join import Join

            Join.notify_join_context(self)
            return
        for flag in found_inf.values():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._process_group)

    # ------------------------------------------------------------------ plumbing

    def _release(self) -> None:
        if hasattr(self, "_curvature"):
            self._curvature.capture.remove()

    def _check_group(self, g: dict[str, Any]) -> None:
        super()._check_group(g)
        settings.check_group(g)
        if self._low_rank == "shape":
            settings.check_alone(g)

    def _check_edit(self, before: dict[str, Any], g: dict[str, Any]) -> None:
        super()._check_edit(before, g)
        settings.check_edit(before, g, any(b.group is g for b in self._buckets))
        if before["statistics"] != g["statistics"]:
            self._index_pairs()
        if before["damping"] is not g["damping"]:
            for bucket in self._buckets:
                bucket.forget_plans()

    def _check_pairs(self) -> None:
        super()._check_pairs()
        settings.check_pairs(self._sides)

    def _note_params(self) -> None:
        super()._note_params()
        before: Curvature | None = self.__dict__.get("_curvature")
        self._curvature = Curvature(self._sides, self._pairs, self._process_group, self._ops, before)

    def _complete_group(self, g: dict[str, Any]) -> None:
        settings.complete(g)

    def _outer_rank(self, side: Side) -> int:
        return outer.outer_rank(side)

    def _kind(self, side: Side) -> Source:
        return source_of(side)

    def _small_state(self, side: Side) -> dict[str, Tensor]:
        return small_state(side)


def _sliced(side: Side, state: dict[str, Any], k: int) -> dict[str, Any]:
    """Return copies of a parameter's state cut to its first k directions."""
    r, cut = side.pair.rank, {}
    for key, value in state.items():
        if key.startswith("exp_avg"):
            value = value.narrow(side.rank_dim - 1, 0, k)
        elif value.shape == (r, r):
            value = value[:k, :k]
        cut[key] = value.clone()
    return cut
