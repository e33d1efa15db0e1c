"""The soak in small, in one process, and that it notices what it is for."""

from collections import Counter

import models
import pytest
import soak


@pytest.mark.parametrize("name", soak.MAKES)
def test_a_short_soak_is_accounted_for(name, tmp_path):
    calm, stormy = (soak.Run(name, tmp_path, faulty) for faulty in (False, True))
    for run in (calm, stormy):
        run.go(60, 5, quiet=True)
    planned = Counter(spoil for some in soak.accidents(60, 5).values() for spoil in some)
    assert stormy.counts == planned and set(planned) == set(soak.FAULTS)
    assert soak.counted(stormy) == 0  # the scaler leaves such steps out by itself
    ends = [models.snapshot(run.model, run.optimizer) for run in (calm, stormy)]
    assert soak.differing(*ends) == []
    stormy.once(60)
    assert soak.differing(ends[0], models.snapshot(stormy.model, stormy.optimizer)) != []
