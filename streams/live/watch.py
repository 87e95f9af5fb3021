"""What happens to a worker, told once: its metrics, its health and its log follow from it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import structlog

from state.codec import UNKNOWN, Progress
from streams.kafka.chunk import Chunk
from streams.live.health import Health
from streams.live.metrics import Outcome, Stage, WorkerMetrics
from streams.rejects import Reason

log = structlog.get_logger("coldstream")


class Applied(NamedTuple):
    """What became of a chunk's events."""

    applied: int
    """Guarded ones too: their users' rows count them"""
    events: int
    duplicates: int
    """Beside those"""
    guarded: int


class Watch:
    """Facts of the adapted partitions; see ``WorkerMetrics`` and ``Health`` for what becomes of them."""

    def __init__(
        self, metrics: WorkerMetrics, health: Health, stall_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.metrics = metrics
        self.health = health
        self._stall_s = stall_s
        self._clock = clock
        self._routed: dict[str, tuple[int, float]] = {}
        """(next offset, since when it is that)"""

    def rebalanced(self, partitions: set[int]) -> None:
        """The group has given this worker these partitions, and no others."""
        self.metrics.rebalanced()
        for partition in partitions:
            self.metrics.owns(partition)
        self.health.assigned(partitions)

    def let_go(self, partition: int) -> None:
        """It is no longer held."""
        self.metrics.gone(partition)
        self.health.revoked(partition)

    def restoring(self, partition: int, records: int, total: int) -> None:
        """Its store reads the changelog."""
        self.metrics.restore(partition, records, total)
        self.health.restoring(partition, records, total)

    def opened(self, partition: int, offset: int) -> None:
        """Its events are applied from here on."""
        self.health.running(partition)
        self.health.applied(partition, offset - 1)

    def applied(self, partition: int, chunk: Chunk, became: Applied, lag: int, pending_commits: int) -> None:
        """A step is durable."""
        self.metrics.events(Outcome.APPLIED, became.applied - became.guarded)
        self.metrics.events(Outcome.GUARDED, became.guarded)
        self.metrics.events(Outcome.SKIPPED, became.events - became.applied)
        self.metrics.events(Outcome.DUPLICATE, became.duplicates)
        self.metrics.batch(len(chunk))
        self.metrics.durable(chunk.timestamp_ms)
        self.metrics.pending_commits(partition, pending_commits)
        self.lag(partition, lag, int(chunk.timestamp_ms[-1]) if len(chunk) else None)
        self.health.applied(partition, chunk.next_offset - 1)

    def poison(self, partition: int, red: bool) -> None:
        """Whether nearly all of its latest events cannot be used."""
        self.metrics.poison(partition, red)
        self.health.poison(partition, red)

    def set_aside(self, reasons: Iterable[Reason]) -> None:
        """These events are in the dead letters."""
        for reason, count in Counter(reasons).items():
            self.metrics.dead_letters(reason, count)
            self.metrics.events(Outcome.DEAD_LETTER, count)

    def lag(self, partition: int, events: int, applied_timestamp_ms: int | None = None) -> None:
        """Events that wait at the brokers or on their way."""
        self.metrics.lag(partition, events, applied_timestamp_ms)
        self.health.lag(partition, events)

    def routed(self, name: str, next_offset: int, lag: int) -> None:
        """How far the router has come in a partition of the source; one that stands still is a dead agent."""
        now = self._clock()
        before, since = self._routed.get(name, (next_offset, now))
        since = since if lag and next_offset == before else now
        self._routed[name] = next_offset, since
        if now - since > self._stall_s:
            self.health.agent_died(
                f"router of {name}", f"{lag} events wait, and nothing has moved for {now - since:.0f} s"
            )
        else:
            self.health.agent_runs(f"router of {name}")

    def router_poison(self, name: str, red: bool) -> None:
        """Whether nearly all of the latest events of a partition of the source cannot be used."""
        self.health.source_poison(name, red)

    def router_waits(self, name: str, stage: Stage, error: BaseException) -> None:
        """Something outside does not do its part for the router; it is tried again."""
        self.metrics.retried(stage)
        log.warning("the router waits, and tries again", source=name, stage=str(stage), error=_line(error))

    def no_longer_routed(self, name: str) -> None:
        """Another worker routes it."""
        self._routed.pop(name, None)
        self.health.agent_runs(f"router of {name}")
        self.health.source_poison(name, False)

    def published(self, partition: int, rows: int, pending_commits: int, progress: Progress | None) -> None:
        """The changelog has acknowledged so many rows, up to this progress."""
        self.metrics.changelog_rows(rows)
        self.metrics.pending_commits(partition, pending_commits)
        if progress is not None and progress.users != UNKNOWN:
            self.metrics.state(partition, progress.users, progress.events)

    def fenced(self, partition: int) -> None:
        """Another worker has opened it."""
        self.metrics.fenced()
        self.health.fenced(partition)

    def waits(self, partition: int, stage: Stage, error: BaseException) -> None:
        """Something outside does not do its part; it is tried again."""
        self.metrics.retried(stage)
        self.health.hindered(partition, _line(error))
        log.warning("waits, and tries again", partition=partition, stage=str(stage), error=_line(error))

    def gap(self, partition: int, events: int) -> None:
        """The source had deleted events that were not read."""
        self.metrics.gap(events)
        log.error(
            "the source has deleted events before they were read: lengthen its retention, or add workers",
            partition=partition,
            events=events,
        )

    def failed(self, error: BaseException) -> None:
        """Nothing but a new start, and mostly somebody's hand, helps."""
        self.health.failed_fatally(_line(error))
        log.error("the worker ends", error=_line(error), exc_info=error)


def _line(error: BaseException) -> str:
    return str(error) or repr(error)
