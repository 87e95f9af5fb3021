"""Avro records by registered schemas: events, logical types, references, and every way to be no event."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from typing import Any

import fastavro
import pytest

from configs.settings import EventSchema, StreamSettings
from streams.decoding import avro
from streams.decoding.decoder import decoder_of
from streams.decoding.exceptions import DecodingError, MissingExtra, RegistryUnavailable
from streams.rejects import Reason
from tests.decoding import Registry, chunk_of, events_of, registry_on_loopback

FIELDS = [
    {"name": "user_id", "type": "string"},
    {"name": "item_id", "type": ["null", "long", "string"]},
    {"name": "label", "type": "boolean"},
    {"name": "rating", "type": ["null", "double"], "default": None},
    {"name": "event_time_ms", "type": "long"},
    {"name": "extra", "type": {"type": "map", "values": "bytes"}},
]
EVENT: dict[str, Any] = {"type": "record", "name": "shop.Event", "fields": FIELDS}
GOOD = {"user_id": "u", "item_id": 7, "label": True, "rating": 4.5, "event_time_ms": 1000, "extra": {"x": b"y"}}


@pytest.fixture
def server() -> Iterator[Registry]:
    with registry_on_loopback() as registry:
        registry.add("/schemas/ids/1", {"schema": json.dumps(EVENT)})
        yield registry


def decode(server: Registry, *values: bytes, **schema: object) -> Any:
    stream = StreamSettings.model_validate({"format": "avro", "registry": {"url": server.url}})
    return decoder_of(EventSchema.model_validate(schema), stream).decode(chunk_of(values))


def written(schema: Any, record: object, schema_id: int = 1) -> bytes:
    data = io.BytesIO()
    fastavro.schemaless_writer(data, schema, record)
    return struct.pack(">bI", 0, schema_id) + data.getvalue()


def with_time(kind: object) -> dict[str, Any]:
    return {**EVENT, "fields": [f if f["name"] != "event_time_ms" else {**f, "type": kind} for f in FIELDS]}


def test_events(server):
    values = [written(EVENT, GOOD), written(EVENT, {**GOOD, "item_id": "x", "label": False, "rating": None})]
    decoded = decode(server, *values, value={"field": "rating"})
    assert events_of(decoded) == [(5, "u", "7", 1, 4.5, 1000), (8, "u", "x", 0, None, 1000)]
    assert decoded.poison == ()
    assert server.asked == ["/schemas/ids/1"]


@pytest.mark.parametrize(
    ("logical", "raw", "time_ms"),
    [
        ({"type": "long", "logicalType": "timestamp-millis"}, 1_600_000_000_123, 1_600_000_000_123),
        ({"type": "long", "logicalType": "timestamp-micros"}, 1_600_000_000_123_456, 1_600_000_000_123),
        ({"type": "long", "logicalType": "local-timestamp-millis"}, 1_600_000_000_123, 1_600_000_000_123),
        (["null", {"type": "long", "logicalType": "timestamp-micros"}], 1_600_000_000_123_456, 1_600_000_000_123),
        ({"type": "int", "logicalType": "date"}, 18_518, 1_599_955_200_000),
        ("long", 1_600_000_000, 1_600_000_000_000),
    ],
    ids=str,
)
def test_a_logical_type_has_its_own_unit_and_a_plain_number_that_of_the_settings(server, logical, raw, time_ms):
    schema = with_time(logical)
    server.add("/schemas/ids/2", {"schema": json.dumps(schema)})
    plain = with_time("int" if "date" in str(logical) else ["null", "long"] if isinstance(logical, list) else "long")
    decoded = decode(
        server, written(plain, {**GOOD, "event_time_ms": raw}, 2), event_time={"field": "event_time_ms", "unit": "s"}
    )
    assert decoded.events.event_time_ms.tolist() == [time_ms]


@pytest.mark.parametrize("raw", [-1, 253_402_300_799_000, 2**63 - 1, -(2**63)])
def test_a_timestamp_far_off_is_a_time_out_of_range(server, raw):
    logical = with_time({"type": "long", "logicalType": "timestamp-millis"})
    server.add("/schemas/ids/2", {"schema": json.dumps(logical)})
    (poison,) = decode(server, written(with_time("long"), {**GOOD, "event_time_ms": raw}, 2)).poison
    assert (poison.stage, poison.reason) == ("schema", Reason.TIME_OUT_OF_RANGE)


def test_schemas_that_build_on_others(server):
    item = {"type": "enum", "name": "shop.Item", "symbols": ["tea", "milk"]}
    event = {**EVENT, "fields": [f if f["name"] != "item_id" else {**f, "type": "shop.Item"} for f in FIELDS]}
    server.add("/schemas/ids/2", {
        "schema": json.dumps(event), "references": [{"name": "shop.Item", "subject": "item", "version": 1}],
    })  # fmt: skip
    server.add("/subjects/item/versions/1", {"schema": json.dumps(item)})
    whole = {**EVENT, "fields": [f if f["name"] != "item_id" else {**f, "type": item} for f in FIELDS]}
    values = [written(whole, {**GOOD, "item_id": "milk"}, 2)] * 2
    assert [event[2] for event in events_of(decode(server, *values))] == ["milk", "milk"]


def unusable() -> list[tuple[dict[str, Any], str]]:
    tree = {"name": "children", "type": {"type": "array", "items": "shop.Event"}}
    return [
        ({"schema": "{}", "schemaType": "JSON"}, "it is of type JSON, not AVRO (stream.format)"),
        ({"schema": '"string"'}, "it is no record"),
        ({"schema": json.dumps({**EVENT, "fields": [*FIELDS, tree]})}, "it contains itself"),
        ({"schema": json.dumps({"type": "record", "name": "E"})}, "schema 2: "),
        ({"schema": "no json"}, "schema 2: "),
    ]


@pytest.mark.parametrize(("answer", "message"), unusable(), ids=str)
def test_schemas_that_are_not_usable(server, answer, message):
    server.add("/schemas/ids/2", answer)
    good = written(EVENT, GOOD)
    decoded = decode(server, good, written(EVENT, GOOD, 2), good)
    assert len(decoded.events) == 2
    (poison,) = decoded.poison
    assert (poison.index, poison.stage, poison.reason) == (1, "registry", Reason.UNUSABLE_SCHEMA)
    assert message in poison.message


@pytest.mark.parametrize(
    ("value", "stage", "reason", "message"),
    [
        (b"", "decode", Reason.EMPTY_RECORD, "an empty value"),
        (b'{"user_id"', "decode", Reason.MALFORMED_RECORD, "but with 7b 22 75 73 65"),
        (b"\0\0\0\0", "decode", Reason.MALFORMED_RECORD, "but with 00 00 00 00"),
        (b"\0\0\0\0\1", "decode", Reason.MALFORMED_RECORD, "not of schema 1: it ends too early"),
        (written(EVENT, GOOD)[:-3], "decode", Reason.MALFORMED_RECORD, "not of schema 1: "),
        (written(EVENT, GOOD) + b"\0\0", "decode", Reason.MALFORMED_RECORD, "2 bytes follow a record of schema 1"),
        (b"\0\0\0\0\1\x04\xff\xfe", "decode", Reason.MALFORMED_RECORD, "not of schema 1: "),
        (b"\0\0\0\0\1\xfe\xff\xff\xff\xff\xff\xff\xff\x7fu", "decode", Reason.MALFORMED_RECORD, "not of schema 1: "),
        (written(EVENT, GOOD, 99), "registry", Reason.UNKNOWN_SCHEMA, "the registry has no schema 99"),
        (written(EVENT, {**GOOD, "item_id": None}), "schema", Reason.MISSING_FIELD, "item_id is missing"),
        (written(EVENT, {**GOOD, "user_id": ""}), "schema", Reason.EMPTY_ID, "user_id is empty"),
        (written(EVENT, {**GOOD, "rating": float("nan")}), "schema", Reason.NOT_FINITE, "rating is not finite: nan"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_poison_between_good_neighbours(server, value, stage, reason, message):
    good = written(EVENT, GOOD)
    decoded = decode(server, good, value, good, value={"field": "rating"})
    assert [event[0] for event in events_of(decoded)] == [5, 11]
    (poison,) = decoded.poison
    assert (poison.index, poison.stage, poison.reason) == (1, stage, reason)
    assert message in poison.message


def test_a_registry_that_is_away_blames_no_record(server):
    server.answers["/schemas/ids/1"] = 500, b"{}"
    stream = StreamSettings.model_validate({"format": "avro", "registry": {"url": server.url}})
    decoder, chunk = decoder_of(EventSchema(), stream), chunk_of([written(EVENT, GOOD)])
    with pytest.raises(RegistryUnavailable):
        decoder.decode(chunk)
    server.add("/schemas/ids/1", {"schema": json.dumps(EVENT)})
    assert len(decoder.decode(chunk).events) == 1


def test_avro_without_a_registry():
    with pytest.raises(DecodingError, match=r"stream.registry.url is None"):
        decoder_of(EventSchema(), StreamSettings(format="avro"))


def test_avro_without_its_library(server, monkeypatch):
    monkeypatch.setattr(avro, "fastavro", None)
    with pytest.raises(MissingExtra, match=r"stream.format avro needs a library: pip install 'coldstream\[avro\]'"):
        decode(server)
