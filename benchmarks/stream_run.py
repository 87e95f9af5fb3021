"""The whole stream in one process, from a file to durable rows in RocksDB: events per second, memory, disk.

    python -m benchmarks.stream_run [--data DIRECTORY] [--case zipf] [--json]

Decode, look up, read rows, predict and learn, write rows, close: d = 16, ring of 32, commits of 16,384 events. Every
run is a process of its own; loading the model and the kernel is not counted. Users of the generated files: Zipf 1.1
(few take most events), and uniform over a million (every event a row to read and write: the worst case).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import in_child
from benchmarks.clock import clocked
from benchmarks.command import Options, Skipped, standalone
from benchmarks.report import Figure
from benchmarks.synthetic import uniform_users, write_csv, zipf_users
from configs.settings import DataSettings, Settings
from learner.adaptation import Adaptation
from learner.artifact import read_artifact, write_artifact
from learner.interactions import Interactions
from learner.meta_training import meta_train
from state.store import RocksUserStore
from streams.processor import Processor
from streams.replay import rocks_stores
from streams.sources import load_catalogues, open_source

EVENTS = 2_000_000
TRAINING_EVENTS = 20_000
"""A model from the first events of a generated file; speed does not depend on what it knows."""
PARTITION = 0

STAGES: dict[tuple[type, str], str] = {
    (RocksUserStore, "get_many"): "read rows",
    (Adaptation, "learn"): "kernel",
    (RocksUserStore, "write_batch"): "write rows",
    (RocksUserStore, "close"): "close",
}
"""Public calls whose time is taken. Decoding runs ahead in a thread; what is taken of it is the wait for a batch."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Which events are streamed, and how fast that should be."""

    name: str
    target: float
    """Events per second"""
    users: Callable[[int], np.ndarray[Any, np.dtype[np.int64]]] | None
    """Draws the users of so many events; None for MovieLens 1M"""


SCENARIOS = (
    Scenario("ML-1M", 500_000, None),
    Scenario("Zipf 1.1 over 137,000 users", 200_000, lambda n: zipf_users(n, 137_000, 1.1)),
    Scenario("uniform over 1,000,000 users", 100_000, lambda n: uniform_users(n, 1_000_000)),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One stream from first byte to closed store."""

    events: int
    users: int
    seconds: float
    cpu_seconds: float
    """Of all threads, RocksDB's included"""
    main_cpu_seconds: float
    """Of the thread that streams: what bounds the speed on a machine with cores to spare"""
    disk_bytes: int
    stages: dict[str, float]
    """Seconds by stage, those of ``STAGES``, the wait for decoded batches, and the rest"""


def run(options: Options) -> Iterator[Figure]:
    """Every scenario without and with the second filter."""
    for scenario in SCENARIOS:
        for second in (False, True):
            case = f"{scenario.name}, second filter" if second else scenario.name
            if not options.wants(case):
                continue
            with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder:
                try:
                    settings, model = prepare(options, scenario, second, Path(folder))
                except Skipped as reason:
                    options.progress(f"{case}: skipped, {reason}")
                    continue
                result, peak = in_child(stream, settings, model, Path(folder, "state"))
            yield from figures(case, result, peak, options.target(scenario.target))


def prepare(options: Options, scenario: Scenario, second: bool, folder: Path) -> tuple[Settings, Path]:
    """The events' file and a model for it, trained for one epoch."""
    if scenario.users is None:
        settings = options.settings("ml-1m", "ml-1m", learner__second_filter=second, training__epochs=1)
    else:
        path = folder / "events.csv"
        write_csv(path, scenario.users(options.scaled(EVENTS)))
        settings = generated(path, second)
    return settings, train(settings, folder / "model")


def train(settings: Settings, model: Path) -> Path:
    """Writes a model learned from the first events of the source; returns its directory."""
    users, items = load_catalogues(settings.data)
    write_artifact(model, meta_train(_first_events(settings), users, items, settings.learner, settings.training))
    return model


def generated(path: Path, second: bool) -> Settings:
    """Default settings on a generated file; large batches, for most of its users have one event."""
    settings = Settings(data=DataSettings(paths=(path,)))
    learner = settings.learner.model_copy(update={"second_filter": second})
    training = settings.training.model_copy(update={"epochs": 1, "users_per_batch": 1024})
    return settings.model_copy(update={"learner": learner, "training": training})


def _first_events(settings: Settings) -> Interactions:
    parts, events = [], 0
    for batch in open_source(settings.data).batches():
        parts.append(batch)
        events += len(batch)
        if events >= TRAINING_EVENTS:
            break
    return Interactions.concatenate(parts).take(slice(0, TRAINING_EVENTS)).pruned()


def stream(settings: Settings, model: Path, state: Path) -> Run:
    """Streams the source of ``settings`` through the model into stores under ``state``."""
    users, items = load_catalogues(settings.data)
    serving = read_artifact(model).serving(users, items)
    serving.initial_means(("nobody",), {})  # loads its compiled loop
    processor = Processor(serving, rocks_stores(state, settings.state), settings.state)
    stages = dict.fromkeys(("wait for decoding", *STAGES.values()), 0.0)
    events = 0
    with clocked(STAGES, stages):
        cpu, main_cpu, start = time.process_time(), time.thread_time(), time.perf_counter()
        batches = open_source(settings.data).batches()
        while (batch := _next(batches, stages)) is not None:
            processor.process(PARTITION, batch)
            events += len(batch)
        processor.close()
        seconds = time.perf_counter() - start
        cpu, main_cpu = time.process_time() - cpu, time.thread_time() - main_cpu
    stages["the rest"] = seconds - sum(stages.values())
    disk = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    return Run(events, processor.counts.users_created, seconds, cpu, main_cpu, disk, stages)


def figures(case: str, result: Run, peak: int, target: float | None = None) -> Iterator[Figure]:
    """What a run says."""
    per_event = 1e6 / result.events
    yield Figure(case, "speed", (result.events / result.seconds,), "events/s", target)
    yield Figure(case, "CPU time", (result.cpu_seconds * per_event,), "µs/event")
    yield Figure(case, "CPU time, main thread", (result.main_cpu_seconds * per_event,), "µs/event")
    for stage, seconds in result.stages.items():
        yield Figure(case, f"  {stage}", (seconds * per_event,), "µs/event")
    yield Figure(case, "users", (result.users,))
    yield Figure(case, "disk", (result.disk_bytes / result.users,), "bytes/user")
    yield Figure(case, "peak memory", (peak / 1e6,), "MB")


def _next(batches: Iterator[Interactions], seconds: dict[str, float]) -> Interactions | None:
    start = time.perf_counter()
    batch = next(batches, None)
    seconds["wait for decoding"] += time.perf_counter() - start
    return batch


if __name__ == "__main__":
    standalone("stream_run", run, __doc__)
