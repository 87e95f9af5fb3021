"""Erasing a user for good: the row with its event ring, the history, and every trace of them in a store's files.

    1. row and history out, counts down, the tombstone into the outbox: one batch, forced to the disk
    2. the user leaves the memory     3. the changelog is told, and the outbox emptied
    4. the files that may hold the id are written anew without it

A crash between two of them leaves nothing that the same erasure, made again, does not finish. RocksDB names ids in
its list of files and in its log for people, too: opening it again begins both anew. What is left then are blocks that
the file system has freed and not yet overwritten.

Entries of an outbox name users, and their payloads cannot be looked into. Where no changelog can be told, because no
worker runs or the store is a snapshot's, an erasure takes all of them out: the store then no longer says where it
stands, and a worker that opens it fills it anew from the changelog and the source. That one still has the user, and
the receipt says so: erase again through the worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from learner.user_state import RowLayout
from state import codec
from state.codec import UNKNOWN, Progress
from state.exceptions import ChangelogError, RowDamaged, StoreLocked, StoreUnreadable
from state.histories import without_users
from state.hot_rows import HotRows, without
from state.keys import OUTBOX, STANDING_KEY
from state.outbox import CommitLog, commit
from state.receipt import Receipt, Removal
from state.snapshots.content import held_partitions
from state.snapshots.manifest import partition_name
from state.snapshots.snapshot import rewrite
from state.store import RocksReader, RocksUserStore, UserStore

Tell = Callable[[], None]
"""Publishes all that an outbox has, and returns when the changelog has acknowledged it"""

_OLD_LOGS = "LOG.old.*"
"""What RocksDB keeps of its logs for people when it is opened again"""


class _Row(NamedTuple):
    """What a store has of a user."""

    bytes: int
    """0: no row"""
    events: int
    """UNKNOWN where the row is damaged"""


def erase_user(
    store: UserStore, user: bytes, partition: int, *, hot: HotRows | None = None, tell: Tell | None = None
) -> Removal:
    """Erases a user from an open store, whether it is there or not, and tells what was removed.

    For the process that writes to the store: ``hot`` is what it has of it in memory; where that has an outbox, ``tell``
    empties it. A store on disk is opened anew meanwhile. Raises StoreError, and whatever ``tell`` does: erase again
    then. ValueError for an outbox without ``tell``.
    """
    log = None if hot is None else hot.log
    if log is not None and tell is None:
        raise ValueError("an erasure from a store with an outbox needs a way to tell the changelog")
    row = _held(store, user)
    progress = _without_row(store.progress(), row) if row.bytes else store.progress()
    _take_out(store, log, user, progress, bool(row.bytes))
    store.sync()
    if hot is not None:
        hot.forget()
        hot.memory.wipe(user)
    if log is not None and tell is not None:
        tell()
        log.trim()
        if store.own(OUTBOX):
            raise ChangelogError("the changelog has not acknowledged the tombstone of an erased user: erase it again")
    if isinstance(store, RocksUserStore):
        _write_files_anew(store, user)
    left = store.progress()
    offset, version = (None, None) if left is None else (left.offset, left.meta_version)
    return Removal(partition, bool(row.bytes), row.events, row.bytes, offset, version)


def erase_from_directory(state_dir: Path, user: bytes, snapshots: Sequence[str] = ()) -> Receipt:
    """Erases a user from all partitions of a state directory and from snapshots, while nobody writes to them.

    Raises StoreLocked when somebody does, SnapshotError, StoreError; what was erased before that stays erased.
    """
    partitions = held_partitions(state_dir)
    if not partitions:
        raise StoreUnreadable(f"{state_dir} holds no partition: name the state directory of a run")
    removals = []
    for partition in partitions:
        path = state_dir / partition_name(partition)
        with _opened(path) as store:
            removals.append(erase_user(store, user, partition))
    return Receipt.of(user, removals, {url: erase_from_snapshot(url, user) for url in snapshots}, published=False)


def erase_from_snapshot(url: str, user: bytes) -> tuple[Removal, ...]:
    """Erases a user from every partition of a snapshot, which is replaced. Raises SnapshotError."""
    removals: list[Removal] = []

    def edit(partition: int, store: RocksUserStore) -> None:
        removals.append(erase_user(store, user, partition))

    rewrite(url, edit)
    return tuple(removals)


def _opened(path: Path) -> RocksUserStore:
    with RocksReader(path) as reader:
        layout: RowLayout = reader.layout
    try:
        return RocksUserStore(path, layout)
    except StoreLocked as error:
        raise StoreLocked(
            f"{error}; an erasure needs the store for itself, or the worker that has it erases"
        ) from error


def _take_out(store: UserStore, log: CommitLog | None, user: bytes, progress: Progress | None, held: bool) -> None:
    no_rows = np.zeros((0, store.layout.row_bytes), np.uint8)
    histories = without_users(store, [user])
    if log is not None:
        commit(store, log, [], no_rows, progress, deleted=[user], histories=histories)
        return
    own: dict[bytes, bytes | None] = {key: None for key, _ in store.own(OUTBOX)}
    if own:
        own[STANDING_KEY] = None
    if held or own or histories:
        store.write_batch([], no_rows, progress, deleted=[user], own=own, histories=histories)


def _held(store: UserStore, user: bytes) -> _Row:
    value = store.stored_row(user)
    if value is None:
        return _Row(0, 0)
    try:
        slab = codec.decode(store.layout, [user], [value])
    except RowDamaged:  # it goes all the same
        return _Row(len(value), UNKNOWN)
    return _Row(len(value), int(store.layout.rows(slab)["events"][0]))


def _without_row(progress: Progress | None, row: _Row) -> Progress | None:
    if progress is None or row.events != UNKNOWN:
        return without(progress, 1, row.events)
    return replace(progress, users=UNKNOWN, events=UNKNOWN, written_at_ms=time.time_ns() // 1_000_000)


def _write_files_anew(store: RocksUserStore, user: bytes) -> None:
    """Leaves neither the id nor an older row or event of it in any file."""
    store.compact(*store.neighbours(user))
    store.compact_own()
    store.compact_histories(user)
    store.reopen()
    for log in store.path.glob(_OLD_LOGS):
        log.unlink(missing_ok=True)
