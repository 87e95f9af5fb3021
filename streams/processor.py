"""The one code path of every stream: ``process(partition, records)``, embedded, live or replayed (design §7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from configs.settings import StateSettings
from learner.adaptation import Adaptation, EventColumns
from learner.interactions import Interactions
from learner.serving import ServingModel
from learner.user_state import HEADER_BYTES, RowLayout, Slab, item_hash, new_rows
from state.store import UserStore

OpenStore = Callable[[int, RowLayout], UserStore]
"""(topic partition, layout of the rows) -> its store"""

KNOWN_HASHES = 1 << 20
"""Hashes of item ids that are kept at hand, some 150 MB at most; beyond it they are computed anew."""


class Predictions(NamedTuple):
    """What was said of N records, in their order, each before its label was used."""

    logit: NDArray[np.float32]
    """(N,) NaN where the event was applied before"""
    probability: NDArray[np.float32]
    """(N,) of label 1"""
    applied: NDArray[np.bool_]
    """(N,) False where the store had the event already"""


@dataclass(slots=True)
class Counts:
    """Totals since the processor was made."""

    events: int = 0
    """Records processed, the skipped ones included"""
    skipped: int = 0
    """Already applied, by the row's own last offset"""
    guarded: int = 0
    """Updates refused because they were not finite"""
    users_created: int = 0


@dataclass(frozen=True, slots=True)
class _Users:
    """The U users of one commit, row by row."""

    keys: list[bytes]
    rows: Slab
    """(U, row_bytes)"""
    created: int
    """How many of them the store did not know"""


class Processor:
    """Predicts and learns every event, and makes the users' rows durable, commit by commit.

    A commit is at most ``state.commit_events`` events: their users' rows are read, walked event by event, and those
    that learned are written back together with the offset of the last. A crash between commits loses nothing: the
    stream goes on after the store's offset, and a row skips what it has applied. How the stream is cut changes no
    bit. Use as a context: it closes the stores it opened. Not for several threads at once.
    """

    def __init__(self, model: ServingModel, open_store: OpenStore, state: StateSettings) -> None:
        self.model = model
        self.layout = RowLayout.of(model.first, model.second, state.ring)
        self.counts = Counts()
        self._commit_events = state.commit_events
        self._open_store = open_store
        self._stores: dict[int, UserStore] = {}
        self._adaptation = Adaptation(self.layout, model.first, model.second)
        self._hashes: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every store it opened."""
        while self._stores:
            self._stores.popitem()[1].close()

    def store(self, partition: int) -> UserStore:
        """The partition's store, opened at first use."""
        if partition not in self._stores:
            self._stores[partition] = self._open_store(partition, self.layout)
        return self._stores[partition]

    def process(self, partition: int, records: Interactions) -> Predictions:
        """Predicts each record, then learns it; on return all rows are in the partition's store.

        Offsets must rise within the records. Records that were applied before change nothing and may come again.
        """
        store, n = self.store(partition), len(records)
        result = Predictions(np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.bool_))
        columns = self._columns(records, settle=True)
        for first in range(0, n, self._commit_events):
            part = slice(first, first + self._commit_events)
            users, slot = self._users(store, records, part)
            adapted = self._adaptation.learn(users.rows, _part(columns, part, slot), self.model.items)
            self._write(store, users, slot[adapted.applied], int(records.offset[part][-1]))
            result.logit[part], result.probability[part] = adapted.logit, adapted.probability
            result.applied[part] = adapted.applied
            self.counts.events += len(slot)
            self.counts.skipped += len(slot) - int(adapted.applied.sum())
            self.counts.guarded += adapted.guarded
            self.counts.users_created += users.created
        return result

    def predict(self, partition: int, records: Interactions) -> Predictions:
        """Predicts each record from its user's row as it stands: no label is used and nothing is written."""
        users, slot = self._users(self.store(partition), records, slice(None))
        columns = _part(self._columns(records, settle=False), slice(None), slot)
        adapted = self._adaptation.predict(users.rows, columns, self.model.items)
        return Predictions(adapted.logit, adapted.probability, adapted.applied)

    def _columns(self, records: Interactions, settle: bool) -> EventColumns:
        item_rows = self.model.item_rows(records.item_ids, records.item_features, settle=settle)
        return EventColumns(
            records.user, records.item, records.label, self.model.grades(records.value),
            records.event_time_ms, records.offset, item_rows, self._item_hashes(records.item_ids),
        )  # fmt: skip

    def _users(self, store: UserStore, records: Interactions, part: slice) -> tuple[_Users, NDArray[np.int32]]:
        """The users of a part of the records, new ones at their start, and each event's row among them."""
        present = np.zeros(len(records.user_ids), np.bool_)
        present[records.user[part]] = True
        by_key = sorted((records.user_ids[code].encode(), code) for code in np.flatnonzero(present).tolist())
        keys, codes = [key for key, _ in by_key], [code for _, code in by_key]  # sorted keys read and write faster
        place = np.empty(len(present), np.int32)
        place[codes] = np.arange(len(codes), dtype=np.int32)
        slot = place[records.user[part]]
        rows, found = store.get_many(keys)
        missing = np.flatnonzero(~found).tolist()
        if missing:
            features = {
                name: tuple(column[codes[k]] for k in missing) for name, column in records.user_features.items()
            }
            means = self.model.initial_means([records.user_ids[codes[k]] for k in missing], features)
            first, second, version = self.model.first, self.model.second, self.model.meta_version
            rows[missing] = new_rows(self.layout, first, second, means, version)
        return _Users(keys, rows, len(missing)), slot

    def _write(self, store: UserStore, users: _Users, learned: NDArray[np.int32], offset: int) -> None:
        """Writes the rows that learned something, with the offset, which never steps back."""
        changed = np.zeros(len(users.keys), np.bool_)
        changed[learned] = True
        before = store.offset()
        if before is not None and offset <= before and not len(learned):
            return
        offset = offset if before is None else max(offset, before)
        version = self.model.meta_version
        if changed.all():
            store.write_batch(users.keys, users.rows, offset=offset, meta_version=version)
        else:
            keys = [users.keys[k] for k in np.flatnonzero(changed).tolist()]
            store.write_batch(keys, users.rows[changed], offset=offset, meta_version=version)

    def _item_hashes(self, item_ids: tuple[str, ...]) -> NDArray[np.uint64]:
        known = self._hashes
        if len(known) > KNOWN_HASHES:
            known.clear()
        for item in item_ids:
            if item not in known:
                known[item] = item_hash(item)
        return np.fromiter(map(known.__getitem__, item_ids), np.uint64, len(item_ids))


def _part(columns: EventColumns, part: slice, slot: NDArray[np.int32]) -> EventColumns:
    return EventColumns(
        slot, columns.item[part], columns.label[part], columns.grade[part], columns.event_time_ms[part],
        columns.offset[part], columns.item_row, columns.item_hash,
    )  # fmt: skip


def row_parts(layout: RowLayout) -> dict[str, float]:
    """What a user's row is made of, in bytes."""
    ring = 8 * layout.ring
    return {"header": HEADER_BYTES, "adaptive part": layout.row_bytes - HEADER_BYTES - ring, "event ring": ring}
