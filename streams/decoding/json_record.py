"""One JSON record, read carefully: the reference for the compiled reader, and what reads whatever that one declines."""

from __future__ import annotations

import json
from collections import Counter

import msgspec
import numba
import numpy as np
from numpy.typing import NDArray

from streams.decoding.decoded import DECODE, Refusal
from streams.rejects import Problem, Reason

DEEPEST = 64
"""Levels of nesting that are read. Parsers give up at a depth that hangs on who called them; this one does not."""


def parse_json(value: bytes) -> dict[str, object] | Refusal:
    """A record's raw fields; NaN and Infinity are read, for the schema to name the field that holds them.

    A key that the object gives twice is refused, since no two readers agree on which one counts; keys of objects
    inside it are not looked at, as no mapped field can be there.
    """
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        return Refusal.at(
            DECODE, Problem(Reason.INVALID_TEXT, f"not UTF-8: {error.reason} at byte {error.start}"), error
        )
    depth, keys = outline(np.frombuffer(value, dtype=np.uint8))
    if depth > DEEPEST:
        return Refusal.at(DECODE, Problem(Reason.TOO_DEEP, f"{depth:,} levels of nesting, {DEEPEST} are read"))
    try:
        record = msgspec.json.decode(value)
    except msgspec.DecodeError:
        try:
            record = json.loads(text)
        except ValueError as error:
            return Refusal.at(DECODE, Problem(Reason.MALFORMED_RECORD, f"not JSON: {error}"), error)
    if not isinstance(record, dict):
        return Refusal.at(DECODE, Problem(Reason.MALFORMED_RECORD, "not a JSON object"))
    if len(record) != keys:
        return Refusal.at(DECODE, Problem(Reason.DUPLICATE_KEY, f"{_repeated(text)} is given more than once"))
    return record


@numba.njit(cache=True, nogil=True)
def outline(data: NDArray[np.uint8]) -> tuple[int, int]:
    """(deepest level of nesting, keys of the outermost object) of a JSON text.

    Of a text that is not JSON the depth is what a parser could get to, or more; the keys mean nothing.
    """
    depth = deepest = keys = 0
    quoted = escaped = False
    for byte in data:
        if escaped:
            escaped = False
        elif quoted:
            escaped = byte == 0x5C  # backslash
            quoted = byte != 0x22
        elif byte == 0x22:  # "
            quoted = True
        elif byte == 0x7B or byte == 0x5B:  # { [
            depth += 1
            deepest = max(deepest, depth)
        elif byte == 0x7D or byte == 0x5D:  # } ]
            depth -= 1
        elif byte == 0x3A and depth == 1:  # :
            keys += 1
    return deepest, keys


def _repeated(text: str) -> str:
    pairs: list[tuple[str, object]] = json.loads(text, object_pairs_hook=list)
    key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
    return ascii(key) if len(key) <= 60 else f"{key[:60]!a}…"
