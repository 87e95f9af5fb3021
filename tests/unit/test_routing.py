"""The router's pure part: who goes where, in which order, with which bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from streams.kafka.chunk import Chunk
from streams.kafka.partitioning import partition_of
from streams.kafka.record_batch import EncodedBatch, read_chunks
from streams.live.routing import SOURCE_HEADER, route
from tests.batches import PARTITION, TOPIC, Record, aiokafka_reading, batch


def chunk_of(records: list[Record], first_offset: int = 0) -> Chunk:
    (chunk,) = read_chunks(batch(records, first_offset), TOPIC, PARTITION, first_offset)
    return chunk


def received(batches: list[EncodedBatch]) -> list[tuple[bytes, bytes, int, list[tuple[str, bytes]]]]:
    base, data = 0, b""
    for one in batches:
        data += struct.pack(">q", base) + bytes(one.data[8:])
        base += one.count
    return [(r.key, r.value, r.timestamp, list(r.headers)) for r in aiokafka_reading(data)]


def test_every_good_event_goes_to_its_users_partition_in_order() -> None:
    rng = np.random.default_rng(3)
    ids = (*(f"user {k}" for k in range(40)), "Zoë", "")
    records = [Record(None, b"%d" % k, 1_000 + k) for k in range(500)]
    good = np.sort(rng.choice(500, 450, replace=False))
    user = rng.integers(0, len(ids), 450).astype(np.int32)
    routed = route(chunk_of(records), ids, user, good, 7)
    expected: dict[int, list[tuple[bytes, bytes, int]]] = {}
    for who, record in zip(user, good, strict=True):
        key = ids[who].encode()
        expected.setdefault(partition_of(key, 7), []).append((key, b"%d" % record, 1_000 + record))
    assert {p: [row[:3] for row in received(batches)] for p, batches in routed.items()} == expected
    assert list(routed) == sorted(expected)


@pytest.mark.parametrize("offset", [0, 9, 10, 12_345, (1 << 55) - 1])
def test_headers_are_kept_and_the_source_is_added(offset: int) -> None:
    kept = [("trace", b"\x00\xff"), ("none", None), ("trace", b"")]
    records = [Record(b"other key", b"v", headers=tuple(kept)), Record(b"k", None)]
    chunk = chunk_of(records, offset)
    (batches,) = route(chunk, ("anna",), np.zeros(2, np.int32), np.arange(2), 1).values()
    first, second = received(batches)
    assert first == (b"anna", b"v", records[0].timestamp, [*kept, (SOURCE_HEADER, f"{TOPIC}/3/{offset}".encode())])
    assert second[:2] == (b"anna", None)
    assert second[3] == [(SOURCE_HEADER, f"{TOPIC}/3/{offset + 1}".encode())]


def test_many_headers_are_kept() -> None:
    many = tuple((f"header {k}", b"%d" % k) for k in range(63))
    (batches,) = route(
        chunk_of([Record(value=b"v", headers=many)]), ("a",), np.zeros(1, np.int32), np.arange(1), 1
    ).values()
    assert received(batches)[0][3] == [*many, (SOURCE_HEADER, b"events/3/0")]


def test_batches_stay_within_their_bound() -> None:
    records = [Record(value=bytes(100)) for _ in range(50)]
    (batches,) = route(chunk_of(records), ("anna",), np.zeros(50, np.int32), np.arange(50), 1, max_bytes=1_000).values()
    assert len(batches) > 5
    assert all(len(one.data) <= 1_000 for one in batches)
    assert len(received(batches)) == 50


def test_no_good_event_makes_no_batch() -> None:
    chunk = chunk_of([Record(value=b"poison")])
    assert route(chunk, (), np.zeros(0, np.int32), np.zeros(0, np.int64), 4) == {}
