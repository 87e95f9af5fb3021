"""Opening RocksDB: its options and memory, its lock, and what its errors mean. Nothing here knows rows or users."""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Protocol

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
    WriteBufferManager,
)

from state.exceptions import StoreLocked, StoreUnreadable, StoreWriteFailed
from state.log_check import endless_record

MEBIBYTE = 1 << 20
BLOCK_CACHE_BYTES = 64 * MEBIBYTE
"""Rows are read once per batch: a larger cache of blocks would mostly hold what is not asked again, and index and
filter blocks of a million users fit into this."""
MEMTABLE_BYTES = 64 * MEBIBYTE
"""Rows of one store that are gathered before they go to disk as one sorted file."""
MEMTABLES_BYTES = 192 * MEBIBYTE
"""Of all stores that share a ``StoreMemory``, those on their way to the disk included: see ``StoreMemory.relieve``."""
FLUSHED_FILES = 8
"""Sorted files of a memtable each that are merged at once, twice RocksDB's default: rows are merged less often"""
LEVEL_BYTES = 1024 * MEBIBYTE
"""Size of the level that they are merged into: a million users stay in one"""
MEMTABLE_BLOOM = 0.02
"""Share of a memtable for a bloom filter: most rows that are read are in none of the memtables"""
READER_CACHE_BYTES = 8 * MEBIBYTE
BLOOM_BITS = 10
"""A new user costs one in a hundred a read of a block in vain; without, every one."""
LOCK_WAIT_S = 5.0
"""How long an open waits for another process to let go: a worker that was told to stop needs a moment to close."""
_LOCK_POLL_S = 0.05
READ_ATTEMPTS = 50
"""How often a reader opens a store again whose writer moved its files meanwhile"""
_NOT_WRITABLE = ("Read-only file system", "Permission denied", "No space left", "Disk quota exceeded")
"""What need not keep anybody from reading"""
ROCKSDICT_SETTINGS = "rocksdict-config.json"
"""What rocksdict itself keeps beside RocksDB's files; nothing reads it here."""

_HELD_BY_OTHER = "While lock file"
_HELD_HERE = "lock hold by current process"
"""What RocksDB says when another handle has the lock: of another process, of this one."""
_CAUSES = (
    ("No space left", "free space on its disk, then go on"),
    ("Disk quota exceeded", "raise its quota, then go on"),
    ("Read-only file system", "mount its disk for writing, then go on"),
    ("Too many open files", "raise the limit of open files (ulimit -n), then go on"),
    ("Permission denied", "check the rights on the path"),
    ("Input/output error", "check its disk; restore a snapshot if it is broken"),
)
"""(what the error text holds, the next action)"""


class HasMemtable(Protocol):
    """A store as ``StoreMemory`` sees it."""

    def memtable_bytes(self) -> int:
        """What it has gathered since its last flush."""

    def flush(self, *, wait: bool) -> None:
        """Writes it to the disk, at once or in the background. A failure is the store's own, seen at its next call."""


class StoreMemory:
    """RocksDB's memory, shared by all stores that are given it: a worker's footprint then knows no partitions.

    Stores of several threads may share one: who writes may flush a store that another thread opens, reads or closes.
    """

    def __init__(self, cache_bytes: int = BLOCK_CACHE_BYTES, memtables_bytes: int = MEMTABLES_BYTES) -> None:
        self.cache = Cache(cache_bytes)
        # It only counts: by itself it would flush whichever store is written next, however small, and wait for nothing.
        self.memtables = WriteBufferManager(4 * memtables_bytes, False)
        self._limit = memtables_bytes
        self.memtable_bytes = min(MEMTABLE_BYTES, memtables_bytes // 3)
        """Of one store at most: a memtable's bloom filter is a share of this, and is there from its beginning"""
        self._stores: weakref.WeakSet[HasMemtable] = weakref.WeakSet()
        self._lock = Lock()
        """Of ``_stores``"""

    def share(self, store: HasMemtable) -> None:
        """Counts the store's memtable among those that ``relieve`` flushes, for as long as the store lives."""
        with self._lock:
            self._stores.add(store)

    def relieve(self) -> None:
        """Keeps all memtables inside the limit, but for the batch just written; called after every write.

        Half of the limit is for those that are being filled: beyond it the largest goes to the disk in the background.
        Those on their way may take the other half; beyond it the writer waits.
        """
        if self.memtables.get_usage() <= self._limit // 2:
            return
        with self._lock:
            stores = list(self._stores)
        stores = sorted(stores, key=lambda store: store.memtable_bytes(), reverse=True)
        if sum(store.memtable_bytes() for store in stores) > self._limit // 2:
            stores.pop(0).flush(wait=False)
        for store in stores:
            if self.memtables.get_usage() <= self._limit:
                return
            store.flush(wait=True)


def open_for_writing(path: Path, memory: StoreMemory, lock_wait_s: float = LOCK_WAIT_S) -> Rdict:
    """The database at ``path``, made where it is missing.

    Waits up to ``lock_wait_s`` while another process has it open. Raises StoreLocked, StoreUnreadable.
    """
    deadline = time.monotonic() + lock_wait_s
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            return opened(path, _options(memory), AccessType.read_write())
        except StoreUnreadable:
            raise
        except OSError as error:
            raise StoreUnreadable(
                f"the store {path} cannot be opened: {error}; {_action(error, 'check the path and its rights')}"
            ) from error
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            said = str(error)
            if _HELD_HERE in said:
                raise StoreLocked(
                    f"the store {path} is open already in this process: close that one first, or give another directory"
                ) from error
            if _HELD_BY_OTHER not in said:
                raise unreadable(path, error) from error
            if time.monotonic() >= deadline:
                raise StoreLocked(
                    f"the store {path} is open for writing in another process{lock_holder(path)}: stop that one first, "
                    f"or give another directory (waited {lock_wait_s:g} s)"
                ) from error
            time.sleep(_LOCK_POLL_S)


def open_for_reading(path: Path) -> Rdict:
    """The database at ``path`` as it stands now, beside a writer or not. Raises StoreUnreadable.

    Nothing is written but rocksdict's settings, which nothing reads; where that is refused, it works all the same.
    """
    if not (path / "CURRENT").is_file():
        raise StoreUnreadable(f"{path} holds no store: name a partition's directory under --state of a run")
    for attempt in range(READ_ATTEMPTS):
        before = manifest_state(path)
        try:
            db = _opened_to_read(path)
        except StoreUnreadable:
            if before == manifest_state(path) or attempt == READ_ATTEMPTS - 1:
                raise
            continue
        if before == manifest_state(path):
            return db
        db.close()
    raise StoreUnreadable(
        f"the store {path} cannot be read at one point in time: whoever writes to it moved its files {READ_ATTEMPTS} "
        "times while it was opened; try again"
    )


def manifest_state(path: Path) -> tuple[str, int] | None:
    """Which MANIFEST is in use, and how far it is written: it moves whenever rows go from the log to a file.

    A reader that opens meanwhile can miss a log between the files and the logs that it sees.
    """
    try:
        current = (path / "CURRENT").read_text(encoding="ascii").strip()
        return current, (path / current).stat().st_size
    except (OSError, ValueError):
        return None


def _opened_to_read(path: Path) -> Rdict:
    try:
        try:
            return opened(path, reading_options(), AccessType.read_only(False))
        except OSError as error:
            if not any(said in str(error) for said in _NOT_WRITABLE):
                raise
            return _opened_by_links(path)
    except StoreUnreadable:
        raise
    except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
        raise unreadable(path, error) from error


def open_following(path: Path, notes: Path) -> Rdict:
    """The database at ``path`` as it stands, which can catch up with its writer (RocksDB's secondary instance).

    ``notes`` is a directory for RocksDB's own files, whose owner removes it. Raises StoreUnreadable.
    """
    if not (path / "CURRENT").is_file():
        raise StoreUnreadable(f"{path} holds no store: name a partition's directory under --state of a run")
    try:
        return opened(path, reading_options(), AccessType.secondary(str(notes)))
    except StoreUnreadable:
        raise
    except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
        raise unreadable(path, error) from error


def _opened_by_links(path: Path) -> Rdict:
    """For a disk or a user that may not write: rocksdict writes its settings (40 bytes) anew wherever it opens, even
    to read. So it is given a directory of links to the store's files; once it has opened them it needs no names.
    """
    with tempfile.TemporaryDirectory(prefix="coldstream-links-") as links:
        for file in path.iterdir():
            if file.name != ROCKSDICT_SETTINGS:
                (Path(links) / file.name).symlink_to(file.absolute())
        return opened(Path(links), reading_options(), AccessType.read_only(False))


def opened(path: Path, options: Options, access: AccessType) -> Rdict:
    """The database with these options, which rocksdict would else take from the files of the one that it finds.

    Blocks of rows do not fill the cache: they are hardly asked for twice, and it costs a tenth of a read.
    """
    endless = endless_record(path)
    if endless is not None:
        raise StoreUnreadable(f"the store {path} is damaged: {endless}; restore a snapshot, or run again")
    db = Rdict(str(path), options=options, column_families={"default": options}, access_type=access)
    scattered = ReadOptions()
    scattered.fill_cache(False)  # type: ignore[call-arg]  # the stub lacks the argument
    db.set_read_options(scattered)
    return db


def reading_options() -> Options:
    """For a handle that only reads."""
    options = Options(raw_mode=True)
    options.set_block_based_table_factory(_table(Cache(READER_CACHE_BYTES)))
    return options


def release(db: Rdict, *, flush: bool = False) -> None:
    """Closes a handle and frees the store's lock, whatever RocksDB says: what is confirmed stands in the log.

    ``flush`` writes what is in memory to a sorted file first, if the disk takes it.
    """
    if flush:
        with suppress(Exception):  # rocksdict raises bare Exception for everything RocksDB says
            db.flush()
    with suppress(Exception):  # it says again what failed before, or that it is closed already
        db.close()


def unreadable(path: Path, error: Exception) -> StoreUnreadable:
    """What RocksDB said, as an error of ours with the next action."""
    return StoreUnreadable(
        f"the store {path} cannot be read: {error}; {_action(error, 'restore a snapshot, or run again')}"
    )


def write_failed(path: Path, error: Exception) -> StoreWriteFailed:
    """What RocksDB said, as an error of ours with the next action."""
    return StoreWriteFailed(
        f"the store {path} cannot be written: {error}; {_action(error, 'check its disk, then go on')}; "
        "nothing that was confirmed is lost"
    )


def lock_holder(path: Path) -> str:
    """`` (process 123: coldstream worker)`` for whoever holds the store's lock, as far as the system tells; else empty.

    Read from Linux's table of locks: opening the lock file to ask would drop the lock when this process holds it.
    """
    try:
        inode = (path / "LOCK").stat().st_ino
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] == "POSIX" and int(fields[5].split(":")[2]) == inode and int(fields[4]) > 0:
                return f" (process {fields[4]}: {_command_of(int(fields[4]))})"
    except (OSError, ValueError, IndexError):
        pass
    return ""


def _command_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    except OSError:
        return "unknown"
    return " ".join(os.path.basename(word) for word in words[:4]) or "unknown"


def _action(error: Exception, otherwise: str) -> str:
    return next((action for said, action in _CAUSES if said in str(error)), otherwise)


def _options(memory: StoreMemory) -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(memory.memtable_bytes)
    options.set_max_write_buffer_number(3)  # one fills while two wait for the disk; with fewer, bursts stall
    options.set_write_buffer_manager(memory.memtables)
    options.set_compression_type(DBCompressionType.none())  # floats barely compress
    options.set_max_background_jobs(2)
    options.set_level_zero_file_num_compaction_trigger(FLUSHED_FILES)
    options.set_max_bytes_for_level_base(LEVEL_BYTES)
    options.set_memtable_prefix_bloom_ratio(MEMTABLE_BLOOM)
    options.set_memtable_whole_key_filtering(True)
    options.set_block_based_table_factory(_table(memory.cache))
    return options


def _table(cache: Cache) -> BlockBasedOptions:
    table = BlockBasedOptions()
    table.set_block_cache(cache)
    table.set_bloom_filter(BLOOM_BITS, False)
    return table
