"""Zigzag varints, compiled: 0, -1, 1, -2 … as 0, 1, 2, 3 …, seven bits a byte, low ones first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

NO_NUMBER = -1
"""In place of where the next one starts: there is no whole number here."""
_MOST_BITS = 63
"""Where the tenth and last byte of a 64-bit number goes"""
_inlined: Any = njit(cache=True, nogil=True, forceinline=True)


@_inlined
def read_varint(data, at, stop):  # type: ignore[no-untyped-def]
    """The number at ``at`` and where the next one starts; it reads nothing from ``stop`` on."""
    if at < stop and data[at] < np.uint8(0x80):
        byte = np.int64(data[at])
        return byte >> 1 ^ -(byte & 1), at + 1
    rest, shift = np.uint64(0), 0
    while at < stop and shift <= _MOST_BITS:
        byte = data[at]
        rest |= np.uint64(byte & np.uint8(0x7F)) << np.uint64(shift)
        at += 1
        if byte < np.uint8(0x80):
            return np.int64(rest >> np.uint64(1)) ^ -np.int64(rest & np.uint64(1)), at
        shift += 7
    return np.int64(0), NO_NUMBER


@_inlined
def varint_bytes(number):  # type: ignore[no-untyped-def]
    """How many bytes the number takes."""
    rest = np.uint64(number << 1 ^ number >> 63)
    count = 1
    while rest >= np.uint64(0x80):
        rest >>= np.uint64(7)
        count += 1
    return count


@_inlined
def write_varint(data, at, number):  # type: ignore[no-untyped-def]
    """Writes the number at ``at``; returns where the next one goes."""
    rest = np.uint64(number << 1 ^ number >> 63)
    while rest >= np.uint64(0x80):
        data[at] = np.uint8(rest & np.uint64(0x7F)) | np.uint8(0x80)
        rest >>= np.uint64(7)
        at += 1
    data[at] = np.uint8(rest)
    return at + 1
