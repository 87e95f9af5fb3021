"""Chunks in place of records from aiokafka's consumer, for chosen topics of one consumer.

aiokafka keeps what it fetched by partition in ``Fetcher._records``, each as a ``FetchResult`` around an iterator of
records. Here that iterator is exchanged for one of chunks, made of the very bytes that the broker sent, when the result
is put there. Positions, seeking, pausing, rebalances and errors stay aiokafka's. Nothing global is changed.

The private parts it leans on are pinned by ``tests/integration/test_raw_fetch.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Set
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult
from aiokafka.errors import CorruptRecordException
from aiokafka.protocol.fetch import FetchRequest

from streams.kafka.batch_header import MAGIC
from streams.kafka.batch_reading import CorruptBatch, oldest_magic, read_chunks
from streams.kafka.chunk import Chunk


def fetch_chunks(consumer: AIOKafkaConsumer, topics: Set[str]) -> None:
    """From now on ``getmany`` and ``getone`` return ``Chunk`` for these topics, and records for all others.

    A chunk counts as one record for ``max_records``, and is most often all that a fetch brought of a partition
    (``max_partition_fetch_bytes``); the position moves by whole chunks. No chunk is empty. Aborted transactions are
    left out of ``read_committed``.

    Raises:
        RuntimeError: the consumer has been started already.
        ValueError: the consumer has deserializers; a chunk holds the bytes as they were sent.
    """
    if consumer._fetcher is not None:
        raise RuntimeError("fetch_chunks comes before the consumer's start(): a fetch may be on its way")
    if consumer._key_deserializer is not None or consumer._value_deserializer is not None:
        raise ValueError("a consumer of chunks has no key_deserializer and no value_deserializer: leave them out")
    consumer._client.send = _Tap(consumer, frozenset(topics)).send


class _Tap:
    """Sits on a consumer's client, and keeps what a fetch brought until the fetcher has sorted it, in the same step."""

    def __init__(self, consumer: AIOKafkaConsumer, topics: Set[str]) -> None:
        self._consumer = consumer
        self._topics = topics
        self._send = consumer._client.send
        self._fetched: dict[TopicPartition, bytes] = {}

    async def send(self, node_id: Any, request: Any, **options: Any) -> Any:
        response = await self._send(node_id, request, **options)
        if isinstance(request, FetchRequest):
            # The fetcher's records may have been used for errors before the first fetch.
            fetcher = self._consumer._fetcher
            if not isinstance(fetcher._records, _Results):
                fetcher._records = _Results(self, fetcher._records)
            self._fetched = {
                TopicPartition(topic, partition): fields[-1]
                for topic, partitions in response.topics
                if topic in self._topics
                for partition, *fields in partitions
            }
        return response

    def exchange(self, tp: TopicPartition, result: Any) -> None:
        """Lets a fetch's result give chunks, if the topic is one of ours."""
        if type(result) is FetchResult and tp.topic in self._topics:
            result._partition_records = ChunkRecords(result._partition_records, self._fetched.pop(tp))


class _Results(OrderedDict[TopicPartition, Any]):
    """The fetcher's results by partition."""

    def __init__(self, tap: _Tap, before: OrderedDict[TopicPartition, Any]) -> None:
        self._tap = tap
        super().__init__(before)

    def __setitem__(self, tp: TopicPartition, result: Any) -> None:
        self._tap.exchange(tp, result)
        super().__setitem__(tp, result)


class ChunkRecords:
    """What ``FetchResult`` takes for an iterator of records."""

    def __init__(self, records: Any, fetched: bytes) -> None:
        """``records``: aiokafka's ``PartitionRecords`` of the same bytes, of which nothing was read yet."""
        self.next_fetch_offset: int = records.next_fetch_offset
        self._chunks = _old_chunks(records) if oldest_magic(fetched) < MAGIC else _chunks(records, fetched)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        for chunk in self._chunks:
            self.next_fetch_offset = chunk.next_offset
            if len(chunk):
                return chunk
        raise StopIteration


def _chunks(records: Any, fetched: bytes) -> Iterator[Chunk]:
    tp = records._tp
    aborted = records._aborted_transactions if records._isolation_level == READ_COMMITTED else None
    wanted, check = records.next_fetch_offset, records._check_crcs
    try:
        yield from read_chunks(fetched, tp.topic, tp.partition, wanted, check_crc=check, aborted=aborted)
    except CorruptBatch as error:
        raise CorruptRecordException(str(error)) from error


def _old_chunks(records: Any) -> Iterator[Chunk]:
    """Formats v0 and v1, which no broker has written since 0.11: through aiokafka's own records."""
    read = list(records)
    yield Chunk.of_records(records._tp.topic, records._tp.partition, read, records.next_fetch_offset)
