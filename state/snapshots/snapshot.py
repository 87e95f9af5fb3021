"""Snapshots of a state directory: taken beside a running writer, verified in every byte when they are restored.

    snapshot.json  partition-N/…  model.safetensors …    see ``manifest`` (format), ``places`` (where)

A snapshot is one point in time of each partition: rows and progress agree, and are counted before it is kept. It
shares no bytes on the disk with the store, so that damage to one leaves the other whole.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from learner.user_state import RowLayout
from state.exceptions import SnapshotError, StoreLocked
from state.rocksdb import MEBIBYTE, StoreMemory
from state.snapshots.content import (
    fetch_partition,
    fetch_state_files,
    held_partitions,
    read_manifest,
    verified_listing,
    write_content,
)
from state.snapshots.copying import checkpoint_idle, copy_beside_writer
from state.snapshots.manifest import MANIFEST, STATE_FILES, PartitionSnapshot, Snapshot, partition_name
from state.snapshots.places import LocalPlace, Place, RemotePlace, place_of, told_as_snapshot_errors
from state.snapshots.whole_directories import appear, partial_directory, remove_leftovers, replace_directory, sync_tree
from state.store import RocksUserStore

_STAGING = ".snapshot"
"""In a state directory: where its partitions are frozen while they are copied out"""
_EDITING_MEMORY = (16 * MEBIBYTE, 64 * MEBIBYTE)
"""Block cache and memtables of a store that is rewritten"""


def snapshot(state_dir: Path, url: str, *, partitions: Sequence[int] | None = None) -> Snapshot:
    """Takes all partitions (or these) of a state directory, whether somebody writes to them or not.

    Raises SnapshotError, StoreUnreadable, StoreDamaged; there is then nothing new at ``url``.
    """
    there = held_partitions(state_dir)
    chosen = there if partitions is None else sorted(set(partitions))

    def freeze(partition: int, target: Path) -> None:
        store = state_dir / partition_name(partition)
        if not (store / "CURRENT").is_file():
            raise SnapshotError(f"{store} holds no store: name a partition of the state directory of a run")
        try:
            checkpoint_idle(store, target)
        except StoreLocked:
            copy_beside_writer(store, target)

    return _taken(state_dir, url, chosen, freeze)


def snapshot_of_open(stores: Mapping[int, RocksUserStore], state_dir: Path, url: str) -> Snapshot:
    """The same for stores that this process has open: they are frozen within milliseconds, and may go on then.

    ``state_dir`` is the directory of their run. To be called by the thread that writes to them, or while none does.
    """
    return _taken(state_dir, url, sorted(stores), lambda partition, target: stores[partition].checkpoint(target))


def read_snapshot(url: str) -> Snapshot:
    """What the manifest says, which is checked against itself. Raises SnapshotError."""
    return read_manifest(place_of(url))


def list_snapshots(url: str) -> list[Snapshot]:
    """The snapshots under a directory or URL, or the one that is there itself; the newest first.

    Raises SnapshotError for one whose manifest cannot be used.
    """
    place = place_of(url)
    with told_as_snapshot_errors(f"listing snapshots in {url}"):
        found = [place] if place.has(MANIFEST) else [place.child(name) for name in place.children()]
        snapshots = [read_manifest(each) for each in found if each.has(MANIFEST)]
    return sorted(snapshots, key=lambda each: each.created_ms, reverse=True)


def restore(
    url: str, state_dir: Path, *, partitions: Sequence[int] | None = None, layout: RowLayout | None = None
) -> Snapshot:
    """Puts the partitions of a snapshot (or these) into a state directory where they are not yet.

    Every file is hashed, every row is checked, and rows and progress are compared with the manifest before a partition
    gets its name. A file of ``STATE_FILES`` that is there already stays. ``layout`` refuses rows of another. What was
    restored is told.
    Raises SnapshotError, StoreUnreadable, StoreDamaged; no partition is then left half restored.
    """
    place = place_of(url)
    with told_as_snapshot_errors(f"restoring {url} into {state_dir}"), ExitStack() as stack:
        held = verified_listing(place)
        chosen = held if partitions is None else held.of(partitions)
        for part in chosen.partitions:
            _refuse_used(state_dir / partition_name(part.partition))
            if layout is not None and part.row_layout != layout:
                raise SnapshotError(
                    f"partition {part.partition} of {url} holds rows of {part.layout}, the model needs "
                    f"{layout.fingerprint}: restore it for the model and settings that it was made with"
                )
        ready = []
        for part in chosen.partitions:
            final = state_dir / partition_name(part.partition)
            partial = stack.enter_context(partial_directory(final))
            fetch_partition(place, part, partial)
            ready.append((partial, final))
        fetch_state_files(place, held, state_dir)
        for partial, final in ready:
            sync_tree(partial)
            appear(partial, final)
    return chosen


def rewrite(url: str, edit: Callable[[int, RocksUserStore], None]) -> Snapshot:
    """Changes the rows of a snapshot: ``edit(partition, store)`` is called for each partition of a verified copy.

    The result takes the snapshot's place, with a new manifest and the old time. A local one is swapped in one step. A
    remote one is uploaded next to it as ``….partial-<random>`` first, then moved file by file: of a run that is killed
    while it moves, neither of the two may be whole. If ``edit`` raises, the snapshot stays as it is.
    """
    place = place_of(url)
    with told_as_snapshot_errors(f"rewriting {url}"):
        if isinstance(place, LocalPlace):
            remove_leftovers(place.path)
        held = verified_listing(place)
        with _scratch_for(place) as scratch:
            frozen = scratch / "frozen"
            frozen.mkdir()
            for part in held.partitions:
                edited = scratch / "edited" / partition_name(part.partition)
                fetch_partition(place, part, edited)
                _edit(edited, part, edit, frozen / partition_name(part.partition))
                shutil.rmtree(edited)
            fetch_state_files(place, held, frozen)
            if isinstance(place, RemotePlace):
                return _replace_remote(frozen, place, held)
            return _replace_local(frozen, scratch / "result", place, held)


def _taken(state_dir: Path, url: str, chosen: Sequence[int], freeze: Callable[[int, Path], None]) -> Snapshot:
    if not chosen:
        raise SnapshotError(f"{state_dir} holds no partition: name the state directory of a run")
    place, created_ms = place_of(url), time.time_ns() // 1_000_000
    with (
        told_as_snapshot_errors(f"a snapshot of {state_dir} to {url}"),
        partial_directory(state_dir / _STAGING) as staging,
        place.building() as building,
    ):
        for partition in chosen:
            freeze(partition, staging / partition_name(partition))
        for name in STATE_FILES:
            if (state_dir / name).is_file():
                shutil.copyfile(state_dir / name, staging / name)
        return write_content(staging, building, created_ms)


@contextmanager
def _scratch_for(place: Place) -> Iterator[Path]:
    """A directory to work in: beside a local snapshot, for it is to be swapped with it."""
    if isinstance(place, LocalPlace):
        with partial_directory(place.path) as scratch:
            yield scratch
    else:
        with tempfile.TemporaryDirectory(prefix="coldstream-snapshot-") as name:
            yield Path(name)


def _edit(directory: Path, part: PartitionSnapshot, edit: Callable[[int, RocksUserStore], None], frozen: Path) -> None:
    """Edits a store and leaves a clean copy of it at ``frozen``: RocksDB's own notes of what it held stay behind.

    They name keys; opening it once more begins them anew.
    """
    memory = StoreMemory(*_EDITING_MEMORY)
    with RocksUserStore(directory, part.row_layout, memory) as store:
        edit(part.partition, store)
    with RocksUserStore(directory, part.row_layout, memory) as store:
        store.checkpoint(frozen)


def _replace_local(frozen: Path, result: Path, place: LocalPlace, held: Snapshot) -> Snapshot:
    written = write_content(frozen, LocalPlace(result, place.url), held.created_ms)
    sync_tree(result)
    replace_directory(result, place.path)
    return written


def _replace_remote(frozen: Path, place: RemotePlace, held: Snapshot) -> Snapshot:
    beside = place.beside()
    with beside.building() as building:
        write_content(frozen, building, held.created_ms)
    place.remove()
    place.take_from(beside)
    return read_manifest(place)


def _refuse_used(final: Path) -> None:
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise SnapshotError(
            f"{final} is not empty: a restore never overwrites rows; give another --state, or move it away"
        )
