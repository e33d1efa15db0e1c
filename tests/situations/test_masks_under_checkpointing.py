"""Masks of rows belong to the forward pass they were set for, also where it is computed anew in the backward."""

import models
import pytest
import torch

from curvopt.lora import Capture, find_lora_pairs

ROWS = 18  # of a batch: 6 sequences of 3
MASKS = [(torch.arange(ROWS) < n).float() for n in (5, 11, 18)]


def summed(checkpointing, schedule):
    model = models.mlp(checkpointing=checkpointing).train()
    capture = Capture(find_lora_pairs(model))
    capture.attach()

    def forward(i):
        capture.mask = MASKS[i]
        return models.loss(model, i)

    SCHEDULES[schedule](forward)
    return [(sums.both, float(sums.n), sums.calls) for sums in capture.pop().values()]


def one_by_one(forward):
    for i in range(3):
        forward(i).backward()


def of_the_sum(forward):
    sum(forward(i) for i in range(3)).backward()


def first_first(forward):
    for loss in [forward(i) for i in range(3)]:
        loss.backward()


def last_first(forward):
    for loss in reversed([forward(i) for i in range(3)]):
        loss.backward()


def after_a_look(forward):
    """A pass without gradients that nobody computes anew, as of a reference for a policy's ratio."""
    with torch.no_grad():
        forward(2)
    of_the_sum(forward)


SCHEDULES = {f.__name__: f for f in (one_by_one, of_the_sum, first_first, last_first, after_a_look)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
def test_every_pass_has_its_own_mask(checkpointing, schedule):
    """As one forward and one backward after the other, without checkpointing."""
    expected = summed(None, "one_by_one")
    assert [n for _, n, _ in expected] == [5 + 11 + 18] * 3
    found = summed(checkpointing, schedule)
    assert len(found) == 3
    for (both, n, calls), (both_0, n_0, calls_0) in zip(found, expected, strict=True):
        assert (n, calls) == (n_0, calls_0)
        # the same products summed in another order
        torch.testing.assert_close(both, both_0, rtol=1e-12, atol=1e-15)
