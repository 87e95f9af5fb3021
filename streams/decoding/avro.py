"""Avro records, each by the schema that its writer registered.

Values come as their underlying types, whatever their logical ones: a timestamp far in the future is then a time out of
range, and no overflow. A logical type does fix the unit of the event's time, whatever data.events.event_time.unit says.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from configs.settings import EventSchema
from streams.decoding.decoded import DECODE, REGISTRY, Refusal
from streams.decoding.exceptions import MissingExtra
from streams.decoding.record_reader import ParsedRecord, RecordReader
from streams.decoding.registry import RegisteredSchema, SchemaRegistry
from streams.decoding.wire_format import unframed
from streams.rejects import Problem, Reason

try:
    import fastavro
except ImportError:
    fastavro = None  # type: ignore[assignment]  # an extra: what needs it asks first

LOGICAL_UNITS: Mapping[str, tuple[Any, int]] = {
    "timestamp-millis": ("ms", 1), "timestamp-micros": ("us", 1), "timestamp-nanos": ("ns", 1),
    "local-timestamp-millis": ("ms", 1), "local-timestamp-micros": ("us", 1), "local-timestamp-nanos": ("ns", 1),
    "date": ("s", 86_400),
}  # fmt: skip
"""Unit of an event's time, and how many of them one is. A local timestamp is read as UTC, as text without a zone is."""


class _Unusable(Exception):
    """A schema that records cannot be read by; the message says why."""


class _Writer(NamedTuple):
    """How to read the records of one registered schema."""

    parsed: Any
    """as fastavro takes it"""
    schema: EventSchema
    time_scale: int
    """what the event's time is multiplied with"""


class AvroParser:
    """Records in the wire format of a registry."""

    def __init__(self, schema: EventSchema, registry: SchemaRegistry) -> None:
        """Raises MissingExtra."""
        if fastavro is None:
            raise MissingExtra("avro")
        self._schema = schema
        self._registry = registry
        self._writers: dict[int, _Writer | Refusal] = {}

    def __call__(self, value: bytes) -> ParsedRecord | Refusal:
        """See ``record_reader.Parse``."""
        framed = unframed(value)
        if isinstance(framed, Refusal):
            return framed
        writer = self._writers.get(framed.schema_id) or self._writer(framed.schema_id)
        if isinstance(writer, Refusal):
            return writer
        data = io.BytesIO(framed.payload)
        try:
            fields: Any = fastavro.schemaless_reader(data, writer.parsed, None)
        except Exception as error:  # whatever hostile bytes make of it: the library names no one class
            detail = f"not of schema {framed.schema_id}: {str(error) or 'it ends too early'}"
            return Refusal.at(DECODE, Problem(Reason.MALFORMED_RECORD, detail), error)
        if data.tell() != len(framed.payload):
            detail = f"{len(framed.payload) - data.tell():,} bytes follow a record of schema {framed.schema_id}"
            return Refusal.at(DECODE, Problem(Reason.MALFORMED_RECORD, detail))
        time = self._schema.event_time.field
        if writer.time_scale != 1 and isinstance(fields[time], int):
            fields[time] *= writer.time_scale
        return ParsedRecord(fields, writer.schema)

    def _writer(self, schema_id: int) -> _Writer | Refusal:
        """Made once for each schema; unknown ids are left to the registry's memory."""
        registered = self._registry.schema(schema_id)
        if registered is None:
            return Refusal.at(REGISTRY, Problem(Reason.UNKNOWN_SCHEMA, f"the registry has no schema {schema_id}"))
        try:
            writer: _Writer | Refusal = self._compiled(registered)
        except Exception as error:  # as above
            problem = Problem(Reason.UNUSABLE_SCHEMA, f"schema {schema_id}: {error}")
            writer = Refusal.at(REGISTRY, problem, None if isinstance(error, _Unusable) else error)
        self._writers[schema_id] = writer
        return writer

    def _compiled(self, registered: RegisteredSchema) -> _Writer:
        named: dict[str, Any] = {}
        for schema in _in_order(registered):
            if schema.kind != "AVRO":
                raise _Unusable(f"it is of type {schema.kind}, not AVRO (stream.format)")
            parsed = fastavro.parse_schema(_plain(json.loads(schema.text)), named)
        if not isinstance(parsed, dict) or parsed.get("type") != "record":
            raise _Unusable("it is no record")
        if _is_recursive(parsed, named, ()):
            raise _Unusable("it contains itself: how deep its records are is then in their hands, so none is read")
        logical = _logical_type(json.loads(registered.text), self._schema.event_time.field)
        if logical is None or logical not in LOGICAL_UNITS:
            return _Writer(parsed, self._schema, 1)
        unit, scale = LOGICAL_UNITS[logical]
        time = self._schema.event_time.model_copy(update={"unit": unit})
        return _Writer(parsed, self._schema.model_copy(update={"event_time": time}), scale)


def avro_reader(schema: EventSchema, registry: SchemaRegistry) -> RecordReader:
    """Reads single Avro records. Raises MissingExtra."""
    return RecordReader(schema, AvroParser(schema, registry))


def _in_order(schema: RegisteredSchema) -> Iterator[RegisteredSchema]:
    """What a schema refers to, each once, then itself."""
    seen: dict[RegisteredSchema, None] = {}

    def walk(one: RegisteredSchema) -> None:
        for _, other in one.references:
            walk(other)
        seen.setdefault(one)

    walk(schema)
    return iter(seen)


def _plain(schema: Any) -> Any:
    """A schema without logical types."""
    if isinstance(schema, dict):
        return {key: _plain(part) for key, part in schema.items() if key != "logicalType"}
    return [_plain(part) for part in schema] if isinstance(schema, list) else schema


def _logical_type(schema: Any, field: str) -> str | None:
    """The logical type of a record's field, also where it may be null."""
    types = [f["type"] for f in schema["fields"] if f["name"] == field]
    options = types[0] if types and isinstance(types[0], list) else types
    return next((t["logicalType"] for t in options if isinstance(t, dict) and "logicalType" in t), None)


def _is_recursive(schema: Any, named: Mapping[str, Any], inside: tuple[str, ...]) -> bool:
    """Whether a record of this schema can hold another of it. fastavro has no limit of depth: C's stack would be it."""
    if isinstance(schema, list):
        return any(_is_recursive(option, named, inside) for option in schema)
    if isinstance(schema, str):
        return schema in inside or (schema in named and _is_recursive(named[schema], named, inside))
    if schema["type"] in ("record", "error"):
        name = schema["name"]
        if name in inside:
            return True
        return any(_is_recursive(field["type"], named, (*inside, name)) for field in schema["fields"])
    parts = [schema[key] for key in ("items", "values") if key in schema]
    if not parts and not isinstance(schema["type"], str):
        parts = [schema["type"]]
    return any(_is_recursive(part, named, inside) for part in parts)
