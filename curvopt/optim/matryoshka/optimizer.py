"""MatryoshkaScaledAdam: one training run of plain LoRA modules, an accurate adapter at every nested rank."""

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from curvopt.distributed import placed_like, used_directions, whole
from curvopt.functional.nested import RowSlab, Scale
from curvopt.lora import LoraPair
from curvopt.lora.cut import check_at_work
from curvopt.ops import Backend
from curvopt.optim.base import Side
from curvopt.optim.bucket import FULL, MOMENTS, Block, Bucket, BucketedOptimizer, on_pieces
from curvopt.optim.checking import check
from curvopt.optim.matryoshka import nested_ranks as nests
from curvopt.optim.matryoshka import truncation
from curvopt.optim.matryoshka.nested_ranks import scaled_rows
from curvopt.optim.nesting import FULL_SHARE, REORDER_EVERY, WARMUP, MaskedPair, SampleMasks, StepDraw, steps_taken
from curvopt.optim.reordering import entangled, reorder, turn_of

DRAWING = ("dylora", "stratified")


class MatryoshkaScaledAdam(BucketedOptimizer):
    r"""AdamW of (A, B) in ΔW = B P A, on plain modules that hold Ã = P A (MatryoshkaLoRA, arXiv 2605.07850).

    .. code-block:: text

        P_i = Σ s(ρ) over the nested ranks ρ > i,   Q = P / s with s the module's own scaling: s B Ã = B P A
        before a pair's first step, while B = 0:    A ← Q A     (∂L/∂B follows; ΔW stays 0)
        every step:    Ã_i ← Ã_i (1 − lr·wd) − Q_i lr m̂_i / (√v̂_i + ε / Q_i),   B as AdamW
        dylora:        A is kept in the state and updated by AdamW; the module holds P_ρ A for one random ρ (rows of A
                       that are written into the module from outside are adopted at the next step)
        stratified:    AdamW on (A, B); in training, sample i uses s B[:, :ρ_i] A[:ρ_i], and every few steps
                       A ← T A, B ← B T⁻¹ changes to the basis of the singular vectors of B A (ours)

    The forward pass is unchanged, and the module always computes the trained adapter; but with ``"dylora"`` it computes
    at the rank drawn last, and what is saved of it has the other rows at zero: evaluate and save inside of `truncated`,
    or save by `export`. An adapter that starts with B ≠ 0 is interpreted as B Ã: its ΔW is kept, and a saved adapter
    can be trained further, with or without its optimizer state. Clipping by the global norm before the step is the only
    operation for which a module that computes B P A itself would differ: its ∂L/∂A is Q times ours. A must have a
    gradient in the first step that B takes; where it is frozen (LoRA-FA), use ``"stratified"``.

    ``"stratified"`` (our derivation) trains an ordinary adapter so that its leading directions can be used alone. A
    forward hook on the module of A zeroes the directions of u = A x above the rank of each sample, in training mode
    only, as dropout does. Evaluation and inference are not affected; `remove_hooks` removes the hook. The first
    dimension of u is the batch: all positions of a sequence share a rank, in all layers; in a 2-d u (packed tokens, an
    expert's tokens) each row is a sample, and a 1-d u is one sample. Ranks are stratified over the samples of a batch,
    over micro-batches and over the processes of the default group. Each reordering keeps ΔW and transforms Adam's
    moments (second moments by the squared entries of T, see `curvopt.functional.basis`); in bfloat16 the parameters are
    rounded once more. Pairs with a frozen side are masked but not reordered. Before you create a second optimizer for a
    model that is trained further, call `remove_hooks` on the first.

    Args:
        params: the model (recommended), named parameters, or param groups; see `PairedOptimizer`.
        lr: learning rate, ≥ 0; a one-element tensor is allowed.
        betas: decay of Adam's moments, in [0, 1).
        eps: Adam's ε, as if on A.
        weight_decay: decoupled decay (AdamW).
        ranks: nested ranks, ascending; those above a pair's r are ignored for it. None: powers of two, and r.
            Directions above a pair's largest rank must be zero in its ΔW, and remain zero.
        scale: s(ρ): ``"none"`` 1, ``"rank"`` 1/ρ, ``"sqrt"`` 1/√ρ.
        nesting: ``"matryoshka"``; ``"dylora"``: one random ρ per step, skipped steps included (arXiv 2210.07558);
            ``"lora"``: only r, P = s(r) I, whatever ``ranks`` is; ``"stratified"``: each sample at a rank of its own; r
            is then always one of the ranks, and ``scale`` must be ``"none"``. It cannot be changed later.
        full_share: stratified: share of the samples at rank r, in (0, 1]; the others are at the smaller ranks, in
            proportion to 1/ρ. A lower share favours small ranks.
        warmup_steps: stratified: steps before the first masks.
        reorder_every: stratified: steps from one reordering to the next; 0 for none.
        generator: a CPU generator for DyLoRA's ρ and for the masks; its state is saved in ``state_dict``. None: one
            seeded with 0. It must be seeded alike in all processes; their masks differ nevertheless.
        adapter: only this adapter's pairs; None for all.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see `curvopt.ops`.
        require_pairs: raise when no pair is found; otherwise everything gets AdamW.
        maximize: maximise the loss.
        model: the module to search when ``params`` are groups of tensors.

    A step with a non-finite gradient changes nothing and is counted (on the CPU this is detected from the sum of the
    gradients, so that a sum beyond the dtype's range counts as non-finite). ``ranks`` and ``scale`` may be edited: ΔW
    is kept (with ``"dylora"``, at the largest rank), and the learning rates of the rows follow; ranks whose directions
    are in use cannot be left out.

    Raises:
        TypeError: see `PairedOptimizer`; or ``generator`` is no CPU generator.
        ValueError: no pair, or an argument out of range.
    """

    _small = frozenset({"skipped", "cadence"}) | StepDraw.SMALL

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ranks: Sequence[int] | None = None,
        scale: Scale = "none",
        nesting: nests.Nesting = "matryoshka",
        full_share: float = FULL_SHARE,
        warmup_steps: int = WARMUP,
        reorder_every: int = REORDER_EVERY,
        generator: torch.Generator | None = None,
        adapter: str | None = None,
        backend: Backend = "auto",
        require_pairs: bool = True,
        maximize: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self._draws = StepDraw(generator)  # DyLoRA's present ρ, or the masks
        self._before: dict[LoraPair, Tensor] = {}  # what truncated() took away; empty outside
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "ranks": ranks, "scale": scale, "nesting": nesting, "full_share": full_share, "warmup_steps": warmup_steps,
            "reorder_every": reorder_every,
        }  # fmt: skip
        super().__init__(params, defaults, model=model, adapter=adapter, backend=backend, require_pairs=require_pairs)

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what ``closure`` returned, if given."""
        if self._before:
            raise RuntimeError(
                "step() was called inside truncated(), where the model is cut to one of its ranks; call it outside"
            )
        loss = self._evaluate(closure)
        buckets, others = self._read()
        for bucket in buckets:
            self._take_back(bucket)
            bucket.begin("row", self._make_plan, self._to_full)
        found_inf = self._found_inf(buckets, others)
        self._enter(buckets, found_inf)  # A ← Q A, once a pair
        for bucket in buckets:  # only now: what is refused counts nowhere
            bucket.tick()
        due = [bucket for bucket in buckets if _reorders(bucket)]
        if due:  # gradients are those of the weights before the step
            turn = turn_of(due, buckets)
            held = entangled(turn.buckets, self._masks.pairs)
        for bucket in buckets:
            bucket.step(found_inf[bucket.device])  # row by row: lr Q_i, ε / Q_i
        self._update_others(others, found_inf)
        if due:
            reorder(turn, found_inf, held)  # A ← T A, B ← B T⁻¹
        self._draw()  # DyLoRA: Ã ← P_ρ A / s for the next ρ
        self._masks.advance(self._draws.last, self._buckets, buckets)
        return loss

    def _make_plan(self, bucket: Bucket, name: str) -> tuple[Any, list[RowSlab]]:
        """Return a plan of a bucket and its slabs, for as long as parameters and state stay where they are."""
        slabs = []
        for block in bucket.blocks:
            params, hyper = on_pieces(block, bucket.hyper, bucket.dtype)
            slabs.append(
                RowSlab(
                    params=params,
                    grads=bucket.grads[block.rows],
                    exp_avg=block.exp_avg,
                    exp_avg_sq=block.exp_avg_sq,
                    step=bucket.state["step"],
                    rank_dim=block.rank_dim,
                    rates=block.sides[0].rates,
                    hyper=hyper,
                )
            )
        return self._ops.plan(name, slabs), slabs

    def _take_back(self, bucket: Bucket) -> None:
        """Take into A what was put into the module from outside since the last step: a best model, a rollback.

        The module holds A at one of the trained ranks; which one, its rows that are not zero tell. Rows above keep
        what the state has. Reads the device, once a bucket.
        """
        shards = bucket.blocks[0].shards
        if bucket.blocks[0].full is None or not bucket.state["step"] > 0:
            return
        held = [block.weights() for block in bucket.blocks]
        known = [self._at_present(block) for block in bucket.blocks]
        differ = [(X != Y).flatten(1).any(1) for X, Y in zip(held, known, strict=True)]
        other = torch.cat(differ).float()
        if shards is not None:
            shards.sum_(other)
        new = [X for block in held for X in block.unbind()]
        full = [own for block in bucket.blocks if block.full is not None for own in block.full.unbind()]
        for s, X, A, changed in zip(bucket.sides, new, full, other.tolist(), strict=True):
            if changed:
                nest, dim = self._nests[s.pair], s.rank_dim - 1
                used = used_directions((s.param,), (dim,))[0].nonzero()
                top = int(used.max()) + 1 if len(used) else 0
                nest.drawn = next((rank for rank in nest.ranks if rank >= top), nest.ranks[-1])
                rows = scaled_rows(X, [1 / q if q else 0.0 for q in nest.rates], dim)
                n = sum(q > 0 for q in nest.rates)
                A.narrow(dim, 0, n).copy_(rows.narrow(dim, 0, n))

    def _at_present(self, block: Block) -> Tensor:
        """Return what the module is to hold of matrices that are kept in the state, ``[L, m, n]``: Q A."""
        assert block.full is not None
        dim = block.rank_dim - 1
        rates = [self._nests[s.pair].rates for s in block.sides]
        return torch.stack([scaled_rows(full, q, dim) for full, q in zip(block.full, rates, strict=True)])

    def _to_full(self, bucket: Bucket) -> None:
        """Take the gradients to those of A where it is kept in the state: ∂L/∂A = Q ∂L/∂Ã."""
        if bucket.blocks[0].full is not None:
            bucket.grads = [
                scaled_rows(g, self._nests[s.pair].rates, s.rank_dim - 1)
                for g, s in zip(bucket.grads, bucket.sides, strict=True)
            ]

    def _enter(self, buckets: Sequence[Bucket], found_inf: dict[torch.device, Tensor]) -> None:
        """Give A its start Q A where a pair takes its first step with B = 0. Reads the device, once a bucket."""
        new = [bucket for bucket in buckets if bucket not in self._entered]
        if not new or any(found_inf[bucket.device] != 0 for bucket in new):
            return
        first = [(block, bucket) for bucket in new if bucket.state["step"] == 0 for block in bucket.blocks]
        sides = [s for block, _ in first for s in block.sides]
        pairs = list(dict.fromkeys(s.pair for s in sides))
        used = used_directions([pair.B for pair in pairs], [pair.dim_B for pair in pairs])
        fresh = {pair for pair, own in zip(pairs, used, strict=True) if not own.any()}
        for pair in (s.pair for s in sides if s.name == "A" and s.pair not in fresh):
            self._nests[pair].check_unused()  # ΔW as it came is that of the largest rank
            self._nests[pair].drawn = None
        with_A = {s.pair for s in sides if s.name == "A"}
        entering = fresh & with_A
        for pair in (s.pair for s in sides if s.name == "B" and not self._knows_A(s.pair)):
            nest = self._nests[pair]
            free = nest.group["nesting"] in ("stratified", "lora") or (not nest.sampled and pair not in fresh)
            check(
                f"nesting of {pair.name}", nest.group["nesting"], free or pair in with_A,
                "'stratified' where A is frozen or without a gradient: with others A is brought to P A in B's first "
                "step",
            )  # fmt: skip
        for block, bucket in first:
            if block.sides[0].name == "A":
                self._start(block, entering)
                continue
            for i, s in enumerate(block.sides, block.rows.start):
                if s.pair in entering:
                    bucket.grads[i] = scaled_rows(bucket.grads[i], self._nests[s.pair].rates, s.rank_dim - 1)
        for bucket in new:
            bucket.plan.load(bucket.grads)
        self._entered.update(new)

    def _knows_A(self, pair: LoraPair) -> bool:
        """Whether the A of a pair has taken steps, in another run maybe."""
        return float(self.state.get(pair.A, {}).get("step", 0)) > 0

    def _start(self, block: Block, entering: set[LoraPair]) -> None:
        """Write the start of A into the state where it is kept there, else into the module."""
        held, dim = block.weights(), block.rank_dim - 1
        for i, s in enumerate(block.sides):
            Q = self._nests[s.pair].rates
            if block.full is not None:
                back = [1.0 if s.pair in entering or q == 0 else 1 / q for q in Q]
                block.full[i].copy_(scaled_rows(held[i], back, dim))
            elif s.pair in entering:
                held[i] = scaled_rows(held[i], Q, dim)
        if block.full is None:
            block.assign(held)

    def _draw(self) -> None:
        """Draw a number for the next step, if any group samples, and give DyLoRA's modules the rank of A it picks."""
        if not any(g["nesting"] in DRAWING for g in self.param_groups):
            return
        draw = self._draws.next()
        for bucket in self._buckets:
            if bucket not in self._entered and not bucket.state["step"] > 0:
                continue
            for block in (block for block in bucket.blocks if block.full is not None):
                for side in block.sides:
                    self._nests[side.pair].draw(draw)
                block.assign(self._at_present(block))

    # ------------------------------------------------------------------ one rank

    def truncated(self, rank: int, *, strict: bool = True, keep_P: bool = False) -> AbstractContextManager[None]:
        """Return a context in which the model computes at one rank, s(ρ) B[:, :ρ] A[:ρ]; it is restored afterwards.

        A pair whose largest rank is smaller uses that one. Contexts may be nested: the innermost rank applies. With
        FSDP2 all processes enter and leave together.

        Args:
            rank: ρ.
            strict: raise an error for a rank that was not trained.
            keep_P: compute B[:, :ρ] (P A)[:ρ] instead: the leading directions as they were trained. With DyLoRA there
                is no difference.

        Raises:
            ValueError: the rank is below 1, above every pair's, or was not trained; or the model does not compute with
                the adapter, which is merged into the base weights, disabled or not active.
        """
        ranks = self._resolved(rank, strict)
        check_at_work(list(ranks))
        return truncation.truncated(self._model, self._nests, self.state, ranks, keep_P, self._before)

    def _resolved(self, rank: int, strict: bool) -> dict[LoraPair, int]:
        """Return the rank of every pair that stands in the model now."""
        if self._locator.moved(iter(())):
            self._follow()
        return truncation.resolve({pair: nest for pair, nest in self._nests.items() if pair.exists}, rank, strict)

    def export(
        self, path: str | Path, rank: int, *, strict: bool = True, keep_P: bool = False, pad_to: int | None = None,
        model: Any = None,
    ) -> Path:  # fmt: skip
        """Write the adapter of one rank as a plain PEFT adapter folder; the model is left as it is.

        Args:
            path: the folder.
            rank: ρ; a pair whose largest rank is smaller is written with that one.
            strict: as in `truncated`.
            keep_P: as in `truncated`.
            pad_to: as in `curvopt.lora.export_adapter`, for programs that support a single rank.
            model: the `PeftModel`; None: the one the optimizer was created with.

        Raises:
            TypeError, ValueError: see `truncated` and `curvopt.lora.export_adapter`, which refuses sharded matrices.
        """
        ranks = self._resolved(rank, strict)
        # an adapter that is not at work is written all the same
        with truncation.truncated(self._model, self._nests, self.state, ranks, keep_P, self._before):
            return truncation.export(self._model if model is None else model, path, ranks, self._adapter, pad_to)

    # ------------------------------------------------------------------ reading

    def nested_ranks(self) -> dict[str, tuple[int, ...]]:
        """Return the ranks that every pair is trained at, by name."""
        return {pair.name: nest.ranks for pair, nest in self._nests.items()}

    def diagnostics(self) -> dict[str, Any]:
        """Return plain numbers: skipped updates, fallbacks to the reference, and for each pair ranks, P and scaling."""
        return nests.diagnose(self, self._nests)

    @property
    def watching(self) -> bool:
        """Whether hooks of this optimizer are registered on the model."""
        return self._masks.attached

    def remove_hooks(self) -> None:
        """Remove the hooks of stratified nesting from the model, permanently; training continues without masks."""
        self._masks.remove()

    def release(self) -> None:
        """Do nothing, and warn; optimizers of this class no longer claim their adapters."""
        warnings.warn("release() has nothing to do any more: remove the call", FutureWarning, stacklevel=2)

    # ------------------------------------------------------------------ plumbing

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; the state of every sampled pair's first side has the generator and last draw."""
        self._draws.save((s for s in self._sides if s.group["nesting"] in DRAWING), self.state)
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_draws": self._draws}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._before = {}
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, and DyLoRA's generator with it; see `PairedOptimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        if self._draws.load(self.state.values()):
            self._index_pairs()

    def _check_group(self, g: dict[str, Any]) -> None:
        super()._check_group(g)
        nests.check_group(g)

    def _check_edit(self, before: dict[str, Any], g: dict[str, Any]) -> None:
        """Take ranks and scales that were edited; ΔW at the largest rank stays."""
        super()._check_edit(before, g)
        check(
            "nesting",
            g["nesting"],
            before["nesting"] == g["nesting"],
            f"what it was when the optimizer was made, {before['nesting']!r}",
        )
        if any(before[key] != g[key] for key in ("ranks", "scale")):
            nests.check_pairs(self.sides)  # before anything changes
            self._take_edit(self._index_pairs)

    def _find_anew(self, before: list[LoraPair], familiar: set[Tensor]) -> None:
        for g in self.param_groups:
            self._check_group(g)
        self._take_edit(lambda: super(MatryoshkaScaledAdam, self)._find_anew(before, familiar))

    def _take_edit(self, find: Callable[[], None]) -> None:
        """Find the nested ranks anew; of what is in training ΔW at the largest rank stays."""
        groups = {p: g for g in self.param_groups for p in g["params"]}
        former = {id(pair.A): nest for pair, nest in self._nests.items() if pair.exists}
        for nest in former.values():
            ranks = nests.own_ranks(groups.get(nest.pair.A, nest.group), nest.pair.rank)
            if ranks and ranks[-1] < nest.ranks[-1]:
                replace(nest, ranks=ranks).check_unused(self.state.get(nest.pair.A, {}).get(FULL))
        for bucket in self._buckets:
            self._take_back(bucket)  # by the ranks and scales until now
        find()
        for pair, nest in self._nests.items():
            was, own = former.get(id(pair.A)), self.state.get(pair.A, {})
            same = was is not None and (was.ranks, was.scale) == (nest.ranks, nest.scale)
            if was is not None and not same and FULL in own and own["step"] > 0:
                nest.drawn = was.drawn or was.ranks[-1]  # until the end of the step, the module holds that rank
                c = was.prefix(was.ranks[-1], full=True)[0] / nest.prefix(nest.ranks[-1], full=True)[0]
                own[FULL].mul_(c)
                own["exp_avg"].div_(c)
                own["exp_avg_sq"].div_(c * c)
                pair.A.copy_(placed_like(pair.A, scaled_rows(whole(own[FULL]), nest.rates, pair.dim_A)))

    def _note_params(self) -> None:
        nests.check_pairs(self._sides)
        self._nests = nests.nests(self._sides, self._draws.last)
        for side in self._sides:
            side.rates = self._nests[side.pair].row_rates(side.name)
        super()._note_params()
        masked = [MaskedPair(nest.pair, nest.ranks, nest.group) for nest in self._nests.values() if nest.masked]
        before: SampleMasks | None = self.__dict__.get("_masks")
        self._masks = SampleMasks(masked, "warmup_steps", before)
        self._masks.arm(self._draws.last, steps_taken(self.state.values()))
        self._entered: weakref.WeakSet[Bucket] = weakref.WeakSet()

    def _release(self) -> None:
        if "_masks" in self.__dict__:
            self._masks.remove()

    def _traits(self, side: Side) -> Any:
        return self._wide_state(side)

    def _wide_state(self, side: Side) -> Sequence[str]:
        sampled = side.name == "A" and side.group["nesting"] == "dylora"
        return (*MOMENTS, FULL) if sampled else MOMENTS


def _reorders(bucket: Bucket) -> bool:
    """Whether this step ends with a reordering of a bucket's pairs."""
    every = bucket.group["reorder_every"]
    return bucket.group["nesting"] == "stratified" and every > 0 and bucket.steps % every == 0
