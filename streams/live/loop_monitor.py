"""How late the event loop wakes up: measured all the time, told to the metrics, and logged where it is too late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from streams.live.metrics import WorkerMetrics

EVERY_S = 0.02
"""Between two measurements: a block of 100 ms cannot hide, and 50 wake-ups a second cost a thousandth of a core"""
BLOCKED_S = 0.1
"""A loop that is later than this was blocked: what a worker promises not to be"""
LOG_EVERY_S = 60.0
"""A worker that blocks with every batch says so once a minute"""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Blocked:
    """What is worth a line in the log."""

    longest_s: float
    times: int
    """Since the line before"""


class BlockedReport:
    """When blocks of the loop are logged: the first at once, all those of the next minute together at its end."""

    def __init__(self) -> None:
        self._delays: list[float] = []
        self._quiet_until: float | None = None

    def measured(self, delay_s: float, now_s: float) -> Blocked | None:
        """One measurement, and what to log now. To be called steadily, ``now_s`` of any clock that only rises."""
        if delay_s > BLOCKED_S:
            self._delays.append(delay_s)
        if not self._delays or (self._quiet_until is not None and now_s < self._quiet_until):
            return None
        told = Blocked(max(self._delays), len(self._delays))
        self._delays.clear()
        self._quiet_until = now_s + LOG_EVERY_S
        return told


class LoopMonitor:
    """A task of the loop that it watches. ``beat`` is called at every wake-up: the loop runs.

    Use as an async context, or await ``run()`` in a task of your own.
    """

    def __init__(
        self,
        metrics: WorkerMetrics,
        beat: Callable[[], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._metrics, self._beat, self._clock = metrics, beat, clock
        self._report = BlockedReport()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> LoopMonitor:
        self._task = asyncio.create_task(self.run(), name="loop monitor")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.result()  # it failed before, and raises why

    async def run(self) -> None:
        """Until it is cancelled. Not by the loop's own clock: uvloop's stands still while a callback runs."""
        while True:
            due = self._clock() + EVERY_S
            await asyncio.sleep(EVERY_S)
            now = self._clock()
            self.woke(max(0.0, now - due), now)

    def woke(self, delay_s: float, now_s: float) -> None:
        """One measurement."""
        self._beat()
        self._metrics.loop_delay(delay_s)
        if told := self._report.measured(delay_s, now_s):
            longest_ms, bound_ms = round(told.longest_s * 1000), round(BLOCKED_S * 1000)
            log.warning("the event loop was blocked", longest_ms=longest_ms, times=told.times, bound_ms=bound_ms)
