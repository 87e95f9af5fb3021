"""The numbers behind the report's account of the online stage. Pure: arrays in, arrays out.

Symbols: N scored events, U users that have some, W windows, V evaluations, C cohorts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.forgetting import MEASURES, Column, ForgettingMatrix
from learner.metrics import auc, event_log_loss
from state.lineage.history import Version
from streams.meta.result import FROZEN, MetaResult
from streams.report.analysis import MODEL, MOST_WINDOWS, WINDOW_EVENTS, Float
from streams.results import ScoredStream

WINDOW_USERS = 10
"""Fewest users of a window by arrival: with fewer, the difference of two windows is that of their people"""

MOST_ROWS = 40
"""Evaluations that the heat map shows: rows of 9 points are the thinnest that a finger can tell apart"""

MOST_SMALL_ROWS = 20
"""The same of the smaller map"""

MOST_COLUMNS = 72
"""Cohorts of a heat map: more would be thinner than 5 points, and the page several megabytes"""

ADAPTED, ZERO_SHOT = 0, 1
"""Places in the last axis of ``ForgettingMatrix.values``"""

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Marks:
    """When something was decided or found: how many scored events, or users, came before it. Rising."""

    promoted: Int
    rejected: Int
    drift: Int


@dataclass(frozen=True, slots=True)
class StageCurve:
    """Both measures in windows, with the online stage and, where that is known, without it."""

    edge: Int
    """(W + 1,) events or users up to each window's start; the last is all"""
    auc: Mapping[str, Float]
    """name -> (W,), NaN where one class is missing"""
    log_loss: Mapping[str, Float]
    """name -> (W,), nats"""
    marks: Marks

    @property
    def middle(self) -> Float:
        """(W,) of each window."""
        return (self.edge[:-1] + self.edge[1:]) / 2

    def of(self, measure: str) -> Mapping[str, Float]:
        """``auc`` or ``log_loss``."""
        return self.auc if measure == "auc" else self.log_loss

    def gain(self, measure: str) -> Float | None:
        """(W,) what the online stage is worth, above 0 where it helps; None without the frozen model."""
        lines = self.of(measure)
        if FROZEN not in lines:
            return None
        sign = -1.0 if measure == "log_loss" else 1.0
        gain: Float = sign * (lines[MODEL] - lines[FROZEN])
        return gain


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Change of one measure since each cohort's first evaluation; columns stand by slice."""

    evaluation: Int
    """(R,) which evaluations these rows are"""
    versions: tuple[int, ...]
    """(R,) of what version"""
    columns: tuple[Column, ...]
    value: Float
    """(R, C) as measured; NaN where the cohort was not"""
    change: Float
    """(R, C) less the cohort's first evaluation"""
    since: tuple[int, ...]
    """(C,) the version of the first evaluation"""


def over_events(scored: ScoredStream, meta: MetaResult, every_events: int) -> StageCurve:
    """Windows of equally many scored events, in stream order."""
    position = np.arange(len(scored), dtype=np.int64)
    windows = max(1, min(MOST_WINDOWS, len(scored) // WINDOW_EVENTS))
    return _curve(scored, position, windows, _marks(meta, scored, scored.offset, every_events))


def over_arrivals(scored: ScoredStream, meta: MetaResult, every_events: int) -> StageCurve:
    """Windows of equally many users in the order of their first scored event, each with all events of its users."""
    _, first, code = np.unique(scored.user, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    windows = max(1, min(MOST_WINDOWS, len(order) // WINDOW_USERS, len(scored) // WINDOW_EVENTS))
    arrived = scored.offset[first[order]]
    return _curve(scored, rank[code.reshape(-1)], windows, _marks(meta, scored, arrived, every_events))


def decided_in_round(version: Version) -> int:
    """The round that ended with its latest decision: it makes and shadows at once, then moves one stage a round."""
    kinds = [decision.kind for decision in version.decisions]
    later = len(kinds) - 1 - kinds.index("shadow") if "shadow" in kinds else 0
    return version.record.round + later


def heat_map(matrix: ForgettingMatrix, state: int, rows: int) -> HeatMap:
    """Of the adapted or the zero-shot log-loss: at most ``rows`` evaluations, taken evenly with the first and the last.

    Of more than ``MOST_COLUMNS`` cohorts whole slices are left out, evenly too.
    """
    values = matrix.values[:, :, MEASURES.index("log_loss"), state]
    columns = _columns_shown(matrix.columns)
    kept = _evenly(len(values), rows)
    first = _first_measured(values)
    there = np.flatnonzero(first < len(values))
    base = np.full(values.shape[1], np.nan)
    base[there] = values[first[there], there]
    columns = columns[np.isin(columns, there)]
    shown = values[np.ix_(kept, columns)]
    return HeatMap(
        kept,
        tuple(matrix.versions[t] for t in kept),
        tuple(matrix.columns[k] for k in columns),
        shown,
        shown - base[columns],
        tuple(matrix.versions[first[k]] for k in columns),
    )


def first_and_last(values: Float) -> tuple[Int, Int]:
    """(C,) and (C,): the first and the last row of (V, C) with a number; V and −1 where none is."""
    if not len(values):
        return np.zeros(values.shape[1], np.int64), np.full(values.shape[1], -1, np.int64)
    there = ~np.isnan(values)
    last = np.where(there.any(axis=0), len(values) - 1 - there[::-1].argmax(axis=0), -1)
    return _first_measured(values), last


def _first_measured(values: Float) -> Int:
    there = ~np.isnan(values)
    if not len(values):
        return np.zeros(values.shape[1], np.int64)
    return np.where(there.any(axis=0), there.argmax(axis=0), len(values))


def _columns_shown(columns: tuple[Column, ...]) -> Int:
    """Places of the cohorts by slice, each slice whole."""
    slices = sorted({column.slice for column in columns})
    order = sorted(range(len(columns)), key=lambda k: (columns[k].slice, k))
    widest = max((sum(c.slice == s for c in columns) for s in slices), default=1)
    if len(columns) > MOST_COLUMNS:
        chosen = _evenly(len(slices), max(1, MOST_COLUMNS // widest))
        kept = {slices[k] for k in chosen}
        order = [k for k in order if columns[k].slice in kept]
    return np.array(order, np.int64)


def _evenly(count: int, most: int) -> Int:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _curve(scored: ScoredStream, position: Int, windows: int, marks: Marks) -> StageCurve:
    """``position`` (N,): each event's place on the axis, 0 or more, all of them taken."""
    size = int(position.max()) + 1 if len(position) else 0
    edge = np.arange(windows + 1, dtype=np.int64) * size // windows
    window = np.searchsorted(edge[1:], position, side="right")
    names = {MODEL: scored.probability}
    if FROZEN in scored.baselines:
        names[FROZEN] = scored.baselines[FROZEN]
    inside = [np.flatnonzero(window == k) for k in range(windows)]
    counts = np.maximum(np.bincount(window, minlength=windows), 1)
    return StageCurve(
        edge,
        {name: np.array([auc(scored.label[w], p[w]) for w in inside]) for name, p in names.items()},
        {
            name: np.bincount(window, event_log_loss(scored.label, p), windows) / counts
            for name, p in names.items()
        },
        marks,
    )  # fmt: skip


def _marks(meta: MetaResult, scored: ScoredStream, axis: Int, every_events: int) -> Marks:
    """``axis``: the rising source offsets of what is counted. A decision counts from the end of its round."""
    decided: dict[str, list[int]] = {"promoted": [], "rejected": []}
    for version in meta.versions:
        if version.stage in decided:
            decided[version.stage].append(decided_in_round(version) * every_events)

    def places(events: list[int]) -> Int:
        if not len(axis):
            return np.zeros(0, np.int64)
        offsets = _offset_after(meta, scored, np.array(events, np.float64))
        return np.sort(np.searchsorted(axis, offsets, side="right")).astype(np.int64)

    return Marks(places(decided["promoted"]), places(decided["rejected"]), places([a.event for a in meta.drift]))


def _offset_after(meta: MetaResult, scored: ScoredStream, events: Float) -> Float:
    """Source offset of the last of so many streamed events: exact at the ends of rounds that made a version.

    Between them it is interpolated, since not every streamed event is scored.
    """
    made = [v.record for v in meta.versions if v.record.spans and "events" in v.record.metrics]
    if made:
        knots = [(0.0, float(made[0].spans[0].first) - 1)]
        knots += [(float(r.metrics["events"]), float(max(span.last for span in r.spans))) for r in made]
        tail = max(float(scored.offset[-1]) - knots[-1][1], 1.0)
        knots.append((knots[-1][0] + tail, knots[-1][1] + tail))
    else:
        knots = [(0.0, float(scored.offset[0]) - 1), (float(len(scored)), float(scored.offset[-1]))]
    count, offset = np.array(knots).T
    found: Float = np.interp(events, count, offset)
    return found
