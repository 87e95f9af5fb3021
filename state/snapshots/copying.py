"""Freezing one store into a directory: by RocksDB's checkpoint, or by copying it beside the process that writes to it.

A copy beside a writer is made from a *secondary*: RocksDB opens the writer's files a second time, reads its MANIFEST
and then its log, and sees nothing that is written later. That view is one point in time unless the writer, between the
two readings, put rows from its log into a file and removed the log. It notes each such step in the MANIFEST first; so a
MANIFEST that did not grow while the secondary caught up with it and with the log vouches for the view.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rocksdict import Checkpoint, Rdict, WriteBatch

from state.exceptions import StoreUnreadable
from state.rocksdb import (
    MEBIBYTE,
    StoreMemory,
    manifest_state,
    open_following,
    open_for_writing,
    release,
    unreadable,
    write_failed,
)

COPY_ATTEMPTS = 8
"""Times that a copy is begun anew because the writer removed a file before the view had opened it"""
CATCH_UP_ATTEMPTS = 200
"""Times that a view catches up, some milliseconds each: the MANIFEST of a busy writer grows a few times a minute"""
_PAUSE_S = 0.05
_BATCH_BYTES = 4 * MEBIBYTE


def checkpoint_idle(store: Path, target: Path) -> None:
    """A checkpoint of a store that nobody writes to. Raises StoreLocked at once if somebody does."""
    db = open_for_writing(store, _small_memory(), lock_wait_s=0)
    try:
        _checkpoint(db, target)
    finally:
        release(db)


def copy_beside_writer(store: Path, target: Path) -> None:
    """A store in the new directory ``target`` with all keys that ``store`` had at one point in time, its own included.

    Raises StoreUnreadable, StoreWriteFailed.
    """
    scratch = target.with_name(f"{target.name}.view")
    copied = target.with_name(f"{target.name}.copy")
    for attempt in range(1, COPY_ATTEMPTS + 1):
        try:
            with _fixed_view(store, scratch) as view:
                _copy_all(view, store, copied)
            break
        except StoreUnreadable:
            if attempt == COPY_ATTEMPTS:
                raise
            time.sleep(_PAUSE_S)  # the writer removed a file that the view needs: a later view has newer ones
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    checkpoint_idle(copied, target)
    shutil.rmtree(copied)


@contextmanager
def _fixed_view(store: Path, scratch: Path) -> Iterator[Rdict]:
    view = open_following(store, scratch)
    try:
        _settle(view, store)
        yield view
    finally:
        release(view)


def _settle(view: Rdict, store: Path) -> None:
    """Catches up until the writer did not move rows from its log to a file meanwhile."""
    for _ in range(CATCH_UP_ATTEMPTS):
        before = manifest_state(store)
        try:
            view.try_catch_up_with_primary()
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            raise unreadable(store, error) from error
        if before is not None and before == manifest_state(store):
            return
    raise StoreUnreadable(
        f"the store {store} cannot be read at one point in time: whoever writes to it moved its files "
        f"{CATCH_UP_ATTEMPTS} times while it was read; try again"
    )


def _copy_all(view: Rdict, store: Path, copied: Path) -> None:
    """Every key and value as they are; a walk that ended early is told by its status."""
    shutil.rmtree(copied, ignore_errors=True)
    db = open_for_writing(copied, _small_memory(), lock_wait_s=0)
    try:
        cursor = view.iter()
        cursor.seek_to_first()
        while cursor.valid():
            batch = WriteBatch(raw_mode=True)
            while cursor.valid() and batch.size_in_bytes() < _BATCH_BYTES:
                batch.put(cursor.key(), cursor.value())
                cursor.next()
            _write(db, batch, copied)
        try:
            cursor.status()
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            raise unreadable(store, error) from error
    finally:
        release(db)


def _write(db: Rdict, batch: WriteBatch, path: Path) -> None:
    try:
        db.write(batch)
    except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
        raise write_failed(path, error) from error


def _checkpoint(db: Rdict, target: Path) -> None:
    checkpoint = Checkpoint(db)
    try:
        checkpoint.create_checkpoint(str(target))
    except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
        raise write_failed(target, error) from error
    finally:
        del checkpoint  # it would keep the lock


def _small_memory() -> StoreMemory:
    return StoreMemory(8 * MEBIBYTE, 64 * MEBIBYTE)
