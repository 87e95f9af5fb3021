"""Errors of users' state.

ColdstreamError
└── StoreError             state cannot be used as asked
    ├── StoreLocked        another process (or another handle of this one) has it open for writing
    ├── StoreMismatch      it holds rows of another layout than the model's
    ├── StoreUnreadable    RocksDB refuses it: missing rights, damage, no file descriptors
    ├── StoreWriteFailed   a write was refused (disk full, read-only, …): nothing of it counts; it may be tried again
    ├── StoreRolledBack    after a failed write it came back at an earlier offset than it had confirmed
    ├── StoreDamaged       something in it is not what was written
    │   └── RowDamaged     one user's row is not
    ├── StoreUnfinished    a restore from the changelog was interrupted: its rows are not complete
    ├── StoreClosed        it was closed before
    ├── SnapshotError      a snapshot cannot be made, is damaged, or belongs to something else
    ├── ChangelogError     a changelog cannot be replayed
    ├── ReceiptError       a receipt of an erasure cannot be read, or was changed
    └── QueryError         a query asks for what the state cannot answer
"""

from __future__ import annotations

from configs.exceptions import ColdstreamError


class StoreError(ColdstreamError):
    """State cannot be used as asked. The message names its path and the next action."""


class StoreLocked(StoreError):
    """Somebody else writes to it."""


class StoreMismatch(StoreError):
    """Its rows have another layout."""


class StoreUnreadable(StoreError):
    """RocksDB refuses it."""


class StoreWriteFailed(StoreError):
    """A write was refused. Whether the batch became durable is known after the next open; rows and offset agree."""


class StoreRolledBack(StoreError):
    """It came back at an earlier offset than it had confirmed: whoever feeds it goes on after that offset."""


class StoreDamaged(StoreError):
    """Something in it is not what was written."""


class RowDamaged(StoreDamaged):
    """One user's row is not what was written."""

    def __init__(self, user: bytes, damage: str, where: str = "") -> None:
        self.user, self.damage = user, damage
        name = ascii(user.decode(errors="backslashreplace"))
        shown = name if len(name) <= 80 else f"{name[:60]}… ({len(user):,} bytes)"
        super().__init__(
            f"{where}{': ' if where else ''}the row of user {shown} {damage}: restore a snapshot or the changelog"
        )

    def at(self, where: str) -> RowDamaged:
        """The same error with the store's path in front."""
        return RowDamaged(self.user, self.damage, where)


class StoreUnfinished(StoreError):
    """A restore into it was interrupted: rows may be missing until it is restored again."""


class StoreClosed(StoreError):
    """It was closed before."""


class SnapshotError(StoreError):
    """A snapshot cannot be made or used."""


class ChangelogError(StoreError):
    """A changelog cannot be replayed."""


class ReceiptError(StoreError):
    """A receipt of an erasure cannot be used."""


class QueryError(StoreError):
    """A query asks for what the state cannot answer. The message says what it could."""
