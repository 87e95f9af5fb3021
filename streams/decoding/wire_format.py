"""What stands before a record's own bytes where a Confluent-compatible serializer wrote it.

byte 0      0
bytes 1–4   the schema's id, big-endian
Protobuf    then which message of the schema's file: how many indices, and each of them, as zigzag varints;
            each index is one level of nesting, and the single byte 0 is short for the file's first message
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from streams.decoding.decoded import DECODE, Refusal
from streams.rejects import Problem, Reason

HEAD = struct.Struct(">bI")
MOST_INDICES = 32
"""Levels of nested messages; a longer list is no list."""
LONGEST_VARINT = 5
"""Bytes of a 32-bit number"""


class Framed(NamedTuple):
    """A record's bytes behind the head, and by which schema they were written."""

    schema_id: int
    payload: bytes


def unframed(value: bytes) -> Framed | Refusal:
    """The head taken off."""
    if len(value) < HEAD.size or value[0] != 0:
        detail = f"does not begin with the byte 0 and a schema's id of 4 bytes, but with {value[: HEAD.size].hex(' ')}"
        return Refusal.at(DECODE, Problem(Reason.MALFORMED_RECORD, detail))
    _, schema_id = HEAD.unpack_from(value)
    return Framed(schema_id, value[HEAD.size :])


def message_indices(payload: bytes) -> tuple[tuple[int, ...], bytes] | Refusal:
    """Which message a Protobuf payload is, level by level, and its bytes."""
    count, at = _zigzag(payload, 0)
    indices = []
    if 0 <= count <= MOST_INDICES:
        for _ in range(count):
            index, at = _zigzag(payload, at)
            indices.append(index)
    if at < 0 or not 0 <= count <= MOST_INDICES or any(index < 0 for index in indices):
        detail = f"no list of message indices follows the schema's id, but {payload[:8].hex(' ') or 'nothing'}"
        return Refusal.at(DECODE, Problem(Reason.MALFORMED_RECORD, detail))
    return tuple(indices) or (0,), payload[at:]


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends); the end is −1 from where the data ran out, or the number is too long."""
    number = 0
    if at < 0:
        return 0, -1
    for k, byte in enumerate(data[at : at + LONGEST_VARINT]):
        number |= (byte & 0x7F) << (7 * k)
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), at + k + 1
    return 0, -1
