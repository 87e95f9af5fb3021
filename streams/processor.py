"""The one code path of every stream: ``process(partition, records)``, embedded, live or replayed (design §7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from configs.settings import StateSettings
from learner.adaptation import Adaptation, EventColumns, warm_up
from learner.interactions import Interactions
from learner.serving import ServingModel
from learner.user_state import HEADER_BYTES, RowLayout, Slab, item_hash, new_rows
from state.store import UserStore

OpenStore = Callable[[int, RowLayout], UserStore]
"""(topic partition, layout of the rows) -> its store"""


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
    skipped: int = 0
    """Already applied, by the row's own last offset"""
    guarded: int = 0
    """Updates refused because they were not finite"""
    users_created: int = 0


class Processor:
    """Predicts and learns every event, and makes the users' rows durable, commit by commit.

    A commit is at most ``state.commit_events`` events: their users' rows are read, walked event by event, and
    written back together with the offset of the last. A crash between commits loses nothing: the stream goes on
    after the store's offset, and a row skips what it has applied. How the stream is cut changes no bit.
    Use as a context: it closes the stores it opened.
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
        warm_up(self._adaptation)

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

        Offsets must rise within the records.
        """
        store, n = self.store(partition), len(records)
        result = Predictions(np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.bool_))
        item_row = self.model.item_rows(records.item_ids, records.item_features)
        hashed = self._item_hashes(records.item_ids)
        for first in range(0, n, self._commit_events):
            part = slice(first, first + self._commit_events)
            self._commit(store, records, part, item_row, hashed, result)
        return result

    def _commit(
        self,
        store: UserStore,
        records: Interactions,
        part: slice,
        item_row: NDArray[np.int64],
        hashed: NDArray[np.uint64],
        result: Predictions,
    ) -> None:
        users, slot = np.unique(records.user[part], return_inverse=True)
        keys = [records.user_ids[u].encode() for u in users]
        slab, found = store.get_many(keys)
        self._create(slab, np.flatnonzero(~found), users, records)
        events = EventColumns(
            slot.astype(np.int32).reshape(-1), records.item[part], records.label[part],
            self.model.grades(records.value[part]), records.event_time_ms[part], records.offset[part],
            item_row, hashed,
        )  # fmt: skip
        adapted = self._adaptation.learn(slab, events, self.model.items)
        offset = max(int(records.offset[part][-1]), store.offset() or 0)
        store.write_batch(keys, slab, offset=offset, meta_version=self.model.meta_version)
        result.logit[part], result.probability[part] = adapted.logit, adapted.probability
        result.applied[part] = adapted.applied
        self.counts.events += len(events)
        self.counts.skipped += len(events) - int(adapted.applied.sum())
        self.counts.guarded += adapted.guarded

    def _create(self, slab: Slab, missing: NDArray[np.int64], users: NDArray[np.int32], records: Interactions) -> None:
        """Gives users without a row their start: φ_0 and what their features say."""
        if not len(missing):
            return
        codes = users[missing]
        ids = [records.user_ids[u] for u in codes]
        features = {name: tuple(column[u] for u in codes) for name, column in records.user_features.items()}
        means = self.model.initial_means(ids, features)
        slab[missing] = new_rows(self.layout, self.model.first, self.model.second, means, self.model.meta_version)
        self.counts.users_created += len(missing)

    def _item_hashes(self, item_ids: tuple[str, ...]) -> NDArray[np.uint64]:
        known = self._hashes
        for item in item_ids:
            if item not in known:
                known[item] = item_hash(item)
        return np.fromiter((known[item] for item in item_ids), np.uint64, len(item_ids))


def row_parts(layout: RowLayout) -> dict[str, float]:
    """What a user's row is made of, in bytes."""
    ring = 8 * layout.ring
    return {"header": HEADER_BYTES, "adaptive part": layout.row_bytes - HEADER_BYTES - ring, "event ring": ring}
