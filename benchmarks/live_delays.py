"""How long it takes: from an event to its durable row, from a worker's start to its first event, from kill -9 of one
worker to the first events that another applies of its partitions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from benchmarks.live_ages import told_ages
from benchmarks.live_bench import UNIFORM, Bench
from benchmarks.live_scrape import Buckets, Scrape, now_s
from benchmarks.live_stage import (
    PARTITIONS,
    START_S,
    LiveFailure,
    Scene,
    WorkerProcess,
    end,
    own_topics,
    plain_environment,
    source_topic,
    worker,
)
from benchmarks.report import Figure
from streams.live import metrics as names

DURABLE = "coldstream_durable_seconds"
"""Histogram: age of each event, by its record's timestamp, when its row was durable"""
RATE = 10_000
WARM_S, LATENCY_S, LEAST_S = 2.0, 30.0, 3.0
"""Played before anything counts; played then; and at least so long in a trial"""
P50_MS, P99_MS = 50, 250
START_RUNS = 3
START_EVENTS = 20_000
FIRST_EVENT_S = 4.0
TAKEOVER_RUNS = 3
TAKEOVER_RATE = 1_000
TAKEOVER_S = 7.5
SESSION_MS = 6_000
PLAYED_S = 600
"""A takeover's producer plays for so long unless it is stopped"""
LOOK_EVERY_S = 0.25
"""Where nothing is timed by it"""
GIVEN_UP_S = 90.0


def latency(bench: Bench) -> Iterator[Figure]:
    """Ten thousand events a second of 100,000 users, most of whom come again."""
    case = f"produce to durable row, {RATE:,} events/s"
    if not bench.options.wants(case):
        return
    seconds, target = max(LATENCY_S * bench.options.scale, LEAST_S), bench.options.target
    with source_topic(bench.at, "latency") as topic:
        scene = bench.scene(UNIFORM, topic)
        with own_topics(scene):
            with worker(scene, bench.new_state()) as process:
                process.until(lambda found: len(found.owned) == PARTITIONS or None, START_S)
                before = _played(process, scene, WARM_S, 0)
                began_ms = time.time() * 1e3
                after = _played(process, scene, seconds, before.applied)
                delay_s = after.value(names.LOOP_DELAY_MAX)
            told = told_ages(scene, began_ms)
    durable = _ages(after) - _ages(before)
    yield Figure(case, "p50", (durable.quantile(0.5) * 1e3,), "ms", target(P50_MS), True)
    yield Figure(case, "p99", (durable.quantile(0.99) * 1e3,), "ms", target(P99_MS), True)
    for share in (50, 99):
        yield Figure(case, f"told to the changelog, p{share}", (float(np.percentile(told, share)) * 1e3,), "ms")
    yield Figure(case, "event loop's largest delay", (delay_s * 1e3,), "ms")


def _played(process: WorkerProcess, scene: Scene, seconds: float, before: int) -> Scrape:
    """What the worker says when it has applied, and told of, all that is played now."""
    with _player(scene, RATE, seconds) as player:
        told, _ = player.communicate(timeout=seconds + GIVEN_UP_S)
    if player.returncode:
        raise LiveFailure("the producer failed: its message stands above")
    wanted = before + int(json.loads(told)["events"])

    def done(found: Scrape) -> Scrape | None:
        return found if found.applied >= wanted and not found.pending else None

    return process.until(done, GIVEN_UP_S, LOOK_EVERY_S)


def _ages(found: Scrape) -> Buckets:
    ages = found.histogram(DURABLE)
    if ages is None:
        raise LiveFailure(f"the worker has no histogram {DURABLE}")
    return ages


def start(bench: Bench) -> Iterator[Figure]:
    """A small model, compiled code in its cache on disk, topics that are there: the process, and its first event."""
    case = "start of a worker"
    if not bench.options.wants(case):
        return
    with bench.filled(UNIFORM, START_EVENTS) as filled:
        _started(bench, filled.topic)  # compiles what has never run here
        runs = tuple(_started(bench, filled.topic) for _ in range(START_RUNS))
    yield Figure(case, "to the first event applied", runs, "s", bench.options.target(FIRST_EVENT_S), True)


def _started(bench: Bench, topic: str) -> float:
    scene = bench.scene(UNIFORM, topic)
    with own_topics(scene), worker(scene, bench.new_state()) as process:
        process.until(lambda found: found.applied or None, START_S)
        return now_s() - process.spawned_s


def takeover(bench: Bench) -> Iterator[Figure]:
    """Two workers, one of them killed, until the other has applied events of every partition of the dead one."""
    for standby in (False, True):
        case = f"takeover after kill -9, {'with' if standby else 'without'} standby"
        if bench.options.wants(case):
            runs = tuple(_taken_over(bench, standby) for _ in range(TAKEOVER_RUNS))
            yield Figure(case, f"session timeout {SESSION_MS:,} ms", runs, "s", bench.options.target(TAKEOVER_S), True)


def _taken_over(bench: Bench, standby: bool) -> float:
    with ExitStack() as stack:
        topic = stack.enter_context(source_topic(bench.at, "takeover"))
        scene = bench.scene(UNIFORM, topic, kafka={"session_timeout_ms": SESSION_MS}, standby=standby)
        stack.enter_context(own_topics(scene))
        one, other = (stack.enter_context(worker(scene, bench.new_state())) for _ in range(2))
        stack.enter_context(_player(scene, TAKEOVER_RATE, PLAYED_S))
        theirs = _shared(one, other)
        one.kill()
        killed_s = now_s()
        other.until(lambda found: _applies(found, theirs) or None, GIVEN_UP_S)
        return now_s() - killed_s


def _shared(one: WorkerProcess, other: WorkerProcess) -> frozenset[str]:
    """The first one's partitions, as soon as both apply events of all of theirs, and the other follows what it can."""

    def settled(found: Scrape) -> frozenset[str] | None:
        with_other = other.scrape()
        theirs = found.owned
        if with_other is None or not theirs or len(theirs | with_other.owned) < PARTITIONS or theirs & with_other.owned:
            return None
        return theirs if _applies(found, theirs) and _applies(with_other, with_other.owned) else None

    return one.until(settled, GIVEN_UP_S, LOOK_EVERY_S)


def _applies(found: Scrape, partitions: frozenset[str]) -> bool:
    """Whether the worker has applied events of all these since it was given them."""
    return bool(partitions) and partitions <= found.owned & found.by(names.LAG_SECONDS, "partition").keys()


@contextmanager
def _player(scene: Scene, rate: float, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A producer, stopped at the end if it still plays."""
    told = ["--bootstrap", ",".join(scene.settings.kafka.bootstrap), "--topic", scene.topic]
    how = ["--partitions", str(PARTITIONS), "--rate", str(rate), "--seconds", str(seconds)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.live_producer", *told, *how],
        stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=plain_environment(),
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            end(process)
