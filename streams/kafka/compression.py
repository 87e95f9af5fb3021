"""Opens what a producer compressed, within a bound: a few bytes can stand for gigabytes.

The codecs are the record format's: gzip, snappy (bare, or in xerial's frame as Java writes it), lz4, zstd.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import cramjam
import numpy as np
from numpy.typing import NDArray

NONE, GZIP, SNAPPY, LZ4, ZSTD = range(5)
NAMES = ("none", "gzip", "snappy", "lz4", "zstd")
_FRAMED: dict[int, Any] = {GZIP: cramjam.gzip, LZ4: cramjam.lz4, ZSTD: cramjam.zstd}
_FIRST_GUESS = 65_536
"""Bytes to try first; a frame does not tell how much it holds, and memory that is not written costs nothing"""
_USUAL_RATIO = 4
_GROWTH = 8
"""A guess that was too small is multiplied by this: all tries together cost a seventh more than the last."""
_NO_ROOM = "failed to write whole buffer"
"""What cramjam says when the output does not fit."""
_XERIAL = b"\x82SNAPPY\x00"
_XERIAL_HEADER_BYTES = 16
"""The mark and two version numbers, which say nothing that a reader needs"""


class CannotOpen(Exception):
    """Compressed bytes are broken, or hold more than the bound allows."""


def decompress(codec: int, packed: memoryview, limit: int) -> NDArray[np.uint8]:
    """The bytes that ``packed`` stands for, read-only.

    Raises:
        CannotOpen: the codec is unknown, the bytes are broken, or there are more than ``limit`` of them. At most
            that much memory was taken.
    """
    if codec == SNAPPY:
        opened = _open_snappy(packed, limit)
    elif codec in _FRAMED:
        opened = _open_framed(codec, packed, limit)
    else:
        raise CannotOpen(f"no codec has the number {codec}")
    opened.flags.writeable = False
    return opened


def _open_framed(codec: int, packed: memoryview, limit: int) -> NDArray[np.uint8]:
    size = min(max(_FIRST_GUESS, _USUAL_RATIO * len(packed)), limit)
    while True:
        output = np.empty(size, dtype=np.uint8)
        try:
            return output[: _FRAMED[codec].decompress_into(packed, output)]
        except cramjam.DecompressionError as error:
            if _NO_ROOM not in str(error):
                raise CannotOpen(f"{NAMES[codec]}: {error}") from None
            if size == limit:
                raise CannotOpen(f"{NAMES[codec]}: more than {limit} bytes") from None
        size = min(_GROWTH * size, limit)


def _open_snappy(packed: memoryview, limit: int) -> NDArray[np.uint8]:
    """Each block tells its size in front, so that the sum is known before any is opened."""
    try:
        blocks = list(_blocks(packed))
        sizes = [int(cramjam.snappy.decompress_raw_len(block)) for block in blocks]
        total = sum(sizes)
        if total > limit:
            raise CannotOpen(f"snappy: {total} bytes, more than {limit}")
        output = np.empty(total, dtype=np.uint8)
        at = 0
        for block, size in zip(blocks, sizes, strict=True):
            if cramjam.snappy.decompress_raw_into(block, output[at : at + size].data) != size:
                raise CannotOpen("snappy: a block is shorter than it says")
            at += size
    except cramjam.DecompressionError as error:
        raise CannotOpen(f"snappy: {error}") from None
    return output


def _blocks(packed: memoryview) -> Iterator[memoryview]:
    """The snappy blocks; bare ones are a single block."""
    if bytes(packed[: len(_XERIAL)]) != _XERIAL:
        yield packed
        return
    if len(packed) < _XERIAL_HEADER_BYTES:
        raise CannotOpen("snappy: the frame's header is cut off")
    at = _XERIAL_HEADER_BYTES
    while at < len(packed):
        if len(packed) - at < 4:
            raise CannotOpen("snappy: the last block has no length")
        (length,) = struct.unpack_from(">i", packed, at)
        at += 4
        if not 0 < length <= len(packed) - at:
            raise CannotOpen(f"snappy: a block of {length} bytes where {len(packed) - at} are left")
        yield packed[at : at + length]
        at += length
