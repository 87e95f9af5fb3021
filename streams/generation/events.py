"""The events of a stream, any slice of it, in event-time order.

Events come from fixed blocks, each with a random sequence of its own, so a slice costs only its own blocks and
is the same however the stream was cut. Sums run over columns one by one, never through BLAS, whose order of
summation depends on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streams.generation.population import Draw, Items, Users, draw_items, draw_users, random_for
from streams.generation.settings import GeneratorSettings

BLOCK = 65_536
"""Events drawn together. Large enough for vector code, small enough to keep memory near 20 MB. Part of the
stream's definition: another size is another stream."""

START_MS = 1_704_067_200_000
"""2024-01-01T00:00:00Z"""
SPAN_MS = 90 * 86_400_000
"""90 days"""

INTERCEPT = 0.1
GRADE_CUTS = np.array([-2.2, -0.9, 0.0, 1.4])
"""Utilities at which the value goes from 1 to 2, 2 to 3, 3 to 4 and 4 to 5: a click is a utility above 0."""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """N events in event-time order, with their truth."""

    user: NDArray[np.int64]
    """(N,) the user's number, from 0 in order of arrival"""
    item: NDArray[np.int64]
    """(N,) the item's number, from 0 in order of arrival"""
    label: NDArray[np.int8]
    """(N,) 0 or 1"""
    value: NDArray[np.int8]
    """(N,) 1 to 5; at least 4 where the label is 1"""
    event_time_ms: NDArray[np.int64]
    """(N,) not falling"""
    probability: NDArray[np.float64]
    """(N,) of label 1, label noise included"""

    def __len__(self) -> int:
        return len(self.user)

    def rows(self, start: int, stop: int) -> EventBatch:
        """The events from ``start`` up to, not including, ``stop``."""
        return EventBatch(
            self.user[start:stop], self.item[start:stop], self.label[start:stop], self.value[start:stop],
            self.event_time_ms[start:stop], self.probability[start:stop],
        )  # fmt: skip


class EventStream:
    """All events of some settings, reproducible from any position."""

    def __init__(self, settings: GeneratorSettings) -> None:
        self.settings = settings
        self.users: Users = draw_users(settings)
        self.items: Items = draw_items(settings)
        self._user_weights = _running_sum(self.users.activity)
        self._item_weights = _running_sum(self.items.popularity)
        self._departure = self.users.arrival + settings.lifetime

    def __len__(self) -> int:
        return self.settings.events

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[EventBatch]:
        """The events from ``start`` up to, not including, ``stop`` (the end where None), a block at a time."""
        stop = len(self) if stop is None else min(stop, len(self))
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            yield self._block(block).rows(max(start - first, 0), stop - first)

    def _block(self, block: int) -> EventBatch:
        jitter, choose_user, choose_item, surprise, flip = random_for(self.settings, Draw.EVENTS, block).random(
            (5, BLOCK)
        )
        position = (block * BLOCK + np.arange(BLOCK) + jitter) / len(self)
        user = self._users_at(position, choose_user)
        item = self._items_at(position, choose_item)
        logit = self._logits(user, item, position)
        flipped = flip < self.settings.label_noise
        utility = logit + np.log((1 - surprise) / np.maximum(surprise, np.finfo(np.float64).tiny))
        utility = np.where(flipped, -utility, utility)
        clicked = 1 / (1 + np.exp(-logit))
        return EventBatch(
            user,
            item,
            (utility > 0).astype(np.int8),
            # side="left": a utility of exactly 0 is no click and has the value 3.
            (1 + np.searchsorted(GRADE_CUTS, utility, side="left")).astype(np.int8),
            START_MS + np.floor(position * SPAN_MS).astype(np.int64),
            clicked + self.settings.label_noise * (1 - 2 * clicked),
        )

    def _users_at(self, position: NDArray[np.float64], draw: NDArray[np.float64]) -> NDArray[np.int64]:
        """One of the users present then, by activity. They are neighbours, being numbered by arrival."""
        first = np.searchsorted(self._departure, position, side="right")
        last = np.searchsorted(self.users.arrival, position, side="right")
        return _choose(self._user_weights, first, last, draw)

    def _items_at(self, position: NDArray[np.float64], draw: NDArray[np.float64]) -> NDArray[np.int64]:
        last = np.searchsorted(self.items.arrival, position, side="right")
        return _choose(self._item_weights, np.zeros_like(last), last, draw)

    def _logits(
        self, user: NDArray[np.int64], item: NDArray[np.int64], position: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        factors = self.items.factors[item]
        liking = _rowwise_product(self.users.taste[user], factors)
        if self.settings.drift != "none":
            angle = drift_angle(self.settings, position)
            liking = np.cos(angle) * liking + np.sin(angle) * _rowwise_product(self.users.taste_after[user], factors)
        logits: NDArray[np.float64] = INTERCEPT + self.users.bias[user] + self.items.bias[item] + liking
        return logits


def drift_angle(settings: GeneratorSettings, position: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far tastes have turned at each position, from 0 to π/2; turning keeps their variance."""
    if settings.drift == "none":
        return np.zeros_like(position)
    if settings.drift == "abrupt":
        return np.where(position >= settings.drift_start, np.pi / 2, 0.0)
    length = max(1 - settings.drift_start, np.finfo(np.float64).tiny)
    turned: NDArray[np.float64] = np.maximum(position - settings.drift_start, 0) / length
    return turned * (np.pi / 2)


def _running_sum(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(weights)])


def _choose(
    running: NDArray[np.float64], first: NDArray[np.int64], last: NDArray[np.int64], draw: NDArray[np.float64]
) -> NDArray[np.int64]:
    """(N,) an index from ``first`` up to, not including, ``last``, by weight, for draws from [0, 1)."""
    low = running[first]
    chosen = np.searchsorted(running, low + draw * (running[last] - low), side="right") - 1
    return np.clip(chosen, first, last - 1)


def _rowwise_product(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) the inner product of each row, summed in a fixed order."""
    product = left * right
    total = product[:, 0].copy()
    for column in range(1, product.shape[1]):
        total += product[:, column]
    return total
