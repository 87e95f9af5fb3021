"""Our reading and writing of record batches against aiokafka's, on random and on damaged bytes."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.kafka.chunk import encode_headers
from streams.kafka.record_batch import CorruptBatch, encode_batches, read_chunks
from tests.batches import (
    APPEND_TIME,
    PARTITION,
    TOPIC,
    Record,
    aiokafka_reading,
    batch,
    contents,
    mark,
    resealed,
)

OPTIONAL = st.none() | st.binary(max_size=200)
HEADERS = st.lists(st.tuples(st.text(max_size=10), OPTIONAL), max_size=3).map(tuple)
RECORDS = st.builds(Record, OPTIONAL, OPTIONAL, st.integers(0, 1 << 41), HEADERS)
PRODUCERS = (7, 8)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    """The bytes of a partition from offset 0 on, and its aborted transactions."""
    data, base, aborted = b"", 0, []
    begun: dict[int, int] = {}
    for _ in range(draw(st.integers(1, 6))):
        base += draw(st.sampled_from((0, 0, 3)))
        kept = draw(st.lists(st.tuples(RECORDS, st.integers(1, 3)), max_size=8))
        deltas = [sum(step for _, step in kept[: k + 1]) - 1 for k in range(len(kept))]
        last = (deltas[-1] if deltas else 0) + draw(st.sampled_from((0, 0, 2)))
        producer = draw(st.sampled_from((-1, *PRODUCERS)))
        if producer != -1:
            begun.setdefault(producer, base)
        data += batch(
            [record for record, _ in kept],
            base,
            deltas=deltas or None,
            codec=draw(st.integers(0, 4)) if kept else 0,
            producer=producer,
            transactional=producer != -1,
            flags=draw(st.sampled_from((0, 0, APPEND_TIME))),
            last_delta=last,
        )
        base += last + 1
        for ending in draw(st.sets(st.sampled_from(PRODUCERS))) & begun.keys():
            commit = draw(st.booleans())
            if not commit:
                aborted.append((ending, begun[ending]))
            del begun[ending]
            data += mark(base, ending, commit)
            base += 1
    return data, aborted


@given(partitions(), st.integers(0, 12), st.booleans())
def test_both_read_the_same_records(
    partition: tuple[bytes, list[tuple[int, int]]], wanted: int, committed: bool
) -> None:
    data, aborted = from_batch_with(partition[0], wanted), partition[1]
    theirs = aiokafka_reading(data, wanted, aborted if committed else None)
    expected = [(r.offset, r.timestamp, r.key, r.value, list(r.headers)) for r in theirs]
    chunks = list(read_chunks(data, TOPIC, PARTITION, wanted, aborted=aborted if committed else None))
    assert [row for chunk in chunks for row in contents(chunk)] == expected
    assert not any(chunk.unreadable for chunk in chunks)
    assert (chunks[-1].next_offset if chunks else wanted) == theirs.next_fetch_offset


@given(partitions(), st.data())
def test_damaged_bytes_are_refused_or_read_right(
    partition: tuple[bytes, list[tuple[int, int]]], data: st.DataObject
) -> None:
    """With a checksum that fits the damage, as a hostile producer's would."""
    fetched = bytearray(partition[0])
    for _ in range(data.draw(st.integers(1, 4))):
        fetched[data.draw(st.integers(0, len(fetched) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = bytes(fetched[: data.draw(st.sampled_from((len(fetched), data.draw(st.integers(0, len(fetched))))))])
    check_crc = data.draw(st.booleans())
    if data.draw(st.booleans()):
        damaged = all_resealed(damaged)
    try:
        chunks = list(read_chunks(damaged, TOPIC, PARTITION, 0, check_crc=check_crc))
    except CorruptBatch:
        return
    rows = [row for chunk in chunks for row in contents(chunk)]
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})
    if any(chunk.unreadable for chunk in chunks):
        return
    theirs = []
    with contextlib.suppress(Exception):  # whatever it raises, and it raises much: what it read before must be ours
        for r in aiokafka_reading(damaged, check_crc=check_crc):
            theirs.append((r.offset, r.timestamp, r.key, r.value, list(r.headers)))
    assert rows[: len(theirs)] == theirs[: len(rows)]


@pytest.mark.parametrize("codec", [0, 1, 2, 3, 4])
def test_every_flipped_bit_of_a_batch_is_refused_or_read_right(codec: int) -> None:
    records = [Record(b"key", b"value" * 20, 1_000 + k, (("name", b"x"),)) for k in range(4)]
    before = batch(records)
    sound = batch(records, 4, codec=codec)
    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped = before + (resealed(damaged) if len(damaged) >= 61 else bytes(damaged))
        chunks = list(read_chunks(flipped, TOPIC, PARTITION, 0))
        rows = [row for chunk in chunks for row in contents(chunk)]
        assert [row[3] for row in rows[:4]] == [r.value for r in records]
        unsealed = [row for chunk in read_chunks(before + damaged, TOPIC, PARTITION, 0) for row in contents(chunk)]
        assert len(unsealed) == 4 or bit // 8 < 16  # offset, length and leader epoch are outside the checksum


@given(st.lists(RECORDS, max_size=20), st.integers(61, 1_000), st.integers(0, 1 << 41))
def test_aiokafka_reads_what_we_write(records: list[Record], max_bytes: int, timestamp_ms: int) -> None:
    batches = encode_batches(
        [r.key for r in records],
        [r.value for r in records],
        timestamp_ms=timestamp_ms,
        headers=[encode_headers(r.headers) for r in records],
        max_bytes=max_bytes,
    )
    data, base = b"", 0
    for one in batches:
        assert len(one.data) <= max_bytes or one.count == 1
        data += struct.pack(">q", base) + bytes(one.data[8:])
        base += one.count
    expected = [(k, timestamp_ms, r.key, r.value, list(r.headers)) for k, r in enumerate(records)]
    theirs = [(r.offset, r.timestamp, r.key, r.value, list(r.headers)) for r in aiokafka_reading(data)]
    assert theirs == expected
    assert [row for chunk in read_chunks(data, TOPIC, PARTITION, 0) for row in contents(chunk)] == expected


def from_batch_with(data: bytes, wanted: int) -> bytes:
    """What a broker sends: the batches from the first on that does not end before ``wanted``."""
    at = 0
    while at < len(data):
        base, length = struct.unpack_from(">qi", data, at)
        (last_delta,) = struct.unpack_from(">i", data, at + 23)
        if base + last_delta >= wanted:
            break
        at += 12 + length
    return data[at:]


def all_resealed(fetched: bytes) -> bytes:
    """Every batch whose length still makes sense, with a checksum that fits."""
    data, at = bytearray(fetched), 0
    while len(data) - at >= 61:
        stop = at + 12 + int.from_bytes(data[at + 8 : at + 12], "big", signed=True)
        if not at + 61 <= stop <= len(data):
            break
        data[at:stop] = resealed(data[at:stop])
        at = stop
    return bytes(data)
