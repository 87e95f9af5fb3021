"""``lineage.jsonl``: what was told of the versions, a line at a time, appended, forced to the disk, never rewritten.

One process writes at a time: it holds ``lineage.lock`` (flock; the system drops it when the process dies). Readers
hold nothing: a line counts once its end is there. What a crash left of a line, without its end, never counted, and the
next writer takes it off. Anything else that does not verify is damage.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from state.lineage.exceptions import LineageDamaged, LineageError, LineageLocked
from state.lineage.history import History
from state.lineage.record import NO_LINE, Entry, decode_line, encode_line
from state.lineage.tensors import sync_directory

JOURNAL, LOCK = "lineage.jsonl", "lineage.lock"
_POLL_S = 0.02
"""Between two tries to get the lock"""


class Journal:
    """The entries of a directory, and the history they add up to.

    ``history`` and ``torn`` are as of the last ``refresh``, which reads what is new since the one before.
    """

    def __init__(self, directory: Path, key: bytes | None, wait_s: float) -> None:
        self.directory = directory
        self.path = directory / JOURNAL
        self._key = key
        self._wait_s = wait_s
        self._forget()

    def _forget(self) -> None:
        self.history = History()
        self.torn = False
        """Whether the file ends in what a crash left of a line"""
        self.signed = False
        """Whether its lines are signed"""
        self._lines = 0
        self._offset = 0
        self._last = NO_LINE
        self._file: tuple[int, int] | None = None

    def refresh(self) -> None:
        """Raises LineageDamaged where a line does not verify or cannot come where it stands."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) != self._file or status.st_size < self._offset:
                    self._forget()  # another file lies there now, or it was cut: all of it is read
                    self._file = (status.st_dev, status.st_ino)
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            self._forget()
            return
        *lines, tail = content.split(b"\n")
        try:
            for line in lines:
                self._take(line)
            self.torn = bool(tail)
            self._require_torn(tail)
        except BaseException:
            self._forget()
            raise

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the lock, with all that others wrote read, and nothing torn at the end.

        Raises LineageLocked where it is not free in time.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock(handle)
            self.refresh()
            if self.signed and self._key is None:
                raise LineageError(f"{self.path} is signed, and no key is set: name the one that signs it (meta.hmac)")
            yield
        finally:
            os.close(handle)

    def append(self, entries: Sequence[Entry]) -> None:
        """Writes entries under the lock, one after the other; a crash may leave the first ones of them.

        Raises WrongStep or UnknownVersion, before anything is written, where they cannot come now.
        """
        future = self.history.copy()
        for entry in entries:
            future.tell(entry)
        packed, last = b"", self._last
        for entry in entries:
            line, last = encode_line(entry, last, self._key)
            packed += line
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(handle, self._offset)  # what is torn goes
            _write_all(handle, packed, self._offset)
        finally:
            os.close(handle)
        if self._offset == 0:
            sync_directory(self.directory)
        self.refresh()

    def _lock(self, handle: int) -> None:
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LineageLocked(
                        f"another process writes to the lineage {self.directory} (it holds {LOCK}): try again when it "
                        "is done, or end it"
                    ) from None
            time.sleep(_POLL_S)

    def _take(self, line: bytes) -> None:
        try:
            entry, sha256, signed = decode_line(line, self._last, self._key)
            self.history.tell(entry)
        except (ValueError, LineageError) as error:
            raise LineageDamaged(self._damage(f"line {self._lines + 1} {error}")) from None
        self.signed = signed
        self._last = sha256
        self._lines += 1
        self._offset += len(line) + 1

    def _require_torn(self, tail: bytes) -> None:
        """A crash leaves the beginning of a line. A whole one with another byte where its end was is damage."""
        with suppress(ValueError):
            decode_line(tail[:-1], self._last, self._key)
            raise LineageDamaged(self._damage(f"line {self._lines + 1} does not end where it should"))

    def _damage(self, what: str) -> str:
        last = self.history.next_version - 1
        sound = f"what is told before it, up to version {last}, is sound" if last >= 0 else "nothing before it is told"
        return f"{self.path}: {what}: restore the directory from a copy; {sound}"


def _write_all(handle: int, packed: bytes, offset: int) -> None:
    """Durably, or not at all: what a full disk took of it is taken back."""
    try:
        written = 0
        while written < len(packed):
            written += os.pwrite(handle, packed[written:], offset + written)
        os.fsync(handle)
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, offset)
        raise
