"""Spans of bytes to dictionary codes, compiled: the distinct ids of a batch without an object for each event.

Symbols: N spans, U distinct ones.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from streams.decoding.id_hash import hash_span

_LINE_END = 0x0A
_SMALLEST_TABLE = 1 << 10


class Distinct(NamedTuple):
    """N spans by their distinct contents, in order of first appearance."""

    code: NDArray[np.int32]
    """(N,) the caller's to keep"""
    first: NDArray[np.int64]
    """(U,) the span where each content appears first; good until the next call"""


class SpanIndex:
    """An open-addressing table whose memory is used again for every batch. Not for several threads at once."""

    def __init__(self) -> None:
        self._seed = np.uint64(secrets.randbits(64))
        """So that nobody can choose ids that all lead to one place of the table; no result hangs on it."""
        self._table = np.zeros(0, np.int32)
        """Code + 1 of the content that a hash leads to; 0: none yet. Its length is a power of two, at least 2 N."""
        self._hashes = np.zeros(0, np.uint64)
        self._first = np.zeros(0, np.int64)

    def encode(self, data: NDArray[np.uint8], start: NDArray[np.int64], length: NDArray[np.int64]) -> Distinct:
        """The distinct contents of these spans of ``data``."""
        n = len(start)
        if 2 * n > len(self._table):
            self._table = np.zeros(max(_SMALLEST_TABLE, 1 << (2 * n - 1).bit_length()), np.int32)
            self._hashes = np.empty(len(self._table) // 2, np.uint64)
            self._first = np.empty(len(self._table) // 2, np.int64)
        code = np.empty(n, np.int32)
        size = min(max(_SMALLEST_TABLE, 1 << (2 * n).bit_length()), len(self._table))
        count = _encode(data, start, length, self._table[:size], self._hashes, self._first, code, self._seed)
        return Distinct(code, self._first[:count])


def texts(
    data: NDArray[np.uint8],
    start: NDArray[np.int64],
    length: NDArray[np.int64],
    first: NDArray[np.int64],
    prefix: str,
) -> tuple[str, ...]:
    """(U,) the UTF-8 texts of the spans ``first``, each behind the prefix.

    They are joined by line ends, decoded at once and split, which costs a quarter of decoding them one by one; unless
    one has a line end in it.
    """
    if not len(first):
        return ()
    head = np.frombuffer(prefix.encode(), np.uint8)
    room = int(length[first].sum()) + len(first) * (len(head) + 1)
    joined = np.empty(room, np.uint8)
    if _join(data, start, length, first, head, joined) and "\n" not in prefix:
        return tuple(str(joined[:-1].data, "utf-8").split("\n"))
    return tuple(prefix + data[start[k] : start[k] + length[k]].tobytes().decode() for k in first)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _encode(data, start, length, table, hashes, first, code, seed):  # type: ignore[no-untyped-def]
    """Fills ``code``, and ``first`` and ``hashes`` by code; returns U. Linear probing; the table is emptied before."""
    table[:] = 0
    mask = np.uint64(len(table) - 1)
    count = 0
    for row in range(len(start)):
        hashed = hash_span(data, start[row], length[row], seed)
        place = np.int64(hashed & mask)
        while True:
            known = table[place] - 1
            if known < 0:
                table[place] = count + 1
                hashes[count], first[count], code[row] = hashed, row, count
                count += 1
                break
            if hashes[known] == hashed and _equal(data, start, length, first[known], row):
                code[row] = known
                break
            place = (place + 1) & np.int64(mask)
    return count


@numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _equal(data, start, length, one, other):  # type: ignore[no-untyped-def]
    if length[one] != length[other]:
        return False
    a, b = start[one], start[other]
    for k in range(length[one]):  # noqa: SIM110 (numba takes no generators)
        if data[a + k] != data[b + k]:
            return False
    return True


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _join(data, start, length, first, head, joined):  # type: ignore[no-untyped-def]
    """Writes head, span and a line end for each of ``first``; returns whether no span has a line end in it."""
    at, clean = 0, True
    for row in first:
        for k in range(len(head)):
            joined[at + k] = head[k]
        at += len(head)
        for k in range(length[row]):
            byte = data[start[row] + k]
            clean &= byte != _LINE_END
            joined[at + k] = byte
        at += length[row]
        joined[at] = _LINE_END
        at += 1
    return clean
