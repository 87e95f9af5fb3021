"""What the live benchmarks stream, and the models that serve it: made when a case first asks, kept for the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import stream_run
from benchmarks.command import Options
from benchmarks.live_events import Events, from_source, generated, records
from benchmarks.live_producer import fill
from benchmarks.live_stage import PARTITIONS, Broker, Scene, Tree, scene, source_topic
from benchmarks.synthetic import uniform_users, write_csv, zipf_users
from configs.settings import EventSchema

EVENTS = 2_000_000
"""Of a generated stream"""


@dataclass(frozen=True, slots=True)
class Stream:
    """Which events are streamed, and how fast that should be."""

    name: str
    target: float
    """Events a second, applied, durable and acknowledged"""
    users: Callable[[int], np.ndarray[Any, np.dtype[np.int64]]] | None
    """Draws the users of so many events; None for MovieLens 1M"""


ML_1M = Stream("ML-1M", 500_000, None)
ZIPF = Stream("Zipf 1.1 over 137,000 users", 200_000, lambda n: zipf_users(n, 137_000, 1.1))
UNIFORM = Stream("uniform over 1,000,000 users", 80_000, lambda n: uniform_users(n, 1_000_000))


@dataclass(frozen=True, slots=True)
class Filled:
    """A topic that holds a stream's events."""

    topic: str
    events: int
    event_bytes: float
    """Key and value, on average"""


class Bench:
    """Options, brokers, and a directory for all that is made."""

    def __init__(self, options: Options, folder: Path, at: Broker) -> None:
        self.options, self.folder, self.at = options, folder, at
        self._models: dict[tuple[bool, bool], tuple[Tree, Path]] = {}
        self._numbers = itertools.count()

    def scene(
        self, stream: Stream, topic: str, *, second: bool = False, kafka: Tree | None = None, **worker: object
    ) -> Scene:
        """Settings for workers on a topic of this stream; ``second``: the model has a second filter."""
        key = stream.users is None, second
        if key not in self._models:
            self._models[key] = self._movielens(second) if stream.users is None else self._generated(second)
        tree, model = self._models[key]
        return scene(self.folder, self.at, tree, model, topic, kafka=kafka, **worker)

    def new_state(self) -> Path:
        """A directory that no worker has had; it is not there yet."""
        return self.folder / f"state-{next(self._numbers)}"

    @contextmanager
    def filled(self, stream: Stream, events: int | None = None) -> Iterator[Filled]:
        """A topic with so many of the stream's events; as many as it has, or ``EVENTS``, where none are named.

        Raises Skipped where the data is not there.
        """
        schema = EventSchema()
        if stream.users is not None:
            chosen = generated(stream.users(events or self.options.scaled(EVENTS)))
        else:
            data = self.options.settings("ml-1m", "ml-1m").data
            schema, chosen = data.events, self._of_movielens(from_source(data), events)
        with source_topic(self.at, stream.name.split()[0].lower()) as topic:
            size = fill(self.at.connection, topic, PARTITIONS, records(chosen, schema))
            yield Filled(topic, len(chosen), size / len(chosen))

    def _of_movielens(self, found: Events, events: int | None) -> Events:
        return found.part(0, self.options.scaled(len(found))) if events is None else found.repeated(events)

    def _movielens(self, second: bool) -> tuple[Tree, Path]:
        settings = self.options.settings("ml-1m", "ml-1m", learner__second_filter=second, training__epochs=1)
        tree: Tree = {"extends": "ml-1m", "data": {"paths": [str(path.resolve()) for path in settings.data.paths]}}
        return tree, stream_run.train(settings, self.folder / f"model-ml-1m-{second}")

    def _generated(self, second: bool) -> tuple[Tree, Path]:
        path = self.folder / "events.csv"
        write_csv(path, uniform_users(stream_run.TRAINING_EVENTS, 1_000))
        return {}, stream_run.train(stream_run.generated(path, second), self.folder / f"model-{second}")
