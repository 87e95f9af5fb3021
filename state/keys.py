"""Where things lie in a store's database: ``u`` + a user's id, and ``m`` + a name for the store's own.

So no id can be one of the store's own keys, whatever bytes it has.
"""

from __future__ import annotations

USER, OWN, AFTER_USERS = b"u", b"m", b"v"
"""What users' keys begin with, and the store's own; all of users' keys are before the third"""
PROGRESS_KEY = OWN + b"progress"
"""Holds ``codec.Progress``."""
LAYOUT_KEY = OWN + b"layout"
"""Holds the fingerprint of the rows' layout."""
RESTORING_KEY = OWN + b"restoring"
"""There while a restore from the changelog is under way: rows may be missing, whatever the progress says."""


def user_key(user: bytes) -> bytes:
    """Where a user's row lies in the database."""
    return USER + user
