"""What is known of a generated stream because it was planted: counts and the best reachable scores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from streams.generation.best_auc import AucHistogram
from streams.generation.events import SPAN_MS, START_MS, EventBatch, EventStream

TRUTH_FORMAT = 1
"""Version of ``truth.json``."""

OFFLINE_FRACTION = 0.7
"""The evaluation protocol's default share of users, in order of first event, who are learned from offline."""

_NEVER = np.iinfo(np.int64).max


class Scores:
    """Best scores of a set of events, added batch by batch."""

    def __init__(self) -> None:
        self._histogram = AucHistogram()
        self._log_loss_sum = 0.0

    def add(self, batch: EventBatch, chosen: NDArray[np.bool_] | slice = slice(None)) -> None:
        """Adds the chosen events of a batch."""
        label, probability = batch.label[chosen], batch.probability[chosen]
        self._histogram.add(label, probability)
        self._log_loss_sum -= float(np.log(np.where(label == 1, probability, 1 - probability)).sum())

    def as_dict(self) -> dict[str, object]:
        """Events and their best AUC and log-loss (both to six decimals); None where there is none."""
        events, auc = self._histogram.events, self._histogram.auc()
        return {
            "events": events,
            "best_auc": None if auc is None else round(auc, 6),
            "best_log_loss": round(self._log_loss_sum / events, 6) if events else None,
        }


class TruthCollector:
    """Watches the whole stream pass, then looks again at the online part."""

    def __init__(self, stream: EventStream) -> None:
        self._stream = stream
        self._all = Scores()
        self._clicks = 0
        self._first_ms = np.full(stream.settings.users, _NEVER, dtype=np.int64)
        self._item_seen = np.zeros(stream.settings.items, dtype=np.bool_)

    def watch(self, batches: Iterator[EventBatch]) -> Iterator[EventBatch]:
        """Passes every batch on after counting it; batches come in order."""
        for batch in batches:
            self._all.add(batch)
            self._clicks += int(batch.label.sum())
            self._item_seen[batch.item] = True
            new = self._first_ms[batch.user] == _NEVER
            user, first = np.unique(batch.user[new], return_index=True)
            self._first_ms[user] = batch.event_time_ms[new][first]
            yield batch

    def truth(self) -> dict[str, object]:
        """JSON-ready; needs the whole stream to have passed. Generates the events from T on once more."""
        settings = self._stream.settings
        first_ms = np.sort(self._first_ms[self._first_ms != _NEVER])
        online_from_ms = int(first_ms[_offline_users(len(first_ms))])
        return {
            "format": TRUTH_FORMAT,
            "settings": settings.as_dict(),
            "users": len(first_ms),
            "items": int(self._item_seen.sum()),
            "clicks": self._clicks,
            "drift_at_ms": None if settings.drift == "none" else START_MS + int(settings.drift_start * SPAN_MS),
            "all": self._all.as_dict(),
            "online": {
                "offline_fraction": OFFLINE_FRACTION,
                "from_ms": online_from_ms,
                "users": int((first_ms >= online_from_ms).sum()),
                **self._online_scores(online_from_ms).as_dict(),
            },
        }

    def _online_scores(self, online_from_ms: int) -> Scores:
        scores = Scores()
        # Two places early: jitter and whole milliseconds move an event by less.
        start = max(int((online_from_ms - START_MS) / SPAN_MS * len(self._stream)) - 2, 0)
        for batch in self._stream.batches(start):
            scores.add(batch, self._first_ms[batch.user] >= online_from_ms)
        return scores


def _offline_users(users: int) -> int:
    """How many users come before the last 30 %; at least one user is left to stream."""
    return min(int(OFFLINE_FRACTION * users + 1e-9), users - 1)
