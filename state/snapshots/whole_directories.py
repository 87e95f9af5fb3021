"""Directories that appear under their name whole and on the disk, or not at all.

What is being made is built in ``<name>.partial-<random>`` beside its final place and renamed at the end. A partial
directory is locked (flock) while somebody works in it; the system drops the lock of a killed process, and whoever comes
next to the same name removes what it left.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from state.exceptions import SnapshotError

PARTIAL, REPLACED = ".partial-", ".replaced-"
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
"""Of Linux's renameat2"""


@contextmanager
def partial_directory(final: Path) -> Iterator[Path]:
    """A new, locked directory beside ``final``; it is removed at the end unless it was renamed.

    What killed processes left beside ``final`` goes first.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final)
    partial = final.with_name(f"{final.name}{PARTIAL}{secrets.token_hex(8)}")
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def remove_leftovers(final: Path) -> None:
    """Removes partial directories of ``final`` that no living process holds; ends a replacement that was cut off."""
    for path in sorted(final.parent.glob(f"{_quoted(final.name)}{REPLACED}*")):
        if final.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, final)
    for path in final.parent.glob(f"{_quoted(final.name)}{PARTIAL}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        except BlockingIOError:
            pass  # somebody is at work there
        finally:
            os.close(lock)


def appear(partial: Path, final: Path) -> None:
    """Gives a finished directory its name, durably. An empty directory there gives way, anything else is refused."""
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise SnapshotError(f"{final} appeared in the meantime: give another place, or remove it first") from error
    _sync_directory(final.parent)


def replace_directory(new: Path, final: Path) -> None:
    """Swaps two directories in one step; ``new`` is the old one afterwards.

    Where the file system cannot do that, ``final`` is away for a moment, and ``remove_leftovers`` brings it back after
    a crash.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(final), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        if code not in _NO_EXCHANGE:
            raise OSError(code, os.strerror(code), str(final))
        old = final.with_name(f"{final.name}{REPLACED}{secrets.token_hex(8)}")
        os.rename(final, old)
        os.rename(new, final)
        os.rename(old, new)
    _sync_directory(final.parent)


def sync_tree(root: Path) -> None:
    """Makes the names of all files under ``root`` durable; their contents are when they are written."""
    for directory, _, _ in os.walk(root):
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _quoted(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
