"""Whether what a command is asked to write can be written: said before the work, not after it. Nothing is made here."""

from __future__ import annotations

import os
from pathlib import Path

from configs.exceptions import ColdstreamError


class UnwritableOutput(ColdstreamError):
    """An output's path cannot be written to: the message names the option and the path that is in the way."""


def require_file(option: str, path: Path | None) -> None:
    """Raises UnwritableOutput unless a file can be written at ``path``; None (not asked for) is fine."""
    if path is None:
        return
    if path.is_dir():
        raise UnwritableOutput(f"{option} {path}: is a directory; name a file in it")
    _require_writable(option, path, _nearest(path.absolute().parent))


def require_directory(option: str, path: Path | None) -> None:
    """Raises UnwritableOutput unless ``path`` is a directory that can be written to, or can be made one."""
    if path is not None:
        _require_writable(option, path, _nearest(path.absolute()))


def _nearest(path: Path) -> Path:
    """The path, or the first of its parents that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _require_writable(option: str, path: Path, nearest: Path) -> None:
    if not nearest.is_dir():
        raise UnwritableOutput(f"{option} {path}: {nearest} is no directory; give another path")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UnwritableOutput(f"{option} {path}: no right to write in {nearest}; give another path or the right")
