"""A row on the version that answers: the stream moves it at its user's next event, a reader moves a copy of it.

In the same way (``learner.rebasing``), and to the same bits: from the user's whole history where the store keeps it,
else from the events in the row's ring. A start by features that came inside events is known from the history alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from learner.user_state import NO_GRADE
from state.exceptions import StoreDamaged
from state.history_codec import CHUNK_EVENTS, Head, chunk_events, decode_chunks
from state.keys import chunk_key, history_stem
from state.reading.history import PastEvent, past_events, replay
from state.reading.model_view import ModelView
from state.store import RocksReader


class Moved(NamedTuple):
    """A row, and what it took to bring it onto the version of the model."""

    row: np.void
    how: str
    """In words; empty where it stands there"""


def moved(view: ModelView, store: RocksReader, user: bytes, row: np.void) -> Moved:
    """A copy of the row on the version of the view. Raises StoreDamaged for a history that cannot be read."""
    stands, serves = int(row["meta_version"]), view.meta_version
    if stands == serves:
        return Moved(row, "")
    if stands > serves:
        return Moved(
            row,
            f"the row stands on version {stands}, newer than the model beside it, which is of version {serves}: what "
            "is worked out from it is not what the stream would say; ask again when the run has written its model",
        )
    count = int(row["events"])
    events, where = _history(store, user, count), "the history"
    start = view.start(user.decode())
    if events:
        head = _head(store, user)
        start = view.start_of(user.decode(), head.columns, head.weights)
    else:
        events, where = past_events(store.layout, row), "the row's ring"
    first = events[0].number if events else count
    part = start._replace(events=first)
    for step in replay(view, part, events):
        part = step.after
    copy = row.copy()
    part.put(copy)
    copy["meta_version"] = serves
    of = f"all {count:,} events" if not first else f"the latest {len(events):,} of {count:,} events"
    return Moved(copy, f"the row stands on version {stands}; answered on version {serves}, from {of} in {where}")


def _history(store: RocksReader, user: bytes, count: int) -> list[PastEvent]:
    """The latest events that the store keeps, without a gap, up to the row's last; none where it keeps no history."""
    stem, last = history_stem(user), (count - 1) // CHUNK_EVENTS
    whole: list[bytes] = []
    for packed in reversed(store.histories([chunk_key(stem, k) for k in range(last + 1)])):
        if packed is None or chunk_events(packed) != (CHUNK_EVENTS if whole else count - CHUNK_EVENTS * last):
            break
        whole.insert(0, packed)
    if not whole or store.histories([stem])[0] is None:
        return []
    try:
        entries = decode_chunks(whole)[1].tolist()
    except ValueError as error:
        raise _damaged(store, error) from None
    return [
        PastEvent(number, entry >> 24, entry >> 23 & 1, entry >> 17 & NO_GRADE, 0, 0)
        for number, entry in enumerate(entries, count - len(entries))
    ]


def _head(store: RocksReader, user: bytes) -> Head:
    try:
        return Head.decode(store.histories([history_stem(user)])[0] or b"")
    except ValueError as error:
        raise _damaged(store, error) from None


def _damaged(store: RocksReader, error: ValueError) -> StoreDamaged:
    return StoreDamaged(f"{store.path}: {error}: restore a snapshot or the changelog")
