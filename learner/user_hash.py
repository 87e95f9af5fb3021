"""Users by chance, but always the same: shares of all users that are drawn by a hash of their id.

CRC-32 is linear: two salted CRCs of ids of one length differ by a constant, and a share drawn by one would be a share
drawn by the other. So each purpose mixes the CRC with its own salt, by murmur3's finalizer (Appleby, public domain).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CANARY, HELD_OUT, OFFLINE = 0x2545F491, 0x9E3779B9, 0x85EBCA77
"""Salts: who is served by a version before the others; who is never learned from, but measured on; which partition an
offline user counts as one of"""
_ALL = 2.0**32


def user_crcs(users: Sequence[bytes]) -> NDArray[np.uint32]:
    """(n,) CRC-32 of ids: what a row's ``owner`` holds too."""
    return np.fromiter(map(zlib.crc32, users), np.uint32, len(users))


def mixed(crcs: NDArray[np.uint32], salt: int) -> NDArray[np.uint32]:
    """(n,) 32 bits that are as good as random, for one purpose."""
    x = crcs ^ np.uint32(salt)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def drawn(crcs: NDArray[np.uint32], salt: int, share: float) -> NDArray[np.bool_]:
    """(n,) whether a user is among this share of all users."""
    chosen: NDArray[np.bool_] = mixed(crcs, salt) < share * _ALL
    return chosen


def held_out_users(users: Sequence[bytes], share: float) -> NDArray[np.bool_]:
    """(n,) users whom no shared parameter is learned from, offline or online: the same ones, always."""
    return drawn(user_crcs(users), HELD_OUT, share)
