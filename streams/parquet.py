"""Parquet files as raw columns. A row's line number is its number in the file, from 1."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from streams.columns import Encoded, RawBlock, RawColumn
from streams.exceptions import UnusableFile
from streams.text_blocks import open_file

BATCH_ROWS = 65_536
"""Rows read at once."""


def read_parquet(path: Path, wanted: Sequence[str]) -> Iterator[RawBlock]:
    """The ``wanted`` columns of a file; timestamps and dates become int64 milliseconds (see ``carries_own_unit``).

    Raises:
        SourceError: the file is missing, empty or not Parquet, or a column's type has no meaning here.
    """
    position = 0
    with open_parquet(path) as file:
        for name in wanted:
            _check_type(path, name, file.schema_arrow.field(name).type)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(dict.fromkeys(wanted))):
            rows = np.arange(batch.num_rows, dtype=np.int64) + position
            columns: dict[str, RawColumn] = {name: _plain(batch.column(name)) for name in wanted}
            position += batch.num_rows
            yield RawBlock(str(path), columns, rows, rows + 1, _raw_text(batch), batch.num_rows)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a file.

    Raises:
        SourceError: it is missing, empty or not Parquet.
    """
    open_file(path).close()
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UnusableFile(f"{path}: not a Parquet file ({error}); set data.format") from error


def parquet_columns(path: Path) -> dict[str, pa.DataType]:
    """Type by column name."""
    with open_parquet(path) as file:
        return {field.name: field.type for field in file.schema_arrow}


def carries_own_unit(kind: pa.DataType) -> bool:
    """Whether a time column says itself what it counts: it is read to milliseconds, whatever the settings say."""
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _check_type(path: Path, name: str, kind: pa.DataType) -> None:
    if pa.types.is_nested(kind) and not _is_list(kind):
        raise UnusableFile(f"{path}: column {name!r} is nested ({kind}); flatten it to text or numbers")
    if pa.types.is_time(kind) or pa.types.is_duration(kind) or pa.types.is_interval(kind):
        raise UnusableFile(f"{path}: column {name!r} is a {kind}, which names no moment; write a timestamp")


def _plain(column: pa.Array) -> RawColumn:
    """The column as text, whole numbers, floats or truth values; lists as they are."""
    if _is_list(column.type):
        return Encoded(np.arange(len(column), dtype=np.int32), column.to_pylist())
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_timestamp(column.type):
        return pc.floor_temporal(column, unit="millisecond").cast(pa.timestamp("ms", column.type.tz)).cast(pa.int64())
    if pa.types.is_date(column.type):
        return column.cast(pa.timestamp("ms")).cast(pa.int64())
    if pa.types.is_decimal(column.type) or pa.types.is_floating(column.type):
        return column.cast(pa.float64())
    if _is_text(column.type):
        return _text(column)
    return column


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests) or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind)


def _text(column: pa.Array) -> pa.Array:
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:  # invalid UTF-8: no text, and so a missing field
        values = column.to_pylist()
        return pa.array([_decoded(v) if isinstance(v, bytes) else v for v in values], pa.string())


def _decoded(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _raw_text(batch: pa.RecordBatch) -> Callable[[int], str]:
    return lambda row: json.dumps(batch.slice(row, 1).to_pylist()[0], default=str)
