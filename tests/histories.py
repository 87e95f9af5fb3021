"""Commits of a stream into a store that keeps histories, and what those histories must be by the events alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np

from learner.adaptation import Adaptation, EventColumns
from learner.features import SparseRows
from learner.histories import starts_of
from learner.interactions import Interactions
from learner.serving import ServingModel
from learner.user_state import ItemHashes, RowLayout, new_rows, ring_item
from state.codec import owner
from state.histories import HistoryBook, HistoryLimits
from state.hot_rows import HotMemory, HotRows
from state.memory_store import MemoryUserStore
from state.store import UserStore
from tests.models import random_stream, small_model

PLENTY = HistoryLimits(1 << 40, 1 << 20)
Expected = dict[bytes, tuple[list[int], list[int], list[int]]]
"""User -> items (40 bits), labels, grades (63: none) of its events"""


@cache
def model() -> ServingModel:
    return small_model("gradient", second=False)


def layout_of(ring: int) -> RowLayout:
    return RowLayout.of(model().first, None, ring)


@cache
def _adaptation(ring: int) -> Adaptation:
    return Adaptation(layout_of(ring), model().first, None)


def features_of(users: Sequence[bytes]) -> SparseRows:
    """A user's hash decides how many columns it has, 0 to 2."""
    counts = np.array([owner(user) % 3 for user in users], np.int64)
    weights = np.concatenate([np.arange(n) + owner(u) % 7 for u, n in zip(users, counts, strict=True)] or [[]])
    return SparseRows(starts_of(counts), (weights * 2).astype(np.int64), weights.astype(np.float32))


class Keeper:
    """One partition, committed to as a processor does; users in ``expiring`` start anew at their next commit."""

    def __init__(
        self, store: UserStore | None = None, limits: HistoryLimits = PLENTY, *, ring: int = 32, keep: bool = True
    ) -> None:
        self.layout = layout_of(ring)
        self.store = MemoryUserStore(self.layout) if store is None else store
        self.hot = HotRows(self.store, HotMemory(self.layout, 4096))
        self.book = HistoryBook(self.store, self.layout, limits, len(model().fixed.grades))
        self.keep = keep
        self._adaptation = _adaptation(ring)

    def commit(self, records: Interactions, expiring: frozenset[bytes] = frozenset()) -> None:
        """One commit of all records."""
        memory = self.hot.memory
        codes, user = np.unique(records.user, return_inverse=True)
        users = [records.user_ids[code].encode() for code in codes.tolist()]
        slots, unknown = self.hot.acquire(users)
        starting = np.array([name in expiring for name in users], np.bool_)
        starting[unknown] = True
        means = np.zeros((int(starting.sum()), self.layout.dim), np.float32)
        memory.slab[slots[starting]] = new_rows(self.layout, model().first, None, means, 0)
        pending = self.book.before(
            users, memory.rows, slots, starting, memory.stored_events[slots],
            lambda places: features_of([users[k] for k in places.tolist()]),
        )  # fmt: skip
        events = EventColumns(
            slots[user], records.item, records.label, model().grades(records.value), records.event_time_ms,
            records.offset, model().item_rows(records.item_ids, {}), ItemHashes().of(records.item_ids),
        )  # fmt: skip
        applied = self._adaptation.learn(memory.slab, events, model().items).applied
        learned = np.unique(user[applied])
        histories = self.book.after(pending, user, events, applied) if self.keep else {}
        self.hot.write(slots[learned], int(records.offset[-1]), 0, histories=histories)

    def commits(self, stream: Interactions, cuts: Iterable[int]) -> Keeper:
        """The stream, cut at these places."""
        for first, last in pairwise(sorted({0, len(stream), *cuts})):
            self.commit(stream.take(slice(first, last)))
        return self

    def contents(self) -> dict[bytes, bytes]:
        """All keys of histories, as stored."""
        found = {}
        cursor = self.store.history_cursor()
        entry = cursor.seek(b"h")
        while entry is not None:
            found[entry[0]] = entry[1]
            entry = cursor.next()
        cursor.close()
        return found

    def held(self) -> Expected:
        """What ``walk`` tells."""
        return {
            user: (history.item.tolist(), history.label.tolist(), history.grade.tolist())
            for user, _, history in self.book.walk()
        }


def expected(stream: Interactions, users: Iterable[str] | None = None) -> Expected:
    """By the events alone, with nothing of the code under test."""
    grades = model().grades(stream.value).tolist()
    hashes = ItemHashes().of(stream.item_ids).tolist()
    found: Expected = {}
    for k in range(len(stream)):
        name = stream.user_ids[stream.user[k]]
        if users is None or name in users:
            items, labels, kept = found.setdefault(name.encode(), ([], [], []))
            items.append(ring_item(hashes[stream.item[k]]))
            labels.append(int(stream.label[k]))
            kept.append(63 if grades[k] == len(model().fixed.grades) else grades[k])
    return found


def recounted(keeper: Keeper) -> tuple[int, int, int]:
    """(users, events, keys) by the keys themselves."""
    keys = {key: value for key, value in keeper.contents().items() if key != b"h"}
    events = sum((len(value) - 8) // 8 for key, value in keys.items() if len(key) > 13)
    return sum(len(key) == 13 for key in keys), events, len(keys)


def counted(keeper: Keeper) -> tuple[int, int, int]:
    """(users, events, keys) by the book."""
    book = keeper.book.counts()
    return book.users, book.events, book.keys


__all__ = ["PLENTY", "Keeper", "counted", "expected", "features_of", "layout_of", "random_stream", "recounted"]
