"""Recording a run: one line of JSON per record, from which every plot can be drawn afterwards."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from curvopt.analysis.core import cores, paired, unwrapped
from curvopt.analysis.drift import PairDrift, gathered, pair_drift
from curvopt.analysis.spectra import Spectrum, spectrum
from curvopt.optim import PairedOptimizer
from curvopt.optim.checking import check

OWN = ("step", "time", "optimizer", "drift", "pairs", "skipped_updates")
DIGITS = 6
PART = 1 << 16


class Recorder:
    """Writes what an optimizer does to a JSONL file, one line per record.

    Usable from any loop. An existing file is continued, and a last line that a crash cut off is dropped. A resumed run
    may record steps again: `read` keeps the newest.

    Under several processes all of them record, and one writes: reading sharded parameters (FSDP2) gathers them, which
    waits for everybody.

    .. code-block:: python

        with Recorder("run.jsonl", every=50) as recorder:
            for step, batch in enumerate(batches, 1):
                ...
                recorder.record(optimizer, step, loss=loss)

        recorder = Recorder("run.jsonl", every=50, write=dist.get_rank() == 0)  # in each of several processes

    Args:
        path: the file; its folder is created.
        every: record only steps that are a multiple of it. A record with spectra synchronises with the device and takes
            two thin QR factorisations per pair, so choose a large number.
        model: where to find the pairs of an optimizer that is not one of curvopt's.
        spectra: False records scalars only.
        tensorboard: a folder for torch's ``SummaryWriter``, beside the file; needs the package ``tensorboard``.
        write: False reads what is due, as the others do, but leaves file and folder alone.

    Raises:
        ValueError: ``every`` is not a positive integer, or ``write`` neither True nor False.
        ModuleNotFoundError: ``tensorboard`` was asked for and is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        every: int = 1,
        *,
        model: nn.Module | None = None,
        spectra: bool = True,
        tensorboard: str | Path | None = None,
        write: bool = True,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an integer ≥ 1, got {every!r}")
        check("write", write, isinstance(write, bool), "True or False")
        self.path, self.every, self.write = Path(path), every, write
        self._model, self._spectra = model, spectra
        self._writer = None if tensorboard is None or not write else _summary_writer(tensorboard)
        self._step = 0
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            last = _mended(self.path)
            self._step = 0 if last is None else int(last.get("step", 0))

    def record(self, optimizer: torch.optim.Optimizer | None, step: int | None = None, **scalars: Any) -> bool:
        """Read what is due at ``step`` and write one line of it; returns whether the step was due.

        Args:
            optimizer: whose pairs to read, or accelerate's wrapper of it; None for scalars alone.
            step: the step; None for the optimizer's own count of steps, or one more than at the last call, for which
                the file must be this process's own.
            scalars: numbers or one-element tensors, such as ``loss`` or ``retain_loss``.

        Raises:
            ValueError: a scalar has a name that records use themselves, or is not one number; or ``step`` is None where
                only the file could tell it and ``write`` is False.
        """
        self._step = self._count(optimizer) if step is None else int(step)
        if self._step % self.every:
            return False
        entry: dict[str, Any] = {"step": self._step, "time": round(time.time(), 3)}
        for name, value in scalars.items():
            if name in OWN:
                raise ValueError(f"scalar name {name!r} is used by the record itself; not allowed are {', '.join(OWN)}")
            entry[name] = _number(name, value)
        if optimizer is not None:
            entry |= reading(optimizer, self._model, self._spectra)
        if not self.write:
            return True
        line = json.dumps(_plain(entry), allow_nan=False, separators=(",", ":"))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self._writer is not None:
            self._to_tensorboard(entry)
        return True

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """Return the records of a file by ascending step.

        Records of one step are merged; later values take precedence. If the step number goes back, the run was resumed:
        earlier records from that step on are dropped. A truncated last line is left out. NaN and infinity become None.

        Raises:
            OSError: the file cannot be read.
            ValueError: a line before the last is not a record; the message names file and line.
        """
        lines = Path(path).read_bytes().split(b"\n")
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            entry = _parsed(line)
            if entry is None and line.strip() and number < len(lines):
                raise ValueError(f"{path}, line {number}: not a record: {line[:60]!r}")
            if entry is None:
                continue
            while records and records[-1]["step"] > entry["step"]:
                records.pop()
            if records and records[-1]["step"] == entry["step"]:
                entry = records.pop() | entry
            records.append(entry)
        return records

    def close(self) -> None:
        """Close the TensorBoard writer; the file is complete after every record."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, optimizer: torch.optim.Optimizer | None) -> int:
        states = [] if optimizer is None else optimizer.state.values()
        counts = [int(s["cadence"][0]) for s in states if "cadence" in s]
        # the process that writes goes on from the file's last step, which the others do not know
        check("step", None, bool(counts) or self.write, "an integer where write=False and the optimizer has no count")
        return max(counts) if counts else self._step + 1

    def _to_tensorboard(self, entry: dict[str, Any]) -> None:
        """Scalars by name, the drift under drift/, mean ranks by projection under rank/."""
        told = {name: value for name, value in entry.items() if name not in OWN}
        told |= {f"drift/{name}": value for name, value in entry.get("drift", {}).items()}
        by_projection: dict[str, list[int]] = {}
        for pair in entry.get("pairs", {}).values():
            by_projection.setdefault(pair["projection"], []).append(pair["rank"])
        told |= {f"rank/{word}": sum(ranks) / len(ranks) for word, ranks in by_projection.items()}
        writer: Any = self._writer
        for name, value in told.items():
            if value is not None:
                writer.add_scalar(name, value, self._step)
        writer.flush()


def reading(optimizer: torch.optim.Optimizer, model: nn.Module | None = None, spectra: bool = True) -> dict[str, Any]:
    """Return the part of a record that an optimizer fills: its name, its drift, and each pair.

    The name and the skipped updates are those of the optimizer at work, inside accelerate's wrapper or behind a
    GoRAInit that has handed over.
    """
    at_work, ours = unwrapped(optimizer), paired(optimizer)
    out: dict[str, Any] = {"optimizer": type(at_work).__name__}
    if isinstance(at_work, PairedOptimizer):
        skipped = [float(s["skipped"]) for s in at_work.state.values() if "skipped" in s]
        out["skipped_updates"] = int(max(skipped, default=0))
    where = ours if isinstance(ours, PairedOptimizer) else model
    if where is None or not spectra:
        return out
    found = [(spectrum(c), pair_drift(c)) for c in cores(where)]
    if not found:  # tensors without names have no partner: nothing is known of any update
        return out
    whole = asdict(gathered([moved for _, moved in found]))
    del whole["pairs"]
    return out | {"drift": whole, "pairs": {s.name: pair_entry(s, moved) for s, moved in found}}


def pair_entry(s: Spectrum, moved: PairDrift | None = None) -> dict[str, Any]:
    """Return what a record holds of one pair."""
    entry = s.to_dict()
    del entry["name"]
    if moved is not None:
        entry |= {key: getattr(moved, key) for key in ("norm", "r_eff", "rho_align", "pi_proj")}
    return entry


def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError("tensorboard= needs the package tensorboard, which is not installed") from error
    return SummaryWriter(str(folder))


def _number(name: str, value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"scalar {name} must be one number, got {value!r}") from None


def _plain(value: Any) -> Any:
    """Return a value as strict JSON has it: six digits, None for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return (float(f"{value:.{DIGITS}g}") if abs(value) < 1e9 else value) if math.isfinite(value) else None
    return value


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:  # of which UnicodeDecodeError is one
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _mended(path: Path) -> dict[str, Any] | None:
    """Drop a last line that was cut off, end the last whole one, and return it; None without any."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        start, tail = size, b""
        while start > 0 and tail.rstrip(b"\n").count(b"\n") < 2:  # the last two lines are enough
            start = max(0, start - PART)
            file.seek(start)
            tail = file.read(size - start)
        *whole, last = tail.split(b"\n")
        if last and _parsed(last) is not None:
            file.seek(0, 2)
            file.write(b"\n")
        elif last:
            file.truncate(size - len(last))
        return _parsed(last) or _parsed(whole[-1] if whole else b"")
