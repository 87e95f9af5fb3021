"""Protobuf records by registered schemas and by a file of descriptors, and every way to be no event."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2, wrappers_pb2

from configs.settings import EventSchema, StreamSettings
from streams.decoding import protobuf_types
from streams.decoding.decoder import decoder_of
from streams.decoding.exceptions import DecodingError, MissingExtra, UnusableDescriptors
from streams.decoding.wire_format import message_indices
from streams.rejects import Reason
from tests.decoding import Registry, chunk_of, events_of, registry_on_loopback

Field = descriptor_pb2.FieldDescriptorProto
SCHEMA: dict[str, object] = {
    "label": {"field": "kind", "equals": "LIKE"},
    "value": {"field": "rating"},
    "event_time": {"field": "at", "unit": "s"},
    "user_features": {"tags": {"kind": "multi"}, "nothing": {}},
}


def event_file() -> Any:
    """
    enum Kind { SEE = 0; LIKE = 1; }
    message Other { message Event { string user_id = 1; int64 item_id = 2; Kind kind = 3; DoubleValue rating = 4;
                                    Timestamp at = 5; repeated string tags = 6; Event cause = 7; bytes raw = 8; } }
    """
    wrappers, timestamp = "google/protobuf/wrappers.proto", "google/protobuf/timestamp.proto"
    file = descriptor_pb2.FileDescriptorProto(name="default", package="shop", syntax="proto3",
                                              dependency=[wrappers, timestamp])  # fmt: skip
    kind = file.enum_type.add(name="Kind")
    kind.value.add(name="SEE", number=0)
    kind.value.add(name="LIKE", number=1)
    event = file.message_type.add(name="Other").nested_type.add(name="Event")
    columns = [
        ("user_id", Field.TYPE_STRING, ""), ("item_id", Field.TYPE_INT64, ""), ("kind", Field.TYPE_ENUM, ".shop.Kind"),
        ("rating", Field.TYPE_MESSAGE, ".google.protobuf.DoubleValue"),
        ("at", Field.TYPE_MESSAGE, ".google.protobuf.Timestamp"), ("tags", Field.TYPE_STRING, ""),
        ("cause", Field.TYPE_MESSAGE, ".shop.Other.Event"), ("raw", Field.TYPE_BYTES, ""),
    ]  # fmt: skip
    for number, (name, kind_of, type_name) in enumerate(columns, 1):
        label = Field.LABEL_REPEATED if name == "tags" else Field.LABEL_OPTIONAL
        event.field.add(name=name, number=number, type=kind_of, label=label, type_name=type_name or None)
    return file


def message_class(file: Any, name: str) -> Any:
    pool = descriptor_pool.DescriptorPool()
    for known in (timestamp_pb2, wrappers_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


EVENT = message_class(event_file(), "shop.Other.Event")
GOOD = EVENT(
    user_id="u", item_id=7, kind=1, rating={"value": 4.5}, at={"seconds": 1_600_000_000, "nanos": 5_999_999},
    tags=["a", "b"],
)  # fmt: skip
PLACE = b"\x04\x00\x00"
"""Two indices: the first message's first nested one"""


def head(schema_id: int = 1, place: bytes = PLACE) -> bytes:
    return struct.pack(">bI", 0, schema_id) + place


def registered(file: Any) -> dict[str, object]:
    return {"schemaType": "PROTOBUF", "schema": base64.b64encode(file.SerializeToString()).decode()}


@pytest.fixture
def server() -> Iterator[Registry]:
    with registry_on_loopback() as registry:
        add(registry, 1, event_file())
        yield registry


def add(server: Registry, schema_id: int, file: Any, **more: object) -> None:
    server.add(f"/schemas/ids/{schema_id}", {"schemaType": "PROTOBUF", "schema": "syntax…", **more})
    server.add(f"/schemas/ids/{schema_id}?format=serialized", registered(file))


def decode(server: Registry, *values: bytes, schema: dict[str, object] = SCHEMA) -> Any:
    stream = StreamSettings.model_validate({"format": "protobuf", "registry": {"url": server.url}})
    return decoder_of(EventSchema.model_validate(schema), stream).decode(chunk_of(values))


def with_file(tmp_path: Path, *files: Any, message: str = "shop.Other.Event") -> Any:
    path = tmp_path / "descriptors.pb"
    path.write_bytes(descriptor_pb2.FileDescriptorSet(file=files).SerializeToString())
    settings = {"format": "protobuf", "protobuf_descriptors": path, "protobuf_message": message}
    return decoder_of(EventSchema.model_validate(SCHEMA), StreamSettings.model_validate(settings))


def test_events_by_a_registered_schema(server):
    other = EVENT(user_id="v", item_id=-1, at={"seconds": 1})
    decoded = decode(server, head() + GOOD.SerializeToString(), head() + other.SerializeToString())
    assert events_of(decoded) == [(5, "u", "7", 1, 4.5, 1_600_000_000_005), (8, "v", "-1", 0, None, 1000)]
    assert decoded.events.user_features == {"tags": ("a|b", None), "nothing": (None, None)}
    assert server.asked == ["/schemas/ids/1", "/schemas/ids/1?format=serialized"]


def test_events_by_a_file_have_no_head(tmp_path):
    decoded = with_file(tmp_path, event_file()).decode(chunk_of([GOOD.SerializeToString()]))
    assert events_of(decoded) == [(5, "u", "7", 1, 4.5, 1_600_000_000_005)]


def test_schemas_that_import_others(server):
    kinds = descriptor_pb2.FileDescriptorProto(name="any", package="shop", syntax="proto3")
    kinds.enum_type.extend(event_file().enum_type)
    file = event_file()
    del file.enum_type[:]
    file.dependency.append("shop/kinds.proto")
    add(server, 2, file, references=[{"name": "shop/kinds.proto", "subject": "kinds", "version": 3}])
    server.add("/subjects/kinds/versions/3", {"schemaType": "PROTOBUF", "schema": "…"})
    server.add("/subjects/kinds/versions/3?format=serialized", registered(kinds))
    assert events_of(decode(server, head(2) + GOOD.SerializeToString())) == [(5, "u", "7", 1, 4.5, 1_600_000_000_005)]


@pytest.mark.parametrize(
    ("value", "stage", "reason", "message"),
    [
        (b"", "decode", Reason.EMPTY_RECORD, "an empty value"),
        (b"\x08\x01\x02\x03\x04", "decode", Reason.MALFORMED_RECORD, "but with 08 01 02 03 04"),
        (head(place=b""), "decode", Reason.MALFORMED_RECORD, "no list of message indices follows"),
        (head(place=b"\x04\x00"), "decode", Reason.MALFORMED_RECORD, "no list of message indices follows"),
        (head(place=b"\x01"), "decode", Reason.MALFORMED_RECORD, "no list of message indices follows"),
        (head(place=b"\xff" * 9), "decode", Reason.MALFORMED_RECORD, "no list of message indices follows"),
        (head(place=b"\x02\x06"), "decode", Reason.MALFORMED_RECORD, "schema 1 has no message at [3]"),
        (head() + GOOD.SerializeToString()[:-1], "decode", Reason.MALFORMED_RECORD, "no shop.Other.Event: "),
        (head() + b"\x0a\x02\xff\xff", "decode", Reason.MALFORMED_RECORD, "no shop.Other.Event: "),
        (head() + b"\x3b" * 10_000, "decode", Reason.MALFORMED_RECORD, "no shop.Other.Event: "),
        (head(99), "registry", Reason.UNKNOWN_SCHEMA, "the registry has no schema 99"),
        (head(), "schema", Reason.EMPTY_ID, "user_id is empty"),
        (head() + EVENT(user_id="u").SerializeToString(), "schema", Reason.MISSING_FIELD, "at is missing"),
        (
            head() + EVENT(user_id="u", at={"seconds": 253_402_300_799}).SerializeToString(),
            "schema", Reason.TIME_OUT_OF_RANGE, "at 253402300799000000000 in ns is after the year 2199",
        ),
        (
            head() + EVENT(user_id="u", rating={"value": float("inf")}, at={}).SerializeToString(),
            "schema", Reason.NOT_FINITE, "rating is not finite: inf",
        ),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_poison_between_good_neighbours(server, value, stage, reason, message):
    good = head() + GOOD.SerializeToString()
    decoded = decode(server, good, value, good)
    assert [event[0] for event in events_of(decoded)] == [5, 11]
    (poison,) = decoded.poison
    assert (poison.index, poison.stage, poison.reason) == (1, stage, reason)
    assert message in poison.message


@pytest.mark.parametrize("field", ["raw", "cause", "tags"])
def test_an_id_that_is_no_plain_value(server, field):
    value = head() + EVENT(item_id=1, raw=b"x", cause={"raw": b"x"}, tags=["x"], at={}).SerializeToString()
    (poison,) = decode(server, value, schema={**SCHEMA, "user_id": {"field": field}}).poison
    assert (poison.reason, field in poison.message) == (Reason.WRONG_TYPE, True)


def test_an_enum_of_a_later_version_is_its_number(server):
    later = EVENT(user_id="u", item_id=1, kind=9, at={})
    schema = {**SCHEMA, "label": {"field": "kind", "equals": "9"}}
    assert [e[3] for e in events_of(decode(server, head() + later.SerializeToString(), schema=schema))] == [1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"schemaType": "AVRO", "schema": "{}"}, "it is of type AVRO, not PROTOBUF (stream.format)"),
        ({"schemaType": "PROTOBUF", "schema": "no base64!"}, "the registry gives no descriptor of registered.proto"),
        (registered(descriptor_pb2.FileDescriptorProto(name="x", dependency=["gone.proto"])), "gone.proto"),
    ],
    ids=str,
)
def test_schemas_that_are_not_usable(server, answer, message):
    server.add("/schemas/ids/2", answer)
    server.add("/schemas/ids/2?format=serialized", answer)
    (poison,) = decode(server, head(2) + GOOD.SerializeToString()).poison
    assert (poison.stage, poison.reason) == ("registry", Reason.UNUSABLE_SCHEMA)
    assert message in poison.message


def test_indices_are_zigzag_varints_and_one_zero_is_the_first_message():
    assert message_indices(b"\x00rest") == ((0,), b"rest")
    assert message_indices(b"\x04\x02\xac\x02rest") == ((1, 150), b"rest")


def test_descriptors_that_are_not_usable(tmp_path):
    (tmp_path / "text").write_text("syntax = 'proto3';")
    text = StreamSettings(format="protobuf", protobuf_descriptors=tmp_path / "text", protobuf_message="shop.Event")
    for stream, message in [
        (text, "text is no FileDescriptorSet"),
        (text.model_copy(update={"protobuf_descriptors": tmp_path / "no"}), "no: No such file or directory"),
        (StreamSettings(format="protobuf"), "needs stream.registry.url, or stream.protobuf_descriptors and"),
    ]:
        with pytest.raises(DecodingError, match=message):
            decoder_of(EventSchema(), stream)
    with pytest.raises(UnusableDescriptors, match=r"has no message 'shop.Othr'; it has shop.Other"):
        with_file(tmp_path, event_file(), message="shop.Othr")
    alone = descriptor_pb2.FileDescriptorProto(name="x", dependency=["gone.proto"])
    with pytest.raises(UnusableDescriptors, match=r"gone.proto.*; write it with protoc --include_imports"):
        with_file(tmp_path, alone)


def test_protobuf_without_its_library(server, monkeypatch):
    monkeypatch.setattr(protobuf_types, "descriptor_pb2", None)
    with pytest.raises(MissingExtra, match=r"needs a library: pip install 'coldstream\[protobuf\]'"):
        decode(server)
