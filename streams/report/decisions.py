"""Every version of an online stage with what was decided about it, as text for the page.

Long lists stay usable: the first and the last versions, and all that were rejected, stand open; runs of others are
folded. What one page can hold is bounded; the result's JSON has all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from state.lineage.history import Version

ENDS = 4
"""Versions that stand open at either end of the list"""

FOLD_FROM = 4
"""Versions of a run that is folded: a fold takes as much room as two or three of them"""

MOST_VERSIONS = 1_000
"""Versions on one page: some 400 kB without their evidence"""

MOST_EVIDENCE = 8_000
"""Lines of evidence on one page: some 800 kB, ML-1M's 179 rounds have 6,000"""

_SETTLED = frozenset({"promoted"})
"""Stages whose versions may be folded"""


@dataclass(frozen=True, slots=True)
class Step:
    """One decision about a version."""

    kind: str
    reason: str
    evidence: tuple[str, ...]
    """One line for each cohort, in the order of the verdicts"""


@dataclass(frozen=True, slots=True)
class Row:
    """One version."""

    version: int
    parent: str
    round: int
    events: str
    steps: tuple[Step, ...]
    evidence_left_out: bool
    """The page had no room for it"""

    @property
    def path(self) -> str:
        """All stages it went through."""
        return " → ".join(step.kind for step in self.steps)

    @property
    def stage(self) -> str:
        """The latest."""
        return self.steps[-1].kind

    @property
    def reason(self) -> str:
        """Of the latest decision."""
        return self.steps[-1].reason

    @property
    def rejected(self) -> bool:
        """Whether it is to be seen at a glance."""
        return self.stage == "rejected"


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours in the list."""

    folded: bool
    title: str
    rows: tuple[Row, ...]
    left_out: int
    """Versions between these for which the page had no room"""


def decision_runs(versions: Sequence[Version]) -> tuple[Run, ...]:
    """All versions in their order, cut into runs that stand open and runs that are folded."""
    listed = _listed(versions)
    with_evidence = _with_evidence(versions, listed)
    runs: list[Run] = []
    start = 0
    for end in range(1, len(versions) + 1):
        if end == len(versions) or _foldable(versions, end) != _foldable(versions, start):
            runs.append(_run(versions, range(start, end), listed, with_evidence))
            start = end
    return tuple(_joined(runs))


def evidence_lines(evidence: Mapping[str, Any]) -> tuple[str, ...]:
    """The verdicts of ``learner.gate`` cohort by cohort; anything else as JSON."""
    verdicts = evidence.get("verdicts")
    if not isinstance(verdicts, Sequence) or isinstance(verdicts, str):
        return (json.dumps(evidence, sort_keys=True, ensure_ascii=False, default=str),) if evidence else ()
    return tuple(
        f"{verdict.get('stage', '')} · {_cohort_line(cohort)}"
        for verdict in verdicts
        for cohort in verdict.get("evidence", ())
    )


def _cohort_line(cohort: Mapping[str, Any]) -> str:
    """In nats per event, with a true minus."""
    text = f"{cohort.get('cohort')}: {cohort.get('finding')}"
    rise, lower, upper = (_signed(cohort.get(name)) for name in ("rise", "lower", "upper"))
    if rise:
        text += f", {rise}"
        if lower and upper:
            text += f" ({lower} to {upper})"
    text += f", {cohort.get('users')} users"
    return text if cohort.get("reference") is None else f"{text}, over version {cohort['reference']}"


def _signed(value: Any) -> str:
    """Empty for what is no finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return ""
    return f"{value:+.4f}".replace("-", "−")


def _foldable(versions: Sequence[Version], place: int) -> bool:
    """Whether nobody misses it at first sight."""
    return ENDS <= place < len(versions) - ENDS and versions[place].stage in _SETTLED


def _listed(versions: Sequence[Version]) -> frozenset[int]:
    """Places that the page has room for: those that stand open first, of the others as many as fit, evenly."""
    if len(versions) <= MOST_VERSIONS:
        return frozenset(range(len(versions)))
    opened = [k for k in range(len(versions)) if not _foldable(versions, k)]
    others = [k for k in range(len(versions)) if _foldable(versions, k)]
    chosen = _evenly(opened, MOST_VERSIONS)
    return frozenset((*chosen, *_evenly(others, MOST_VERSIONS - len(chosen))))


def _evenly(places: Sequence[int], most: int) -> list[int]:
    if len(places) <= most:
        return list(places)
    if most == 0:
        return []
    return [places[k] for k in np.unique(np.linspace(0, len(places) - 1, most).round().astype(int)).tolist()]


def _with_evidence(versions: Sequence[Version], listed: frozenset[int]) -> frozenset[int]:
    """Places whose evidence the page has room for: those that stand open first."""
    left, found = MOST_EVIDENCE, set()
    for place in sorted(listed, key=lambda k: (_foldable(versions, k), versions[k].stage in _SETTLED, k)):
        left -= sum(len(evidence_lines(decision.evidence)) for decision in versions[place].decisions)
        if left < 0:
            break
        found.add(place)
    return frozenset(found)


def _run(versions: Sequence[Version], places: range, listed: frozenset[int], evidence: frozenset[int]) -> Run:
    rows = tuple(_row(versions[k], k in evidence) for k in places if k in listed)
    first, last = versions[places[0]].number, versions[places[-1]].number
    title = f"Version {first}" if first == last else f"Versions {first} to {last}"
    folded = len(places) >= FOLD_FROM and _foldable(versions, places[0])
    return Run(folded, title + (f": {len(places):,} promoted" if folded else ""), rows, len(places) - len(rows))


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Neighbours that both stand open become one."""
    joined: list[Run] = []
    for run in runs:
        if joined and not run.folded and not joined[-1].folded:
            before = joined.pop()
            rows = (*before.rows, *run.rows)
            title = f"Versions {rows[0].version} to {rows[-1].version}" if rows else before.title
            run = Run(False, title, rows, before.left_out + run.left_out)
        joined.append(run)
    return joined


def _row(version: Version, with_evidence: bool) -> Row:
    record = version.record
    events = record.metrics.get("events")
    steps = tuple(
        Step(str(d.kind), d.reason, evidence_lines(d.evidence) if with_evidence else ()) for d in version.decisions
    )
    left_out = not with_evidence and any(d.evidence for d in version.decisions)
    return Row(
        version.number, "–" if record.parent is None else str(record.parent), record.round,
        "–" if events is None else f"{events:,}", steps, left_out,
    )  # fmt: skip
