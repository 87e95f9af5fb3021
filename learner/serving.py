"""The model as the stream uses it: plain arrays, no torch.

Symbols: I items, d width of the first filter, e width of the second (0 when off), G grades, F user feature
columns, P packed covariance entries d(d+1)/2 (row-major lower triangle: (0,0) (1,0) (1,1) (2,0) …).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from learner.features import Catalogue, FeatureEncoder, FeatureField, SparseRows
from learner.interactions import FeatureColumn
from learner.user_state import HeadKind

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FirstFilter:
    """Meta-learned constants of a user's first filter.

    full and diagonal (extended Kalman filter, logistic observation):
        v = ψ'Sψ; z = (b + m·ψ) / sqrt(1 + kappa·v); p = σ(z); w = r·p(1−p); k = 1/(1 + w·v)
        m += Sψ·r·(y−p)·k; S −= w·k·(Sψ)(Sψ)'; diag(S) += drift
    gradient:
        z = b + m·ψ; m_j += rate_j·r·ψ_j·(y−p)·(1 + n/tau)^−alpha, n the user's events so far
    """

    kind: HeadKind
    initialization: Float
    """φ_0: (d,)"""
    covariance: Float
    """S_0: (P,) packed when full, (d,) when diagonal, (0,) when gradient"""
    kappa: float
    """Already multiplied by π/8 (0.3927)."""
    drift: Float
    """q: (d,), zeros for gradient"""
    rate: Float
    """(d,) step sizes of the gradient head, zeros otherwise"""
    tau: float
    alpha: float
    target: Float
    """(G + 1,) the y of an event by grade; entry G is unused (an event without a grade uses its label)"""
    weight: Float
    """(G + 1,) the r of an event by grade; entry G is for an event without a grade"""

    @property
    def dim(self) -> int:
        """d"""
        return len(self.initialization)


@dataclass(frozen=True, slots=True)
class SecondFilter:
    """A full-covariance filter over ψ2 = [1, z/2, second_psi_i], base 0, whose prediction is the final one."""

    initialization: Float
    """(e,)"""
    covariance: Float
    """(e(e+1)/2,) packed"""
    kappa: float
    drift: Float
    weight: float
    """r; the target is always the label"""

    @property
    def dim(self) -> int:
        """e"""
        return len(self.initialization)


@dataclass(frozen=True, slots=True)
class ItemTable:
    """All that prediction needs of an item; row of an unknown item without features: ψ of the zero embedding."""

    psi: Float
    """(I, d), first column 1"""
    base: Float
    """(I,)"""
    second_psi: Float
    """(I, e − 2), or (I, 0)"""

    def grown(self, capacity: int) -> ItemTable:
        """A copy with room for ``capacity`` rows; rows past the old ones are zero."""
        return ItemTable(*(_grown(a, capacity) for a in (self.psi, self.base, self.second_psi)))


def _grown(array: Float, capacity: int) -> Float:
    larger = np.zeros((capacity, *array.shape[1:]), np.float32)
    larger[: len(array)] = array
    return larger


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
        self._unknown = self._append((None,))

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
        means = np.tile(self.first.initialization, (len(user_ids), 1))
        encoder = self.fixed.user_encoder
        if encoder.width and len(user_ids):
            raw = raw_features(encoder.fields, self._users, user_ids, range(len(user_ids)), event_features)
            rows = encoder.encode(raw)
            _add_weighted_rows(means, rows.starts, rows.columns, rows.weights, self.fixed.user_feature_weights)
        return means

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
            rows.append(self._unknown if row is None else self._append(row))
            if settle or row is not None:
                self._rows[item] = rows[-1]
        return rows

    def _append(self, raw: tuple[str | None, ...]) -> int:
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
    """out = e·weights + bias, summed in double precision in index order."""
    for r in range(len(e)):
        for j in range(weights.shape[1]):
            total = np.float64(bias[j])
            for k in range(weights.shape[0]):
                total += e[r, k] * weights[k, j]
            out[r, j] = total
