"""What a record costs on the wire's side of this process: read from a fetch, and written to be sent.

    KAFKA_BOOTSTRAP=HOST:PORT python -m benchmarks.wire [--case fetch] [--json]

Reading: events of 120 bytes in batches of 16 KB, a fetch of 1 MB at a time, checksums checked; against aiokafka's own
iterator over the same bytes. Writing: rows of 928 bytes; against aiokafka's batch builder. With a broker also both ways
through it; without ``KAFKA_BOOTSTRAP`` these cases are left out. CPU of this process, the best of some runs.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.consumer.fetcher import READ_UNCOMMITTED, PartitionRecords
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from benchmarks.command import Options, standalone
from benchmarks.report import Figure
from streams.kafka.batch_writing import Spans, encode_batches, encode_spans, warm_up
from streams.kafka.chunk import Chunk
from streams.kafka.compression import NAMES
from streams.kafka.prebuilt import send_batch
from streams.kafka.raw_fetch import fetch_chunks
from streams.kafka.record_batch import read_chunks
from streams.live.routing import route

EVENT_BYTES = 120
FETCH_EVENTS = 7_000
"""Some 1 MB, ``max_partition_fetch_bytes``"""
BATCH_BYTES = 16_384
PATIENCE_S = 60.0
"""For one reading of all events"""
ROW_BYTES = 928
ROWS = 16_000
LIVE_EVENTS = 200_000
REPEATS = 5
MORE_REPEATS = 20
"""Of what takes milliseconds"""
FETCH_TARGET_US, ENCODE_TARGET_US = 0.21, 1.4
"""Of the prototypes: a raw chunk's event through the fetcher, a changelog's row through the producer"""
EVENT = b'{"user_id": "%07d", "item_id": "%06d", "rating": 4, "timestamp": 1700000000}'
Timed = dict[str, float]
"""CPU seconds of each side"""


def run(options: Options) -> Iterator[Figure]:
    """µs a record of both sides, and how many times one is the other."""
    warm_up()
    for codec, name in enumerate(NAMES):
        if options.wants(case := f"fetch, codec {name}"):
            yield from _figures(case, _best(lambda c=codec: reading(c)), FETCH_EVENTS)  # type: ignore[misc]
    if options.wants("encode rows"):
        yield from _figures("encode rows", _best(writing), ROWS)
    if options.wants("route by user"):
        yield Figure("route by user", "ours", (1e6 * _best(routing)["ours"] / FETCH_EVENTS,), "µs")
    bootstrap = os.environ.get("KAFKA_BOOTSTRAP")
    if not bootstrap:
        options.progress("through a broker: left out, KAFKA_BOOTSTRAP is not set")
        return
    if options.wants(case := "through a broker"):
        events, rows = options.scaled(LIVE_EVENTS), options.scaled(ROWS)
        fetched, sent = asyncio.run(_through_broker(bootstrap, events, rows))
        yield from _figures(f"{case}: fetch", fetched, events, options.target(FETCH_TARGET_US))
        yield from _figures(f"{case}: send rows", sent, rows, options.target(ENCODE_TARGET_US))


def _figures(case: str, seconds: Timed, records: int, target: float | None = None) -> Iterator[Figure]:
    yield Figure(case, "ours", (1e6 * seconds["ours"] / records,), "µs", target, at_most=True)
    yield Figure(case, "aiokafka", (1e6 * seconds["aiokafka"] / records,), "µs")
    yield Figure(case, "ratio", (seconds["aiokafka"] / seconds["ours"],), "times")


def _best(measure: Callable[[], Timed]) -> Timed:
    runs = [measure() for _ in range(MORE_REPEATS)]
    return {side: min(run[side] for run in runs) for side in runs[0]}


def events(count: int) -> list[bytes]:
    """JSON events of 120 bytes; the users' ids are as many as there are events."""
    return [(EVENT % (k, k * 7 % 100_003)).ljust(EVENT_BYTES) for k in range(count)]


def fetch_of(codec: int) -> bytes:
    """What one fetch brings of a partition."""
    fetched, base = b"", 0
    values = events(FETCH_EVENTS)
    per_batch = BATCH_BYTES // EVENT_BYTES
    for first in range(0, len(values), per_batch):
        builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 1 << 30)
        for k, value in enumerate(values[first : first + per_batch]):
            builder.append(k, 1_700_000_000_000, b"%07d" % (first + k), value, [])
        fetched += struct.pack(">q", base) + bytes(builder.build()[8:])
        base += min(per_batch, len(values) - first)
    return fetched


def reading(codec: int) -> Timed:
    """Seconds for one fetch."""
    fetched = fetch_of(codec)
    tp = TopicPartition("events", 0)

    def by_aiokafka() -> None:
        records = PartitionRecords(tp, MemoryRecords(fetched), None, 0, None, None, True, READ_UNCOMMITTED)
        assert len(list(records)) == FETCH_EVENTS

    def by_us() -> None:
        assert sum(map(len, read_chunks(fetched, "events", 0, 0))) == FETCH_EVENTS

    return {"ours": _seconds(by_us), "aiokafka": _seconds(by_aiokafka)}


def writing() -> Timed:
    """Seconds for all rows."""
    keys, values = changelog(ROWS)

    def by_aiokafka() -> None:
        at = 0
        while at < len(keys):
            builder = BatchBuilder(900_000, 0)
            while at < len(keys) and builder.append(timestamp=0, key=keys[at], value=values[at]) is not None:
                at += 1
            builder._build()

    return {
        "ours": _seconds(lambda: encode_batches(keys, values, timestamp_ms=0)),
        "aiokafka": _seconds(by_aiokafka),
    }


def routing() -> Timed:
    """Seconds for one fetch of events, all of different users, to 12 partitions."""
    (chunk,) = read_chunks(fetch_of(0), "events", 0, 0)
    ids = tuple(f"{k:07d}" for k in range(len(chunk)))
    each = np.arange(len(chunk))
    return {"ours": _seconds(lambda: route(chunk, ids, each.astype(np.int32), each, 12))}


def changelog(rows: int) -> tuple[list[bytes], list[bytes]]:
    """Keys and rows, which do not compress."""
    rng = np.random.default_rng(0)
    return [b"%07d" % k for k in range(rows)], [rng.bytes(ROW_BYTES) for _ in range(rows)]


def now_ms() -> int:
    """Of what goes to a broker: it deletes what seems old, even while it is read."""
    return time.time_ns() // 1_000_000


def _seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


async def _through_broker(bootstrap: str, events_sent: int, rows: int) -> tuple[Timed, Timed]:
    """CPU seconds of fetching events, and of sending rows until they are acknowledged."""
    topic = f"benchmark-wire-{secrets.token_hex(6)}"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 2, 1)])
        await _send_events(bootstrap, topic, events_sent)
        fetched: Timed = {}
        for side in ("ours", "aiokafka"):
            runs = [await _fetching(bootstrap, topic, side == "ours", events_sent) for _ in range(REPEATS)]
            fetched[side] = min(runs)
        sent = {
            "ours": await _sending(bootstrap, topic, rows),
            "aiokafka": await _sending_one_by_one(bootstrap, topic, rows),
        }
        await admin.delete_topics([topic])
    finally:
        await admin.close()
    return fetched, sent


async def _send_events(bootstrap: str, topic: str, count: int) -> None:
    keys, values = Spans.of([b"%07d" % k for k in range(count)]), Spans.of(events(count))
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        batches = encode_spans(keys, values, np.full(count, now_ms()), max_bytes=BATCH_BYTES)
        for future in [await send_batch(producer, batch, topic, 0) for batch in batches]:
            await future


async def _fetching(bootstrap: str, topic: str, chunks: bool, count: int) -> float:
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    if chunks:
        fetch_chunks(consumer, {topic})
    await consumer.start()
    try:
        tp = TopicPartition(topic, 0)
        consumer.assign([tp])
        consumer.seek(tp, 0)
        deadline = time.monotonic() + PATIENCE_S
        start, seen = time.process_time(), 0
        while seen < count:
            assert time.monotonic() < deadline, f"{seen} of {count} events came in {PATIENCE_S} s"
            for found in (await consumer.getmany(tp, timeout_ms=1_000)).values():
                seen += sum(len(c) for c in found) if isinstance(found[0], Chunk) else len(found)
        return time.process_time() - start
    finally:
        await consumer.stop()


async def _sending(bootstrap: str, topic: str, rows: int) -> float:
    keys, values = changelog(rows)
    best = np.inf
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        for _ in range(REPEATS):
            start = time.process_time()
            batches = encode_batches(keys, values, timestamp_ms=now_ms())
            for future in [await send_batch(producer, batch, topic, 1) for batch in batches]:
                await future
            best = min(best, time.process_time() - start)
    return float(best)


async def _sending_one_by_one(bootstrap: str, topic: str, rows: int) -> float:
    keys, values = changelog(rows)
    best = np.inf
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, max_batch_size=900_000) as producer:
        for _ in range(REPEATS):
            start = time.process_time()
            futures = [await producer.send(topic, value, key, 1) for key, value in zip(keys, values, strict=True)]
            for future in futures:
                await future
            best = min(best, time.process_time() - start)
    return float(best)


if __name__ == "__main__":
    standalone("wire", run, __doc__)
