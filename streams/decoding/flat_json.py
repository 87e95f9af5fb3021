"""Scanning flat JSON objects, compiled: where the wanted fields of one object lie, and of what kind they are.

It accepts an object only where it is sure to read what a whole parser would, and declines any other: nested values,
a key given twice or with an escape in it, half surrogate pairs, any error in the syntax or in UTF-8.

numba's cache on disk looks at the file of the outermost function only: who changes this file, ``id_hash`` or
``pointers`` touches ``flat_events`` and ``span_index`` too, or runs code of before the change.

A position is an index into the chunk's bytes; −1 in its place says "declined".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from streams.decoding.pointers import pointer

ABSENT, NULL, FALSE, TRUE, INTEGER, DECIMAL, TEXT, OTHER = range(8)
"""Kinds of a found field. INTEGER fits 64 bits, DECIMAL at most EXACT_DIGITS; TEXT is UTF-8
without escapes; OTHER is a sound string or number that is none of these: it may stand in a field that nobody reads."""
EXACT_DIGITS = 15
"""Digits that a 64-bit float always holds exactly: such a decimal is one division, rounded once, as every parser
rounds it."""
INTEGER_DIGITS = 19
"""Digits of the largest 64-bit integer; any number of so many fits 64 bits without a sign."""
LONGEST_NUMBER = 300
"""Characters. Longer ones are left to a whole parser, which refuses some of them."""
MOST_KEYS = 64
"""Keys of an object beside the wanted ones; an object of more is declined."""
DECLINED = -1

_QUOTE, _BACKSLASH, _COMMA, _COLON, _OPEN, _CLOSE, _MINUS, _POINT = map(ord, '"\\,:{}-.')
_SPACE, _TAB, _LINE_FEED, _RETURN, _ZERO, _NINE = map(ord, " \t\n\r09")
_NULL, _TRUE, _FALSE = (np.frombuffer(word, np.uint8) for word in (b"null", b"true", b"false"))
_SHORT_ESCAPES = np.frombuffer(b'"\\/bfnrt', np.uint8)
_POWERS = 10.0 ** np.arange(EXACT_DIGITS + 1)

inlined: Any = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")


class Names(NamedTuple):
    """The wanted fields' names, F of them, in UTF-8. Compiled code takes arrays by ``pointer``."""

    fields: int
    """F"""
    data: Any
    """one after the other"""
    end: Any
    """(F + 1,) name f is data[end[f] : end[f + 1]]"""

    @staticmethod
    def of(names: list[str]) -> Names:
        """The names in this order."""
        encoded = [name.encode() for name in names]
        end = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return Names(len(names), np.frombuffer(b"".join(encoded), np.uint8), end)


class Found(NamedTuple):
    """What one object holds of the wanted fields; memory for F of them and one more, for all others in turn."""

    kind: Any
    start: Any
    """of a text without its quotes, of a number with its sign"""
    length: Any
    integer: Any
    """of INTEGER"""
    number: Any
    """of INTEGER and DECIMAL, as a float"""
    other_start: Any
    """(MOST_KEYS,) keys beside the wanted ones"""
    other_length: Any

    @staticmethod
    def room(fields: int) -> Found:
        """Memory for so many fields."""
        f, k = fields + 1, MOST_KEYS
        return Found(
            np.zeros(f, np.uint8), np.zeros(f, np.int64), np.zeros(f, np.int64), np.zeros(f, np.int64), np.zeros(f),
            np.zeros(k, np.int64), np.zeros(k, np.int64),
        )  # fmt: skip


@inlined
def by_pointer(names, found):  # type: ignore[no-untyped-def]
    """Both with pointers in place of arrays, as ``scan_object`` takes them."""
    return (
        Names(names.fields, pointer(names.data), pointer(names.end)),
        Found(pointer(found.kind), pointer(found.start), pointer(found.length), pointer(found.integer),
              pointer(found.number), pointer(found.other_start), pointer(found.other_length)),
    )  # fmt: skip


@compiled
def scan_object(data, at, end, names, found):  # type: ignore[no-untyped-def]
    """Fills ``found`` from the object that is ``data[at:end]``; returns whether it is sure of it."""
    for field in range(names.fields + 1):
        found.kind[field] = ABSENT
    others = 0
    at = _after_space(data, at, end)
    if at >= end or data[at] != _OPEN:
        return False
    while True:
        key = _after_space(data, at + 1, end) + 1
        if key >= end or data[key - 1] != _QUOTE:
            return False
        after, escaped = _after_text(data, key, end)
        if after == DECLINED or escaped:
            return False
        length = after - 1 - key
        field = _field(data, key, length, names)
        if field == names.fields:
            if not _is_new(data, key, length, found, others):
                return False
            others += 1
        elif found.kind[field] != ABSENT:
            return False
        at = _after_space(data, after, end)
        if at >= end or data[at] != _COLON:
            return False
        at = _after_value(data, _after_space(data, at + 1, end), end, field, found)
        if at == DECLINED:
            return False
        at = _after_space(data, at, end)
        if at >= end or data[at] != _COMMA:
            break
    return at < end and data[at] == _CLOSE and _after_space(data, at + 1, end) == end


@inlined
def _after_space(data, at, end):  # type: ignore[no-untyped-def]
    while at < end:
        byte = data[at]
        if byte != _SPACE and byte != _LINE_FEED and byte != _RETURN and byte != _TAB:
            break
        at += 1
    return at


@inlined
def _field(data, key, length, names):  # type: ignore[no-untyped-def]
    """Which of the F wanted fields this key names; F for any other."""
    for field in range(names.fields):
        start = names.end[field]
        if names.end[field + 1] - start == length and _same(data, key, names.data, start, length):
            return field
    return names.fields


@inlined
def _same(one, a, other, b, length):  # type: ignore[no-untyped-def]
    for k in range(length):  # noqa: SIM110 (numba takes no generators)
        if one[a + k] != other[b + k]:
            return False
    return True


@inlined
def _is_new(data, key, length, found, others):  # type: ignore[no-untyped-def]
    """Whether the object had no such key yet; it is noted. False too where there are too many to tell."""
    if others == MOST_KEYS:
        return False
    for k in range(others):
        if found.other_length[k] == length and _same(data, key, data, found.other_start[k], length):
            return False
    found.other_start[others] = key
    found.other_length[others] = length
    return True


@inlined
def _after_value(data, at, end, field, found):  # type: ignore[no-untyped-def]
    """Where the value ends that begins at ``at``; it is entered as ``field``."""
    if at >= end:
        return DECLINED
    byte = data[at]
    if byte == _QUOTE:
        after, escaped = _after_text(data, at + 1, end)
        found.kind[field] = OTHER if escaped else TEXT
        found.start[field] = at + 1
        found.length[field] = after - at - 2
        return after
    if byte == _MINUS or (byte >= _ZERO and byte <= _NINE):
        after = _after_number(data, at, end, field, found)
        found.start[field] = at
        found.length[field] = after - at
        return after
    for kind, word in ((NULL, _NULL), (TRUE, _TRUE), (FALSE, _FALSE)):
        if byte == word[0]:
            found.kind[field] = kind
            whole = at + len(word) <= end and _same(data, at, word, 0, len(word))
            return at + len(word) if whole else DECLINED
    return DECLINED


@inlined
def _after_text(data, at, end):  # type: ignore[no-untyped-def]
    """(where a string ends that began before ``at``, whether it has escapes in it)"""
    escaped = False
    while at < end:
        byte = data[at]
        if byte == _QUOTE:
            return at + 1, escaped
        if byte < _SPACE:
            break
        if byte == _BACKSLASH:
            escaped = True
            at = _after_escape(data, at, end)
        elif byte >= 0x80:
            at = _after_character(data, at, end)
        else:
            at += 1
        if at == DECLINED:
            break
    return DECLINED, escaped


@compiled
def _after_escape(data, at, end):  # type: ignore[no-untyped-def]
    r"""Where an escape ends that begins at ``at``; \\u is declined, for it may be half a pair."""
    if at + 1 < end:
        for byte in _SHORT_ESCAPES:
            if data[at + 1] == byte:
                return at + 2
    return DECLINED


@compiled
def _after_character(data, at, end):  # type: ignore[no-untyped-def]
    """Where a UTF-8 character of two to four bytes ends (RFC 3629: no overlong form, no surrogate, no end above)."""
    lead = data[at]
    low, high = 0x80, 0xBF
    if lead >= 0xC2 and lead <= 0xDF:
        length = 2
    elif lead >= 0xE0 and lead <= 0xEF:
        length = 3
        low = 0xA0 if lead == 0xE0 else low
        high = 0x9F if lead == 0xED else high
    elif lead >= 0xF0 and lead <= 0xF4:
        length = 4
        low = 0x90 if lead == 0xF0 else low
        high = 0x8F if lead == 0xF4 else high
    else:
        return DECLINED
    if at + length > end or data[at + 1] < low or data[at + 1] > high:
        return DECLINED
    for k in range(at + 2, at + length):
        if data[k] & 0xC0 != 0x80:
            return DECLINED
    return at + length


@inlined
def _after_number(data, at, end, field, found):  # type: ignore[no-untyped-def]
    """Where the number ends that begins at ``at``; kind, integer and number are entered as ``field``."""
    negative = data[at] == _MINUS
    first = at + 1 if negative else at
    after, mantissa = _after_digits(data, first, end, np.uint64(0))
    whole = after - first
    if whole == 0 or (whole > 1 and data[first] == _ZERO):
        return DECLINED
    fraction = 0
    if after < end and data[after] == _POINT:
        point = after
        after, mantissa = _after_digits(data, point + 1, end, mantissa)
        fraction = after - point - 1
        if fraction == 0:
            return DECLINED
    exponent = after < end and (data[after] == 0x45 or data[after] == 0x65)  # E e
    if exponent:
        after = _after_exponent(data, after + 1, end)
    if after == DECLINED or after - at > LONGEST_NUMBER:
        return DECLINED
    found.kind[field] = OTHER
    if fraction == 0 and not exponent and whole <= INTEGER_DIGITS and mantissa <= np.uint64(2**63 - 1):
        integer = -np.int64(mantissa) if negative else np.int64(mantissa)
        found.kind[field], found.integer[field], found.number[field] = INTEGER, integer, np.float64(integer)
    elif fraction > 0 and not exponent and whole + fraction <= EXACT_DIGITS:
        number = np.float64(mantissa) / _POWERS[fraction]
        found.kind[field], found.number[field] = DECIMAL, -number if negative else number
    return after


@inlined
def _after_digits(data, at, end, number):  # type: ignore[no-untyped-def]
    """(where the digits end, ``number`` with them appended, as 64 bits hold it)"""
    while at < end:
        digit = data[at] - np.uint8(_ZERO)
        if digit > 9:
            break
        number = number * np.uint64(10) + np.uint64(digit)
        at += 1
    return at, number


@compiled
def _after_exponent(data, at, end):  # type: ignore[no-untyped-def]
    if at < end and (data[at] == _MINUS or data[at] == 0x2B):  # +
        at += 1
    after, _ = _after_digits(data, at, end, np.uint64(0))
    return after if after > at else DECLINED
