"""The events every baseline sees: offline and online under one dictionary, and a split inside the offline users.

Symbols: N events, U users and I items of offline and online together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.features import Catalogue, FeatureEncoder, SparseRows
from learner.interactions import FeatureColumn, Interactions
from learner.metrics import event_log_loss
from learner.serving import raw_features

Int = NDArray[np.int64]
Float = NDArray[np.float32]

VALIDATION_SHARE = 0.1
"""Share of the offline users, the latest to begin, on whom hyperparameters are chosen: the stream is never asked."""


@dataclass(frozen=True, slots=True)
class Events:
    """N events in stream order."""

    user: Int
    """(N,) code in 0 .. U − 1"""
    item: Int
    """(N,) code in 0 .. I − 1"""
    label: Float
    """(N,) 0 or 1"""
    time_ms: Int
    """(N,)"""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Int | NDArray[np.bool_] | slice) -> Events:
        """The events at ``rows``, in that order."""
        return Events(self.user[rows], self.item[rows], self.label[rows], self.time_ms[rows])


@dataclass(frozen=True, slots=True)
class Entities:
    """E users or items: their encoded features, F columns wide."""

    features: SparseRows
    width: int

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, slots=True)
class Problem:
    """Learn from ``offline``, then predict ``online`` event by event, each before its label is used."""

    offline: Events
    online: Events
    users: Entities
    items: Entities

    def holdout(self) -> Problem:
        """The same problem inside the offline users: the last ``VALIDATION_SHARE`` of them play the online part.

        Users are ordered by their first event. Labels of the true online part are nowhere in it.
        """
        events = self.offline
        if not len(events):
            return self._with(events, events)
        first = np.full(len(self.users), np.iinfo(np.int64).max)
        np.minimum.at(first, events.user, events.time_ms)
        begins = np.sort(first[np.unique(events.user)])
        cut = begins[min(len(begins) - 1, math.ceil(len(begins) * (1 - VALIDATION_SHARE)))]
        late = first[events.user] >= cut
        return self._with(events.take(~late & (events.time_ms < cut)), events.take(late))

    def _with(self, offline: Events, online: Events) -> Problem:
        return Problem(offline, online, self.users, self.items)


def build_problem(offline: Interactions, online: Interactions, users: Catalogue, items: Catalogue) -> Problem:
    """Matches ids by their text and encodes features; vocabularies come from the entities of the offline events."""
    user_ids, off_user, on_user = _shared(offline.user_ids, online.user_ids)
    item_ids, off_item, on_item = _shared(offline.item_ids, online.item_ids)
    return Problem(
        Events(off_user[offline.user], off_item[offline.item], offline.label.astype(np.float32), offline.event_time_ms),
        Events(on_user[online.user], on_item[online.item], online.label.astype(np.float32), online.event_time_ms),
        _entities(users, user_ids, offline.user_ids, offline.user_features, online.user_ids, online.user_features),
        _entities(items, item_ids, offline.item_ids, offline.item_features, online.item_ids, online.item_features),
    )


def smoothed_rate(problem: Problem) -> float:
    """The share of clicks among the offline events, one click in two added so that it is never 0 or 1."""
    return float((problem.offline.label.sum(dtype=np.float64) + 1) / (len(problem.offline) + 2))


def mean_log_loss(events: Events, probability: Float) -> float:
    """The measure by which hyperparameters are chosen."""
    return float(event_log_loss(events.label, probability).mean())


def _shared(offline: Sequence[str], online: Sequence[str]) -> tuple[list[str], Int, Int]:
    codes: dict[str, int] = {}
    first = np.array([codes.setdefault(i, len(codes)) for i in offline], dtype=np.int64)
    second = np.array([codes.setdefault(i, len(codes)) for i in online], dtype=np.int64)
    return list(codes), first, second


def _entities(
    catalogue: Catalogue,
    ids: Sequence[str],
    offline_ids: Sequence[str],
    offline_features: dict[str, FeatureColumn],
    online_ids: Sequence[str],
    online_features: dict[str, FeatureColumn],
) -> Entities:
    """Features of ``ids`` (offline ids come first in it): the catalogue's, else those carried in the first event."""
    raw = raw_features(catalogue.fields, catalogue, offline_ids, range(len(offline_ids)), offline_features)
    encoder = FeatureEncoder.fit(catalogue.fields, [row for row in raw if row is not None])
    place = {entity: k for k, entity in enumerate(online_ids)}
    new = ids[len(offline_ids) :]
    raw += raw_features(catalogue.fields, catalogue, new, [place[entity] for entity in new], online_features)
    return Entities(encoder.encode(raw), encoder.width)
