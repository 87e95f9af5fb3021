"""Errors of users' state.

ColdstreamError
└── StoreError           a store cannot be used; nothing was written
    ├── StoreLocked      another process (or another handle of this one) has it open for writing
    ├── StoreMismatch    it holds rows of another layout than the model's
    ├── StoreUnreadable  RocksDB refuses it: missing rights, damage, no space
    └── StoreClosed      it was closed before
"""

from __future__ import annotations

from configs.exceptions import ColdstreamError


class StoreError(ColdstreamError):
    """A store cannot be used. The message names its path and the next action."""


class StoreLocked(StoreError):
    """Somebody else writes to it."""


class StoreMismatch(StoreError):
    """Its rows have another layout."""


class StoreUnreadable(StoreError):
    """RocksDB refuses it."""


class StoreClosed(StoreError):
    """It was closed before."""
