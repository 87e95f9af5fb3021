"""The bytes by which a store and its changelog know of each other. Pure. Little-endian; all begin with the same head:

0   u32  version (1)        4   u32  crc32 of all that follows

Standing, in the store          Owner, in the changelog        Entry, in the store
8   16 bytes  session           8   16 bytes  session          8   u32  U users     12  u32  D deleted
24  i64  position               24  u64  sequence              16  u32  length of each id [U + D]
32  i64  known_at_ms                                           …   the ids, and then the payload, one after another
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

VERSION = 1
SESSION_BYTES = 16
NO_SESSION = bytes(SESSION_BYTES)
"""Of a store that nobody publishes from"""

_HEAD = struct.Struct("<II")
_STANDING = struct.Struct(f"<{SESSION_BYTES}sqq")
_OWNER = struct.Struct(f"<{SESSION_BYTES}sQ")
_COUNTS = struct.Struct("<II")
_LENGTH = np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Standing:
    """How a store stands to its changelog."""

    session: bytes
    """(SESSION_BYTES,) of the incarnation that publishes from this store; drawn anew whenever one opens it"""
    position: int
    """The store has in it what the changelog holds before this offset"""
    known_at_ms: int
    """No record from ``position`` on was in the changelog before this time: the store may lack no older tombstone"""

    def encode(self) -> bytes:
        """As stored. ValueError for a session of another length."""
        _check_session(self.session)
        return _headed(_STANDING.pack(self.session, self.position, self.known_at_ms))

    @staticmethod
    def decode(packed: bytes) -> Standing:
        """ValueError says what is wrong with it."""
        return Standing(*_fields(_STANDING, packed, "the standing"))


@dataclass(frozen=True, slots=True)
class Owner:
    """Who wrote a marker of the changelog, and which of its commits the marker ends."""

    session: bytes
    """(SESSION_BYTES,)"""
    sequence: int
    """Of the last commit told; it rises within a session"""

    def encode(self) -> bytes:
        """As sent. ValueError for a session of another length."""
        _check_session(self.session)
        return _headed(_OWNER.pack(self.session, self.sequence))

    @staticmethod
    def decode(packed: bytes) -> Owner:
        """ValueError says what is wrong with it."""
        return Owner(*_fields(_OWNER, packed, "the owner"))


@dataclass(frozen=True, slots=True)
class Entry:
    """A commit that the changelog has not acknowledged."""

    sequence: int
    """Its key says it"""
    users: tuple[bytes, ...]
    """Whose rows it wrote"""
    deleted: tuple[bytes, ...]
    """Who were taken out"""
    payload: bytes
    """What else is to be told of it, opaque here"""

    @staticmethod
    def decode(sequence: int, packed: bytes) -> Entry:
        """ValueError says what is wrong with it."""
        name = f"entry {sequence} of the outbox"
        body = _body(packed, name)
        if len(body) < _COUNTS.size:
            raise ValueError(f"{name} has {len(packed)} bytes")
        users, deleted = _COUNTS.unpack_from(body)
        start = _COUNTS.size + _LENGTH.itemsize * (users + deleted)
        if len(body) < start:
            raise ValueError(f"{name} ends within the lengths of its {users + deleted} ids")
        lengths = np.frombuffer(body, _LENGTH, users + deleted, _COUNTS.size).tolist()
        ends = list(accumulate(lengths, initial=start))
        if ends[-1] > len(body):
            raise ValueError(f"{name} ends within its ids")
        ids = tuple(body[first:last] for first, last in pairwise(ends))
        return Entry(sequence, ids[:users], ids[users:], body[ends[-1] :])


def encode_entry(users: Sequence[bytes], deleted: Sequence[bytes], payload: bytes) -> bytes:
    """An ``Entry`` as stored."""
    lengths = np.empty(len(users) + len(deleted), _LENGTH)
    lengths[: len(users)] = np.fromiter(map(len, users), _LENGTH, len(users))
    lengths[len(users) :] = np.fromiter(map(len, deleted), _LENGTH, len(deleted))
    return _headed(b"".join([_COUNTS.pack(len(users), len(deleted)), lengths.tobytes(), *users, *deleted, payload]))


def _check_session(session: bytes) -> None:
    if len(session) != SESSION_BYTES:
        raise ValueError(f"a session has {SESSION_BYTES} bytes, not {len(session)}: secrets.token_bytes draws one")


def _headed(body: bytes) -> bytes:
    return _HEAD.pack(VERSION, zlib.crc32(body)) + body


def _body(packed: bytes, name: str) -> bytes:
    if len(packed) < _HEAD.size:
        raise ValueError(f"{name} has {len(packed)} bytes")
    version, crc = _HEAD.unpack_from(packed)
    if version != VERSION:
        raise ValueError(f"{name} is of version {version}, this program reads {VERSION}")
    body = packed[_HEAD.size :]
    if zlib.crc32(body) != crc:
        raise ValueError(f"{name} fails its checksum")
    return body


def _fields(form: struct.Struct, packed: bytes, name: str) -> tuple[Any, ...]:
    body = _body(packed, name)
    if len(body) != form.size:
        raise ValueError(f"{name} has {len(packed)} bytes, not {_HEAD.size + form.size}")
    return form.unpack(body)
