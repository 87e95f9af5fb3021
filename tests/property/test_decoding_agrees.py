"""Compiled decoding agrees with reading record by record, whatever the records hold and however they are mutated."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from configs.settings import EventSchema
from streams.decoding.decoded import Decoded
from streams.decoding.flat_events import FlatReader
from streams.decoding.json_decoder import JsonDecoder, json_reader
from streams.decoding.record_reader import ReadEvent, RecordDecoder
from tests.decoding import chunk_of, shown

PREFIXED = {"user_id": {"field": "user_id", "prefix": "é:"}, "item_id": {"field": "item_id", "prefix": "i\n"}}
# fmt: off
SCHEMAS: tuple[dict[str, object], ...] = (
    {},
    {"label": {"field": "label", "at_least": 0.5}, "value": {"field": "label"},
     "event_time": {"field": "t", "unit": "s"}},
    {"label": {"field": "label", "at_most": 3}, "event_time": {"field": "t", "unit": "us"}, **PREFIXED},
    {"label": {"field": "label", "equals": "like"}, "event_id": {"field": "id"},
     "event_time": {"field": "t", "unit": "ns"}},
    {"label": {"field": "label", "equals": "1"}, "event_id": {"field": "id", "prefix": "e"},
     "value": {"field": "value"}},
    {"label": {"field": "label", "equals": "true"}, "event_time": {"field": "t", "unit": "iso"}},
    {"user_features": {"age": {"kind": "numeric"}, "tags": {"kind": "multi"}},
     "item_features": {"g": {"field": "genre"}}},
    {"user_id": {"field": "same"}, "item_id": {"field": "same"}, "label": {"field": "Größe"}},
)
FIELDS = ("user_id", "item_id", "label", "value", "t", "event_time_ms", "id", "same", "age", "tags", "genre", "Größe")
WORDS = ["u1", "\u3000", "\u2003 ", "\u00a0", "\u0085", "\u4e2d", "\u2603", "\U0001f600",
         "u2", "i", "", " ", "like", "true", "1", "1.0", "12", "-0", "é", "a\nb", "\x00", '"', "\\", "/", "nan",
         "2020-02-29T23:59:59", "2021-02-29T00:00:00Z", "1999-12-31T23:59:59.9994Z", "2100-06-30T12:00:00.123456Z",
         "1969-12-31T23:59:59", "2200-01-01T00:00:00", "2020-01-01 00:00:00", "2020-01-01T24:00:00",
         "\ud800"]
SCALARS = st.one_of(
    st.sampled_from(WORDS), st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(0, 5), st.floats(),
    st.floats(0, 5), st.sampled_from([0, 2**63, 2**63 - 1, 7258118400000, 7258118399999, 1.5, [1, "a"], {"a": 1}, []]),
    st.integers(0, 7_258_118_400 * 10**9), st.decimals(0, 10**13, places=3).map(float),
)
PLAIN = st.fixed_dictionaries(
    {"user_id": st.sampled_from(["u", "v", 7, "7"]), "item_id": st.integers(1, 3),
     "label": st.sampled_from([0, 1, 1, True, "like"]),
     "t": st.sampled_from([0, 1, 1_600_000_000, "2020-02-29T23:59:59.250Z"]), "event_time_ms": st.integers(0, 10**13),
     "same": st.sampled_from(["a", "b"]), "Größe": st.integers(0, 1)},
    optional={"id": st.sampled_from(["e1", "e2", 5]), "value": st.floats(0, 5), "age": st.integers(1, 99),
              "x": st.sampled_from([1, -2.5, "é", True, None, '"', [1], math.nan])},
)
# fmt: on


@cache
def decoders(schema: int) -> tuple[FlatReader, JsonDecoder, RecordDecoder]:
    events = EventSchema.model_validate(SCHEMAS[schema])
    return FlatReader(events), JsonDecoder(events), RecordDecoder(json_reader(events))


def written(record: dict[str, object], style: int) -> bytes:
    separators = [(",", ":"), (", ", ": "), (" ,\t", "\r:\n ")][style % 3]
    return json.dumps(record, ensure_ascii=style == 5, separators=separators).encode(errors="surrogatepass")


@st.composite
def values(draw: st.DrawFn) -> bytes | None:
    record = dict(draw(PLAIN))
    odd = draw(st.integers(0, 9))
    if odd > 4:
        record[draw(st.sampled_from(FIELDS))] = draw(SCALARS)
    if odd > 8:
        record.pop(draw(st.sampled_from(FIELDS)), None)
    order = draw(st.permutations(sorted(record)))
    value = written({name: record[name] for name in order}, draw(st.integers(0, 5)))
    kind = draw(st.integers(0, 9))
    if kind < 5:
        return value
    at = draw(st.integers(0, len(value)))
    piece = draw(st.sampled_from(
        [b"", b" ", b"\n", b",", b":", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u00e9", b"\\n", b"0", b"-", b".", b"e5",
         b"E+2", b"9" * 20, b"0.1", b"NaN", b"-Infinity", b"null", b"tru", b"\x00",
                b"\x1f", b"\x7f", b"\x80", b"\xc3\xa9",
         b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b'"user_id":"w",', b'"x":1,"x":2,', b'"\\u0078":1,"x":2,']
    ))  # fmt: skip
    if kind < 8:
        return value[:at] + piece + value[at + draw(st.integers(0, 3)) :]
    if kind == 8:
        return value[:at]
    return draw(st.one_of(st.none(), st.binary(max_size=9), st.just(b""), st.just(b"[" * 10_000), st.just(value * 2)))


RECORD = b'{"user_id":"u","item_id":1,"label":1,"event_time_ms":1}'


@given(st.lists(values(), max_size=12), st.integers(0, len(SCHEMAS) - 1))
@example([b'{"user_id":"","item_id":1,"label":1,"event_time_ms":1}', RECORD], 0)
@example([RECORD.replace(b'"u"', b"-0"), RECORD.replace(b'"u"', b"0")], 0)
@example([RECORD.replace(b"}", b',"\xc3\xa9":1,"\\u00e9":2}'), RECORD.replace(b"}", b',"x":1e999}')], 0)
@example([RECORD.replace(b"}", b',"x":"\\ud83d"}'), RECORD.replace(b"}", b',"x":"\\q"}')], 0)
@example([RECORD.replace(b"}", b',"x":' + b"9" * 5000 + b"}"), RECORD], 0)
@example([b'{"user_id":"a\\nb","item_id":"\\u00e9","label":1,"event_time_ms":1}', RECORD], 0)
@example([RECORD + b" " * (1 << 20), RECORD], 0)
@example([RECORD.replace(b"}", b',"x":NaN,"age":3}')], 6)
def test_all_at_once_and_one_by_one(chunk: list[bytes | None], schema: int) -> None:
    _, fast, reference = decoders(schema)
    assert shown(fast.decode(chunk_of(chunk))) == shown(reference.decode(chunk_of(chunk)))


@given(st.lists(values(), max_size=12), st.integers(0, len(SCHEMAS) - 1), st.data())
def test_cuts_of_a_chunk_change_nothing_but_dictionaries(
    drawn: list[bytes | None], schema: int, data: st.DataObject
) -> None:
    _, fast, _ = decoders(schema)
    chunk = chunk_of(drawn)
    cut = data.draw(st.integers(0, len(drawn)))
    if not 0 < cut < len(drawn):
        return
    whole, first, second = (fast.decode(part) for part in (chunk, chunk.part(0, cut), chunk.part(cut, len(drawn))))
    joined = first.events.concatenate([first.events, second.events])
    moved = tuple(replace(poison, index=poison.index + cut) for poison in second.poison)
    ids = None if whole.event_id is None else np.concatenate([first.event_id, second.event_id])
    assert shown(whole) == shown(Decoded(joined, first.poison + moved, ids))


@given(values(), st.integers(0, len(SCHEMAS) - 1))
def test_what_compiled_code_accepts_the_reference_reads_alike(value: bytes | None, schema: int) -> None:
    flat, _, _ = decoders(schema)
    events = EventSchema.model_validate(SCHEMAS[schema])
    chunk = chunk_of([value])
    columns = flat.read(chunk.data, chunk.value_start, chunk.value_length)
    if not columns.accepted[0]:
        return
    read = json_reader(events).read(value)
    assert isinstance(read, ReadEvent)
    user, item = (
        rule.prefix + chunk.data[start[0] : start[0] + length[0]].tobytes().decode()
        for rule, start, length in (
            (events.user_id, columns.user_start, columns.user_length),
            (events.item_id, columns.item_start, columns.item_length),
        )
    )
    e = read.event
    assert (user, item, columns.label[0], columns.event_time_ms[0]) == (e.user_id, e.item_id, e.label, e.event_time_ms)
    assert columns.value[0].tobytes() == np.float32(e.value).tobytes()
    assert columns.event_id[0] == read.event_id


def test_most_plain_events_are_accepted() -> None:
    """Else the tests above would compare the reference with itself."""
    flat, _, _ = decoders(0)
    plain = [
        RECORD,
        b' { "label" : true , "user_id" : -12 ,\n"item_id":"a b","event_time_ms":12.75, "x":null,"y":-1.5e-7}\r\n',
        RECORD.replace(b"}", b',"title":"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80 \\"x\\" \\n"}'),
        RECORD.replace(b"}", b',"score":0.12345678901234567890}'),
    ]  # fmt: skip
    chunk = chunk_of(plain)
    assert flat.read(chunk.data, chunk.value_start, chunk.value_length).accepted.all()


SPELT = """
    0 -0 00 01 -01 1. 1.0 .5 - -.5 +1 1e0 1E+0 1e 1e+ 1e-400 0.1 1.5 2.5 0.5 -0.4 -0.5 -0.6 -1 0.0005 0.00049
    16777217 0.123456789012345 0.30000000000000004 3.5e38 9007199254740993 999999999999999 12345678901234567.5
    1.7976931348623157e309 9223372036854775807 9223372036854775808 18446744073709551615 18446744073709551616
    -9223372036854775808 -9223372036854775809 99999999999999999999 7258118399 7258118400 7258118399.9994
    7258118399.9995 7258118399999 7258118400000 7258118399999.5 7258118399999999 7258118400000000
    7258118399999999999 7258118400000000000 0x1 1_0 NaN Infinity -Infinity nul nulll null tru true truee false fals
    "" "\u20ac" "é" "u" "1" "1.0" "01" "like" "LIKE" "true" "false" "nan" "a/b" "a\\/b" "a\\nb" "\\u00e9"
    "\\ud83d\\ude00" "\\ud83d" "\x7f" "-0" [] {} [1] "2024-02-29T00:00:00" "2023-02-29T00:00:00"
    "2100-02-29T00:00:00" "2000-02-29T00:00:00" "2000-03-01T00:00:00"
    "2024-00-01T00:00:00" "2024-13-01T00:00:00" "2024-04-31T00:00:00"
    "2024-04-00T00:00:00" "2024-04-30T24:00:00" "2024-04-30T23:60:00" "2024-04-30T23:59:60" "2024-04-30T23:59:59Z"
    "2024-04-30T23:59:59.9" "2024-04-30T23:59:59.999" "1969-12-31T23:59:59Z" "2024-04-30T23:59:59.999999Z"
    "2024-04-30T23:59:59.99999aZ" "2024-04-30T23:59:59.9a9" "2199-12-31T23:59:59.999999" "2200-01-01T00:00:00"
    "1970-01-01T00:00:00" "2024/04/30T23:59:59" "2024-04-30T23-59-59" "2024-04-3aT00:00:00"
"""
SPELLINGS = [*SPELT.split(), '" "', '""', '"\x85"', '"\xa0"', '"\u2003"', '"\u3000"']
MALFORMED = (
    '{"a\\/b":1,"a/b":2,',
    '{"a/b":1,"a\\/b":2,',
    "{,",
    '{"x":1,,',
    '{"x" 1,',
    '{"x":,',
    '{"x":1;',
    "{x:1,",
    "{{",
    "",
)


@pytest.mark.parametrize("schema", range(len(SCHEMAS)))
def test_every_spelling_in_every_field(schema: int) -> None:
    _, fast, reference = decoders(schema)
    plain = {"user_id": '"u"', "item_id": "1", "label": "1", "value": "2", "same": '"s"', "Größe": "0",
             "event_time_ms": "5", "t": '"2024-04-30T23:59:59Z"' if schema == 5 else "5"}  # fmt: skip
    records = [{**plain, field: spelling} for spelling in SPELLINGS for field in (*plain, "id", "x")]
    values = [("{" + ",".join(f'"{k}":{v}' for k, v in record.items()) + "}").encode() for record in records]
    values += [values[0].replace(b"{", start.encode(), 1) for start in MALFORMED]
    values += [values[0][:-1] + end for end in (b"", b",}", b"}}", b"} x", b"}\x00", b"]", b"}\n", b',"x":1 }')]
    assert shown(fast.decode(chunk_of(values))) == shown(reference.decode(chunk_of(values)))


def test_decimals_are_rounded_once() -> None:
    """As a float of 64 bits; others of 16 and 17 digits would differ by the last bit if they were divided out."""
    rng = np.random.default_rng(0)
    spellings = [f"0.{number}" for number in rng.integers(10**14, 10**17, 300).tolist()]
    spellings += [f"{a}.{b}" for a, b in rng.integers(10**6, 10**8, (300, 2)).tolist()]
    assert sum(float(s.replace(".", "")) / 10.0 ** len(s.split(".")[1]) != float(s) for s in spellings) > 20
    for spelling in spellings:
        events = EventSchema.model_validate({"label": {"field": "label", "at_least": float(spelling)}})
        below = EventSchema.model_validate({"label": {"field": "label", "at_most": float(spelling)}})
        value = RECORD.replace(b"1,", spelling.encode() + b",").replace(b'_id":' + spelling.encode(), b'_id":1')
        for rule in (events, below):
            start, length = np.zeros(1, np.int64), np.array([len(value)])
            for array in (start, length):
                array.flags.writeable = False
            columns = FlatReader(rule).read(np.frombuffer(value, np.uint8), start, length)
            assert not columns.accepted[0] or columns.label[0] == 1
