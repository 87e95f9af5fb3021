"""What a user would be shown: the score of given items, the best of the catalogue, and how two states differ in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.filters import Float
from learner.retrace import AdaptivePart
from state.reading.model_view import ModelView


class Score(NamedTuple):
    """What the stream would say of one item to this user, to the bit."""

    item_id: str
    known: bool
    """False: the model knows nothing of this id; it is scored as any such item"""
    recent: bool
    """It is among the user's latest events"""
    logit: float
    probability: float


class Change(NamedTuple):
    """An item and its probability of label 1 before and after."""

    item_id: str
    before: float
    after: float


def scores(view: ModelView, part: AdaptivePart, item_ids: Sequence[str], recent: frozenset[int]) -> tuple[Score, ...]:
    """The items in the order asked; ``recent`` holds the places of the user's latest items."""
    places = view.places(item_ids)
    return _scored(view, part, list(item_ids), places, recent)


def top(view: ModelView, part: AdaptivePart, count: int, recent: frozenset[int], *, unseen: bool) -> tuple[Score, ...]:
    """The ``count`` best items of the catalogue, best first, equal ones by id. ``unseen`` leaves the recent out."""
    logits = _logits(view, part)
    hidden = sorted(recent) if unseen else []
    logits[hidden] = -np.inf
    count = min(count, len(logits) - len(hidden))
    if count <= 0:
        return ()
    places = np.argpartition(-logits, count - 1)[:count]
    ids = [view.item_id(place) for place in places.tolist()]
    order = sorted(range(count), key=lambda k: (-logits[places[k]], ids[k]))
    return _scored(view, part, [ids[k] for k in order], places[order], recent)


def most_changed(
    view: ModelView, before: AdaptivePart, after: AdaptivePart, count: int
) -> tuple[tuple[Change, ...], tuple[Change, ...]]:
    """(risen, fallen): at most ``count`` items of the catalogue each, those whose probability changed most first."""
    moved = _probabilities(view, after) - _probabilities(view, before)
    count = min(count, len(moved))
    risen = np.argsort(-moved, kind="stable")[:count]
    fallen = np.argsort(moved, kind="stable")[:count]
    return (
        _changes(view, before, after, risen[moved[risen] > 0]),
        _changes(view, before, after, fallen[moved[fallen] < 0]),
    )


def _scored(
    view: ModelView, part: AdaptivePart, item_ids: list[str], places: NDArray[np.int64], recent: frozenset[int]
) -> tuple[Score, ...]:
    logit, probability = view.retrace.predict(part, view.items(places))
    columns = zip(item_ids, places.tolist(), logit.tolist(), probability.tolist(), strict=True)
    return tuple(Score(item, place < view.item_count, place in recent, z, p) for item, place, z, p in columns)


def _logits(view: ModelView, part: AdaptivePart) -> Float:
    found = [view.retrace.predict(part, rows, exact=False)[0] for _, rows in view.chunks()]
    return np.concatenate([*found, np.zeros(0, np.float32)])


def _probabilities(view: ModelView, part: AdaptivePart) -> Float:
    found = [view.retrace.predict(part, rows, exact=False)[1] for _, rows in view.chunks()]
    return np.concatenate([*found, np.zeros(0, np.float32)])


def _changes(
    view: ModelView, before: AdaptivePart, after: AdaptivePart, places: NDArray[np.int64]
) -> tuple[Change, ...]:
    rows = view.items(places)
    old, new = (view.retrace.predict(part, rows)[1].tolist() for part in (before, after))
    return tuple(Change(view.item_id(place), p, q) for place, p, q in zip(places.tolist(), old, new, strict=True))
