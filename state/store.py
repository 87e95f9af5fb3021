"""Users' rows by id, one store per topic partition: an interface, RocksDB, and a twin in memory.

A batch of rows, the source offset that they cover and the meta version are written in one atomic step, so after a
crash rows and offset agree: whoever opens the store goes on after ``offset()``. Every write goes through RocksDB's
write-ahead log, which survives kill -9. It is not synced to the disk, so power loss can take back the latest
batches, rows and offset together.

Keys: ``u`` + the user's id in UTF-8, and ``m`` + a name for the store's own, so no id can be one of those.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, ReadOptions, WriteBatch

from learner.user_state import RowLayout, Slab
from state.exceptions import StoreLocked, StoreMismatch, StoreUnreadable

MEBIBYTE = 1 << 20
BLOCK_CACHE_BYTES = 64 * MEBIBYTE
"""Of one store: rows are read once per batch, a larger cache of blocks would mostly hold what is not asked again."""
WRITE_BUFFER_BYTES = 32 * MEBIBYTE
WRITE_BUFFERS = 3
"""At most 96 MB of rows wait for a flush; with fewer, bursts stall."""
BLOOM_BITS = 10
"""A new user costs one in a hundred a read of a block in vain; without, every one."""

_USER, _OWN = b"u", b"m"
_PROGRESS_KEY, _LAYOUT_KEY = _OWN + b"progress", _OWN + b"layout"
_PROGRESS = struct.Struct("<qQ")


class UserStore(Protocol):
    """Users' rows of one partition. One writer; reading never writes. Rows are (n, row_bytes) uint8."""

    def get_many(self, users: Sequence[bytes]) -> tuple[Slab, NDArray[np.bool_]]:
        """(rows, found): a fresh slab with one row per id, zeros where ``found`` is False."""

    def write_batch(self, users: Sequence[bytes], rows: Slab, *, offset: int, meta_version: int) -> None:
        """Puts the rows, the last source offset they cover and the meta version, all or nothing."""

    def offset(self) -> int | None:
        """The last source offset applied; None for a new store."""

    def meta_version(self) -> int | None:
        """The meta version of the last batch; None for a new store."""

    def iterate(self) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """Every user's id and row, in order of the id's bytes, as they stood when the walk began."""

    def close(self) -> None:
        """Releases every handle; closing twice does nothing more."""


class MemoryUserStore:
    """The same contract in a dictionary, for tests and for runs that need no durability."""

    def __init__(self, layout: RowLayout) -> None:
        self._row_bytes = layout.row_bytes
        self._rows: dict[bytes, bytes] = {}
        self._progress: tuple[int, int] | None = None

    def get_many(self, users: Sequence[bytes]) -> tuple[Slab, NDArray[np.bool_]]:
        """See ``UserStore``."""
        return _slab([self._rows.get(user) for user in users], self._row_bytes)

    def write_batch(self, users: Sequence[bytes], rows: Slab, *, offset: int, meta_version: int) -> None:
        """See ``UserStore``."""
        self._rows.update(zip(users, _bytes_of(rows, self._row_bytes), strict=True))
        self._progress = (offset, meta_version)

    def offset(self) -> int | None:
        """See ``UserStore``."""
        return None if self._progress is None else self._progress[0]

    def meta_version(self) -> int | None:
        """See ``UserStore``."""
        return None if self._progress is None else self._progress[1]

    def iterate(self) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """See ``UserStore``."""
        for user, row in sorted(self._rows.items()):
            yield user, np.frombuffer(row, np.uint8)

    def close(self) -> None:
        """Nothing to release."""


class RocksUserStore:
    """Rows in a RocksDB of their own directory. Use as a context, or call ``close``.

    Raises StoreLocked, StoreMismatch, StoreUnreadable when it cannot be opened for these rows.
    """

    def __init__(self, path: Path, layout: RowLayout) -> None:
        self.path = path
        self._row_bytes = layout.row_bytes
        self._db: Rdict | None = _open(path)
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
        values = self._open_db().get([_USER + user for user in users]) if users else []
        return _slab(values, self._row_bytes)

    def write_batch(self, users: Sequence[bytes], rows: Slab, *, offset: int, meta_version: int) -> None:
        """See ``UserStore``. Rows are put in order of their keys: RocksDB inserts them a third faster."""
        batch = WriteBatch(raw_mode=True)
        put = batch.put
        for user, row in sorted(zip(users, _bytes_of(rows, self._row_bytes), strict=True)):
            put(_USER + user, row)
        put(_PROGRESS_KEY, _PROGRESS.pack(offset, meta_version))
        self._open_db().write(batch)

    def offset(self) -> int | None:
        """See ``UserStore``."""
        progress = self._progress()
        return None if progress is None else progress[0]

    def meta_version(self) -> int | None:
        """See ``UserStore``."""
        progress = self._progress()
        return None if progress is None else progress[1]

    def iterate(self) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """See ``UserStore``. The walk must end, or its generator be closed, before ``close``."""
        options = ReadOptions()
        options.set_iterate_lower_bound(_USER)
        options.set_iterate_upper_bound(bytes([_USER[0] + 1]))
        for key, row in self._open_db().items(read_opt=options):
            yield key[len(_USER) :], np.frombuffer(row, np.uint8)

    def close(self) -> None:
        """See ``UserStore``."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open_db(self) -> Rdict:
        if self._db is None:
            raise StoreUnreadable(f"the store {self.path} is closed: open it again")
        return self._db

    def _progress(self) -> tuple[int, int] | None:
        packed = self._open_db().get(_PROGRESS_KEY)
        return None if packed is None else _PROGRESS.unpack(packed)

    def _claim(self, layout: RowLayout) -> None:
        wanted = layout.fingerprint.encode()
        held = self._open_db().get(_LAYOUT_KEY)
        if held is None:
            self._open_db().put(_LAYOUT_KEY, wanted)
        elif held != wanted:
            raise StoreMismatch(
                f"the store {self.path} holds rows of {held.decode()}, the model needs {layout.fingerprint}: "
                "give another directory, or the model and settings that it was made with"
            )


def _open(path: Path) -> Rdict:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(WRITE_BUFFERS)
    options.set_compression_type(DBCompressionType.none())  # floats barely compress
    options.set_max_background_jobs(2)
    table = BlockBasedOptions()
    table.set_block_cache(Cache(BLOCK_CACHE_BYTES))
    table.set_bloom_filter(BLOOM_BITS, False)
    options.set_block_based_table_factory(table)
    try:
        path.mkdir(parents=True, exist_ok=True)
        return Rdict(str(path), options=options)
    except OSError as error:
        raise StoreUnreadable(f"the store {path} cannot be opened: {error}; check the path and its rights") from error
    except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
        if "lock" in str(error).lower():
            raise StoreLocked(
                f"the store {path} is open in another process: stop that one, or give another directory ({error})"
            ) from error
        raise StoreUnreadable(f"the store {path} cannot be opened: {error}") from error


def _slab(values: Sequence[bytes | None], row_bytes: int) -> tuple[Slab, NDArray[np.bool_]]:
    found = np.fromiter((value is not None for value in values), np.bool_, len(values))
    slab = np.zeros((len(values), row_bytes), np.uint8)
    if found.any():
        joined = b"".join(value for value in values if value is not None)
        slab[found] = np.frombuffer(joined, np.uint8).reshape(-1, row_bytes)
    return slab, found


def _bytes_of(rows: Slab, row_bytes: int) -> list[bytes]:
    if rows.shape[1:] != (row_bytes,):
        raise ValueError(f"rows have shape {rows.shape}, this store holds rows of {row_bytes} bytes")
    return np.ascontiguousarray(rows).view(f"V{row_bytes}").ravel().tolist()
