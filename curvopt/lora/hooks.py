"""What all hooks share: they reference their owner weakly, and determine to which gradient a signal belongs.

A signal of a backward pass is counted once the gradient to which it contributes has been added to ``.grad``.
`torch.autograd.grad` adds to none, so that nothing is counted. The version counter shows whether the present gradient
continues the previous one: accumulation in place raises it by one, while a gradient that was set to None, or zeroed in
between, has another version.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class Watch:
    """What stands on the model: weak references only, and nothing at all once copied or pickled.

    Args:
        owner: Weak reference to the object that gathers.
        record: Weak reference to what it keeps for one pair.
    """

    def __init__(self, owner: Any = None, record: Any = None):
        self._owner, self._record = owner, record

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return type(self), ()  # copies of the model are not watched

    def alive(self) -> tuple[Any, Any]:
        """Return the owner and the record; None for what is gone."""
        return (None, None) if self._owner is None else (self._owner(), self._record())


class PairHooks:
    """Which hooks stand for each pair, and on which objects; they are removed with this object at the latest."""

    def __init__(self) -> None:
        self._on: dict[Any, tuple[Any, ...]] = {}
        self._handles: dict[Any, list[RemovableHandle]] = {}
        weakref.finalize(self, _remove_all, self._handles)

    def __bool__(self) -> bool:
        return bool(self._handles)

    def __contains__(self, pair: Any) -> bool:
        return pair in self._on

    def stand_on(self, pair: Any, things: Sequence[Any]) -> bool:
        """Whether the hooks of a pair stand on these very objects."""
        on = self._on.get(pair)
        return on is not None and len(on) == len(things) and all(a is b() for a, b in zip(things, on, strict=True))

    def put(self, pair: Any, things: Sequence[Any], handles: list[RemovableHandle]) -> None:
        """Note the hooks of a pair, and the objects they stand on."""
        self._on[pair], self._handles[pair] = tuple(map(weakref.ref, things)), handles

    def remove(self, pair: Any) -> None:
        """Remove the hooks of a pair, if there are any."""
        for handle in self._handles.pop(pair, ()):
            handle.remove()
        self._on.pop(pair, None)

    def remove_all(self) -> None:
        """Remove the hooks of all pairs."""
        for pair in list(self._on):
            self.remove(pair)


def _remove_all(handles: dict[Any, list[RemovableHandle]]) -> None:
    for own in handles.values():
        for handle in own:
            handle.remove()


class Arrival(Watch):
    """Stands on A or B: its gradient has been added to ``.grad``, and the owner's ``arrived`` is called."""

    def __call__(self, param: Tensor) -> None:
        """Tell the owner."""
        owner, record = self.alive()
        if owner is not None and record is not None and param.grad is not None:
            owner.arrived(record, param.grad)


def on_arrival(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Put a hook on a leaf that is called after each accumulation into its ``.grad``."""
    # PyTorch takes such hooks only while the tensor requires a gradient; it stays when that changes
    wanted = param.requires_grad
    handle: RemovableHandle = param.requires_grad_().register_post_accumulate_grad_hook(hook)
    param.requires_grad_(wanted)
    return handle


def continues(grad: Tensor, version: int, many: bool) -> bool:
    """Whether a gradient is the one that had this version when it arrived last, with something added.

    Args:
        grad: What stands in ``.grad``, right after an accumulation.
        version: Its version counter after the accumulation before; −1 if there was none.
        many: Over several processes wrappers write into gradients, too: there only a version that has not grown tells
            that the gradient is another.
    """
    return grad._version > version if many else grad._version == version + 1


def backward_pass() -> int:
    """Return the number of the backward pass that is running on this thread; −1 outside of one."""
    return torch._C._current_graph_task_id()
