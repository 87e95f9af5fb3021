"""Columnar batches of interaction events: what every source yields and every learner takes.

Symbols: N events, U distinct users and I distinct items of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

NO_VALUE = np.float32(np.nan)
"""Marks an event without a graded value."""

FeatureColumn = tuple[str | None, ...]
"""Raw text of one feature, one entry per id of the batch's dictionary; None where the event had none."""


@dataclass(frozen=True, slots=True)
class Interactions:
    """N events as columns, in stream order, with users and items dictionary-encoded.

    A batch owns its arrays and nobody writes to them after construction. The dictionaries are those of the
    batch alone: the same user may have another code in the next batch.
    """

    user_ids: tuple[str, ...]
    """(U,) the distinct user ids."""
    item_ids: tuple[str, ...]
    """(I,) the distinct item ids."""
    user: NDArray[np.int32]
    """(N,) index into ``user_ids``."""
    item: NDArray[np.int32]
    """(N,) index into ``item_ids``."""
    label: NDArray[np.int8]
    """(N,) 0 or 1."""
    value: NDArray[np.float32]
    """(N,) graded value beside the label, NaN where there is none."""
    event_time_ms: NDArray[np.int64]
    """(N,) milliseconds since the epoch."""
    offset: NDArray[np.int64]
    """(N,) position in the source partition, strictly increasing in source order."""
    user_features: dict[str, FeatureColumn] = field(default_factory=dict)
    """Features carried inside the events: name -> (U,) raw text at the user's first event in the batch,
    so that a new user starts alike however the stream is cut."""
    item_features: dict[str, FeatureColumn] = field(default_factory=dict)
    """Features carried inside the events: name -> (I,) raw text at the item's first event in the batch."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: NDArray[np.int64] | slice) -> Interactions:
        """The events at ``rows`` in that order; the dictionaries are shared, not pruned."""
        return Interactions(
            self.user_ids, self.item_ids, self.user[rows], self.item[rows], self.label[rows], self.value[rows],
            self.event_time_ms[rows], self.offset[rows], self.user_features, self.item_features,
        )  # fmt: skip

    def with_offsets(self, offset: NDArray[np.int64]) -> Interactions:
        """The same events at other offsets."""
        return replace(self, offset=offset)

    def pruned(self) -> Interactions:
        """The same events with dictionaries that hold only ids in use, in order of first appearance."""
        user_ids, user, users_kept = _prune(self.user_ids, self.user)
        item_ids, item, items_kept = _prune(self.item_ids, self.item)
        return Interactions(
            user_ids, item_ids, user, item, self.label, self.value, self.event_time_ms, self.offset,
            {name: tuple(column[k] for k in users_kept) for name, column in self.user_features.items()},
            {name: tuple(column[k] for k in items_kept) for name, column in self.item_features.items()},
        )  # fmt: skip

    def in_time_order(self) -> Interactions:
        """Sorted by event time; events of the same time keep their order."""
        times = self.event_time_ms
        if len(times) < 2 or bool((times[1:] >= times[:-1]).all()):
            return self
        return self.take(np.argsort(times, kind="stable"))

    @staticmethod
    def empty() -> Interactions:
        """No events."""
        return Interactions.from_columns([], [], [], [])

    @staticmethod
    def from_columns(
        user_ids: Sequence[str],
        item_ids: Sequence[str],
        labels: Sequence[int] | NDArray[np.int8],
        event_time_ms: Sequence[int] | NDArray[np.int64],
        *,
        values: Sequence[float] | NDArray[np.float32] | None = None,
        offsets: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> Interactions:
        """Encodes plain columns of N entries each; offsets count from 0 where none are given."""
        n = len(user_ids)
        users, user = _encode(user_ids)
        items, item = _encode(item_ids)
        return Interactions(
            users,
            items,
            user,
            item,
            np.asarray(labels, dtype=np.int8),
            np.full(n, NO_VALUE, dtype=np.float32) if values is None else np.asarray(values, dtype=np.float32),
            np.asarray(event_time_ms, dtype=np.int64),
            np.arange(n, dtype=np.int64) if offsets is None else np.asarray(offsets, dtype=np.int64),
        )

    @staticmethod
    def concatenate(batches: Iterable[Interactions]) -> Interactions:
        """One batch of all events in the order given, under one dictionary."""
        users: dict[str, int] = {}
        items: dict[str, int] = {}
        parts: list[tuple[NDArray[np.int32], NDArray[np.int32], Interactions]] = []
        for batch in batches:
            user_map = np.array([users.setdefault(u, len(users)) for u in batch.user_ids], dtype=np.int32)
            item_map = np.array([items.setdefault(i, len(items)) for i in batch.item_ids], dtype=np.int32)
            parts.append((user_map[batch.user], item_map[batch.item], batch))
        if not parts:
            return Interactions.empty()
        sources = [batch for _, _, batch in parts]
        return Interactions(
            tuple(users),
            tuple(items),
            np.concatenate([user for user, _, _ in parts]),
            np.concatenate([item for _, item, _ in parts]),
            np.concatenate([b.label for b in sources]),
            np.concatenate([b.value for b in sources]),
            np.concatenate([b.event_time_ms for b in sources]),
            np.concatenate([b.offset for b in sources]),
            _merge_features(users, [(b.user_ids, b.user_features) for b in sources]),
            _merge_features(items, [(b.item_ids, b.item_features) for b in sources]),
        )


def _encode(ids: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    codes: dict[str, int] = {}
    column = np.fromiter((codes.setdefault(i, len(codes)) for i in ids), dtype=np.int32, count=len(ids))
    return tuple(codes), column


def _prune(
    ids: tuple[str, ...], column: NDArray[np.int32]
) -> tuple[tuple[str, ...], NDArray[np.int32], NDArray[np.int64]]:
    used, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    kept = used[order].astype(np.int64)
    return tuple(ids[k] for k in kept), rank[inverse.reshape(-1)], kept


def _merge_features(
    codes: dict[str, int], parts: list[tuple[tuple[str, ...], dict[str, FeatureColumn]]]
) -> dict[str, FeatureColumn]:
    names = dict.fromkeys(name for _, features in parts for name in features)
    merged: dict[str, list[str | None]] = {name: [None] * len(codes) for name in names}
    met: set[str] = set()
    for ids, features in parts:
        for k, entity in enumerate(ids):
            if entity not in met:
                for name, column in features.items():
                    merged[name][codes[entity]] = column[k]
        met.update(ids)
    return {name: tuple(column) for name, column in merged.items()}
