"""Chunks from a real broker against aiokafka's records, finished batches through its producers, and what we lean on."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aiokafka
import cramjam
import kafka
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.producer.message_accumulator import BatchBuilder, MessageBatch
from aiokafka.producer.transaction_manager import TransactionManager
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from streams.kafka import raw_fetch
from streams.kafka.chunk import Chunk, encode_headers
from streams.kafka.prebuilt import PrebuiltBatch, send_batch
from streams.kafka.raw_fetch import ChunkRecords, fetch_chunks
from streams.kafka.record_batch import EncodedBatch, encode_batches
from tests.batches import Record, aiokafka_reading, batch, contents, packed

PATIENCE_S = 30.0
CODECS = (None, "gzip", "snappy", "lz4", "zstd")
HEADERS = [("empty", b""), ("none", None), ("Zürich", b"\xff\x00")]
Row = tuple[int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]


@asynccontextmanager
async def topic(bootstrap: str, partitions: int = 1, **configs: str) -> AsyncIterator[str]:
    name = f"raw-fetch-{secrets.token_hex(6)}"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, partitions, 1, topic_configs=configs)])
        yield name
        await admin.delete_topics([name])
    finally:
        await admin.close()


@asynccontextmanager
async def producing(bootstrap: str, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, **options)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


@asynccontextmanager
async def consuming(
    bootstrap: str, chunks_of: set[str] | None = None, **options: Any
) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", **options)
    if chunks_of:
        fetch_chunks(consumer, chunks_of)
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def until_end(consumer: AIOKafkaConsumer, tp: TopicPartition, start: int = 0) -> list[Any]:
    """Everything that one partition holds, as the consumer hands it out."""
    consumer.assign([tp])
    consumer.seek(tp, start)
    end = (await consumer.end_offsets([tp]))[tp]
    found: list[Any] = []
    deadline = time.monotonic() + PATIENCE_S
    while await consumer.position(tp) < end:
        assert time.monotonic() < deadline, f"at {await consumer.position(tp)} of {end}"
        found += (await consumer.getmany(tp, timeout_ms=200)).get(tp, [])
    return found


async def both(bootstrap: str, name: str, start: int = 0, **options: Any) -> tuple[list[Row], list[Row]]:
    """A partition's rows by chunks and by records."""
    tp = TopicPartition(name, 0)
    async with consuming(bootstrap, {name}, **options) as consumer:
        chunks = await until_end(consumer, tp, start)
    async with consuming(bootstrap, **options) as consumer:
        records = await until_end(consumer, tp, start)
    assert all(type(chunk) is Chunk and len(chunk) for chunk in chunks)
    assert all(chunk.next_offset <= int(after.offset[0]) for chunk, after in itertools.pairwise(chunks))
    assert not any(chunk.unreadable for chunk in chunks)
    return [row for chunk in chunks for row in contents(chunk)], rows_of(records)


def rows_of(records: list[Any]) -> list[Row]:
    return [(r.offset, r.timestamp, r.key, r.value, list(r.headers)) for r in records]


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 2 * PATIENCE_S))


async def send_variety(producer: AIOKafkaProducer, name: str) -> None:
    for k in range(60):
        key, value = b"user %d" % (k % 5), b'{"n": %d}' % k * 5
        await producer.send(name, value, key, 0, timestamp_ms=1_700_000_000_000 + k, headers=HEADERS if k % 3 else None)
    await producer.send(name, b"", None, 0)
    await producer.send(name, None, b"tombstone", 0)
    await producer.send(name, b"v", b"", 0)
    await producer.flush()


@pytest.mark.parametrize("isolation", ["read_uncommitted", "read_committed"])
def test_chunks_and_records_agree_on_a_topic_of_everything(kafka_bootstrap: str, isolation: str) -> None:
    async def test() -> None:
        async with topic(kafka_bootstrap) as name:
            for codec in CODECS:
                async with producing(kafka_bootstrap, compression_type=codec, linger_ms=20) as producer:
                    await send_variety(producer, name)
            ids = [f"raw-fetch-{secrets.token_hex(4)}" for _ in range(2)]
            async with (
                producing(kafka_bootstrap, transactional_id=ids[0]) as one,
                producing(kafka_bootstrap, transactional_id=ids[1]) as two,
            ):
                for commits in ((True, False), (False, True), (False, False)):
                    for producer in (one, two):
                        await producer.begin_transaction()
                        await send_variety(producer, name)
                    for producer, commit in zip((one, two), commits, strict=True):
                        await (producer.commit_transaction() if commit else producer.abort_transaction())
            ours, theirs = await both(kafka_bootstrap, name, isolation_level=isolation)
            assert ours == theirs
            assert len(ours) == 63 * (5 + (2 if isolation == "read_committed" else 6))

    run(test)


def test_chunks_and_records_agree_from_the_middle_of_a_batch_and_behind_deleted_records(kafka_bootstrap: str) -> None:
    async def test() -> None:
        async with topic(kafka_bootstrap) as name:
            async with producing(kafka_bootstrap, compression_type="lz4", linger_ms=20) as producer:
                await send_variety(producer, name)
            ours, theirs = await both(kafka_bootstrap, name, start=17)
            assert ours == theirs
            assert ours[0][0] == 17
            admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
            await admin.start()
            await admin.delete_records({TopicPartition(name, 0): RecordsToDelete(before_offset=30)})
            await admin.close()
            ours, theirs = await both(kafka_bootstrap, name)
            assert ours == theirs
            assert ours[0][0] == 30

    run(test)


def test_chunks_have_the_brokers_time_where_the_topic_says_so(kafka_bootstrap: str) -> None:
    async def test() -> None:
        async with topic(kafka_bootstrap, **{"message.timestamp.type": "LogAppendTime"}) as name:
            async with producing(kafka_bootstrap, linger_ms=20) as producer:
                await send_variety(producer, name)
            ours, theirs = await both(kafka_bootstrap, name)
            assert ours == theirs
            assert ours[0][1] > 1_700_000_001_000

    run(test)


def test_chunks_and_records_agree_on_a_compacted_topic(kafka_bootstrap: str) -> None:
    """Compaction leaves gaps inside batches, and batches without records."""
    configs = {
        "cleanup.policy": "compact",
        "segment.bytes": str(1 << 20),
        "segment.ms": "100",
        "min.cleanable.dirty.ratio": "0.001",
    }

    async def test() -> None:
        async with topic(kafka_bootstrap, **configs) as name, producing(kafka_bootstrap, linger_ms=20) as producer:
            deadline = time.monotonic() + 2 * PATIENCE_S
            sent, kept = 0, 0
            while kept == sent:
                assert time.monotonic() < deadline, "the broker compacted nothing"
                for k in range(50):
                    await producer.send(name, b"%d" % k, b"user %d" % (k % 7 if k % 2 else k), 0)
                await producer.flush()
                sent += 50
                await asyncio.sleep(1)  # between two looks; the broker's cleaner wakes up every 15 s
                ours, theirs = await both(kafka_bootstrap, name)
                assert ours == theirs
                kept = len(ours)
            assert ours[-1][0] == sent - 1

    asyncio.run(asyncio.wait_for(test(), 4 * PATIENCE_S))


def test_other_topics_stay_as_they_are_and_chunks_count_as_one(kafka_bootstrap: str) -> None:
    async def test() -> None:
        async with topic(kafka_bootstrap) as raw, topic(kafka_bootstrap) as plain:
            async with producing(kafka_bootstrap) as producer:
                for name in (raw, plain):
                    for _ in range(3):
                        await producer.send(name, b"v", b"k", 0)
                    await producer.flush()
            group = f"raw-fetch-{secrets.token_hex(4)}"
            consumer = AIOKafkaConsumer(
                raw, plain, bootstrap_servers=kafka_bootstrap, group_id=group, auto_offset_reset="earliest"
            )
            fetch_chunks(consumer, {raw})
            await consumer.start()
            try:
                one = [await consumer.getone(TopicPartition(plain, 0)) for _ in range(3)]
                assert [type(r) for r in one] == [aiokafka.ConsumerRecord] * 3
                first = await consumer.getone(TopicPartition(raw, 0))
                assert type(first) is Chunk
                await consumer.seek_to_beginning()
                seen: dict[str, int] = {raw: 0, plain: 0}
                while sum(seen.values()) < 6:
                    for tp, found in (await consumer.getmany(timeout_ms=500, max_records=1)).items():
                        assert len(found) == 1
                        seen[tp.topic] += len(found[0]) if tp.topic == raw else 1
                assert seen == {raw: 3, plain: 3}
                assert await consumer.position(TopicPartition(raw, 0)) == 3
                await consumer.commit()
                assert await consumer.committed(TopicPartition(raw, 0)) == 3
            finally:
                await consumer.stop()
        assert fetcher.PartitionRecords.__module__ == "aiokafka.consumer.fetcher"

    run(test)


def test_a_bomb_is_one_unreadable_record_and_the_stream_goes_on(kafka_bootstrap: str) -> None:
    """The broker takes it: it measures batches as they are sent."""

    async def test() -> None:
        content = batch([Record(value=bytes(40 << 20))])[61:]
        bomb = packed(bytes(cramjam.zstd.compress(content)), 1, 4)
        async with topic(kafka_bootstrap) as name, producing(kafka_bootstrap) as producer:
            await producer.send_and_wait(name, b"before", b"k", 0)
            await (await send_batch(producer, EncodedBatch(bytearray(bomb), 1), name, 0))
            await producer.send_and_wait(name, b"after", b"k", 0)
            async with consuming(kafka_bootstrap, {name}) as consumer:
                chunks = await until_end(consumer, TopicPartition(name, 0))
        rows = [(row[0], row[3]) for chunk in chunks for row in contents(chunk)]
        assert [offset for offset, _ in rows] == [0, 1, 2]
        assert (rows[0][1], rows[2][1]) == (b"before", b"after")
        ((unreadable,),) = [chunk.unreadable for chunk in chunks if chunk.unreadable]
        assert unreadable.reason == "zstd: more than 33554432 bytes"
        assert rows[1][1] is not None
        assert rows[1][1][61:] == bomb[61:]

    run(test)


@pytest.mark.parametrize("kind", ["plain", "idempotent", "transactional"])
def test_finished_batches_go_through_every_kind_of_producer(kafka_bootstrap: str, kind: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "idempotent": {"enable_idempotence": True},
        "transactional": {"transactional_id": f"raw-fetch-{secrets.token_hex(4)}"},
    }
    keys: list[bytes | None] = [None if k == 7 else b"user %d" % k for k in range(100)]
    values: list[bytes | None] = [None if k == 9 else b"row" * k for k in range(100)]
    headers = [encode_headers([("k", b"%d" % k)]) for k in range(100)]

    async def test() -> None:
        async with (
            topic(kafka_bootstrap, partitions=2) as name,
            producing(kafka_bootstrap, **options[kind]) as producer,
        ):
            for kept in (True, False, True):
                if kind == "transactional":
                    await producer.begin_transaction()
                elif not kept:
                    continue
                batches = encode_batches(keys, values, timestamp_ms=1_700_000_000_123, headers=headers, max_bytes=2_000)
                assert len(batches) > 5
                sent = [await send_batch(producer, one, name, 1) for one in batches]
                single = await producer.send(name, b"single", b"k", 1, timestamp_ms=5)
                acknowledged = [(await future).offset for future in sent]
                assert acknowledged == sorted(acknowledged)
                await single
                if kind == "transactional":
                    await (producer.commit_transaction() if kept else producer.abort_transaction())
            once = [*zip(keys, values, strict=True), (b"k", b"single")]
            tp = TopicPartition(name, 1)
            async with consuming(kafka_bootstrap, isolation_level="read_committed") as consumer:
                records = await until_end(consumer, tp)
            assert [(r.key, r.value) for r in records] == once * 2
            assert records[3].headers == (("k", b"3"),)
            assert {r.timestamp for r in records} == {1_700_000_000_123, 5}
            async with consuming(kafka_bootstrap, {name}, isolation_level="read_committed") as consumer:
                chunks = await until_end(consumer, tp)
            assert [row for chunk in chunks for row in contents(chunk)] == rows_of(records)
            assert await asyncio.to_thread(read_by_kafka_python, kafka_bootstrap, name, 202) == once * 2

    run(test)


def read_by_kafka_python(bootstrap: str, name: str, count: int) -> list[tuple[bytes | None, bytes | None]]:
    consumer = kafka.KafkaConsumer(
        bootstrap_servers=bootstrap, isolation_level="read_committed", enable_auto_commit=False, group_id=None
    )
    try:
        tp = kafka.TopicPartition(name, 1)
        consumer.assign([tp])
        consumer.seek(tp, 0)
        found: list[tuple[bytes | None, bytes | None]] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < count:
            assert time.monotonic() < deadline
            found += [(r.key, r.value) for r in consumer.poll(timeout_ms=200).get(tp, [])]
        return found
    finally:
        consumer.close()


def test_a_consumer_that_has_started_or_deserializes_is_refused(kafka_bootstrap: str) -> None:
    async def test() -> None:
        async with topic(kafka_bootstrap) as name, consuming(kafka_bootstrap) as consumer:
            assert await until_end(consumer, TopicPartition(name, 0)) == []
            with pytest.raises(RuntimeError, match="before the consumer's start"):
                fetch_chunks(consumer, {name})
        consumer = AIOKafkaConsumer(bootstrap_servers=kafka_bootstrap, value_deserializer=str)
        with pytest.raises(ValueError, match="leave them out"):
            fetch_chunks(consumer, {"a"})
        await consumer.stop()

    run(test)


def test_old_formats_come_through_aiokafkas_records() -> None:
    builder = LegacyRecordBatchBuilder(1, 0, 1 << 20)
    for k in range(3):
        builder.append(k, 1_000 + k, b"key", b"value %d" % k)
    old = bytes(builder.build())
    chunks = list(ChunkRecords(aiokafka_reading(old), old))
    assert [row[:4] for chunk in chunks for row in contents(chunk)] == [
        (k, 1_000 + k, b"key", b"value %d" % k) for k in range(3)
    ]
    assert chunks[-1].next_offset == 3


def test_damage_is_aiokafkas_error() -> None:
    damaged = bytearray(batch([Record(b"k", b"v")]))
    damaged[-2] ^= 1
    with pytest.raises(CorruptRecordException, match="events/3: a batch from offset 0 on is damaged"):
        next(ChunkRecords(aiokafka_reading(bytes(damaged)), bytes(damaged)))
    read = ChunkRecords(aiokafka_reading(bytes(damaged), check_crc=False), bytes(damaged))
    assert len(next(read)) == 1


# What follows pins the private parts of aiokafka that raw_fetch and prebuilt lean on.


def source(thing: Any) -> str:
    return inspect.getsource(thing)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_fetcher_is_what_raw_fetch_leans_on() -> None:
    process = source(fetcher.Fetcher._proc_fetch_request)
    after = process[process.index("response = await self._client.send(node_id, request)") :]
    assert "self._records[tp] = FetchResult(" in after
    assert "MemoryRecords(part_data[-1])" in after
    # Between the response and its results, only the error's way waits: no other fetch can come between.
    assert after.count("await ") == 2
    assert "await asyncio.sleep(self._retry_backoff)\n            return False" in after
    assert "self._records = collections.OrderedDict()" in source(fetcher.Fetcher.__init__)
    assert source(fetcher.Fetcher).count("self._records = ") == 1
    assert "type(res_or_error) is FetchResult" in source(fetcher.Fetcher.fetched_records)
    assert parameters(fetcher.PartitionRecords) == [
        "tp",
        "records",
        "aborted_transactions",
        "fetch_offset",
        "key_deserializer",
        "value_deserializer",
        "check_crcs",
        "isolation_level",
    ]
    records = fetcher.PartitionRecords(TopicPartition("t", 0), MemoryRecords(b""), [(1, 5)], 3, None, None, True, 1)
    assert (records._tp, records._aborted_transactions, records._check_crcs) == (("t", 0), [(1, 5)], True)
    assert (records._isolation_level, records.next_fetch_offset) == (fetcher.READ_COMMITTED, 3)


def test_fetch_results_are_what_raw_fetch_leans_on() -> None:
    used = "".join(source(getattr(fetcher.FetchResult, name)) for name in ("getone", "getall", "check_assignment"))
    assert "next(self._partition_records, None)" in used
    assert "for msg in self._partition_records:" in used
    assert "self._partition_records.next_fetch_offset" in used
    assert parameters(fetcher.FetchResult) == ["tp", "assignment", "partition_records", "backoff"]
    assert parameters(AIOKafkaClient.send) == ["self", "node_id", "request", "group"]
    start = source(AIOKafkaConsumer.start)
    assert "self._fetcher = Fetcher(\n            self._client," in start
    assert "self._fetcher = None" in source(AIOKafkaConsumer.__init__)
    assert issubclass(raw_fetch._Results, OrderedDict)


def test_batch_builders_are_what_prebuilt_leans_on() -> None:
    needed = {name for name in vars(BatchBuilder) if callable(getattr(BatchBuilder, name)) and name != "__init__"}
    assert needed - {"_serialize"} == {n for n in vars(PrebuiltBatch) if callable(getattr(PrebuiltBatch, n))} - {
        "__init__"
    }
    assert parameters(BatchBuilder._set_producer_state) == ["self", "producer_id", "producer_epoch", "base_sequence"]
    used = source(MessageBatch)
    for call in ("record_count()", "append(", "closed()", "_set_producer_state(", "_build()"):
        assert f"self._builder.{call}" in used
    assert parameters(AIOKafkaProducer.send_batch) == ["self", "batch", "topic", "partition"]
    assert "transactional_id" in parameters(TransactionManager)
    assert "self._txn_manager = " in source(AIOKafkaProducer.__init__)
    assert "self._transaction_waiter" in source(TransactionManager.wait_for_transaction_end)
    assert "raise IllegalOperation" in source(AIOKafkaProducer.send_batch)
