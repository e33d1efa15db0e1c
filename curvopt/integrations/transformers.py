"""transformers' Trainer: a callback that logs the optimizer's diagnostics, and a factory that creates it.

.. code-block:: python

    trainer = Trainer(model, args, optimizer_cls_and_kwargs=(OptimizerFactory, {"args": args}), ...)
    CurvatureCallback(compact=True).install(trainer)
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curvopt import GritKFAC
from curvopt.analysis import Recorder
from curvopt.analysis.core import unwrapped
from curvopt.integrations.factory import build_optimizer
from curvopt.optim.checking import check, is_whole

log = logging.getLogger(__name__)


class OptimizerFactory:
    """Builds an optimizer from the model, in the form of Trainer's ``optimizer_cls_and_kwargs``.

    Trainer applies neither its learning rate nor its other optimizer arguments to a custom optimizer, and removes a
    "model" entry from the kwargs it was given; a factory needs none, so the same kwargs serve again (``model_init``,
    hyper-parameter search).
    """

    def __call__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        optimizer: str | Callable[..., Optimizer] = GritKFAC,
        **kwargs: Any,
    ) -> Optimizer:
        """Return the optimizer of a model.

        Weight decay acts on matrices: adapters and saved modules, but no biases and norms, as Trainer has it.

        Args:
            model: the model, before Trainer wraps it.
            args: where lr, betas, eps and weight decay come from if ``kwargs`` do not say. Betas that are the defaults
                of the arguments' class, (0.9, 0.999) in transformers, count as not said, since nothing tells them from
                a choice: the optimizer then has its own. Give ``betas`` among ``kwargs`` to choose those.
            optimizer: the class, which is called with param groups and ``model=``; or a name that
                `curvopt.integrations.build_optimizer` knows.
            kwargs: the optimizer's arguments; strings are parsed.
        """
        if args is not None:
            said = {"lr": args.learning_rate, "eps": args.adam_epsilon, "weight_decay": args.weight_decay}
            betas = (args.adam_beta1, args.adam_beta2)
            if betas != default_betas(args):
                said["betas"] = betas
            elif "betas" not in kwargs:
                log.info("betas: the optimizer's own; %s are the defaults of the training arguments", betas)
            kwargs = {**said, **kwargs}
        return build_optimizer(model, optimizer, **kwargs)


def default_betas(args: TrainingArguments) -> tuple[float, float]:
    """Return what the class of the arguments has for ``adam_beta1`` and ``adam_beta2`` where nobody says anything."""
    by_name: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(args)}
    return by_name["adam_beta1"], by_name["adam_beta2"]


class CurvatureCallback(TrainerCallback):
    """Logs ranks, spectra and skipped updates beside Trainer's own numbers; compacts at the end if asked.

    With every log come ``curvopt/mean_rank``, ``min_rank``, ``max_rank``, ``kept_share`` (directions kept, of all
    that the adapters began with), ``effective_rank`` (mean of exp of the entropy of σ²) and ``skipped_updates``;
    they are also in ``trainer.state.log_history``.

    While it trains, padding is kept out of the statistics, as the batches' ``attention_mask`` says (`mask_padding`).

    Args:
        compact: at the end of training slice every adapter to its live rank, so that ``save_model`` saves it small.
        path: where `curvopt.analysis.Recorder` keeps a record by pair; None for none. All processes read, since sharded
            parameters are gathered for it, and the first writes.
        every: steps between two records.
        prefix: what the names begin with.
        mask_padding: False leaves padding in the statistics.

    Raises:
        ValueError: ``every`` is not a positive integer; or, when training begins, ``compact`` with
            ``load_best_model_at_end``: the ranks at the end are not those of the best model.
    """

    def __init__(
        self,
        *,
        compact: bool = False,
        path: str | Path | None = None,
        every: int = 50,
        prefix: str = "curvopt/",
        mask_padding: bool = True,
    ) -> None:
        self.compact = compact
        self.prefix = prefix
        self.mask_padding = mask_padding
        self._hook: RemovableHandle | None = None
        self._full: dict[str, int] = {}
        check("every", every, is_whole(every) and every >= 1, "an integer ≥ 1")
        self._path, self._every = path, every
        self._recorder: Recorder | None = None

    def install(self, trainer: Trainer) -> CurvatureCallback:
        """Add this callback before the reporters, so that they see its numbers; return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse settings that cannot go together; remember the ranks; open the record; watch for masks."""
        if self.compact and args.load_best_model_at_end:
            raise ValueError(
                "compact must be False with load_best_model_at_end=True, got True: "
                "the ranks at the end are not those of the best model"
            )
        optimizer = unwrapped(kwargs["optimizer"])
        shrinks = any(g.get("rank_threshold") is not None for g in getattr(optimizer, "param_groups", ()))
        for pair in getattr(optimizer, "pairs", ()):
            if self.compact and shrinks and pair.module is None:
                raise ValueError(
                    "compact must be False with an optimizer that knows its parameters by their names alone, got True: "
                    "give the optimizer the model, or model="
                )
            self._full.setdefault(pair.name, pair.rank)
        if self._path is not None and self._recorder is None:
            self._recorder = Recorder(self._path, self._every, write=state.is_world_process_zero)
        self._unhook()
        if self.mask_padding and kwargs.get("model") is not None:
            self._hook = mask_padding(kwargs["model"], kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the step."""
        if self._recorder is not None:
            self._recorder.record(kwargs["optimizer"], step=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to the log entry and to the history."""
        numbers = {self.prefix + name: value for name, value in self.summary(unwrapped(kwargs["optimizer"])).items()}
        if logs is not None:
            logs.update(numbers)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compact the adapters if asked."""
        self._unhook()
        optimizer = unwrapped(kwargs["optimizer"])
        if self.compact and hasattr(optimizer, "compact"):
            optimizer.compact()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def summary(self, optimizer: Any) -> dict[str, float]:
        """Return the numbers that are logged; reads the device."""
        if not hasattr(optimizer, "diagnostics"):
            return {}
        report = optimizer.diagnostics()
        pairs = report.get("pairs", {})
        ranks = {name: pair["rank"] for name, pair in pairs.items() if "rank" in pair}
        out: dict[str, float] = {"skipped_updates": report["skipped_updates"]} if "skipped_updates" in report else {}
        if ranks:
            full = ranks | {pair.name: pair.rank for pair in getattr(optimizer, "pairs", ())} | self._full
            whole = sum(full[name] for name in ranks)
            out |= {"mean_rank": sum(ranks.values()) / len(ranks), "kept_share": sum(ranks.values()) / whole}
            out |= {"min_rank": min(ranks.values()), "max_rank": max(ranks.values())}
        effective = [pair["effective_rank"] for pair in pairs.values() if "effective_rank" in pair]
        return out | ({"effective_rank": sum(effective) / len(effective)} if effective else {})


def mask_padding(model: nn.Module, optimizer: Any) -> RemovableHandle:
    """Keep padding out of the statistics: hand every batch's ``attention_mask`` to the optimizer.

    Args:
        model: a model of transformers, or a PEFT model around one, that is called with ``attention_mask=``, of shape
            (batch, length), 1 for a token and 0 for padding. Masks of other shapes, and calls without one, count all
            rows.
        optimizer: what trains it; anything but GritKFAC is left alone. It may be wrapped by Accelerate.

    Returns:
        The handle of the hook, whose ``remove()`` ends it.
    """
    watched = weakref.ref(optimizer)

    def tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alive = watched()
        mask_rows = None if alive is None else getattr(unwrapped(alive), "mask_rows", None)
        if mask_rows is not None:
            mask = kwargs.get("attention_mask")
            mask_rows(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)

    return model.register_forward_pre_hook(tell, with_kwargs=True)
