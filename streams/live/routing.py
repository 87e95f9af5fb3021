"""Sends events on by user: one chunk of a topic that is keyed otherwise, to batches of a topic that is keyed by user.

An event's value goes on byte for byte, with its time and its headers; its key becomes the user's id, and one header
more says where it came from. Two events of one user keep their order, as long as each partition's batches are sent in
the order in which they are returned.

Symbols: N records of a chunk, G of them good, K users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from streams.kafka.batch_writing import MAX_BYTES, EncodedBatch, Spans, encode_spans
from streams.kafka.chunk import Chunk, encode_headers
from streams.kafka.memory import copy_bytes
from streams.kafka.partitioning import partitions_of
from streams.kafka.varint import read_varint, varint_bytes, write_varint

SOURCE_HEADER = "coldstream.source"
"""Its value: ``topic/partition/offset`` of the record that was sent on"""
_compiled: Any = njit(cache=True, nogil=True)


def route(
    chunk: Chunk,
    user_ids: Sequence[str],
    user: NDArray[np.int32],
    good: NDArray[np.int64],
    partitions: int,
    *,
    max_bytes: int = MAX_BYTES,
) -> dict[int, list[EncodedBatch]]:
    """The good records as batches of each partition that some of them belong to, by rising partition.

    Args:
        user_ids: (K,) distinct or not.
        user: (G,) index into ``user_ids`` of each good record.
        good: (G,) which records of the chunk these are, rising. The others are left out: they are dead letters.
    """
    ids = Spans.of([text.encode() for text in user_ids])
    partition = partitions_of(ids.data, ids.start, ids.length, partitions)[user]
    order = np.argsort(partition, kind="stable")
    ends = np.flatnonzero(np.diff(partition[order], append=partitions)) + 1
    batches: dict[int, list[EncodedBatch]] = {}
    first = 0
    for end in ends.tolist():
        chosen = order[first:end]
        batches[int(partition[chosen[0]])] = _encode(chunk, good[chosen], ids.take(user[chosen]), max_bytes)
        first = end
    return batches


def _encode(chunk: Chunk, records: NDArray[np.int64], keys: Spans, max_bytes: int) -> list[EncodedBatch]:
    values = Spans(chunk.data, chunk.value_start[records], chunk.value_length[records])
    return encode_spans(
        keys, values, chunk.timestamp_ms[records], headers=_with_source(chunk, records), max_bytes=max_bytes
    )


def _with_source(chunk: Chunk, records: NDArray[np.int64]) -> Spans:
    """Each record's headers and one more, which says where it came from."""
    prefix = f"{chunk.topic}/{chunk.partition}/".encode()
    name = np.frombuffer(_name_bytes(SOURCE_HEADER), dtype=np.uint8)
    place = np.frombuffer(prefix, dtype=np.uint8)
    starts, offsets = chunk.header_start[records], chunk.offset[records]
    for array in (starts, offsets):
        array.flags.writeable = False  # one signature to compile, as all of a chunk's arrays are
    bounds = np.empty(len(records) + 1, dtype=np.int64)
    before = np.empty(len(records), dtype=np.int64)
    _measure_headers(chunk.data, starts, offsets, len(name), len(place), bounds, before)
    written = np.empty(bounds[-1], dtype=np.uint8)
    _write_headers(chunk.data, starts, offsets, name, place, bounds, before, written)
    return Spans(written, bounds[:-1], np.diff(bounds))


def _name_bytes(name: str) -> bytes:
    """Length and text of a header's name, as they stand in a record: an encoded header without count and value."""
    return encode_headers([(name, None)])[1:-1]


@_compiled
def _digits(number):  # type: ignore[no-untyped-def]
    count, rest = 1, number
    while rest >= 10:
        rest //= 10
        count += 1
    return count


@_compiled
def _measure_headers(data, starts, offsets, name, place, bounds, before):  # type: ignore[no-untyped-def]
    """Fills where each record's new headers begin and end, and how many bytes the old ones take without their count."""
    at = np.int64(0)
    bounds[0] = at
    for k in range(len(starts)):
        count, old = read_varint(data, starts[k], len(data))
        end = old
        for _ in range(count):
            length, end = read_varint(data, end, len(data))
            length, end = read_varint(data, end + length, len(data))
            end += max(length, 0)
        before[k] = end - old
        value = np.int64(place + _digits(offsets[k]))
        at += varint_bytes(count + 1) + before[k] + name + varint_bytes(value) + value
        bounds[k + 1] = at


@_compiled
def _write_headers(data, starts, offsets, name, place, bounds, before, written):  # type: ignore[no-untyped-def]
    for k in range(len(starts)):
        count, old = read_varint(data, starts[k], len(data))
        at = write_varint(written, bounds[k], count + 1)
        copy_bytes(written, at, data, old, before[k])
        at += before[k]
        copy_bytes(written, at, name, 0, len(name))
        digits = _digits(offsets[k])
        at = write_varint(written, at + len(name), np.int64(len(place) + digits))
        copy_bytes(written, at, place, 0, len(place))
        at += len(place) + digits
        rest = offsets[k]
        for _ in range(digits):
            at -= 1
            written[at] = np.uint8(48 + rest % 10)
            rest //= 10
