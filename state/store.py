"""Users' rows by id, one store per topic partition: the interface, and RocksDB behind it. Its twin is ``memory_store``.

A batch of rows and the partition's progress are written in one atomic step, so after a crash rows and offset agree:
whoever opens the store goes on after ``progress().offset``. Every write goes through RocksDB's write-ahead log, which
survives kill -9 under every policy; what power loss can take back is the policy's (``state.syncing``), and it always
takes rows and offset together.

Where a row lies is ``state.keys``' matter, and what lies there ``state.codec``'s. No path is ever built from an id.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from rocksdict import (
    BottommostLevelCompaction,
    Checkpoint,
    CompactOptions,
    Rdict,
    WriteBatch,
    WriteOptions,
)

from learner.user_state import RowLayout, Slab
from state import codec
from state.codec import Progress
from state.exceptions import (
    RowDamaged,
    StoreClosed,
    StoreDamaged,
    StoreMismatch,
    StoreRolledBack,
    StoreUnfinished,
    StoreUnreadable,
)
from state.history_codec import Book
from state.history_cursor import HistoryCursor, RocksCursor
from state.keys import (
    AFTER_HISTORIES,
    AFTER_USERS,
    HISTORY,
    LAYOUT_KEY,
    NOTHING,
    OWN,
    PROGRESS_KEY,
    RESERVED,
    RESTORING_KEY,
    USER,
    after_stem,
    checked_histories,
    checked_own,
    history_stem,
)
from state.rocksdb import StoreMemory, open_for_reading, open_for_writing, release, unreadable, write_failed
from state.syncing import Syncing, SyncPolicy
from state.walk import Walk

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_READ_KEYS = 1024
"""Keys that one call of RocksDB reads: 16,384 at once take a fifth longer"""
_READ_THREADS = 2
"""Reading frees the interpreter's lock, so a second core, where one is free, takes its share"""


_UNLOGGED = WriteOptions()
_UNLOGGED.disable_wal = True  # type: ignore[method-assign, assignment]
# The stub says that it is a method.


_REWRITING = CompactOptions()
# Without it, RocksDB moves a file that overlaps no other one down as it is, with the deletions that stand in it.
_REWRITING.set_bottommost_level_compaction(BottommostLevelCompaction.force())


class UserStore(Protocol):
    """Users' rows of one partition. One writer; reading never writes. Rows are (n, row_bytes) uint8.

    After ``close`` every other call raises StoreClosed. A row that is not what was written raises RowDamaged.
    """

    layout: RowLayout

    def get_many(self, users: Sequence[bytes]) -> tuple[Slab, NDArray[np.bool_]]:
        """(rows, found): a fresh, writable slab with one row per id, zeros where ``found`` is False."""

    def write_batch(
        self,
        users: Sequence[bytes],
        rows: Slab,
        progress: Progress | None,
        *,
        deleted: Sequence[bytes] = (),
        own: Mapping[bytes, bytes | None] = NOTHING,
        histories: Mapping[bytes, bytes | None] = NOTHING,
    ) -> list[bytes]:
        """Puts the rows, takes out the ``deleted`` users and sets the progress (None leaves it), all or nothing.

        The same step puts and takes out (None) keys of the store's ``own`` and of ``histories``, see ``keys``. A store
        that keeps histories drops all of them when rows or deletions come without the book's record: they would no
        longer be those of the rows. Returns the rows as they are stored, in the order of ``users``. The rows given may
        get version, owner and checksum put in. Of a user named twice the last row counts; one both written and deleted
        is deleted. Raises StoreWriteFailed; the store then opens itself again at the next call, and the same batch may
        be given once more.
        """

    def own(self, prefix: bytes = OWN) -> list[tuple[bytes, bytes]]:
        """What ``write_batch`` and ``end_restore`` put as ``own`` under keys that begin so, in order of the keys."""

    def histories(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What ``write_batch`` put as ``histories`` under these keys, in their order; None where there is nothing."""

    def history_cursor(self) -> HistoryCursor:
        """A way through the histories as they stand now. Close it: RocksDB keeps what it sees for as long."""

    def cut_histories(self, first: bytes, histories: Mapping[bytes, bytes | None] = NOTHING) -> None:
        """Takes out every history's key from ``first`` on and puts ``histories``, which lie before, in one atomic step.

        Raises StoreWriteFailed.
        """

    def progress(self) -> Progress | None:
        """How far the rows have come; None for a new store."""

    def iterate(self, after: bytes | None = None) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """Every user's id and row, in order of the id's bytes, as they stood when the walk began.

        ``after`` skips all ids up to and including that one.
        """

    def stored(self, after: bytes | None = None) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Ids and rows as they are stored, none of them checked, up to 1,024 at a time; else as ``iterate``."""

    def stored_row(self, user: bytes) -> bytes | None:
        """A user's row as it is stored, not checked; None where there is none."""

    def approximate_count(self) -> int:
        """How many users there are; RocksDB may count one again for each row not yet merged with its older self.

        The same goes for what it keeps of histories.
        """

    def sync(self) -> None:
        """Forces all batches so far to the disk."""

    def restoring(self) -> bool:
        """Whether a restore began that has not ended: the rows are then not complete, whatever the progress says."""

    def begin_restore(self, *, empty: bool) -> None:
        """From now on ``restoring``. ``empty`` takes out every row, the progress, all ``own`` keys and histories
        in the same step.

        What is written to an emptied store is safe from a crash only after ``end_restore``.
        """

    def end_restore(self, progress: Progress, own: Mapping[bytes, bytes | None] = NOTHING) -> None:
        """Sets the progress and ``own`` keys and is no longer ``restoring``, in one atomic step."""

    def close(self) -> None:
        """Releases every handle, those of unfinished walks too; closing twice does nothing more."""


class RocksReader:
    """The rows of a RocksDB as they stand when it is opened, beside a live writer or not; nothing is ever written.

    The layout is the one that the store names itself. Use as a context, or call ``close``. Raises StoreUnreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._walks: weakref.WeakSet[Walk | RocksCursor] = weakref.WeakSet()
        self._readers: ThreadPoolExecutor | None = None
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
        values = self._read([USER + user for user in users])
        try:
            return codec.decode_found(self.layout, users, values)
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
        return self._walk(after)

    def stored(self, after: bytes | None = None) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """See ``UserStore``."""
        walk = self._walk(after)
        while (part := walk.read())[0]:
            yield part

    def stored_row(self, user: bytes) -> bytes | None:
        """See ``UserStore``."""
        return self._read([USER + user])[0]

    def own(self, prefix: bytes = OWN) -> list[tuple[bytes, bytes]]:
        """See ``UserStore``."""
        cursor = self._open_db().iter()
        cursor.seek(prefix)
        found: list[tuple[bytes, bytes]] = []
        while cursor.valid() and (key := cursor.key()).startswith(prefix):
            if key not in RESERVED:
                found.append((key, cursor.value()))
            cursor.next()
        try:
            cursor.status()
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            del cursor  # whoever keeps the error would keep the store's lock with it
            raise unreadable(self.path, error) from error
        return found

    def histories(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See ``UserStore``."""
        return self._read(list(keys))

    def history_cursor(self) -> HistoryCursor:
        """See ``UserStore``."""
        cursor = RocksCursor(self.path, self._open_db().iter())
        self._walks.add(cursor)
        return cursor

    def neighbours(self, user: bytes) -> tuple[bytes | None, bytes | None]:
        """The ids next to a user's, before and after it in order of their bytes; the user need not be there."""
        cursor = self._open_db().iter()
        cursor.seek_for_prev(USER + user)
        if cursor.valid() and cursor.key() == USER + user:
            cursor.prev()
        before = cursor.key() if cursor.valid() else b""
        cursor.seek(USER + user + b"\0")
        after = cursor.key()[len(USER) :] if cursor.valid() else None
        return (before[len(USER) :] if before.startswith(USER) else None), after

    def _walk(self, after: bytes | None) -> Walk:
        cursor = self._open_db().iter()
        cursor.seek(USER if after is None else USER + after + b"\0")
        walk = Walk(self.path, self.layout, cursor)
        self._walks.add(walk)
        return walk

    def restoring(self) -> bool:
        """See ``UserStore``."""
        return self._read([RESTORING_KEY])[0] is not None

    def approximate_count(self) -> int:
        """See ``UserStore``."""
        own = sum(packed is not None for packed in self._read(list(RESERVED))) + len(self.own())
        book = self._book()
        others = own if book is None else own + 1 + book.keys
        return max(int(self._open_db().property_int_value("rocksdb.estimate-num-keys") or 0) - others, 0)

    def _book(self) -> Book | None:
        packed = self._read([HISTORY])[0]
        try:
            return None if packed is None else Book.decode(packed)
        except ValueError as error:
            raise StoreDamaged(f"{self.path}: {error}: restore a snapshot or the changelog") from None

    def close(self) -> None:
        """See ``UserStore``."""
        self._end_reading()
        if self._db is not None:
            self._db.close()
            self._db = None

    def _end_reading(self) -> None:
        """RocksDB keeps its lock while an iterator lives, and no thread may read past a close."""
        for walk in list(self._walks):
            walk.close()
        if self._readers is not None:
            self._readers.shutdown()
            self._readers = None

    def _open_db(self) -> Rdict:
        if self._db is None:
            raise StoreClosed(f"the store {self.path} is closed: open it again")
        return self._db

    def _read(self, keys: list[bytes]) -> list[bytes | None]:
        db = self._open_db()
        try:
            if len(keys) <= _READ_KEYS:
                values: Any = db.get(keys)  # type: ignore[arg-type]
                return list(values)
            if self._readers is None:
                from concurrent.futures import ThreadPoolExecutor  # not above: a query starts faster without

                self._readers = ThreadPoolExecutor(_READ_THREADS, "coldstream-read")
            parts: Any = self._readers.map(db.get, [keys[k : k + _READ_KEYS] for k in range(0, len(keys), _READ_KEYS)])
            return [value for part in parts for value in part]
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


def _put(batch: WriteBatch, entries: Mapping[bytes, bytes | None]) -> None:
    """In order of the keys: RocksDB inserts them faster."""
    for key in sorted(entries):
        value = entries[key]
        if value is None:
            batch.delete(key)
        else:
            batch.put(key, value)


class RocksUserStore(RocksReader):
    """Rows in a RocksDB of their own directory. Use as a context, or call ``close``.

    ``to_restore``: it is opened to be restored, so that an interrupted restore into it may be ended.
    Raises StoreLocked, StoreMismatch, StoreUnreadable, StoreUnfinished when it cannot be opened for these rows.
    """

    def __init__(
        self,
        path: Path,
        layout: RowLayout,
        memory: StoreMemory | None = None,
        sync: SyncPolicy | None = None,
        *,
        to_restore: bool = False,
    ) -> None:
        self._wanted = layout
        self._memory = memory or StoreMemory()
        self._sync = Syncing(sync or SyncPolicy(), self._timed_sync)
        self._failed = False
        self._unlogged = False
        self._with_histories: bool | None = None
        """Whether there are any; None: it has to be looked up"""
        self._handle = Lock()
        """Held while the handle is exchanged, or used by another thread than the store's own"""
        super().__init__(path)
        self._memory.share(self)
        try:
            self._confirmed = self.progress()
            if self.restoring() and not to_restore:
                raise StoreUnfinished(
                    f"the restore of {path} from the changelog was interrupted, so users may be missing: restore it "
                    "again, or remove it and restore a snapshot"
                )
        except BaseException:
            self.close()
            raise

    def _opened(self) -> Rdict:
        return open_for_writing(self.path, self._memory)

    def write_batch(
        self,
        users: Sequence[bytes],
        rows: Slab,
        progress: Progress | None,
        *,
        deleted: Sequence[bytes] = (),
        own: Mapping[bytes, bytes | None] = NOTHING,
        histories: Mapping[bytes, bytes | None] = NOTHING,
    ) -> list[bytes]:
        """See ``UserStore``. Rows are put in order of their keys: RocksDB inserts them a third faster."""
        checked_own(own)
        checked_histories(histories)
        values = codec.seal(self.layout, users, rows)
        batch = WriteBatch(raw_mode=True)
        put = batch.put
        order = sorted(range(len(users)), key=users.__getitem__)
        keys = map(USER.__add__, map(users.__getitem__, order))
        deque(map(put, keys, map(values.__getitem__, order)), maxlen=0)
        for user in deleted:
            batch.delete(USER + user)
        _put(batch, own)
        if (users or deleted) and HISTORY not in histories and self._has_histories():
            batch.delete_range(HISTORY, AFTER_HISTORIES)
            self._with_histories = False
        _put(batch, histories)
        if progress is not None:
            put(PROGRESS_KEY, progress.encode())
        self._write(batch)
        self._confirmed = progress or self._confirmed
        if histories:
            self._with_histories = True
        return values

    def cut_histories(self, first: bytes, histories: Mapping[bytes, bytes | None] = NOTHING) -> None:
        """See ``UserStore``."""
        checked_histories(histories)
        batch = WriteBatch(raw_mode=True)
        batch.delete_range(max(first, HISTORY), AFTER_HISTORIES)
        _put(batch, histories)
        self._write(batch)
        self._with_histories = None

    def _has_histories(self) -> bool:
        if self._with_histories is None:
            cursor = self.history_cursor()
            self._with_histories = cursor.seek(HISTORY) is not None
            cursor.close()
        return self._with_histories

    def sync(self) -> None:
        """See ``UserStore``."""
        db = self._open_db()
        try:
            db.flush_wal(True)
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            self._failed = True
            raise write_failed(self.path, error) from error

    def begin_restore(self, *, empty: bool) -> None:
        """See ``UserStore``. What was taken out leaves the disk too; what comes goes past the write-ahead log."""
        batch = WriteBatch(raw_mode=True)
        batch.put(RESTORING_KEY, b"")
        dropped = empty and self._has_histories()
        if dropped:
            batch.delete_range(HISTORY, AFTER_HISTORIES)
        if empty:
            batch.delete(PROGRESS_KEY)
            batch.delete_range(USER, AFTER_USERS)
            for key, _ in self.own():
                batch.delete(key)
        self._write(batch)
        if empty:
            self._confirmed = None
            self._with_histories = False
            self.compact()
            self.compact_own()
            if dropped:
                self._rewrite(HISTORY, AFTER_HISTORIES)
        self._unlogged = empty

    def end_restore(self, progress: Progress, own: Mapping[bytes, bytes | None] = NOTHING) -> None:
        """See ``UserStore``."""
        checked_own(own)
        if self._unlogged:
            self._flush()
            self._unlogged = False
        batch = WriteBatch(raw_mode=True)
        batch.put(PROGRESS_KEY, progress.encode())
        _put(batch, own)
        batch.delete(RESTORING_KEY)
        self._write(batch)
        self._confirmed = progress

    def checkpoint(self, target: Path) -> None:
        """A consistent copy of the whole store in the new directory ``target``, by hard links where the disk allows.

        Takes milliseconds whatever the size, and a writer may go on. Raises StoreWriteFailed.
        """
        checkpoint = Checkpoint(self._open_db())
        try:
            checkpoint.create_checkpoint(str(target))
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            self._failed = True  # RocksDB would tell of this failure again at the next
            raise write_failed(target, error) from error
        finally:
            del checkpoint  # it would keep the lock after close()

    def compact(self, first: bytes | None = None, last: bytes | None = None) -> None:
        """Rewrites the files that hold ids from ``first`` to ``last`` without what was deleted or replaced there."""
        self._rewrite(USER + (first or b""), None if last is None else USER + last)

    def compact_own(self) -> None:
        """Rewrites the files that hold the store's own keys: what was deleted of them may have named users."""
        self._rewrite(OWN, USER)

    def compact_histories(self, user: bytes) -> None:
        """Rewrites the files that may hold what was deleted or replaced of a user's history."""
        stem = history_stem(user)
        cursor = self._open_db().iter()
        cursor.seek_for_prev(stem)
        before = cursor.key() if cursor.valid() else HISTORY
        cursor.seek(after_stem(stem))
        after = cursor.key() if cursor.valid() else AFTER_HISTORIES
        del cursor  # it would keep the files that are to go
        self._rewrite(max(before, HISTORY), min(after, AFTER_HISTORIES))

    def _rewrite(self, first: bytes, last: bytes | None) -> None:
        db = self._open_db()
        try:
            db.flush()
            db.compact_range(first, last, _REWRITING)
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            self._failed = True
            raise write_failed(self.path, error) from error

    def reopen(self) -> None:
        """Closes and opens again: RocksDB then lists its files anew, without the ids that removed ones began with."""
        self._open_db()
        self._failed = True  # so that the next call tries again where opening fails
        self._reopen()

    def close(self) -> None:
        """See ``UserStore``. What is in memory goes to a sorted file first: the next open has no log to replay."""
        self._sync.stop()
        self._end_reading()
        with self._handle:
            if self._db is not None:
                db, self._db = self._db, None
                release(db, flush=not self._failed)

    def _open_db(self) -> Rdict:
        if self._db is None:
            raise StoreClosed(f"the store {self.path} is closed: open it again")
        if self._failed:
            self._reopen()
        return self._db

    def memtable_bytes(self) -> int:
        """See ``HasMemtable``."""
        with self._handle:
            if self._db is None or self._failed:
                return 0
            return int(self._db.property_int_value("rocksdb.cur-size-active-mem-table") or 0)

    def flush(self, *, wait: bool) -> None:
        """See ``HasMemtable``."""
        with self._handle:
            if self._db is not None and not self._failed:
                try:
                    self._db.flush(wait)
                except Exception:  # rocksdict raises bare Exception for everything RocksDB says
                    self._failed = True

    def _timed_sync(self) -> None:
        """Of the timer's thread. After a failure the next call opens the store again, and sees what is there."""
        with self._handle:
            if self._db is not None and not self._failed:
                try:
                    self._db.flush_wal(True)
                except Exception:  # rocksdict raises bare Exception for everything RocksDB says
                    self._failed = True

    def _reopen(self) -> None:
        """After a failed write RocksDB refuses further ones: only a new handle tells what became durable.

        Where that fails too, the next call tries again.
        """
        assert self._db is not None
        if self._unlogged:  # what the restore wrote was in memory alone
            raise StoreUnfinished(
                f"a write failed while {self.path} was restored, so rows may be missing: open it to restore it again"
            )
        self._sync.stop()
        self._end_reading()
        self._with_histories = None
        with self._handle:
            release(self._db)
            self._db = open_for_writing(self.path, self._memory)
            self._failed = False
        try:
            before, now = self._confirmed, self.progress()
        except BaseException:
            self._failed = True
            raise
        self._confirmed = now
        if before is not None and (now is None or now.offset < before.offset):
            raise StoreRolledBack(
                f"the store {self.path} came back at offset {'none' if now is None else now.offset}, it had confirmed "
                f"{before.offset}: feed it again from there"
            )

    def _flush(self) -> None:
        db = self._open_db()
        try:
            db.flush()
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            self._failed = True
            raise write_failed(self.path, error) from error

    def _write(self, batch: WriteBatch) -> None:
        db = self._open_db()
        try:
            db.write(batch, _UNLOGGED if self._unlogged else self._sync.write_options)
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            self._failed = True
            raise write_failed(self.path, error) from error
        self._sync.written()
        self._memory.relieve()

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
