"""The bytes of histories: the book's record, users' heads, and their events in chunks. Pure: bytes and arrays, no disk.

Where they lie, ``state.keys`` says. All is little-endian, and each begins with what makes it safe to read back:

    0   u32  crc32 of all that follows      4   u16  version (1)      6   u16  number of entries (0 but in chunks)

    book    8   u64  threshold: users whose sampling hash, the CRC-32 of their ids, is below it are kept
            16  i64  since: the store's offset when the book began; rows that end there or before came without histories
            24  i64  users      32  i64  events      40  i64  keys (heads and chunks)      48  i64  events_per_user
    head    8   u32  bytes of the id      12  u32  n, feature columns
            16  u32  columns[n]     f32  weights[n]     the id
    chunk   8   u64  entries, 32 at most

An entry is what the kernel writes into a row's ring (``learner.user_state``). Chunk k holds the user's events
32k … 32k + 31, counted from 0; all but a user's last one are full. Bytes depend on the events alone, not on commits.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VERSION = 1
CHUNK_EVENTS = 32
"""264 bytes a chunk: an event is written again 16 times on average until its chunk is full, where each is a commit"""
ALL_USERS = 1 << 32
"""The threshold below which every sampling hash is"""
_HEAD = struct.Struct("<IHH")
_BOOK = struct.Struct("<Qqqqqq")
_SIZES = struct.Struct("<II")
_CHECKSUM = struct.Struct("<I")
_HEADER_WORD = VERSION << 32
"""A chunk's first 8 bytes as one word, without checksum and count"""
_SPREAD = CHUNK_EVENTS + 1
"""Words of a full chunk"""


@dataclass(frozen=True, slots=True)
class Book:
    """What a store says of the histories it keeps."""

    threshold: int
    since: int
    users: int
    events: int
    keys: int
    events_per_user: int

    def encode(self) -> bytes:
        """As stored."""
        return _sealed(_BOOK.pack(self.threshold, self.since, self.users, self.events, self.keys, self.events_per_user))

    @staticmethod
    def decode(packed: bytes) -> Book:
        """ValueError says what is wrong with it."""
        body = _checked("the record of the histories", packed)
        if len(body) != _BOOK.size:
            raise ValueError(f"the record of the histories has {len(packed)} bytes")
        return Book(*_BOOK.unpack(body))


class Head(NamedTuple):
    """Whose history it is."""

    user: bytes
    columns: NDArray[np.int64]
    """(n,) encoded feature columns"""
    weights: NDArray[np.float32]
    """(n,)"""

    def encode(self) -> bytes:
        """As stored."""
        body = _SIZES.pack(len(self.user), len(self.columns)) + self.columns.astype("<u4").tobytes()
        return _sealed(body + self.weights.astype("<f4").tobytes() + self.user)

    @staticmethod
    def decode(packed: bytes) -> Head:
        """ValueError says what is wrong with it."""
        body = _checked("the head of a history", packed)
        id_bytes, count = _SIZES.unpack_from(body) if len(body) >= _SIZES.size else (0, 0)
        if len(body) != _SIZES.size + 8 * count + id_bytes:
            raise ValueError(f"the head of a history has {len(packed)} bytes")
        columns = np.frombuffer(body, "<u4", count, _SIZES.size).astype(np.int64)
        weights = np.frombuffer(body, "<f4", count, _SIZES.size + 4 * count).astype(np.float32)
        return Head(body[len(body) - id_bytes :], columns, weights)


def encode_chunks(
    lengths: NDArray[np.int64], user: NDArray[np.int64], place: NDArray[np.int64], entries: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], list[bytes]]:
    """(user of each chunk, the chunks): those of s users, one user after the other, each from a chunk's first event.

    ``lengths`` (s,) events of each user. Entry t, of them all in any order, is event ``place[t]`` of ``user[t]``.
    """
    counts = -(-lengths // CHUNK_EVENTS)
    words_first = np.cumsum(lengths + counts) - (lengths + counts)
    owner = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.minimum(lengths[owner] - CHUNK_EVENTS * number, CHUNK_EVENTS)
    first = words_first[owner] + _SPREAD * number
    words = np.zeros(int((lengths + counts).sum()), "<u8")
    words[first] = _HEADER_WORD + (held << 48)
    words[words_first[user] + place + place // CHUNK_EVENTS + 1] = entries
    raw = words.view(np.uint8).data
    spans = list(zip((8 * first).tolist(), (8 * (first + held + 1)).tolist(), strict=True))
    words[first] |= np.array([zlib.crc32(raw[start + 4 : stop]) for start, stop in spans], np.uint64)
    packed = words.tobytes()
    return owner, [packed[start:stop] for start, stop in spans]


def decode_chunks(chunks: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """(events of each chunk, the entries of all, one after the other). ValueError says what is wrong with one."""
    for packed in chunks:
        body = _checked("a chunk of a history", packed, len(packed) // 8 - 1)
        if not 8 <= len(body) <= 8 * CHUNK_EVENTS or len(body) % 8:
            raise ValueError(f"a chunk of a history has {len(packed)} bytes")
    lengths = np.fromiter(map(len, chunks), np.int64, len(chunks)) // 8
    words = np.frombuffer(b"".join(chunks), "<u8").astype(np.uint64)
    return lengths - 1, np.delete(words, np.cumsum(lengths) - lengths)


def chunk_events(packed: bytes) -> int:
    """How many events a chunk has, by its length alone: for one that goes, whatever it holds."""
    return max(len(packed) - _HEAD.size, 0) // 8


def oldest_chunk(book: Book, events: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) the first chunk that is kept of a user with so many events."""
    oldest: NDArray[np.int64] = np.maximum(events - book.events_per_user, 0) // CHUNK_EVENTS
    return oldest


def unbroken(chunks: Sequence[bytes | None], last_events: int) -> list[bytes]:
    """The latest chunks without a gap, of which the last one has so many events."""
    whole: list[bytes] = []
    for packed in reversed(chunks):
        if packed is None or chunk_events(packed) != (CHUNK_EVENTS if whole else last_events):
            break
        whole.insert(0, packed)
    return whole


def _sealed(body: bytes) -> bytes:
    rest = _HEAD.pack(0, VERSION, 0)[_CHECKSUM.size :] + body
    return _CHECKSUM.pack(zlib.crc32(rest)) + rest


def _checked(name: str, packed: bytes, entries: int = 0) -> bytes:
    """What follows the header."""
    if len(packed) < _HEAD.size:
        raise ValueError(f"{name} has {len(packed)} bytes")
    crc, version, count = _HEAD.unpack_from(packed)
    if zlib.crc32(memoryview(packed)[_CHECKSUM.size :]) != crc:
        raise ValueError(f"{name} fails its checksum")
    if version != VERSION:
        raise ValueError(f"{name} is of version {version}, this program reads {VERSION}")
    if count != entries:
        raise ValueError(f"{name} says {count} entries and has {entries}")
    return packed[_HEAD.size :]
