"""Where a snapshot lies: a directory of this machine, or anywhere that fsspec reaches. Nothing here knows rows.

A local snapshot appears under its name in one rename, complete and on the disk (see ``whole_directories``). A remote
one is uploaded file by file, the manifest last: without a manifest it is no snapshot.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from state.exceptions import SnapshotError, StoreWriteFailed
from state.snapshots.manifest import MANIFEST, SnapshotFile, is_database_file, partition_of
from state.snapshots.whole_directories import PARTIAL, REPLACED, appear, partial_directory, sync_tree

_COPY_BYTES = 1 << 20
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_RIGHT = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class Place(Protocol):
    """A directory of files, read and written by their paths in it."""

    url: str

    def files(self) -> dict[str, int]:
        """Path -> bytes of everything in it; empty where nothing is there."""

    def read(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file to read from."""

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A new file to write to; it is durable when the context ends."""

    def building(self) -> AbstractContextManager[Place]:
        """Where to write what shall appear here when the context ends without an error. Refuses what exists."""

    def has(self, name: str) -> bool:
        """Whether the file is there."""

    def children(self) -> list[str]:
        """Names of the directories in it."""

    def child(self, name: str) -> Place:
        """One of them."""


def place_of(url: str) -> LocalPlace | RemotePlace:
    """A plain path or ``file://`` is local; any other URL is fsspec's. Raises SnapshotError for one nobody knows."""
    local = local_path(url)
    if local is not None:
        return LocalPlace(local, url)
    from fsspec.core import url_to_fs  # not above: it takes 0.1 s to load, and a local snapshot needs none of it

    try:
        fs, path = url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise SnapshotError(f"the snapshot {url} cannot be reached: {error}; check the URL") from error
    return RemotePlace(fs, path, url)


def local_path(url: str) -> Path | None:
    """The path that a plain path or a ``file://`` URL names; None for any other URL."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


class LocalPlace:
    """See ``Place``."""

    def __init__(self, path: Path, url: str = "") -> None:
        self.path = path
        self.url = url or str(path)

    def files(self) -> dict[str, int]:
        """See ``Place``. What is no regular file counts as one of −1 bytes, which no manifest names."""
        found = {}
        for path in self.path.rglob("*"):
            kind = path.lstat()
            if not stat.S_ISDIR(kind.st_mode):
                found[path.relative_to(self.path).as_posix()] = kind.st_size if stat.S_ISREG(kind.st_mode) else -1
        return found

    def read(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """See ``Place``."""
        return (self.path / name).open("rb")

    @contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """See ``Place``."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def building(self) -> Iterator[Place]:
        """See ``Place``."""
        with partial_directory(self.path) as partial:
            if self.path.exists():
                raise SnapshotError(f"{self.url} exists already: give another place, or remove it first")
            yield LocalPlace(partial, self.url)
            sync_tree(partial)
            appear(partial, self.path)

    def has(self, name: str) -> bool:
        """See ``Place``."""
        return (self.path / name).is_file()

    def children(self) -> list[str]:
        """See ``Place``; what is being built or replaced is none of them."""
        if not self.path.is_dir():
            return []
        return sorted(
            path.name
            for path in self.path.iterdir()
            if path.is_dir() and PARTIAL not in path.name and REPLACED not in path.name
        )

    def child(self, name: str) -> LocalPlace:
        """See ``Place``."""
        return LocalPlace(self.path / name, f"{self.url.rstrip('/')}/{name}")


class RemotePlace:
    """See ``Place``; ``fs`` is a file system of fsspec's, and ``path`` is within it."""

    def __init__(self, fs: Any, path: str, url: str) -> None:
        self._fs = fs
        self._path = path.rstrip("/")
        self.url = url.rstrip("/")

    def files(self) -> dict[str, int]:
        """See ``Place``."""
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            found = self._fs.find(self._path, detail=True)
            return {self._name(path): int(info["size"]) for path, info in found.items()}
        return {}

    def read(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """See ``Place``."""
        opened: AbstractContextManager[IO[bytes]] = self._fs.open(f"{self._path}/{name}", "rb")
        return opened

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """See ``Place``."""
        opened: AbstractContextManager[IO[bytes]] = self._fs.open(f"{self._path}/{name}", "wb")
        return opened

    @contextmanager
    def building(self) -> Iterator[Place]:
        """See ``Place``. What a killed upload left here is removed; anything else is refused."""
        there = self.files()
        if MANIFEST in there or not all(map(_of_a_snapshot, there)):
            raise SnapshotError(f"{self.url} exists already: give another place, or remove it first")
        self.remove()
        try:
            yield self
        except BaseException:
            with suppress(OSError):
                self.remove()
            raise

    def has(self, name: str) -> bool:
        """See ``Place``."""
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(f"{self._path}/{name}"))

    def children(self) -> list[str]:
        """See ``Place``."""
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            names = [self._name(info["name"]) for info in self._fs.ls(self._path) if info["type"] == "directory"]
            return sorted(name for name in names if PARTIAL not in name)
        return []

    def child(self, name: str) -> RemotePlace:
        """See ``Place``."""
        return RemotePlace(self._fs, f"{self._path}/{name}", f"{self.url}/{name}")

    def beside(self) -> RemotePlace:
        """A new place next to this one."""
        suffix = f"{PARTIAL}{secrets.token_hex(8)}"
        return RemotePlace(self._fs, self._path + suffix, self.url + suffix)

    def remove(self) -> None:
        """Everything in it, the manifest first: what is left of an interrupted removal is no snapshot."""
        there = self.files()
        for name in sorted(there, key=lambda name: name != MANIFEST):
            self._fs.rm_file(f"{self._path}/{name}")

    def take_from(self, other: RemotePlace) -> None:
        """Moves everything from there, the manifest last."""
        for name in sorted(other.files(), key=lambda name: name == MANIFEST):
            self._fs.mv(f"{other._path}/{name}", f"{self._path}/{name}")

    def _name(self, path: str) -> str:
        return path.removeprefix(self._path).lstrip("/")


def _of_a_snapshot(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return partition_of(folder) is not None and is_database_file(name)


def copy_file(source: IO[bytes], sink: IO[bytes], name: str) -> SnapshotFile:
    """Copies to the end; what was copied is told with its size and hash."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(_COPY_BYTES):
        sink.write(block)
        digest.update(block)
        size += len(block)
    return SnapshotFile(name, size, digest.hexdigest())


def write_bytes(place: Place, name: str, content: bytes) -> None:
    """One small file."""
    with place.write(name) as sink:
        copy_file(io.BytesIO(content), sink, name)


@contextmanager
def told_as_snapshot_errors(doing: str) -> Iterator[None]:
    """What the machine says of a path or a disk becomes one line that names the next action."""
    try:
        yield
    except StoreWriteFailed as error:
        raise SnapshotError(f"{doing} failed: {error}") from error
    except OSError as error:
        said = error.strerror or str(error) or type(error).__name__
        where = f"{error.filename}: " if error.filename else ""
        action = "check the path"
        if error.errno in _NO_SPACE:
            action = "free space on its disk, or give another place"
        if error.errno in _NO_RIGHT:
            action = "check the rights on the path, or give another place"
        raise SnapshotError(f"{doing} failed: {where}{said}; {action}; nothing of it is left behind") from error
