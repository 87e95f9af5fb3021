"""A place among a store's histories, in order of their keys: to seek a hash, and to read on from there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rocksdict import RdictIter

from state.exceptions import StoreClosed
from state.keys import HISTORY
from state.rocksdb import unreadable

Entry = tuple[bytes, bytes]
"""Key and value, as stored"""


class HistoryCursor(Protocol):
    """Sees the histories as they stood when it was made, until it is closed; a store that closes ends it.

    Raises StoreClosed, and StoreUnreadable where there is damage.
    """

    def seek(self, key: bytes) -> Entry | None:
        """The first entry at or after the key; None: there is none."""

    def next(self) -> Entry | None:
        """The entry after the one given last; None: that was the last one."""

    def close(self) -> None:
        """Lets go of the store."""


class RocksCursor:
    """The cursor over a RocksDB, which keeps its lock while the iterator lives."""

    def __init__(self, path: Path, iterator: RdictIter) -> None:
        self._path = path
        self._iterator: RdictIter | None = iterator

    def seek(self, key: bytes) -> Entry | None:
        """See ``HistoryCursor``."""
        iterator = self._open()
        iterator.seek(key)
        return self._entry(iterator)

    def next(self) -> Entry | None:
        """See ``HistoryCursor``."""
        iterator = self._open()
        if iterator.valid():
            iterator.next()
        return self._entry(iterator)

    def close(self) -> None:
        """See ``HistoryCursor``."""
        self._iterator = None

    def _open(self) -> RdictIter:
        if self._iterator is None:
            raise StoreClosed(
                f"the store {self._path} was closed while its histories were read: open it and read again"
            )
        return self._iterator

    def _entry(self, iterator: RdictIter) -> Entry | None:
        if iterator.valid():
            key: bytes = iterator.key()
            return (key, iterator.value()) if key.startswith(HISTORY) else None
        try:
            iterator.status()
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            del iterator  # whoever keeps the error would keep the store's lock with it
            self.close()
            raise unreadable(self._path, error) from error
        return None


class MemoryCursor:
    """The cursor over a store in memory."""

    def __init__(self, keys: Sequence[bytes], values: Mapping[bytes, bytes]) -> None:
        """``keys`` in order, ``values`` by key; nobody may change either afterwards."""
        self._keys: Sequence[bytes] | None = keys
        self._values = values
        self._place = 0

    def seek(self, key: bytes) -> Entry | None:
        """See ``HistoryCursor``."""
        self._place = bisect_left(self._open(), key)
        return self._entry()

    def next(self) -> Entry | None:
        """See ``HistoryCursor``."""
        self._place = min(self._place + 1, len(self._open()))
        return self._entry()

    def close(self) -> None:
        """See ``HistoryCursor``."""
        self._keys = None

    def _open(self) -> Sequence[bytes]:
        if self._keys is None:
            raise StoreClosed("the store in memory was closed while its histories were read: make another")
        return self._keys

    def _entry(self) -> Entry | None:
        keys = self._open()
        return (keys[self._place], self._values[keys[self._place]]) if self._place < len(keys) else None
