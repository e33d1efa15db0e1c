"""RankSpaceOptimizer: params in, pairs found, state stacked, gradients checked. The methods live in its subclasses."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from curvopt.distributed import any_nonfinite, groups_of, local
from curvopt.lora import LoraPair, describe_search, find_lora_pairs, pair_by_name
from curvopt.ops import Ops
from curvopt.optim import loading
from curvopt.optim.checking import check, is_number
from curvopt.optim.places import Places, describe_names, trainable
from curvopt.optim.scratch import Scratch
from curvopt.optim.stacks import Side, Stack, partition


class RankSpaceOptimizer(torch.optim.Optimizer):
    """An optimizer that knows which of its parameters are the two factors of one LoRA adapter.

    Parameters that belong to no pair get exactly torch's AdamW with the group's ``lr``, ``betas``, ``eps`` and
    ``weight_decay`` (bit for bit ``torch.optim.AdamW`` on the CPU, its fused kernel elsewhere).

    Args:
        params: an ``nn.Module`` (pairs are found in it), named parameters, tensors, or param groups of either.
        defaults: defaults of the param groups.
        model: the module to search when ``params`` are tensors or groups of tensors.
        adapter: only pairs of this adapter; None for all.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        require_pairs: raise when no pair is found.

    Raises:
        TypeError: something in ``params`` is not a tensor, or a parameter is complex.
        ValueError: no pair found, or an argument out of range; the message names it.
    """

    _step_supports_amp_scaling = True
    # r×r and counting state: kept in its own dtype, which loading would cast to the parameter's
    _small: frozenset[str] = frozenset({"skipped"})
    _stacked = True  # whether a step wants the gradients of a stack in one tensor

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None = None,
        adapter: str | None = None,
        backend: str = "auto",
        require_pairs: bool = True,
    ) -> None:
        self._ops = Ops(backend)
        self._adapter = adapter
        if isinstance(params, nn.Module):
            model, params = params, trainable(params, adapter)
        elif not isinstance(params, Tensor):
            params = list(params)
        self._model = model
        self._sides: list[Side] = []
        self._stacks: list[Stack] = []
        self._pairs: list[LoraPair] = []
        self._scratch = Scratch()
        self._ready = False
        super().__init__(params, defaults)
        for group in self.param_groups:
            self._check_group(group)
        try:
            self._index_pairs()
            if require_pairs and not self._pairs:
                found = describe_search(model) if model is not None else describe_names(self.param_groups)
                raise ValueError(f"no LoRA pair found: {found}. Pass the model itself, or require_pairs=False")
            self._check_pairs()
        except Exception:
            self._release()
            raise
        self._ready = True

    # ------------------------------------------------------------------ pairs and groups

    @property
    def pairs(self) -> list[LoraPair]:
        """The pairs this optimizer trains, in module order."""
        return list(self._pairs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; pairs that it completes are found, and nothing is added if it is refused."""
        super().add_param_group(param_group)
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

    def _check_group(self, g: dict[str, Any]) -> None:
        """Validate the hyper-parameters that every subclass has."""
        check("lr", g["lr"], is_number(g["lr"]) and (isinstance(g["lr"], Tensor) or g["lr"] >= 0), "a number ≥ 0")
        betas = g["betas"]
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        check("betas", betas, pair and all(is_number(b) and 0 <= b < 1 for b in betas), "two numbers in [0, 1)")
        check("eps", g["eps"], is_number(g["eps"]) and g["eps"] >= 0, "a number ≥ 0")
        decay = g["weight_decay"]
        check("weight_decay", decay, is_number(decay) and decay >= 0, "a number ≥ 0")

    def _release(self) -> None:
        """Leave the model as it was found; subclasses that put hooks on it remove them."""

    def _check_pairs(self) -> None:
        """Validate what concerns a pair's two groups together; subclasses add to it."""

    def _index_pairs(self) -> None:
        """Find the pairs among the parameters; cheap enough to repeat when groups or parameters change."""
        groups = {p: g for g in self.param_groups for p in g["params"]}
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

    def _note_params(self) -> None:
        """Note what depends on which objects the parameters are now."""
        self._stacks = []
        paired = {s.param for s in self._sides}
        self._others = [[p for p in g["params"] if p not in paired] for g in self.param_groups]
        self._places = Places(self._model, self.param_groups)
        self._shared_by = groups_of(p for g in self.param_groups for p in g["params"])

    def _follow(self) -> None:
        """Take the parameters that a framework has put in place of ours; pairs and what was observed of them stay."""
        if self._places.adopt(self.param_groups, self.state, self._sides):
            self._note_params()
        else:
            self._index_pairs()

    # ------------------------------------------------------------------ one step

    def _check_capture(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            check("capturable", False, all(g.get("capturable") for g in self.param_groups), "True to capture a step")

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _gather(self) -> tuple[list[Stack], dict[int, list[Tensor]]]:
        """Return the stacks with gradients, loaded, and by group the other parameters with gradients."""
        self._read_grads()
        idle = [s.param for s in self._sides if s.grad is None]
        if self._places.moved(itertools.chain(idle, (p for ps in self._others for p in ps if p.grad is None))):
            self._follow()
            self._read_grads()
        others = {i: [p for p in params if p.grad is not None] for i, params in enumerate(self._others)}
        grads = [*(s.grad for s in self._sides), *(p.grad for params in others.values() for p in params)]
        if any(g is not None and g.layout is not torch.strided for g in grads):
            raise RuntimeError("sparse gradients are not supported; use dense ones, or another optimizer for them")
        self._places.look_after(grads)
        self._assemble()
        scale = getattr(self, "grad_scale", None)
        stacks = [s for s in self._stacks if s.live]
        for stack in stacks if self._stacked else ():
            stack.load_grads(scale, listed=self._ops.on_kernels(stack.device))
        return stacks, others

    def _read_grads(self) -> None:
        for side in self._sides:
            side.grad = side.param.grad

    def _assemble(self) -> None:
        """Bring the stacks in line with which parameters have gradients now. Usually nothing changes."""
        kept = []
        for stack in self._stacks:
            live = [s.grad is not None for s in stack.sides]
            if stack.bound(self.state) and (all(live) or not any(live)):
                kept.append(stack)
        stacked = {id(s) for stack in kept for s in stack.sides}
        if len(stacked) == len(self._sides):
            return
        loose = [s for s in self._sides if id(s) not in stacked and (s.grad is not None or self.state.get(s.param))]
        live_now = [s for s in loose if s.grad is not None]
        resting = [s for s in loose if s.grad is None]
        fresh = [*partition(live_now, self.state), *partition(resting, self.state)]
        for stack in fresh:
            stack.bind(self.state, self._small_state(stack))
        self._stacks = kept + fresh

    def _small_state(self, stack: Stack) -> dict[str, Tensor]:
        """Return prototypes of the per-matrix state a subclass keeps beside Adam's."""
        return {}

    def _found_inf(self, stacks: Sequence[Stack], others: dict[int, list[Tensor]]) -> dict[torch.device, Tensor]:
        """Return, per device, a 0-d float that is 1 if any gradient of this step is not finite, anywhere."""
        grads = [g for s in stacks for g in (s.grads if isinstance(s.grads, list) else [s.grads])]
        grads += [p.grad for ps in others.values() for p in ps]
        devices = {s.device for s in stacks} | {p.device for ps in others.values() for p in ps}
        scaler = getattr(self, "found_inf", None)
        return any_nonfinite([g for g in grads if g is not None], scaler, list(devices), self._shared_by)

    def _update_others(self, others: dict[int, list[Tensor]], found_inf: dict[torch.device, Tensor]) -> None:
        """AdamW on the parameters outside pairs: torch's own."""
        scale = getattr(self, "grad_scale", None)
        for i, params in others.items():
            g = self.param_groups[i]
            for device in {p.device for p in params}:
                self._adamw(g, [p for p in params if p.device == device], scale, found_inf[device])

    def _adamw(self, g: dict[str, Any], params: list[Tensor], scale: Tensor | None, found_inf: Tensor) -> None:
        cpu = params[0].device.type == "cpu"
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if cpu and found_inf.item():  # reading a CPU tensor waits for nobody
            return
        grads = [p.grad for p in params]
        if scale is not None:
            grads = [g_.div(scale.to(g_.device)) for g_ in grads if g_ is not None]
        column = {key: [local(self.state[p][key]) for p in params] for key in ("exp_avg", "exp_avg_sq", "step")}
        params, grads = [local(p) for p in params], [local(g_) for g_ in grads]
        adamw(
            params, grads, column["exp_avg"], column["exp_avg_sq"], [], column["step"],
            fused=None if cpu else True, foreach=False if cpu else None, found_inf=None if cpu else found_inf,
            amsgrad=False, beta1=g["betas"][0], beta2=g["betas"][1], lr=g["lr"], weight_decay=g["weight_decay"],
            eps=g["eps"], maximize=g["maximize"],
        )  # fmt: skip

    # ------------------------------------------------------------------ saving, loading, copying

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("_model", "_adapter")}
        return {**super().__getstate__(), **own, "_backend": self._ops.backend}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does; refuses state of other shapes before changing anything, and keeps dtypes.

        Raises:
            ValueError: the saved state of a parameter has another shape (for instance another rank).
        """
        if self._places.moved(iter(())):
            self._follow()
        final: dict[str, Any] = {}  # what loads, after the user's own pre-hooks

        def look(_: Any, found: dict[str, Any]) -> None:
            loading.check_fits(self.param_groups, found)
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
        if backend is not None:  # a copy or a pickle, not load_state_dict
            self._ops = Ops(backend)
            self._sides, self._stacks, self._scratch, self._ready = [], [], Scratch(), True
        self._index_pairs()
