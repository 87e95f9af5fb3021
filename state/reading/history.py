"""A user's latest events as a row's ring keeps them, and learning them again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from learner.retrace import AdaptivePart, Step
from learner.user_state import AGE_DIGITS, NO_GRADE, RowLayout, recent_events
from state.reading.model_view import ModelView


class PastEvent(NamedTuple):
    """One event of a user. Its time is known to lie between two, both included; they are equal where it is exact."""

    number: int
    """Of the user's events, from 0"""
    ring_item: int
    """The high 40 bits of the item's hash"""
    label: int
    grade: int
    """NO_GRADE where there was none"""
    earliest_ms: int
    latest_ms: int


class Base(NamedTuple):
    """A state that is known, to learn on from."""

    name: str
    part: AdaptivePart


def past_events(layout: RowLayout, row: np.void) -> list[PastEvent]:
    """The ring of a row, oldest first."""
    recent = recent_events(layout, row)
    count, first_ms = int(row["events"]), int(row["first_time_ms"])
    columns = (recent.item.tolist(), recent.label.tolist(), recent.grade.tolist(), recent.time_ms.tolist())
    found = []
    for number, (item, label, grade, time_ms) in enumerate(zip(*columns, strict=True), count - len(recent.item)):
        dropped = max(((time_ms - first_ms) // 1000).bit_length() - AGE_DIGITS, 0)
        earliest, latest = time_ms, time_ms + 1000 * (1 << dropped) - 1
        if number in (0, count - 1):
            earliest = latest = first_ms if number == 0 else int(row["last_time_ms"])
        found.append(PastEvent(number, item, label, grade, earliest, latest))
    return found


def between(events: Iterable[PastEvent], start: int, stop: int) -> list[PastEvent] | None:
    """The events numbered ``start`` … ``stop`` − 1 in order; None if one is missing."""
    by_number = {event.number: event for event in events}
    numbers = range(start, stop)
    return [by_number[n] for n in numbers] if all(n in by_number for n in numbers) else None


def replay(view: ModelView, base: AdaptivePart, events: Sequence[PastEvent]) -> list[Step]:
    """What each of these events did to a user who stood at ``base`` before the first of them."""
    places = np.fromiter((view.place_of_ring_item(event.ring_item) for event in events), np.int64, len(events))
    steps, part = [], base
    for event, place in zip(events, places, strict=True):
        step = view.retrace.learn(part, view.items(place.reshape(1)), event.label, model_grade(view, event))
        steps.append(step)
        part = step.after
    return steps


def model_grade(view: ModelView, event: PastEvent) -> int:
    """The event's grade as the filters take it."""
    return len(view.first.target) - 1 if event.grade == NO_GRADE else event.grade
