"""Copies of the partitions that others own, kept up to date from the changelog: taking one over is then quick."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar, cast

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from state.exceptions import StoreError
from state.outbox import standing
from state.store import RocksUserStore
from state.takeover import follow
from streams.kafka.chunk import Chunk
from streams.live.recovery import Recovery
from streams.live.topic_reader import Stopped, TopicReader, records_of
from streams.live.watch import Watch

log = structlog.get_logger("coldstream")
Result = TypeVar("Result")

POLL_MS = 500
"""How long one look at the changelog waits for something new"""
AGAIN_S = 5.0
"""Before a copy that cannot be kept now is tried again: its owner may have to tell something first"""


class Standby:
    """Follows every partition that ``held`` denies. ``run`` is its task; ``release`` gives a copy to its new owner."""

    def __init__(
        self,
        recovery: Recovery,
        changelog: TopicReader,
        partitions: int,
        held: Callable[[int], bool],
        watch: Watch,
        executor: Executor,
    ) -> None:
        self._recovery = recovery
        self._changelog = changelog
        self._partitions = partitions
        self._held = held
        self._watch = watch
        self._executor = executor
        self._copies: dict[int, RocksUserStore] = {}
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        """One for each partition: held while somebody works on its copy"""
        self._not_before: dict[int, float] = {}
        self._changed = False
        """A copy was opened or closed: where the consumer reads no longer fits"""
        self._stopped = threading.Event()

    async def run(self) -> None:
        """Follows until it is cancelled; then the copies are closed."""
        try:
            while True:
                try:
                    await self._follow_all()
                except (KafkaError, TimeoutError) as error:
                    log.warning("the changelog cannot be followed now", error=repr(error))
                    await asyncio.sleep(AGAIN_S)
        finally:
            self._stopped.set()
            for partition in list(self._copies):
                await asyncio.shield(self.release(partition))

    async def release(self, partition: int) -> None:
        """Closes the copy, if there is one: from now on it is its owner's to open."""
        async with self._locks[partition]:
            await self._close(partition)

    async def _follow_all(self) -> None:
        consumer = await self._changelog.consumer()
        try:
            while True:
                await self._choose(consumer)
                polled = await consumer.getmany(timeout_ms=POLL_MS) if self._copies else await _nothing()
                for tp, chunks in polled.items():
                    await self._follow(tp.partition, chunks, consumer.highwater(tp) or 0)
        finally:
            await consumer.stop()

    async def _choose(self, consumer: AIOKafkaConsumer) -> None:
        """Opens the copies that are missing, and reads on where each stands."""
        for partition in range(self._partitions):
            now = time.monotonic()
            if (
                not self._held(partition)
                and partition not in self._copies
                and now >= self._not_before.get(partition, 0)
            ):
                await self._open(partition)
        wanted = {TopicPartition(self._changelog.topic, partition) for partition in self._copies}
        if not self._changed and wanted == consumer.assignment():
            return
        self._changed = False
        consumer.assign(sorted(wanted))
        for tp in wanted:
            stands = standing(self._copies[tp.partition])
            assert stands is not None, "a copy was brought together with its changelog"
            consumer.seek(tp, stands.position)

    async def _open(self, partition: int) -> None:
        async with self._locks[partition]:
            if self._held(partition):
                return
            try:
                copy = await self._in_thread(lambda: self._recovery.recovered(partition, self._stopped))
            except (StoreError, Stopped, ValueError) as error:
                log.info("no copy is kept for now", partition=partition, reason=str(error))
                self._not_before[partition] = time.monotonic() + AGAIN_S
                return
            self._copies[partition], self._changed = copy, True
            self._watch.metrics.follows(partition, 0)

    async def _follow(self, partition: int, chunks: Sequence[Chunk], end: int) -> None:
        async with self._locks[partition]:
            copy = self._copies.get(partition)
            if copy is None:
                return  # its new owner has it
            try:
                await self._in_thread(lambda: self._apply(copy, chunks))
            except StoreError as error:
                log.warning("a copy is made anew", partition=partition, reason=str(error))
                self._not_before[partition] = time.monotonic() + AGAIN_S
                await self._close(partition)
                return
            self._watch.metrics.follows(partition, max(end - chunks[-1].next_offset, 0))

    def _apply(self, copy: RocksUserStore, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            follow(
                copy, list(records_of(iter([chunk]))), chunk.next_offset, known_at_ms=int(chunk.timestamp_ms[-1]),
                now_ms=time.time_ns() // 1_000_000, tombstone_retention_ms=self._recovery.tombstone_retention_ms,
            )  # fmt: skip

    async def _close(self, partition: int) -> None:
        copy = self._copies.pop(partition, None)
        if copy is not None:
            self._changed = True
            self._watch.metrics.unfollowed(partition)
            await self._in_thread(copy.close)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        """Cancelled, it waits for the work's end: the thread may ask the loop, and the copy is closed after it."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._stopped.set()
            await asyncio.wait({future})
            if not future.cancelled() and future.exception() is None and isinstance(future.result(), RocksUserStore):
                await asyncio.get_running_loop().run_in_executor(self._executor, cast(Any, future.result()).close)
            raise


async def _nothing() -> dict[TopicPartition, list[Chunk]]:
    await asyncio.sleep(POLL_MS / 1000)
    return {}
