"""Which partition of a topic a key belongs to: murmur2, as Java's default partitioner has it.

Producers built on librdkafka hash with CRC-32 unless ``partitioner=murmur2_random`` is set: their keys lie elsewhere.

Symbols: N keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

_SEED = 0x9747B28C
_MIX = np.uint32(0x5BD1E995)
_SHIFT = np.uint32(24)
_POSITIVE = 0x7FFFFFFF
_compiled: Any = njit(cache=True, nogil=True)


@_compiled
def _murmur2(data, start, length):  # type: ignore[no-untyped-def]
    """Hash of ``data[start : start + length]`` as an unsigned word."""
    crossed = np.uint32(_SEED) ^ np.uint32(length)
    whole = length // 4
    for i in range(whole):
        at = start + 4 * i
        k = np.uint32(data[at]) | np.uint32(data[at + 1]) << np.uint32(8)
        k |= np.uint32(data[at + 2]) << np.uint32(16) | np.uint32(data[at + 3]) << np.uint32(24)
        k = np.uint32(k * _MIX)
        k ^= k >> _SHIFT
        k = np.uint32(k * _MIX)
        crossed = np.uint32(np.uint32(crossed * _MIX) ^ k)
    at = start + 4 * whole
    if length % 4 == 3:
        crossed ^= np.uint32(data[at + 2]) << np.uint32(16)
    if length % 4 >= 2:
        crossed ^= np.uint32(data[at + 1]) << np.uint32(8)
    if length % 4 >= 1:
        crossed ^= np.uint32(data[at])
        crossed = np.uint32(crossed * _MIX)
    crossed ^= crossed >> np.uint32(13)
    crossed = np.uint32(crossed * _MIX)
    return np.uint32(crossed ^ crossed >> np.uint32(15))


@_compiled
def _partitions(data, start, length, partitions, found):  # type: ignore[no-untyped-def]
    for n in range(len(start)):
        found[n] = np.int64(_murmur2(data, start[n], length[n]) & np.uint32(_POSITIVE)) % partitions


def partitions_of(
    data: NDArray[np.uint8], start: NDArray[np.int64], length: NDArray[np.int64], partitions: int
) -> NDArray[np.int32]:
    """(N,) the partition of each key ``data[start[n] : start[n] + length[n]]``.

    Raises:
        ValueError: there is no partition, or a key reaches outside ``data`` (one that is absent, too).
    """
    if partitions < 1:
        raise ValueError(f"a topic has at least one partition, not {partitions}")
    if len(start) and (start.min() < 0 or length.min() < 0 or (start + length).max() > len(data)):
        raise ValueError(f"a key reaches outside its {len(data)} bytes")
    found = np.empty(len(start), dtype=np.int32)
    _partitions(data, start, length, partitions, found)
    return found


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of one key. Raises ValueError as ``partitions_of`` does."""
    data = np.frombuffer(key, dtype=np.uint8)
    return int(partitions_of(data, np.zeros(1, np.int64), np.array([len(key)], np.int64), partitions)[0])


def murmur2(key: bytes) -> int:
    """The hash as Java has it: signed, 32 bits."""
    return int(np.uint32(_murmur2(np.frombuffer(key, dtype=np.uint8), 0, len(key))).astype(np.int32))
