"""A trained model and the stream after it: run frozen, or with the online stage under one setting and another.

One training serves several runs, so that what differs between them is the online stage alone.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from benchmarks.command import Options
from benchmarks.report import Figure
from configs.settings import Settings
from learner.artifact import Artifact, read_artifact, read_histories, write_artifact
from learner.features import Catalogue
from learner.interactions import Interactions
from learner.meta_training import meta_train
from learner.metrics import PairedDifference, auc, event_log_loss, paired_difference
from learner.offline_histories import OfflineHistories
from learner.serving import ServingModel
from state.histories import HistoryLimits
from streams.meta.embedded import EmbeddedMeta
from streams.meta.result import MetaResult
from streams.processor import Predictions, Processor
from streams.protocol import offline_events, online_batches
from streams.replay import PARTITION, RunProgress, prepared, rocks_stores

Probability = NDArray[np.float32]
POINTS, NATS, SECONDS, VERSIONS = "points", "nats", "s", "versions"
"""Units"""
Measured = dict[tuple[str, str], float]
"""(name, unit) -> value, of one seed"""
SAMPLES = 400
"""Of the bootstrap over users"""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should be."""

    value: float
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class World:
    """What is learned from, and what is streamed after it."""

    past: Interactions
    batches: tuple[Interactions, ...]
    """The stream, in order"""
    users: Catalogue = field(default_factory=Catalogue)
    items: Catalogue = field(default_factory=Catalogue)
    scored: frozenset[str] | None = None
    """Users whose predictions count; None: all"""

    def counts(self, events: Interactions) -> NDArray[np.bool_]:
        """(N,) which of the stream's events are scored."""
        if self.scored is None:
            return np.ones(len(events), np.bool_)
        return np.fromiter((u in self.scored for u in events.user_ids), np.bool_, len(events.user_ids))[events.user]


@dataclass(frozen=True, slots=True)
class Trained:
    """The offline stage's model of a world."""

    world: World
    artifact: Artifact
    offline: OfflineHistories

    def serving(self) -> ServingModel:
        """Version 0."""
        return self.artifact.serving(self.world.users, self.world.items)

    def on(self, batches: Sequence[Interactions]) -> Trained:
        """The same model before another stream."""
        return replace(self, world=replace(self.world, batches=tuple(batches)))


@dataclass(frozen=True, slots=True)
class Run:
    """What one stream gave."""

    events: Interactions
    """(N,) all of it"""
    probability: Probability
    """(N,) each before its label was used"""
    scored: NDArray[np.bool_]
    """(N,)"""
    model: ServingModel
    """Who serves at the end"""
    seconds: float
    """Wall-clock, of the stream"""
    meta: MetaResult | None

    def auc(self, chosen: NDArray[np.bool_] | None = None) -> float:
        """Of the scored events, or of the chosen ones."""
        at = self.scored if chosen is None else chosen
        return auc(self.events.label[at], self.probability[at])

    def log_loss(self, chosen: NDArray[np.bool_] | None = None) -> float:
        """Of the scored events, or of the chosen ones."""
        at = self.scored if chosen is None else chosen
        return float(event_log_loss(self.events.label[at], self.probability[at]).mean())


def of_protocol(settings: Settings) -> World:
    """The evaluation protocol on the settings' data, in memory."""
    with prepared(settings, RunProgress()) as data:
        return World(
            offline_events(data.ordered, data.split), tuple(online_batches(data.ordered, data.split)), data.users,
            data.items, data.split.is_scored(data.ordered),
        )  # fmt: skip


def train(world: World, settings: Settings) -> Trained:
    """The offline stage, without the users who are held out; read back from disk, as whoever streams has it."""
    held_out = settings.meta.anchors.held_out
    with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder:
        model = meta_train(world.past, world.users, world.items, settings.learner, settings.training, held_out=held_out)
        write_artifact(Path(folder), model)
        return Trained(world, read_artifact(Path(folder)), read_histories(Path(folder)))


def stream(trained: Trained, settings: Settings) -> Run:
    """The world's stream through the model: with the online stage, unless ``meta.moves`` is off."""
    serving, meta, state = trained.serving(), settings.meta, settings.state
    limits = None if meta.moves == "off" else HistoryLimits(meta.histories.events, meta.histories.events_per_user)
    with (
        tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder,
        Processor(serving, rocks_stores(Path(folder), state), state, limits=limits, rebase=meta.rebase) as processor,
    ):
        if meta.moves == "off":
            seconds, said = _timed(partial(processor.process, PARTITION), trained.world.batches)
            return _run(trained.world, said, serving, seconds, None)
        online = EmbeddedMeta(
            trained.artifact, trained.offline, serving, processor, settings, trained.world.users, partition=PARTITION
        )
        with unalarmed(), online:
            seconds, said = _timed(online.process, trained.world.batches)
            return _run(trained.world, said, online.current, seconds, online.result())


def frozen(trained: Trained, settings: Settings) -> Run:
    """The stream without the online stage."""
    return stream(trained, varied(settings, {"meta.moves": "off"}))


def varied(settings: Settings, changes: Mapping[str, object]) -> Settings:
    """The settings with some of them changed, each named as in the file: ``meta.gate.enabled``."""
    given: dict[str, Any] = settings.model_dump()
    for name, value in changes.items():
        *path, key = name.split(".")
        section = given
        for part in path:
            section = section[part]
        section[key] = value
    return Settings.model_validate(given)


def lift(beside: Run, said: Run) -> PairedDifference:
    """AUC of the second over the first, of the same stream's scored events; with an interval over users."""
    at, events = said.scored, said.events
    return paired_difference(
        events.label[at], beside.probability[at], said.probability[at], events.user[at], bootstrap_samples=SAMPLES
    )


def figures(
    case: str, runs: Sequence[Measured], goals: Mapping[tuple[str, str], Goal], options: Options
) -> Iterator[Figure]:
    """One for each name, with its value in every run."""
    for key in runs[0]:
        name, unit = key
        goal = goals.get(key)
        target = None if goal is None else options.target(goal.value)
        yield Figure(case, name, tuple(found[key] for found in runs), unit, target, goal is not None and goal.at_most)


@contextmanager
def unalarmed() -> Iterator[None]:
    """Alarms are not logged: what was decided is in the run's result, and here rejections are what is wanted."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


def _timed(
    process: Callable[[Interactions], Predictions], batches: Sequence[Interactions]
) -> tuple[float, list[Probability]]:
    start = time.perf_counter()
    said = [process(batch).probability for batch in batches]
    return time.perf_counter() - start, said


def _run(
    world: World, said: Sequence[Probability], model: ServingModel, seconds: float, meta: MetaResult | None
) -> Run:
    events = Interactions.concatenate(world.batches)
    return Run(events, np.concatenate(said), world.counts(events), model, seconds, meta)
