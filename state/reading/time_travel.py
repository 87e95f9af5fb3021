"""A user's state at an earlier point of the stream, from what is still known: rows and the ring of latest events.

Known are the live row, the rows in snapshots, and where the user starts. Each row says how many events the user had
(its count), the offset and the time of the last of them, and the times of those in its ring. From these follows how
many events the user had at the point, n; where it does not follow, nothing is guessed. The state after n events is a
row with that count; or it is learned again from an earlier known state, and counts only if learning on leads to a
later row to the bit.

Where the run had several versions of the shared parameters, all of it is under the one that serves the user now: rows
are moved onto it (``moving``) before anything is learned again.

A user who expired or was erased and came back has several *lives*, each with its own first event; a snapshot may hold
an earlier one. Times of a user's events are taken to rise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from learner.retrace import AdaptivePart
from learner.user_state import RowLayout
from state.exceptions import QueryError
from state.reading.history import Base, PastEvent, between, past_events, replay
from state.reading.model_view import ModelView
from state.reading.moving import Movement, replayed
from state.reading.point import Point, time_text

START = "the start"
_NEVER = 1 << 62


class Stored(NamedTuple):
    """What one store says of the user."""

    name: str
    """Of the store, in words"""
    row: np.void | None
    """None: it has no row of the user"""
    offset: int
    """How far the store had come; −1: nowhere"""
    movement: Movement | None = None
    """How the row came onto the version that answers; None: it stands there"""


class Moment(NamedTuple):
    """A user's state at a point."""

    part: AdaptivePart
    row: np.void | None
    """The stored row that it is; None where it was derived"""
    source: str
    """Where it came from, in words"""
    exact: bool
    note: str
    """What limits it; empty where nothing does"""
    events: tuple[PastEvent, ...]
    """Known events of the user before it, oldest first"""
    bases: tuple[Base, ...]
    """Known states at or before it"""
    first_time_ms: int | None
    """Of the user's first event, which tells one life from another; None before it"""
    movement: Movement | None = None
    """How it came onto the version that answers; None: it was known to stand there"""


class _Bounds(NamedTuple):
    """Between which offsets, or times, one event of the user lies, both included."""

    first: int = -_NEVER
    last: int = _NEVER


class Timeline:
    """All that is known of one user. ``live`` is the store in use, ``snapshots`` others in any order."""

    def __init__(
        self, view: ModelView | None, layout: RowLayout, user_id: str, live: Stored, snapshots: Sequence[Stored]
    ) -> None:
        self._view = view
        self._user_id = user_id
        self._stores = (live, *snapshots)
        self._start = None if view is None else Base(START, view.start(user_id))
        groups: dict[int, list[Stored]] = {}
        for store in self._stores:
            if store.row is not None:
                groups.setdefault(int(store.row["first_time_ms"]), []).append(store)
        lives = [_Life(layout, stores, self._stores) for stores in groups.values()]
        self._lives = sorted(lives, key=lambda life: life.last_offset, reverse=True)

    @property
    def known(self) -> bool:
        """Whether any store has a row of the user."""
        return bool(self._lives)

    def now(self) -> Moment:
        """The state in the live store, or where the user starts."""
        live = self._stores[0]
        for life in self._lives:
            if life.closed:
                return life.stored(live, self._start)
        return self._before_the_first(None)

    def at(self, point: Point) -> Moment:
        """The state at a point. Raises QueryError, which says what could be asked, where it cannot be told."""
        if point.kind == "now":
            return self.now()
        moment = self._then(point)
        if moment.row is None and self._view is not None:
            return moment._replace(movement=replayed(self._view))
        return moment

    def _then(self, point: Point) -> Moment:
        for number, life in enumerate(self._lives, 1):
            least, most = life.count_at(point)
            if most == 0 and number < len(self._lives):
                continue  # an earlier life, if any
            if least != most and not life.known_to_rounding(point, least, most):
                raise self._untold(point)
            if most == 0:
                return self._before_the_first(life)
            moment = life.after(most, self._view, self._start)
            if moment is None:
                raise self._untold(point)
            note = self._limit(life, point, least, most)
            return moment._replace(exact=False, note=note) if note else moment
        return self._before_the_first(None)

    def _before_the_first(self, life: _Life | None) -> Moment:
        if self._start is None:
            raise QueryError(f"where user {self._user_id!a} starts is not known: the state directory has no model")
        note = ""
        if life is not None and not life.leads_on(self._view, self._start):
            note = "features that came inside the events may have given another start"
        elif life is not None and self._view is not None and self._view.expiry is not None:
            note = "events before the user last expired would have left no trace"
        return Moment(self._start.part, None, START, not note, note, (), (self._start,), None)

    def _limit(self, life: _Life, point: Point, least: int, most: int) -> str:
        """What keeps the count at a point from being certain; empty where nothing does."""
        if least != most:
            return life.coarse(most)
        reached = self._stores[0].offset
        if point.kind == "offset" and life.closed and point.value > reached:
            return f"the stream has come to offset {reached} only"
        return ""

    def _untold(self, point: Point) -> QueryError:
        known = [text for store in self._stores if (text := _answerable(store))]
        known += [text for life in self._lives[:1] if (text := life.answerable_times(self._start))]
        missing = (
            "" if self._view is not None else "; without the model of the state directory no event can be replayed"
        )
        return QueryError(
            f"the state of user {self._user_id!a} at {point.kind} {point.asked} cannot be told{missing}; known: "
            f"{'; '.join(known)}; a snapshot from about then (--snapshots) or a larger state.ring would tell more"
        )


class _Life:
    """The known rows of one user between a first event and the next time the user started anew."""

    def __init__(self, layout: RowLayout, stores: Sequence[Stored], every: Sequence[Stored]) -> None:
        """``stores`` have rows of this life; ``every`` is all there are, the live one first."""
        self._rows = sorted(_with_rows(stores), key=lambda pair: int(pair[1]["events"]))
        self.closed = any(store is every[0] for store in stores)
        """Whether its last known row is the user's last"""
        self.first_time_ms = int(self._rows[0][1]["first_time_ms"])
        self.total = int(self._rows[-1][1]["events"])
        self.last_offset = int(self._rows[-1][1]["last_offset"])
        events: dict[int, PastEvent] = {}
        for _, row in self._rows:
            for event in past_events(layout, row):
                older = events.get(event.number, event)
                events[event.number] = min(event, older, key=lambda each: each.latest_ms - each.earliest_ms)
        self._events = events
        self._offsets = self._offset_bounds([e.offset for e in every if not any(e is store for store in stores)])
        self._times = self._time_bounds()

    def count_at(self, point: Point) -> tuple[int, int]:
        """(least, most) events that the user can have had at the point: up to the last one at or before it."""
        bounds = self._offsets if point.kind == "offset" else self._times
        least = max((k + 1 for k, (_, last) in bounds.items() if last <= point.value), default=0)
        most, reached, before = 0, -_NEVER, -1
        for k in sorted(bounds):
            if k - before > 1 and reached <= point.value:  # events that are not known lie between known ones
                most = k
            reached, before = max(reached, bounds[k].first), k
            if k < self.total and bounds[k].first <= point.value:
                most = k + 1
        if not self.closed and reached <= point.value:
            most = self.total + 1  # what came after the last known row is not known
        return least, most

    def known_to_rounding(self, point: Point, least: int, most: int) -> bool:
        """Whether the count is open only because times in the ring are rounded."""
        return point.kind == "time" and all(k in self._events for k in range(most - 1, least - 1, -1))

    def coarse(self, count: int) -> str:
        """What to say of a count that rounded times gave."""
        event = self._events[count - 1]
        return (
            f"the time of event {count - 1} is known to {(event.latest_ms - event.earliest_ms + 1) / 1000:g} s only; "
            "it is taken to lie at or before the point"
        )

    def stored(self, store: Stored, start: Base | None) -> Moment:
        """The state that a store holds."""
        assert store.row is not None
        moment = self._moment(AdaptivePart.of(store.row), store.row, store.name, start)
        return moment._replace(movement=store.movement)

    def after(self, count: int, view: ModelView | None, start: Base | None) -> Moment | None:
        """The state after ``count`` ≥ 1 events; None where it is not known."""
        for store, row in self._rows:
            if int(row["events"]) == count:
                return self.stored(store, start)
        for base, last, name in self._ways(count, start):
            part = self._learned_again(view, base, last, count)
            if part is not None:
                source = f"{count - base.part.events} events replayed from {base.name}, proven by {name}"
                return self._moment(part, None, source, start)
        return None

    def leads_on(self, view: ModelView | None, start: Base) -> bool:
        """Whether learning from ``start`` is known to lead to a known row."""
        return any(self._learned_again(view, base, last, 0) is not None for base, last, _ in self._ways(0, start))

    def answerable_times(self, start: Base | None) -> str:
        """From which time on every state can be told, in words; empty where that is none."""
        if not self.closed:
            return ""
        low = self.total
        while low - 1 in self._events:
            low -= 1
        first = min((b.part.events for b in self._bases(self.total, start) if b.part.events >= low), default=self.total)
        return "any time" if first == 0 else f"times from {time_text(self._times[first - 1].last)} on"

    def _learned_again(self, view: ModelView | None, base: Base, last: AdaptivePart, count: int) -> AdaptivePart | None:
        """The state after ``count`` events, by learning from ``base`` on; None unless that leads to ``last``."""
        events = between(self._events.values(), base.part.events, last.events)
        if view is None or events is None:
            return None
        parts = [base.part, *(step.after for step in replay(view, base.part, events))]
        return parts[count - base.part.events] if parts[-1].same_bits(last) else None

    def _ways(self, count: int, start: Base | None) -> Iterator[tuple[Base, AdaptivePart, str]]:
        """(a known state before, one after, its name), the nearest first."""
        for base in reversed(self._bases(count - 1, start)):
            for store, row in self._rows:
                last = int(row["events"])
                if last > count:
                    yield base, AdaptivePart.of(row), store.name

    def _bases(self, count: int, start: Base | None) -> tuple[Base, ...]:
        """Known states after at most ``count`` events, by their counts."""
        rows = [Base(store.name, AdaptivePart.of(row)) for store, row in self._rows if int(row["events"]) <= count]
        return tuple(rows) if start is None else (start, *rows)

    def _moment(self, part: AdaptivePart, row: np.void | None, source: str, start: Base | None) -> Moment:
        events = tuple(self._events[k] for k in sorted(self._events) if k < part.events)
        return Moment(part, row, source, True, "", events, self._bases(part.events, start), self.first_time_ms)

    def _offset_bounds(self, without: list[int]) -> dict[int, _Bounds]:
        """``without``: how far stores had come that have no row of this life; an earlier one saw none of its events."""
        bounds: dict[int, _Bounds] = {}
        for store, row in self._rows:
            count, offset = int(row["events"]), int(row["last_offset"])
            _narrow(bounds, count - 1, _Bounds(offset, offset))
            _narrow(bounds, count, _Bounds(store.offset + 1))
        first_known = int(self._rows[0][1]["last_offset"])
        for offset in without:
            if offset < first_known:
                _narrow(bounds, 0, _Bounds(offset + 1))
        return bounds

    def _time_bounds(self) -> dict[int, _Bounds]:
        bounds = {number: _Bounds(event.earliest_ms, event.latest_ms) for number, event in self._events.items()}
        for _, row in self._rows:
            first, last = int(row["first_time_ms"]), int(row["last_time_ms"])
            _narrow(bounds, 0, _Bounds(first, first))
            _narrow(bounds, int(row["events"]) - 1, _Bounds(last, last))
        return bounds


def _narrow(bounds: dict[int, _Bounds], number: int, more: _Bounds) -> None:
    before = bounds.get(number, _Bounds())
    bounds[number] = _Bounds(max(before.first, more.first), min(before.last, more.last))


def _with_rows(stores: Sequence[Stored]) -> list[tuple[Stored, np.void]]:
    return [(store, store.row) for store in stores if store.row is not None]


def _answerable(store: Stored) -> str:
    if store.row is None:
        return f"offsets up to {store.offset} ({store.name}: no events yet)" if store.offset >= 0 else ""
    return f"offsets {int(store.row['last_offset'])} to {store.offset} ({store.name})"
