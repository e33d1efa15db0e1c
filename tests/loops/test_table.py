"""Every loop × every property: each cell of the table in docs/loops.md is a test here."""

import re
from pathlib import Path

import loopkit
import loopkit_frameworks as frameworks
import models
import pytest

LOOPS = [*loopkit.LOOPS, *frameworks.LOOPS]
STEPS, CUT = 6, 4

CELLS = [
    pytest.param(loop, make, id=f"{make.__name__}-{re.sub(r'[^a-zA-Z0-9_]+', '-', loop.name).strip('-')}")
    for make in loopkit.OPTIMIZERS
    for loop in LOOPS
    if loop.name not in make.not_in
]
cells = pytest.mark.parametrize(("loop", "make"), CELLS)


@cells
def test_equals_the_plain_loop(loop, make):
    run = loop.start(make)
    run.train(0, STEPS, False)
    expected = loop.like(make, STEPS)
    if loop.by_loss:
        assert run.losses == pytest.approx(expected, rel=loop.rtol) and run.losses != expected
    elif loop.rtol == 0:
        found = run.snapshot()
        # the loss scale stays in S_d, and cancels in all that is made of it
        ignore = ("factor",) if "GradScaler" in loop.name else ()
        models.assert_same({name: found[name] for name in expected}, expected, ignore)
    else:
        found = run.snapshot()
        models.assert_near({name: found[name] for name in expected}, expected, loop.rtol, loop.rtol)
    assert any("/exp_avg" in name for name in run.snapshot()) and all(
        p.isfinite().all() for p in run.model.parameters()
    )


@cells
def test_a_broken_step_changes_nothing_and_is_counted(loop, make):
    run = loop.start(make)
    run.train(0, CUT, False)
    before = run.snapshot()
    run.train(CUT, CUT + 2, True)
    models.assert_same(run.snapshot(), before, ignore=("skipped", "cadence"))
    # a scaler leaves the step out by itself, as with AdamW
    assert run.skipped() == {0.0 if "GradScaler" in loop.name else 2 / loop.turns}
    run.train(CUT, STEPS, False)
    assert models.differences(run.snapshot(), before) != []
    assert all(p.isfinite().all() for p in run.model.parameters())


@cells
def test_resumes_bit_for_bit(loop, make):
    run = loop.start(make)
    run.train(0, CUT, False)
    other = loopkit.resumed(loop, make, run)
    run.train(CUT, STEPS, False)
    other.train(CUT, STEPS, False)
    models.assert_same(other.snapshot(), run.snapshot())


@pytest.mark.parametrize(("loop", "make"), [cell for cell in CELLS if cell.values[1].observes])
def test_every_row_is_observed_once(loop, make):
    """As many rows as the batches have tokens: no hook is silent, none counts a recomputation, none counts twice."""
    run = loop.start(make)
    run.train(0, STEPS, False)
    report = run.optimizer.diagnostics()
    tokens = models.llama_ids(0).numel() if hasattr(run.model, "peft_config") else 18
    assert {pair["rows"] for pair in report["pairs"].values() if "rows" in pair} == {STEPS * tokens / loop.turns}
    assert report["silent"] == []


# ---------------------------------------------------------------------------------------------- the table


def table() -> str:
    """The table of docs/loops.md, as it follows from the loops and the tests above."""
    lines = [
        "| loop | equals the plain loop | a broken step changes nothing | resumes bit for bit | every row seen once |",
        "|---|---|---|---|---|",
    ]
    for loop in LOOPS:
        equal = "bit for bit" if loop.rtol == 0 else f"to {loop.rtol:.0e} ({loop.because})"
        lines.append(f"| {loop.name} | {equal} | ✓ | ✓ | ✓ |")
    return "\n".join(lines)


def test_the_documented_table_is_this_one():
    text = (Path(__file__).parents[2] / "docs" / "loops.md").read_text(encoding="utf-8")
    assert table() in text, f"docs/loops.md should contain:\n{table()}"


def test_the_comparison_has_teeth():
    """A run that misses a batch, a half of one, or the second token of its clock is told from the plain one."""
    make = loopkit.OPTIMIZERS[0]
    whole = loopkit.like_plain(make, STEPS)
    for spoil in ("batch", "half", "clock"):
        run = loopkit.plain(make)
        run.train(0, STEPS - 1, False)
        if spoil == "clock":
            for bucket in run.optimizer.buckets:
                bucket.tick()
        if spoil == "half":
            run.optimizer.zero_grad()
            loopkit.token_loss(run.model, *loopkit.halves(run.model, STEPS - 1)[0]).backward()
            run.optimizer.step()
        else:
            run.train(STEPS - (spoil == "clock"), STEPS + (spoil == "batch"), False)
        with pytest.raises(AssertionError):
            models.assert_near(run.snapshot(), whole, 1e-8, 1e-8)
