"""The model as the stream uses it: plain arrays, no torch.

Symbols: I items, d width of the first filter, e width of the second (0 when off), G grades, F user feature
columns. The filters' constants and the items' table are in ``learner.filters``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from learner.features import Catalogue, FeatureEncoder, FeatureField, SparseRows
from learner.filters import FirstFilter as FirstFilter
from learner.filters import Float as Float
from learner.filters import ItemTable as ItemTable
from learner.filters import SecondFilter as SecondFilter
from learner.interactions import FeatureColumn
from learner.user_state import item_hash, ring_item


@dataclass(frozen=True, slots=True)
class FixedPart:
    """θ as arrays: what turns ids and features into ψ, b and a user's start.

    Symbols: V items of the vocabulary, D the item embedding's width, Fi and Fu feature columns.
    """

    item_ids: tuple[str, ...]
    """(V,) the vocabulary: items of the offline events"""
    item_embedding: Float
    """E: (V, D)"""
    item_bias: Float
    """(V,)"""
    item_features: SparseRows
    """V rows: the features of the vocabulary"""
    item_feature_weights: Float
    """C: (Fi, D)"""
    base_weight: Float
    """w: (D,)"""
    base_bias: float
    projection: Float
    """P: (D, d − 1)"""
    projection_bias: Float
    """(d − 1,)"""
    second_projection: Float
    """(D, e − 2), or (D, 0)"""
    second_projection_bias: Float
    """(e − 2,), or (0,)"""
    user_feature_weights: Float
    """W: (Fu, d)"""
    item_encoder: FeatureEncoder
    user_encoder: FeatureEncoder
    grades: Float
    """(G,) the graded values in rising order; empty without graded targets"""


RawFeatures = tuple[str | None, ...]
"""One entity's raw texts, in the order of its encoder's fields"""


_Sorted = tuple[NDArray[np.uint64], NDArray[np.int64]]
"""(hashes, rising; the row of each)"""


class HashedItems:
    """Rows by ``ring_item``: the vocabulary in one sorted array, and what was added since beside it."""

    def __init__(self, item_ids: Sequence[str]) -> None:
        self._vocabulary = item_ids
        self._added: dict[int, int] = {}
        self._sorted: _Sorted | None = None
        self._late: _Sorted | None = None

    def of_vocabulary(self, item_ids: Sequence[str]) -> HashedItems:
        """Of another vocabulary, and nothing added; what it begins alike is not hashed again."""
        known = len(self._vocabulary)
        if item_ids[:known] != self._vocabulary:
            return HashedItems(item_ids)
        other = HashedItems(self._vocabulary)
        other._sorted = self._sorted
        for row in range(known, len(item_ids)):
            other.add(item_ids[row], row)
        return other

    def add(self, item: str, row: int) -> None:
        """Of two items with the same 40 bits the first stays."""
        self._added.setdefault(ring_item(item_hash(item)), row)
        self._late = None

    def rows(self, item: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(n,) −1 where the item is not known."""
        if self._sorted is None:  # at first use: a model that never moves a row needs none
            hashes = np.fromiter((ring_item(item_hash(i)) for i in self._vocabulary), np.uint64, len(self._vocabulary))
            self._sorted = _in_order(hashes, np.arange(len(hashes)))
        if self._late is None:
            late = np.fromiter(self._added, np.uint64, len(self._added))
            self._late = _in_order(late, np.fromiter(self._added.values(), np.int64, len(late)))
        rows = _found(*self._sorted, item)
        missing = rows < 0
        if missing.any():
            rows[missing] = _found(*self._late, item[missing])
        return rows


def _in_order(hashes: NDArray[np.uint64], rows: NDArray[np.int64]) -> _Sorted:
    order = np.argsort(hashes, kind="stable")
    return hashes[order], rows[order]


def _found(hashes: NDArray[np.uint64], rows: NDArray[np.int64], item: NDArray[np.uint64]) -> NDArray[np.int64]:
    if not len(hashes):
        return np.full(len(item), -1)
    place = np.searchsorted(hashes, item)
    inside = np.minimum(place, len(hashes) - 1)
    return np.where(hashes[inside] == item, rows[inside], -1)


class ServingModel:
    """Looks up what the kernel needs for ids and features. Not thread-safe: the item table grows.

    An id or category never seen in training is legal: its learned part is zero and its features speak. Every
    number depends on one id and its features alone, never on what else is in the batch.
    """

    def __init__(
        self,
        fixed: FixedPart,
        first: FirstFilter,
        second: SecondFilter | None,
        *,
        users: Catalogue | None = None,
        items: Catalogue | None = None,
        meta_version: int = 0,
        fingerprint: str = "",
    ) -> None:
        self.fixed = fixed
        self.first = first
        self.second = second
        self.meta_version = meta_version
        self.fingerprint = fingerprint
        self._users = users or Catalogue()
        self._items = items or Catalogue()
        self._table = project_items(fixed, fixed.item_embedding, fixed.item_bias, fixed.item_features)
        self._count = len(fixed.item_ids)
        self._rows = {item: row for row, item in enumerate(fixed.item_ids)}
        self._met: dict[str, RawFeatures | None] = {}
        """Items that the stream brought, and their raw features at first sight"""
        self._hashes = HashedItems(fixed.item_ids)
        self._unknown = self._append((None,))

    def successor(
        self, fixed: FixedPart, first: FirstFilter, second: SecondFilter | None, meta_version: int
    ) -> ServingModel:
        """Another version of the parameters, in the place of this one: same catalogues, and the same items met.

        The vocabulary may have grown, by items met or others.
        """
        new = ServingModel(
            fixed, first, second, users=self._users, items=self._items, meta_version=meta_version,
            fingerprint=self.fingerprint,
        )  # fmt: skip
        new._hashes = self._hashes.of_vocabulary(fixed.item_ids)
        for item, raw in self._met.items():
            if item not in new._rows:
                new._meet(item, raw)
        return new

    @property
    def met_items(self) -> Mapping[str, RawFeatures | None]:
        """Items outside the vocabulary that the stream brought, with their raw features, in the order they came."""
        return self._met

    @property
    def items(self) -> ItemTable:
        """All rows known so far; the arrays are replaced, never moved, as the table grows."""
        return self._table

    @property
    def item_count(self) -> int:
        """Rows of ``items`` in use; the arrays may hold spare rows after them."""
        return self._count

    def item_rows(
        self, item_ids: Sequence[str], event_features: Mapping[str, FeatureColumn], *, settle: bool = True
    ) -> NDArray[np.int64]:
        """(len(item_ids),) rows into ``items``; unseen items with features are added, others share one row.

        Unless ``settle`` is off, features count at an item's first sight only: what came without any stays so. An
        item's row then hangs on its first event, not on which later events come in the same batch.
        """
        get = self._rows.get
        rows = np.fromiter((get(i, -1) for i in item_ids), dtype=np.int64, count=len(item_ids))
        unseen = np.flatnonzero(rows < 0)
        if len(unseen):
            rows[unseen] = self._add_items([item_ids[k] for k in unseen.tolist()], unseen, event_features, settle)
        return rows

    def initial_means(
        self, user_ids: Sequence[str], event_features: Mapping[str, FeatureColumn]
    ) -> NDArray[np.float32]:
        """(len(user_ids), d) every user's start: φ_0 + W·features."""
        return self.means_of(self.user_features(user_ids, event_features))

    def user_features(self, user_ids: Sequence[str], event_features: Mapping[str, FeatureColumn]) -> SparseRows:
        """len(user_ids) rows of the users' encoded features: the catalogue's, or those of their events."""
        encoder = self.fixed.user_encoder
        if not encoder.width:
            return encoder.encode([None] * len(user_ids))
        return encoder.encode(raw_features(encoder.fields, self._users, user_ids, range(len(user_ids)), event_features))

    def means_of(self, features: SparseRows) -> NDArray[np.float32]:
        """(len(features), d) starts of users with these features: φ_0 + W·features."""
        means = np.tile(self.first.initialization, (len(features), 1))
        _add_weighted_rows(means, features.starts, features.columns, features.weights, self.fixed.user_feature_weights)
        return means

    def rows_of(self, item: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(n,) rows into ``items`` by ``learner.user_state.ring_item``; that of an unknown item where none is known."""
        rows = self._hashes.rows(item)
        return np.where(rows < 0, self._unknown, rows)

    def named_items(self) -> tuple[tuple[str, ...], ItemTable]:
        """Every item that can be named without an event: the vocabulary, the items met so far, the catalogue's.

        (I ids, their I rows); the last of I + 1 rows is that of an unknown item. Nothing is settled by asking.
        """
        met, others = list(self._rows), [item for item in self._items.rows if item not in self._rows]
        raw = raw_features(self.fixed.item_encoder.fields, self._items, others, range(len(others)), {})
        width = self.fixed.item_embedding.shape[1]
        added = project_items(
            self.fixed, np.zeros((len(raw), width), np.float32), np.zeros(len(raw), np.float32),
            self.fixed.item_encoder.encode(raw),
        )  # fmt: skip
        rows = np.fromiter(self._rows.values(), np.int64, len(met))
        unknown = slice(self._unknown, self._unknown + 1)
        columns = zip(
            (self._table.psi, self._table.base, self._table.second_psi),
            (added.psi, added.base, added.second_psi),
            strict=True,
        )
        return (*met, *others), ItemTable(*(np.concatenate([old[rows], new, old[unknown]]) for old, new in columns))

    def named_starts(self) -> tuple[tuple[str, ...], Float]:
        """(U ids, (U, d) means): the start of every user of the catalogue."""
        users = tuple(self._users.rows)
        return users, self.initial_means(users, {})

    def grades(self, value: NDArray[np.float32]) -> NDArray[np.int32]:
        """(N,) the index of the nearest grade, or G where the event has no value."""
        return nearest_grades(self.fixed.grades, value)

    def _add_items(
        self,
        item_ids: list[str],
        positions: NDArray[np.int64],
        event_features: Mapping[str, FeatureColumn],
        settle: bool,
    ) -> list[int]:
        raw = raw_features(self.fixed.item_encoder.fields, self._items, item_ids, positions, event_features)
        rows = []
        for item, row in zip(item_ids, raw, strict=True):
            if settle or row is not None:
                rows.append(self._meet(item, row))
            else:
                rows.append(self._unknown)
        return rows

    def _meet(self, item: str, raw: RawFeatures | None) -> int:
        """The row of an item that is not in the vocabulary."""
        row = self._unknown if raw is None else self._append(raw)
        self._rows[item] = row
        self._met[item] = raw
        self._hashes.add(item, row)
        return row

    def _append(self, raw: RawFeatures) -> int:
        features = self.fixed.item_encoder.encode([raw])
        width = self.fixed.item_embedding.shape[1]
        added = project_items(self.fixed, np.zeros((1, width), np.float32), np.zeros(1, np.float32), features)
        row = self._count
        if row == len(self._table.base):
            self._table = self._table.grown(max(1024, 2 * row))
        self._table.psi[row], self._table.base[row] = added.psi[0], added.base[0]
        self._table.second_psi[row] = added.second_psi[0]
        self._count += 1
        return row


def raw_features(
    fields: tuple[FeatureField, ...],
    catalogue: Catalogue,
    ids: Sequence[str],
    positions: Iterable[int],
    event_features: Mapping[str, FeatureColumn],
) -> list[tuple[str | None, ...] | None]:
    """Raw feature rows in the order of ``fields``: the catalogue's, else those carried in the event, else None.

    ``positions[k]`` is where ``ids[k]`` stands in the columns of ``event_features``.
    """
    order = {f.name: k for k, f in enumerate(catalogue.fields)}
    rows: list[tuple[str | None, ...] | None] = []
    for entity, position in zip(ids, positions, strict=True):
        known = catalogue.rows.get(entity)
        row = tuple(
            known[order[f.name]]
            if known is not None and f.name in order
            else (event_features[f.name][position] if f.name in event_features else None)
            for f in fields
        )
        rows.append(row if any(text is not None for text in row) else None)
    return rows


def nearest_grades(grades: NDArray[np.float32], value: NDArray[np.float32]) -> NDArray[np.int32]:
    """(N,) the index of the grade nearest to each value (ties go down), or len(grades) where it is NaN."""
    if not len(grades):
        return np.zeros(len(value), dtype=np.int32)
    middles = (grades[1:] + grades[:-1]) / 2
    index = np.searchsorted(middles, value, side="left").astype(np.int32)
    index[np.isnan(value)] = len(grades)
    return index


def project_items(fixed: FixedPart, embedding: Float, bias: Float, features: SparseRows) -> ItemTable:
    """e = E + C·features; ψ = [1, P·e]; b = w·e + bias (design: the learner), row by row in a fixed order."""
    e = embedding.astype(np.float64)
    _add_weighted_rows(e, features.starts, features.columns, features.weights, fixed.item_feature_weights)
    n, dim = len(e), fixed.projection.shape[1] + 1
    table = ItemTable(
        np.ones((n, dim), np.float32),
        np.empty(n, np.float32),
        np.empty((n, fixed.second_projection.shape[1]), np.float32),
    )
    _project(e, fixed.projection, fixed.projection_bias, table.psi[:, 1:])
    _project(e, fixed.second_projection, fixed.second_projection_bias, table.second_psi)
    _project(e, fixed.base_weight[:, None], np.array([fixed.base_bias], np.float32), table.base[:, None])
    np.add(table.base, bias, out=table.base)
    return table


@numba.njit(cache=True)
def _add_weighted_rows(
    target: NDArray[Any], starts: NDArray[np.int64], columns: NDArray[np.int64], weights: Float, table: Float
) -> None:
    """target[r] += Σ weights·table[columns], one entry after the other, so that a row's bits depend on it alone."""
    for r in range(len(target)):
        for k in range(starts[r], starts[r + 1]):
            for j in range(table.shape[1]):
                target[r, j] += weights[k] * table[columns[k], j]


@numba.njit(cache=True)
def _project(e: NDArray[np.float64], weights: Float, bias: Float, out: Float) -> None:
    """out = e·weights + bias, summed in double precision in index order: column by column, so that it vectorizes."""
    total = np.empty(weights.shape[1], np.float64)
    for r in range(len(e)):
        for j in range(weights.shape[1]):
            total[j] = bias[j]
        for k in range(weights.shape[0]):
            for j in range(weights.shape[1]):
                total[j] += e[r, k] * weights[k, j]
        for j in range(weights.shape[1]):
            out[r, j] = total[j]
