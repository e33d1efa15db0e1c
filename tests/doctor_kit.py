"""Short runs for the doctor, and the one finding of a kind."""

import models
from grit_kit import rank_side


def trained(steps=4, model=None, **settings):
    """A run of a few steps, and its optimizer."""
    model = models.llama() if model is None else model
    optimizer = rank_side(model, **{"lr": 1e-2, **settings})
    models.fit(model, optimizer, steps)
    return model, optimizer


def found(report, kind):
    """The one finding of a kind."""
    (finding,) = [f for f in report.findings if f.kind == kind]
    return finding
