"""What a snapshot says of itself: ``snapshot.json``. Pure: bytes in, checked values out. No path in it is trusted.

    snapshot.json             format version, when it was made, every file with its size and SHA-256, and the
                              SHA-256 of all that: an edited one is refused
    partition-N/…             a RocksDB, as ``state.store`` opens it
    model.safetensors …       what else belongs to the state directory (``STATE_FILES``)

A partition's files are named by RocksDB; any other name is refused, so none can lead out of its directory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import msgspec

from learner.user_state import RowLayout
from state.codec import Progress
from state.exceptions import SnapshotError

FORMAT_VERSION = 1
"""Raised when a reader of the old manifest would misread the new one."""
MANIFEST = "snapshot.json"
STATE_FILES = ("model.safetensors",)
"""Files directly in a state directory that belong to a snapshot, where they are there."""
DRIVER_FILE = "rocksdict-config.json"
"""rocksdict writes it whenever it opens a directory, always the same: no part of a snapshot, and no stranger in it."""
_PARTITION = re.compile(r"partition-(0|[1-9]\d{0,8})")
_DATABASE_FILE = re.compile(r"CURRENT|IDENTITY|(?:MANIFEST|OPTIONS)-\d{6,20}|\d{6,20}\.(?:sst|log)")


class SnapshotFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file, named within the directory that it lies in."""

    name: str
    bytes: int
    sha256: str


class SnapshotProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a partition's rows have come: the fields of ``codec.Progress`` that a reader understands."""

    offset: int
    meta_version: int
    users: int
    events: int
    written_at_ms: int

    @staticmethod
    def of(progress: Progress | None) -> SnapshotProgress | None:
        """The same, without the clock."""
        if progress is None:
            return None
        return SnapshotProgress(
            progress.offset, progress.meta_version, progress.users, progress.events, progress.written_at_ms
        )


class PartitionSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One topic partition's store."""

    partition: int
    layout: str
    """Fingerprint of its rows' layout"""
    progress: SnapshotProgress | None
    """None: it has no rows yet"""
    files: tuple[SnapshotFile, ...]

    @property
    def row_layout(self) -> RowLayout:
        """The layout of its rows; a manifest that was read names one."""
        layout = RowLayout.parse(self.layout)
        assert layout is not None
        return layout


class Snapshot(msgspec.Struct, frozen=True):
    """A snapshot that was written, or whose manifest was read and found sound."""

    url: str
    """Where it lies, as it was asked for"""
    created_ms: int
    partitions: tuple[PartitionSnapshot, ...]
    files: tuple[SnapshotFile, ...]
    """Those of ``STATE_FILES`` that were there"""

    def partition(self, number: int) -> PartitionSnapshot:
        """Raises SnapshotError for a partition that it does not hold."""
        for held in self.partitions:
            if held.partition == number:
                return held
        there = ", ".join(str(held.partition) for held in self.partitions)
        raise SnapshotError(f"the snapshot {self.url} has no partition {number}: it holds {there}")

    def of(self, numbers: Sequence[int]) -> Snapshot:
        """The same with these partitions alone. Raises SnapshotError for one that it does not hold."""
        chosen = tuple(self.partition(number) for number in sorted(set(numbers)))
        return msgspec.structs.replace(self, partitions=chosen)

    def paths(self) -> Iterator[tuple[str, SnapshotFile]]:
        """Every file with its path in the snapshot."""
        for file in self.files:
            yield file.name, file
        for held in self.partitions:
            for file in held.files:
                yield f"{partition_name(held.partition)}/{file.name}", file

    def as_dict(self) -> dict[str, object]:
        """JSON-ready, for the command line."""
        return {
            "url": self.url,
            "created_ms": self.created_ms,
            "bytes": sum(file.bytes for _, file in self.paths()),
            "files": [file.name for file in self.files],
            "partitions": [
                {
                    "partition": held.partition,
                    "layout": held.layout,
                    "progress": None if held.progress is None else msgspec.structs.asdict(held.progress),
                    "bytes": sum(file.bytes for file in held.files),
                }
                for held in self.partitions
            ],
        }


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest as it is written; ``sha256`` is that of the document with an empty ``sha256``."""

    format: int
    created_ms: int
    partitions: tuple[PartitionSnapshot, ...]
    files: tuple[SnapshotFile, ...]
    sha256: str


class _AnyVersion(msgspec.Struct):
    format: int


def partition_name(partition: int) -> str:
    """The directory of a partition's store, in a state directory and in a snapshot."""
    return f"partition-{partition}"


def partition_of(name: str) -> int | None:
    """The other way; None for a name that is no partition's."""
    match = _PARTITION.fullmatch(name)
    return None if match is None else int(match[1])


def is_database_file(name: str) -> bool:
    """Whether RocksDB needs a file of this name to open the store; its lock and its log for people it does not need."""
    return _DATABASE_FILE.fullmatch(name) is not None


def encode_manifest(snapshot: Snapshot) -> bytes:
    """As written: JSON for people to read, the same bytes for the same snapshot."""
    document = _Document(FORMAT_VERSION, snapshot.created_ms, snapshot.partitions, snapshot.files, "")
    return _formatted(msgspec.structs.replace(document, sha256=hashlib.sha256(_formatted(document)).hexdigest()))


def decode_manifest(url: str, packed: bytes) -> Snapshot:
    """Raises SnapshotError unless these are the bytes of a manifest of this version, unedited and without odd names."""
    try:
        version = msgspec.json.decode(packed, type=_AnyVersion).format
        if version != FORMAT_VERSION:
            raise SnapshotError(
                f"the snapshot {url} is of format {version}, this program reads {FORMAT_VERSION}: "
                "restore it with the program that made it"
            )
        document = msgspec.json.decode(packed, type=_Document)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotError(f"{url}/{MANIFEST} is no snapshot's manifest: {error}; take another snapshot") from None
    snapshot = Snapshot(url, document.created_ms, document.partitions, document.files)
    if encode_manifest(snapshot) != packed:
        raise SnapshotError(f"{url}/{MANIFEST} was changed since the snapshot was made: take another snapshot")
    odd = next(_oddities(snapshot), None)
    if odd is not None:
        raise SnapshotError(f"{url}/{MANIFEST} {odd}: no run of coldstream made it, take another snapshot")
    return snapshot


def _formatted(document: _Document) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def _oddities(snapshot: Snapshot) -> Iterator[str]:
    """What a manifest of ours never says."""
    numbers = [held.partition for held in snapshot.partitions]
    if not numbers or len(set(numbers)) < len(numbers):
        yield "does not name each of its partitions once"
    for held in snapshot.partitions:
        if partition_of(partition_name(held.partition)) is None:
            yield f"names a partition {held.partition}"
        if RowLayout.parse(held.layout) is None:
            yield f"names rows of an unknown layout {held.layout!a}"
        for file in held.files:
            if not is_database_file(file.name):
                yield f"names a file {file.name!a} that is none of a store's"
    for file in snapshot.files:
        if file.name not in STATE_FILES:
            yield f"names a file {file.name!a} that is none of a state directory's"
    paths = [path for path, _ in snapshot.paths()]
    if len(set(paths)) < len(paths):
        yield "names a file twice"
