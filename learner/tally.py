"""What every user's ledger must be, counted again from the events: the other side of an audit.

Memory grows with the users, not with the events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from learner.event_clock import IDLE, NOBODY, Pace, advance, new_clock
from learner.interactions import Interactions
from learner.ledger import extend_ledgers
from learner.user_state import ItemHashes


class Tally:
    """Counts and ledgers of one partition's users after the events that were added, U users so far.

    ``pace`` is the clock's, for a stream with expiry: users who are idle start anew at their next event, as in the
    stream. ``floor`` says of each user up to which offset events do not count; an erased user's do not.
    """

    def __init__(self, pace: Pace | None, floor: Callable[[bytes], int] | None = None) -> None:
        self.users: dict[bytes, int] = {}
        """Id -> place in the arrays"""
        self.total_events = 0
        """All that were added"""
        self.last_offset = -1
        """Of them"""
        self.clock = new_clock()
        self._pace, self._floor_of = pace, floor
        self._hashes = ItemHashes()
        self._columns = _Columns()

    @property
    def events(self) -> NDArray[np.int64]:
        """(U,) events in each ledger"""
        return self._columns.events[: len(self.users)]

    @property
    def ledgers(self) -> NDArray[np.uint64]:
        """(U,)"""
        return self._columns.ledgers[: len(self.users)]

    @property
    def last_offsets(self) -> NDArray[np.int64]:
        """(U,) offset of each user's latest event; −1 before one"""
        return self._columns.last[: len(self.users)]

    @property
    def idle_up_to(self) -> int:
        """Users whose latest event has this offset or an earlier one are idle; NOBODY without expiry."""
        return NOBODY if self._pace is None else int(self.clock[IDLE])

    def add(self, batch: Interactions) -> None:
        """Enters the next events, whose offsets rise."""
        if not len(batch):
            return
        codes = self._codes(batch.user_ids)
        idle = np.full(len(batch), NOBODY, np.int64)
        if self._pace is not None:
            idle, self.clock = advance(self.clock, batch, self._pace)
        held = self._columns
        extend_ledgers(
            codes[batch.user], batch.item, batch.label, batch.event_time_ms, batch.offset,
            self._hashes.of(batch.item_ids), idle, held.floor, held.events, held.ledgers, held.last,
        )  # fmt: skip
        self.total_events += len(batch)
        self.last_offset = int(batch.offset[-1])

    def _codes(self, user_ids: Iterable[str]) -> NDArray[np.int64]:
        known, before = self.users, len(self.users)
        names = [user.encode() for user in user_ids]
        codes = np.fromiter((known.setdefault(name, len(known)) for name in names), np.int64, len(names))
        self._columns.grow(len(known))
        if self._floor_of is not None:
            for name, code in zip(names, codes.tolist(), strict=True):
                if code >= before:
                    self._columns.floor[code] = self._floor_of(name)
        return codes


@dataclass(slots=True)
class _Columns:
    """Arrays by user, with room for more."""

    floor: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    events: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    ledgers: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    last: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def grow(self, users: int) -> None:
        """Makes room for so many."""
        more = max(users, 2 * len(self.events)) - len(self.events)
        if users <= len(self.events):
            return
        self.floor = np.append(self.floor, np.full(more, -1, np.int64))
        self.events = np.append(self.events, np.zeros(more, np.int64))
        self.ledgers = np.append(self.ledgers, np.zeros(more, np.uint64))
        self.last = np.append(self.last, np.full(more, -1, np.int64))
