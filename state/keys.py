"""Where things lie in a store's database: ``u`` + a user's id, and ``m`` + a name for the store's own.

So no id can be one of the store's own keys, whatever bytes it has. Histories of sampled users lie under ``h``, in the
order of their users' sampling hashes (``history_codec``):

    h                                                       the book: which users are kept, and totals
    h + crc32(id), 4 bytes + blake2b(id), 8 bytes           the stem: a user's head
    the stem + k, 4 bytes                                   a user's chunk k

All numbers are big-endian: a head comes before its chunks, they come in the order of events, and all users whose
hash is not below a bound lie in one range.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from hashlib import blake2b
from types import MappingProxyType

USER, OWN, AFTER_USERS = b"u", b"m", b"v"
"""What users' keys begin with, and the store's own; all of users' keys are before the third"""
HISTORY, AFTER_HISTORIES = b"h", b"i"
"""What keys of histories begin with, and what is after all of them. The first one alone is the book's"""
PROGRESS_KEY = OWN + b"progress"
"""Holds ``codec.Progress``."""
LAYOUT_KEY = OWN + b"layout"
"""Holds the fingerprint of the rows' layout."""
RESTORING_KEY = OWN + b"restoring"
"""There while a restore from the changelog is under way: rows may be missing, whatever the progress says."""
STANDING_KEY = OWN + b"standing"
"""Holds ``outbox.Standing``: how the store stands to its changelog."""
CHANGELOG_KEY = OWN + b"changelog"
"""Holds the name of the topic that is the store's changelog."""
OUTBOX = OWN + b"outbox"
"""What the keys of commits begin with that the changelog has not acknowledged, see ``outbox``"""
OWNER_KEY = OWN + b"owner"
"""Of a changelog alone, never in a store: holds ``outbox.Owner``, who wrote the marker that follows."""
RESERVED = frozenset((PROGRESS_KEY, LAYOUT_KEY, RESTORING_KEY))
"""The store's own keys that it alone writes"""
NOTHING: Mapping[bytes, bytes | None] = MappingProxyType({})


def checked_own(own: Mapping[bytes, bytes | None]) -> Mapping[bytes, bytes | None]:
    """Own keys to be written along with a batch. ValueError for a user's key and for those the store alone writes."""
    for key in own:
        if not key.startswith(OWN) or key in RESERVED:
            raise ValueError(f"{key!r} is none of the keys that may be written along with a batch")
    return own


def user_key(user: bytes) -> bytes:
    """Where a user's row lies in the database."""
    return USER + user


def checked_histories(histories: Mapping[bytes, bytes | None]) -> Mapping[bytes, bytes | None]:
    """Histories to be written along with a batch. ValueError for a key that lies elsewhere."""
    for key in histories:
        if not key.startswith(HISTORY):
            raise ValueError(f"{key!r} is no key of a history: those begin with {HISTORY!r}")
    return histories


def first_stem(sampling_hash: int) -> bytes:
    """What is before all stems of users with this sampling hash or a larger one, and after all others."""
    return AFTER_HISTORIES if sampling_hash >> 32 else HISTORY + sampling_hash.to_bytes(4, "big")


def history_stem(user: bytes) -> bytes:
    """What all keys of a user's history begin with: 13 bytes."""
    return HISTORY + zlib.crc32(user).to_bytes(4, "big") + blake2b(user, digest_size=8).digest()


def chunk_key(stem: bytes, number: int) -> bytes:
    """Where a chunk of a user's history lies."""
    return stem + number.to_bytes(4, "big")


def after_stem(stem: bytes) -> bytes:
    """What is after all keys of a user's history, and before all other ones that follow."""
    return stem + b"\xff\xff\xff\xff\xff"
