"""A walk over a store's rows, in order of the users' ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rocksdict import RdictIter

from learner.user_state import RowLayout
from state import codec
from state.exceptions import RowDamaged, StoreClosed
from state.keys import USER
from state.rocksdb import unreadable

WALK_ROWS = 1024
"""Rows that a walk reads ahead: enough to decode them as one array"""


class Walk:
    """An iterator over a store's rows that the store can end.

    RocksDB ends a walk at damage without a word; its status is asked at the end, so that none is taken for whole.
    """

    def __init__(self, path: Path, layout: RowLayout, cursor: RdictIter) -> None:
        self._path = path
        self._layout = layout
        self._cursor: RdictIter | None = cursor
        self._ahead: Iterator[tuple[bytes, NDArray[np.uint8]]] = iter(())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[bytes, NDArray[np.uint8]]:
        row = None if self._cursor is None else next(self._ahead, None)
        if row is None:
            self._ahead = self._read_ahead()
            row = next(self._ahead)
        return row

    def read(self) -> tuple[list[bytes], list[bytes]]:
        """The next ids and rows as stored; none at the end. Raises StoreUnreadable where they cannot be read."""
        cursor = self._cursor
        if cursor is None:
            raise StoreClosed(f"the store {self._path} was closed during a walk over its rows: open it and walk again")
        users: list[bytes] = []
        values: list[bytes] = []
        while len(users) < WALK_ROWS and cursor.valid():
            users.append(cursor.key()[len(USER) :])
            values.append(cursor.value())
            cursor.next()
        try:
            cursor.status()
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            del cursor  # whoever keeps the error would keep the store's lock with it
            raise unreadable(self._path, error) from error
        return users, values

    def _read_ahead(self) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        users, values = self.read()
        try:
            return zip(users, codec.decode(self._layout, users, values), strict=True)
        except RowDamaged as error:
            raise error.at(str(self._path)) from None

    def close(self) -> None:
        """Lets go of the store, which else keeps its lock."""
        self._cursor = None
        self._ahead = iter(())
