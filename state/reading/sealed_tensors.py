"""A safetensors file that is read in part and verified in part: opening it costs the same whatever its size.

The file is what the format says (u64 length, JSON header, data; any safetensors reader takes it), and three things
more: tensors start at multiples of their item size, the last one, ``checks``, holds a CRC-32 of every BLOCK_BYTES of
the data before it, and ``__metadata__`` holds ``seal``, the SHA-256 of ``checks`` and of the header without the seal.
Opening verifies the seal; a block is verified when it is first used. So a changed byte is found before it counts, and
what is not asked for is not read. It guards against damage, not against malice.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.exceptions import StoreDamaged, StoreUnreadable

BLOCK_BYTES = 16_384
"""Verified at once: what one look-up touches costs some 10 µs a block, and a million items have 30 kB of checks"""
CHECKS = "checks"
_DTYPES = {"U64": np.uint64, "I64": np.int64, "F64": np.float64, "U32": np.uint32, "F32": np.float32, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8
_MOST_HEADER = 1 << 20
"""Bytes of a header that is believed: ours have some hundred a tensor"""

Array = NDArray[Any]


def write_sealed(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Writes the file whole or not at all: beside its place first, then by a rename."""
    ordered = sorted(tensors.items(), key=lambda named: -named[1].dtype.itemsize)  # so each starts aligned
    header, end = _laid_out(ordered)
    checks = np.fromiter(_checks([array for _, array in ordered]), np.uint32)
    gap = -end % checks.itemsize
    header["padding"] = _entry(np.zeros(gap, np.uint8), end)
    header[CHECKS] = _entry(checks, end + gap)
    sealed = {**metadata, "seal": _seal(header, metadata, checks)}
    text = json.dumps({"__metadata__": sealed, **header}, ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in (*(array for _, array in ordered), np.zeros(gap, np.uint8), checks):
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class SealedTensors:
    """A file of ``write_sealed``, mapped into memory. Nothing in it is copied but what ``rows`` gives.

    Raises StoreUnreadable where there is none, StoreDamaged where it is not as it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _mapped(path)
        try:
            self.metadata, self._places, start = _header(self._map)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"has no header of ours ({error})") from error
        self._views: dict[str, Array] = {}
        self._data = memoryview(self._map)[start:]
        self._checks = self._read_checks()
        self._verified = bytearray(len(self._checks))

    def has(self, name: str) -> bool:
        """Whether the file holds it."""
        return name in self._places

    def whole(self, name: str) -> Array:
        """A tensor, read-only."""
        self._verify(*self._places[name][2:])
        return self._view(name)

    def part(self, name: str, start: int, stop: int) -> Array:
        """Its rows from ``start`` to ``stop``, read-only."""
        array = self._view(name)
        first, row = self._places[name][2], array.nbytes // max(len(array), 1)
        self._verify(first + start * row, first + stop * row)
        return array[start:stop]

    def rows(self, name: str, places: NDArray[np.int64]) -> Array:
        """A copy of some rows, in the order of ``places``."""
        array = self._view(name)
        first, row = self._places[name][2], array.nbytes // max(len(array), 1)
        for place in places.tolist():
            self._verify(first + place * row, first + (place + 1) * row)
        return array[places]

    def length(self, name: str) -> int:
        """Rows of a tensor; 0 where there is none of that name."""
        return int(self._places[name][1][0]) if name in self._places else 0

    def _view(self, name: str) -> Array:
        if name not in self._views:
            dtype, shape, first, last = self._places[name]
            self._views[name] = np.frombuffer(self._data[first:last], dtype).reshape(shape)
        return self._views[name]

    def _verify(self, start: int, stop: int) -> None:
        """That these bytes of the data are what was written; each block is looked at once."""
        if start >= stop:
            return
        for block in range(start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1):
            if self._verified[block]:
                continue
            end = min((block + 1) * BLOCK_BYTES, self._end)
            if zlib.crc32(self._data[block * BLOCK_BYTES : end]) != self._checks[block]:
                raise self._damaged(f"fails its checksum near byte {block * BLOCK_BYTES:,} of its data")
            self._verified[block] = 1

    def _read_checks(self) -> NDArray[np.uint32]:
        checks: NDArray[np.uint32] = self._view(CHECKS)
        header = {name: _entry(self._view(name), place[2]) for name, place in self._places.items()}
        metadata = {name: text for name, text in self.metadata.items() if name != "seal"}
        if self.metadata.get("seal") != _seal(header, metadata, checks):
            raise self._damaged("does not match its seal")
        self._end = max(
            (place[3] for name, place in self._places.items() if name not in (CHECKS, "padding")), default=0
        )
        return checks

    def _damaged(self, what: str) -> StoreDamaged:
        return StoreDamaged(f"{self.path} {what}: it is damaged or foreign; restore it, or run again")


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise StoreDamaged(f"{path} is empty: restore it, or run again") from error
    except OSError as error:
        raise StoreUnreadable(f"{path} cannot be read: {error.strerror}; check the path and its rights") from error


def _header(data: mmap.mmap) -> tuple[dict[str, str], dict[str, tuple[np.dtype[Any], tuple[int, ...], int, int]], int]:
    """(metadata, name -> (dtype, shape, first byte, byte after the last), where the data starts), within the file."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= min(_MOST_HEADER, len(data) - 8):
        raise ValueError(f"a header of {length:,} bytes")
    header = json.loads(data[8 : 8 + length])
    metadata, places = header.pop("__metadata__"), {}
    for name, entry in header.items():
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(map(int, entry["shape"]))
        first, last = map(int, entry["data_offsets"])
        size = dtype.itemsize
        for width in shape:
            size *= width
        if min((0, *shape)) < 0 or first < 0 or last - first != size or last > len(data) - 8 - length:
            raise ValueError(f"{name} lies outside the file")
        places[name] = dtype, shape, first, last
    if max(last for *_, last in places.values()) != len(data) - 8 - length:
        raise ValueError("the file is longer than what it names")
    return metadata, places, 8 + length


def _laid_out(tensors: list[tuple[str, Array]]) -> tuple[dict[str, Any], int]:
    header, end = {}, 0
    for name, array in tensors:
        header[name] = _entry(array, end)
        end += array.nbytes
    return header, end


def _entry(array: Array, start: int) -> dict[str, Any]:
    return {
        "dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, start + array.nbytes],
    }  # fmt: skip


def _checks(arrays: list[Array]) -> list[int]:
    """The CRC-32 of every block of the arrays' bytes, one array after the other."""
    checks, crc, room = [], 0, BLOCK_BYTES
    for array in arrays:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        at = 0
        while at < len(data):
            piece = data[at : at + room]
            crc, at, room = zlib.crc32(piece, crc), at + len(piece), room - len(piece)
            if room == 0:
                checks.append(crc)
                crc, room = 0, BLOCK_BYTES
    return [*checks, crc] if room < BLOCK_BYTES else checks


def _seal(header: Mapping[str, Any], metadata: Mapping[str, str], checks: Array) -> str:
    canonical = json.dumps([dict(metadata), dict(header)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode() + checks.tobytes()).hexdigest()
