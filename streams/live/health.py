"""Is a worker live, and is it ready? Pure: the worker feeds facts, a clock is given, the answers are lists of problems.

Live means that waiting may help; a worker that is not should be started anew. Ready means that users are up to date.

Progress is judged partition by partition, so that one which is stuck is not hidden by others that run:
- A partition *waits* while events lag behind, while it is restored, and while it is fenced.
- It *moves* when it has applied further offsets, or its restore has read more.
- A restore of any partition counts as a move of all: others may have to wait for it, as the consumer is paused then.
- One that waits, and has not moved for ``worker.stall_s``, is stalled, and the worker is not live.
A loop that has not run for as long tells no facts at all, and so is a problem by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from configs.settings import WorkerSettings

ERROR_CHARACTERS = 300
"""How much of an error's text is shown: a probe's answer is read in one glance"""
POISONED = "nearly all of its latest events cannot be used; see the dead letters (worker.poison_share)"


class PartitionState(StrEnum):
    """What a partition that was assigned to this worker is doing."""

    RESTORING = "restoring"
    """Its store is opened, or filled from the changelog"""
    RUNNING = "running"
    FENCED = "fenced"
    """Another worker owns it, though this one has not been told yet"""


@dataclass(slots=True)
class _Partition:
    """What is known of one."""

    since: float
    """When it last moved, or had nothing to wait for"""
    state: PartitionState = PartitionState.RESTORING
    lag: int | None = None
    offset: int | None = None
    restored: int = 0
    to_restore: int | None = None
    poison: bool = False
    error: str | None = None

    @property
    def waits(self) -> bool:
        """Whether something is to be done."""
        return self.state is not PartitionState.RUNNING or bool(self.lag)


class Health:
    """Facts in, problems out. Every method may be called from any thread; ``clock`` counts seconds and never falls.

    Facts of a partition that is not assigned are ignored. What is said of errors may be read by anyone who reaches the
    port: hand in no secrets.
    """

    def __init__(self, settings: WorkerSettings, clock: Callable[[], float]) -> None:
        self._settings, self._clock = settings, clock
        self._lock = threading.RLock()
        self._partitions: dict[int, _Partition] = {}
        self._joined = False
        self._stopping = False
        self._fatal: str | None = None
        self._dead_agents: dict[str, str] = {}
        self._poisoned_sources: set[str] = set()
        self._beat_at = self._restore_moved_at = clock()

    # --- facts of the process ---

    def beat(self) -> None:
        """The event loop runs. The first beat is due ``worker.stall_s`` after this object was made."""
        with self._lock:
            self._beat_at = self._clock()

    def agent_runs(self, name: str) -> None:
        """It was started, or started again."""
        with self._lock:
            self._dead_agents.pop(name, None)

    def agent_died(self, name: str, error: str) -> None:
        """It has ended, and not because the worker stops."""
        with self._lock:
            self._dead_agents[name] = _short(error)

    def failed_fatally(self, error: str) -> None:
        """Nothing but a new start helps. The first one stays."""
        with self._lock:
            self._fatal = self._fatal or _short(error)

    def stopping(self) -> None:
        """The worker shuts down: not ready, and from here on only a fatal error makes it not live."""
        with self._lock:
            self._stopping = True

    def source_poison(self, name: str, red: bool) -> None:
        """Whether more than ``worker.poison_share`` of the latest events that a router read there could not be used."""
        with self._lock:
            (self._poisoned_sources.add if red else self._poisoned_sources.discard)(name)

    # --- facts of partitions ---

    def assigned(self, partitions: Iterable[int]) -> None:
        """All that this worker has from now on. None at all is an answer too: a spare worker is ready.

        A new one is ``RESTORING``, one that it had goes on as it is.
        """
        with self._lock:
            self._joined = True
            now = self._clock()
            self._partitions = {p: self._partitions.get(p) or _Partition(since=now) for p in partitions}

    def revoked(self, partition: int) -> None:
        """It is another's business now; assigned again, it begins anew."""
        with self._lock:
            self._partitions.pop(partition, None)

    def restoring(self, partition: int, done: int, total: int | None = None) -> None:
        """``done`` changelog records of ``total`` were read; None: nobody knows yet."""
        with self._lock:
            if found := self._partitions.get(partition):
                began = found.state is not PartitionState.RESTORING
                if began or done > found.restored:
                    found.since = self._restore_moved_at = self._clock()
                found.state, found.error = PartitionState.RESTORING, None
                found.restored, found.to_restore = done, total

    def running(self, partition: int) -> None:
        """Its store is open, and its events are applied as they come."""
        with self._lock:
            if (found := self._partitions.get(partition)) and found.state is not PartitionState.RUNNING:
                found.state, found.error = PartitionState.RUNNING, None
                found.since = self._restore_moved_at = self._clock()

    def lag(self, partition: int, events: int) -> None:
        """Events that are still to be applied."""
        with self._lock:
            if found := self._partitions.get(partition):
                if not found.waits:
                    found.since = self._clock()
                found.lag = events

    def applied(self, partition: int, offset: int) -> None:
        """All events up to and including this one are in the store, or in the dead letters."""
        with self._lock:
            if found := self._partitions.get(partition):
                if found.offset is None or offset > found.offset:
                    found.since = self._clock()
                    if found.state is PartitionState.RUNNING:
                        found.error = None
                found.offset = offset

    def hindered(self, partition: int, error: str) -> None:
        """Something failed and is tried again; shown until the partition moves, and no problem by itself."""
        with self._lock:
            if (found := self._partitions.get(partition)) and found.state is PartitionState.RUNNING:
                found.error = _short(error)

    def poison(self, partition: int, red: bool) -> None:
        """Whether more than ``worker.poison_share`` of its latest events could not be used."""
        with self._lock:
            if found := self._partitions.get(partition):
                found.poison = red

    def fenced(self, partition: int) -> None:
        """A write to its changelog was refused, for another worker owns it."""
        with self._lock:
            if found := self._partitions.get(partition):
                if not found.waits:
                    found.since = self._clock()
                found.state, found.error = PartitionState.FENCED, "another worker owns it"

    # --- answers ---

    def live(self) -> tuple[str, ...]:
        """Why the worker should be started anew; empty: it is live."""
        with self._lock:
            problems = [f"fatal error: {self._fatal}"] if self._fatal else []
            if self._stopping:
                return tuple(problems)
            problems += (f"agent {name} has died: {error}" for name, error in sorted(self._dead_agents.items()))
            silent = self._clock() - self._beat_at
            if silent > self._settings.stall_s:
                problems.append(f"the event loop has not run for {silent:.0f} s (worker.stall_s)")
            problems += (self._stall(number, p) for number, p in sorted(self._partitions.items()) if self._stalled(p))
            return tuple(problems)

    def ready(self) -> tuple[str, ...]:
        """Why the worker's users may not be up to date, or soon will not be; empty: it is ready."""
        with self._lock:
            problems = list(self.live())
            if self._stopping:
                problems.append("stopping")
            if not self._joined:
                problems.append("no partitions were assigned yet")
            problems += (f"source {name}: {POISONED}" for name in sorted(self._poisoned_sources))
            for number, found in sorted(self._partitions.items()):
                problems += (f"partition {number}: {problem}" for problem in self._behind(found))
            return tuple(problems)

    def partitions(self) -> dict[str, dict[str, object]]:
        """What is known of each, JSON-ready."""
        with self._lock:
            now = self._clock()
            return {
                str(number): {
                    "state": str(p.state),
                    "lag": p.lag,
                    "offset": p.offset,
                    "restored": p.restored,
                    "to_restore": p.to_restore,
                    "waiting_s": round(now - self._moved_at(p), 3) if p.waits else 0.0,
                    "poison": p.poison,
                    "error": p.error,
                }
                for number, p in sorted(self._partitions.items())
            }

    def _moved_at(self, found: _Partition) -> float:
        return max(found.since, self._restore_moved_at)

    def _stalled(self, found: _Partition) -> bool:
        return found.waits and self._clock() - self._moved_at(found) > self._settings.stall_s

    def _stall(self, number: int, found: _Partition) -> str:
        waits_for = f"{found.lag} events wait" if found.state is PartitionState.RUNNING else found.state
        still = self._clock() - self._moved_at(found)
        error = f"; last error: {found.error}" if found.error else ""
        return f"partition {number}: {waits_for}, but nothing has moved for {still:.0f} s (worker.stall_s){error}"

    def _behind(self, found: _Partition) -> Iterable[str]:
        if found.state is PartitionState.RESTORING:
            total = "an unknown number of" if found.to_restore is None else found.to_restore
            yield f"restoring, {found.restored} of {total} records"
        elif found.state is not PartitionState.RUNNING:
            yield f"{found.state}: {found.error}"
        elif found.lag is None:
            yield "its lag is not known yet"
        elif found.lag > self._settings.ready_lag:
            yield f"{found.lag} events behind (worker.ready_lag is {self._settings.ready_lag})"
        if found.poison:
            yield POISONED


def _short(error: str) -> str:
    line = " ".join(error.split())
    return line if len(line) <= ERROR_CHARACTERS else line[: ERROR_CHARACTERS - 1] + "…"
