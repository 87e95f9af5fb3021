"""What an event costs to decode, beside the parsers of JSON alone.

    python -m benchmarks.decoding [--case JSON] [--json]

Chunks of 16,384 events of some 120 bytes, from 1 M users in equal shares: nearly as many users as events, the worst
case for the dictionaries. One core; the best of five rounds, and in each round every way takes its turn, so that the
ratios hold on a busy machine too. ``compiled`` is the part without Python objects, ``decoding`` all of it; ``record by
record`` is the reference, which reads what compiled code declines.
"""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec

from benchmarks.command import Options, standalone
from benchmarks.report import Figure
from benchmarks.synthetic import FIRST_TIME_MS, ITEMS, uniform_users
from configs.settings import EventSchema
from streams.decoding.flat_events import FlatReader
from streams.decoding.json_decoder import JsonDecoder, json_reader
from streams.decoding.record_reader import RecordDecoder, RecordReader
from streams.decoding.span_index import SpanIndex
from streams.kafka.chunk import Chunk

EVENTS = 16_384
USERS = 1_000_000
ROUNDS = 5
TARGET_COMPILED_US, TARGET_DECODING_US = 0.5, 1.0
WITH_FEATURES = {"user_features": {"app": {}}, "item_features": {"genre": {"kind": "multi"}}}
WITH_EVENT_ID = {"event_id": {"field": "session"}}

Ways = Mapping[str, Callable[[], object]]


def run(options: Options) -> Iterator[Figure]:
    """Microseconds an event of each way, then what msgspec and json take for every one that decoding takes."""
    chunk = events(options.scaled(EVENTS))
    if options.wants("JSON, flat"):
        costs = measured(json_ways(chunk), len(chunk))
        targets = {"compiled": TARGET_COMPILED_US, "decoding": TARGET_DECODING_US}
        for name, cost in costs.items():
            target = options.target(targets.get(name))
            yield Figure("JSON, flat", name, (cost,), "µs/event", target, at_most=True)
        for name in ("msgspec alone", "json.loads alone"):
            yield Figure("JSON, flat", f"{name} / decoding", (costs[name] / costs["decoding"],), "×")
    for case, schema in (("JSON, event ids", WITH_EVENT_ID), ("JSON, features", WITH_FEATURES)):
        if options.wants(case):
            decoder = JsonDecoder(EventSchema.model_validate(schema))
            cost = measured({case: partial(decoder.decode, chunk)}, len(chunk))[case]
            yield Figure(case, "decoding", (cost,), "µs/event")
    if options.wants("Avro"):
        cost = measured({"Avro": avro(chunk)}, len(chunk))["Avro"]
        yield Figure("Avro", "decoding", (cost,), "µs/event")


def events(n: int) -> Chunk:
    """n flat JSON events."""
    users = uniform_users(n, USERS)
    records = [
        SimpleNamespace(key=None, value=_event(k, user), offset=k, timestamp=0, headers=())
        for k, user in enumerate(users.tolist())
    ]
    return Chunk.of_records("events", 0, records, n)


def _event(k: int, user: int) -> bytes:
    event = {
        "user_id": f"u{user}", "item_id": f"i{k * 7919 % ITEMS}", "label": k % 2, "event_time_ms": FIRST_TIME_MS + k,
        "session": f"{k:012x}", "app": "web", "genre": "a|b",
    }  # fmt: skip
    return json.dumps(event, separators=(",", ":")).encode()


def json_ways(chunk: Chunk) -> Ways:
    """Decoding and its parts, and two parsers that only parse."""
    schema = EventSchema()
    flat, index = FlatReader(schema), (SpanIndex(), SpanIndex())
    values = [chunk.value(k) or b"" for k in range(len(chunk))]

    def compiled() -> None:
        columns = flat.read(chunk.data, chunk.value_start, chunk.value_length)
        index[0].encode(chunk.data, columns.user_start, columns.user_length)
        index[1].encode(chunk.data, columns.item_start, columns.item_length)

    decoder, reference = JsonDecoder(schema), RecordDecoder(json_reader(schema))
    return {
        "compiled": compiled,
        "decoding": partial(decoder.decode, chunk),
        "record by record": partial(reference.decode, chunk),
        "msgspec alone": lambda: [msgspec.json.decode(value) for value in values],
        "json.loads alone": lambda: [json.loads(value) for value in values],
    }


def avro(chunk: Chunk) -> Callable[[], object]:
    """The same events in Avro, their schema known."""
    import fastavro

    from streams.decoding.avro import AvroParser
    from streams.decoding.registry import RegisteredSchema

    text = {"user_id": "string", "item_id": "string", "label": "int", "event_time_ms": "long", "session": "string"}
    schema = {"type": "record", "name": "Event", "fields": [{"name": n, "type": t} for n, t in text.items()]}
    parsed = fastavro.parse_schema(schema)
    records = []
    for k in range(len(chunk)):
        data = io.BytesIO()
        fastavro.schemaless_writer(data, parsed, msgspec.json.decode(chunk.value(k) or b""))
        value = struct.pack(">bI", 0, 1) + data.getvalue()
        records.append(SimpleNamespace(key=None, value=value, offset=k, timestamp=0, headers=()))
    in_avro = Chunk.of_records("events", 0, records, len(records))
    known: Any = SimpleNamespace(schema=lambda _: RegisteredSchema("AVRO", json.dumps(schema), ()))
    return partial(RecordDecoder(RecordReader(EventSchema(), AvroParser(EventSchema(), known))).decode, in_avro)


def measured(ways: Ways, events: int) -> dict[str, float]:
    """Microseconds an event of each way."""
    seconds = {name: float("inf") for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {name: 1e6 * best / events for name, best in seconds.items()}


if __name__ == "__main__":
    standalone("decoding", run, __doc__)
