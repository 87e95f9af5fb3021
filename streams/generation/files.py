"""A generated stream on disk: events as CSV, JSON lines or Parquet, and the catalogues beside them.

Every file is written under a temporary name and renamed when whole, so a reader never sees half of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streams.generation.events import EventBatch, EventStream
from streams.generation.population import AGES, CATEGORIES, COUNTRIES, TAGS, Items, Users
from streams.generation.settings import FileFormat

ROW_GROUP = 262_144
"""Rows of a Parquet row group, whatever the batches were; held in memory until full, some 20 MB."""

Columns = dict[str, Any]
"""Column name -> pyarrow array, all of the same length. pyarrow has no types of its own."""


class EventTable:
    """Turns batches into columns of text ids and numbers."""

    def __init__(self, stream: EventStream) -> None:
        self._users = _ids("u", len(stream.users.bias))
        self._items = _ids("i", len(stream.items.bias))
        self._graded = stream.settings.graded

    def columns(self, batch: EventBatch) -> Columns:
        """The columns of N events in the order in which every format gives them."""
        columns = {
            "user_id": self._users.take(pa.array(batch.user)),
            "item_id": self._items.take(pa.array(batch.item)),
            "label": pa.array(batch.label),
        }
        if self._graded:
            columns["value"] = pa.array(batch.value)
        return columns | {"event_time_ms": pa.array(batch.event_time_ms)}


def write_events(path: Path, file_format: FileFormat, batches: Iterable[Columns]) -> None:
    """Writes all batches; how the events were cut into them leaves no trace in the file."""
    writers: dict[FileFormat, Callable[[Path, Iterable[Columns]], None]] = {
        "csv": write_csv,
        "jsonl": _write_jsonl,
        "parquet": _write_parquet,
    }
    writers[file_format](path, batches)


def write_csv(path: Path, batches: Iterable[Columns]) -> None:
    """A header, then the rows, unquoted: no text here holds a comma, a quote or a line's end."""
    with whole_file(path) as out:
        header: list[str] = []
        for columns in batches:
            if not header:
                header = list(columns)
                out.write((",".join(header) + "\n").encode())
            out.write(_text(columns, [""] + [","] * (len(columns) - 1) + ["\n"]))


def _write_jsonl(path: Path, batches: Iterable[Columns]) -> None:
    with whole_file(path) as out:
        for columns in batches:
            out.write(_text(columns, _json_glue(columns)))


def _write_parquet(path: Path, batches: Iterable[Columns]) -> None:
    with whole_file(path) as out:
        writer: Any = None
        for table in _recut(batches):
            writer = writer or pq.ParquetWriter(out, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=ROW_GROUP)
        if writer is not None:
            writer.close()


def _recut(batches: Iterable[Columns]) -> Iterator[Any]:
    """The same rows as tables of ``ROW_GROUP`` rows, the last one shorter."""
    held: list[Any] = []
    for columns in batches:
        held.append(pa.table(columns))
        while sum(len(table) for table in held) >= ROW_GROUP:
            together = pa.concat_tables(held)
            yield together.slice(0, ROW_GROUP).combine_chunks()
            held = [together.slice(ROW_GROUP)]
    if any(len(table) for table in held):
        yield pa.concat_tables(held).combine_chunks()


def _json_glue(columns: Columns) -> list[str]:
    """What stands before, between and after the values of one line; ids need no escaping."""
    glue, before = [], "{"
    for name, column in columns.items():
        quote = '"' if pa.types.is_string(column.type) else ""
        glue.append(f'{before}"{name}":{quote}')
        before = f"{quote},"
    return [*glue, before.rstrip(",") + "}\n"]


def _text(columns: Columns, glue: Sequence[str]) -> memoryview:
    """Rows as text: ``glue[0]``, the first column, ``glue[1]``, the second … and ``glue[-1]``."""
    pieces: list[Any] = [glue[0]]
    for column, after in zip(columns.values(), glue[1:], strict=True):
        pieces += [column.cast(pa.string()), after]
    lines = pc.binary_join_element_wise(*pieces, "")
    # A string array's data buffer is its texts end to end.
    _, offsets, data = lines.buffers()
    end = np.frombuffer(offsets, dtype=np.int32)[len(lines)]
    return memoryview(data)[:end]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when all of it is written."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as out:
            yield out
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def user_columns(users: Users) -> Columns:
    """The users' catalogue."""
    return {
        "user_id": _ids("u", len(users.age)),
        "age": _named(AGES, users.age),
        "country": _named(COUNTRIES, users.country),
    }


def item_columns(items: Items) -> Columns:
    """The items' catalogue; several tags stand in one cell, ``|`` between them."""
    return {
        "item_id": _ids("i", len(items.category)),
        "category": _named(CATEGORIES, items.category),
        "tags": pa.array(["|".join(TAGS[k] for k in np.flatnonzero(row)) for row in items.tags]),
        "quality": pa.array([f"{quality:.2f}" for quality in items.quality]),
    }


def _ids(prefix: str, count: int) -> Any:
    return pc.binary_join_element_wise(prefix, pa.array(np.arange(1, count + 1)).cast(pa.string()), "")


def _named(names: Sequence[str], codes: NDArray[np.int64]) -> Any:
    return pa.array(names).take(pa.array(codes))
