"""Makes record batches, format v2, ready to be sent: uncompressed, sealed, of no producer.

``streams.kafka.prebuilt`` gives a batch to a producer, which writes itself into it.

Symbols: N records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from streams.kafka.batch_header import HEADER, HEADER_BYTES, LENGTH_STARTS, MAGIC, seal
from streams.kafka.batch_reading import read_chunks
from streams.kafka.chunk import ABSENT
from streams.kafka.memory import copy_bytes
from streams.kafka.varint import varint_bytes, write_varint

MAX_BYTES = 900_000
"""Of a batch: below a broker's ``message.max.bytes`` (1,048,588 by default), with room for what it adds"""
_NO_ONE = -1
"""Producer, epoch, sequence and leader epoch of a batch that nobody has sent yet"""
_NO_HEADERS = b"\x00"
"""A record's headers: the count only"""
_compiled: Any = njit(cache=True, nogil=True)


class Spans(NamedTuple):
    """N strings of bytes inside one buffer."""

    data: NDArray[np.uint8]
    start: NDArray[np.int64]
    """(N,)"""
    length: NDArray[np.int64]
    """(N,) -1: absent"""

    @staticmethod
    def of(texts: Sequence[bytes | None]) -> Spans:
        """The strings, one behind the other in a buffer of their own."""
        return _joined(texts, _lengths(texts))

    @staticmethod
    def same(text: bytes, count: int) -> Spans:
        """``count`` times the same string."""
        data = np.frombuffer(text, dtype=np.uint8)
        return Spans(data, np.zeros(count, np.int64), np.full(count, len(text), np.int64))

    def part(self, start: int, stop: int) -> Spans:
        """Strings start … stop-1, on the same buffer."""
        return Spans(self.data, self.start[start:stop], self.length[start:stop])

    def take(self, chosen: NDArray[np.signedinteger[Any]]) -> Spans:
        """The chosen ones, on the same buffer."""
        return Spans(self.data, self.start[chosen], self.length[chosen])


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A finished batch. Whoever sends it may write producer, sequence and checksum into ``data``."""

    data: bytearray
    count: int
    """Records"""


def encode_batches(
    keys: Sequence[bytes | None],
    values: Sequence[bytes | None],
    *,
    timestamp_ms: int,
    headers: Sequence[bytes] | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[EncodedBatch]:
    """Batches of N records, in order; see ``encode_spans``.

    Args:
        headers: (N,) each record's headers as ``streams.kafka.chunk.encode_headers`` writes them; None: no headers.
    """
    n = len(keys)
    texts: tuple[Sequence[bytes | None], ...] = (keys, values, [_NO_HEADERS] * n if headers is None else headers)
    lengths = tuple(_lengths(part) for part in texts)
    times = np.full(n, timestamp_ms, dtype=np.int64)
    batches: list[EncodedBatch] = []
    for first, stop, size in _cuts(lengths, times, max_bytes):
        cut = slice(first, stop)  # one batch at a time: what is joined stays in the cache
        parts = tuple(_joined(part[cut], length[cut]) for part, length in zip(texts, lengths, strict=True))
        batches.append(_encode(parts, times[first:stop], size))
    return batches


def encode_spans(
    keys: Spans,
    values: Spans,
    timestamp_ms: NDArray[np.int64],
    *,
    headers: Spans | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[EncodedBatch]:
    """Batches of N records, in order. No batch is above ``max_bytes`` unless it holds a single record.

    Args:
        headers: Each record's headers, their count in front; they are copied as they are. None: no headers.

    Raises:
        ValueError: counts differ, headers are absent, or a span reaches outside its buffer.
    """
    n = len(timestamp_ms)
    headers = Spans.same(_NO_HEADERS, n) if headers is None else headers
    parts = (keys, values, headers)
    for spans, what in zip(parts, ("key", "value", "header"), strict=True):
        _check(spans, n, what)
    times = np.ascontiguousarray(timestamp_ms, dtype=np.int64)
    return [
        _encode(tuple(spans.part(first, stop) for spans in parts), times[first:stop], size)
        for first, stop, size in _cuts(tuple(spans.length for spans in parts), times, max_bytes)
    ]


def warm_up() -> None:
    """Compiles what reads and writes batches, or loads it from the cache on disk: a second, or some milliseconds."""
    (batch,) = encode_batches([b"key"], [b"value"], timestamp_ms=0)
    next(read_chunks(bytes(batch.data), "warm-up", 0, 0))


def _lengths(texts: Sequence[bytes | None]) -> NDArray[np.int64]:
    try:
        return np.fromiter(map(len, cast(Sequence[bytes], texts)), np.int64, len(texts))
    except TypeError:
        return np.array([ABSENT if text is None else len(text) for text in texts], dtype=np.int64)


def _joined(texts: Sequence[bytes | None], length: NDArray[np.int64]) -> Spans:
    start = np.zeros(len(texts), dtype=np.int64)
    np.cumsum(np.maximum(length[:-1], 0), out=start[1:])
    present = [text for text in texts if text is not None] if len(texts) and length.min() < 0 else texts
    return Spans(np.frombuffer(b"".join(cast(Sequence[bytes], present)), dtype=np.uint8), start, length)


def _check(spans: Spans, n: int, what: str) -> None:
    start, length = spans.start, spans.length
    if not len(start) == len(length) == n:
        raise ValueError(f"{n} timestamps, {len(start)} {what} starts and {len(length)} lengths")
    if not n:
        return
    if start.min() < 0 or length.min() < ABSENT or (start + length).max() > len(spans.data):
        raise ValueError(f"a {what} reaches outside its {len(spans.data)} bytes")
    if what == "header" and length.min() < 0:
        raise ValueError("a record's headers are absent; without any, their count is still a zero byte")


def _cuts(
    lengths: tuple[NDArray[np.int64], ...], times: NDArray[np.int64], max_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """(first record, the one behind the last, bytes) of each batch."""
    frozen, times = tuple(_frozen(length) for length in lengths), _frozen(times)
    first = 0
    while first < len(times):
        stop, size = _measure(frozen, times, first, max_bytes)
        yield first, stop, size
        first = stop


def _encode(parts: tuple[Spans, ...], times: NDArray[np.int64], size: int) -> EncodedBatch:
    """One batch of all records given, which take ``size`` bytes with the header."""
    batch = bytearray(size)
    frozen = tuple((_frozen(spans.data), _frozen(spans.start), _frozen(spans.length)) for spans in parts)
    _fill(frozen, _frozen(times), np.frombuffer(batch, dtype=np.uint8))
    count = len(times)
    about = (MAGIC, 0, 0, count - 1, int(times[0]), int(times.max()))
    HEADER.pack_into(batch, 0, 0, size - LENGTH_STARTS, _NO_ONE, *about, _NO_ONE, _NO_ONE, _NO_ONE, count)
    seal(batch)
    return EncodedBatch(batch, count)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view, so that numba compiles one signature."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


@_compiled
def _body_bytes(lengths, time_delta, delta, k):  # type: ignore[no-untyped-def]
    """Bytes of record k behind its length."""
    keys, values, headers = lengths
    size = 1 + varint_bytes(time_delta) + varint_bytes(delta) + headers[k]
    return size + varint_bytes(keys[k]) + max(keys[k], 0) + varint_bytes(values[k]) + max(values[k], 0)


@_compiled
def _measure(lengths, times, first, max_bytes):  # type: ignore[no-untyped-def]
    """Which record the batch that begins with ``first`` ends before, and its bytes."""
    size = np.int64(HEADER_BYTES)
    for k in range(first, len(times)):
        body = _body_bytes(lengths, times[k] - times[first], np.int64(k - first), k)
        whole = size + varint_bytes(body) + body
        if whole > max_bytes and k > first:
            return k, size
        size = whole
    return len(times), size


@_compiled
def _fill(parts, times, batch):  # type: ignore[no-untyped-def]
    """Writes the records behind the header."""
    keys, values, headers = parts
    lengths = (keys[2], values[2], headers[2])
    at = np.int64(HEADER_BYTES)
    for k in range(len(times)):
        at = write_varint(batch, at, _body_bytes(lengths, times[k] - times[0], np.int64(k), k))
        batch[at] = np.uint8(0)
        at = write_varint(batch, at + 1, times[k] - times[0])
        at = write_varint(batch, at, np.int64(k))
        for data, start, length in (keys, values):
            at = write_varint(batch, at, length[k])
            if length[k] > 0:
                copy_bytes(batch, at, data, start[k], length[k])
                at += length[k]
        data, start, length = headers
        copy_bytes(batch, at, data, start[k], length[k])
        at += length[k]
