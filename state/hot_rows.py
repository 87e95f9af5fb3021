"""Users' rows in memory: a bounded slab that all partitions of a process share, written often and read rarely.

Rows are changed in place (``HotRows.memory.slab`` by slot) and written through at every commit, so between two commits
a slot holds what the store holds, and giving it up costs nothing. Which slot is given up: the clock algorithm (Corbató
1968), which passes over a slot once for each time it was used since.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.user_state import RowLayout, Slab
from state.codec import UNKNOWN, Progress
from state.histories import without_users
from state.keys import NOTHING
from state.outbox import CommitLog, commit
from state.store import UserStore

_WINDOW = 4096
"""Slots that the clock's hand looks at in one step"""


class HotMemory:
    """Slots for the rows of one layout. ``slab`` is (capacity, row_bytes); the system gives memory as slots fill."""

    def __init__(self, layout: RowLayout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        self.slab = np.zeros((capacity, layout.row_bytes), np.uint8)
        self.rows = layout.rows(self.slab)
        self.stored_events = np.zeros(capacity, np.int64)
        """(capacity,) events of the row as the store has it; −1: the store has no such row"""
        self.users: list[bytes] = [b""] * capacity
        self._owners: list[dict[bytes, int]] = [{}] * capacity
        self._held = np.zeros(capacity, np.bool_)
        self._used = np.zeros(capacity, np.bool_)
        self._commit = np.full(capacity, -1, np.int64)
        self._current = 0
        self._fresh = 0
        self._free: list[int] = []
        self._copy = np.empty((0, layout.row_bytes), np.uint8)
        self._hand = 0

    def begin(self) -> None:
        """A new commit: slots taken before it may be given up."""
        self._current += 1

    def touch(self, slots: NDArray[np.int32]) -> None:
        """These slots are in use by this commit, and stay."""
        self._used[slots] = True
        self._commit[slots] = self._current

    def take(self, users: Sequence[bytes], owner: dict[bytes, int]) -> NDArray[np.int32]:
        """A slot for each user, entered in ``owner``. ValueError when this commit alone needs more than there are."""
        slots = self._slots(len(users))
        chosen = slots.tolist()
        for slot, user in zip(chosen, users, strict=True):
            self.users[slot] = user
            self._owners[slot] = owner
        owner.update(zip(users, chosen, strict=True))
        self._held[slots] = True
        self.touch(slots)
        return slots

    def gathered(self, slots: NDArray[np.int32]) -> Slab:
        """(n, row_bytes) a copy of these rows, good until the next call: fresh memory each time costs as much again."""
        if len(self._copy) < len(slots):
            self._copy = np.empty((len(slots), self.layout.row_bytes), np.uint8)
        return np.take(self.slab, slots, axis=0, out=self._copy[: len(slots)], mode="clip")

    def give_up(self, slots: list[int]) -> None:
        """Empties slots that hold a user, whatever row is in them."""
        for slot in slots:
            del self._owners[slot][self.users[slot]]
        self._held[slots] = False
        self._used[slots] = False
        self._commit[slots] = -1
        self._free += slots

    def wipe(self, user: bytes) -> None:
        """Overwrites what slots that were given up, and the copy of the latest commit, still hold of a user."""
        self._copy[:] = 0
        for slot, name in enumerate(self.users):
            if name == user and not self._held[slot]:
                self.slab[slot], self.users[slot] = 0, b""

    def _slots(self, count: int) -> NDArray[np.int32]:
        fresh = min(max(count - len(self._free), 0), self.capacity - self._fresh)
        missing = count - len(self._free) - fresh
        if missing > 0:
            self._evict(missing)  # before any is taken: where there are not enough, none is lost
        kept = len(self._free) - (count - fresh)
        slots = self._free[kept:]
        del self._free[kept:]
        slots += range(self._fresh, self._fresh + fresh)
        self._fresh += fresh
        return np.array(slots, np.int32)

    def _evict(self, count: int) -> None:
        idle_windows = 0
        while count > 0:
            window = slice(self._hand, min(self._hand + _WINDOW, self.capacity))
            others = self._held[window] & (self._commit[window] != self._current)
            victims = np.flatnonzero(others & ~self._used[window])[:count]
            passed = int(victims[-1]) + 1 if len(victims) == count else window.stop - window.start
            idle_windows = 0 if others.any() else idle_windows + 1
            if idle_windows * _WINDOW > self.capacity + _WINDOW:
                raise ValueError(
                    f"a commit needs more than the {self.capacity:,} rows that fit into memory: "
                    "raise state.hot_rows_mb, or lower state.commit_events"
                )
            self._used[window.start : window.start + passed] &= ~others[:passed]
            self.give_up((victims + window.start).tolist())
            count -= len(victims)
            self._hand = (window.start + passed) % self.capacity


class Acquired(NamedTuple):
    """Rows of U users, ready to be changed in place."""

    slots: NDArray[np.int32]
    """(U,) in the order asked"""
    unknown: NDArray[np.int64]
    """Places among the U whom the store does not know: their slots hold zeros until the caller starts them"""


class HotRows:
    """One partition's rows: those in memory, and the store behind them. Not for several threads at once.

    ``log`` is told of every commit; None where no changelog is kept.
    """

    def __init__(self, store: UserStore, memory: HotMemory, log: CommitLog | None = None) -> None:
        self.store = store
        self.memory = memory
        self.log = log
        self._index: dict[bytes, int] = {}
        self._progress: Progress | None = None

    def acquire(self, users: Sequence[bytes]) -> Acquired:
        """Slots of distinct users, read from the store where they are not in memory. It begins a commit.

        They stay until the next ``acquire`` of any partition. Raises StoreError and ValueError (too many users).
        """
        memory = self.memory
        memory.begin()
        self.progress()
        slots = np.fromiter(map(self._index.get, users, repeat(-1)), np.int32, len(users))
        absent = np.flatnonzero(slots < 0)
        if not len(absent):
            memory.touch(slots)
            return Acquired(slots, absent)
        memory.touch(slots[slots >= 0])
        absent = np.array(sorted(absent.tolist(), key=users.__getitem__), np.int64)  # in key order they read faster
        names = [users[k] for k in absent.tolist()]
        rows, found = self.store.get_many(names)
        slots[absent] = taken = memory.take(names, self._index)
        memory.slab[taken] = rows
        memory.stored_events[taken] = np.where(found, memory.rows["events"][taken], UNKNOWN)
        return Acquired(slots, absent[~found])

    def write(
        self,
        slots: NDArray[np.int32],
        offset: int,
        meta_version: int,
        clock: bytes = b"",
        payload: bytes = b"",
        histories: Mapping[bytes, bytes | None] = NOTHING,
    ) -> None:
        """Makes these rows durable together with the progress, whose users and events follow from the rows.

        ``payload`` is for the log, ``histories`` are what ``HistoryBook.after`` said of the same events. When the store
        refuses, what is in memory of the partition is dropped and the error goes on: the rows there have learned what
        the store has not.
        """
        memory = self.memory
        before, after = memory.stored_events[slots], memory.rows["events"][slots].astype(np.int64)
        progress = Progress(offset, meta_version, int((before < 0).sum()), int((after - np.maximum(before, 0)).sum()),
                            time.time_ns() // 1_000_000, clock)  # fmt: skip
        users = list(map(memory.users.__getitem__, slots.tolist()))
        self._commit(
            users, memory.gathered(slots), _added(self._progress, progress), histories=histories, payload=payload
        )
        memory.stored_events[slots] = after

    def remove(self, users: Sequence[bytes], events: int) -> None:
        """Takes out users whom the store holds, with their ``events`` in sum, and lowers the progress by them.

        Their histories go in the same step. Raises as ``write`` does.
        """
        progress = without(self.progress(), len(users), events)
        self._commit([], self.memory.slab[:0], progress, deleted=users, histories=without_users(self.store, users))
        self.forget(users)

    def _commit(
        self,
        users: Sequence[bytes],
        rows: Slab,
        progress: Progress | None,
        *,
        deleted: Sequence[bytes] = (),
        histories: Mapping[bytes, bytes | None] = NOTHING,
        payload: bytes = b"",
    ) -> None:
        try:
            commit(self.store, self.log, users, rows, progress, deleted=deleted, histories=histories, payload=payload)
        except BaseException:
            self.forget()
            raise
        self._progress = progress

    def progress(self) -> Progress | None:
        """The store's. When it is not what was written last, the store was set back, and memory knows too much."""
        if self.log is not None:
            self.log.settle()
        progress = self.store.progress()
        if progress != self._progress:
            self.forget()
            self._progress = progress
        return progress

    def forget(self, users: Sequence[bytes] | None = None) -> None:
        """Drops users, or all, from memory: the store's rows count."""
        slots = list(self._index.values()) if users is None else [self._index[u] for u in users if u in self._index]
        self.memory.give_up(slots)


def _added(before: Progress | None, change: Progress) -> Progress:
    """The progress after a change of so many users and events; unknown stays unknown."""
    if before is None:
        return change
    if before.users == UNKNOWN:
        return replace(change, users=UNKNOWN, events=UNKNOWN)
    return replace(change, users=before.users + change.users, events=before.events + change.events)


def without(progress: Progress | None, users: int, events: int) -> Progress | None:
    """The progress when so many users, with so many events in sum, are gone; unknown stays unknown."""
    if progress is None:
        return None
    now_ms = time.time_ns() // 1_000_000
    return _added(progress, Progress(progress.offset, progress.meta_version, -users, -events, now_ms, progress.clock))
