"""What a step leaves behind."""

import gc
import weakref

import models
import torch

from curvopt import GritKFAC


def test_gradients_are_let_go():
    """Nothing keeps a gradient alive after zero_grad: its memory is free for the next forward."""
    model = models.mlp(torch.float32)
    optimizer = GritKFAC(model, lr=1e-2)
    models.loss(model, 0).backward()
    grads = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert all(ref() is not None for ref in grads)
    optimizer.zero_grad()
    gc.collect()
    assert [ref for ref in grads if ref() is not None] == []
