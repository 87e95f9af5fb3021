"""A worker that works off a full topic: how fast, what it costs, how much memory it takes, and where the time goes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.live_bench import ML_1M, Bench, Filled, Stream
from benchmarks.live_peers import measure
from benchmarks.live_profile import MARK, Cost, read
from benchmarks.live_scrape import Look, stretch
from benchmarks.live_stage import START_S, LiveFailure, WorkerProcess, own_topics, worker
from benchmarks.report import Figure
from streams.live import metrics as names

LOOK_EVERY_S = 0.04
QUIET_S = 1.0
"""A worker that has done nothing for so long, with nothing left to do, is at the end"""
SLOWEST = 5_000
"""Events a second: a worker slower than this is taken for stuck"""
LOOP_DELAY_MS = 100
"""What a worker promises"""
FAUST_TIMES, AIOKAFKA_TIMES = 40, 1
"""How much faster than peers that do nothing"""
FAUST_EVENTS = 200_000
"""Enough for its speed, which does not change; it takes a quarter of a minute"""
LAG = 10_000_000
LAG_MB = 700
SHOWN_THREADS, SHOWN_COSTS = 4, 25


@dataclass(frozen=True, slots=True)
class Drained:
    """A worker's run from the first event to the last acknowledgement."""

    events: int
    began: Look
    ended: Look
    looks: Sequence[Look]
    loop_delay_s: float
    """The largest of the last minute"""

    @property
    def speed(self) -> float:
        """Events a second."""
        return self.events / (self.ended.at_s - self.began.at_s)

    @property
    def steady_mb(self) -> float:
        """Median of resident memory over the later half."""
        half = (self.began.at_s + self.ended.at_s) / 2
        return statistics.median(look.worker.resident for look in self.looks if look.at_s >= half) / 1e6


def throughput(bench: Bench, stream: Stream) -> Iterator[Figure]:
    """A model without and with the second filter; on MovieLens peers too, on the same topic."""
    cases = {f"{stream.name}{', second filter' if second else ''}": second for second in (False, True)}
    wanted = {case: second for case, second in cases.items() if bench.options.wants(case)}
    if not wanted:
        return
    with bench.filled(stream) as filled:
        speeds = []
        for case, second in wanted.items():
            run = drained(bench, stream, filled, second)
            speeds.append(run.speed)
            yield from _speed_figures(case, run, filled, bench.options.target(stream.target))
        if stream is ML_1M:
            yield from _peer_figures(bench, filled, speeds[0])


def memory(bench: Bench, stream: Stream) -> Iterator[Figure]:
    """Default settings, and ten million events to catch up with."""
    name = "MovieLens over and over, new users each time" if stream is ML_1M else stream.name
    case = f"lag of {LAG:,} events: {name}"
    if not bench.options.wants(case):
        return
    with bench.filled(stream, bench.options.scaled(LAG)) as filled:
        run = drained(bench, stream, filled, True)
    yield Figure(case, "peak memory", (run.ended.worker.peak / 1e6,), "MB", bench.options.target(LAG_MB), True)
    yield Figure(case, "memory, median of the later half", (run.steady_mb,), "MB")
    yield Figure(case, "speed", (run.speed,), "events/s")


def profile(bench: Bench) -> Iterator[Figure]:
    """Which functions of which thread take the CPU time of a run over MovieLens, without the second filter."""
    case = "CPU profile over MovieLens"
    if not bench.options.wants(case):
        return
    out = bench.folder / "profile.json"
    command = (sys.executable, "-m", "benchmarks.live_profile", "--out", str(out))
    with bench.filled(ML_1M) as filled:
        run = drained(bench, ML_1M, filled, False, command, lambda process: process.send_signal(MARK))
    yield Figure(case, "speed under the profiler", (run.speed,), "events/s")
    yield from _cost_figures(case, read(out), filled.events)


def drained(
    bench: Bench,
    stream: Stream,
    filled: Filled,
    second: bool,
    command: Sequence[str] = (),
    mark: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
) -> Drained:
    """A new worker reads the whole topic. Raises LiveFailure where it does not.

    ``command``: what takes the worker's options in place of ``coldstream worker``. ``mark`` is called with its process
    when it has its partitions, and when it is at the end.
    """
    scene = bench.scene(stream, filled.topic, second=second)
    with own_topics(scene), worker(scene, bench.new_state(), bench.at.pid, command) as process:
        process.until(lambda found: found.owned or None, START_S)
        mark(process.process)
        run = _watched(process, filled.events)
        mark(process.process)
        return run


def _watched(process: WorkerProcess, events: int) -> Drained:
    looks: list[Look] = []
    deadline = time.monotonic() + START_S + events / SLOWEST
    while time.monotonic() < deadline:
        look = process.look()
        if look is not None:
            looks.append(look)
            if look.applied >= events and _quiet(looks):
                break
        time.sleep(LOOK_EVERY_S)
    else:
        raise LiveFailure(f"{looks[-1].applied if looks else 0} of {events} events were applied; see {process.log}")
    if looks[-1].applied != events:
        raise LiveFailure(f"{looks[-1].applied} events were applied of {events}: some twice?")
    began, ended = stretch(looks)
    found = process.scrape()
    return Drained(events, began, ended, looks, found.value(names.LOOP_DELAY_MAX) if found else float("nan"))


def _quiet(looks: Sequence[Look]) -> bool:
    last = looks[-1]
    before = next((look for look in reversed(looks) if look.at_s <= last.at_s - QUIET_S), None)
    return before is not None and before.same_end(last)


def _speed_figures(case: str, run: Drained, filled: Filled, target: float | None) -> Iterator[Figure]:
    per_event = 1e6 / run.events
    began, ended = run.began, run.ended
    yield Figure(case, "speed", (run.speed,), "events/s", target)
    yield Figure(case, "CPU time, worker", ((ended.worker.cpu_s - began.worker.cpu_s) * per_event,), "µs/event")
    yield Figure(case, "CPU time, broker", ((ended.broker_cpu_s - began.broker_cpu_s) * per_event,), "µs/event")
    for stage, seconds in ended.stages.items():
        if took := seconds - began.stages[stage]:
            yield Figure(case, f"  {stage}, with waits", (took * per_event,), "µs/event")
    yield Figure(case, "changelog rows", (ended.rows / run.events,), "rows/event")
    yield Figure(case, "event", (filled.event_bytes,), "bytes")
    yield Figure(case, "peak memory", (ended.worker.peak / 1e6,), "MB")
    yield Figure(case, "event loop's largest delay", (run.loop_delay_s * 1e3,), "ms", LOOP_DELAY_MS, True)


def _peer_figures(bench: Bench, filled: Filled, speed: float) -> Iterator[Figure]:
    peers = (
        ("aiokafka", "aiokafka getmany + json, doing nothing", filled.events, AIOKAFKA_TIMES),
        ("faust", "stock Faust take(1000), doing nothing", min(FAUST_EVENTS, filled.events), FAUST_TIMES),
    )
    for peer, case, events, times in peers:
        counted = measure(peer, bench.at.bootstrap, filled.topic, events)
        rate = counted.events / counted.seconds
        yield Figure(case, "speed", (rate,), "events/s")
        yield Figure(case, "CPU time", (counted.cpu_seconds / counted.events * 1e6,), "µs/event")
        yield Figure(case, "the worker beside it", (speed / rate,), "times as fast", bench.options.target(times))


def _cost_figures(case: str, costs: Sequence[Cost], events: int) -> Iterator[Figure]:
    per_event = 1e6 / events
    threads: Counter[str] = Counter()
    for cost in costs:
        threads[cost.thread] += cost.cpu_s  # type: ignore[assignment]  # a counter of seconds
    shown = threads.most_common(SHOWN_THREADS)
    rest = threads.total() - sum(cpu_s for _, cpu_s in shown)
    for thread, cpu_s in (*shown, ("others", rest)):
        yield Figure(case, f"thread {thread}", (cpu_s * per_event,), "µs/event")
    for cost in costs[:SHOWN_COSTS]:
        yield Figure(case, f"  {cost.thread}: {cost.where}", (cost.cpu_s * per_event,), "µs/event")
