"""Records that are no events, each with the reason that it must be set aside for."""

from __future__ import annotations

import json
from collections.abc import Iterator

from streams.rejects import Reason
from tests.faults.live.judge import EXPECTED
from tests.faults.live.playing import START_MS, Sent

MIB = 1 << 20
GOOD: dict[str, object] = {"user_id": "u1", "item_id": "i1", "label": 1, "event_time_ms": START_MS}
DEPTH = 10_000


def _with(**fields: object) -> bytes:
    return json.dumps(GOOD | fields).encode()


def _without(field: str) -> bytes:
    return json.dumps({name: value for name, value in GOOD.items() if name != field}).encode()


def _token(field: str, token: str) -> bytes:
    """With a token that JSON does not have, or no float can hold."""
    return _with(**{field: "TOKEN"}).replace(b'"TOKEN"', token.encode())


POISON: dict[str, tuple[Reason, bytes | None]] = {
    "empty": (Reason.EMPTY_RECORD, b""),
    "tombstone": (Reason.EMPTY_RECORD, None),
    "truncated": (Reason.MALFORMED_RECORD, _with()[:-9]),
    "truncated in a string": (Reason.MALFORMED_RECORD, b'{"user_id": "u'),
    "two records": (Reason.MALFORMED_RECORD, _with() + _with()),
    "not an object": (Reason.MALFORMED_RECORD, b"[1, 2, 3]"),
    "not JSON": (Reason.MALFORMED_RECORD, b"\x00\x01\x02binary"),
    "invalid UTF-8": (Reason.INVALID_TEXT, _with(user_id="TOKEN").replace(b"TOKEN", b"u\xff\xfe")),
    "half a surrogate pair": (Reason.INVALID_TEXT, _with(user_id="TOKEN").replace(b"TOKEN", b"\\ud800")),
    "NaN as label": (Reason.NOT_FINITE, _token("label", "NaN")),
    "NaN as time": (Reason.NOT_FINITE, _token("event_time_ms", "NaN")),
    "Infinity as label": (Reason.NOT_FINITE, _token("label", "Infinity")),
    "-Infinity as time": (Reason.NOT_FINITE, _token("event_time_ms", "-Infinity")),
    "1e999 as label": (Reason.NOT_FINITE, _token("label", "1e999")),
    "10 MB": (Reason.TOO_LARGE, _with(padding="x" * (10 * MIB))),
    "10,000 deep": (Reason.TOO_DEEP, _token("extra", "[" * DEPTH + "]" * DEPTH)),
    "10,000 deep and open": (Reason.TOO_DEEP, b'{"a":' * DEPTH),
    "duplicate key": (Reason.DUPLICATE_KEY, _with()[:-1] + b', "label": 0}'),
    "no user": (Reason.MISSING_FIELD, _without("user_id")),
    "no item": (Reason.MISSING_FIELD, _without("item_id")),
    "no label": (Reason.MISSING_FIELD, _without("label")),
    "no time": (Reason.MISSING_FIELD, _without("event_time_ms")),
    "null user": (Reason.MISSING_FIELD, _with(user_id=None)),
    "null label": (Reason.MISSING_FIELD, _with(label=None)),
    "empty user": (Reason.EMPTY_ID, _with(user_id="")),
    "blank item": (Reason.EMPTY_ID, _with(item_id=" \t")),
    "list as user": (Reason.WRONG_TYPE, _with(user_id=["u1"])),
    "object as item": (Reason.WRONG_TYPE, _with(item_id={"id": "i1"})),
    "fraction as user": (Reason.WRONG_TYPE, _with(user_id=1.5)),
    "text as label": (Reason.WRONG_TYPE, _with(label="liked")),
    "text as time": (Reason.WRONG_TYPE, _with(event_time_ms="yesterday")),
    "bool as user": (Reason.WRONG_TYPE, _with(user_id=True)),
    "bool as time": (Reason.WRONG_TYPE, _with(event_time_ms=True)),
    "2 as label": (Reason.LABEL_OUTSIDE_RULE, _with(label=2)),
    "2^63 as label": (Reason.LABEL_OUTSIDE_RULE, _with(label=1 << 63)),
    "2^63 as time": (Reason.TIME_OUT_OF_RANGE, _with(event_time_ms=1 << 63)),
    "negative time": (Reason.TIME_OUT_OF_RANGE, _with(event_time_ms=-1)),
    "year 9999": (Reason.TIME_OUT_OF_RANGE, _with(event_time_ms=253_402_300_799_000)),
}
"""Name -> (reason, value)"""
BOMB = _with(padding=" " * (24 * MIB))
"""Compressed it has a thousandth of its size"""
LEGAL: dict[str, bytes] = {
    "extra fields": _with(session="s1", nested={"a": [1, {"b": None}]}),
    "true as label": _with(label=True),
    "whole number as user": _with(user_id=7),
    "escaped text": _with(user_id="TOKEN").replace(b"TOKEN", b"u\\u0031"),
    "white space": json.dumps(GOOD, indent=3).encode(),
    "other order": json.dumps(dict(reversed(GOOD.items()))).encode(),
}
"""Events that look odd"""


def poison_for_ever() -> Iterator[tuple[str, Sent]]:
    """(name, record) of each in turn, each time under another key and with headers of its own."""
    turn = 0
    while True:
        for name, (reason, value) in POISON.items():
            if len(value or b"") > MIB and turn:
                continue  # once is enough of the large ones
            headers = ((EXPECTED, str(reason).encode()), ("trace", f"{name} {turn}".encode()))
            key = None if turn % 5 == 4 and value is not None else f"poisoner-{turn}".encode()
            yield name, Sent(key, value, headers)
        turn += 1
