"""Opens a partition whose events are adapted: fences off, restores, finds where the source goes on."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

import structlog
from aiokafka import AIOKafkaProducer

from configs.settings import StreamSettings
from state.exceptions import StoreError
from state.outbox import Outbox
from state.outbox_codec import SESSION_BYTES
from state.store import RocksUserStore, UserStore
from state.takeover import Marker
from streams.decoding.decoded import Decoder
from streams.live.adaptation import AdaptedPartition
from streams.live.closing import stop
from streams.live.dead_letters import PoisonWatch
from streams.live.duplicates import DuplicateWindow
from streams.live.exceptions import WorkerError
from streams.live.metrics import Stage
from streams.live.publisher import Publisher, Topics
from streams.live.recovery import Recovery
from streams.live.router import NewProducer
from streams.live.timed_outbox import TimedOutbox
from streams.live.topic_reader import TopicReader, on_loop
from streams.live.watch import Watch
from streams.processor import Processor

log = structlog.get_logger("coldstream")
Result = TypeVar("Result")


class Opener:
    """Opens partitions for the processor. ``adapting`` is its thread; ``restoring`` brings stores up to date."""

    def __init__(
        self,
        stream: StreamSettings,
        recovery: Recovery,
        source: TopicReader,
        decoder: Callable[[], Decoder] | None,
        processor: Processor,
        new_producer: NewProducer,
        watch: Watch,
        adapting: Executor,
        restoring: Executor,
        *,
        poison_share: float,
    ) -> None:
        """``decoder``: a new one, for the events that ``stream.duplicate_window`` covers; None: events have no ids."""
        self._stream = stream
        self._recovery = recovery
        self._source = source
        self._decoder = decoder
        self._processor = processor
        self._new_producer = new_producer
        self._watch = watch
        self._adapting = adapting
        self._restoring = restoring
        self._poison_share = poison_share
        self.release_copy: Callable[[int], Awaitable[None]] = _no_copy
        """Closes the partition's copy, where this worker keeps one"""
        self._sessions: dict[int, bytes] = {}
        self._outboxes: dict[int, Outbox] = {}

    def outbox_of(self, partition: int, store: UserStore) -> Outbox:
        """What the processor tells of its commits: ``processor.OpenLog``."""
        outbox = self._outboxes[partition] = TimedOutbox(store, self._sessions[partition], self._stored)
        return outbox

    def _stored(self, seconds: float) -> None:
        self._watch.metrics.took(Stage.STORE, seconds)

    async def open(self, partition: int) -> AdaptedPartition:
        """See the module; called off by cancelling it. Raises KafkaError, ColdstreamError."""
        producer = self._producer(partition)
        stopped = threading.Event()
        store = None
        try:
            await self.release_copy(partition)
            await producer.start()  # from here on, nobody else writes to the partition's changelog
            session = self._sessions[partition] = secrets.token_bytes(SESSION_BYTES)
            with self._watch.metrics.timed(Stage.RESTORE):
                store = await self._in_thread(stopped, lambda: self._recovered(partition, stopped, session))
            offset = await self._source_offset(partition, store)
            window = await self._in_thread(stopped, lambda: self._window(partition, offset, stopped))
            await self._in(self._adapting, lambda: self._processor.adopt(partition, store))
        except BaseException:
            if store is not None:
                await self._in(self._adapting, lambda: self._processor.release(partition))  # behind an adopt under way
                await self._in(self._restoring, store.close)
            await stop(producer)
            raise
        self._watch.opened(partition, offset)
        return self._opened(partition, offset, store, producer, window)

    def _opened(
        self,
        partition: int,
        offset: int,
        store: RocksUserStore,
        producer: AIOKafkaProducer,
        window: DuplicateWindow | None,
    ) -> AdaptedPartition:
        stopped = threading.Event()
        outbox = self._outboxes[partition]

        async def last_marker() -> tuple[Marker | None, int]:
            return await self._in_thread(stopped, lambda: self._recovery.marker(partition, store, stopped))

        async def release() -> None:
            await self._in(self._adapting, lambda: self._release(partition))

        publisher = Publisher(
            partition, outbox, store.layout, self._sessions[partition],
            Topics(self._stream.topics.changelog, self._stream.topics.predictions),
            lambda: self._producer(partition), producer, last_marker, self._watch,
        )  # fmt: skip
        poison = PoisonWatch(self._poison_share)
        return AdaptedPartition(partition, offset, outbox, publisher, window, poison, release)

    def _release(self, partition: int) -> None:
        outbox = self._outboxes.pop(partition)
        try:
            outbox.trim()
        except StoreError as error:
            log.warning("what was told stays in the outbox", partition=partition, error=str(error))
        finally:
            self._processor.release(partition)

    def _recovered(self, partition: int, stopped: threading.Event, session: bytes) -> RocksUserStore:
        def told(done: int, total: int) -> None:
            self._watch.restoring(partition, done, total)

        return self._recovery.recovered(partition, stopped, told, session=session)

    async def _source_offset(self, partition: int, store: RocksUserStore) -> int:
        """Where the stream goes on. Raises WorkerError where the source is not the one that the store knows."""
        progress, span = store.progress(), await self._source.span(partition)
        if progress is None or progress.offset < 0:
            return span.start if self._stream.start == "earliest" else span.end
        wanted = progress.offset + 1
        if wanted > span.end:
            raise WorkerError(
                f"partition {partition} of {self._source.topic} ends at offset {span.end}, before {wanted}, where its "
                "users' rows go on: was the topic made anew? Bring it back, or begin with another changelog topic and "
                "another state directory"
            )
        if wanted < span.start:
            self._watch.gap(partition, span.start - wanted)
        return max(wanted, span.start)

    def _window(self, partition: int, offset: int, stopped: threading.Event) -> DuplicateWindow | None:
        """The ids of the events before ``offset``, which are read again."""
        if self._decoder is None:
            return None
        window, decoder = DuplicateWindow(self._stream.duplicate_window), self._decoder()
        loop = self._recovery.loop
        start = max(offset - self._stream.duplicate_window, on_loop(loop, self._source.span(partition)).start)
        for chunk in self._source.chunks(partition, start, offset, loop, stopped.is_set):
            decoded = decoder.decode(chunk)
            if decoded.event_id is not None:
                window.duplicates(decoded.events.offset, decoded.event_id)
        return window

    def _producer(self, partition: int) -> AIOKafkaProducer:
        return self._new_producer(f"{self._stream.group}-{self._stream.topics.changelog}-{partition}")

    async def _in_thread(self, stopped: threading.Event, work: Callable[[], Result]) -> Result:
        """Work that ``stopped`` ends; cancelled, it waits for that end."""
        future = self._in(self._restoring, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stopped.set()
            await asyncio.wait({future})
            if not future.cancelled() and future.exception() is None:
                done = future.result()
                if isinstance(done, RocksUserStore):
                    done.close()
            raise

    def _in(self, executor: Executor, work: Callable[[], Result]) -> asyncio.Future[Result]:
        return asyncio.get_running_loop().run_in_executor(executor, work)


async def _no_copy(partition: int) -> None:
    """None is kept."""
