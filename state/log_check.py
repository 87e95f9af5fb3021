"""A look at RocksDB's logs before it opens them: one kind of damage makes it wait for ever instead of refusing.

Logs and MANIFEST are blocks of 32 KiB of records: u32 crc, u16 length, u8 type, and length bytes. Types 5 to 8 belong
to recycled logs, which a store never has; where one stands for a 1 (a single flipped bit), RocksDB reads the same
record again and again. All other damage it finds by itself.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK_BYTES = 32_768
_HEADER = struct.Struct("<IHB")
_RECYCLED = range(5, 9)
_LAST_TYPE = 8


def endless_record(path: Path) -> str | None:
    """The first place in a store's logs that RocksDB would not get past; None where there is none."""
    for file in (*path.glob("MANIFEST-*"), *path.glob("*.log")):
        for place, kind in _records(file):
            if kind in _RECYCLED:
                return f"{file.name} has a record of type {kind} at byte {place:,}, which is never written there"
    return None


def _records(file: Path) -> Iterator[tuple[int, int]]:
    """(place, type) of each record, up to the first header that is none."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place, size = 0, len(data)
            while place + _HEADER.size <= size:
                left = _BLOCK_BYTES - place % _BLOCK_BYTES
                if left < _HEADER.size:
                    place += left
                    continue
                _, length, kind = _HEADER.unpack_from(data, place)
                if not 0 < kind <= _LAST_TYPE or length > left - _HEADER.size:
                    return
                yield place, kind
                place += _HEADER.size + length
    except (OSError, ValueError):  # it is gone since, may not be read, or is empty: RocksDB has its say
        return
