"""Blocks cut into records that a broker takes, and put together again. Pure. A record's value, little-endian:

    0  u32  FORMAT    4  u32  crc32 of all that follows    8  16 bytes  BLAKE2b of the block
    24 u32  k         28 u32  n                            32 u64  bytes of the block     40 …  its k-th piece, k < n

All pieces but the last have the same size. Pieces of one block come in order, each perhaps more than once; those of
different senders (record keys) interleave as they like.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from streams.meta.messages.packing import MOST_BYTES, MessageRefused

FORMAT = 1
MAX_BYTES = 900_000
"""Of a record: brokers refuse more than a million unless they are told otherwise"""
KNOWN = 4_096
"""Senders whose last refused block is remembered, so that it is counted once and not for each of its pieces"""
_HEAD = struct.Struct("<II16sIIQ")
_CHECKED = 8
_ID_BYTES = 16
PIECE = MAX_BYTES - _HEAD.size

Refuse = Callable[[MessageRefused], None]


class Chunk(NamedTuple):
    """One piece of a block."""

    id: bytes
    number: int
    of: int
    total: int
    """Bytes of the block"""
    piece: bytes


def cut(block: bytes) -> list[bytes]:
    """The values of the records that hold a block, one at least."""
    identity = _identity(block)
    count = max(1, -(-len(block) // PIECE))
    values = []
    for k in range(count):
        piece = block[k * PIECE : (k + 1) * PIECE]
        head = _HEAD.pack(FORMAT, 0, identity, k, count, len(block))
        crc = zlib.crc32(piece, zlib.crc32(head[_CHECKED:]))
        values.append(_HEAD.pack(FORMAT, crc, identity, k, count, len(block)) + piece)
    return values


def read_chunk(value: bytes, what: str) -> Chunk:
    """Raises MessageRefused: "damaged", "format", "size" or "shape"."""
    if len(value) < _HEAD.size:
        raise MessageRefused("damaged", f"{what} has {len(value)} bytes")
    form, crc, identity, k, count, total = _HEAD.unpack_from(value)
    if form != FORMAT:
        raise MessageRefused("format", f"{what} is of format {form}, this program reads {FORMAT}")
    if zlib.crc32(memoryview(value)[_CHECKED:]) != crc:
        raise MessageRefused("damaged", f"{what} fails its checksum")
    if total > MOST_BYTES:
        raise MessageRefused("size", f"{what} is of a block of {total:,} bytes, more than {MOST_BYTES:,}")
    piece = value[_HEAD.size :]
    if count != max(1, -(-total // PIECE)) or k >= count or len(piece) != min(PIECE, total - k * PIECE):
        raise MessageRefused("shape", f"{what} is piece {k} of {count} of {total:,} bytes, and has {len(piece):,}")
    return Chunk(identity, k, count, total, piece)


def joined(values: list[bytes], what: str) -> bytes:
    """The block of all its records in order. Raises MessageRefused, "incomplete" too."""
    chunks = [read_chunk(value, what) for value in values]
    if [c.number for c in chunks] != list(range(chunks[0].of)) or len({c.id for c in chunks}) != 1:
        raise MessageRefused("incomplete", f"{what} is not all there")
    block = b"".join(c.piece for c in chunks)
    if _identity(block) != chunks[0].id:
        raise MessageRefused("damaged", f"{what} is not the block that its pieces name")
    return block


@dataclass(slots=True)
class _Partial:
    id: bytes
    offset: int
    """Of its first record"""
    count: int
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0


class Assembler:
    """Puts blocks together, at most one for each sender at a time, in bounded memory; ``refuse`` is told of the rest.

    A block that another one of the same sender replaces, whose pieces do not follow each other, or that is the oldest
    when memory is full, is refused as "incomplete". Other senders' blocks go on.
    """

    def __init__(self, refuse: Refuse, max_bytes: int = 2 * MOST_BYTES) -> None:
        self._refuse = refuse
        self._max_bytes = max_bytes
        self._open: dict[bytes, _Partial] = {}
        self._refused: dict[bytes, bytes] = {}
        """Sender -> its last refused block"""

    @property
    def first_offset(self) -> int | None:
        """Of the oldest record that a block still needs; None: nothing is open."""
        return min((partial.offset for partial in self._open.values()), default=None)

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(partial.size for partial in self._open.values())

    def add(self, offset: int, sender: bytes, value: bytes) -> bytes | None:
        """The block that this record completes, if it does; ``offset`` rises from call to call."""
        try:
            chunk = read_chunk(value, f"the record at offset {offset} of sender {sender!a}")
        except MessageRefused as error:
            self._refuse(error)
            return None
        partial = self._partial(offset, sender, chunk)
        if partial is None or chunk.number < len(partial.pieces):
            return None
        partial.pieces.append(chunk.piece)
        partial.size += len(chunk.piece)
        if len(partial.pieces) < partial.count:
            self._make_room(sender)
            return None
        del self._open[sender]
        block = b"".join(partial.pieces)
        if _identity(block) != chunk.id:
            self._refuse(MessageRefused("damaged", f"the block of sender {sender!a} is not what its records name"))
            return None
        return block

    def _partial(self, offset: int, sender: bytes, chunk: Chunk) -> _Partial | None:
        """Where the piece belongs; None where it is of no use."""
        partial = self._open.get(sender)
        if partial is not None and (partial.id != chunk.id or chunk.number > len(partial.pieces)):
            if partial.id != chunk.id and chunk.number > 0:
                self._without_start(sender, chunk)
                return None
            self._drop(sender, "the next piece, or another block, came before its end")
            partial = None
        if partial is None:
            if chunk.number > 0:
                self._without_start(sender, chunk)
                return None
            partial = self._open[sender] = _Partial(chunk.id, offset, chunk.of)
        return partial

    def _without_start(self, sender: bytes, chunk: Chunk) -> None:
        if self._refused.get(sender) != chunk.id:
            self._remember(sender, chunk.id)
            self._refuse(MessageRefused("incomplete", f"the start of a block of sender {sender!a} is missing"))

    def _drop(self, sender: bytes, why: str) -> None:
        partial = self._open.pop(sender)
        self._remember(sender, partial.id)
        message = f"of a block of sender {sender!a} {len(partial.pieces)} of {partial.count} pieces came: {why}"
        self._refuse(MessageRefused("incomplete", message))

    def _make_room(self, sender: bytes) -> None:
        while self.size > self._max_bytes:
            oldest = min(self._open, key=lambda each: self._open[each].offset)
            self._drop(oldest, f"more than {self._max_bytes:,} bytes wait for their end")
            if oldest == sender:
                return

    def _remember(self, sender: bytes, identity: bytes) -> None:
        if len(self._refused) >= KNOWN:
            self._refused.clear()
        self._refused[sender] = identity


def _identity(block: bytes) -> bytes:
    return hashlib.blake2b(block, digest_size=_ID_BYTES).digest()
