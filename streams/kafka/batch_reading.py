"""Takes apart what a broker sent: record batches, format v2, to chunks of spans.

Nothing in the bytes is trusted. A batch whose checksum or header is wrong was damaged on its way or on disk, and is
an error, as in any client. A batch that is sound but cannot be opened (broken or oversized compressed data, records
that contradict their lengths) came so from its producer, and would come so again: it becomes one ``Unreadable`` record
at the batch's last offset, its value being the batch, so that the stream goes on behind it.

Symbols: N records of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from streams.kafka.batch_header import (
    APPEND_TIME,
    CODEC,
    CONTROL,
    HEADER_BYTES,
    LENGTH_AT,
    LENGTH_STARTS,
    MAGIC,
    MAGIC_AT,
    PREFIX_BYTES,
    SMALLEST_RECORD,
    TRANSACTIONAL,
    Header,
    checksum,
    read_header,
)
from streams.kafka.chunk import ABSENT, Chunk, Unreadable
from streams.kafka.compression import NONE, CannotOpen, decompress
from streams.kafka.exceptions import KafkaProblem
from streams.kafka.varint import read_varint

BATCH_BYTES = 32 << 20
"""What a compressed batch may open to. Producers make batches of 1 MB by default."""
BATCH_RECORDS = 1_000_000
"""Records that a compressed batch may hold: 56 MB of spans"""
CHUNK_BYTES = 8 << 20
"""Opened bytes after which a chunk ends; with the largest batch behind them, 40 MB, twice while they are joined"""
CHUNK_RECORDS = 100_000
"""Records after which a chunk ends"""
_LARGEST_OFFSET = (1 << 55) - 1
"""Base offsets above are damage: below, sums stay inside 64 bits, and the first byte is a zero (``_whole``)."""
_ABORT_MARK = b"\x00\x00"
"""In a control record's key, behind its version"""
_KEY_START, _KEY_LENGTH, _VALUE_START, _VALUE_LENGTH, _HEADER_START, _OFFSET, _TIME = range(7)
"""Rows of the spans' array"""
_MALFORMED = -1
_compiled: Any = njit(cache=True, nogil=True)


class CorruptBatch(KafkaProblem):
    """A batch's checksum or header is wrong: the bytes are not what the broker was sent."""


@dataclass(slots=True)
class _Batch:
    """A batch that was fetched, and where its records lie once it is opened."""

    header: Header
    start: int
    stop: int
    """The batch is start … stop of the fetched bytes."""
    source: NDArray[np.uint8]
    """The fetched bytes, or what the batch opened to"""
    records_start: int
    records_stop: int
    reason: str = ""
    """Why it cannot be read; empty: it can"""


def oldest_magic(fetched: bytes) -> int:
    """The oldest format among the whole batches; this module reads 2."""
    oldest, at = MAGIC, 0
    while len(fetched) - at >= PREFIX_BYTES:
        length = _length(fetched, at)
        if length < 0 or length > len(fetched) - at - LENGTH_STARTS:
            break
        oldest = min(oldest, fetched[at + MAGIC_AT])
        at += LENGTH_STARTS + length
    return oldest


def read_chunks(
    fetched: bytes,
    topic: str,
    partition: int,
    wanted: int,
    *,
    check_crc: bool = True,
    aborted: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Chunk]:
    """The records from offset ``wanted`` on, as few chunks as memory allows: most often one.

    A chunk without records says that there are none up to its ``next_offset``. A batch that is cut off at the end is
    left out, and so is everything behind a damaged one.

    Args:
        aborted: (producer id, first offset) of transactions that were aborted, as the broker tells with a fetch: their
            records are left out. None: all records count.

    Raises:
        CorruptBatch: the very first batch that holds something wanted is damaged. A later one is met again by the next
            fetch, after the records before it.
    """
    data = np.frombuffer(fetched, dtype=np.uint8)
    transactions = None if aborted is None else _Transactions(aborted)
    run: list[_Batch] = []
    begun, opened, count = wanted, 0, 0
    for batch in _sound_batches(fetched, data, f"{topic}/{partition}", wanted, check_crc):
        if batch.header.last_offset < wanted or not _counts(batch, transactions):
            wanted = max(wanted, batch.header.last_offset + 1)
            continue
        _open(batch, data)
        run.append(batch)
        wanted = batch.header.last_offset + 1
        opened += 0 if batch.source is data else len(batch.source)
        count += batch.header.records
        if opened >= CHUNK_BYTES or count >= CHUNK_RECORDS:
            yield _assemble(run, data, topic, partition, begun, wanted)
            run, begun, opened, count = [], wanted, 0, 0
    if wanted > begun:
        yield _assemble(run, data, topic, partition, begun, wanted)


def _sound_batches(
    fetched: bytes, data: NDArray[np.uint8], place: str, wanted: int, check_crc: bool
) -> Iterator[_Batch]:
    """The whole batches with a plausible header and the right checksum, up to the first without."""
    at = 0
    anything = False
    while len(fetched) - at >= PREFIX_BYTES:
        stop = at + LENGTH_STARTS + _length(fetched, at)
        if stop > len(fetched):
            return
        try:
            header = _sound_header(fetched, data, at, stop, check_crc)
        except CorruptBatch as error:
            if anything:
                return
            raise CorruptBatch(
                f"{place}: a batch from offset {wanted} on is damaged ({error}); if another fetch does not mend it, "
                "the broker's disk is at fault: seek behind it, or restore the topic"
            ) from None
        anything = anything or header.last_offset >= wanted
        yield _Batch(header, at, stop, data, at + HEADER_BYTES, stop)
        at = stop


def _sound_header(fetched: bytes, data: NDArray[np.uint8], at: int, stop: int, check_crc: bool) -> Header:
    """Raises CorruptBatch, with the problem only, if these bytes are not what the broker was sent."""
    if fetched[at + MAGIC_AT] != MAGIC:
        raise CorruptBatch(f"format {fetched[at + MAGIC_AT]}, this reads {MAGIC}")
    if stop - at < HEADER_BYTES:
        raise CorruptBatch(f"{stop - at} bytes, a header has {HEADER_BYTES}")
    header = read_header(fetched, at)
    if not 0 <= header.base_offset <= _LARGEST_OFFSET or header.last_offset_delta < 0 or header.records < 0:
        raise CorruptBatch(f"offsets {header.base_offset} + {header.last_offset_delta}, {header.records} records")
    if check_crc and checksum(data, at, stop) != header.crc:
        raise CorruptBatch("its checksum is another")
    return header


def _length(fetched: bytes, at: int) -> int:
    return int.from_bytes(fetched[at + LENGTH_AT : at + LENGTH_STARTS], "big", signed=True)


class _Transactions:
    """Which batches belong to aborted transactions, asked in the order of their offsets."""

    def __init__(self, aborted: Sequence[tuple[int, int]]) -> None:
        self._to_come = sorted(aborted, key=lambda transaction: transaction[1], reverse=True)
        self._aborting: set[int] = set()
        """Producers in the middle of one"""

    def discard(self, batch: _Batch) -> bool:
        """Whether the batch is void."""
        header = batch.header
        while self._to_come and self._to_come[-1][1] <= header.base_offset:
            self._aborting.add(self._to_come.pop()[0])
        if header.attributes & CONTROL and _is_abort(batch):
            self._aborting.discard(header.producer_id)
        return bool(header.attributes & TRANSACTIONAL) and header.producer_id in self._aborting


def _counts(batch: _Batch, transactions: _Transactions | None) -> bool:
    """Whether the batch holds events: compaction has left some, it is no mark of a transaction's end, and not void."""
    void = transactions is not None and transactions.discard(batch)
    return not void and not batch.header.attributes & CONTROL and batch.header.records > 0


def _is_abort(batch: _Batch) -> bool:
    spans = np.empty((_TIME + 1, 1), dtype=np.int64)
    if _read(batch, 0, 0, spans, 0, 1) != 1 or spans[_KEY_LENGTH, 0] < 4:
        return False
    at = int(spans[_KEY_START, 0]) + 2
    return batch.source[at : at + 2].tobytes() == _ABORT_MARK


def _open(batch: _Batch, data: NDArray[np.uint8]) -> None:
    """Decompresses a batch, and marks one that cannot be opened."""
    codec = batch.header.attributes & CODEC
    try:
        if codec != NONE:
            batch.source = decompress(codec, data[batch.records_start : batch.records_stop].data, BATCH_BYTES)
            batch.records_start, batch.records_stop = 0, len(batch.source)
            if batch.header.records > BATCH_RECORDS:
                raise CannotOpen(f"{batch.header.records} records, more than {BATCH_RECORDS}")
        if batch.header.records * SMALLEST_RECORD > batch.records_stop - batch.records_start:
            raise CannotOpen(f"{batch.header.records} records in {batch.records_stop - batch.records_start} bytes")
    except CannotOpen as error:
        _give_up(batch, data, str(error))


def _give_up(batch: _Batch, data: NDArray[np.uint8], reason: str) -> None:
    batch.source, batch.records_start, batch.records_stop = data, batch.start, batch.stop
    batch.header = batch.header._replace(records=1)
    batch.reason = reason


def _assemble(
    run: Sequence[_Batch], data: NDArray[np.uint8], topic: str, partition: int, begun: int, next_offset: int
) -> Chunk:
    """One chunk of the records from offset ``begun`` on, on the fetched bytes if they hold all of them."""
    in_place = all(batch.source is data for batch in run)
    pieces: list[NDArray[np.uint8]] = []
    unreadable: list[Unreadable] = []
    spans = np.empty((_TIME + 1, sum(batch.header.records for batch in run)), dtype=np.int64)
    n = place = 0
    for batch in run:
        after = n
        if not batch.reason:
            shift = 0 if in_place else place - batch.records_start
            after = _read(batch, begun, shift, spans, n, batch.header.records)
            if after == _MALFORMED:
                _give_up(batch, data, "its records contradict their lengths or offsets")
        if batch.reason:
            shift = 0 if in_place else place - batch.records_start
            unreadable.append(Unreadable(n, batch.reason))
            spans[:, n] = _whole(batch, shift)
            after = n + 1
        if not in_place:
            pieces.append(batch.source[batch.records_start : batch.records_stop])
            place += len(pieces[-1])
        n = after
        begun = batch.header.last_offset + 1
    if not in_place:
        data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return Chunk(
        topic,
        partition,
        data,
        key_start=spans[_KEY_START, :n],
        key_length=spans[_KEY_LENGTH, :n],
        value_start=spans[_VALUE_START, :n],
        value_length=spans[_VALUE_LENGTH, :n],
        header_start=spans[_HEADER_START, :n],
        offset=spans[_OFFSET, :n],
        timestamp_ms=spans[_TIME, :n],
        next_offset=next_offset,
        unreadable=tuple(unreadable),
    )


def _read(batch: _Batch, wanted: int, shift: int, spans: NDArray[np.int64], at: int, count: int) -> int:
    """Fills columns at … of ``spans``; returns the column behind, or ``_MALFORMED``."""
    header = batch.header
    appended = bool(header.attributes & APPEND_TIME)
    clock = header.max_timestamp if appended else header.first_timestamp
    extent = (batch.records_start, batch.records_stop, count)
    offsets = (header.base_offset, header.last_offset_delta, wanted)
    return int(_read_records(batch.source, extent, offsets, clock, not appended, shift, spans, at))


def _whole(batch: _Batch, shift: int) -> tuple[int, ...]:
    """Spans of the record that stands for an unreadable batch.

    It has no headers: as their count serves the first byte of the base offset, which is zero (``_LARGEST_OFFSET``).
    """
    start, length = batch.records_start + shift, batch.records_stop - batch.records_start
    return start, ABSENT, start, length, start, batch.header.last_offset, batch.header.max_timestamp


@_compiled
def _read_records(data, extent, offsets, clock, differs, shift, spans, column):  # type: ignore[no-untyped-def]
    """Spans, moved by ``shift``, of the records from offset ``wanted`` on; columns before may be written in vain."""
    at, stop, count = extent
    base, last_delta, wanted = offsets
    before = np.int64(-1)
    for _ in range(count):
        length, at = read_varint(data, at, stop)
        if at < 0 or length < 1 or length > stop - at:
            return _MALFORMED
        end = at + length
        time_delta, at = read_varint(data, at + 1, end)
        if at < 0:
            return _MALFORMED
        delta, at = read_varint(data, at, end)
        if at < 0 or delta <= before or delta > last_delta:
            return _MALFORMED
        key_length, key_at = read_varint(data, at, end)
        if key_at < 0 or key_length > end - key_at:
            return _MALFORMED
        value_length, value_at = read_varint(data, key_at + max(key_length, 0), end)
        if value_at < 0 or value_length > end - value_at:
            return _MALFORMED
        header_at = value_at + max(value_length, 0)
        if _after_headers(data, header_at, end) != end:
            return _MALFORMED
        if base + delta >= wanted:
            spans[_KEY_START, column] = key_at + shift
            spans[_KEY_LENGTH, column] = max(key_length, ABSENT)
            spans[_VALUE_START, column] = value_at + shift
            spans[_VALUE_LENGTH, column] = max(value_length, ABSENT)
            spans[_HEADER_START, column] = header_at + shift
            spans[_OFFSET, column] = base + delta
            spans[_TIME, column] = clock + time_delta if differs else clock
            column += 1
        before, at = delta, end
    return column if at == stop else _MALFORMED


@_compiled
def _after_headers(data, at, stop):  # type: ignore[no-untyped-def]
    """Where the headers at ``at`` end, or ``_MALFORMED``: not before ``stop``."""
    count, at = read_varint(data, at, stop)
    if at < 0 or count < 0:
        return _MALFORMED
    for _ in range(count):
        length, at = read_varint(data, at, stop)
        if at < 0 or length < 0 or length > stop - at:
            return _MALFORMED
        length, at = read_varint(data, at + length, stop)
        if at < 0 or length > stop - at:
            return _MALFORMED
        at += max(length, 0)
    return at
