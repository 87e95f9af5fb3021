"""A worker: a process that takes part in the stream until it is told to stop, or cannot go on.

brokers ─► transport ─► agent ─► decode ─► adapt and commit ─► outbox ─► publisher ─► changelog, predictions
                                   └─► dead letters
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, cast

import structlog
from aiokafka import AIOKafkaProducer

from configs.settings import Settings, StreamSettings
from learner.artifact import Artifact, read_artifact
from learner.serving import ServingModel
from learner.user_state import RowLayout
from state.outbox import CommitLog
from state.reading.model_view import write_model_view
from state.store import UserStore
from streams.catalogues import load_catalogues
from streams.decoding.decoded import Decoder
from streams.decoding.decoder import decoder_of
from streams.kafka.connection import Connection
from streams.kafka.record_batch import warm_up
from streams.kafka.topics import FoundTopic, ensure_topics, specs_of
from streams.live.adaptation import AdaptationAgent
from streams.live.app import WorkerApp, build_app, consumer_options
from streams.live.dead_letters import DeadLetters
from streams.live.exceptions import WorkerError
from streams.live.health import Health
from streams.live.health_server import HealthServer
from streams.live.intake import Apply, Intake
from streams.live.loop_monitor import LoopMonitor
from streams.live.metrics import WorkerMetrics
from streams.live.opening import Opener
from streams.live.ownership import Open, Ownership
from streams.live.recovery import Recovery
from streams.live.router import Router, RouterOpener
from streams.live.topic_reader import TopicReader
from streams.live.watch import Watch
from streams.processor import Processor

log = structlog.get_logger("coldstream")

RESTORE_THREADS = 2
"""Partitions that are opened side by side"""


TRANSACTION_TIMEOUT_MS = 600_000
"""Then the brokers abort an open transaction. Long, since the next owner aborts it at once anyway, and an outage of the
brokers would else look like another owner"""


class _Role(NamedTuple):
    """What is done with a topic's partitions."""

    open: Open
    apply: Apply


class Worker:
    """One worker. Call ``run`` once."""

    def __init__(self, settings: Settings, model: Path) -> None:
        self._settings = settings
        self._connection = Connection.of(settings.kafka)
        artifact = read_artifact(model)
        self._model = _serving(settings, artifact)
        self._watch = Watch(
            WorkerMetrics(metadata.version("coldstream"), artifact.fingerprint),
            Health(settings.worker, time.monotonic),
        )
        self._end = asyncio.Event()
        self._failure: BaseException | None = None

    async def run(self) -> None:
        """Works until SIGTERM or SIGINT, or raises what cannot be mended here."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._end.set)
        worker, watch = self._settings.worker, self._watch
        health = HealthServer(watch.health, watch.metrics.registry, worker.metrics_host, worker.metrics_port)
        with health, ThreadPoolExecutor(1, "adapt") as adapting, ThreadPoolExecutor(RESTORE_THREADS) as restoring:
            log.info("metrics and health", host=worker.metrics_host, port=health.port)
            async with LoopMonitor(watch.metrics, watch.health.beat):
                await self._work(adapting, restoring)
        if self._failure is not None:
            raise self._failure

    def fail(self, error: BaseException) -> None:
        """Ends the worker: nothing but a new start, and mostly somebody's hand, helps."""
        if self._failure is None and not self._end.is_set():
            self._failure = error
            self._watch.failed(None, error)
        self._end.set()

    async def _work(self, adapting: Executor, restoring: Executor) -> None:
        settings, stream = self._settings, self._settings.stream
        topics = await ensure_topics(
            self._connection, specs_of(stream), create=stream.topics.create, replication=stream.topics.replication
        )
        warm = asyncio.get_running_loop().run_in_executor(adapting, self._warmed_up)
        async with self._dead_letters(topics[stream.topics.dead_letters]) as letters:
            processor, decoder = await warm
            roles = self._roles(topics, processor, decoder, letters, adapting, restoring)
            owned = Ownership(
                {topic: role.open for topic, role in roles.items()}, consumer_options(settings, self._connection),
                self._watch, self.fail, reopen_s=settings.kafka.session_timeout_ms / 1000,
            )  # fmt: skip
            intake = Intake(owned, {topic: role.apply for topic, role in roles.items()}, self.fail)
            with tempfile.TemporaryDirectory(prefix="coldstream-faust-") as scratch:
                app = build_app(settings, self._connection, owned, dict.fromkeys(roles, intake.take), Path(scratch))
                intake.consumer = owned.consumer = self._consumer = app.batches
                await self._take_part(app, owned)

    def _warmed_up(self) -> tuple[Processor, Decoder]:
        """What is compiled, or loaded from the cache on disk, before the first event."""
        state = self._settings.state
        if state.directory is None:
            raise WorkerError("state.directory is not set: name where this worker keeps its users' rows (--state)")
        processor = Processor(self._model, no_store, state, log=self._outbox_of)
        write_model_view(state.directory, self._model, processor.layout, state.expire_after_days)
        warm_up()
        return processor, self._new_decoder()

    def _outbox_of(self, partition: int, store: UserStore) -> CommitLog:
        return self._opener.outbox_of(partition, store)

    def _roles(
        self,
        topics: Mapping[str, FoundTopic],
        processor: Processor,
        decoder: Decoder,
        letters: DeadLetters,
        adapting: Executor,
        restoring: Executor,
    ) -> dict[str, _Role]:
        """By topic; the one whose events are adapted is the first."""
        stream, options = self._settings.stream, self._connection.aiokafka()
        changelog = topics[stream.topics.changelog]
        recovery = Recovery(
            self._settings.state, processor.layout, TopicReader(changelog.name, options),
            changelog.delete_retention_ms, asyncio.get_running_loop(),
        )  # fmt: skip
        adapted = adapted_topic(stream)
        self._opener = Opener(
            stream, recovery, TopicReader(adapted, options), self._new_decoder if self._events_have_ids else None,
            processor, self._new_producer, self._watch, adapting, restoring,
            poison_share=self._settings.worker.poison_share,
        )  # fmt: skip
        agent = AdaptationAgent(
            processor, decoder.decode, letters, self._watch, adapting,
            tell_predictions=stream.topics.predictions is not None,
        )  # fmt: skip
        roles = {adapted: _Role(self._opener.open, agent.apply)}
        if not stream.keyed_by_user:
            partitions = topics[adapted].partitions
            router = Router(adapted, partitions, stream.group, decoder.decode, letters, self._watch, adapting)
            opener = RouterOpener(
                stream,
                self._new_producer,
                TopicReader(stream.topic, options),
                lambda tp: self._consumer.group_offset(tp),
            )
            roles[stream.topic] = _Role(opener.open, router.apply)
        return roles

    @property
    def _events_have_ids(self) -> bool:
        return self._settings.data.events.event_id is not None

    def _new_decoder(self) -> Decoder:
        return decoder_of(self._settings.data.events, self._settings.stream)

    def _new_producer(self, transactional_id: str) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            **self._connection.aiokafka(), transactional_id=transactional_id, acks="all",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        )  # fmt: skip

    async def _take_part(self, app: WorkerApp, owned: Ownership) -> None:
        """Joins the group, and leaves it when the end has come."""
        app.on_partitions_revoked.connect(cast(Any, owned.on_revoked))
        app.on_partitions_assigned.connect(cast(Any, owned.on_assigned))
        await app.start()
        stopped = asyncio.create_task(app.wait_until_stopped())
        ended = asyncio.create_task(self._end.wait())
        lag = asyncio.create_task(owned.tell_lag())
        try:
            await asyncio.wait({stopped, ended, lag}, return_when=asyncio.FIRST_COMPLETED)
            if lag.done():
                self.fail(lag.exception() or WorkerError("the lag is told no more"))
            if app.crashed:
                self.fail(app.crash_reason or WorkerError("Faust ended by itself: see the log"))
            await self._leave(app, owned)
        finally:
            for task in (stopped, ended, lag):
                task.cancel()

    async def _leave(self, app: WorkerApp, owned: Ownership) -> None:
        began, bound = time.monotonic(), self._settings.worker.shutdown_s
        self._watch.health.stopping()
        log.info("stopping", within_s=bound)
        app.batches.stop_flow()
        try:
            async with asyncio.timeout(bound):
                await owned.close(bound / 2)
                await app.stop()
        except TimeoutError:
            log.error("could not stop in time; the next owner takes over from the outbox and the changelog")
        log.info("stopped", seconds=round(time.monotonic() - began, 3))

    @contextlib.asynccontextmanager
    async def _dead_letters(self, topic: FoundTopic) -> AsyncIterator[DeadLetters]:
        producer = AIOKafkaProducer(
            **self._connection.aiokafka(), acks="all", enable_idempotence=True, max_request_size=topic.max_message_bytes
        )
        await producer.start()
        try:
            yield DeadLetters(producer, topic.name, worker_name(self._settings), largest=topic.max_message_bytes)
        finally:
            await producer.stop()


def adapted_topic(stream: StreamSettings) -> str:
    """The topic whose events are applied: the source itself, where it is keyed by user."""
    return stream.topic if stream.keyed_by_user else stream.topics.events_by_user


def worker_name(settings: Settings) -> str:
    """Which worker this is, for people."""
    return settings.worker.instance or f"{socket.gethostname()}:{os.getpid()}"


def no_store(partition: int, layout: RowLayout) -> UserStore:
    """A worker's processor opens none: ``Opener`` hands them in."""
    raise RuntimeError(f"partition {partition} is not open")


def _serving(settings: Settings, artifact: Artifact) -> ServingModel:
    return artifact.serving(*load_catalogues(settings.data))
