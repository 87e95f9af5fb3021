"""The offline users' histories, kept beside a model: what the online stage replays of the time before the stream.

    histories.safetensors   item u32 (T,) row of the vocabulary   label, grade u8 (T,)   starts i64 (B + 1,)
                            features.starts columns weights   held_out bool (B,)   item_events i64 (V,)

Users are a random sample, without their ids, of at most ``MAX_EVENTS`` events; ``item_events`` counts all of them.
Those who were held out of the training are there to be measured on (``learner.anchors``).
The model's manifest holds the file's hash (``learner.artifact``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from learner.features import Catalogue, SparseRows
from learner.histories import Histories, spans
from learner.interactions import Interactions
from learner.serving import nearest_grades, raw_features
from learner.user_state import NO_GRADE, item_hash, ring_item

if TYPE_CHECKING:  # it brings torch
    from learner.recommender import RecommenderSpec

MAX_EVENTS = 4_000_000
"""Six bytes each on disk"""
HELD_OUT_EVENTS = 500_000
"""The same of users who were held out: anchors are drawn from them"""
UNKNOWN = np.iinfo(np.uint32).max
"""Row of an item that only users who were held out have met"""


@dataclass(frozen=True, slots=True)
class OfflineHistories:
    """B users of the offline stage, and V items of its vocabulary."""

    starts: NDArray[np.int64]
    """(B + 1,)"""
    item: NDArray[np.uint32]
    """(T,) row of the vocabulary, or UNKNOWN"""
    label: NDArray[np.uint8]
    grade: NDArray[np.uint8]
    """(T,) NO_GRADE where there was none"""
    features: SparseRows
    """B rows"""
    held_out: NDArray[np.bool_]
    """(B,) users whom the model has not learned from"""
    item_events: NDArray[np.int64]
    """(V,) events of each item, those of users who are not in the sample too"""

    def histories(self, item_ids: Sequence[str]) -> tuple[Histories, Histories]:
        """(those learned from, those held out), as the online stage takes them; ``item_ids``: the vocabulary."""
        hashes = np.fromiter((ring_item(item_hash(item)) for item in item_ids), np.uint64, len(item_ids))
        known = self.item != UNKNOWN
        item = np.full(len(self.item), (1 << 40) - 1, np.uint64)  # a hash that hardly any item has
        item[known] = hashes[self.item[known]]
        everybody = Histories(
            self.starts, item, self.label.astype(np.int8), self.grade.astype(np.int32),
            np.zeros(len(self.starts) - 1, np.int64), self.features,
        )  # fmt: skip
        return everybody.take(np.flatnonzero(~self.held_out)), everybody.take(np.flatnonzero(self.held_out))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What the file holds."""
        return {
            "starts": self.starts, "item": self.item, "label": self.label, "grade": self.grade,
            "features.starts": self.features.starts, "features.columns": self.features.columns,
            "features.weights": self.features.weights, "held_out": self.held_out, "item_events": self.item_events,
        }  # fmt: skip

    @staticmethod
    def of(tensors: Mapping[str, NDArray[Any]]) -> OfflineHistories:
        """Back from ``tensors``. KeyError where one is missing."""
        features = SparseRows(*(tensors[f"features.{part}"] for part in ("starts", "columns", "weights")))
        starts, item, label, grade = (tensors[name] for name in ("starts", "item", "label", "grade"))
        return OfflineHistories(starts, item, label, grade, features, tensors["held_out"], tensors["item_events"])


def kept_histories(
    offline: Interactions, held_out: NDArray[np.bool_], spec: RecommenderSpec, users: Catalogue, seed: int
) -> OfflineHistories:
    """Of the offline events, whose users the model was trained on but for those ``held_out`` (U,).

    As many users as fit the bounds, drawn at random.
    """
    counts = np.bincount(offline.user, minlength=len(offline.user_ids))
    order = np.random.default_rng(seed).permutation(len(counts))
    chosen = np.sort(
        np.concatenate([
            _within(order[~held_out[order]], counts, MAX_EVENTS),
            _within(order[held_out[order]], counts, HELD_OUT_EVENTS),
        ])
    )  # fmt: skip
    by_user = np.argsort(offline.user, kind="stable")
    first = np.cumsum(counts) - counts
    starts, places = spans(first[chosen], first[chosen] + counts[chosen])
    events = by_user[places]
    vocabulary = {item: row for row, item in enumerate(spec.item_ids)}
    rows = np.fromiter((vocabulary.get(item, UNKNOWN) for item in offline.item_ids), np.uint32, len(offline.item_ids))
    grades = np.asarray(spec.grades, np.float32)
    grade = nearest_grades(grades, offline.value[events])
    fields, ids = spec.user_encoder.fields, [offline.user_ids[u] for u in chosen.tolist()]
    raw = raw_features(fields, users, ids, chosen.tolist(), offline.user_features)
    learned = offline.item[~held_out[offline.user]]
    of_item = np.bincount(rows[learned].astype(np.int64), minlength=len(spec.item_ids))
    return OfflineHistories(
        starts, rows[offline.item[events]], offline.label[events].astype(np.uint8),
        np.where(grade == len(grades), NO_GRADE, grade).astype(np.uint8), spec.user_encoder.encode(raw),
        held_out[chosen], of_item.astype(np.int64),
    )  # fmt: skip


def _within(users: NDArray[np.int64], counts: NDArray[np.int64], bound: int) -> NDArray[np.int64]:
    """The first of these users whose events fit the bound."""
    return users[np.cumsum(counts[users]) <= bound]
