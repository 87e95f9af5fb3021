"""A row on the version that answers: the stream moves it at its user's next event, a reader moves a copy of it.

In the same way and to the same bits (``learner.rebasing``): by what the run was set to, from the user's whole history
where the store keeps it, else from the events in the row's ring, or by exchanging the prior. What the next event will
say of its user is not known: features are the catalogue's, else those that came with the first event of the history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from learner.prior_exchange import exchange_prior
from learner.retrace import AdaptivePart
from learner.user_state import NO_GRADE, Slab
from state.exceptions import StoreDamaged
from state.history_codec import CHUNK_EVENTS, Book, Head, decode_chunks, oldest_chunk, unbroken
from state.keys import HISTORY, chunk_key, history_stem
from state.reading.history import PastEvent, past_events, replay
from state.reading.model_view import Features, ModelView, Rebase
from state.store import RocksReader

Packed = TypeVar("Packed", bytes, list[bytes])
Decoded = TypeVar("Decoded")


class Movement(NamedTuple):
    """How a state came onto the version that answers."""

    from_version: int | None
    """That it stood on; None where that is not known"""
    to_version: int
    way: Rebase | Literal["replay", "none"]
    """``replay``: events of then were learned under the version of now. ``none``: it could not be moved"""
    events: int
    """Learned again to move it"""
    text: str
    """All of it in words"""


class Moved(NamedTuple):
    """A row, and what it took."""

    row: np.void
    movement: Movement | None
    """None: it stands on the version that answers"""


def moved(view: ModelView, store: RocksReader, user: bytes, slab: Slab) -> Moved:
    """The user's row on the version of the view; ``slab`` (1, row_bytes) is not changed.

    Raises StoreDamaged for a history that cannot be read.
    """
    row = store.layout.rows(slab)[0]
    stands = int(row["meta_version"])
    if stands == view.meta_version:
        return Moved(row, None)
    if stands > view.newest_version:
        return Moved(row, _too_new(view, stands))
    return _Mover(view, store, user).move(slab)


def replayed(view: ModelView) -> Movement | None:
    """What to say of a state that was learned again as of then: None where there has been one version only."""
    if not view.newest_version:
        return None
    text = f"answered on {_version(view)}, which serves now; another may have served then"
    return Movement(None, view.meta_version, "replay", 0, text)


class _Mover:
    """Moves one user's row."""

    def __init__(self, view: ModelView, store: RocksReader, user: bytes) -> None:
        self._view = view
        self._store = store
        self._user = user
        self._user_id = user.decode()
        self._stem = history_stem(user)
        self._features = self._known_features()

    def move(self, slab: Slab) -> Moved:
        """The stream's way, where that can be gone; from the ring it always can."""
        found = None
        if self._view.rebase == "history":
            found = self._by_history(slab)
        if self._view.rebase == "closed":
            found = self._by_exchange(slab)
        return found or self._by_ring(slab)

    def _by_history(self, slab: Slab) -> Moved | None:
        row = self._row(slab)
        events = self._history(int(row["events"]))
        if not events or self._features is None:
            return None
        return self._learned(row, events, self._view.start_of(self._user_id, self._features), "history")

    def _by_exchange(self, slab: Slab) -> Moved | None:
        row, view = self._row(slab), self._view
        old = view.priors(int(row["meta_version"]), self._user_id, self._features)
        new = view.priors(view.meta_version, self._user_id, self._features)
        if old is None or new is None:
            return None
        copy = slab.copy()
        exchange_prior(self._store.layout, copy, old, new, view.meta_version)
        return Moved(self._row(copy), _told(view, row, "closed", 0, "its prior exchanged"))

    def _by_ring(self, slab: Slab) -> Moved:
        row = self._row(slab)
        events = past_events(self._store.layout, row)
        return self._learned(row, events, self._view.start(self._user_id, self._features), "ring")

    def _learned(self, row: np.void, events: list[PastEvent], start: AdaptivePart, way: Rebase) -> Moved:
        """The row after these events, its latest ones, from where the user starts."""
        view, count = self._view, int(row["events"])
        first = count - len(events)
        part = start._replace(events=first)
        for step in replay(view, part, events):
            part = step.after
        copy = row.copy()
        part.put(copy)
        copy["meta_version"] = view.meta_version
        of = f"all {count:,} events" if not first else f"the latest {len(events):,} of {count:,} events"
        return Moved(copy, _told(view, row, way, len(events), f"re-derived from {of} in its {way}"))

    def _history(self, count: int) -> list[PastEvent]:
        """As ``HistoryBook.read`` has it: none where it is not kept."""
        book = self._checked(Book.decode, self._read(HISTORY))
        if book is None or count < 1:
            return []
        oldest, last = int(oldest_chunk(book, np.array(count))), (count - 1) // CHUNK_EVENTS
        held = self._store.histories([chunk_key(self._stem, k) for k in range(oldest, last + 1)])
        found = self._checked(decode_chunks, unbroken(held, count - CHUNK_EVENTS * last) or None)
        entries = [] if found is None else found[1].tolist()
        return [
            PastEvent(number, entry >> 24, entry >> 23 & 1, entry >> 17 & NO_GRADE, 0, 0)
            for number, entry in enumerate(entries, count - len(entries))
        ]

    def _known_features(self) -> Features | None:
        head = self._checked(Head.decode, self._read(self._stem))
        if head is not None and head.user != self._user:
            raise self._damaged(f"the history of user {self._user!r} is that of {head.user!r}")
        return None if head is None else Features(head.columns, head.weights)

    def _read(self, key: bytes) -> bytes | None:
        return self._store.histories([key])[0]

    def _row(self, slab: Slab) -> np.void:
        row: np.void = self._store.layout.rows(slab)[0]
        return row

    def _checked(self, decode: Callable[[Packed], Decoded], packed: Packed | None) -> Decoded | None:
        """None: there is nothing to decode."""
        try:
            return None if packed is None else decode(packed)
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, what: str) -> StoreDamaged:
        return StoreDamaged(f"{self._store.path}: {what}: restore a snapshot or the changelog")


def _told(view: ModelView, row: np.void, way: Rebase, events: int, how: str) -> Movement:
    stands = int(row["meta_version"])
    text = f"row stands on version {stands}; answered on {_version(view)}, {how}"
    return Movement(stands, view.meta_version, way, events, text)


def _too_new(view: ModelView, stands: int) -> Movement:
    text = (
        f"row stands on version {stands}, newer than all that the model beside it knows of, which is of "
        f"{_version(view)}: what is worked out from both is not what the stream would say; ask again when the run has "
        "written its model"
    )
    return Movement(stands, view.meta_version, "none", 0, text)


def _version(view: ModelView) -> str:
    return f"version {view.meta_version}{', a canary' if view.is_canary else ''}"
