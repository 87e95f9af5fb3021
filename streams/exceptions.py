"""Errors of the stream's edge: files and what is in them.

ColdstreamError (configs.exceptions)
└── SourceError             a source of events or features cannot be used
    ├── NoInput             no path was given
    ├── MissingFile         a path that is not there, or cannot be opened
    ├── EmptyFile           a file, or a whole source, without one record
    ├── UnknownFormat       neither the name nor the settings say how the file is laid out
    ├── UnknownColumn       a mapped field that the file does not have
    ├── UnusableFile        the file is not what its format says, or a column's type has no meaning here
    └── TooManyRejects      more lines than data.rejects.max_share cannot be used
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from configs.exceptions import ColdstreamError


class SourceError(ColdstreamError):
    """A source of events or features cannot be used."""


class NoInput(SourceError):
    """No path was given."""


class MissingFile(SourceError):
    """A path that is not there, or cannot be opened."""


class EmptyFile(SourceError):
    """A file, or a whole source, without one record."""


class UnknownFormat(SourceError):
    """Neither the name nor the settings say how the file is laid out."""


class UnknownColumn(SourceError):
    """A mapped field that the file does not have."""

    def __init__(self, path: str, column: str, setting: str, columns: Sequence[str], hint: str = "") -> None:
        close = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
        nearest = f", nearest: {close[0]!r}" if close else ""
        super().__init__(
            f"{path}: no column {column!r} for {setting}{nearest}; the file has: {', '.join(columns) or 'none'}; "
            f"set {setting}{hint}"
        )
        self.column = column
        self.columns = tuple(columns)


class UnusableFile(SourceError):
    """The file is not what its format says, or a column's type has no meaning here."""


class TooManyRejects(SourceError):
    """More lines than ``data.rejects.max_share`` cannot be used."""
