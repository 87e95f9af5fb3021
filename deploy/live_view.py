"""What `make live` shows: the workers' own metrics and the predictions topic, as a table or as a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from learner.metrics import auc
from streams.live import metrics as names
from streams.live.predictions import Prediction

MILLISECONDS = 1_000


@dataclass(slots=True)
class WorkerFacts:
    """What one worker says of itself. A worker that does not answer has said nothing yet."""

    name: str
    state: str = "starting"
    partitions: tuple[int, ...] = ()
    """Those that it owns"""
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Of its dead letters"""
    lag: int = 0
    users: int = 0
    delay_s: float = 0.0
    """The event loop's largest of the last minute"""

    def read(self, text: str) -> None:
        """Takes over what the worker's ``/metrics`` says now."""
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

        def by(metric: str, label: str) -> Counter[str]:
            return Counter({s.labels[label]: int(s.value) for s in samples if s.name == metric})

        owned = by(names.PARTITION_OWNED, "partition")
        self.partitions = tuple(sorted(int(partition) for partition, yes in owned.items() if yes))
        self.outcomes = +by(names.EVENTS, "outcome")
        self.reasons = +by(names.DEAD_LETTERS, "reason")
        self.lag = by(names.LAG_EVENTS, "partition").total()
        self.users = by(names.USERS, "partition").total()
        self.delay_s = max((s.value for s in samples if s.name == names.LOOP_DELAY_MAX), default=0.0)


@dataclass(slots=True)
class Scores:
    """The predictions so far. Each event is predicted before its label is used, so their AUC is an honest one."""

    labels: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    users: Counter[str] = field(default_factory=Counter)
    offsets: set[tuple[int, int]] = field(default_factory=set)
    """(partition, offset) of the events predicted"""
    repeated: int = 0
    """Predictions of an event that had one already: exactly once means none"""

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Counts predictions in."""
        for prediction in predictions:
            place = prediction.source_partition, prediction.source_offset
            if place in self.offsets:
                self.repeated += 1
                continue
            self.offsets.add(place)
            self.labels.append(prediction.label)
            self.probabilities.append(prediction.probability)
            self.users[prediction.user_id] += 1

    def __len__(self) -> int:
        return len(self.labels)

    def auc(self) -> float:
        """NaN until both labels have been seen."""
        if len(set(self.labels)) < 2:
            return float("nan")
        return auc(np.array(self.labels, np.int8), np.array(self.probabilities))


@dataclass(frozen=True, slots=True)
class View:
    """One moment of the whole."""

    workers: Sequence[WorkerFacts]
    predictions: int
    auc: float
    rate: float
    """Events applied a second, of late"""

    @property
    def applied(self) -> int:
        """Events that moved a user's state."""
        return sum(worker.outcomes["applied"] for worker in self.workers)

    @property
    def handled(self) -> int:
        """Events that came to an end, whichever."""
        return sum(worker.outcomes.total() for worker in self.workers)

    @property
    def lag(self) -> int:
        """Events behind."""
        return sum(worker.lag for worker in self.workers)

    @property
    def reasons(self) -> Counter[str]:
        """Of all dead letters."""
        return sum((worker.reasons for worker in self.workers), Counter())

    def line(self) -> str:
        """For a log."""
        return (
            f"{self.applied:,} events applied, {self.rate:,.0f} a second, lag {self.lag:,}, AUC {_shown(self.auc)} of "
            f"{self.predictions:,} predictions, dead letters {self._letters()}; "
            + "; ".join(f"{w.name} {w.state}, partitions {_listed(w.partitions)}" for w in self.workers)
        )

    def table(self) -> Table:
        """For a terminal."""
        table = Table(
            title=self._title(), caption=f"dead letters: {self._letters()}", caption_justify="left", min_width=100
        )
        for column in ("worker", "state", "partitions"):
            table.add_column(column)
        for column in ("applied", "lag", "users", "slowest loop, ms"):
            table.add_column(column, justify="right")
        for w in self.workers:
            numbers = (f"{w.outcomes['applied']:,}", f"{w.lag:,}", f"{w.users:,}", f"{w.delay_s * MILLISECONDS:.0f}")
            table.add_row(w.name, w.state, _listed(w.partitions), *numbers)
        return table

    def _title(self) -> str:
        return f"{self.rate:,.0f} events/s    lag {self.lag:,}    AUC so far {_shown(self.auc)} ({self.predictions:,})"

    def _letters(self) -> str:
        reasons = self.reasons
        if not reasons:
            return "none"
        return f"{reasons.total()} ({', '.join(f'{reason} {count}' for reason, count in sorted(reasons.items()))})"


def _listed(partitions: Sequence[int]) -> str:
    return " ".join(map(str, partitions)) or "none"


def _shown(score: float) -> str:
    return "-" if score != score else f"{score:.4f}"
