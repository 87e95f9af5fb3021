"""Chunks of JSON records: flat ones through compiled code, the rest one by one, under one dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from configs.settings import EventSchema
from learner.interactions import Interactions
from streams.decoding.decoded import Decoded, Poison, Refusal
from streams.decoding.flat_events import FlatColumns, FlatReader
from streams.decoding.json_record import parse_json
from streams.decoding.record_reader import ParsedRecord, ReadEvent, RecordReader, features_of
from streams.decoding.span_index import SpanIndex, texts
from streams.kafka.chunk import Chunk

Fields = Mapping[str, object]


def json_reader(schema: EventSchema) -> RecordReader:
    """Reads single JSON records."""

    def parse(value: bytes) -> ParsedRecord | Refusal:
        fields = parse_json(value)
        return fields if isinstance(fields, Refusal) else ParsedRecord(fields, schema)

    return RecordReader(schema, parse)


class _Read(NamedTuple):
    """A chunk's N records, of which the accepted are good events, and what was read apart."""

    data: NDArray[np.uint8]
    """where ids lie: the chunk's, and behind it the ids of records that were read apart"""
    columns: FlatColumns
    poison: tuple[Poison, ...]
    apart: Mapping[int, Fields]
    """Raw fields of good records that were read apart"""


class JsonDecoder:
    """Decodes JSON records. Making one compiles its code, or loads it from numba's cache on disk (0.3 s)."""

    def __init__(self, schema: EventSchema) -> None:
        self._schema = schema
        self._flat = FlatReader(schema)
        self._reader = json_reader(schema)
        self._users, self._items = SpanIndex(), SpanIndex()
        self._warm_up()

    def decode(self, chunk: Chunk) -> Decoded:
        """See ``Decoder``."""
        data = _plain(chunk.data)
        columns = self._flat.read(data, _plain(chunk.value_start), _plain(chunk.value_length))
        declined = np.flatnonzero(~columns.accepted)
        return self._assemble(chunk, self._read_apart(chunk, declined, data, columns))

    def _read_apart(
        self, chunk: Chunk, declined: NDArray[np.int64], data: NDArray[np.uint8], columns: FlatColumns
    ) -> _Read:
        """Reads the declined records through the reference, and enters the good ones among the columns."""
        poison: list[Poison] = []
        apart: dict[int, Fields] = {}
        ids = bytearray()
        for row in declined.tolist():
            outcome = self._reader.read(chunk.value(row))
            if isinstance(outcome, Refusal):
                poison.append(Poison.of(row, outcome))
                continue
            self._enter(outcome, row, columns, ids, len(data))
            apart[row] = outcome.fields
        if ids:
            data = _plain(np.concatenate([data, np.frombuffer(ids, np.uint8)]))
        return _Read(data, columns, tuple(poison), apart)

    def _enter(self, read: ReadEvent, row: int, columns: FlatColumns, ids: bytearray, offset: int) -> None:
        """Enters one event; its ids go to ``ids``, which will lie ``offset`` bytes into the data."""
        event, schema = read.event, self._schema
        for text, rule, start, length in (
            (event.user_id, schema.user_id, columns.user_start, columns.user_length),
            (event.item_id, schema.item_id, columns.item_start, columns.item_length),
        ):
            raw = text.removeprefix(rule.prefix).encode()
            start[row], length[row] = offset + len(ids), len(raw)
            ids += raw
        columns.accepted[row] = True
        columns.label[row], columns.value[row] = event.label, event.value
        columns.event_time_ms[row], columns.event_id[row] = event.event_time_ms, read.event_id

    def _assemble(self, chunk: Chunk, read: _Read) -> Decoded:
        data, columns, poison, _ = read
        good = np.flatnonzero(columns.accepted) if poison else np.arange(len(chunk))
        kept = columns.at(good) if poison else columns
        users = self._users.encode(data, kept.user_start, kept.user_length)
        items = self._items.encode(data, kept.item_start, kept.item_length)
        events = Interactions(
            texts(data, kept.user_start, kept.user_length, users.first, self._schema.user_id.prefix),
            texts(data, kept.item_start, kept.item_length, items.first, self._schema.item_id.prefix),
            users.code,
            items.code,
            kept.label,
            kept.value,
            kept.event_time_ms,
            chunk.offset[good] if poison else chunk.offset,
            features_of(self._schema.user_features, self._fields(chunk, read, good[users.first])),
            features_of(self._schema.item_features, self._fields(chunk, read, good[items.first])),
        )
        return Decoded(events, poison, kept.event_id if self._schema.event_id else None)

    def _fields(self, chunk: Chunk, read: _Read, rows: NDArray[np.int64]) -> Iterator[Fields]:
        for row in rows.tolist():
            fields = read.apart.get(row)
            yield msgspec.json.decode(chunk.value(row) or b"") if fields is None else fields

    def _warm_up(self) -> None:
        """Has everything compiled, so that no event waits for it."""
        none = np.zeros(0, np.int64)
        spans = (none,) * 5
        self.decode(Chunk("", 0, np.zeros(0, np.uint8), *spans, none, none, 0))
        zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
        texts(_plain(np.frombuffer(b"x", np.uint8)), zero, one, zero, "")
        self._reader.read(b"{}")


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """The same array, contiguous and read-only: the one kind that is compiled."""
    plain = np.ascontiguousarray(array).view()
    plain.flags.writeable = False
    return plain
