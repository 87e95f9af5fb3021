"""What a query answers, as plain values: the command prints them, as text or as JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from learner.filters import Float
from learner.retrace import AdaptivePart
from learner.user_state import RowLayout
from state.reading.explain import Distance, ExplainedEvent, Explanation, distance, explain
from state.reading.model_view import DAY_MS, ModelView
from state.reading.moving import Movement
from state.reading.point import NOW, Point
from state.reading.scores import Change, Score
from state.reading.time_travel import Moment, Timeline


class Found(NamedTuple):
    """A user, looked up."""

    partition: int | None
    """None: no store has the user"""
    layout: RowLayout
    view: ModelView | None
    """Of the version that serves the user; None where the state directory has no model"""
    timeline: Timeline
    idle_up_to: int
    """By the partition's clock: a latest event at this offset or before is too long ago"""
    offset: int | None
    """How far the partition has come; None where it is not known which one"""


class PointReport(NamedTuple):
    """Which point of the stream an answer is for, and how it is known."""

    asked: str
    source: str
    """Where the state came from, in words"""
    exact: bool
    note: str
    """What limits it; empty where nothing does"""
    moved: Movement | None
    """How the state came onto the version that answers; None: it was known to stand there, or starts there"""


class ModelReport(NamedTuple):
    """The model that the answer was worked out with."""

    meta_version: int
    canary: bool
    """Whether that version serves a share of the users only, this one among them"""
    fingerprint: str
    """Of the artifact"""
    items: int
    """Of its catalogue"""
    expire_after_days: float | None


class UserReport(NamedTuple):
    """What a state directory knows of one user."""

    user_id: str
    known: bool
    """False: no event was learned; what is shown is the shared initialization, or the start by the user's features"""
    partition: int | None
    """The topic partition whose store has the row"""
    at: PointReport
    events: int
    first_event_ms: int | None
    last_event_ms: int | None
    """None where the event ring alone knows it, or there was none"""
    last_offset: int | None
    ledger: str | None
    """Hash chain over the applied events, in hex"""
    meta_version: int | None
    """Of the shared parameters that this state is under"""
    guarded: int | None
    """Updates refused because they were not finite. It and the four above: None where no stored row says so"""
    expired: bool
    """Away for so long that the next event, and a prediction now, starts anew"""
    mean: tuple[float, ...]
    """(d,) the adaptive part m"""
    variance: tuple[float, ...]
    """(d,) the diagonal of S; empty for the gradient head"""
    covariance: tuple[float, ...]
    """S as the row has it: packed lower triangle, diagonal, or nothing"""
    second_mean: tuple[float, ...]
    second_covariance: tuple[float, ...]
    """(e,) and packed; empty without a second filter"""
    recent_labels: tuple[int, ...]
    """Labels of the latest events, oldest first"""
    distance: Distance | None
    """From φ_0; None without the model"""
    explanation: Explanation | None
    """None where it was not asked for, or without the model"""
    scores: tuple[Score, ...]
    top: tuple[Score, ...]
    model: ModelReport | None
    stream_offset: int | None
    """How far the partition has come"""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: _plain(value) for name, value in self._asdict().items()}


class Parameters(NamedTuple):
    """The adaptive part, entry by entry; here of a change."""

    mean: tuple[float, ...]
    variance: tuple[float, ...]
    covariance: tuple[float, ...]
    second_mean: tuple[float, ...]
    second_covariance: tuple[float, ...]


class DiffReport(NamedTuple):
    """One user at two points."""

    user_id: str
    before: PointReport
    after: PointReport
    events_before: int
    events_after: int
    anew: bool
    """The user started anew in between (expired, or erased): the events between are those since then"""
    change: Parameters
    """After less before"""
    moved: float
    """L2 of the change of the mean"""
    moved_prior_sd: float | None
    """The same in standard deviations of the prior; None for the gradient head"""
    between: tuple[ExplainedEvent, ...]
    """Events between the two that are still known, oldest first"""
    between_unknown: int
    """How many more there were"""
    risen: tuple[Change, ...]
    fallen: tuple[Change, ...]
    """Items of the catalogue whose probability changed most"""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: _plain(value) for name, value in self._asdict().items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(entry) for name, entry in value._asdict().items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def user_report(
    user_id: str,
    found: Found,
    at: Point,
    moment: Moment,
    *,
    expired: bool,
    explained: bool,
    scored: tuple[Score, ...],
    best: tuple[Score, ...],
) -> UserReport:
    """What there is to say of a user at a moment; ``explained`` says what moved the user."""
    part, row, view = moment.part, moment.row, found.view
    last = moment.events[-1] if moment.events else None
    exact_ms = last.latest_ms if last is not None and last.earliest_ms == last.latest_ms else None
    first_ms = moment.events[0].earliest_ms if moment.events and moment.events[0].number == 0 else None
    ring = found.layout.ring
    return UserReport(
        user_id=user_id,
        known=part.events > 0,
        partition=found.partition,
        at=point_report(at, moment._replace(movement=None) if expired else moment),
        events=part.events,
        first_event_ms=first_ms if row is None else int(row["first_time_ms"]),
        last_event_ms=exact_ms if row is None else int(row["last_time_ms"]),
        last_offset=None if row is None else int(row["last_offset"]),
        ledger=None if row is None else f"{int(row['ledger']):016x}",
        meta_version=None if row is None else int(row["meta_version"]),
        guarded=None if row is None else int(row["guarded"]),
        expired=expired,
        mean=_floats(part.mean),
        variance=_floats(_variance(found.layout, part.covariance)),
        covariance=_floats(part.covariance),
        second_mean=_floats(part.second_mean),
        second_covariance=_floats(part.second_covariance),
        recent_labels=tuple(event.label for event in moment.events if event.number >= part.events - ring),
        distance=None if view is None else distance(view.first, part.mean),
        explanation=explain(view, part, moment.events, moment.bases) if view is not None and explained else None,
        scores=scored,
        top=best,
        model=None if view is None else _model_report(view),
        stream_offset=found.offset,
    )


def stranger_report(user_id: str, found: Found) -> UserReport:
    """A user of whom nothing is known, not even the start: there is no model."""
    point = PointReport(NOW.asked, "no row, and no model that says where users start", True, "", None)
    return UserReport(
        user_id, False, None, point, 0, None, None, None, None, None, None, False, (), (), (), (), (), (), None, None,
        (), (), None, found.offset,
    )  # fmt: skip


def point_report(point: Point, moment: Moment) -> PointReport:
    """Which point it is, and how it is known."""
    return PointReport(point.asked, moment.source, moment.exact, moment.note, moment.movement)


def _model_report(view: ModelView) -> ModelReport:
    days = None if view.expiry is None else view.expiry.after_ms / DAY_MS
    return ModelReport(view.meta_version, view.is_canary, view.fingerprint, view.item_count, days)


def parameter_change(layout: RowLayout, one: AdaptivePart, other: AdaptivePart) -> Parameters:
    """Every parameter, in double precision: the difference of two floats is then exact."""
    names = ("mean", "covariance", "second_mean", "second_covariance")
    old, new = ({name: getattr(part, name).astype(np.float64) for name in names} for part in (one, other))
    mean, covariance, second_mean, second_covariance = (new[name] - old[name] for name in names)
    return Parameters(
        tuple(mean.tolist()), tuple(_variance(layout, covariance).tolist()), tuple(covariance.tolist()),
        tuple(second_mean.tolist()), tuple(second_covariance.tolist()),
    )  # fmt: skip


def _variance(layout: RowLayout, covariance: Float) -> Float:
    """The diagonal of what a row keeps of a covariance."""
    if layout.kind != "full":
        return covariance
    steps = np.arange(layout.dim)
    diagonal: Float = covariance[steps * (steps + 3) // 2]
    return diagonal


def _floats(values: Float) -> tuple[float, ...]:
    return tuple(values.tolist())
