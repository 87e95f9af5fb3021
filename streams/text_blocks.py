"""Text files as blocks of whole lines, decoded to UTF-8, with line numbers.

A line is a record and ends with LF or CRLF; the last one may lack its end. An empty line is not a record: it is
skipped, though it counts as a line. A byte order mark at the start is dropped.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from streams.exceptions import EmptyFile, MissingFile, UnusableFile
from streams.rejects import Problem, Reason, Rejection

BLOCK_BYTES = 1 << 20
"""Bytes read at once: some 40,000 short lines, so that a block and its columns stay in the processor's cache."""
LONGEST_LINE_BYTES = 64 << 20
"""A longer line means that the file is not text; reading on would fill the memory."""


@dataclass(frozen=True, slots=True)
class TextBlock:
    """Consecutive lines of one file."""

    path: str
    data: bytes
    """Whole lines in the file's encoding, the last one ended by LF; CRLF is already LF. May hold empty lines."""
    first_line: int
    """Line number of the first line, from 1."""
    encoding: str

    def utf8(self) -> bytes | None:
        """The block in UTF-8, or None if some line of it is invalid text."""
        if self.data.isascii():
            return self.data
        try:
            text = self.data.decode(self.encoding)
            return self.data if self.encoding == "utf-8" else text.encode()
        except UnicodeError:
            return None

    def lines(self) -> Lines:
        """The block line by line."""
        texts: list[str] = []
        numbers: list[int] = []
        rejections: list[Rejection] = []
        for number, line in enumerate(self.data.removesuffix(b"\n").split(b"\n"), self.first_line):
            if not line:
                continue
            numbers.append(number)
            try:
                texts.append(line.decode(self.encoding))
            except UnicodeError:
                detail = f"not {self.encoding} text; set data.encoding"
                raw = line.decode(self.encoding, "backslashreplace")
                rejections.append(Rejection(self.path, number, Problem(Reason.INVALID_TEXT, detail), raw))
                texts.append("")
        return Lines(tuple(texts), np.array(numbers, dtype=np.int64), tuple(rejections))


@dataclass(frozen=True, slots=True)
class Lines:
    """The records of a block, empty lines left out."""

    texts: tuple[str, ...]
    """Empty for a line that is invalid text, which ``rejections`` then names."""
    numbers: NDArray[np.int64]
    """Line numbers, from 1."""
    rejections: tuple[Rejection, ...]


class LineTexts:
    """The text of a block's row k, for rejects; the block is split once, and only if some row is asked for."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._texts: list[str] | None = None

    def __call__(self, row: int) -> str:
        """The text of row ``row``, from 0."""
        if self._texts is None:
            self._texts = split_lines(self._data)
        return self._texts[row]


def split_lines(data: bytes) -> list[str]:
    """The lines of a block in UTF-8, without their ends."""
    return data.decode().removesuffix("\n").split("\n")


def read_blocks(path: Path, encoding: str) -> Iterator[TextBlock]:
    """All lines of a file, in blocks of about ``BLOCK_BYTES``.

    Raises:
        MissingFile, EmptyFile, UnusableFile: see ``streams.exceptions``.
    """
    first_line, rest = 1, b""
    with open_file(path) as file:
        start = True
        while chunk := file.read(BLOCK_BYTES):
            if start:
                chunk, start = chunk.removeprefix(codecs.BOM_UTF8), False
            end = chunk.rfind(b"\n") + 1
            if not end:
                rest += chunk
                if len(rest) > LONGEST_LINE_BYTES:
                    raise UnusableFile(f"{path}: a line longer than 64 MiB; is this a text file? Set data.format")
                continue
            block = TextBlock(str(path), _line_ends(rest + chunk[:end]), first_line, encoding)
            rest = chunk[end:]
            first_line += block.data.count(b"\n")
            yield block
    if rest:
        yield TextBlock(str(path), _line_ends(rest + b"\n"), first_line, encoding)


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading.

    Raises:
        MissingFile: it is not there, is a directory, or may not be read.
        EmptyFile: it has no bytes.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise MissingFile(f"{path}: {error.strerror}; data.paths is relative to {Path.cwd()}") from error
    if path.stat().st_size == 0:
        file.close()
        raise EmptyFile(f"{path}: the file is empty; write events to it or take it out of data.paths")
    return file


def _line_ends(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n") if b"\r" in data else data
