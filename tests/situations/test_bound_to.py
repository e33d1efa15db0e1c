"""Factories that hand over tensors without names, and cannot pass ``model=``."""

import copy
import pickle

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from situations_kit import build, steps

from curvopt import GritKFAC, MatryoshkaScaledAdam

optimizers = pytest.mark.parametrize("cls", [GritKFAC, MatryoshkaScaledAdam])


@optimizers
def test_lora_plus(cls):
    """As with the same groups and ``model=``, bit for bit."""
    model, twin = build(), build()
    optimizer = create_loraplus_optimizer(model, cls.bound_to(model), lr=1e-3, loraplus_lr_ratio=16.0, eps=1e-7)
    A, B = ([p for n, p in twin.named_parameters() if f"lora_{side}" in n] for side in "AB")
    groups = [{"params": A, "lr": 1e-3}, {"params": B, "lr": 1.6e-2}]
    other = cls(groups, model=twin, eps=1e-7)
    steps(model, optimizer, 3)
    steps(twin, other, 3)
    assert type(optimizer) is cls and len(optimizer.pairs) == 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@optimizers
def test_what_it_makes_is_of_the_class_itself(cls):
    """So that copies, pickles and ``isinstance`` know nothing of the binding."""
    model = build()
    bound = cls.bound_to(model, weight_decay=0.1)
    assert issubclass(bound, cls) and bound.__name__ == cls.__name__
    optimizer = bound([p for p in model.parameters() if p.requires_grad], 1e-2)
    assert type(optimizer) is cls and optimizer.model is model
    assert optimizer.param_groups[0]["weight_decay"] == 0.1 and optimizer.param_groups[0]["lr"] == 1e-2
    for again, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert type(other) is cls and other.model is again


@optimizers
def test_bad_bindings_are_refused(cls):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        cls.bound_to([])
    with pytest.raises(ValueError, match="no LoRA pair found"):
        cls.bound_to(torch.nn.Linear(3, 3))([p for p in build().parameters() if p.requires_grad])
