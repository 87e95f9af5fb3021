"""Opening RocksDB: its options and memory, its lock, and what its errors mean. Nothing here knows rows or users."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    Options,
    Rdict,
    WriteBufferManager,
)

from state.exceptions import StoreLocked, StoreUnreadable, StoreWriteFailed

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
LOCK_WAIT_S = 5.0
"""How long an open waits for another process to let go: a worker that was told to stop needs a moment to close."""
_LOCK_POLL_S = 0.05

_HELD_BY_OTHER = "While lock file"
_HELD_HERE = "lock hold by current process"
"""What RocksDB says when another handle has the lock: of another process, of this one."""
_CAUSES = (
    ("No space left", errno.ENOSPC, "free space on its disk, then go on"),
    ("Disk quota exceeded", errno.EDQUOT, "raise its quota, then go on"),
    ("Read-only file system", errno.EROFS, "mount its disk for writing, then go on"),
    ("Too many open files", errno.EMFILE, "raise the limit of open files (ulimit -n), then go on"),
    ("Permission denied", errno.EACCES, "check the rights on the path"),
    ("Input/output error", errno.EIO, "check its disk; restore a snapshot if it is broken"),
)
"""(what the error text holds, its errno, the next action)"""


class StoreMemory:
    """RocksDB's memory, shared by all stores that are given it: a worker's footprint then knows no partitions."""

    def __init__(self, cache_bytes: int = BLOCK_CACHE_BYTES, memtables_bytes: int = MEMTABLES_BYTES) -> None:
        self.cache = Cache(cache_bytes)
        self.memtables = WriteBufferManager(memtables_bytes, False)


def open_for_writing(path: Path, memory: StoreMemory, lock_wait_s: float = LOCK_WAIT_S) -> Rdict:
    """The database at ``path``, made where it is missing.

    Waits up to ``lock_wait_s`` while another process has it open. Raises StoreLocked, StoreUnreadable.
    """
    deadline = time.monotonic() + lock_wait_s
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            return Rdict(str(path), options=_options(memory))
        except OSError as error:
            raise StoreUnreadable(
                f"the store {path} cannot be opened: {error}; check the path and its rights"
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
    """The database at ``path`` as it stands now, beside a writer or not; nothing is written. Raises StoreUnreadable."""
    if not (path / "CURRENT").is_file():
        raise StoreUnreadable(f"{path} holds no store: name a partition's directory under --state of a run")
    try:
        return Rdict(str(path), options=Options(raw_mode=True), access_type=AccessType.read_only(False))
    except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
        raise unreadable(path, error) from error


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
    return next((action for said, _, action in _CAUSES if said in str(error)), otherwise)


def _options(memory: StoreMemory) -> Options:
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
    return options
