"""Users' rows by id, one store per topic partition: an interface, RocksDB, and a twin in memory.

A batch of rows, the source offset that they cover and the meta version are written in one atomic step, so after a
crash rows and offset agree: whoever opens the store goes on after ``offset()``. Every write goes through RocksDB's
write-ahead log, which survives kill -9. It is not synced to the disk, so power loss can take back the latest
batches, rows and offset together.

Keys: ``u`` + the user's id in UTF-8, and ``m`` + a name for the store's own, so no id can be one of those.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from rocksdict import (
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteBufferManager,
)

from learner.user_state import RowLayout, Slab
from state.exceptions import StoreClosed, StoreLocked, StoreMismatch, StoreUnreadable

MEBIBYTE = 1 << 20
BLOCK_CACHE_BYTES = 64 * MEBIBYTE
"""Rows are read once per batch: a larger cache of blocks would mostly hold what is not asked again, and index and
filter blocks of a million users fit into this."""
MEMTABLE_BYTES = 64 * MEBIBYTE
"""Rows of one store that are gathered before they go to disk as one sorted file."""
MEMTABLES_BYTES = 192 * MEBIBYTE
"""Of all stores that share a ``StoreMemory``: beyond it the largest memtable is flushed early, and no writer waits."""
BLOOM_BITS = 10
"""A new user costs one in a hundred a read of a block in vain; without, every one."""

_USER, _OWN = b"u", b"m"
_PROGRESS_KEY = _OWN + b"progress"
LAYOUT_KEY = _OWN + b"layout"
"""Holds the fingerprint of the rows' layout."""
_PROGRESS = struct.Struct("<qQ")
_LOCK_HELD = ("lock hold by current process", "While lock file")
"""What RocksDB says when another handle has the lock: of this process, of another one."""


def user_key(user: bytes) -> bytes:
    """Where a user's row lies in the database."""
    return _USER + user


class UserStore(Protocol):
    """Users' rows of one partition. One writer; reading never writes. Rows are (n, row_bytes) uint8.

    After ``close`` every other call raises StoreClosed.
    """

    def get_many(self, users: Sequence[bytes]) -> tuple[Slab, NDArray[np.bool_]]:
        """(rows, found): a fresh, writable slab with one row per id, zeros where ``found`` is False."""

    def write_batch(self, users: Sequence[bytes], rows: Slab, *, offset: int, meta_version: int) -> None:
        """Puts the rows, the last source offset they cover and the meta version, all or nothing."""

    def offset(self) -> int | None:
        """The last source offset applied; None for a new store."""

    def meta_version(self) -> int | None:
        """The meta version of the last batch; None for a new store."""

    def iterate(self) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """Every user's id and row, in order of the id's bytes, as they stood when the walk began."""

    def approximate_count(self) -> int:
        """How many users there are; RocksDB may count one again for each row not yet merged with its older self."""

    def close(self) -> None:
        """Releases every handle, those of unfinished walks too; closing twice does nothing more."""


class MemoryUserStore:
    """The same contract in a dictionary, for tests and for runs that need no durability."""

    def __init__(self, layout: RowLayout) -> None:
        self._row_bytes = layout.row_bytes
        self._rows: dict[bytes, bytes] | None = {}
        self._progress: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_many(self, users: Sequence[bytes]) -> tuple[Slab, NDArray[np.bool_]]:
        """See ``UserStore``."""
        return _slab(list(map(self._held().get, users)), self._row_bytes)

    def write_batch(self, users: Sequence[bytes], rows: Slab, *, offset: int, meta_version: int) -> None:
        """See ``UserStore``."""
        self._held().update(zip(users, _bytes_of(rows, len(users), self._row_bytes), strict=True))
        self._progress = (offset, meta_version)

    def offset(self) -> int | None:
        """See ``UserStore``."""
        self._held()
        return None if self._progress is None else self._progress[0]

    def meta_version(self) -> int | None:
        """See ``UserStore``."""
        self._held()
        return None if self._progress is None else self._progress[1]

    def iterate(self) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """See ``UserStore``."""
        return self._walk(sorted(self._held().items()))

    def approximate_count(self) -> int:
        """See ``UserStore``; exact here."""
        return len(self._held())

    def close(self) -> None:
        """See ``UserStore``; the rows are gone."""
        self._rows = None

    def _walk(self, rows: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        for user, row in rows:
            self._held()
            yield user, np.frombuffer(row, np.uint8)

    def _held(self) -> dict[bytes, bytes]:
        if self._rows is None:
            raise StoreClosed("the store in memory is closed: make another")
        return self._rows


class StoreMemory:
    """RocksDB's memory, shared by all stores that are given it: a worker's footprint then knows no partitions."""

    def __init__(self, cache_bytes: int = BLOCK_CACHE_BYTES, memtables_bytes: int = MEMTABLES_BYTES) -> None:
        self.cache = Cache(cache_bytes)
        self.memtables = WriteBufferManager(memtables_bytes, False)


class RocksUserStore:
    """Rows in a RocksDB of their own directory. Use as a context, or call ``close``.

    Raises StoreLocked, StoreMismatch, StoreUnreadable when it cannot be opened for these rows.
    """

    def __init__(self, path: Path, layout: RowLayout, memory: StoreMemory | None = None) -> None:
        self.path = path
        self._row_bytes = layout.row_bytes
        self._walks: weakref.WeakSet[_Walk] = weakref.WeakSet()
        self._scattered = ReadOptions()
        # A row's block is hardly read twice: filling the cache costs a tenth of the read. The stub lacks the argument.
        self._scattered.fill_cache(False)  # type: ignore[call-arg]
        self._db: Rdict | None = _open(path, memory or StoreMemory())
        try:
            self._claim(layout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_many(self, users: Sequence[bytes]) -> tuple[Slab, NDArray[np.bool_]]:
        """See ``UserStore``."""
        values: Any = self._open_db().get([_USER + user for user in users], read_opt=self._scattered)
        return _slab(values, self._row_bytes)

    def write_batch(self, users: Sequence[bytes], rows: Slab, *, offset: int, meta_version: int) -> None:
        """See ``UserStore``. Rows are put in order of their keys: RocksDB inserts them a third faster."""
        db, batch = self._open_db(), WriteBatch(raw_mode=True)
        put = batch.put
        values = _bytes_of(rows, len(users), self._row_bytes)
        for k in sorted(range(len(users)), key=users.__getitem__):
            put(_USER + users[k], values[k])
        put(_PROGRESS_KEY, _PROGRESS.pack(offset, meta_version))
        db.write(batch)

    def offset(self) -> int | None:
        """See ``UserStore``."""
        progress = self._progress()
        return None if progress is None else progress[0]

    def meta_version(self) -> int | None:
        """See ``UserStore``."""
        progress = self._progress()
        return None if progress is None else progress[1]

    def iterate(self) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """See ``UserStore``."""
        items: Any = self._open_db().items(from_key=_USER)  # all own keys come before; rocksdict ignores a lower bound
        walk = _Walk(self.path, items)
        self._walks.add(walk)
        return walk

    def approximate_count(self) -> int:
        """See ``UserStore``."""
        own = sum(self._open_db().get(key) is not None for key in (_PROGRESS_KEY, LAYOUT_KEY))
        return max(int(self._open_db().property_int_value("rocksdb.estimate-num-keys") or 0) - own, 0)

    def close(self) -> None:
        """See ``UserStore``. RocksDB keeps its lock while an iterator lives, so walks end first."""
        for walk in list(self._walks):
            walk.close()
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open_db(self) -> Rdict:
        if self._db is None:
            raise StoreClosed(f"the store {self.path} is closed: open it again")
        return self._db

    def _progress(self) -> tuple[int, int] | None:
        packed = self._open_db().get(_PROGRESS_KEY)
        return None if packed is None else _PROGRESS.unpack(packed)

    def _claim(self, layout: RowLayout) -> None:
        wanted = layout.fingerprint.encode()
        held = self._open_db().get(LAYOUT_KEY)
        if held is None:
            self._open_db().put(LAYOUT_KEY, wanted)
        elif held != wanted:
            raise StoreMismatch(
                f"the store {self.path} holds rows of {held.decode()}, the model needs {layout.fingerprint}: "
                "give another directory, or the model and settings that it was made with"
            )


class _Walk:
    """An iterator over a store's rows that the store can end."""

    def __init__(self, path: Path, items: Iterator[tuple[bytes, bytes]]) -> None:
        self._path = path
        self._items: Iterator[tuple[bytes, bytes]] | None = items

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[bytes, NDArray[np.uint8]]:
        if self._items is None:
            raise StoreClosed(f"the store {self._path} was closed during a walk over its rows: open it and walk again")
        key, row = next(self._items)
        return key[len(_USER) :], np.frombuffer(row, np.uint8)

    def close(self) -> None:
        self._items = None


def _open(path: Path, memory: StoreMemory) -> Rdict:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(MEMTABLE_BYTES)
    options.set_max_write_buffer_number(3)  # one fills while two wait for the disk; with fewer, bursts stall
    options.set_write_buffer_manager(memory.memtables)
    options.set_compression_type(DBCompressionType.none())  # floats barely compress
    options.set_max_background_jobs(2)
    table = BlockBasedOptions()
    table.set_block_cache(memory.cache)
    table.set_bloom_filter(BLOOM_BITS, False)
    options.set_block_based_table_factory(table)
    try:
        path.mkdir(parents=True, exist_ok=True)
        return Rdict(str(path), options=options)
    except OSError as error:
        raise StoreUnreadable(f"the store {path} cannot be opened: {error}; check the path and its rights") from error
    except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
        if any(said in str(error) for said in _LOCK_HELD):
            raise StoreLocked(
                f"the store {path} is open already, here or in another process: close that one first, "
                f"or give another directory ({error})"
            ) from error
        raise StoreUnreadable(f"the store {path} cannot be opened: {error}") from error


def _slab(values: Sequence[bytes | None], row_bytes: int) -> tuple[Slab, NDArray[np.bool_]]:
    found = np.fromiter((value is not None for value in values), np.bool_, len(values))
    slab = np.zeros((len(values), row_bytes), np.uint8)
    held = b"".join(value for value in values if value is not None)
    slab[slice(None) if found.all() else found] = np.frombuffer(held, np.uint8).reshape(-1, row_bytes)
    return slab, found


def _bytes_of(rows: Slab, users: int, row_bytes: int) -> list[bytes]:
    if rows.shape != (users, row_bytes):
        raise ValueError(f"{users} users and rows of shape {rows.shape}: this store holds rows of {row_bytes} bytes")
    values: list[bytes] = np.ascontiguousarray(rows).view(f"V{row_bytes}").ravel().tolist()
    return values
