"""The bytes of what a store holds: users' rows and a partition's progress. Pure: bytes and arrays, no disk.

A row on disk is the kernel's memory (``learner.user_state``) plus the two fields that make it safe to read back.
Little-endian; d, e, R and the head are the store's ``RowLayout``:

    0   u32  layout_version      24  i64  first_time_ms     56  u32  guarded
    4   u32  checksum            32  i64  last_time_ms      60  u32  owner
    8   u64  events              40  u64  ledger            64  f32  mean covariance second_mean second_covariance
    16  i64  last_offset         48  u64  meta_version          u64  ring[R]

- ``checksum``: the upper half of Σ c_k·word_k mod 2^64 over the row's 64-bit words, word 0 without the checksum
  itself: multilinear hashing (Lemire, Kaser 2013, arXiv 1202.4961), with c_k the k-th output of splitmix64, made odd.
  A single flipped bit is always found, any other change but for one in 2^32. It guards against damage, not malice.
- ``owner``: CRC-32 of the user's id. A row that is read under another user's id is refused.

Versions, and the way up, taken row by row when it is read:

    1   no checksum (0) and no owner (0); ring ages in hours (17-bit integer)
    2   as above

A partition's progress is one record, written with the rows that it covers:

    0   u32  version (2)     8   i64  offset, the last one applied    24  i64  users, rows held
    4   u32  crc32 of 8 …    16  u64  meta_version                    32  i64  events, the sum over all rows
    40  i64  written_at_ms, by the machine's clock      48  u32 + bytes  the expiry clock, opaque here

Version 1 was offset and meta_version alone (16 bytes, no checksum): its users and events are unknown (−1).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from operator import is_not

import numpy as np
from numpy.typing import NDArray

from learner.user_hash import user_crcs
from learner.user_state import LAYOUT_VERSION, RowLayout, Slab, age_code
from state.exceptions import RowDamaged

UNKNOWN = -1
"""Users and events of a store whose progress record is of version 1"""
PROGRESS_VERSION = 2

_PROGRESS_V1 = struct.Struct("<qQ")
_PROGRESS = struct.Struct("<qQqqqI")
_PROGRESS_HEAD = struct.Struct("<II")
_LOW_HALF = np.uint64(0xFFFFFFFF)
_AGE_BITS = np.uint64(0x1FFFF)


def owner(user: bytes) -> int:
    """The row's ``owner`` field for a user's id."""
    return zlib.crc32(user)


def owners(users: Sequence[bytes]) -> NDArray[np.uint32]:
    """(n,) ``owner`` of each id."""
    return user_crcs(users)


def encode(layout: RowLayout, users: Sequence[bytes], slab: Slab) -> list[bytes]:
    """n rows as stored: a slab (n, row_bytes), which is not changed, with version, owner and checksum put in.

    ValueError as ``seal``.
    """
    return seal(layout, users, np.array(slab, np.uint8, order="C"))


def seal(layout: RowLayout, users: Sequence[bytes], slab: Slab) -> list[bytes]:
    """As ``encode``; version, owner and checksum are put into the slab itself, unless it is read-only or not in order.

    ValueError if the slab is not one row of this layout for each user.
    """
    if slab.shape != (len(users), layout.row_bytes):
        raise ValueError(
            f"{len(users)} users and rows of shape {slab.shape}: this store holds rows of {layout.row_bytes} bytes"
        )
    sealed = np.require(slab, np.uint8, ["C", "W"])
    rows = layout.rows(sealed)
    rows["layout_version"] = LAYOUT_VERSION
    rows["owner"] = owners(users)
    rows["checksum"] = checksums(sealed)
    values: list[bytes] = sealed.view(f"V{layout.row_bytes}").ravel().tolist()
    return values


def decode(layout: RowLayout, users: Sequence[bytes], values: Sequence[bytes]) -> Slab:
    """A fresh slab (n, row_bytes) of n stored rows, all of them in the current version.

    Raises RowDamaged for the first user whose row is of another width, version or owner, or fails its checksum.
    """
    slab = _gathered(layout, users, values)
    rows = layout.rows(slab)
    sound = (rows["layout_version"] == LAYOUT_VERSION) & (rows["owner"] == owners(users))
    sound &= rows["checksum"] == checksums(slab)
    if not sound.all():
        _upgrade(layout, users, slab, np.flatnonzero(~sound))
    return slab


def decode_found(
    layout: RowLayout, users: Sequence[bytes], values: Sequence[bytes | None]
) -> tuple[Slab, NDArray[np.bool_]]:
    """(rows, found): as ``decode`` for users some of whom have no row (None): zeros stand there."""
    found = np.fromiter(map(is_not, values, repeat(None)), np.bool_, len(values))
    held = [value for value in values if value is not None]
    if len(held) == len(users):
        return decode(layout, users, held), found
    slab = np.zeros((len(values), layout.row_bytes), np.uint8)
    if held:
        slab[found] = decode(layout, [users[k] for k in np.flatnonzero(found).tolist()], held)
    return slab, found


def checksums(slab: Slab) -> NDArray[np.uint32]:
    """(n,) checksums of sealed rows (n, row_bytes); what stands in the checksum field does not count."""
    words = slab.view(np.uint64)
    factors = _factors(words.shape[1])
    total = np.einsum("ij,j->i", words[:, 1:], factors[1:])
    total += (words[:, 0] & _LOW_HALF) * factors[0]
    upper: NDArray[np.uint32] = (total >> np.uint64(32)).astype(np.uint32)
    return upper


@cache
def _factors(words: int) -> NDArray[np.uint64]:
    """c_k for k < words: splitmix64 seeded with 0 (Steele, Lea, Flood 2014), made odd."""
    word = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ word >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (word ^ word >> np.uint64(31)) | np.uint64(1)


def _gathered(layout: RowLayout, users: Sequence[bytes], values: Sequence[bytes]) -> Slab:
    joined = bytearray().join(values)
    if len(joined) != len(users) * layout.row_bytes or set(map(len, values)) - {layout.row_bytes}:
        user, value = next((u, v) for u, v in zip(users, values, strict=True) if len(v) != layout.row_bytes)
        raise RowDamaged(user, f"has {len(value)} bytes where {layout.fingerprint} has {layout.row_bytes}")
    return np.frombuffer(joined, np.uint8).reshape(len(users), layout.row_bytes)


def _upgrade(layout: RowLayout, users: Sequence[bytes], slab: Slab, places: NDArray[np.int64]) -> None:
    """Brings rows that are not of the current version up, in place; raises RowDamaged for one that has no way up."""
    versions = layout.rows(slab)["layout_version"]
    for version in np.unique(versions[places]).tolist():
        upgrade = _WAYS_UP.get(version)
        chosen = places[versions[places] == version]
        if upgrade is None:
            raise RowDamaged(users[chosen[0]], _damage(layout, users[chosen[0]], slab[chosen[0]]))
        upgrade(layout, [users[k] for k in chosen.tolist()], slab, chosen)


def _from_version_1(layout: RowLayout, users: Sequence[bytes], slab: Slab, places: NDArray[np.int64]) -> None:
    old = slab[places]
    rows = layout.rows(old)
    strange = (rows["checksum"] != 0) | (rows["owner"] != 0)
    if strange.any():
        k = int(np.flatnonzero(strange)[0])
        raise RowDamaged(users[k], "says that it is of version 1, but has a checksum, which those rows have not")
    ring = rows["ring"]
    used = np.arange(layout.ring) < rows["events"][:, None]
    ages = age_code((ring & _AGE_BITS).astype(np.int64) * 3600)
    rows["ring"] = np.where(used, (ring & ~_AGE_BITS) | ages, ring)
    rows["layout_version"] = LAYOUT_VERSION
    rows["owner"] = owners(users)
    rows["checksum"] = checksums(old)
    slab[places] = old


_WAYS_UP: dict[int, Callable[[RowLayout, Sequence[bytes], Slab, NDArray[np.int64]], None]] = {1: _from_version_1}
"""Layout version -> what brings rows of it up to the current one; users and places are in the same order."""


def _damage(layout: RowLayout, user: bytes, row: Slab) -> str:
    """What is wrong with a row that is not of an older version."""
    fields = layout.rows(row.reshape(1, -1))[0]
    if fields["checksum"] != checksums(row.reshape(1, -1))[0]:
        return "fails its checksum"
    if fields["layout_version"] != LAYOUT_VERSION:
        return f"is of layout version {fields['layout_version']}, this program reads up to {LAYOUT_VERSION}"
    return "is another user's row"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a partition's rows have come. Rows and progress are written in one atomic step."""

    offset: int
    """Last source offset applied"""
    meta_version: int
    users: int = UNKNOWN
    """Rows held"""
    events: int = UNKNOWN
    """Sum of all rows' ``events``"""
    written_at_ms: int = 0
    """When this was written, by the machine's clock; 0: unknown"""
    clock: bytes = b""
    """``state.expiry``'s clock, as it packs itself; empty without expiry"""

    def encode(self) -> bytes:
        """As stored."""
        body = _PROGRESS.pack(
            self.offset, self.meta_version, self.users, self.events, self.written_at_ms, len(self.clock)
        )
        body += self.clock
        return _PROGRESS_HEAD.pack(PROGRESS_VERSION, zlib.crc32(body)) + body

    @staticmethod
    def decode(packed: bytes) -> Progress:
        """Of any version. ValueError says what is wrong with it."""
        if len(packed) == _PROGRESS_V1.size:
            offset, version = _PROGRESS_V1.unpack(packed)
            return Progress(offset, version)
        if len(packed) < _PROGRESS_HEAD.size + _PROGRESS.size:
            raise ValueError(f"the progress record has {len(packed)} bytes")
        version, crc = _PROGRESS_HEAD.unpack_from(packed)
        if version != PROGRESS_VERSION:
            raise ValueError(f"the progress record is of version {version}, this program reads {PROGRESS_VERSION}")
        body = packed[_PROGRESS_HEAD.size :]
        if zlib.crc32(body) != crc:
            raise ValueError("the progress record fails its checksum")
        offset, meta_version, users, events, written_at_ms, clock_bytes = _PROGRESS.unpack_from(body)
        clock = body[_PROGRESS.size :]
        if len(clock) != clock_bytes:
            raise ValueError(f"the progress record holds {len(clock)} bytes of clock where it says {clock_bytes}")
        return Progress(offset, meta_version, users, events, written_at_ms, clock)
