"""Consecutive records of one partition as spans of one buffer, and the bytes of a record's headers.

``streams.kafka.record_batch`` cuts chunks out of what a broker sends; ``Chunk.of_records`` makes the same of records
that a client has already taken apart. Who reads a chunk cannot tell them apart.

Headers lie in the buffer as record format v2 writes them: a count, then for each header the length and the bytes of
its key and of its value; every number is a zigzag varint, and a value's length of -1 says that there is none.

Symbols: N records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ABSENT = -1
"""Length of a key or a value that is not there; an empty one has length 0."""
NO_TIME = -1
"""Timestamp of a record without one, as newer formats write it"""
_VARINT_BITS = 7
_VARINT_MORE = 0x80


class ClientRecord(Protocol):
    """What aiokafka's and kafka-python's ``ConsumerRecord`` have in common."""

    @property
    def key(self) -> bytes | None:
        """Its bytes as sent; None: it has no key."""

    @property
    def value(self) -> bytes | None:
        """Its bytes as sent; None: a tombstone."""

    @property
    def offset(self) -> int:
        """Its place in the partition."""

    @property
    def timestamp(self) -> int | None:
        """Milliseconds; None: the oldest format has none."""

    @property
    def headers(self) -> Iterable[tuple[str, bytes | None]] | None:
        """In their order; names may repeat."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that stands for a whole batch which could not be opened; its value is the batch, header and all."""

    index: int
    """Which record of the chunk; its offset is the batch's last one."""
    reason: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """N consecutive records of one partition, as spans of one buffer: no object for each record.

    It takes over its arrays and makes them read-only. Spans lie inside ``data``: whoever builds a chunk has checked it.
    """

    topic: str
    partition: int
    data: NDArray[np.uint8]
    """read-only buffer that every span below lies in"""
    key_start: NDArray[np.int64]
    """(N,)"""
    key_length: NDArray[np.int64]
    """(N,) -1: no key"""
    value_start: NDArray[np.int64]
    """(N,)"""
    value_length: NDArray[np.int64]
    """(N,) -1: no value (a tombstone)"""
    header_start: NDArray[np.int64]
    """(N,) where the record's headers begin: at their count"""
    offset: NDArray[np.int64]
    """(N,) rising"""
    timestamp_ms: NDArray[np.int64]
    """(N,) -1: it has none"""
    next_offset: int
    """Where the next chunk begins, control records and gaps included; above the last record's offset."""
    unreadable: tuple[Unreadable, ...] = ()
    """Records that are no events whatever their bytes look like, in order."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def __len__(self) -> int:
        return len(self.offset)

    def key(self, k: int) -> bytes | None:
        """Record k's key, copied."""
        return self._span(int(self.key_start[k]), int(self.key_length[k]))

    def value(self, k: int) -> bytes | None:
        """Record k's value, copied; None for a tombstone."""
        return self._span(int(self.value_start[k]), int(self.value_length[k]))

    def headers(self, k: int) -> list[tuple[str, bytes | None]]:
        """Record k's headers, copied. Bytes of a name that are not UTF-8 read as ``\\xhh``: it can be sent on."""
        return read_headers(self.data.data, int(self.header_start[k]))

    def part(self, start: int, stop: int) -> Chunk:
        """Records start … stop-1 on the same buffer; it ends where the whole does if it has the whole's last record.

        Raises:
            IndexError: unless 0 ≤ start ≤ stop ≤ N. An empty part of the middle would have no place: start = stop
                is allowed at N only.
        """
        n = len(self)
        if not (0 <= start < stop <= n or start == stop == n):
            raise IndexError(f"records {start}:{stop} of a chunk of {n}")
        return Chunk(
            self.topic,
            self.partition,
            self.data,
            self.key_start[start:stop],
            self.key_length[start:stop],
            self.value_start[start:stop],
            self.value_length[start:stop],
            self.header_start[start:stop],
            self.offset[start:stop],
            self.timestamp_ms[start:stop],
            self.next_offset if stop == n else int(self.offset[stop - 1]) + 1,
            tuple(Unreadable(u.index - start, u.reason) for u in self.unreadable if start <= u.index < stop),
        )

    @staticmethod
    def of_records(topic: str, partition: int, records: Sequence[ClientRecord], next_offset: int) -> Chunk:
        """The chunk of a client's records, which are in order and all before ``next_offset``."""
        pieces: list[bytes] = []
        starts = np.empty((3, len(records)), dtype=np.int64)
        lengths = np.empty((2, len(records)), dtype=np.int64)
        at = 0
        for k, record in enumerate(records):
            for column, piece in enumerate((record.key, record.value, encode_headers(record.headers or ()))):
                starts[column, k] = at
                if column < len(lengths):
                    lengths[column, k] = ABSENT if piece is None else len(piece)
                if piece:
                    pieces.append(piece)
                    at += len(piece)
        return Chunk(
            topic,
            partition,
            np.frombuffer(b"".join(pieces), dtype=np.uint8),
            starts[0],
            lengths[0],
            starts[1],
            lengths[1],
            starts[2],
            np.array([record.offset for record in records], dtype=np.int64),
            np.array([NO_TIME if r.timestamp is None else r.timestamp for r in records], dtype=np.int64),
            next_offset,
        )

    def _span(self, start: int, length: int) -> bytes | None:
        return None if length == ABSENT else self.data[start : start + length].tobytes()


def encode_headers(headers: Iterable[tuple[str, bytes | None]]) -> bytes:
    """A record's headers as record format v2 writes them."""
    encoded = bytearray()
    count = 0
    for name, value in headers:
        count += 1
        key = name.encode()
        encoded += _varint(len(key)) + key
        encoded += _varint(ABSENT) if value is None else _varint(len(value)) + value
    return bytes(_varint(count) + encoded)


def read_headers(data: memoryview, start: int) -> list[tuple[str, bytes | None]]:
    """The headers that begin at ``start``; the inverse of ``encode_headers``. They must be whole."""
    count, at = _read_varint(data, start)
    headers: list[tuple[str, bytes | None]] = []
    for _ in range(count):
        length, at = _read_varint(data, at)
        name = bytes(data[at : at + length]).decode(errors="backslashreplace")
        length, at = _read_varint(data, at + length)
        if length < 0:
            headers.append((name, None))
        else:
            headers.append((name, bytes(data[at : at + length])))
            at += length
    return headers


def _varint(number: int) -> bytes:
    """Zigzag: 0, -1, 1, -2 … as 0, 1, 2, 3 …, seven bits a byte, low ones first."""
    rest = number << 1 if number >= 0 else (-number << 1) - 1
    encoded = bytearray()
    while rest >= _VARINT_MORE:
        encoded.append(rest & (_VARINT_MORE - 1) | _VARINT_MORE)
        rest >>= _VARINT_BITS
    encoded.append(rest)
    return bytes(encoded)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number at ``at``, and where the next one is."""
    rest = shift = 0
    while True:
        byte = data[at]
        at += 1
        rest |= (byte & (_VARINT_MORE - 1)) << shift
        if byte < _VARINT_MORE:
            return (rest >> 1) ^ -(rest & 1), at
        shift += _VARINT_BITS
