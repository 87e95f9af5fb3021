"""A worker: a process that takes part in the stream until it is told to stop, or cannot go on.

brokers ─► transport ─► agent ─► decode ─► adapt and commit ─► outbox ─► publisher ─► changelog, predictions
                                   └─► dead letters
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import structlog
from aiokafka import AIOKafkaProducer

from configs.settings import Settings
from learner.artifact import read_artifact
from streams.catalogues import load_catalogues
from streams.kafka.connection import Connection
from streams.kafka.reaching import reach
from streams.kafka.topics import FoundTopic, ensure_topics, specs_of
from streams.live.app import WorkerApp, build_app, consumer_options
from streams.live.assembly import Assembly, Threads, worker_name
from streams.live.closing import stop
from streams.live.dead_letters import DeadLetters
from streams.live.exceptions import WorkerError
from streams.live.health import Health
from streams.live.health_server import HealthServer
from streams.live.intake import Intake
from streams.live.logs import Secrets
from streams.live.loop_monitor import LoopMonitor
from streams.live.metrics import WorkerMetrics
from streams.live.ownership import Ownership
from streams.live.watch import Watch

log = structlog.get_logger("coldstream")

LAST_RESORT_S = 5.0
"""After ``worker.shutdown_s``: then the process ends, whatever still waits; nothing that was committed is lost by it"""
RESTORE_THREADS = 2
"""Partitions that are opened side by side"""


class Worker:
    """One worker. Call ``run`` once."""

    def __init__(self, settings: Settings, model: Path, secrets: Secrets) -> None:
        """``secrets``: told what no log may hold."""
        self._settings = settings
        self._connection = Connection.of(settings.kafka)
        if self._connection.password is not None:
            secrets.add(self._connection.password.reveal())
        artifact = read_artifact(model)
        self._model = artifact.serving(*load_catalogues(settings.data))
        self._watch = Watch(
            WorkerMetrics(metadata.version("coldstream"), artifact.fingerprint),
            Health(settings.worker, time.monotonic),
            settings.worker.stall_s,
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
        adapting, restoring = ThreadPoolExecutor(1, "adapt"), ThreadPoolExecutor(RESTORE_THREADS, "restore")
        with health:
            log.info("metrics and health", host=worker.metrics_host, port=health.port)
            try:
                async with LoopMonitor(watch.metrics, watch.health.beat):
                    await self._work(Threads(adapting, restoring))
            finally:
                for threads in (restoring, adapting):  # a thread may still ask the loop for something
                    await asyncio.to_thread(threads.shutdown)
        if self._failure is not None:
            raise self._failure

    def fail(self, error: BaseException) -> None:
        """Ends the worker: nothing but a new start, and mostly somebody's hand, helps."""
        if self._failure is None and not self._end.is_set():
            self._failure = error
            self._watch.failed(error)
        self._end.set()

    async def _work(self, threads: Threads) -> None:
        settings, stream = self._settings, self._settings.stream
        assembly = Assembly(settings, self._connection, self._model, self._watch, threads)
        warm = asyncio.get_running_loop().run_in_executor(threads.adapting, assembly.warm_up)
        await reach(self._connection)
        topics = await ensure_topics(
            self._connection, specs_of(stream), create=stream.topics.create, replication=stream.topics.replication
        )
        await warm
        async with self._dead_letters(topics[stream.topics.dead_letters]) as letters:
            roles = assembly.roles(topics, letters, lambda tp: app.batches.group_offset(tp))
            owned = Ownership(
                {topic: role.open for topic, role in roles.items()}, consumer_options(settings, self._connection),
                self._watch, self.fail, reopen_s=settings.kafka.session_timeout_ms / 1000,
            )  # fmt: skip
            intake = Intake(owned, {topic: role.apply for topic, role in roles.items()}, self.fail)
            side = [owned.tell_lag()]
            if settings.worker.standby:
                side.append(assembly.standby(topics[stream.topics.changelog], owned).run())
            with tempfile.TemporaryDirectory(prefix="coldstream-faust-") as scratch:
                app = build_app(settings, self._connection, owned, dict.fromkeys(roles, intake.take), Path(scratch))
                intake.consumer = owned.consumer = app.batches
                async with self._beside(*side):
                    await self._take_part(app, owned)

    async def _take_part(self, app: WorkerApp, owned: Ownership) -> None:
        """Joins the group, and leaves it when the end has come."""
        app.on_partitions_revoked.connect(cast(Any, owned.on_revoked))
        app.on_partitions_assigned.connect(cast(Any, owned.on_assigned))
        await app.start()
        stopped = asyncio.create_task(app.wait_until_stopped())
        ended = asyncio.create_task(self._end.wait())
        try:
            await asyncio.wait({stopped, ended}, return_when=asyncio.FIRST_COMPLETED)
            if app.crashed:
                self.fail(app.crash_reason or WorkerError("Faust ended by itself: see the log"))
            await self._leave(app, owned)
        finally:
            stopped.cancel()
            ended.cancel()

    async def _leave(self, app: WorkerApp, owned: Ownership) -> None:
        began, bound = time.monotonic(), self._settings.worker.shutdown_s
        self._watch.health.stopping()
        log.info("stopping", within_s=bound)
        _end_at_the_latest(bound + LAST_RESORT_S)
        app.batches.stop_flow()
        for part, share in ((owned.close(bound / 2), 0.7), (app.stop(), 0.3)):
            try:
                await asyncio.wait_for(part, bound * share)
            except TimeoutError:
                log.error("could not stop in time; the next owner takes over from the outbox and the changelog")
            except Exception as error:
                self._failure = self._failure or error
        log.info("stopped", seconds=round(time.monotonic() - began, 3))

    @contextlib.asynccontextmanager
    async def _beside(self, *work: Any) -> AsyncIterator[None]:
        """Tasks that run until the body ends; one that ends before has failed."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                self.fail(task.exception() or WorkerError(f"{task.get_name()} has ended by itself"))

        tasks = [asyncio.create_task(one, name=one.__qualname__) for one in work]
        for task in tasks:
            task.add_done_callback(ended)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _dead_letters(self, topic: FoundTopic) -> AsyncIterator[DeadLetters]:
        producer = AIOKafkaProducer(
            **self._connection.aiokafka(), acks="all", enable_idempotence=True, max_request_size=topic.max_message_bytes
        )
        await producer.start()
        try:
            yield DeadLetters(producer, topic.name, worker_name(self._settings), largest=topic.max_message_bytes)
        finally:
            await stop(producer)


def _end_at_the_latest(seconds: float) -> None:
    def end() -> None:
        log.critical("the process ends now, though something still waits", after_s=seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
