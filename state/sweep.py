"""Takes out users who have been away for too long, a bounded number of rows at a time, between two commits.

A swept user is one whom the next event would start anew (``state.expiry``), so no prediction and no other row tells
whether, or when, a sweep came by. A pass over all rows is made only when the offset up to which users are idle has
moved on since the last one, some 16 times in the configured time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learner.event_clock import NOBODY
from state import codec
from state.expiry import idle_up_to
from state.hot_rows import HotRows
from state.store import UserStore

SWEEP_ROWS = 1024
"""Rows looked at in one step: some 1 ms"""
_LAST_OFFSET = slice(16, 24)
"""Of a stored row of any version"""


class Sweeper:
    """The sweep over one partition's rows: it goes on where it stopped. A new one begins at the first row."""

    def __init__(self) -> None:
        self._after: bytes | None = None
        self._passing = NOBODY
        self._passed = NOBODY

    def sweep(self, hot: HotRows, rows: int = SWEEP_ROWS) -> int:
        """Looks at the next ``rows`` rows and takes out those of idle users; returns how many.

        Progress and rows change in one atomic step, which leaves the users' tombstones in the outbox of ``hot``, where
        it has one. Raises StoreError; the same rows then come again.
        """
        progress = hot.progress()
        idle = NOBODY if progress is None else idle_up_to(progress.clock)
        if self._after is None:
            if idle <= self._passed:
                return 0
            self._passing = idle
        users, values = _next_rows(hot.store, self._after, rows)
        swept = _take_out(hot, users, values, idle) if users else 0
        self._after = users[-1] if len(users) == rows else None
        if self._after is None:
            self._passed = self._passing
        return swept


def _next_rows(store: UserStore, after: bytes | None, rows: int) -> tuple[list[bytes], list[bytes]]:
    users: list[bytes] = []
    values: list[bytes] = []
    for more_users, more_values in store.stored(after):
        users += more_users
        values += more_values
        if len(users) >= rows:
            break
    return users[:rows], values[:rows]


def _take_out(hot: HotRows, users: Sequence[bytes], values: Sequence[bytes], idle: int) -> int:
    """Only rows that are to go are checked: a damaged one is an error, whichever way it is read."""
    layout = hot.memory.layout
    last = np.frombuffer(b"".join([value[_LAST_OFFSET] for value in values]), "<i8")
    if len(last) < len(users):
        codec.decode(layout, users, values)  # says which one is too short
    places = np.flatnonzero(last <= idle).tolist()
    gone = [users[k] for k in places]
    rows = layout.rows(codec.decode(layout, gone, [values[k] for k in places]))
    if gone:
        hot.remove(gone, int(rows["events"].sum()))
    return len(gone)
