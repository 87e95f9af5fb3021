"""Why a user's state is what it is: how far it is from where everyone starts, and which events moved it.

Where the ring still holds every event since a known state (the user's start, or a snapshot's row), they are learned
again, and the result must be the stored state to the bit: what each event did is then known ("replayed"). Else it is
estimated at the present state: how far the mean would move if the event were left out ("influence", see
``learner.retrace.Retrace.influence``). The two answer different questions: what an event did when it came, and what is
owed to it now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.filters import FirstFilter, Float
from learner.retrace import AdaptivePart, Step
from state.reading.history import Base, PastEvent, between, model_grade, replay
from state.reading.model_view import ModelView

Method = Literal["replayed", "influence"]


class Distance(NamedTuple):
    """How far a mean is from φ_0."""

    l2: float
    prior_sd: float | None
    """In standard deviations of the prior: sqrt((m − φ_0)' S_0⁻¹ (m − φ_0)); None for the gradient head"""
    shift: tuple[float, ...]
    """(d,) m − φ_0"""
    shift_sd: tuple[float, ...] | None
    """(d,) each over the prior's own standard deviation in that dimension"""


class ExplainedEvent(NamedTuple):
    """One of the latest events, and how far it moved the user."""

    number: int
    """Of the user's events, from 0"""
    item: str | None
    """None: the model does not name it"""
    item_hash: str
    """The high 40 bits of the item's hash, in hex"""
    label: int
    grade: float | None
    """The graded value"""
    earliest_ms: int
    latest_ms: int
    """Its time lies between these, both included"""
    method: Method
    moved: float
    """L2 of the change of the mean that it made (replayed), or that is owed to it (influence)"""
    moved_second: float | None
    """The same of the second filter's mean; None where it was not replayed"""
    probability_before: float | None
    probability_after: float | None
    """Of label 1 for its own item, before and after it was learned; None where it was not replayed"""
    guarded: bool | None
    """Its update was refused; None where it was not replayed"""


class Explanation(NamedTuple):
    """The events that are still known, oldest first."""

    replayed_from: str | None
    """The known state from which they were learned again, in words; None: all are estimates"""
    events: tuple[ExplainedEvent, ...]


def distance(first: FirstFilter, mean: Float) -> Distance:
    """How far ``mean`` (d,) is from the shared initialization."""
    shift = mean.astype(np.float64) - first.initialization.astype(np.float64)
    l2, listed = float(np.linalg.norm(shift)), tuple(shift.tolist())
    if first.kind == "gradient":
        return Distance(l2, None, listed, None)
    own = shift / np.sqrt(np.diag(_prior(first)))
    return Distance(l2, in_prior_sd(first, shift), listed, tuple(own.tolist()))


def in_prior_sd(first: FirstFilter, shift: NDArray[np.float64]) -> float | None:
    """The length of ``shift`` (d,) in standard deviations of the prior; None for the gradient head, which has none."""
    if first.kind == "gradient":
        return None
    prior = _prior(first)
    try:
        solved = np.linalg.solve(prior, shift)
    except np.linalg.LinAlgError:  # a prior that is certain of some direction: no distance along it counts
        solved = np.linalg.pinv(prior) @ shift
    squared = float(shift @ solved)
    return math.sqrt(max(squared, 0.0))


def explain(view: ModelView, part: AdaptivePart, events: Sequence[PastEvent], bases: Sequence[Base]) -> Explanation:
    """``events`` are known ones of the user, before and after; those that ``part`` has learned are explained."""
    learned = [event for event in events if event.number < part.events]
    base, steps = _replayed(view, part, learned, bases)
    first_replayed = part.events - len(steps)
    estimated = [_estimated(view, part, event) for event in learned if event.number < first_replayed]
    known = [event for event in learned if event.number >= first_replayed]
    before = None if base is None else base.part
    explained = []
    for event, step in zip(known, steps, strict=True):
        assert before is not None
        explained.append(_made(view, event, before, step))
        before = step.after
    return Explanation(None if base is None else base.name, (*estimated, *explained))


def _replayed(
    view: ModelView, part: AdaptivePart, learned: list[PastEvent], bases: Sequence[Base]
) -> tuple[Base | None, list[Step]]:
    """The earliest base from which the events lead to ``part``, and their steps; (None, []) if there is none."""
    for base in sorted(bases, key=lambda each: each.part.events):
        events = between(learned, base.part.events, part.events)
        if events:
            steps = replay(view, base.part, events)
            if steps[-1].after.same_bits(part):
                return base, steps
    return None, []


def _made(view: ModelView, event: PastEvent, before: AdaptivePart, step: Step) -> ExplainedEvent:
    place = view.place_of_ring_item(event.ring_item)
    after = view.retrace.predict(step.after, view.items(np.array([place])))[1]
    second = None if view.second is None else _length(step.after.second_mean - before.second_mean)
    return _described(
        view, event, place, "replayed", _length(step.after.mean - before.mean), second,
        float(step.probability), float(after[0]), step.guarded,
    )  # fmt: skip


def _estimated(view: ModelView, part: AdaptivePart, event: PastEvent) -> ExplainedEvent:
    place = view.place_of_ring_item(event.ring_item)
    item = view.items(np.array([place]))
    owed = view.retrace.influence(part, item, event.label, model_grade(view, event), event.number)
    return _described(view, event, place, "influence", _length(owed), None, None, None, None)


def _described(
    view: ModelView,
    event: PastEvent,
    place: int,
    method: Method,
    moved: float,
    moved_second: float | None,
    before: float | None,
    after: float | None,
    guarded: bool | None,
) -> ExplainedEvent:
    return ExplainedEvent(
        event.number, view.item_id(place) if place < view.item_count else None, f"{event.ring_item:010x}",
        event.label, view.grade_value(event.grade), event.earliest_ms, event.latest_ms, method, moved, moved_second,
        before, after, guarded,
    )  # fmt: skip


def _length(change: Float) -> float:
    return float(np.linalg.norm(change.astype(np.float64)))


def _prior(first: FirstFilter) -> NDArray[np.float64]:
    """(d, d) S_0."""
    if first.kind == "diagonal":
        return np.diag(first.covariance.astype(np.float64))
    matrix = np.zeros((first.dim, first.dim))
    matrix[np.tril_indices(first.dim)] = first.covariance
    return matrix + np.tril(matrix, -1).T
