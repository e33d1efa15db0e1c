"""What all hooks share: they reference their owner weakly, and determine to which gradient a signal belongs.

A signal of a backward pass is counted once the gradient to which it contributes has been added to ``.grad``.
`torch.autograd.grad` adds to none, so that nothing is counted. The version counter shows whether the present gradient
continues the previous one: accumulation in place raises it by one, while a gradient that was set to None, or zeroed in
between, has another version.
"""

from __future__ import annotations

from typing import Any

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


class Arrival(Watch):
    """Stands on A or B: its gradient has been added to ``.grad``, and the owner's ``arrived`` is called.

    Args:
        owner: As in `Watch`.
        record: As in `Watch`.
        of_A: Whether the parameter is A.
    """

    def __init__(self, owner: Any = None, record: Any = None, of_A: bool = False):
        super().__init__(owner, record)
        self._of_A = of_A

    def __call__(self, param: Tensor) -> None:
        """Tell the owner."""
        owner, record = self.alive()
        if owner is not None and record is not None and param.grad is not None:
            owner.arrived(record, param.grad, self._of_A)


def on_arrival(param: Tensor, hook: Arrival) -> RemovableHandle:
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
