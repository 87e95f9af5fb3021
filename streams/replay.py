"""A backtest: learn offline from past users, stream the new ones event by event, and score every prediction."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.settings import Settings, StateSettings
from learner.artifact import Artifact, library_versions, read_artifact, read_histories, write_artifact
from learner.baselines import run_baselines
from learner.features import Catalogue
from learner.interactions import Interactions
from learner.meta_training import EpochReport, meta_train
from learner.metrics import Metrics, evaluate, event_index
from learner.offline_histories import OfflineHistories
from learner.serving import ServingModel
from learner.user_state import RowLayout
from state.exceptions import StoreError
from state.histories import HistoryLimits
from state.reading.model_view import ONE, Versions, write_model_view
from state.rocksdb import MEBIBYTE, StoreMemory
from state.store import RocksUserStore
from state.syncing import SyncPolicy
from streams.data_notes import data_notes
from streams.meta.embedded import EmbeddedMeta
from streams.meta.result import FROZEN, MetaResult
from streams.ordering import OrderedEvents
from streams.processor import OpenStore, Predictions, Processor, row_parts
from streams.protocol import ProtocolError, Split, offline_events, online_batches, split_users
from streams.provenance import describe_machine
from streams.results import BacktestResult, Protocol, ScoredStream, Speed, StateSize
from streams.sources import EventSource, load_catalogues, open_source, time_ordered

PARTITION = 0
"""A backtest streams everything through one partition."""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What a caller may show while a run goes on; every hook is optional."""

    stage: Callable[[str], None] = lambda _: None
    """A new stage begins, in words."""
    epoch: Callable[[EpochReport], None] = lambda _: None
    """An epoch of the offline stage is done."""
    streamed: Callable[[int, int], None] = lambda _done, _total: None
    """(events streamed so far, all of them)"""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A source in time order, split, with its catalogues."""

    source: EventSource
    ordered: OrderedEvents
    split: Split
    users: Catalogue
    items: Catalogue
    notes: tuple[str, ...]
    """What a report on this data must state"""


@contextmanager
def prepared(settings: Settings, progress: RunProgress) -> Iterator[PreparedData]:
    """Reads, orders and splits the source; its spool lives as long as the context."""
    with ExitStack() as stack:
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coldstream-spool-")))
        progress.stage("reading events")
        source = open_source(settings.data)
        users, items = load_catalogues(settings.data)
        ordered = stack.enter_context(time_ordered(source, spool))
        protocol = settings.protocol
        split = split_users(ordered, protocol.offline_fraction, protocol.score_last)
        yield PreparedData(source, ordered, split, users, items, data_notes(settings.data, ordered))


def train_offline(
    data: PreparedData, settings: Settings, progress: RunProgress, checkpoints: Path | None = None
) -> Artifact:
    """The offline stage on the offline events of the protocol."""
    offline = offline_events(data.ordered, data.split)
    progress.stage(f"offline stage: {len(offline):,} events of {len(offline.user_ids):,} users")
    return meta_train(
        offline, data.users, data.items, settings.learner, settings.training,
        held_out=0.0 if settings.meta.moves == "off" else settings.meta.anchors.held_out, checkpoints=checkpoints,
        progress=progress.epoch,
    ).with_metrics(cut_time_ms=data.split.cut_time_ms)  # fmt: skip


@dataclass(slots=True)
class _Recorder:
    """Columns of the scored stream, under one dictionary for the whole run."""

    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    batches: list[Interactions] = field(default_factory=list)
    user: list[NDArray[np.int32]] = field(default_factory=list)
    item: list[NDArray[np.int32]] = field(default_factory=list)
    probability: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, batch: Interactions, probability: NDArray[np.float32]) -> None:
        self.user.append(_codes(self.users, batch.user_ids)[batch.user])
        self.item.append(_codes(self.items, batch.item_ids)[batch.item])
        self.batches.append(batch)
        self.probability.append(probability)

    def refuse_one_class(self, scored_users: frozenset[str]) -> None:
        """Raises ProtocolError when the events of ``scored_users`` have one label only: nothing can be ranked."""
        labels = np.concatenate([b.label for b in self.batches])[self._of(scored_users)]
        if labels.min() == labels.max():
            raise ProtocolError(
                f"all {len(labels):,} scored events have label {labels[0]}, so no ranking can be measured: lower "
                "protocol.offline_fraction or leave out protocol.score_last to score more users, or check the label "
                "rule (data.events.label)"
            )

    def _of(self, users: frozenset[str]) -> NDArray[np.bool_]:
        user = np.concatenate(self.user)
        return np.fromiter((u in users for u in self.users), np.bool_, len(self.users))[user]

    def scored(self, baselines: dict[str, NDArray[np.float32]], scored_users: frozenset[str]) -> ScoredStream:
        """The events of ``scored_users``; ``baselines`` has a prediction for every event."""
        user, keep = np.concatenate(self.user), self._of(scored_users)
        return ScoredStream(
            tuple(self.users),
            tuple(self.items),
            user[keep],
            np.concatenate(self.item)[keep],
            np.concatenate([b.event_time_ms for b in self.batches])[keep],
            np.concatenate([b.offset for b in self.batches])[keep],
            np.concatenate([b.label for b in self.batches])[keep],
            event_index(user)[keep],
            np.concatenate(self.probability)[keep],
            {name: p[keep] for name, p in baselines.items()},
        )


@dataclass(frozen=True, slots=True)
class _Streamed:
    """What streaming gave."""

    recorder: _Recorder
    seconds: float
    """Wall-clock"""
    state: StateSize
    meta: MetaResult | None


class Backtest:
    """One run of the protocol under given settings: ``Backtest(settings).run()``.

    ``model`` streams with a trained artifact in place of the offline stage. ``state`` keeps the users' rows in
    that directory, which must be new or empty; without it they live in a temporary one.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        baselines: bool = False,
        model: Path | None = None,
        save_model: Path | None = None,
        progress: RunProgress | None = None,
        command: tuple[str, ...] = (),
    ) -> None:
        self.settings = settings
        self.with_baselines = baselines
        self.model = model
        self.save_model = save_model
        self.progress = progress or RunProgress()
        self.command = command

    def run(self) -> BacktestResult:
        """Learns, streams and scores.

        Raises SourceError, ProtocolError, TrainingError, ArtifactError, StoreError: each says what to do.
        """
        self._refuse_used_directories()  # now, not after an hour of training
        with prepared(self.settings, self.progress) as data:
            artifact, offline = self._artifact(data)
            with temporary_directory(self.settings.state.directory, "state") as directory:
                streamed = self._streamed(data, artifact, offline, directory)
            recorder, scored_users = streamed.recorder, data.split.is_scored(data.ordered)
            recorder.refuse_one_class(scored_users)
            baselines = self._frozen(data, artifact, recorder) | self._baselines(data, recorder)
            return self._result(data, artifact, recorder.scored(baselines, scored_users), streamed)

    def _streamed(
        self, data: PreparedData, artifact: Artifact, offline: OfflineHistories | None, directory: Path
    ) -> _Streamed:
        """The stream, with the rows in ``directory``; with the online stage where there is what it replays."""
        settings, serving, recorder = self.settings, artifact.serving(data.users, data.items), _Recorder()
        limits = HistoryLimits(*settings.meta.histories.model_dump().values()) if offline is not None else None
        stores = rocks_stores(directory, settings.state)
        with Processor(serving, stores, settings.state, limits=limits, rebase=settings.meta.rebase) as stream:
            self._write_view(serving, stream.layout)
            if offline is None:
                seconds, meta = self._stream(data, partial(stream.process, PARTITION), recorder), None
                versions = ONE
            else:
                with EmbeddedMeta(
                    artifact, offline, serving, stream, settings, data.users, partition=PARTITION
                ) as online:
                    seconds = self._stream(data, online.process, recorder)
                    serving, meta, last = online.current, online.result(), online.serving
                versions = Versions(
                    settings.meta.rebase, online.newest, last.canary, last.canary_share, last.earlier
                )  # fmt: skip
            self._write_view(serving, stream.layout, versions)  # again: with the items that the stream brought
            parts = row_parts(stream.layout)
        return _Streamed(recorder, seconds, StateSize(len(recorder.users), sum(parts.values()), parts), meta)

    def _frozen(self, data: PreparedData, artifact: Artifact, recorder: _Recorder) -> dict[str, NDArray[np.float32]]:
        """Beside the online stage, what the same model does without it."""
        if self.settings.meta.moves == "off":
            return {}
        self.progress.stage("the same model, frozen")
        state = self.settings.state
        with (
            temporary_directory(None, "frozen") as directory,
            Processor(artifact.serving(data.users, data.items), rocks_stores(directory, state), state) as stream,
        ):
            said = [stream.process(PARTITION, batch).probability for batch in recorder.batches]
        return {FROZEN: np.concatenate(said)}

    def _write_view(self, serving: ServingModel, layout: RowLayout, versions: Versions = ONE) -> None:
        """Puts what a query needs of the model beside rows that are kept."""
        state = self.settings.state
        if state.directory is not None:
            write_model_view(state.directory, serving, layout, state.expire_after_days, versions)

    def _artifact(self, data: PreparedData) -> tuple[Artifact, OfflineHistories | None]:
        """The model, and what the online stage replays, if there is to be one."""
        if self.model is None:
            trained = train_offline(data, self.settings, self.progress)
            with temporary_directory(self.save_model, "model") as directory:
                write_artifact(directory, trained)
                artifact = read_artifact(directory)  # what is streamed is what was saved, to the bit
                offline = self._replayed(directory)
        else:
            artifact, offline = read_artifact(self.model), self._replayed(self.model)
            learned_until = artifact.metrics.get("cut_time_ms")
            if learned_until is None or learned_until > data.split.cut_time_ms:
                raise ProtocolError(
                    f"the model in {self.model} has learned from events up to {learned_until or 'the end'} ms, after "
                    f"this backtest's cut at {data.split.cut_time_ms} ms: its figures would be leaked from the "
                    "future; use the offline fraction it was trained with, or a larger one"
                )
        return artifact, offline

    def _replayed(self, directory: Path) -> OfflineHistories | None:
        return None if self.settings.meta.moves == "off" else read_histories(directory)

    def _refuse_used_directories(self) -> None:
        state, meta = self.settings.state.directory, self.settings.meta
        versions = None if meta.moves == "off" else meta.directory
        for directory, what in ((state, "state directory"), (versions, "directory of versions")):
            if directory is not None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                raise StoreError(
                    f"the {what} {directory} is not empty: a backtest starts with no users and one version, and "
                    "earlier ones may be in there; give a new directory"
                )

    def _stream(self, data: PreparedData, process: Callable[[Interactions], Predictions], recorder: _Recorder) -> float:
        """Streams the online events to durable rows; returns the wall-clock seconds it took."""
        total = data.ordered.events
        self.progress.stage("streaming new users")
        start = time.perf_counter()
        for batch in online_batches(data.ordered, data.split):
            predictions = process(batch)
            recorder.add(batch, predictions.probability)
            self.progress.streamed(int(batch.offset[-1]) + 1, total)
        return time.perf_counter() - start

    def _baselines(self, data: PreparedData, recorder: _Recorder) -> dict[str, NDArray[np.float32]]:
        if not self.with_baselines:
            return {}
        self.progress.stage("baselines")
        online = Interactions.concatenate(recorder.batches)
        offline = offline_events(data.ordered, data.split)
        seed = self.settings.training.seed
        return run_baselines(offline, online, data.users, data.items, seed=seed, progress=self.progress.stage)

    def _metrics(self, scored: ScoredStream, probability: NDArray[np.float32]) -> Metrics:
        samples = self.settings.protocol.bootstrap_samples
        return evaluate(scored.label, probability, scored.user, scored.index, bootstrap_samples=samples)

    def _result(
        self,
        data: PreparedData,
        artifact: Artifact,
        scored: ScoredStream,
        streamed: _Streamed,
    ) -> BacktestResult:
        self.progress.stage("scoring")
        recorder = streamed.recorder
        events = sum(len(batch) for batch in recorder.batches)
        trained = artifact.metrics
        return BacktestResult(
            protocol=Protocol(
                trained["offline_events"], trained["offline_users"], events, len(recorder.users),
                data.split.cut_time_ms,
            ),
            metrics=self._metrics(scored, scored.probability),
            baselines={name: self._metrics(scored, p) for name, p in scored.baselines.items()},
            speed=Speed(trained["train_s"], events / streamed.seconds),
            state=streamed.state,
            versions={**library_versions(), "artifact": artifact.fingerprint},
            settings=self.settings.model_copy(update={"learner": artifact.learner, "training": artifact.training}),
            scored=scored,
            command=self.command,
            rejects={str(r): n for r, n in data.source.rejects.by_reason.most_common()},
            notes=(*data.notes, *self._model_note(artifact), *self._scoring_note(scored, events)),
            training_loss=tuple(trained["train_log_loss"]),
            machine=describe_machine(),
            meta=streamed.meta,
        )  # fmt: skip

    def _model_note(self, artifact: Artifact) -> tuple[str, ...]:
        if self.model is None or artifact.learner == self.settings.learner:
            return ()
        return (f"The learner's settings are those of the model in {self.model}; the ones given here were not used.",)

    def _scoring_note(self, scored: ScoredStream, events: int) -> tuple[str, ...]:
        if len(scored) == events:
            return ()
        users = len(np.unique(scored.user))
        return (
            f"Scored are {len(scored):,} events of the {users:,} users of the last "
            f"{self.settings.protocol.score_last:.0%}; {events:,} events were streamed.",
        )


def _codes(known: dict[str, int], ids: tuple[str, ...]) -> NDArray[np.int32]:
    return np.fromiter((known.setdefault(i, len(known)) for i in ids), np.int32, len(ids))


@contextmanager
def temporary_directory(kept: Path | None, purpose: str) -> Iterator[Path]:
    """``kept`` if it is given, else a directory that is removed at the end."""
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix=f"coldstream-{purpose}-") as directory:
        yield Path(directory)


def rocks_stores(directory: Path, state: StateSettings) -> OpenStore:
    """One RocksDB per partition under ``directory``, all of them in one process's memory limits."""
    memory = StoreMemory(state.block_cache_mb * MEBIBYTE, state.write_buffers_mb * MEBIBYTE)
    sync = SyncPolicy(state.sync.mode, state.sync.interval_ms)

    def open_store(partition: int, layout: RowLayout) -> RocksUserStore:
        return RocksUserStore(directory / f"partition-{partition}", layout, memory, sync)

    return open_store
