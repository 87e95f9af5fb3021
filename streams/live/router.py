"""The agent of a source whose producer did not key it by user: writes each event anew, keyed by user.

One chunk is one transaction: the events on the other topic, and the group's offset on the source. So an event is there
once for readers of committed records, whatever dies when. From there on, the order on that topic is the order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

import numpy as np
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, ProducerFenced
from faust.types import TP

from configs.settings import StreamSettings
from streams.decoding.decoded import Decoded
from streams.decoding.exceptions import RegistryUnavailable
from streams.kafka.chunk import Chunk
from streams.kafka.prebuilt import send_batch, transaction
from streams.kafka.record_batch import EncodedBatch
from streams.live.adaptation import RETRY_S, Decode
from streams.live.closing import Closable, Closing, stop
from streams.live.dead_letters import DeadLetters, PoisonWatch
from streams.live.metrics import Stage
from streams.live.routing import route
from streams.live.topic_reader import TopicReader
from streams.live.watch import Watch

NewProducer = Callable[[str], AIOKafkaProducer]
"""(transactional id) -> a producer that is not started"""
Started = Callable[[], Awaitable[AIOKafkaProducer]]
"""A started producer with the partition's transactional id: it fences off the one before."""
GroupOffset = Callable[[TP], Awaitable[int | None]]
"""What the group has committed of a partition; None: nothing yet."""
CommittedOffset = Callable[[], Awaitable[int | None]]
"""What the group has committed of the partition; None: nothing yet."""


class RoutedPartition(Closable):
    """An open partition of the source: ``ownership.Opened``."""

    def __init__(
        self,
        tp: TP,
        next_offset: int,
        producer: AIOKafkaProducer,
        new_producer: Started,
        committed: CommittedOffset,
        poison: PoisonWatch,
    ) -> None:
        super().__init__()
        self.name = f"{tp.topic}/{tp.partition}"
        self.tp = tp
        self.next_offset = next_offset
        self.producer = producer
        self.poison = poison
        self._new_producer = new_producer
        self._committed = committed
        self._fenced = asyncio.Event()

    async def run(self) -> None:
        """See ``ownership.Opened``."""
        await self._fenced.wait()
        raise ProducerFenced

    def fenced(self) -> None:
        """Somebody else has opened the partition."""
        self._fenced.set()

    def committable(self) -> int | None:
        """Nothing: the transactions commit the group's offset."""
        return None

    async def begin_anew(self) -> None:
        """After a failed transaction: aborts it, and sees whether it was committed after all. Raises KafkaError."""
        await stop(self.producer)
        self.producer = await self._new_producer()
        committed = await self._committed()
        self.next_offset = self.next_offset if committed is None else max(committed, self.next_offset)

    async def flush(self, flush_s: float) -> None:
        """Every step ends with its transaction."""

    async def close(self) -> None:
        """See ``ownership.Opened``."""
        await stop(self.producer)


class RouterOpener:
    """Opens partitions of the source for the router."""

    def __init__(
        self,
        stream: StreamSettings,
        new_producer: NewProducer,
        source: TopicReader,
        group_offset: GroupOffset,
        poison_share: float,
    ) -> None:
        self._stream = stream
        self._new_producer = new_producer
        self._source = source
        self._group_offset = group_offset
        self._poison_share = poison_share

    async def open(self, partition: int) -> RoutedPartition:
        """Fences off whoever routed the partition before. Raises KafkaError."""
        tp = TP(self._stream.topic, partition)

        async def started() -> AIOKafkaProducer:
            producer = self._new_producer(f"{self._stream.group}-router-{self._stream.topic}-{partition}")
            try:
                await producer.start()
            except BaseException:
                await stop(producer)
                raise
            return producer

        async def committed() -> int | None:
            return await self._group_offset(tp)

        producer = await started()
        try:
            offset, span = await committed(), await self._source.span(partition)
            first = span.start if self._stream.start == "earliest" else span.end
            begin = first if offset is None else max(offset, span.start)
            return RoutedPartition(tp, begin, producer, started, committed, PoisonWatch(self._poison_share))
        except BaseException:
            await stop(producer)
            raise


class Router:
    """Routes chunks. ``topic`` has ``partitions`` partitions; ``decoding`` does the work that is no waiting."""

    def __init__(
        self,
        topic: str,
        partitions: int,
        group: str,
        decode: Decode,
        dead_letters: DeadLetters,
        watch: Watch,
        decoding: Executor,
    ) -> None:
        self._topic = topic
        self._partitions = partitions
        self._group = group
        self._decode = decode
        self._dead_letters = dead_letters
        self._watch = watch
        self._decoding = decoding

    async def apply(self, opened: RoutedPartition, chunk: Chunk, end: int) -> None:
        """Routes a chunk's events; on return they are committed. Raises ProducerFenced, Closing."""
        failed = False
        while opened.next_offset < chunk.next_offset:
            if opened.closing.is_set():
                raise Closing
            try:
                if failed:
                    await opened.begin_anew()
                    failed = False
                await self._once(opened, _rest(chunk, opened.next_offset))
            except ProducerFenced:
                opened.fenced()
                raise
            except RegistryUnavailable as error:
                self._watch.router_waits(opened.name, Stage.DECODE, error)
                await opened.unless_closing(asyncio.sleep(RETRY_S))
            except (KafkaError, TimeoutError) as error:
                failed = True
                self._watch.router_waits(opened.name, Stage.PUBLISH, error)
                await opened.unless_closing(asyncio.sleep(RETRY_S))

    async def _once(self, opened: RoutedPartition, chunk: Chunk) -> None:
        loop = asyncio.get_running_loop()
        decoded, batches = await loop.run_in_executor(self._decoding, self._routed, chunk)
        if decoded.poison:
            await opened.unless_closing(self._dead_letters.send(chunk, decoded.poison))
            self._watch.set_aside(poison.reason for poison in decoded.poison)
            await opened.unless_closing(asyncio.sleep(opened.poison.delay_s()))
        await self._transaction(opened, chunk, batches)
        opened.next_offset = chunk.next_offset
        opened.poison.seen(len(chunk), len(decoded.poison))
        self._watch.router_poison(opened.name, opened.poison.red)

    def _routed(self, chunk: Chunk) -> tuple[Decoded, dict[int, list[EncodedBatch]]]:
        decoded = self._decode(chunk)
        good = np.searchsorted(chunk.offset, decoded.events.offset)
        events = decoded.events
        return decoded, route(chunk, events.user_ids, events.user, good, self._partitions)

    async def _transaction(self, opened: RoutedPartition, chunk: Chunk, batches: dict[int, list[EncodedBatch]]) -> None:
        producer = opened.producer
        async with transaction(producer):
            sent = [
                await send_batch(producer, batch, self._topic, target)
                for target, ready in batches.items()
                for batch in ready
            ]
            await asyncio.gather(*sent)
            await producer.send_offsets_to_transaction({TopicPartition(*opened.tp): chunk.next_offset}, self._group)


def _rest(chunk: Chunk, offset: int) -> Chunk:
    """The chunk's records from this offset on; another router may have committed those before."""
    first = int(np.searchsorted(chunk.offset, offset))
    return chunk if first == 0 else chunk.part(first, len(chunk))
