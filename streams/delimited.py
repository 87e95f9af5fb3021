"""CSV, TSV and other delimited text as raw columns of text.

A one-character delimiter has quoting after RFC 4180 (``"a,b"``, ``""`` inside quotes); a quoted field ends on its
line. A longer delimiter has no quoting. Blocks without quotes go through pyarrow's reader, blocks with quotes
through ``csv.reader``; a block in which either finds anything odd is split again line by line.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from streams.columns import RawBlock, RawColumn
from streams.exceptions import EmptyFile, UnusableFile
from streams.rejects import Problem, Reason, Rejection
from streams.text_blocks import LineTexts, TextBlock, read_blocks, split_lines

UNIT_SEPARATOR = "\x1f"
"""Stands for a longer delimiter inside pyarrow's reader, in blocks that do not hold it."""


@dataclass(frozen=True, slots=True)
class DelimitedLayout:
    """How the lines of a delimited file are split."""

    delimiter: str = ","
    header: bool = True
    """Whether the first line holds column names."""
    columns: tuple[str, ...] | None = None
    """Column names in place of the header's; needed where there is no header."""
    encoding: str = "utf-8"
    quoted: bool = True
    """Whether ``"`` quotes a field; never so for a delimiter of several characters."""
    plain: tuple[str, ...] = ()
    """Columns whose values are mostly distinct; the others are dictionary-encoded while they are parsed."""

    @property
    def quoting(self) -> bool:
        """Whether quotes mean anything."""
        return self.quoted and len(self.delimiter) == 1


def read_delimited(path: Path, layout: DelimitedLayout, wanted: Sequence[str]) -> Iterator[RawBlock]:
    """The ``wanted`` columns of a file, all of which ``column_names`` has.

    Raises:
        SourceError: the file is missing or empty.
    """
    names = column_names(path, layout)
    position = 0
    for number, block in enumerate(read_blocks(path, layout.encoding)):
        if number == 0 and layout.header:
            block = _without_first_line(block)
        parsed = _parse(block, layout, names, wanted, position)
        position += parsed.records
        if parsed.records:
            yield parsed


def column_names(path: Path, layout: DelimitedLayout) -> tuple[str, ...]:
    """The names of a file's columns, from the settings or from its header.

    Raises:
        EmptyFile: there is no line.
        UnusableFile: the header is not text in the file's encoding, or names a column twice.
    """
    if layout.columns is not None:
        return layout.columns
    block = next(read_blocks(path, layout.encoding), None)
    lines = block.lines() if block else None
    if lines is None or not lines.texts:
        raise EmptyFile(f"{path}: the file has no line; write a header and events to it")
    if not layout.header:
        raise UnusableFile(
            f"{path}: without a header its columns have no names; name them in order under data.columns; "
            f"the first line is {lines.texts[0][:80]!r}"
        )
    if lines.rejections and lines.rejections[0].line == lines.numbers[0]:
        raise UnusableFile(f"{path}: the header is {lines.rejections[0].problem.detail}")
    names = split_line(lines.texts[0], layout)
    if isinstance(names, Problem):
        raise UnusableFile(f"{path}: the header is a {names.reason}: {names.detail}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnusableFile(f"{path}: the header names {', '.join(twice)} twice; set data.header and data.columns")
    return tuple(names)


def split_line(text: str, layout: DelimitedLayout) -> list[str] | Problem:
    """One line's fields: the reference for the block readers."""
    if not layout.quoting or '"' not in text:
        return text.split(layout.delimiter)
    try:
        rows = list(csv.reader([text], delimiter=layout.delimiter, strict=True))
    except csv.Error as error:
        return Problem(Reason.MALFORMED_LINE, f"quoting: {error} (a quoted field ends on its line)")
    return rows[0]


def _parse(
    block: TextBlock, layout: DelimitedLayout, names: tuple[str, ...], wanted: Sequence[str], position: int
) -> RawBlock:
    data = block.utf8()
    table: dict[str, RawColumn] | None = None
    count = 0
    if data and not _is_odd(data):
        count = data.count(b"\n")
        quotes = layout.quoting and b'"' in data
        parse = _parse_quoted if quotes else _parse_plain
        table = parse(data, layout, names, wanted, count)
    if data is None or table is None:
        return _parse_lines(block, layout, names, wanted, position)
    rows = np.arange(count, dtype=np.int64)
    return RawBlock(block.path, table, rows + position, rows + block.first_line, LineTexts(data), count)


def _parse_plain(
    data: bytes, layout: DelimitedLayout, names: tuple[str, ...], wanted: Sequence[str], count: int
) -> dict[str, RawColumn] | None:
    delimiter = layout.delimiter
    if len(delimiter.encode()) > 1:
        if UNIT_SEPARATOR.encode() in data:
            return None
        data = data.replace(delimiter.encode(), UNIT_SEPARATOR.encode())
        delimiter = UNIT_SEPARATOR
    text, dictionary = pa.string(), pa.dictionary(pa.int32(), pa.string())
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(column_names=names, block_size=len(data) + 1, use_threads=False),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter, quote_char=False, double_quote=False, escape_char=False, newlines_in_values=False
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: text if name in layout.plain else dictionary for name in wanted},
                include_columns=list(wanted),
                strings_can_be_null=False,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows != count:
        return None
    return {name: table.column(name).combine_chunks() for name in wanted}


def _parse_quoted(
    data: bytes, layout: DelimitedLayout, names: tuple[str, ...], wanted: Sequence[str], count: int
) -> dict[str, RawColumn] | None:
    try:
        rows = list(csv.reader(split_lines(data), delimiter=layout.delimiter, strict=True))
    except csv.Error:
        return None
    if len(rows) != count or set(map(len, rows)) != {len(names)}:
        return None
    return _columns(rows, names, wanted)


def _parse_lines(
    block: TextBlock, layout: DelimitedLayout, names: tuple[str, ...], wanted: Sequence[str], position: int
) -> RawBlock:
    lines = block.lines()
    rejections = list(lines.rejections)
    invalid = {r.line for r in rejections}
    good: list[int] = []
    rows: list[list[str]] = []
    for k, text in enumerate(lines.texts):
        number = int(lines.numbers[k])
        if number in invalid:
            continue
        fields = split_line(text, layout)
        if not isinstance(fields, Problem) and len(fields) != len(names):
            expected = f"{len(names)} fields ({', '.join(names)})"
            fields = Problem(Reason.MALFORMED_LINE, f"{len(fields)} fields in place of {expected}")
        if isinstance(fields, Problem):
            rejections.append(Rejection(block.path, number, fields, text))
        else:
            good.append(k)
            rows.append(fields)
    kept = np.array(good, dtype=np.int64)

    def raw_text(row: int) -> str:
        return lines.texts[good[row]]

    return RawBlock(
        block.path, _columns(rows, names, wanted), kept + position, lines.numbers[kept], raw_text, len(lines.texts),
        tuple(rejections),
    )  # fmt: skip


def _columns(rows: list[list[str]], names: tuple[str, ...], wanted: Sequence[str]) -> dict[str, RawColumn]:
    places = {name: names.index(name) for name in wanted}
    return {name: pa.array([row[k] for row in rows], pa.string()) for name, k in places.items()}


def _is_odd(data: bytes) -> bool:
    """Whether a block may hold what pyarrow's reader takes for more than text."""
    return b"\r" in data or b"\0" in data or data.startswith(codecs.BOM_UTF8)


def _without_first_line(block: TextBlock) -> TextBlock:
    """The block after its first line that is not empty."""
    data, line = block.data, block.first_line
    while data:
        first, _, data = data.partition(b"\n")
        line += 1
        if first:
            break
    return TextBlock(block.path, data, line, block.encoding)
