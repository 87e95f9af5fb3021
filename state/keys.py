"""Where things lie in a store's database: ``u`` + a user's id, and ``m`` + a name for the store's own.

So no id can be one of the store's own keys, whatever bytes it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

USER, OWN, AFTER_USERS = b"u", b"m", b"v"
"""What users' keys begin with, and the store's own; all of users' keys are before the third"""
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
