"""The header of a record batch, format v2 (magic 2), and what a producer puts into it last.

Big-endian, 61 bytes, then the records:

    at   size  field                    at   size  field
     0    i64  base offset              27    i64  first timestamp, ms
     8    i32  length of what follows   35    i64  largest timestamp, ms
    12    i32  leader epoch             43    i64  producer id, -1: none
    16     i8  magic: 2                 51    i16  producer epoch
    17    u32  crc32c of 21 … end       53    i32  sequence of the first record
    21    i16  attributes               57    i32  number of records
    23    i32  last offset - base

A record: its length, a byte of attributes, timestamp and offset as differences to the header's, key, value and
headers, every number a zigzag varint, a length of -1: absent. Compressed, all records together are one frame.

``batch_reading`` takes batches apart and ``batch_writing`` makes them.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.kafka.crc32c import crc32c

HEADER = struct.Struct(">qiibIhiqqqhii")
HEADER_BYTES = HEADER.size
LENGTH_AT, LENGTH_STARTS = 8, 12
"""Where the length field is, and from where on it counts."""
MAGIC = 2
MAGIC_AT = 16
PREFIX_BYTES = MAGIC_AT + 1
"""What every format has in common: enough to know a batch's length and format"""
SMALLEST_RECORD = 7
"""Bytes: length, attributes, both differences, and three counts"""
CODEC, APPEND_TIME, TRANSACTIONAL, CONTROL = 0x07, 0x08, 0x10, 0x20
"""Masks of the attributes."""
_CRC_AT, _ATTRIBUTES_AT, _PRODUCER_AT = 17, 21, 43
_PRODUCER = struct.Struct(">qhi")


class Header(NamedTuple):
    """A batch's header, field by field."""

    base_offset: int
    length: int
    leader_epoch: int
    magic: int
    crc: int
    attributes: int
    last_offset_delta: int
    first_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    records: int

    @property
    def last_offset(self) -> int:
        """Of the last record that the batch was made with; compaction may have taken it away."""
        return self.base_offset + self.last_offset_delta


def read_header(data: bytes, at: int) -> Header:
    """The header at ``at``, unchecked. ``data`` must hold it whole."""
    return Header._make(HEADER.unpack_from(data, at))


def checksum(data: NDArray[np.uint8], start: int, stop: int) -> int:
    """What a batch that takes up ``data[start:stop]`` must have as its crc; ``data`` is read-only."""
    return int(crc32c(data, start + _ATTRIBUTES_AT, stop))


def seal(batch: bytearray) -> None:
    """Writes the checksum of a batch that is otherwise finished."""
    data = np.frombuffer(batch, dtype=np.uint8)
    data.flags.writeable = False
    struct.pack_into(">I", batch, _CRC_AT, checksum(data, 0, len(batch)))


def set_producer(batch: bytearray, producer_id: int, epoch: int, sequence: int, transactional: bool) -> None:
    """Writes who sends a finished batch and as his how-manieth record, and seals it anew."""
    (attributes,) = struct.unpack_from(">h", batch, _ATTRIBUTES_AT)
    attributes = attributes | TRANSACTIONAL if transactional else attributes & ~TRANSACTIONAL
    struct.pack_into(">h", batch, _ATTRIBUTES_AT, attributes)
    _PRODUCER.pack_into(batch, _PRODUCER_AT, producer_id, epoch, sequence)
    seal(batch)
