"""A loop that is late is measured, logged in moderation, and known to run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import structlog
import uvloop
from structlog.testing import capture_logs

from configs.settings import WorkerSettings
from streams.live.health import Health
from streams.live.loop_monitor import EVERY_S, Blocked, BlockedReport, LoopMonitor
from streams.live.metrics import WorkerMetrics


@pytest.fixture(autouse=True)
def logs():
    structlog.reset_defaults()
    with capture_logs() as captured:
        yield captured


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics("1", "m")


def value(metrics: WorkerMetrics, name: str) -> float:
    found = metrics.registry.get_sample_value(f"coldstream_loop_delay_{name}")
    assert found is not None
    return found


def beats() -> None:
    """Health is not what these tests look at."""


# --- when a block is logged ---


def test_a_loop_that_is_in_time_is_not_told_of():
    report = BlockedReport()
    assert [report.measured(0.1, now) for now in (0.0, 0.5, 100.0)] == [None, None, None]


def test_the_first_block_is_told_at_once():
    assert BlockedReport().measured(0.15, 5.0) == Blocked(0.15, 1)


def test_those_of_the_next_minute_are_told_together_at_its_end_even_if_none_comes_then():
    report = BlockedReport()
    report.measured(0.15, 5.0)
    assert report.measured(0.2, 6.0) is None
    assert report.measured(0.7, 30.0) is None
    assert report.measured(0.0, 64.9) is None
    assert report.measured(0.0, 65.0) == Blocked(0.7, 2)
    assert report.measured(0.3, 100.0) is None
    assert report.measured(0.0, 125.0) == Blocked(0.3, 1)
    assert report.measured(0.0, 400.0) is None


# --- what is done with a measurement ---


def test_a_measurement_goes_to_the_metrics_and_the_log(metrics, logs):
    monitor = LoopMonitor(metrics, beats)
    monitor.woke(0.004, 1.0)
    monitor.woke(0.25, 2.0)
    monitor.woke(0.9, 3.0)
    assert value(metrics, "seconds_count") == 3
    assert value(metrics, "max_seconds") == 0.9
    assert logs == [
        {
            "event": "the event loop was blocked",
            "log_level": "warning",
            "longest_ms": 250,
            "times": 1,
            "bound_ms": 100,
        }
    ]


def test_every_measurement_shows_that_the_loop_runs(metrics):
    now = 0.0
    health = Health(WorkerSettings(stall_s=10), lambda: now)
    monitor = LoopMonitor(metrics, health.beat)
    now = 11.0
    assert health.live() == ("the event loop has not run for 11 s (worker.stall_s)",)
    monitor.woke(0.0, 11.0)
    assert health.live() == ()


# --- on a loop ---


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(EVERY_S / 4)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_blocked_loop_is_found_on_either_kind_of_loop(metrics, loop_factory, logs):
    async def block() -> None:
        async with LoopMonitor(metrics, beats):
            await until(lambda: value(metrics, "seconds_count") >= 2)
            time.sleep(0.25)  # what must not be done on a loop
            await until(lambda: value(metrics, "max_seconds") > 0.2)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(block())
    assert value(metrics, "max_seconds") > 0.2
    assert logs[0]["longest_ms"] > 100


def test_it_ends_with_its_context(metrics):
    async def watch() -> set[str]:
        async with LoopMonitor(metrics, beats):
            assert "loop monitor" in {task.get_name() for task in asyncio.all_tasks()}
        return {task.get_name() for task in asyncio.all_tasks()}

    assert "loop monitor" not in asyncio.run(watch())


def test_a_monitor_that_failed_says_why(metrics):
    def broken() -> float:
        raise ZeroDivisionError

    async def watch() -> None:
        async with LoopMonitor(metrics, beats, clock=broken):
            await asyncio.sleep(EVERY_S)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(watch())
