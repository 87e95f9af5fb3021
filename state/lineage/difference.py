"""How far apart two versions are: tensor by tensor, and item by item. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.lineage.tensors import Parameters

EMBEDDING = "parameters.item_embedding"
"""(V, D): the means of the items' embeddings"""
ITEM_TABLES = frozenset(
    f"parameters.{name}"
    for name in ("item_embedding", "item_embedding_log_sigma", "item_bias", "item_bias_log_sigma", "ordinal_item")
)
"""Tensors of ``learner.recommender.Recommender`` with one row for each item of the vocabulary"""


@dataclass(frozen=True, slots=True)
class TensorChange:
    """How one tensor moved. Item tables: over the items that both versions have."""

    name: str
    before: tuple[int, ...] | None
    """Shape; None: it is new"""
    after: tuple[int, ...] | None
    """Shape; None: it is gone"""
    moved: float | None
    """L2 norm of the change; None: the shapes cannot be compared. NaN where a value is"""
    relative: float | None
    """``moved`` over the L2 norm before; None: that is 0, or there is no ``moved``"""


@dataclass(frozen=True, slots=True)
class ItemChange:
    """How one item's embedding moved."""

    item_id: str
    moved: float
    """L2 norm of the change"""
    relative: float | None
    """Over its L2 norm before; None: that is 0"""


@dataclass(frozen=True, slots=True)
class Difference:
    """From one version to another, what both serve."""

    tensors: tuple[TensorChange, ...]
    """By name"""
    items: tuple[ItemChange, ...]
    """Those whose embedding moved most; none that did not move"""
    new_items: int
    gone_items: int


def difference(before: Parameters, after: Parameters, items: int = 10) -> Difference:
    """What changed; ``items`` of those that moved."""
    rows = _shared_rows(before.item_ids, after.item_ids)
    old, new = before.serving, after.serving
    changes = tuple(_change(name, old.get(name), new.get(name), rows) for name in sorted({*old, *new}))
    return Difference(
        changes,
        _movers(before, after, rows, items),
        len(after.item_ids) - len(rows[1]),
        len(before.item_ids) - len(rows[0]),
    )


_Rows = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(n,) rows before and after of the items that both have"""


def _shared_rows(before: Sequence[str], after: Sequence[str]) -> _Rows:
    if before == after:
        every = np.arange(len(before))
        return every, every
    place = {item: row for row, item in enumerate(after)}
    found = [(row, place[item]) for row, item in enumerate(before) if item in place]
    pairs = np.array(found, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _change(name: str, old: NDArray[Any] | None, new: NDArray[Any] | None, rows: _Rows) -> TensorChange:
    shapes = (None if old is None else old.shape, None if new is None else new.shape)
    if old is None or new is None:
        return TensorChange(name, *shapes, None, None)
    if name in ITEM_TABLES:
        old, new = old[rows[0]], new[rows[1]]
    if old.shape != new.shape:
        return TensorChange(name, *shapes, None, None)
    moved, norm = _norm(new.astype(np.float64) - old), _norm(old.astype(np.float64))
    return TensorChange(name, *shapes, moved, None if norm == 0 else moved / norm)


def _movers(before: Parameters, after: Parameters, rows: _Rows, count: int) -> tuple[ItemChange, ...]:
    old, new = before.tensors.get(EMBEDDING), after.tensors.get(EMBEDDING)
    if old is None or new is None or old.shape[1:] != new.shape[1:]:
        return ()
    shared = old[rows[0]].astype(np.float64)
    moved = np.linalg.norm(new[rows[1]] - shared, axis=1)
    norms = np.linalg.norm(shared, axis=1)
    most = np.argsort(-moved, kind="stable")[:count]
    return tuple(
        ItemChange(before.item_ids[rows[0][k]], float(moved[k]), None if norms[k] == 0 else float(moved[k] / norms[k]))
        for k in most
        if moved[k] != 0
    )


def _norm(values: NDArray[np.float64]) -> float:
    return math.sqrt(float(np.square(values).sum()))
