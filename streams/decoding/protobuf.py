"""Protobuf records: by the schema that their writer registered, or by a file of descriptors and without any head.

A field without presence (proto3's plain ones) that is not on the wire has its default: an event without a label then
has label 0, and one without a time is of 1970; declare such fields ``optional`` to have them missed. An enum's value is
its name. A google.protobuf.Timestamp carries its own unit, whatever data.events.event_time.unit says; a wrapper stands
for its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from configs.settings import EventSchema, StreamSettings
from streams.decoding.decoded import DECODE, REGISTRY, Refusal
from streams.decoding.exceptions import DecodingError
from streams.decoding.protobuf_types import UnusableTypes, described_message, registered_message, require_protobuf
from streams.decoding.record_reader import ParsedRecord, RecordReader
from streams.decoding.registry import SchemaRegistry
from streams.decoding.wire_format import message_indices, unframed
from streams.rejects import Problem, Reason

TIMESTAMP = "google.protobuf.Timestamp"
WRAPPERS = frozenset(
    f"google.protobuf.{name}Value"
    for name in ("Bool", "Bytes", "Double", "Float", "Int32", "Int64", "String", "UInt32", "UInt64")
)
NESTED: Mapping[str, object] = {}
"""Stands for a message or a map in a field that must be plain"""

Get = Callable[[Any], object]
"""A message's raw value of one field; None where it is not set"""


class _Writer(NamedTuple):
    """How to read the records of one message type."""

    message: Any
    """its class"""
    fields: tuple[tuple[str, Get], ...]
    schema: EventSchema

    def parse(self, payload: bytes) -> ParsedRecord | Refusal:
        try:
            message = self.message.FromString(payload)
        except Exception as error:  # DecodeError; the library also raises RuntimeError for hostile bytes
            problem = Problem(Reason.MALFORMED_RECORD, f"no {self.message.DESCRIPTOR.full_name}: {error}")
            return Refusal.at(DECODE, problem, error)
        return ParsedRecord({name: get(message) for name, get in self.fields}, self.schema)


class RegisteredProtobuf:
    """Parses records in the wire format of a registry."""

    def __init__(self, schema: EventSchema, registry: SchemaRegistry) -> None:
        """Raises MissingExtra."""
        require_protobuf()
        self._schema = schema
        self._registry = registry
        self._writers: dict[tuple[int, tuple[int, ...]], _Writer | Refusal] = {}

    def __call__(self, value: bytes) -> ParsedRecord | Refusal:
        """See ``record_reader.Parse``."""
        framed = unframed(value)
        if isinstance(framed, Refusal):
            return framed
        message = message_indices(framed.payload)
        if isinstance(message, Refusal):
            return message
        indices, payload = message
        writer = self._writers.get((framed.schema_id, indices)) or self._writer(framed.schema_id, indices)
        return writer if isinstance(writer, Refusal) else writer.parse(payload)

    def _writer(self, schema_id: int, indices: tuple[int, ...]) -> _Writer | Refusal:
        """Made once for each message type; ids and indices that lead nowhere are not kept: hostile ones have no end."""
        registered = self._registry.schema(schema_id)
        if registered is None:
            return Refusal.at(REGISTRY, Problem(Reason.UNKNOWN_SCHEMA, f"the registry has no schema {schema_id}"))
        try:
            writer = _writer_of(registered_message(registered, indices), self._schema)
        except LookupError:
            detail = f"schema {schema_id} has no message at {list(indices)}"
            return Refusal.at(DECODE, Problem(Reason.MALFORMED_RECORD, detail))
        except UnusableTypes as error:
            return Refusal.at(REGISTRY, Problem(Reason.UNUSABLE_SCHEMA, f"schema {schema_id}: {error}"))
        self._writers[schema_id, indices] = writer
        return writer


def protobuf_reader(schema: EventSchema, stream: StreamSettings) -> RecordReader:
    """Reads single Protobuf records.

    Raises:
        MissingExtra: the library is not installed.
        DecodingError: the settings name neither a registry nor descriptors and a message of them.
    """
    require_protobuf()
    if stream.registry.url is not None:
        return RecordReader(schema, RegisteredProtobuf(schema, SchemaRegistry(stream.registry)))
    if stream.protobuf_descriptors is None or stream.protobuf_message is None:
        raise DecodingError(
            "stream.format protobuf needs stream.registry.url, or stream.protobuf_descriptors and protobuf_message"
        )
    return described_reader(schema, stream.protobuf_descriptors, stream.protobuf_message)


def described_reader(schema: EventSchema, path: Path, message: str) -> RecordReader:
    """Reads records that are nothing but one message each. Raises UnusableDescriptors."""
    return RecordReader(schema, _writer_of(described_message(path, message), schema).parse)


def _writer_of(message: Any, schema: EventSchema) -> _Writer:
    known = message.DESCRIPTOR.fields_by_name
    fields = tuple((name, _get(known[name])) for name in _wanted(schema) if name in known)
    time = known.get(schema.event_time.field)
    if time is not None and time.message_type is not None and time.message_type.full_name == TIMESTAMP:
        in_nanoseconds = schema.event_time.model_copy(update={"unit": "ns"})
        schema = schema.model_copy(update={"event_time": in_nanoseconds})
    return _Writer(message, fields, schema)


def _wanted(schema: EventSchema) -> list[str]:
    """Names of all mapped fields, each once."""
    rules = [schema.user_id, schema.item_id, schema.label, schema.value, schema.event_time, schema.event_id]
    features = [*schema.user_features.items(), *schema.item_features.items()]
    names = [rule.field for rule in rules if rule is not None]
    return list(dict.fromkeys([*names, *(rule.field or name for name, rule in features)]))


def _get(field: Any) -> Get:
    """How to read a field's raw value."""
    name = field.name
    plain = _plain_value(field)
    if isinstance(field.default_value, list):  # repeated: the one way to tell that all versions know
        return lambda message: [plain(value) for value in getattr(message, name)]
    if field.has_presence:
        return lambda message: plain(getattr(message, name)) if message.HasField(name) else None
    return lambda message: plain(getattr(message, name))


def _plain_value(field: Any) -> Get:
    """What stands for one value of a field among raw fields."""
    if field.enum_type is not None:
        names = {number: value.name for number, value in field.enum_type.values_by_number.items()}
        return lambda value: names.get(value, value)
    if field.message_type is None:
        return lambda value: value
    if field.message_type.full_name == TIMESTAMP:
        return lambda value: value.seconds * 1_000_000_000 + value.nanos
    if field.message_type.full_name in WRAPPERS:
        return lambda value: value.value
    return lambda _: NESTED
