"""Events that a producer sent again: which of a partition's events carry an id that was there a short while ago.

The rule: an event is a duplicate if an event with the same id lies within the ``window`` offsets before it, be that one
a duplicate or not. So the answer for an offset follows from the ``window`` offsets before it and from nothing else: not
from how the events came in batches, and not from a worker's life. One that starts anew and first hands in the events of
the last ``window`` offsets decides as if it had never stopped. (Were ids counted from their last *kept* occurrence, a
chain of repetitions would have to be followed back without end.) An id that comes again and again, each time within the
window, therefore counts once however long that lasts.

Symbols: N events, C slots of the queue (a power of two), 2C slots of the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

NO_ID = 0
"""The hash of an event that has no id: it is never a duplicate"""
_FIRST_SLOTS = 1024
_NOWHERE = -(1 << 62)
"""Before every offset; a window can be taken off it"""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiplying by it spreads ids that are no good hashes (Knuth, TAOCP 3, 6.4)"""


class DuplicateWindow:
    """Of one partition: the ids of the last ``window`` offsets.

    Remembered are the events of the ``window`` offsets before the last call's first offset, and those of that call:
    48 to 96 bytes for each of the most that there were at a time.
    Not for several threads at once.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._at, self._id = np.zeros(0, np.int64), np.zeros(0, np.uint64)
        """The queue, by slot: the events remembered, in their order"""
        self.forget()
        self.duplicates(np.zeros(1, np.int64), np.ones(1, np.uint64))  # compiles, so that the first batch need not wait
        self.forget()

    def forget(self) -> None:
        """Nothing is remembered: the next call may begin at any offset."""
        self._from = _NOWHERE
        """Where the last call began: what lies before it is decided for good"""
        self._head, self._tail = 0, 0
        """The queue's first event and its end, counted without end; a slot is the count modulo C"""
        self._resize(_FIRST_SLOTS)

    def duplicates(self, offset: NDArray[np.int64], event_id: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(N,) which events are duplicates, by the (N,) rising offsets and the (N,) ids' hashes (0: no id).

        The last call's events may come again, all or those from some offset on, and get the same answer: a batch that
        failed is tried again. Raises ValueError for events before those; ``forget`` then begins anew.
        """
        offset, event_id = _readable(offset, np.int64), _readable(event_id, np.uint64)
        answer = np.zeros(len(offset), np.bool_)
        if not len(offset):
            return answer
        self._begin(int(offset[0]), len(offset))
        self._tail = _walk(self._at, self._id, self._tail, *self._table, self.window, offset, event_id, answer)
        return answer

    def _begin(self, first: int, count: int) -> None:
        """Makes the queue hold the events of the ``window`` offsets before ``first``, and room for ``count`` more."""
        if first < self._from:
            raise ValueError(f"offset {first} comes before {self._from}, where the last call began: forget() first")
        self._from = first
        slots = len(self._at)
        again = self._tail
        while again > self._head and self._at[(again - 1) % slots] >= first:
            again -= 1
        if again < self._tail:
            self._tail = again
            self._resize(slots)
        self._head = _drop(self._at, self._id, self._head, self._tail, *self._table, first - self.window)
        if (needed := self._tail - self._head + count) > slots:
            self._resize(1 << (needed - 1).bit_length())

    def _resize(self, slots: int) -> None:
        """A queue of so many slots with the same events, and a table made of them."""
        at, ids = np.zeros(slots, np.int64), np.zeros(slots, np.uint64)
        kept = np.arange(self._head, self._tail)
        if len(kept):
            at[: len(kept)], ids[: len(kept)] = self._at[kept % len(self._at)], self._id[kept % len(self._at)]
        self._at, self._id, self._head, self._tail = at, ids, 0, len(kept)
        self._table = np.zeros(2 * slots, np.uint64), np.zeros(2 * slots, np.int64)
        """Id (``NO_ID``: a free slot) and its last offset"""
        _enter_all(at, ids, len(kept), *self._table)


def _readable(values: NDArray[Any], kind: type) -> NDArray[Any]:
    """Contiguous and read-only, always: writable arrays would be compiled for once more."""
    view: NDArray[Any] = np.ascontiguousarray(values, kind).view()
    view.flags.writeable = False
    return view


@njit(cache=True, nogil=True)
def _slot(table_id, event_id):  # type: ignore[no-untyped-def]
    """Where the id is in the table, or the free slot where it belongs."""
    mask = np.uint64(len(table_id) - 1)
    word = event_id * _GOLDEN
    slot = (word ^ (word >> np.uint64(32))) & mask
    while table_id[slot] != NO_ID and table_id[slot] != event_id:
        slot = (slot + np.uint64(1)) & mask
    return slot


@njit(cache=True, nogil=True)
def _walk(queue_at, queue_id, tail, table_id, table_at, window, offset, event_id, answer):  # type: ignore[no-untyped-def]
    """Answers and remembers N events; the queue has room. Gives the queue's new end."""
    for n in range(len(offset)):
        if event_id[n] == NO_ID:
            continue
        slot = _slot(table_id, event_id[n])
        answer[n] = table_id[slot] != NO_ID and offset[n] - table_at[slot] <= window
        table_id[slot], table_at[slot] = event_id[n], offset[n]
        queue_at[tail % len(queue_at)], queue_id[tail % len(queue_at)] = offset[n], event_id[n]
        tail += 1
    return tail


@njit(cache=True, nogil=True)
def _drop(queue_at, queue_id, head, tail, table_id, table_at, before):  # type: ignore[no-untyped-def]
    """Forgets the events at offsets lower than ``before``. Gives the queue's new head."""
    while head < tail and queue_at[head % len(queue_at)] < before:
        slot = _slot(table_id, queue_id[head % len(queue_at)])
        if table_at[slot] == queue_at[head % len(queue_at)]:  # else the id came again since
            _free(table_id, table_at, slot)
        head += 1
    return head


@njit(cache=True, nogil=True)
def _free(table_id, table_at, slot):  # type: ignore[no-untyped-def]
    """Frees a slot, and moves up those behind it that would be cut off from where they belong."""
    mask = np.uint64(len(table_id) - 1)
    table_id[slot] = NO_ID
    behind = (slot + np.uint64(1)) & mask
    while table_id[behind] != NO_ID:
        moved, at = table_id[behind], table_at[behind]
        table_id[behind] = NO_ID
        place = _slot(table_id, moved)
        table_id[place], table_at[place] = moved, at
        behind = (behind + np.uint64(1)) & mask


@njit(cache=True, nogil=True)
def _enter_all(queue_at, queue_id, count, table_id, table_at):  # type: ignore[no-untyped-def]
    """Puts the queue's first ``count`` events into an empty table."""
    for k in range(count):
        slot = _slot(table_id, queue_id[k])
        table_id[slot], table_at[slot] = queue_id[k], queue_at[k]
