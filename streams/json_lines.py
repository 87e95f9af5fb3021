"""JSON lines as raw columns: one object a line. Of a key given twice the last one counts, as in every parser."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from streams.columns import Encoded, RawBlock, RawColumn
from streams.rejects import Problem, Reason, Rejection
from streams.text_blocks import LineTexts, TextBlock, read_blocks

OBJECTS_LOOKED_AT = 1_000
"""Objects whose keys tell whether a mapped field exists: a rare key may be missing from the first few."""


def read_json_lines(path: Path, encoding: str, wanted: Sequence[str]) -> Iterator[RawBlock]:
    """The ``wanted`` keys of a file's objects; a key that an object lacks is None.

    Raises:
        SourceError: the file is missing or empty.
    """
    names = [f"f{k}" for k in range(len(wanted))]
    record = msgspec.defstruct(
        "Record",
        [(name, Any, None) for name in names],
        rename=dict(zip(names, wanted, strict=True)),
        gc=False,
    )
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(record)
    position = 0
    for block in read_blocks(path, encoding):
        parsed = _parse(block, decoder, names, wanted, position)
        position += parsed.records
        if parsed.records:
            yield parsed


def read_keys(path: Path, encoding: str) -> tuple[str, ...]:
    """The keys of a file's first objects, in order of appearance; none where no line is an object."""
    block = next(read_blocks(path, encoding), None)
    keys: dict[str, None] = {}
    for text in block.lines().texts[:OBJECTS_LOOKED_AT] if block else ():
        record = parse_line(text)
        if not isinstance(record, Problem):
            keys.update(dict.fromkeys(record))
    return tuple(keys)


def parse_line(text: str) -> dict[str, object] | Problem:
    """One line's object, with all its keys."""
    try:
        record = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        try:
            record = json.loads(text)  # understands NaN and Infinity, which the schema then names field by field
        except (ValueError, RecursionError):
            return Problem(Reason.MALFORMED_LINE, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Problem(Reason.MALFORMED_LINE, "not a JSON object")
    return record


def _parse(
    block: TextBlock, decoder: msgspec.json.Decoder[Any], names: list[str], wanted: Sequence[str], position: int
) -> RawBlock:
    data = block.utf8()
    if data is not None and _is_object_a_line(data):
        try:
            records = decoder.decode_lines(data)
        except (msgspec.DecodeError, RecursionError):
            records = []
        if len(records) == data.count(b"\n"):
            return _plain_block(block, data, records, names, wanted, position)
    return _parse_lines(block, decoder, names, wanted, position)


def _is_object_a_line(data: bytes) -> bool:
    """Whether every line starts with ``{`` and ends with ``}``.

    Inside an object or array no line end can stand between ``}`` and ``{``, so a block that then parses has its
    line ends between objects only.
    """
    return data.startswith(b"{") and data.endswith(b"}\n") and data.count(b"}\n{") + 1 == data.count(b"\n")


def _plain_block(
    block: TextBlock, data: bytes, records: list[Any], names: list[str], wanted: Sequence[str], position: int
) -> RawBlock:
    columns = {key: _column([getattr(r, name) for r in records]) for name, key in zip(names, wanted, strict=True)}
    rows = np.arange(len(records), dtype=np.int64)
    return RawBlock(block.path, columns, rows + position, rows + block.first_line, LineTexts(data), len(records))


def _parse_lines(
    block: TextBlock, decoder: msgspec.json.Decoder[Any], names: list[str], wanted: Sequence[str], position: int
) -> RawBlock:
    lines = block.lines()
    rejections = list(lines.rejections)
    invalid = {r.line for r in rejections}
    good: list[int] = []
    rows: list[list[object]] = []
    for k, text in enumerate(lines.texts):
        number = int(lines.numbers[k])
        if number in invalid:
            continue
        row = _parse_line(text, decoder, names, wanted)
        if isinstance(row, Problem):
            rejections.append(Rejection(block.path, number, row, text))
        else:
            good.append(k)
            rows.append(row)
    kept = np.array(good, dtype=np.int64)
    columns = {key: _column([row[k] for row in rows]) for k, key in enumerate(wanted)}

    def raw_text(row: int) -> str:
        return lines.texts[good[row]]

    return RawBlock(
        block.path, columns, kept + position, lines.numbers[kept], raw_text, len(lines.texts), tuple(rejections)
    )


def _parse_line(
    text: str, decoder: msgspec.json.Decoder[Any], names: list[str], wanted: Sequence[str]
) -> list[object] | Problem:
    try:
        parsed = decoder.decode(text)
        return [getattr(parsed, name) for name in names]
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        record = parse_line(text)
        return record if isinstance(record, Problem) else [record.get(key) for key in wanted]


def _column(values: list[Any]) -> RawColumn:
    """An Arrow column where all values are of one plain type, else the values as they are."""
    types = set(map(type, values))
    types.discard(type(None))
    try:
        if types == {str}:
            return pa.array(values, pa.string())
        if types == {int}:
            return pa.array(values, pa.int64())
        if types == {float}:
            return pa.array(values, pa.float64(), from_pandas=False)
    except (OverflowError, UnicodeEncodeError):
        pass  # a number beyond 64 bits, or half a surrogate pair
    return Encoded(np.arange(len(values), dtype=np.int32), values)
