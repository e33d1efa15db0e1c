"""The doctor's report: findings with advice, facts by pair, and a readable text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from curvopt.analysis.core import layer_of

SEVERITIES = ("error", "warning", "note")
SHOWN = 3  # pairs named in the text; `to_dict` has all


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        severity: "error" (training is wrong), "warning" (curvature or ranks do not work as requested) or "note" (worth
            knowing, nothing to fix).
        kind: a stable name for programs: "silent hooks", "stale parameters", ...
        what: what was found.
        todo: what to do about it.
        pairs: names of the pairs, or of the parameters and layers, it is about.
    """

    severity: str
    kind: str
    what: str
    todo: str
    pairs: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = ", ".join(self.pairs[:SHOWN])
        more = f" and {len(self.pairs) - SHOWN} more" if len(self.pairs) > SHOWN else ""
        where = f" [{named}{more}]" if named else ""
        return f"{self.severity.upper()} {self.kind}: {self.what}{where}\n    → {self.todo}"


@dataclass(frozen=True)
class Report:
    """What `doctor` found.

    Attributes:
        subject: what was examined.
        findings: the most severe first.
        pairs: facts by pair name: rank, full_rank, energy (σ_i²), effective_rank, update_rank, norm, rows, statistics,
            and for A and B condition and scalar_distance, as far as they are known.
        facts: facts about the whole run: steps, skipped_updates, state_bytes, parameter_bytes, norm, ...
    """

    subject: str
    findings: list[Finding]
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether there is no error and no warning."""
        return all(f.severity == "note" for f in self.findings)

    def kinds(self) -> set[str]:
        """Return the kinds of all findings."""
        return {f.kind for f in self.findings}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values; non-finite numbers become None."""
        return _plain({**asdict(self), "healthy": self.healthy})

    def __str__(self) -> str:
        lines = [self.subject, *_facts(self.facts), *_table(self.pairs)]
        verdict = "healthy" if self.healthy else "needs attention"
        count = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
        told = ", ".join(f"{n} {s}{'s' if n > 1 else ''}" for s, n in count.items() if n)
        return "\n".join([*lines, f"{verdict}: {told or 'nothing found'}", *map(str, self.findings)])


def report(subject: str, findings: Sequence[Finding], pairs: Mapping[str, Any], facts: Mapping[str, Any]) -> Report:
    """Return a report with the findings in order of severity."""
    ordered = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
    return Report(subject, ordered, dict(pairs), dict(facts))


def _facts(facts: Mapping[str, Any]) -> list[str]:
    told = {key.replace("_", " "): value for key, value in facts.items() if value is not None and value != []}
    for key in ("state bytes", "parameter bytes"):
        if key in told:
            told[key] = f"{told[key]:,}"
    words = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in told.items()]
    return ["  " + ", ".join(words)] if words else []


# column → what it shows of the pairs of one projection
_COLUMNS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "pairs": lambda ps: str(len(ps)),
    "rank": lambda ps: _range([p.get("rank") for p in ps]),
    "of": lambda ps: _range([p.get("full_rank") for p in ps]),
    "of curvature": lambda ps: _range([p.get("effective_rank") for p in ps]),
    "of ΔW": lambda ps: _range([p.get("update_rank") for p in ps]),
    "‖ΔW‖": lambda ps: _range([p.get("norm") for p in ps]),
    "condition": lambda ps: _range([p.get(side, {}).get("condition") for p in ps for side in "AB"]),
    "from scalar": lambda ps: _range([p.get(side, {}).get("scalar_distance") for p in ps for side in "AB"]),
    "outer share": lambda ps: _range([share for p in ps for share in p.get("outer", {}).values()]),
}
MOST_ROWS = 16


def _table(pairs: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return one line per projection, each cell a value or least..mean..most; columns nobody knows are left out."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, p in pairs.items():
        groups.setdefault(layer_of(name)[1], []).append(p)
    if not groups:
        return []
    names = list(groups)
    if len(names) > MOST_ROWS:
        names = names[: MOST_ROWS - 1]
        groups = {word: groups[word] for word in names} | {
            "others": [p for word, ps in groups.items() if word not in names for p in ps]
        }
    cells = {title: [show(ps) for ps in groups.values()] for title, show in _COLUMNS.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    rows = [
        ["least..mean..most", *cells],
        *([word, *(column[i] for column in cells.values())] for i, word in enumerate(groups)),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _range(values: Sequence[float | None]) -> str:
    known = [float(v) for v in values if v is not None]
    if not known:
        return ""
    low, mean, high = (f"{v:.3g}" for v in (min(known), fmean(known), max(known)))
    return low if low == high else f"{low}..{mean}..{high}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
