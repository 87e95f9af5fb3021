"""Features of users and items: from raw text to weighted columns (a compressed sparse row matrix).

A *catalogue* maps an id to its raw feature texts. A fitted ``FeatureEncoder`` holds, for each feature, the
vocabulary (categorical, multi-valued) or the scale (numeric) seen in training. A category or id it has never
seen encodes to nothing: its learned part is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FeatureKind = Literal["categorical", "multi", "numeric"]


@dataclass(frozen=True, slots=True)
class FeatureField:
    """How one feature is read. ``separator`` splits a multi-valued text; others ignore it."""

    name: str
    kind: FeatureKind
    separator: str = "|"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Raw feature texts by id: ``rows[id][k]`` belongs to ``fields[k]``; None is missing."""

    fields: tuple[FeatureField, ...] = ()
    rows: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SparseRows:
    """E rows of weighted feature columns: row e owns ``columns[starts[e]:starts[e + 1]]``."""

    starts: NDArray[np.int64]
    """(E + 1,)"""
    columns: NDArray[np.int64]
    """(nnz,) feature column"""
    weights: NDArray[np.float32]
    """(nnz,) 1 for a category, the standardized value for a number"""

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True, slots=True)
class EncodedField:
    """One fitted feature. Columns ``first .. first + width - 1`` belong to it."""

    field: FeatureField
    first: int
    vocabulary: tuple[str, ...]
    """Categories in column order; empty for a numeric feature."""
    mean: float = 0.0
    scale: float = 1.0

    @property
    def width(self) -> int:
        """How many columns the feature takes."""
        return 1 if self.field.kind == "numeric" else len(self.vocabulary)


@dataclass(frozen=True, slots=True)
class FeatureEncoder:
    """The fitted features of one kind of entity, F columns in all."""

    encoded: tuple[EncodedField, ...] = ()

    @property
    def width(self) -> int:
        """F, the number of feature columns."""
        return sum(f.width for f in self.encoded)

    @property
    def fields(self) -> tuple[FeatureField, ...]:
        """The features in the order in which raw rows give them."""
        return tuple(e.field for e in self.encoded)

    def field_of_column(self) -> NDArray[np.int64]:
        """(F,) the index of the feature that each column belongs to."""
        return np.repeat(np.arange(len(self.encoded)), [f.width for f in self.encoded]).astype(np.int64)

    @staticmethod
    def fit(fields: tuple[FeatureField, ...], rows: Iterable[tuple[str | None, ...]]) -> FeatureEncoder:
        """Learns vocabularies (sorted) and scales from the raw rows of the entities seen in training."""
        texts = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in fields]
        encoded: list[EncodedField] = []
        first = 0
        for spec, column in zip(fields, texts, strict=True):
            fitted = _fit_field(spec, first, [t for t in column if t])
            encoded.append(fitted)
            first += fitted.width
        return FeatureEncoder(tuple(encoded))

    def encode(self, rows: Iterable[tuple[str | None, ...] | None]) -> SparseRows:
        """Encodes raw rows; None is an entity without features."""
        lookups = [{c: e.first + k for k, c in enumerate(e.vocabulary)} for e in self.encoded]
        starts, columns, weights = [0], [], []
        for row in rows:
            for fitted, lookup, text in zip(self.encoded, lookups, row or (), strict=False):
                if text:
                    for column, weight in _cells(fitted, lookup, text):
                        columns.append(column)
                        weights.append(weight)
            starts.append(len(columns))
        return SparseRows(np.array(starts, np.int64), np.array(columns, np.int64), np.array(weights, np.float32))


def _fit_field(spec: FeatureField, first: int, texts: list[str]) -> EncodedField:
    if spec.kind == "numeric":
        numbers = np.array([n for n in map(_number, texts) if n is not None], dtype=np.float64)
        if not len(numbers):
            return EncodedField(spec, first, ())
        return EncodedField(spec, first, (), float(numbers.mean()), float(numbers.std()) or 1.0)
    categories = {c for text in texts for c in _categories(spec, text)}
    return EncodedField(spec, first, tuple(sorted(categories)))


def _categories(spec: FeatureField, text: str) -> list[str]:
    return [c for c in text.split(spec.separator) if c] if spec.kind == "multi" else [text]


def _cells(fitted: EncodedField, lookup: dict[str, int], text: str) -> list[tuple[int, float]]:
    if fitted.field.kind == "numeric":
        number = _number(text)
        return [] if number is None else [(fitted.first, (number - fitted.mean) / fitted.scale)]
    return [(lookup[c], 1.0) for c in dict.fromkeys(_categories(fitted.field, text)) if c in lookup]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
