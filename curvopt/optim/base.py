"""PairedOptimizer: finds the pairs among its parameters and reads the groups at every step; the base class."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from curvopt.distributed import Shards, groups_of, local, shards_of
from curvopt.lora import LoraPair, describe_search, find_lora_pairs, low_rank_by_shape, pair_by_name
from curvopt.ops import Backend, Ops
from curvopt.optim import loading
from curvopt.optim.checking import as_scalar, check, is_number
from curvopt.optim.locator import ParameterLocator, describe_names, describe_shapes, trainable

T = TypeVar("T", bound="PairedOptimizer")
log = logging.getLogger(__name__)
# by value of ``sides``: which factor preconditions the side of each name
PRECONDITIONED_BY = {"kfac": {"A": "d", "B": "u"}, "paper": {"A": "u", "B": "d"}}


@dataclass(eq=False)
class Side:
    """One LoRA matrix, the A or the B of a pair, as it stands in the optimizer.

    Attributes:
        pair: the pair it belongs to.
        name: ``"A"`` or ``"B"``.
        group: the param group that holds it.
        param: the parameter; refreshed by the owner when a framework replaced it.
        rates: its directions' learning rates as multiples of the group's; None: all one. Sides of a block share them.
    """

    pair: LoraPair
    name: str
    group: dict[str, Any]
    param: Tensor
    rates: tuple[float, ...] | None = None

    @property
    def rank_dim(self) -> int:
        """Dimension of the rank in a stack of such matrices: 1 or 2."""
        return 1 + (self.pair.dim_A if self.name == "A" else self.pair.dim_B)

    def moment(self) -> str:
        """Return which factor preconditions this side: "u" or "d"."""
        return PRECONDITIONED_BY[self.group["sides"]][self.name]

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return the 2-D view of a tensor laid out like the parameter."""
        return tensor if tensor.ndim == 2 else self.pair.matrix(self.name, tensor)

    @property
    def shards(self) -> Shards | None:
        """How the parameter is split over processes now; None for a plain tensor."""
        return shards_of(self.param, self.rank_dim - 1, f"{self.name} of {self.pair.name}")


@dataclass
class Noted:
    """A param group as it was when it was last read.

    Attributes:
        group: the dict itself.
        params: its parameters.
        settings: its hyper-parameters.
    """

    group: dict[str, Any]
    params: list[Tensor]
    settings: dict[str, Any]

    def stands_for(self, group: dict[str, Any]) -> bool:
        """Whether a group is this very dict with these very parameters."""
        now = group["params"]
        return group is self.group and len(now) == len(self.params) and all(map(is_, now, self.params))


class PairedOptimizer(torch.optim.Optimizer):
    """An optimizer that knows which of its parameters are the two matrices of one LoRA adapter.

    As in torch, ``param_groups`` decide at every step what is trained and how: replaced, added or removed tensors, new
    group dicts and edited values are noticed at the next step, and pairs are found again. Edited values are validated;
    an invalid one raises the same error at every step until it is corrected.

    Parameters that belong to no pair are updated exactly as by torch's AdamW with the group's ``lr``, ``betas``,
    ``eps`` and ``weight_decay`` (bit for bit ``torch.optim.AdamW`` on the CPU, its fused kernel elsewhere).

    Args:
        params: an ``nn.Module`` (pairs are found in it), named parameters, tensors, or param groups of either.
        defaults: defaults of the param groups.
        model: the module to search when ``params`` are tensors or groups of tensors.
        adapter: only pairs of this adapter; None for all.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        require_pairs: raise when no pair is found.

    Raises:
        TypeError: something in ``params`` is not a tensor, or a parameter is complex.
        ValueError: no pair found, a float16 adapter, or an argument out of range; the message names it.
    """

    # r×r and counting state: kept in its own dtype, which loading would cast to the parameter's
    _small: frozenset[str] = frozenset({"skipped", "cadence"})
    # "names": A and B are told by their names; "shape": each LoRA matrix is told by its shape, and there are no pairs
    _low_rank: str = "names"
    _instead = "Pass the model itself, or require_pairs=False"

    def __init__(
        self,
        params: ParamsT | nn.Module,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None = None,
        adapter: str | None = None,
        backend: Backend = "auto",
        require_pairs: bool = True,
    ) -> None:
        self._ops = Ops(backend)
        self._adapter = adapter
        self._whole_model = isinstance(params, nn.Module)
        groups: Any = params  # torch refuses what is none of the above
        if isinstance(params, nn.Module):
            model, groups = params, trainable(params, adapter)
        elif not isinstance(params, Tensor):
            groups = list(params)
        self._model = model
        self._sides: list[Side] = []
        self._pairs: list[LoraPair] = []
        self._noted: list[Noted] = []
        self._ready = False
        super().__init__(groups, defaults)
        for group in self.param_groups:
            self._check_group(group)
        try:
            self._index_pairs()
            if self._low_rank == "shape":
                self._tell_shapes()
            if require_pairs and not self._sides:
                found = describe_search(model) if model is not None else describe_names(self.param_groups)
                found = describe_shapes(self.param_groups) if self._low_rank == "shape" else found
                raise ValueError(f"no LoRA pair found: {found}. {self._instead}")
            self._check_pairs()
        except Exception:
            self._release()
            raise
        self._ready = True

    @classmethod
    def bound_to(cls: type[T], model: nn.Module, **options: Any) -> type[T]:
        """Return this class with ``model=`` already given, for factories that pass tensors without names.

        ``create_loraplus_optimizer(model, GritKFAC.bound_to(model), lr=..., loraplus_lr_ratio=...)``: the tensors are
        found in the model by identity. Calling it creates instances of this class itself, not of a subclass.

        Args:
            model: the module to search.
            options: further arguments; arguments of the call take precedence.

        Raises:
            TypeError: ``model`` is not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")

        def make(_: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            return cls(params, *args, **{"model": model, **options, **kwargs})

        # another class comes out of __new__, so that copies and pickles know nothing of this one
        namespace = {"__new__": make, "__doc__": cls.__doc__, "__module__": cls.__module__}
        return type(cls.__name__, (cls,), namespace)

    # ------------------------------------------------------------------ pairs and groups

    @property
    def pairs(self) -> list[LoraPair]:
        """The pairs this optimizer trains, in module order; without those that were deleted from the model."""
        return [pair for pair in self._pairs if pair.exists]

    @property
    def sides(self) -> list[Side]:
        """The matrices of `pairs` that are in the param groups."""
        return [side for side in self._sides if side.pair.exists]

    @property
    def model(self) -> nn.Module | None:
        """The module that was searched for pairs; None if there was none."""
        return self._model

    @property
    def ops(self) -> Ops:
        """The ops of this optimizer's backend."""
        return self._ops

    def now_at(self, p: Tensor) -> Tensor:
        """Return the parameter that stands in the model now where ``p`` stood when the groups were last read."""
        return self._locator.now_at(p)

    @property
    def shared_by(self) -> list[Any]:
        """The process groups over which parameters are sharded."""
        return list(self._shared_by)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and find the pairs that it completes; if it is invalid, nothing is added."""
        super().add_param_group(param_group)
        self._complete_group(self.param_groups[-1])
        try:
            for p in self.param_groups[-1]["params"]:
                if p.is_complex():
                    raise TypeError("params must be real tensors, got a complex parameter")
            if self._ready:
                self._check_group(self.param_groups[-1])
                self._index_pairs()
                self._check_pairs()
        except (TypeError, ValueError):
            self.param_groups.pop()
            if self._ready:
                self._index_pairs()
            raise

    def _complete_group(self, g: dict[str, Any]) -> None:
        """Decide what a new group leaves open; subclasses whose defaults depend on each other do."""

    def _check_group(self, g: dict[str, Any]) -> None:
        """Validate the hyper-parameters that every subclass has."""
        check("lr", g["lr"], is_number(g["lr"]) and (isinstance(g["lr"], Tensor) or g["lr"] >= 0), "a number ≥ 0")
        betas = g["betas"]
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        check("betas", betas, pair and all(is_number(b) and 0 <= b < 1 for b in betas), "two numbers in [0, 1)")
        g["betas"] = tuple(betas)  # a list could be changed in place, unseen
        check("eps", g["eps"], is_number(g["eps"]) and g["eps"] >= 0, "a number ≥ 0")
        decay = g["weight_decay"]
        check("weight_decay", decay, is_number(decay) and decay >= 0, "a number ≥ 0")
        for name in ("maximize", "capturable"):
            check(name, g.get(name), isinstance(g.get(name, False), bool), "True or False")

    def _check_edit(self, before: dict[str, Any], g: dict[str, Any]) -> None:
        """Validate a group that was edited; subclasses refuse what cannot be changed after the first step."""
        self._check_group(g)

    def _release(self) -> None:
        """Leave the model as it was found; subclasses that put hooks on it remove them."""

    def _check_pairs(self) -> None:
        """Validate what concerns a pair's two groups together; subclasses add to it."""
        for side in self._sides:
            check(
                f"{side.name} of {side.pair.name}", side.param.dtype, side.param.dtype != torch.float16,
                "float32 or bfloat16: updates of float16 parameters round to nothing or overflow. Keep the adapter in "
                "float32 (PEFT does so with autocast_adapter_dtype=True)",
            )  # fmt: skip

    def _index_pairs(self) -> None:
        """Find the pairs among the parameters; cheap enough to repeat when groups or parameters change."""
        groups = {p: g for g in self.param_groups for p in g["params"]}
        if self._low_rank == "shape":
            self._pairs = []
            own = low_rank_by_shape((f"tensor {i}", p) for i, p in enumerate(groups))
            self._sides = [Side(pair, name, groups[pair.A], pair.A) for pair, name in own]
            self._note_params()
            return
        if self._model is not None:
            candidates = find_lora_pairs(self._model, self._adapter)
        else:
            named = [
                (name, p)
                for g in self.param_groups
                for name, p in zip(g.get("param_names", ()), g["params"], strict=False)
            ]
            candidates = pair_by_name(named)
        self._pairs = [pair for pair in candidates if pair.A in groups or pair.B in groups]
        self._sides = [
            Side(pair, name, groups[p], p)
            for pair in self._pairs
            for name, p in (("A", pair.A), ("B", pair.B))
            if p in groups
        ]
        self._note_params()

    def _tell_shapes(self) -> None:
        """Log what was taken as low rank, and what was not."""
        taken = Counter(tuple(s.param.shape) for s in self._sides)
        left = Counter(tuple(p.shape) for others in self._others for p in others if p.requires_grad)
        texts = [", ".join(f"{n} of {' × '.join(map(str, shape))}" for shape, n in found.items()) or "none"
                 for found in (taken, left)]  # fmt: skip
        log.info("low rank by shape: %s; AdamW: %s", *texts)

    def _note_params(self) -> None:
        """Note what depends on which objects the parameters are now."""
        paired = {s.param for s in self._sides}
        self._others = [[p for p in g["params"] if p not in paired] for g in self.param_groups]
        self._locator = ParameterLocator(self._model, self.param_groups, self._whole_model and self._adapter is None)
        self._shared_by = groups_of(p for g in self.param_groups for p in g["params"])
        self._noted = [Noted(g, list(g["params"]), _settings(g)) for g in self.param_groups]

    # ------------------------------------------------------------------ reading the world, once a step

    def _read_groups(self) -> None:
        """Bring pairs and settings in line with what stands in ``param_groups`` now. Usually nothing has changed."""
        groups, noted = self.param_groups, self._noted
        if len(groups) != len(noted) or not all(was.stands_for(g) for g, was in zip(groups, noted, strict=True)):
            self._reindex()
            return
        edited = [
            (g, was)
            for g, was in zip(groups, noted, strict=True)
            if any(g.get(key) is not value for key, value in was.settings.items())
        ]
        for g, was in edited:
            self._check_edit(was.settings, g)
        if any(
            was.settings[key] is not g.get(key) for g, was in edited for key in was.settings.keys() - {"lr", "betas"}
        ):
            self._check_pairs()
        for g, was in edited:  # only now: what was refused is refused at the next step again
            was.settings = _settings(g)

    def _reindex(self) -> None:
        """Find the pairs anew among parameters that were put into the groups or taken out.

        Raises:
            RuntimeError: parameters were replaced in the groups, but not in the model, and pairs are lost by it.
        """
        pairs, noted = self._pairs, self._noted
        try:
            self._find_anew(pairs, {p for was in noted for p in was.params})
        except (RuntimeError, TypeError, ValueError):  # what was refused is refused at the next step again
            self._pairs, self._noted = pairs, [Noted({}, was.params, was.settings) for was in noted]
            raise

    def _find_anew(self, before: list[LoraPair], familiar: set[Tensor]) -> None:
        if self._model is not None:
            familiar.update(self._model.parameters())
        for g in self.param_groups:
            self._check_group(g)
        self._index_pairs()
        now = {p for g in self.param_groups for p in g["params"]}
        lost = [pair.name for pair in before if pair.exists and pair.A not in now and pair.B not in now]
        foreign = now - familiar
        if lost and foreign:
            raise RuntimeError(
                f"{len(lost)} LoRA pairs ({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}) are no longer in "
                f"param_groups: {len(foreign)} tensors that are not parameters of the model stand there instead, as "
                "wrappers with flat or master copies put them (DeepSpeed ZeRO, apex, bf16 master weights). No pair can "
                "be preconditioned through such copies; use DistributedDataParallel or FSDP2 (fully_shard) instead"
            )
        self._check_pairs()

    def _follow(self) -> None:
        """Take the parameters that a framework has put in place of ours; pairs and what was observed of them stay."""
        if self._locator.adopt(self.param_groups, self.state, self._sides):
            self._note_params()
        else:
            self._index_pairs()

    def _check_capture(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            check("capturable", False, all(g.get("capturable") for g in self.param_groups), "True to capture a step")
            for g in self.param_groups:
                fits = not isinstance(g["lr"], Tensor) or g["lr"].is_cuda
                check("lr", g["lr"], fits, "a number, or a tensor on the device, to capture a step")

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _live_others(self) -> dict[int, list[Tensor]]:
        """Return by group the parameters outside pairs that have gradients; groups without any are left out."""
        others = {i: [p for p in params if p.grad is not None] for i, params in enumerate(self._others)}
        check_dense(p.grad for params in others.values() for p in params if p.grad is not None)
        return {i: params for i, params in others.items() if params}

    def _update_others(self, others: dict[int, list[Tensor]], found_inf: dict[torch.device, Tensor]) -> None:
        """AdamW on the parameters outside pairs: torch's own."""
        for i, params in others.items():
            for device in {p.device for p in params}:
                self._adamw(self.param_groups[i], [p for p in params if p.device == device], found_inf[device])

    def _adamw(self, g: dict[str, Any], params: list[Tensor], found_inf: Tensor) -> None:
        cpu = params[0].device.type == "cpu"
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if cpu and found_inf.item():  # no device synchronisation on the CPU
            return
        grads = [local(p.grad) for p in params]
        column = {key: [local(self.state[p][key]) for p in params] for key in ("exp_avg", "exp_avg_sq", "step")}
        adamw(
            [local(p) for p in params], grads, column["exp_avg"], column["exp_avg_sq"], [], column["step"],
            fused=None if cpu else True, foreach=False if cpu else None, found_inf=None if cpu else found_inf,
            amsgrad=False, beta1=g["betas"][0], beta2=g["betas"][1], lr=as_scalar(g["lr"]),
            weight_decay=g["weight_decay"], eps=g["eps"], maximize=g["maximize"],
        )  # fmt: skip

    # ------------------------------------------------------------------ saving, loading, copying

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("_model", "_adapter", "_whole_model")}
        own["_low_rank"] = self._low_rank  # of the class, where it was not given
        return {**super().__getstate__(), **own, "_backend": self._ops.backend}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does; refuses state of other shapes before changing anything, and keeps dtypes.

        Raises:
            ValueError: the saved state of a parameter has another shape (for instance another rank), or a saved
                hyper-parameter is out of range.
        """
        if self._locator.moved(iter(())):
            self._follow()
        final: dict[str, Any] = {}  # what loads, after the user's own pre-hooks

        def look(_: Any, found: dict[str, Any]) -> None:
            loading.check_fits(self.param_groups, found)
            for own, saved in zip(self.param_groups, found["param_groups"], strict=False):
                self._check_group({**own, **saved})
            final.update(found)

        handle = self.register_load_state_dict_pre_hook(look)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        loading.restore(self.state, self.param_groups, final, self._small)

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = state.pop("_backend", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for key in (key for key in self.defaults if key != "differentiable"):  # torch adds it here, not at first
                group.setdefault(key, self.defaults[key])
            self._complete_group(group)
        if backend is not None:  # a copy or a pickle, not load_state_dict
            self._ops = Ops(backend)
            self._sides, self._pairs, self._noted, self._ready = [], [], [], True
        self._index_pairs()


def check_dense(grads: Iterable[Tensor]) -> None:
    """Raise a RuntimeError if a gradient is sparse."""
    if set(map(attrgetter("layout"), grads)) - {torch.strided}:
        raise RuntimeError("sparse gradients are not supported; use dense ones, or another optimizer for them")


def _settings(g: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in g.items() if key not in ("params", "param_names")}
