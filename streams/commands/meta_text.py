"""What ``coldstream meta`` prints for a human: aligned tables, and a version's record in full."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from state.lineage.difference import Difference, TensorChange
from state.lineage.history import Version
from state.lineage.record import Decision
from state.reading.point import time_text
from streams.commands.query_text import shown

COHORTS, VERDICTS, EVIDENCE, RISE = "cohorts", "verdicts", "evidence", "rise"
"""Where metrics and decisions hold cohorts, where decisions hold verdicts of ``learner.gate``, where those have
cohorts, and by how much the loss of one rose"""
_COHORT = "cohort"
"""Where a verdict names one"""
_REASON_WIDTH = 70


def worst_rise(version: Version) -> tuple[str, float] | None:
    """(cohort, nats) of the cohort whose loss rose most, by the latest evidence that says it, else by the metrics.

    Cohorts are a mapping by name, or a verdict's list. A rise that is not a number is the worst.
    """
    for values in (*(decision.evidence for decision in reversed(version.decisions)), version.record.metrics):
        rises = [(name, _number(cohort.get(RISE))) for name, cohort in _cohorts(values)]
        known = [(name, rise) for name, rise in rises if rise is not None]
        if known:
            return max(known, key=lambda each: math.inf if math.isnan(each[1]) else each[1])
    return None


def list_text(versions: Sequence[Version], current: int | None, *, torn: bool) -> str:
    """A table of all versions."""
    rows = [("version", "parent", "stage", "round", "made", "worst rise", "why")]
    for version in versions:
        worst, record = worst_rise(version), version.record
        rows.append(
            (
                str(version.number),
                "" if record.parent is None else str(record.parent),
                _stage(version, current),
                str(record.round),
                time_text(record.made_at_ms),
                "" if worst is None else f"{worst[1]:+.4f} {shown(worst[0], 30)}",
                shown(version.decisions[-1].reason, _REASON_WIDTH),
            )
        )
    note = ["note: a crash left a part of a last line; it does not count, and the next write takes it off"]
    return "\n".join([*_table(rows), *(note if torn else [])])


def show_text(version: Version, current: int | None, *, tensors: str) -> str:
    """All that is known of a version."""
    record = version.record
    lines = [
        f"version {version.number}: {_stage(version, current)}",
        f"parent        {'none' if record.parent is None else record.parent}",
        f"round         {record.round}",
        f"made          {time_text(record.made_at_ms)}",
        f"model         {shown(record.model, 64)}",
        f"serving hash  {record.serving_sha256}",
        f"tensors       {tensors}",
    ]
    if record.undone:
        lines.append(f"undoes        versions {', '.join(map(str, record.undone))}")
    for span in record.spans:
        lines.append(f"learned from  partition {span.partition}, offsets {span.first:,} to {span.last:,}")
    metrics = {key: value for key, value in record.metrics.items() if key != COHORTS}
    for title, values in (("settings", record.settings), ("metrics", metrics)):
        if values:
            lines += ["", title, *_values(values, "  ")]
    if COHORTS in record.metrics:
        lines += ["", "its row of the forgetting matrix", *_values({COHORTS: record.metrics[COHORTS]}, "  ")]
    for decision in version.decisions:
        lines += ["", *_decision(decision)]
    return "\n".join(lines)


def diff_text(before: int, after: int, found: Difference, *, equal: bool) -> str:
    """Every tensor, then the items."""
    if equal:
        return f"versions {before} and {after} serve the same: their serving hashes are equal"
    rows = [("tensor", "shape", "moved", "relative"), *map(_tensor_row, found.tensors)]
    lines = [f"from version {before} to version {after}", *_table(rows)]
    for count, what in ((found.new_items, "new"), (found.gone_items, "gone")):
        if count:
            lines.append(f"{count:,} items of the vocabulary are {what}")
    if found.items:
        table: list[tuple[str, ...]] = [("item", "moved", "relative")]
        table += [(shown(item.item_id, 40), f"{item.moved:.4g}", _share(item.relative)) for item in found.items]
        lines += ["", "items whose embedding moved most", *_table(table)]
    return "\n".join(lines)


def _stage(version: Version, current: int | None) -> str:
    notes: list[str] = [version.stage]
    if version.number == current:
        notes.append("current")
    if version.undone_by is not None:
        notes.append(f"undone by {version.undone_by}")
    if version.pruned:
        notes.append("pruned")
    return ", ".join(notes)


def _decision(decision: Decision) -> Iterator[str]:
    yield f"{time_text(decision.at_ms)}  {decision.kind}: {shown(decision.reason, 500)}"
    yield from _values(decision.evidence, "    ")


def _cohorts(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for _, verdict in _named(values.get(VERDICTS)):
        if isinstance(verdict, Mapping):
            yield from _cohorts(verdict)
    for key in (COHORTS, EVIDENCE):
        for name, cohort in _named(values.get(key)):
            if isinstance(cohort, Mapping):
                yield name, cohort


def _named(values: Any) -> list[tuple[str, Any]]:
    """Entries of a mapping, or of a list whose mappings may name their cohort; none of anything else."""
    if isinstance(values, Mapping):
        return [(str(name), value) for name, value in values.items()]
    if isinstance(values, (list, tuple)):
        return [(str(value.get(_COHORT, "")) if isinstance(value, Mapping) else "", value) for value in values]
    return []


def _number(value: Any) -> float | None:
    """A number as it was before ``record.plain``."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _values(values: Mapping[str, Any], indent: str) -> Iterator[str]:
    """Nested values line by line; many mappings of one kind as a table."""
    for key, value in values.items():
        table = _as_table(str(key), value)
        if table is not None:
            yield from (indent + line for line in table)
        elif isinstance(value, Mapping) and value:
            yield f"{indent}{shown(str(key))}:"
            yield from _values(value, indent + "  ")
        else:
            yield f"{indent}{shown(str(key))}: {_cell(value)}"


def _as_table(key: str, value: Any) -> list[str] | None:
    """A mapping of mappings by name, or a list of mappings, as a table; None: it is neither."""
    named = _named(value)
    if not named or not all(isinstance(each, Mapping) and _flat(each) for _, each in named):
        return None
    columns = list(dict.fromkeys(column for _, each in named for column in each if column != _COHORT))
    rows = [[shown(key), *(shown(str(column), 30) for column in columns)]]
    rows += [[shown(name, 40), *(_cell(each.get(column, "")) for column in columns)] for name, each in named]
    return _table(rows)


def _flat(values: Mapping[str, Any]) -> bool:
    return not any(isinstance(value, (Mapping, list, tuple)) for value in values.values())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value)) or "-"
    return shown(str(value), 200)


def _tensor_row(change: TensorChange) -> tuple[str, str, str, str]:
    before, after = (
        None if shape is None else "×".join(map(str, shape)) or "()" for shape in (change.before, change.after)
    )
    if before is None or after is None:
        return change.name, before or after or "", "new" if before is None else "gone", ""
    shape = before if before == after else f"{before} → {after}"
    return change.name, shape, "-" if change.moved is None else f"{change.moved:.4g}", _share(change.relative)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
