"""JSON records become events; each bad one is poison with its reason, and its neighbours never notice."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from configs.settings import EventSchema, StreamSettings
from streams.decoding import flat_events, id_hash, json_record, span_index
from streams.decoding.decoded import Decoded, Poison
from streams.decoding.decoder import decoder_of
from streams.decoding.id_hash import hash_bytes, prefix_seed
from streams.decoding.json_decoder import JsonDecoder
from streams.decoding.record_reader import LARGEST_RECORD_BYTES
from streams.decoding.span_index import SpanIndex
from streams.kafka.chunk import Chunk
from streams.rejects import Reason
from tests.decoding import chunk_of, events_of

GOOD = b'{"user_id":"u","item_id":"i","label":1,"event_time_ms":1000}'


def record(**changes: object) -> bytes:
    return json.dumps({**json.loads(GOOD), **changes}).encode()


@pytest.fixture(scope="module")
def decoder():
    return decoder_of(EventSchema(), StreamSettings())


def decode(schema: dict[str, object], *values: bytes | None) -> Decoded:
    return JsonDecoder(EventSchema.model_validate(schema)).decode(chunk_of(values))


def test_plain_events(decoder):
    decoded = decoder.decode(chunk_of([GOOD, record(user_id=7, label=False), record(item_id="j", event_time_ms=2.6)]))
    assert events_of(decoded) == [
        (5, "u", "i", 1, None, 1000),
        (8, "7", "i", 0, None, 1000),
        (11, "u", "j", 1, None, 3),
    ]
    assert decoded.events.user_ids == ("u", "7")
    assert (decoded.poison, decoded.event_id) == ((), None)


D, S = "decode", "schema"
POISON: list[tuple[bytes | None, str, Reason, str, str]] = [
    (None, D, Reason.EMPTY_RECORD, "EmptyRecord", "no value (a tombstone)"),
    (b"", D, Reason.EMPTY_RECORD, "EmptyRecord", "an empty value"),
    (GOOD[:-1], D, Reason.MALFORMED_RECORD, "JSONDecodeError", "not JSON: Expecting ',' delimiter"),
    (GOOD + GOOD, D, Reason.MALFORMED_RECORD, "JSONDecodeError", "not JSON: Extra data"),
    (b"[1]", D, Reason.MALFORMED_RECORD, "MalformedRecord", "not a JSON object"),
    (b"7", D, Reason.MALFORMED_RECORD, "MalformedRecord", "not a JSON object"),
    (b"\x1f\x8b\x08\x00", D, Reason.INVALID_TEXT, "UnicodeDecodeError", "not UTF-8: invalid start byte at byte 1"),
    (GOOD.replace(b'"u"', b'"\xff"'), D, Reason.INVALID_TEXT, "UnicodeDecodeError", "not UTF-8: invalid start byte"),
    (GOOD.replace(b'"u"', b'"\xed\xa0\x80"'), D, Reason.INVALID_TEXT, "UnicodeDecodeError", "not UTF-8"),
    (GOOD.replace(b'"u"', b'"\\ud800"'), S, Reason.INVALID_TEXT, "InvalidText", "half of a surrogate pair"),
    (record(x="y" * 10_000_000), D, Reason.TOO_LARGE, "TooLarge", "10,000,076 bytes, at most 1,048,576 are read"),
    (b'{"x":' * 10_000 + b"1" + b"}" * 10_000, D, Reason.TOO_DEEP, "TooDeep", "10,000 levels of nesting, 64 are"),
    (b"[" * 10_000, D, Reason.TOO_DEEP, "TooDeep", "10,000 levels of nesting"),
    (GOOD.replace(b"{", b'{"user_id":"v",'), D, Reason.DUPLICATE_KEY, "DuplicateKey", "'user_id' is given more"),
    (GOOD.replace(b"{", b'{"x":1,"\\u0078":1,'), D, Reason.DUPLICATE_KEY, "DuplicateKey", "'x' is given more"),
    (GOOD.replace(b":1,", b":NaN,"), S, Reason.NOT_FINITE, "NotFinite", "label is not finite: nan"),
    (GOOD.replace(b"1000", b"-Infinity"), S, Reason.NOT_FINITE, "NotFinite", "event_time_ms is not finite: -inf"),
    (GOOD.replace(b"1000", b"1e999"), S, Reason.NOT_FINITE, "NotFinite", "event_time_ms is not finite: inf"),
    (b"{}", S, Reason.MISSING_FIELD, "MissingField", "user_id is missing"),
    (record(label=None), S, Reason.MISSING_FIELD, "MissingField", "label is missing"),
    (record(user_id=" "), S, Reason.EMPTY_ID, "EmptyId", "user_id is empty"),
    (record(user_id=True), S, Reason.WRONG_TYPE, "WrongType", "user_id must be text or a whole number, not True"),
    (record(event_time_ms=True), S, Reason.WRONG_TYPE, "WrongType", "event_time_ms must be a number, not True"),
    (record(item_id={"a": 1}), S, Reason.WRONG_TYPE, "WrongType", "not a nested value"),
    (record(label="like"), S, Reason.WRONG_TYPE, "WrongType", "label is not a number: 'like'"),
    (record(label=2), S, Reason.LABEL_OUTSIDE_RULE, "LabelOutsideRule", "label must be 0, 1, true or false, not 2"),
    (record(event_time_ms=2**63), S, Reason.TIME_OUT_OF_RANGE, "TimeOutOfRange", "is after the year 2199"),
    (record(event_time_ms=-1), S, Reason.TIME_OUT_OF_RANGE, "TimeOutOfRange", "event_time_ms -1 in ms is before"),
    (record(event_time_ms=253_402_300_799_000), S, Reason.TIME_OUT_OF_RANGE, "TimeOutOfRange", "after the year"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "stage", "reason", "error", "message"), POISON, ids=lambda v: str(v)[:40])
def test_poison_has_its_reason(decoder, value, stage, reason, error, message):
    (poison,) = decoder.decode(chunk_of([value])).poison
    assert (poison.index, poison.stage, poison.reason, poison.error) == (0, stage, reason, error)
    assert message in poison.message


def test_one_poison_to_ten_good_ones_leaves_the_good_ones_as_they_are(decoder):
    good = [record(user_id=f"u{k % 7}", item_id=k % 5, label=k % 2, event_time_ms=k) for k in range(10 * len(POISON))]
    mixed: list[bytes | None] = []
    for k, (bad, *_) in enumerate(POISON):
        mixed += [*good[10 * k : 10 * k + 5], bad, *good[10 * k + 5 : 10 * k + 10]]
    decoded, alone = decoder.decode(chunk_of(mixed)), decoder.decode(chunk_of(good))
    assert [event[1:] for event in events_of(decoded)] == [event[1:] for event in events_of(alone)]
    assert [p.index for p in decoded.poison] == list(range(5, len(mixed), 11))
    assert decoded.events.offset.tolist() == [3 * k + 5 for k in range(len(mixed)) if k % 11 != 5]
    assert [p.reason for p in decoded.poison] == [reason for _, _, reason, _, _ in POISON]


@pytest.mark.parametrize(
    ("value", "event"),
    [
        (record(label=True, x=[1, {"y": [None]}]), (5, "u", "i", 1, None, 1000)),
        (record(user_id=2**63), (5, "9223372036854775808", "i", 1, None, 1000)),
        (record(user_id=12.0, item_id="12"), (5, "12", "12", 1, None, 1000)),
        (record(user_id="é\n"), (5, "é\n", "i", 1, None, 1000)),
        (GOOD.replace(b"}", b',"x":NaN}'), (5, "u", "i", 1, None, 1000)),
        (GOOD.replace(b"}", b',"x":{"y":1,"y":2}}'), (5, "u", "i", 1, None, 1000)),
        (b"{" + b" " * (LARGEST_RECORD_BYTES - len(GOOD)) + GOOD[1:], (5, "u", "i", 1, None, 1000)),
    ],
    ids=lambda v: str(v)[:40],
)
def test_odd_records_that_are_events(decoder, value, event):
    assert events_of(decoder.decode(chunk_of([value]))) == [event]


def test_nesting_is_refused_at_one_depth_whoever_calls(decoder):
    def nested(levels: int) -> bytes:
        return GOOD.replace(b"}", b',"x":' + b"[" * levels + b"]" * levels + b"}")

    decoded = decoder.decode(chunk_of([nested(63), nested(64)]))
    assert [p.index for p in decoded.poison] == [1]


def test_a_message_is_one_short_line():
    schema = {"label": {"field": "a\nb" * 300}}
    (poison,) = decode(schema, b'{"user_id":"u","item_id":"i"}').poison
    assert poison.message == ("a b" * 300)[:499] + "…"


def test_value_and_label_may_come_from_one_field():
    schema = {"label": {"field": "rating", "at_least": 4}, "value": {"field": "rating"}}
    values = [b'{"user_id":1,"item_id":2,"rating":%s,"event_time_ms":3}' % rating for rating in (b"4", b"3.5", b"0.1")]
    assert [(e[3], e[4]) for e in events_of(decode(schema, *values))] == [
        (1, 4.0),
        (0, 3.5),
        (0, float(np.float32(0.1))),
    ]


@pytest.mark.parametrize(
    ("unit", "raw", "time_ms"),
    [
        ("s", "1600000000", 1_600_000_000_000),
        ("s", "1.0015", 1002),
        ("us", "1600000000123456", 1_600_000_000_123),
        ("ns", "1600000000123456789", 1_600_000_000_123),
        ("iso", '"2024-02-29T12:30:45.678901Z"', 1_709_209_845_678),
        ("iso", '"2024-02-29T14:30:45+02:00"', 1_709_209_845_000),
        ("iso", '"2100-03-01T00:00:00"', 4_107_542_400_000),
        ("iso", '"2199-12-31T23:59:59.999"', 7_258_118_399_999),
        ("ms", '"12"', 12),
    ],
)
def test_times(unit, raw, time_ms):
    value = b'{"user_id":1,"item_id":2,"label":0,"t":%s}' % raw.encode()
    assert decode({"event_time": {"field": "t", "unit": unit}}, value).events.event_time_ms.tolist() == [time_ms]


def test_prefixes_and_ids_with_line_ends():
    schema = {"user_id": {"field": "u", "prefix": "shop:"}, "item_id": {"field": "i", "prefix": "é\n"}}
    values = [
        b'{"u":"a\\nb","i":"\\u00e9","label":1,"event_time_ms":1}',
        b'{"u":"a","i":"x","label":1,"event_time_ms":1}',
        b'{"u":"b","i":"x","label":1,"event_time_ms":1}',
    ]
    decoded = decode(schema, *values).events
    assert (decoded.user_ids, decoded.item_ids) == (("shop:a\nb", "shop:a", "shop:b"), ("é\né", "é\nx"))
    assert decoded.item.tolist() == [0, 1, 1]


def test_features_are_those_of_an_ids_first_good_event():
    schema = {
        "user_features": {"age": {"kind": "numeric", "field": "user_age"}},
        "item_features": {"genre": {"kind": "multi"}},
    }
    values = [
        record(user_age=1, genre="x", label=5),
        record(user_age=30, genre=["a", "b"]),
        record(user_age=31, item_id="j"),
        record(user_id="v", genre="c"),
    ]
    decoded = decode(schema, *values)
    assert decoded.events.user_features == {"age": ("30", None)}
    assert decoded.events.item_features == {"genre": ("a|b", None)}
    assert [p.index for p in decoded.poison] == [0]


def test_event_ids_are_hashed_alike_on_both_paths():
    schema = {"event_id": {"field": "id", "prefix": "e"}}
    values = [
        record(id="x"),
        record(id="x", y=[]),
        record(),
        record(id=None),
        record(id=12),
        record(id="12"),
        record(id=""),
    ]
    decoded = decode(schema, *values)
    assert decoded.event_id is not None
    first, second, none, null, number, text = decoded.event_id.tolist()
    assert first == second == int(hash_bytes(b"x", prefix_seed("e")))
    assert number == text
    assert (none, null) == (0, 0)
    assert len({first, number, 0, int(hash_bytes(b"x", np.uint64(0)))}) == 4
    assert [(p.index, p.stage, p.reason) for p in decoded.poison] == [(6, "schema", Reason.EMPTY_ID)]


def test_hashes_are_what_they_always_were():
    """They are stored: another function would let every known event in again."""
    texts = (b"", b"a", b"12345678", b"123456789", "é".encode() * 20)
    seeds = (np.uint64(0), prefix_seed("shop:"))
    assert [[f"{int(hash_bytes(text, seed)):016x}" for text in texts] for seed in seeds] == GOLDEN_HASHES


GOLDEN_HASHES = [  # by the module's formula in plain Python
    ["0000000000000001", "3fff012f308ecd1d", "ddde44cbae697a67", "7133b0d88f7445e3", "19dafb7eab472212"],
    ["9e825c06dff1cc60", "615063356ad27c1d", "c3e3033b630d37f0", "1c938f045681ddd9", "4add990e2e888a2a"],
]


def test_no_records(decoder):
    decoded = decoder.decode(chunk_of([]))
    assert (len(decoded.events), decoded.events.user_ids, decoded.poison) == (0, (), ())


def test_a_batch_keeps_its_arrays_when_the_decoder_goes_on(decoder):
    first = decoder.decode(chunk_of([GOOD, record(user_id="v")]))
    before = events_of(first)
    decoder.decode(chunk_of([record(user_id=f"w{k}", item_id=k, label=0) for k in range(50)]))
    assert events_of(first) == before


def test_arrays_of_any_kind_are_decoded(decoder):
    plain = chunk_of([GOOD, record(user_id="v")])
    strided = np.repeat(plain.value_start, 2)[::2]
    odd = Chunk("t", 0, plain.data.copy(), plain.key_start, plain.key_length, strided, plain.value_length.astype(">i8"),
                plain.header_start, plain.offset, plain.timestamp_ms, plain.next_offset)  # fmt: skip
    assert events_of(decoder.decode(odd)) == events_of(decoder.decode(plain))


@pytest.mark.parametrize(
    "schema", [{}, {"event_id": {"field": "id", "prefix": "e"}, "value": {"field": "label"}}], ids=str
)
def test_no_event_waits_for_a_compiler(schema):
    decoder = JsonDecoder(EventSchema.model_validate(schema))
    functions = (flat_events._read, span_index._encode, span_index._join, json_record.outline, id_hash._hash_all)
    assert [len(function.signatures) for function in functions] == [1] * 5
    chunk = chunk_of([GOOD, record(id="x", y=[1]), b"{", None, GOOD])
    writable = replace(chunk)
    for array in (writable.data, writable.value_start):
        array.flags.writeable = array.base is None
    for one in (chunk, writable, chunk.part(1, 3)):
        decoder.decode(one)
    assert [len(function.signatures) for function in functions] == [1] * 5


def test_compiled_code_takes_just_what_is_utf_8():
    """Every first byte, then bytes at the edges of what may follow."""
    follow = (0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF)
    texts = [
        bytes([lead, *rest]) for lead in range(0x80, 0x100) for n in range(4) for rest in product(follow, repeat=n)
    ]
    texts += [bytes([control]) for control in range(0x20)]
    values = [GOOD.replace(b"}", b',"x":"%s"}' % text) for text in texts]
    chunk = chunk_of(values)
    columns = flat_events.FlatReader(EventSchema()).read(chunk.data, chunk.value_start, chunk.value_length)
    assert columns.accepted.tolist() == [is_strict_json(value) for value in values]
    assert 1_000 < columns.accepted.sum() < len(values) / 2


def is_strict_json(value: bytes) -> bool:
    try:
        json.loads(value.decode())
    except ValueError:
        return False
    return True


def test_distinct_contents_in_order_of_appearance_whatever_the_size():
    index, rng = SpanIndex(), np.random.default_rng(0)
    for n in (3, 5_000, 20, 100_000):
        numbers = rng.integers(0, 30_000, n)
        text = b"".join(b"%d" % number for number in numbers)
        length = np.array([len(b"%d" % number) for number in numbers])
        start = np.concatenate([[0], np.cumsum(length)[:-1]])
        code, first = index.encode(np.frombuffer(text, np.uint8), start, length)
        known: dict[int, int] = {}
        assert code.tolist() == [known.setdefault(number, len(known)) for number in numbers.tolist()]
        assert numbers[first].tolist() == list(known)


def test_poison_of_a_part_counts_from_its_start(decoder):
    chunk = chunk_of([GOOD, GOOD, b"x"])
    assert decoder.decode(chunk.part(1, 3)).poison == (
        Poison(1, "decode", Reason.MALFORMED_RECORD, "JSONDecodeError",
               "not JSON: Expecting value: line 1 column 1 (char 0)"),
    )  # fmt: skip
