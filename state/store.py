"""Users' rows by id, one store per topic partition: the interface, and RocksDB behind it. Its twin is ``memory_store``.

A batch of rows and the partition's progress are written in one atomic step, so after a crash rows and offset agree:
whoever opens the store goes on after ``progress().offset``. Every write goes through RocksDB's write-ahead log, which
survives kill -9 under every policy; what power loss can take back is the policy's (``SyncPolicy``), and it always
takes rows and offset together.

Keys: ``u`` + the user's id, and ``m`` + a name for the store's own, so no id can be one of those. No path is ever
built from an id. What lies under a key is ``state.codec``'s.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from rocksdict import Checkpoint, Rdict, RdictIter, ReadOptions, WriteBatch, WriteOptions

from learner.user_state import RowLayout, Slab
from state import codec
from state.codec import Progress
from state.exceptions import RowDamaged, StoreClosed, StoreDamaged, StoreMismatch, StoreRolledBack, StoreUnreadable
from state.rocksdb import StoreMemory, open_for_reading, open_for_writing, unreadable, write_failed

_USER, _OWN = b"u", b"m"
PROGRESS_KEY = _OWN + b"progress"
"""Holds ``codec.Progress``."""
LAYOUT_KEY = _OWN + b"layout"
"""Holds the fingerprint of the rows' layout."""
_WALK_ROWS = 1024
"""Rows that a walk reads ahead: enough to decode them as one array"""


_SCATTERED = ReadOptions()
# A row's block is hardly read twice: filling the cache costs a tenth of the read. The stub lacks the argument.
_SCATTERED.fill_cache(False)  # type: ignore[call-arg]


def user_key(user: bytes) -> bytes:
    """Where a user's row lies in the database."""
    return _USER + user


@dataclass(frozen=True, slots=True)
class SyncPolicy:
    """When written batches are forced to the disk. kill -9 loses nothing under any of them.

    never: power loss can take back what the system has not written out by itself (Linux: some 30 s).
    interval: at most the batches of the last ``interval_ms``; one sync serves all batches of the interval.
    batch: nothing that was confirmed.
    What is taken back, rows and offset together, is applied again from the stream.
    """

    mode: Literal["never", "interval", "batch"] = "interval"
    interval_ms: int = 1000


class UserStore(Protocol):
    """Users' rows of one partition. One writer; reading never writes. Rows are (n, row_bytes) uint8.

    After ``close`` every other call raises StoreClosed. A row that is not what was written raises RowDamaged.
    """

    def get_many(self, users: Sequence[bytes]) -> tuple[Slab, NDArray[np.bool_]]:
        """(rows, found): a fresh, writable slab with one row per id, zeros where ``found`` is False."""

    def write_batch(
        self, users: Sequence[bytes], rows: Slab, progress: Progress | None, *, deleted: Sequence[bytes] = ()
    ) -> None:
        """Puts the rows, takes out the ``deleted`` users and sets the progress (None leaves it), all or nothing.

        Of a user named twice the last row counts; one both written and deleted is deleted. Raises StoreWriteFailed;
        the store then opens itself again at the next call, and the same batch may be given once more.
        """

    def progress(self) -> Progress | None:
        """How far the rows have come; None for a new store."""

    def iterate(self, after: bytes | None = None) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """Every user's id and row, in order of the id's bytes, as they stood when the walk began.

        ``after`` skips all ids up to and including that one.
        """

    def approximate_count(self) -> int:
        """How many users there are; RocksDB may count one again for each row not yet merged with its older self."""

    def sync(self) -> None:
        """Forces all batches so far to the disk."""

    def close(self) -> None:
        """Releases every handle, those of unfinished walks too; closing twice does nothing more."""


class RocksReader:
    """The rows of a RocksDB as they stand when it is opened, beside a live writer or not; nothing is ever written.

    The layout is the one that the store names itself. Use as a context, or call ``close``. Raises StoreUnreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._walks: weakref.WeakSet[_Walk] = weakref.WeakSet()
        self._db: Rdict | None = self._opened()
        try:
            self.layout = self._held_layout()
        except BaseException:
            self.close()
            raise

    def _opened(self) -> Rdict:
        return open_for_reading(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_many(self, users: Sequence[bytes]) -> tuple[Slab, NDArray[np.bool_]]:
        """See ``UserStore``."""
        values = self._read([_USER + user for user in users])
        try:
            return found_rows(self.layout, users, values)
        except RowDamaged as error:
            raise error.at(str(self.path)) from None

    def progress(self) -> Progress | None:
        """See ``UserStore``."""
        packed = self._read([PROGRESS_KEY])[0]
        try:
            return None if packed is None else Progress.decode(packed)
        except ValueError as error:
            raise StoreDamaged(f"{self.path}: {error}: restore a snapshot or the changelog") from None

    def iterate(self, after: bytes | None = None) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """See ``UserStore``."""
        cursor = self._open_db().iter()
        cursor.seek(_USER if after is None else _USER + after + b"\0")
        walk = _Walk(self.path, self.layout, cursor)
        self._walks.add(walk)
        return walk

    def approximate_count(self) -> int:
        """See ``UserStore``."""
        own = sum(packed is not None for packed in self._read([PROGRESS_KEY, LAYOUT_KEY]))
        return max(int(self._open_db().property_int_value("rocksdb.estimate-num-keys") or 0) - own, 0)

    def close(self) -> None:
        """See ``UserStore``."""
        self._end_walks()
        if self._db is not None:
            self._db.close()
            self._db = None

    def _end_walks(self) -> None:
        """RocksDB keeps its lock while an iterator lives."""
        for walk in list(self._walks):
            walk.close()

    def _open_db(self) -> Rdict:
        if self._db is None:
            raise StoreClosed(f"the store {self.path} is closed: open it again")
        return self._db

    def _read(self, keys: list[bytes]) -> list[bytes | None]:
        db = self._open_db()
        try:
            values: Any = db.get(keys, read_opt=_SCATTERED)  # type: ignore[arg-type]
            return list(values)
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            raise unreadable(self.path, error) from error

    def _held_layout(self) -> RowLayout:
        held = self._read([LAYOUT_KEY])[0]
        layout = RowLayout.parse((held or b"").decode(errors="replace"))
        if layout is None:
            raise StoreUnreadable(
                f"{self.path} does not say which rows it holds: it was not made by a run of coldstream"
            )
        return layout


class RocksUserStore(RocksReader):
    """Rows in a RocksDB of their own directory. Use as a context, or call ``close``.

    Raises StoreLocked, StoreMismatch, StoreUnreadable when it cannot be opened for these rows.
    """

    def __init__(
        self, path: Path, layout: RowLayout, memory: StoreMemory | None = None, sync: SyncPolicy | None = None
    ) -> None:
        self._wanted = layout
        self._memory = memory or StoreMemory()
        self._sync = _Syncing(sync or SyncPolicy(), self._timed_sync)
        self._failed = False
        super().__init__(path)
        try:
            self._confirmed = self.progress()
        except BaseException:
            self.close()
            raise

    def _opened(self) -> Rdict:
        return open_for_writing(self.path, self._memory)

    def write_batch(
        self, users: Sequence[bytes], rows: Slab, progress: Progress | None, *, deleted: Sequence[bytes] = ()
    ) -> None:
        """See ``UserStore``. Rows are put in order of their keys: RocksDB inserts them a third faster."""
        values = codec.encode(self.layout, users, rows)
        batch = WriteBatch(raw_mode=True)
        put = batch.put
        for k in sorted(range(len(users)), key=users.__getitem__):
            put(_USER + users[k], values[k])
        for user in deleted:
            batch.delete(_USER + user)
        if progress is not None:
            put(PROGRESS_KEY, progress.encode())
        self._write(batch)
        self._confirmed = progress or self._confirmed

    def sync(self) -> None:
        """See ``UserStore``."""
        try:
            self._open_db().flush_wal(True)
        except StoreClosed:
            raise
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            self._failed = True
            raise write_failed(self.path, error) from error

    def checkpoint(self, target: Path) -> None:
        """A consistent copy of the whole store in the new directory ``target``, by hard links where the disk allows.

        Takes milliseconds whatever the size, and a writer may go on. Raises StoreWriteFailed.
        """
        checkpoint = Checkpoint(self._open_db())
        try:
            checkpoint.create_checkpoint(str(target))
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            raise write_failed(target, error) from error
        finally:
            del checkpoint  # it would keep the lock after close()

    def compact(self, first: bytes | None = None, last: bytes | None = None) -> None:
        """Rewrites the files that hold ids from ``first`` to ``last`` without what was deleted or replaced there."""
        try:
            db = self._open_db()
            db.flush()
            db.compact_range(_USER + (first or b""), None if last is None else _USER + last)
        except StoreClosed:
            raise
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            raise write_failed(self.path, error) from error

    def close(self) -> None:
        """See ``UserStore``. What is in memory goes to a sorted file first: the next open has no log to replay."""
        self._sync.stop()
        self._end_walks()
        if self._db is not None:
            db, self._db = self._db, None
            try:
                if not self._failed:
                    db.flush()
            except Exception:
                pass  # the log holds it all: a full disk must not keep the lock
            finally:
                db.close()

    def _open_db(self) -> Rdict:
        if self._db is None:
            raise StoreClosed(f"the store {self.path} is closed: open it again")
        if self._failed:
            self._reopen()
        return self._db

    def _timed_sync(self) -> None:
        """Of the timer's thread. A failure is told at the next call, which opens the store again."""
        if self._db is not None and not self._failed:
            try:
                self._db.flush_wal(True)
            except Exception:  # rocksdict raises bare Exception for everything RocksDB says
                self._failed = True

    def _reopen(self) -> None:
        """After a failed write RocksDB refuses further ones: only a new handle tells what became durable."""
        assert self._db is not None
        self._sync.stop()
        self._end_walks()
        self._db.close()
        self._db = open_for_writing(self.path, self._memory)
        self._failed = False
        before, now = self._confirmed, self.progress()
        self._confirmed = now
        if before is not None and (now is None or now.offset < before.offset):
            raise StoreRolledBack(
                f"the store {self.path} came back at offset {'none' if now is None else now.offset}, it had confirmed "
                f"{before.offset}: feed it again from there"
            )

    def _write(self, batch: WriteBatch) -> None:
        db = self._open_db()
        try:
            db.write(batch, self._sync.write_options)
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            self._failed = True
            raise write_failed(self.path, error) from error
        self._sync.written()

    def _held_layout(self) -> RowLayout:
        """Takes a new store for the wanted layout, or sees that an old one fits. Rows of older versions fit: codec."""
        held, wanted = self._read([LAYOUT_KEY])[0], self._wanted
        if held is not None and RowLayout.parse(held.decode(errors="replace")) != wanted:
            raise StoreMismatch(
                f"the store {self.path} holds rows of {held.decode(errors='replace')}, the model needs "
                f"{wanted.fingerprint}: give another directory, or the model and settings that it was made with"
            )
        if held != wanted.fingerprint.encode():
            batch = WriteBatch(raw_mode=True)
            batch.put(LAYOUT_KEY, wanted.fingerprint.encode())
            self._write(batch)
        return wanted


class _Syncing:
    """Carries a SyncPolicy out: write options for a batch, and one sync an interval for all batches of it."""

    def __init__(self, policy: SyncPolicy, sync: Callable[[], None]) -> None:
        self.write_options = WriteOptions()
        self.write_options.sync = policy.mode == "batch"
        self._interval_s = policy.interval_ms / 1000 if policy.mode == "interval" else None
        self._sync = weakref.WeakMethod(sync)
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def written(self) -> None:
        """A batch was written: it is synced within the interval."""
        if self._interval_s is None:
            return
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(self._interval_s, self._due)
                self._timer.daemon = True
                self._timer.start()

    def stop(self) -> None:
        """No sync is running or due after this."""
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            timer.join()

    def _due(self) -> None:
        with self._lock:
            self._timer = None
        sync = self._sync()
        if sync is not None:
            sync()


class _Walk:
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
        if self._cursor is None:
            raise StoreClosed(f"the store {self._path} was closed during a walk over its rows: open it and walk again")
        row = next(self._ahead, None)
        if row is None:
            self._ahead = self._read_ahead(self._cursor)
            row = next(self._ahead)
        return row

    def _read_ahead(self, cursor: RdictIter) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        users: list[bytes] = []
        values: list[bytes] = []
        while len(users) < _WALK_ROWS and cursor.valid():
            users.append(cursor.key()[len(_USER) :])
            values.append(cursor.value())
            cursor.next()
        try:
            cursor.status()
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            raise unreadable(self._path, error) from error
        try:
            return zip(users, codec.decode(self._layout, users, values), strict=True)
        except RowDamaged as error:
            raise error.at(str(self._path)) from None

    def close(self) -> None:
        self._cursor = None
        self._ahead = iter(())


def found_rows(
    layout: RowLayout, users: Sequence[bytes], values: Sequence[bytes | None]
) -> tuple[Slab, NDArray[np.bool_]]:
    """(rows, found) of ``UserStore.get_many`` from stored values, None where there is none."""
    found = np.fromiter((value is not None for value in values), np.bool_, len(values))
    held = [value for value in values if value is not None]
    if len(held) == len(users):
        return codec.decode(layout, users, held), found
    slab = np.zeros((len(values), layout.row_bytes), np.uint8)
    if held:
        slab[found] = codec.decode(layout, [users[k] for k in np.flatnonzero(found).tolist()], held)
    return slab, found
