"""What a worker tells Prometheus: every name, label and bucket, and the methods that move them.

A label's values are few and known beforehand: outcomes, stages, reasons and partition numbers. Nothing that came with
an event, a user's id least of all, is ever one. What belongs to a partition is there while the worker owns or follows
it, and goes with it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from streams.rejects import Reason

EVENTS = "coldstream_events_total"
BATCH_EVENTS = "coldstream_batch_events"
STAGE_SECONDS = "coldstream_stage_seconds"
DEAD_LETTERS = "coldstream_dead_letters_total"
CHANGELOG_ROWS = "coldstream_changelog_rows_total"
LOOP_DELAY = "coldstream_loop_delay_seconds"
LOOP_DELAY_MAX = "coldstream_loop_delay_max_seconds"
REBALANCES = "coldstream_rebalances_total"
FENCED = "coldstream_fenced_total"
GAP_EVENTS = "coldstream_gap_events_total"
RETRIES = "coldstream_retries_total"
BUILD = "coldstream_build"
"""An Info: Prometheus sees coldstream_build_info"""

DURABLE = "coldstream_durable_seconds"
PARTITION_OWNED = "coldstream_partition_owned"
LAG_EVENTS = "coldstream_lag_events"
LAG_SECONDS = "coldstream_lag_seconds"
RESTORE_RECORDS = "coldstream_restore_records"
RESTORE_SHARE = "coldstream_restore_share"
USERS = "coldstream_users"
STATE_EVENTS = "coldstream_state_events"
PENDING_COMMITS = "coldstream_changelog_pending_commits"
STANDBY_LAG = "coldstream_standby_lag_records"
POISON = "coldstream_poison_red"

BATCH_BUCKETS = (1, 10, 100, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000)
"""Events: a fetch of 2 MiB holds some 17,000 of 120 bytes"""
STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 600)
"""Seconds: a piece of a batch takes milliseconds, the restore of a large partition minutes"""
DELAY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
"""Seconds: 0.1 is what a worker promises"""
AGE_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 1.0, 2.5)
"""Seconds: a worker that keeps up is done with half of the events within 0.05 and nearly all within 0.25"""
DELAY_SPAN_S = 60.0
"""How far ``LOOP_DELAY_MAX`` looks back: four scrapes at the usual 15 s"""


class Outcome(StrEnum):
    """What became of an event."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    """Its id was seen within ``stream.duplicate_window``"""
    SKIPPED = "skipped"
    """The user's row had applied it before"""
    DEAD_LETTER = "dead_letter"
    GUARDED = "guarded"
    """The update was not finite, and refused"""


class Stage(StrEnum):
    """What a worker spends its time on."""

    DECODE = "decode"
    ADAPT = "adapt"
    """Predict, learn and write to the store"""
    STORE = "store"
    """The write alone, where it is timed apart"""
    PUBLISH = "publish"
    """Changelog and predictions, to their acknowledgement"""
    DEAD_LETTERS = "dead_letters"
    RESTORE = "restore"
    """A partition's, from its beginning to its end"""


class SlidingMax:
    """The largest of the values given within the last ``span_s``."""

    def __init__(self, span_s: float, clock: Callable[[], float]) -> None:
        self._span_s, self._clock = span_s, clock
        self._falling: deque[tuple[float, float]] = deque()
        """(when, value): each is larger than all that came later, so the first is the answer"""
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        """A value of now."""
        with self._lock:
            while self._falling and self._falling[-1][1] <= value:
                self._falling.pop()
            self._falling.append((self._clock(), value))
            self._drop_old()

    def value(self) -> float:
        """0 where none was given."""
        with self._lock:
            self._drop_old()
            return self._falling[0][1] if self._falling else 0.0

    def _drop_old(self) -> None:
        oldest = self._clock() - self._span_s
        while self._falling and self._falling[0][0] < oldest:
            self._falling.popleft()


@dataclass(slots=True)
class _Figures:
    """Of one partition; None: not known, and then not shown."""

    owned: bool
    lag_events: int | None = None
    applied_timestamp_ms: int | None = None
    restore_records: int | None = None
    restore_share: float | None = None
    users: int | None = None
    state_events: int | None = None
    pending_commits: int | None = None
    standby_lag: int | None = None
    poison: bool | None = None

    def lag_seconds(self, now_s: float) -> float | None:
        """Age of the record applied last, while there are others behind it."""
        if self.lag_events == 0:
            return 0.0
        if self.lag_events is None or self.applied_timestamp_ms is None:
            return None
        return max(0.0, now_s - self.applied_timestamp_ms / 1000)


_PARTITION_GAUGES: tuple[tuple[str, str, Callable[[_Figures, float], float | None]], ...] = (
    (PARTITION_OWNED, "1: this worker applies the partition's events, 0: it only follows it", lambda f, now: f.owned),
    (LAG_EVENTS, "Events of the partition that are not yet applied", lambda f, now: f.lag_events),
    (LAG_SECONDS, "Age of the event applied last while there is lag, else 0", lambda f, now: f.lag_seconds(now)),
    (RESTORE_RECORDS, "Changelog records that this restore has read", lambda f, now: f.restore_records),
    (RESTORE_SHARE, "How much of the restore is done, 0 to 1", lambda f, now: f.restore_share),
    (USERS, "Users the partition's store holds", lambda f, now: f.users),
    (STATE_EVENTS, "Events that the users held have learned from", lambda f, now: f.state_events),
    (PENDING_COMMITS, "Commits that the changelog has not acknowledged", lambda f, now: f.pending_commits),
    (STANDBY_LAG, "Changelog records that the copy of a followed partition lacks", lambda f, now: f.standby_lag),
    (POISON, "1: nearly all of the partition's latest events could not be used", lambda f, now: f.poison),
)


class _Partitions(Collector):
    """The figures of the partitions at hand. All of a partition's appear and go in one step."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._figures: dict[int, _Figures] = {}
        self._lock = threading.Lock()

    def begin(self, partition: int, *, owned: bool) -> None:
        """Its figures begin anew, unless it is at hand already; owning takes over from following."""
        with self._lock:
            if (found := self._figures.get(partition)) is None or (owned and not found.owned):
                self._figures[partition] = _Figures(owned)

    def end(self, partition: int, *, owned: bool = True) -> None:
        """No figures from here on, if it is at hand in this way."""
        with self._lock:
            if (found := self._figures.get(partition)) is not None and found.owned is owned:
                del self._figures[partition]

    @contextmanager
    def figures(self, partition: int) -> Iterator[_Figures]:
        """To be changed. Of a partition that is not at hand they are thrown away: a late thread's, after the end."""
        with self._lock:
            yield self._figures.get(partition) or _Figures(False)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [GaugeMetricFamily(name, text, labels=("partition",)) for name, text, _ in _PARTITION_GAUGES]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        now = self._wall_clock()
        families = list(self.describe())
        with self._lock:
            for family, (_, _, read) in zip(families, _PARTITION_GAUGES, strict=True):
                for partition, figures in sorted(self._figures.items()):
                    if (value := read(figures, now)) is not None:
                        family.add_metric((str(partition),), float(value))
        return families


class _Ages(Collector):
    """How old events were when they became durable: a histogram that takes many at a time."""

    def __init__(self) -> None:
        self._edges = np.array(AGE_BUCKETS)
        self._counts = np.zeros(len(AGE_BUCKETS) + 1, np.int64)
        self._sum = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: NDArray[np.float64]) -> None:
        places = np.searchsorted(self._edges, seconds, side="left")
        with self._lock:
            self._counts += np.bincount(places, minlength=len(self._counts))
            self._sum += float(seconds.sum())

    def describe(self) -> Iterable[HistogramMetricFamily]:
        return [HistogramMetricFamily(DURABLE, "From a record's timestamp to its event's durable row")]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        with self._lock:
            below, total = np.cumsum(self._counts).tolist(), self._sum
        names = [*map(str, AGE_BUCKETS), "+Inf"]
        (family,) = self.describe()
        family.add_metric((), list(zip(names, below, strict=True)), total)
        return [family]


class WorkerMetrics:
    """What one worker tells, in a registry of its own. Every method may be called from any thread.

    ``version`` is the program's, ``model`` the loaded artifact's. ``clock`` counts seconds, ``wall_clock`` those since
    1970. What is told of a partition that is neither owned nor followed is ignored.
    """

    def __init__(
        self,
        version: str,
        model: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._clock = clock
        Info(BUILD, "Which program and which model", registry=registry).info({"version": version, "model": model})
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._wall_clock = wall_clock
        self._ages = _Ages()
        registry.register(self._ages)
        self._partitions = _Partitions(wall_clock)
        registry.register(self._partitions)
        self._delay_max = SlidingMax(DELAY_SPAN_S, clock)
        Gauge(LOOP_DELAY_MAX, "Largest delay of the last minute", registry=registry).set_function(self._delay_max.value)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self._events = counter(EVENTS, "Events by what became of them", "outcome")
        self._dead_letters = counter(DEAD_LETTERS, "Events that could not be used, by reason", "reason")
        self._retries = counter(RETRIES, "Tries that failed and are made again", "stage")
        self._rows = counter(CHANGELOG_ROWS, "Rows and tombstones that the changelog has acknowledged")
        self._rebalances = counter(REBALANCES, "Assignments received from the group")
        self._fenced = counter(FENCED, "Partitions lost to a worker that opened them meanwhile")
        self._gap = counter(GAP_EVENTS, "Events that the source had deleted before they were read")
        self._batch = histogram(BATCH_EVENTS, "Events of one step", BATCH_BUCKETS)
        self._stages = histogram(STAGE_SECONDS, "Time a stage takes", STAGE_BUCKETS, "stage")
        self._delay = histogram(LOOP_DELAY, "How late the event loop wakes up", DELAY_BUCKETS)
        for outcome in Outcome:  # a rate needs a series that begins at 0
            self._events.labels(outcome)

    # --- of the process ---

    def loop_delay(self, seconds: float) -> None:
        """How much later than asked the event loop woke up."""
        self._delay.observe(seconds)
        self._delay_max.add(seconds)

    def rebalanced(self) -> None:
        """The group has assigned partitions, none or the same as before included."""
        self._rebalances.inc()

    def fenced(self) -> None:
        """Another worker has opened a partition that was this one's."""
        self._fenced.inc()

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Times its body, one that raises too."""
        began = self._clock()
        try:
            yield
        finally:
            self.took(stage, self._clock() - began)

    def took(self, stage: Stage, seconds: float) -> None:
        """A stage was gone through, and took so long."""
        self._stages.labels(stage).observe(seconds)

    def retried(self, stage: Stage) -> None:
        """It failed, and is tried again."""
        self._retries.labels(stage).inc()

    # --- of events ---

    def durable(self, timestamp_ms: NDArray[np.int64]) -> None:
        """(N,) records, by their timestamps, whose events became durable now."""
        self._ages.add(np.maximum(self._wall_clock() - timestamp_ms / 1000, 0.0))

    def batch(self, events: int) -> None:
        """So many were handed over at once."""
        self._batch.observe(events)

    def events(self, outcome: Outcome, count: int) -> None:
        """``count`` more ended so."""
        self._events.labels(outcome).inc(count)

    def dead_letters(self, reason: Reason, count: int) -> None:
        """``count`` more could not be used. ``Outcome.DEAD_LETTER`` is to be counted apart."""
        self._dead_letters.labels(reason).inc(count)

    def gap(self, events: int) -> None:
        """Offsets that retention had taken away before this group read them."""
        self._gap.inc(events)

    def changelog_rows(self, count: int) -> None:
        """``count`` more were acknowledged."""
        self._rows.inc(count)

    # --- of partitions: whose they are ---

    def owns(self, partition: int) -> None:
        """It is assigned to this worker. One that was already keeps its figures."""
        self._partitions.begin(partition, owned=True)

    def follows(self, partition: int, lacking: int) -> None:
        """It is another worker's; a copy is kept, that lacks so many records of the changelog.

        Nothing happens to one that was assigned meanwhile.
        """
        self._partitions.begin(partition, owned=False)
        with self._partitions.figures(partition) as figures:
            if not figures.owned:
                figures.standby_lag = lacking

    def unfollowed(self, partition: int) -> None:
        """No copy is kept any more. Nothing happens to one that was assigned meanwhile."""
        self._partitions.end(partition, owned=False)

    def gone(self, partition: int) -> None:
        """Revoked: its figures vanish."""
        self._partitions.end(partition, owned=True)

    # --- of partitions: how they do ---

    def lag(self, partition: int, events: int, applied_timestamp_ms: int | None = None) -> None:
        """Events that are still to be applied, and the record timestamp of the last that was; None: as before."""
        with self._partitions.figures(partition) as figures:
            figures.lag_events = events
            if applied_timestamp_ms is not None:
                figures.applied_timestamp_ms = applied_timestamp_ms

    def restore(self, partition: int, records: int, total: int) -> None:
        """``records`` of the changelog's ``total`` were read; a restore of nothing is done."""
        with self._partitions.figures(partition) as figures:
            figures.restore_records = records
            figures.restore_share = min(1.0, records / total) if total > 0 else 1.0

    def state(self, partition: int, users: int, events: int) -> None:
        """What its store holds: users, and the events that their rows have learned."""
        with self._partitions.figures(partition) as figures:
            figures.users, figures.state_events = users, events

    def pending_commits(self, partition: int, commits: int) -> None:
        """In the store, and not yet acknowledged by the changelog."""
        with self._partitions.figures(partition) as figures:
            figures.pending_commits = commits

    def poison(self, partition: int, red: bool) -> None:
        """Whether more than ``worker.poison_share`` of its latest events could not be used."""
        with self._partitions.figures(partition) as figures:
            figures.poison = red
