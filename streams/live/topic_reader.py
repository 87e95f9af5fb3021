"""Reads a stretch of a partition on the brokers: a changelog, to restore from it, or a source."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition

from state.changelog import Record
from streams.kafka.chunk import Chunk
from streams.kafka.raw_fetch import fetch_chunks

FETCH_BYTES = 4 << 20
"""Of one fetch: some 4,500 rows at d = 16"""
Result = TypeVar("Result")
POLL_MS = 200
"""How long one poll waits for records that are on their way"""


class Stopped(Exception):
    """A reading was called off."""


class Span(NamedTuple):
    """Which offsets the brokers hold of a partition."""

    start: int
    end: int
    """Behind the last record that is committed"""


class TopicReader:
    """Reads committed records only. Its consumers belong to no group, and live as long as one reading."""

    def __init__(self, topic: str, consumer_options: dict[str, Any]) -> None:
        self.topic = topic
        self._options = {
            **consumer_options,
            "group_id": None,
            "isolation_level": "read_committed",
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
            "max_partition_fetch_bytes": FETCH_BYTES,
        }

    async def span(self, partition: int) -> Span:
        """The offsets held. Raises KafkaError."""
        tp = TopicPartition(self.topic, partition)
        consumer = await self._started(partition)
        try:
            start = (await consumer.beginning_offsets([tp]))[tp]
            return Span(start, (await consumer.end_offsets([tp]))[tp])
        finally:
            await consumer.stop()

    def chunks(
        self, partition: int, start: int, end: int, loop: asyncio.AbstractEventLoop, stopped: Callable[[], bool]
    ) -> Iterator[Chunk]:
        """Everything from ``start`` until before ``end``, for a thread that is not the loop's.

        Raises KafkaError, and Stopped once ``stopped`` says so.
        """
        if start >= end:
            return
        tp = TopicPartition(self.topic, partition)
        consumer = on_loop(loop, self._started(partition, start))
        try:
            while on_loop(loop, consumer.position(tp)) < end:
                if stopped():
                    raise Stopped(f"reading {self.topic}/{partition} was called off")
                polled = on_loop(loop, consumer.getmany(tp, timeout_ms=POLL_MS))
                for chunk in polled.get(tp, ()):
                    inside = int(np.searchsorted(chunk.offset, end))
                    if inside == len(chunk):
                        yield chunk
                    else:
                        if inside:
                            yield chunk.part(0, inside)
                        return
        finally:
            on_loop(loop, consumer.stop())

    async def consumer(self) -> AIOKafkaConsumer:
        """One that reads chunks; nothing is assigned to it yet, and the caller stops it. Raises KafkaError."""
        consumer = AIOKafkaConsumer(**self._options)
        fetch_chunks(consumer, frozenset({self.topic}))
        try:
            await consumer.start()
        except BaseException:
            await consumer.stop()
            raise
        return consumer

    async def _started(self, partition: int, start: int | None = None) -> AIOKafkaConsumer:
        tp = TopicPartition(self.topic, partition)
        consumer = await self.consumer()
        consumer.assign([tp])
        if start is not None:
            consumer.seek(tp, start)
        return consumer


def records_of(chunks: Iterator[Chunk]) -> Iterator[Record]:
    """All records, as a restore takes them."""
    for chunk in chunks:
        for k in range(len(chunk)):
            yield Record(chunk.key(k) or b"", chunk.value(k))


def on_loop(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The coroutine's result, for a thread that is not the loop's."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()
