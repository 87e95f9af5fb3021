"""What a snapshot holds, written and read: all of it is counted and hashed before it is kept or handed on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from learner.user_state import RowLayout, Slab
from state.codec import UNKNOWN
from state.exceptions import SnapshotError
from state.rocksdb import MEBIBYTE
from state.snapshots.manifest import (
    DRIVER_FILE,
    MANIFEST,
    STATE_FILES,
    PartitionSnapshot,
    Snapshot,
    SnapshotFile,
    SnapshotProgress,
    decode_manifest,
    encode_manifest,
    is_database_file,
    partition_name,
    partition_of,
)
from state.snapshots.places import LocalPlace, Place, copy_file, write_bytes
from state.snapshots.whole_directories import appear, partial_directory
from state.store import RocksReader

_MANIFEST_BYTES = 64 * MEBIBYTE
"""Some 500,000 files; a larger manifest is none of ours and is not read."""
_BLOCK_ROWS = 1024


def write_content(frozen: Path, building: Place, created_ms: int) -> Snapshot:
    """Writes what a directory holds, of which nobody has a partition open, and the manifest last.

    Raises SnapshotError, StoreUnreadable, StoreDamaged when a partition does not hold what it says.
    """
    parts = [_write_partition(frozen, number, building) for number in held_partitions(frozen)]
    files = [_write_file(frozen / name, name, building) for name in STATE_FILES if (frozen / name).is_file()]
    written = Snapshot(building.url, created_ms, tuple(parts), tuple(files))
    write_bytes(building, MANIFEST, encode_manifest(written))
    return written


def _write_partition(frozen: Path, number: int, building: Place) -> PartitionSnapshot:
    directory = frozen / partition_name(number)
    layout, progress = _counted(directory)
    names = sorted(path.name for path in directory.iterdir() if is_database_file(path.name))
    files = [_write_file(directory / name, f"{partition_name(number)}/{name}", building) for name in names]
    return PartitionSnapshot(number, layout.fingerprint, progress, tuple(files))


def _write_file(source: Path, path: str, building: Place) -> SnapshotFile:
    with source.open("rb") as content, building.write(path) as sink:
        return copy_file(content, sink, source.name)


def _counted(directory: Path) -> tuple[RowLayout, SnapshotProgress | None]:
    """Layout and progress of a store at rest, every row of which was checked. Raises SnapshotError if they disagree."""
    with RocksReader(directory) as store:
        if store.restoring():
            raise SnapshotError(f"the restore of {directory} from a changelog was interrupted: end it first")
        layout, progress = store.layout, store.progress()
        users = events = 0
        for slab in _slabs(store):
            users += len(slab)
            events += int(layout.rows(slab)["events"].sum())
    if progress is None and users == 0:
        return layout, None
    if progress is None or progress.users not in (UNKNOWN, users) or progress.events not in (UNKNOWN, events):
        said = "nothing" if progress is None else f"{progress.users:,} users and {progress.events:,} events"
        raise SnapshotError(
            f"the store holds {users:,} users and {events:,} events, its progress says {said}: restore an earlier "
            "snapshot or the changelog"
        )
    return layout, SnapshotProgress.of(progress)


def _slabs(store: RocksReader) -> Iterator[Slab]:
    """Every row of a store, many at a time."""
    rows = (row for _, row in store.iterate())
    while block := list(islice(rows, _BLOCK_ROWS)):
        yield np.stack(block)


def fetch_partition(place: Place, part: PartitionSnapshot, target: Path) -> None:
    """Copies a partition here, and checks every byte, every row and the manifest's word on them.

    Raises SnapshotError, StoreUnreadable, StoreDamaged.
    """
    name = partition_name(part.partition)
    for file in part.files:
        _fetch_file(place, f"{name}/{file.name}", file, target)
    layout, progress = _counted(target)
    if layout != part.row_layout or progress != part.progress:
        raise SnapshotError(
            f"partition {part.partition} of {place.url} is at {progress}, its manifest says {part.progress}: "
            "take another snapshot"
        )


def fetch_state_files(place: Place, held: Snapshot, target: Path) -> None:
    """Copies the files beside the partitions here, but for those that are here already."""
    for file in held.files:
        if not (target / file.name).exists():
            with partial_directory(target / file.name) as partial:
                _fetch_file(place, file.name, file, partial)
                appear(partial / file.name, target / file.name)


def _fetch_file(place: Place, path: str, file: SnapshotFile, target: Path) -> None:
    with place.read(path) as source, LocalPlace(target).write(file.name) as sink:
        if copy_file(source, sink, file.name) != file:
            raise _changed(place.url, path)


def read_manifest(place: Place) -> Snapshot:
    """What the snapshot says of itself, checked against itself alone. Raises SnapshotError."""
    try:
        with place.read(MANIFEST) as file:
            packed = file.read(_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise SnapshotError(
            f"{place.url} is no snapshot: it has no {MANIFEST}, which is written last; name the directory of a "
            "snapshot, or take another one if its making was interrupted"
        ) from None
    except OSError as error:
        raise SnapshotError(
            f"{place.url}/{MANIFEST} cannot be read: {error}; check the place and its rights"
        ) from error
    if len(packed) > _MANIFEST_BYTES:
        raise SnapshotError(f"{place.url}/{MANIFEST} is no snapshot's manifest: it has over {_MANIFEST_BYTES:,} bytes")
    return decode_manifest(place.url, packed)


def verified_listing(place: Place) -> Snapshot:
    """The manifest, compared with the names and sizes of what is there. SnapshotError names the first difference."""
    held = read_manifest(place)
    there = {name: size for name, size in place.files().items() if not _is_driver_file(name)}
    named = dict(held.paths())
    for name in sorted(named.keys() | (there.keys() - {MANIFEST})):
        if name not in there:
            raise SnapshotError(f"the snapshot {place.url} lacks its file {name}: take another snapshot")
        if name not in named:
            raise SnapshotError(
                f"the snapshot {place.url} has a file {name!a} that its manifest does not name: remove it, or "
                "take another snapshot"
            )
        if there[name] != named[name].bytes:
            raise _changed(place.url, name)
    return held


def held_partitions(directory: Path) -> list[int]:
    """Which partitions' stores are in a state directory, in order."""
    if not directory.is_dir():
        raise SnapshotError(f"{directory} is no directory: name the state directory of a run")
    numbers = (partition_of(path.name) for path in directory.iterdir() if (path / "CURRENT").is_file())
    return sorted(number for number in numbers if number is not None)


def _is_driver_file(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return name == DRIVER_FILE and partition_of(folder) is not None


def _changed(url: str, path: str) -> SnapshotError:
    return SnapshotError(f"the file {path} of the snapshot {url} is not what was written: use another snapshot")
