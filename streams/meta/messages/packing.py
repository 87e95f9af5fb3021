"""A block: JSON and arrays in one piece of bytes. Pure. Little-endian:

    0  u32  FORMAT    4  u32  crc32 of all that follows    8  u32  H    12  H bytes  header    …  arrays

The header is JSON: ``kind`` says what the block is, ``content`` is the writer's, and ``arrays`` names each array with
its type, its shape, its bytes as stored, and whether those are deflated. Header and arrays are padded with zeros to 8
bytes. Gradients and parameters are stored as the float32 that they are: bfloat16 would halve them, but its 8 bits of
mantissa round every sum by 0.4 %, and a moment of Adam, to which a round adds a hundredth, would stand still.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.exceptions import ColdstreamError

FORMAT = 1
"""Raised when a reader of the old blocks would misread the new ones"""
MOST_BYTES = 1 << 28
"""Of a block once inflated: 256 histories of 2,500 events that all differ are half of it, at 64 dimensions"""
_HEAD = struct.Struct("<III")
_ALIGN = 8
_FASTEST = 1
_TYPES = {"<f4", "<f8", "<i8", "<i4", "<u4", "<u8", "|u1", "|b1"}

Array = NDArray[Any]


class MessageRefused(ColdstreamError):
    """Bytes that cannot be used. ``reason`` is one of the few words that are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Block(NamedTuple):
    """What ``unpack`` read. The arrays are read-only."""

    content: dict[str, Any]
    arrays: dict[str, Array]


def pack(kind: str, content: Mapping[str, Any], arrays: Mapping[str, Array], deflated: Collection[str] = ()) -> bytes:
    """A block. ``deflated``: arrays that are mostly zeros, or counts; ValueError for a type that no block holds."""
    entries, parts = [], []
    for name, array in arrays.items():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        if little.dtype.str not in _TYPES:
            raise ValueError(f"{name} is of {array.dtype}, which no block holds: give float32, float64 or integers")
        raw = little.tobytes()
        stored = zlib.compress(raw, _FASTEST) if name in deflated else raw
        entries.append([name, little.dtype.str, list(array.shape), len(stored), name in deflated])
        parts.append(_padded(stored))
    header = json.dumps(
        {"kind": kind, "content": content, "arrays": entries}, sort_keys=True, separators=(",", ":"), allow_nan=False
    ).encode()
    header += b" " * (-(_HEAD.size + len(header)) % _ALIGN)
    body = b"".join([struct.pack("<I", len(header)), header, *parts])
    return struct.pack("<II", FORMAT, zlib.crc32(body)) + body


def unpack(packed: bytes, kind: str, what: str) -> Block:
    """Raises MessageRefused: "damaged", "format", "size" or "shape"; ``what`` names the block in the message."""
    if len(packed) < _HEAD.size:
        raise MessageRefused("damaged", f"{what} has {len(packed)} bytes")
    form, crc, length = _HEAD.unpack_from(packed)
    if form != FORMAT:
        raise MessageRefused("format", f"{what} is of format {form}, this program reads {FORMAT}")
    if zlib.crc32(memoryview(packed)[8:]) != crc:
        raise MessageRefused("damaged", f"{what} fails its checksum")
    try:
        header = json.loads(packed[_HEAD.size : _HEAD.size + length])
        if header["kind"] != kind:
            raise ValueError(f"it is a {header['kind']}, not a {kind}")
        return Block(dict(header["content"]), _arrays(packed, _HEAD.size + length, header["arrays"], what))
    except (ValueError, KeyError, TypeError, OverflowError, zlib.error, RecursionError) as error:
        raise MessageRefused("shape", f"{what} does not hold what it should: {error}") from None


def _arrays(packed: bytes, start: int, entries: Sequence[Any], what: str) -> dict[str, Array]:
    found, total = {}, 0
    for name, type_, shape, stored, deflated in entries:
        if type_ not in _TYPES or min(shape, default=0) < 0:
            raise ValueError(f"{name} is {type_} {shape}")
        size = np.dtype(type_).itemsize * math.prod(shape)
        total += size
        if total > MOST_BYTES:
            raise MessageRefused("size", f"{what} holds more than {MOST_BYTES:,} bytes")
        raw: bytes | memoryview = memoryview(packed)[start : start + stored]
        if deflated:
            raw = zlib.decompressobj().decompress(raw, size + 1)
        if len(raw) != size:
            raise ValueError(f"{name} has {len(raw)} bytes, and {type_} {shape} has {size}")
        found[str(name)] = np.frombuffer(raw, type_).reshape(shape)
        start += stored + -stored % _ALIGN
    if start != len(packed):
        raise ValueError(f"{len(packed) - start} bytes follow the last array")
    return found


def pack_texts(texts: Sequence[str], name: str) -> dict[str, Array]:
    """(n) ids as two arrays: ``name``.text, their UTF-8 one after another, and ``name``.ends."""
    packed = [text.encode() for text in texts]
    ends = np.cumsum(np.fromiter(map(len, packed), np.int64, len(packed)))
    return {f"{name}.text": np.frombuffer(b"".join(packed), np.uint8), f"{name}.ends": ends}


def unpack_texts(arrays: Mapping[str, Array], name: str) -> tuple[str, ...]:
    """What ``pack_texts`` packed; each once. ValueError or KeyError for anything else."""
    text, ends = arrays[f"{name}.text"].tobytes(), [0, *arrays[f"{name}.ends"].tolist()]
    if ends[-1] != len(text) or any(last < first for first, last in pairwise(ends)):
        raise ValueError(f"the ids of {name} do not end where they should")
    found = tuple(text[first:last].decode() for first, last in pairwise(ends))
    if len(set(found)) < len(found):
        raise ValueError(f"an id comes twice in {name}")
    return found


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % _ALIGN)
