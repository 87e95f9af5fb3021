"""Record batches made by aiokafka's own builder, to hold ours against; and the reading of them by aiokafka."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, READ_UNCOMMITTED, PartitionRecords
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c

from streams.kafka.chunk import Chunk

TOPIC, PARTITION = "events", 3
APPEND_TIME, CONTROL = 0x08, 0x20


@dataclass(frozen=True)
class Record:
    key: bytes | None = None
    value: bytes | None = None
    timestamp: int = 1_700_000_000_000
    headers: tuple[tuple[str, bytes | None], ...] = ()


def batch(
    records: Sequence[Record],
    base_offset: int = 0,
    *,
    deltas: Sequence[int] | None = None,
    codec: int = 0,
    producer: int = -1,
    transactional: bool = False,
    flags: int = 0,
    last_delta: int | None = None,
) -> bytes:
    """One batch; ``deltas`` are the records' offsets above the first, with gaps as compaction leaves them."""
    builder = DefaultRecordBatchBuilder(2, codec, int(transactional), producer, 0, 0, 1 << 30)
    for delta, record in zip(deltas or range(len(records)), records, strict=True):
        headers = list(record.headers)
        builder.append(delta, record.timestamp, record.key, record.value, headers)
    data = bytearray(builder.build())
    struct.pack_into(">q", data, 0, base_offset)
    (attributes,) = struct.unpack_from(">h", data, 21)
    struct.pack_into(">h", data, 21, attributes | flags)
    if last_delta is not None:
        struct.pack_into(">i", data, 23, last_delta)
    return resealed(data)


def mark(base_offset: int, producer: int, commit: bool) -> bytes:
    """The end of a transaction."""
    key = struct.pack(">hh", 0, int(commit))
    value = struct.pack(">hi", 0, 0)
    return batch([Record(key, value)], base_offset, producer=producer, transactional=True, flags=CONTROL)


def packed(payload: bytes, count: int, codec: int, base_offset: int = 0) -> bytes:
    """A batch that says ``payload`` is its ``count`` records, compressed."""
    data = bytearray(batch([Record(value=b"")], base_offset, last_delta=count - 1)[:61] + payload)
    struct.pack_into(">h", data, 21, codec)
    struct.pack_into(">i", data, 57, count)
    struct.pack_into(">i", data, 8, len(data) - 12)
    return resealed(data)


def resealed(data: bytes | bytearray) -> bytes:
    """One batch with the checksum of what it holds."""
    sealed = bytearray(data)
    struct.pack_into(">I", sealed, 17, calc_crc32c(bytes(sealed[21:])))
    return bytes(sealed)


def aiokafka_reading(
    fetched: bytes, wanted: int = 0, aborted: Sequence[tuple[int, int]] | None = None, check_crc: bool = True
) -> PartitionRecords:
    """aiokafka's iterator of the same bytes."""
    isolation = READ_UNCOMMITTED if aborted is None else READ_COMMITTED
    tp = TopicPartition(TOPIC, PARTITION)
    return PartitionRecords(tp, MemoryRecords(fetched), aborted, wanted, None, None, check_crc, isolation)


def contents(chunk: Chunk) -> list[tuple[Any, ...]]:
    """Everything that a chunk's records hold, after a look that no span leaves the buffer."""
    for start, length in ((chunk.key_start, chunk.key_length), (chunk.value_start, chunk.value_length)):
        assert np.all(start >= 0)
        assert np.all(length >= -1)
        assert np.all(start + length <= len(chunk.data))
    assert np.all(np.diff(chunk.offset) > 0)
    assert not len(chunk) or chunk.next_offset > chunk.offset[-1]
    return [
        (int(chunk.offset[k]), int(chunk.timestamp_ms[k]), chunk.key(k), chunk.value(k), chunk.headers(k))
        for k in range(len(chunk))
    ]
