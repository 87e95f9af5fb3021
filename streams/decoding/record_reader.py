"""One record at a time: bytes to an event or to the reason why there is none, through ``streams.event_schema``.

What it says is right by definition; the compiled reader of flat JSON is held to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from configs.settings import EventSchema, FeatureRule
from learner.interactions import NO_VALUE, FeatureColumn, Interactions
from streams.decoding.decoded import DECODE, NO_EVENT_ID, SCHEMA, Decoded, Poison, Refusal
from streams.decoding.id_hash import hash_bytes, prefix_seed
from streams.event_schema import Event, decode_record, read_feature, read_id
from streams.kafka.chunk import Chunk
from streams.rejects import Problem, Reason

LARGEST_RECORD_BYTES = 1 << 20
"""Bytes of a record that are looked at: Kafka's own default for the largest one. An event has some hundred; parsing
ten megabytes would hold up everything behind it."""


class ParsedRecord(NamedTuple):
    """A record's raw fields by name, and the schema to read them by: its writer may have fixed the time's unit."""

    fields: Mapping[str, object]
    schema: EventSchema


Parse: TypeAlias = Callable[[bytes], ParsedRecord | Refusal]
"""Bytes that are not empty and not too many to raw fields. It raises nothing but RegistryUnavailable."""


class ReadEvent(NamedTuple):
    """One event, with what does not fit into an ``Event``."""

    event: Event
    event_id: int
    """Hash of its id, 0 where it has none"""
    fields: Mapping[str, object]
    """All raw fields"""


class RecordReader:
    """Reads single records of a topic."""

    def __init__(self, schema: EventSchema, parse: Parse) -> None:
        self.schema = schema
        self._parse = parse
        self._seed = prefix_seed(schema.event_id.prefix) if schema.event_id else NO_EVENT_ID

    def read(self, value: bytes | None) -> ReadEvent | Refusal:
        """The event of a record's value. Raises RegistryUnavailable."""
        if not value:
            detail = "an empty value" if value is not None else "no value (a tombstone)"
            return Refusal.at(DECODE, Problem(Reason.EMPTY_RECORD, detail))
        if len(value) > LARGEST_RECORD_BYTES:
            detail = f"{len(value):,} bytes, at most {LARGEST_RECORD_BYTES:,} are read"
            return Refusal.at(DECODE, Problem(Reason.TOO_LARGE, detail))
        record = self._parse(value)
        if isinstance(record, Refusal):
            return record
        event = decode_record(record.fields, record.schema)
        event_id = self._event_id(record.fields)
        if isinstance(event, Problem):
            return Refusal.at(SCHEMA, event)
        if isinstance(event_id, Problem):
            return Refusal.at(SCHEMA, event_id)
        return ReadEvent(event, event_id, record.fields)

    def _event_id(self, fields: Mapping[str, object]) -> int | Problem:
        rule = self.schema.event_id
        if rule is None:
            return int(NO_EVENT_ID)
        text = read_id(fields.get(rule.field), rule)
        if isinstance(text, Problem):
            return int(NO_EVENT_ID) if text.reason is Reason.MISSING_FIELD else text
        return int(hash_bytes(text.removeprefix(rule.prefix).encode(), self._seed))


class RecordDecoder:
    """Decodes chunks record by record: Avro, Protobuf, and the reference for JSON."""

    def __init__(self, reader: RecordReader) -> None:
        self._reader = reader

    def decode(self, chunk: Chunk) -> Decoded:
        """See ``Decoder``."""
        read: list[ReadEvent] = []
        good: list[int] = []
        poison: list[Poison] = []
        for k in range(len(chunk)):
            outcome = self._reader.read(chunk.value(k))
            if isinstance(outcome, Refusal):
                poison.append(Poison.of(k, outcome))
            else:
                read.append(outcome)
                good.append(k)
        schema = self._reader.schema
        ids = np.array([r.event_id for r in read], dtype=np.uint64) if schema.event_id else None
        return Decoded(_interactions(read, chunk.offset[good], schema), tuple(poison), ids)


def features_of(rules: Mapping[str, FeatureRule], records: Iterable[Mapping[str, object]]) -> dict[str, FeatureColumn]:
    """Raw text of each feature, from the raw fields of each id's first event."""
    fields = list(records) if rules else []
    return {
        name: tuple(read_feature(record.get(rule.field or name), rule.separator) for record in fields)
        for name, rule in rules.items()
    }


def _interactions(read: list[ReadEvent], offset: NDArray[np.int64], schema: EventSchema) -> Interactions:
    events = [r.event for r in read]
    users, items = _Codes(), _Codes()
    user = [users.of(event.user_id, row) for row, event in enumerate(events)]
    item = [items.of(event.item_id, row) for row, event in enumerate(events)]
    return Interactions(
        tuple(users.codes),
        tuple(items.codes),
        np.array(user, dtype=np.int32),
        np.array(item, dtype=np.int32),
        np.array([event.label for event in events], dtype=np.int8),
        np.array([event.value for event in events] if schema.value else np.full(len(events), NO_VALUE), np.float32),
        np.array([event.event_time_ms for event in events], dtype=np.int64),
        offset,
        features_of(schema.user_features, (read[row].fields for row in users.first)),
        features_of(schema.item_features, (read[row].fields for row in items.first)),
    )


class _Codes:
    """Ids in order of first appearance."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.first: list[int] = []
        """Row of each id's first event"""

    def of(self, text: str, row: int) -> int:
        code = self.codes.setdefault(text, len(self.codes))
        if code == len(self.first):
            self.first.append(row)
        return code
