"""Columns of events from flat JSON objects, compiled: what ``streams.event_schema`` reads from the found fields.

Like the scanner, it declines what it is not sure to read as the reference does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.settings import EventSchema, LabelRule
from streams.decoding.decoded import NO_EVENT_ID
from streams.decoding.flat_json import (
    ABSENT,
    DECIMAL,
    FALSE,
    INTEGER,
    NULL,
    TEXT,
    TRUE,
    Found,
    Names,
    by_pointer,
    compiled,
    inlined,
    scan_object,
)
from streams.decoding.id_hash import hash_span, prefix_seed
from streams.decoding.pointers import pointer
from streams.decoding.record_reader import LARGEST_RECORD_BYTES
from streams.event_schema import LAST_TIME_MS, UNITS_PER_SECOND, read_label

_ANY, _AT_LEAST, _AT_MOST, _EQUALS_NUMBER, _EQUALS_TEXT = range(5)
"""Rules of a label"""
_ISO = 0
"""In place of a unit"""
_UNMAPPED = -1
_DECLINED = -1
_SPACE, _ZERO, _MINUS = 0x20, 0x30, 0x2D


class _Label(NamedTuple):
    field: int
    rule: int
    bound: float
    text: Any
    """of _EQUALS_TEXT and _EQUALS_NUMBER, in UTF-8"""
    if_true: int
    if_false: int
    """or _DECLINED"""


class _Time(NamedTuple):
    field: int
    per_second: int
    """_ISO for text"""


class _Plan(NamedTuple):
    """A schema as the compiled walk takes it: places of the fields among the names, and the rules."""

    names: Names
    user: int
    item: int
    label: _Label
    value: int
    """or _UNMAPPED"""
    time: _Time
    event_id: int
    """or _UNMAPPED"""
    event_id_seed: np.uint64


class FlatColumns(NamedTuple):
    """N records as columns; where a row is not accepted, its other entries mean nothing."""

    accepted: NDArray[np.bool_]
    user_start: NDArray[np.int64]
    """(N,) where the id lies in the chunk's data, without the prefix"""
    user_length: NDArray[np.int64]
    item_start: NDArray[np.int64]
    item_length: NDArray[np.int64]
    label: NDArray[np.int8]
    value: NDArray[np.float32]
    event_time_ms: NDArray[np.int64]
    event_id: NDArray[np.uint64]

    def at(self, rows: NDArray[np.int64]) -> FlatColumns:
        """These rows of each column, copied."""
        columns: tuple[NDArray[Any], ...] = self
        return FlatColumns._make(column[rows] for column in columns)


class FlatReader:
    """Reads flat JSON records by one schema."""

    def __init__(self, schema: EventSchema) -> None:
        self._plan = _plan(schema)
        self._found = Found.room(self._plan.names.fields)
        self._spans = np.zeros((4, 0), np.int64)

    def read(self, data: NDArray[np.uint8], start: NDArray[np.int64], length: NDArray[np.int64]) -> FlatColumns:
        """The records at these spans of ``data``. The spans of ids are good until the next call.

        All three arrays are C-contiguous and read-only: another kind of array would be compiled anew.
        """
        n = len(start)
        if self._spans.shape[1] < n:
            self._spans = np.empty((4, n), np.int64)
        user_start, user_length, item_start, item_length = self._spans[:, :n]
        columns = FlatColumns(
            np.zeros(n, np.bool_),
            user_start,
            user_length,
            item_start,
            item_length,
            np.empty(n, np.int8),
            np.empty(n, np.float32),
            np.empty(n, np.int64),
            np.empty(n, np.uint64),
        )
        _read(data, start, length, self._plan, self._found, columns)
        return columns


def _plan(schema: EventSchema) -> _Plan:
    names: dict[str, int] = {}

    def place(name: str) -> int:
        return names.setdefault(name, len(names))

    user, item = place(schema.user_id.field), place(schema.item_id.field)
    label = _label(schema.label, place(schema.label.field))
    value = place(schema.value.field) if schema.value else _UNMAPPED
    time = _Time(place(schema.event_time.field), UNITS_PER_SECOND.get(schema.event_time.unit, _ISO))
    event_id = place(schema.event_id.field) if schema.event_id else _UNMAPPED
    seed = prefix_seed(schema.event_id.prefix) if schema.event_id else NO_EVENT_ID
    return _Plan(Names.of(list(names)), user, item, label, value, time, event_id, seed)


def _label(rule: LabelRule, field: int) -> _Label:
    kind, bound, text = _ANY, 0.0, ""
    if rule.equals is not None:
        kind, bound, text = *_equals(rule, rule.equals), rule.equals
    elif rule.at_least is not None:
        kind, bound = _AT_LEAST, rule.at_least
    elif rule.at_most is not None:
        kind, bound = _AT_MOST, rule.at_most
    if_true, if_false = (read if isinstance(read := read_label(raw, rule), int) else _DECLINED for raw in (True, False))
    return _Label(field, kind, float(bound), np.frombuffer(text.encode(), np.uint8), if_true, if_false)


def _equals(rule: LabelRule, text: str) -> tuple[int, float]:
    """The rule's kind, and the number that the text is; Python reads some as numbers that the schema does not."""
    try:
        number = float(text)
    except ValueError:
        return _EQUALS_TEXT, 0.0
    return (_EQUALS_NUMBER, number) if read_label(number, rule) == 1 else (_EQUALS_TEXT, 0.0)


@compiled
def _read(data, starts, lengths, plan, found, columns):  # type: ignore[no-untyped-def]
    data = pointer(data)
    names, found = by_pointer(plan.names, found)
    for row in range(len(starts)):
        at, length = starts[row], lengths[row]
        if length <= 0 or length > LARGEST_RECORD_BYTES:
            continue
        if not scan_object(data, at, at + length, names, found):
            continue
        label = _label_of(data, plan.label, found)
        time = _time_of(data, plan.time, found)
        value, has_value = _value_of(plan.value, found)
        hashed, has_hash = _event_id_of(data, plan, found)
        sound = _is_id(data, plan.user, found) and _is_id(data, plan.item, found) and has_value and has_hash
        if not sound or label == _DECLINED or time == _DECLINED:
            continue
        columns.accepted[row] = True
        columns.user_start[row], columns.user_length[row] = found.start[plan.user], found.length[plan.user]
        columns.item_start[row], columns.item_length[row] = found.start[plan.item], found.length[plan.item]
        columns.label[row], columns.value[row] = label, value
        columns.event_time_ms[row], columns.event_id[row] = time, hashed


@inlined
def _is_id(data, field, found):  # type: ignore[no-untyped-def]
    """Whether the field's bytes are the id as they stand: text that is not blank, or an integer that is not −0."""
    start = found.start[field]
    if found.kind[field] == INTEGER:
        return data[start] != _MINUS or data[start + 1] != _ZERO
    return found.kind[field] == TEXT and _is_seen(data, start, found.length[field])


@inlined
def _is_seen(data, start, length):  # type: ignore[no-untyped-def]
    """Whether a text surely holds more than space: a byte that no blank character has, in ASCII or first in UTF-8.

    Blank ones beyond ASCII begin with C2, E1, E2 or E3 (U+0085 and A0, 1680, 2000 to 205F, 3000).
    """
    for k in range(start, start + length):
        byte = data[k]
        if byte > _SPACE and (byte < 0x80 or (byte > 0xC2 and (byte < 0xE1 or byte > 0xE3))):
            return True
    return False


@inlined
def _label_of(data, rule, found):  # type: ignore[no-untyped-def]
    kind, number = found.kind[rule.field], found.number[rule.field]
    if kind in (TRUE, FALSE):
        return rule.if_true if kind == TRUE else rule.if_false
    if rule.rule >= _EQUALS_NUMBER:
        return _equality(data, rule, found)
    if kind != INTEGER and kind != DECIMAL:
        return _DECLINED
    if rule.rule == _AT_LEAST:
        return 1 if number >= rule.bound else 0
    if rule.rule == _AT_MOST:
        return 1 if number <= rule.bound else 0
    if number == 0.0 or number == 1.0:
        return 1 if number == 1.0 else 0
    return _DECLINED


@inlined
def _equality(data, rule, found):  # type: ignore[no-untyped-def]
    """A number equals a number, and a text its own bytes; a text beside a number is declined: it may be one too."""
    kind, start, length = found.kind[rule.field], found.start[rule.field], found.length[rule.field]
    if kind in (INTEGER, DECIMAL):
        return 1 if rule.rule == _EQUALS_NUMBER and found.number[rule.field] == rule.bound else 0
    if kind == TEXT:
        same = length == len(rule.text)
        for k in range(length):
            same = same and data[start + k] == rule.text[k]
        if not _is_seen(data, start, length) or (rule.rule == _EQUALS_NUMBER and not same):
            return _DECLINED
        return 1 if same else 0
    return _DECLINED


@inlined
def _value_of(field, found):  # type: ignore[no-untyped-def]
    """(graded value, whether it is sure of it)"""
    if field == _UNMAPPED or found.kind[field] == ABSENT or found.kind[field] == NULL:
        return np.float32(np.nan), True
    return np.float32(found.number[field]), found.kind[field] == INTEGER or found.kind[field] == DECIMAL


@inlined
def _event_id_of(data, plan, found):  # type: ignore[no-untyped-def]
    """(hash of the event's id, whether it is sure of it)"""
    field = plan.event_id
    if field == _UNMAPPED or found.kind[field] == ABSENT or found.kind[field] == NULL:
        return np.uint64(NO_EVENT_ID), True
    if not _is_id(data, field, found):
        return np.uint64(NO_EVENT_ID), False
    return hash_span(data, found.start[field], found.length[field], plan.event_id_seed), True


@inlined
def _time_of(data, rule, found):  # type: ignore[no-untyped-def]
    """Milliseconds since the epoch; declined outside 1970 to 2199."""
    kind = found.kind[rule.field]
    if rule.per_second == _ISO:
        return _iso_time(data, found.start[rule.field], found.length[rule.field]) if kind == TEXT else _DECLINED
    if kind == INTEGER:
        return _whole_time(found.integer[rule.field], rule.per_second)
    if kind == DECIMAL:
        scaled = np.rint(found.number[rule.field] * (1000.0 / rule.per_second))
        return np.int64(scaled) if scaled >= 0 and scaled < LAST_TIME_MS else _DECLINED
    return _DECLINED


@inlined
def _whole_time(integer, per_second):  # type: ignore[no-untyped-def]
    last = LAST_TIME_MS // 1000 * per_second
    if integer < 0 or integer >= last:
        return _DECLINED
    return integer * (1000 // per_second) if per_second <= 1000 else integer // (per_second // 1000)


@compiled
def _iso_time(data, start, length):  # type: ignore[no-untyped-def]
    """Milliseconds of YYYY-MM-DDThh:mm:ss, then perhaps .fff or .ffffff, then perhaps Z; all else is declined."""
    end = start + length
    if length > 0 and data[end - 1] == 0x5A:  # Z
        end -= 1
    if end - start not in (19, 23, 26):
        return _DECLINED
    for place, mark in ((4, 0x2D), (7, 0x2D), (10, 0x54), (13, 0x3A), (16, 0x3A), (19, 0x2E)):  # - - T : : .
        if start + place < end and data[start + place] != mark:
            return _DECLINED
    year, month, day = _digits(data, start, 4), _digits(data, start + 5, 2), _digits(data, start + 8, 2)
    hour, minute, second = _digits(data, start + 11, 2), _digits(data, start + 14, 2), _digits(data, start + 17, 2)
    milliseconds = 0
    if end - start > 19:
        milliseconds = _digits(data, start + 20, 3)
        if milliseconds < 0 or (end - start == 26 and _digits(data, start + 23, 3) < 0):
            return _DECLINED
    days = _days(year, month, day)
    if days < 0 or hour < 0 or hour > 23 or minute < 0 or minute > 59 or second < 0 or second > 59:
        return _DECLINED
    return ((days * 24 + hour) * 60 + minute) * 60_000 + second * 1000 + milliseconds


@inlined
def _digits(data, start, count):  # type: ignore[no-untyped-def]
    number = np.int64(0)
    for k in range(start, start + count):
        digit = np.int64(data[k]) - _ZERO
        if digit < 0 or digit > 9:
            return np.int64(_DECLINED)
        number = number * 10 + digit
    return number


@inlined
def _days(year, month, day):  # type: ignore[no-untyped-def]
    """Days from 1970-01-01 to a date of the years 1970 to 2199; negative for any other, and for what is no date."""
    if year < 1970 or year > 2199 or month < 1 or month > 12 or day < 1:
        return np.int64(_DECLINED)
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    before = year - 1
    days = (year - 1970) * 365 + (before // 4 - before // 100 + before // 400) - 477
    for k in range(month - 1):
        days += lengths[k]
    return days + day - 1 if day <= lengths[month - 1] else np.int64(_DECLINED)
