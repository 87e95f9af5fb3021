"""Events from files: MovieLens, delimited text, JSON lines and Parquet, one or several, in any order of time."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from configs.settings import DataSettings, EventSchema, TimeRule
from learner.interactions import Interactions
from streams.catalogues import load_catalogues
from streams.columns import EventBlock, EventFeature, decode_block
from streams.event_schema import unit_hint
from streams.exceptions import EmptyFile, NoInput, SourceError
from streams.files import MappedField, SourceFile, expand, source_file
from streams.movielens import SCHEMA as MOVIELENS_SCHEMA
from streams.movielens import find_movielens
from streams.ordering import OrderedEvents, order_by_time
from streams.prefetch import prefetched
from streams.rejects import Rejects

__all__ = ["EventSource", "OrderedEvents", "load_catalogues", "open_source", "time_ordered"]

BATCH_EVENTS = 65_536
"""The most events of a batch."""
BLOCKS_AHEAD = 4
"""Blocks that are read ahead, some 2 MB each with their columns."""
ONE_YEAR_MS = 31_536_000_000

log = logging.getLogger(__name__)

time_ordered = order_by_time


@dataclass(frozen=True, slots=True)
class _MappedFile:
    file: SourceFile
    schema: EventSchema


class EventSource:
    """The events of some files, in the order of the files and of their lines.

    An offset is the position of a record among all records of the source, rejected ones included: offsets
    strictly increase and do not depend on what is rejected.
    """

    def __init__(self, files: tuple[_MappedFile, ...], data: DataSettings) -> None:
        self._files = files
        self._data = data
        self.rejects = Rejects(data.rejects.path, data.rejects.max_share)
        """The counts of the pass that began last."""

    def batches(self) -> Iterator[Interactions]:
        """The events in batches of at most 65,536. Each call reads the files anew, and the rejects file is
        written anew; run one pass at a time.

        Raises:
            TooManyRejects, EmptyFile, SourceError: see ``streams.exceptions``.
        """
        for block in self.blocks():
            yield block.interactions()

    def blocks(self) -> Generator[EventBlock, None, None]:
        """As ``batches``, with features per event; reading runs ahead in a thread."""
        with closing(prefetched(self._read(), BLOCKS_AHEAD)) as blocks:
            yield from blocks

    def _read(self) -> Iterator[EventBlock]:
        rejects = self.rejects = Rejects(self._data.rejects.path, self._data.rejects.max_share)
        rejects.start()
        offset = 0
        try:
            for mapped in self._files:
                first_offset, hinted = offset, False
                for raw in mapped.file.read(mapped_fields(mapped.schema)):
                    block, rejections = decode_block(raw, mapped.schema, first_offset)
                    offset += raw.records
                    rejects.add(raw.records, rejections)
                    hinted = hinted or _warn_of_unit(block, mapped)
                    yield from _pieces(block)
            rejects.finish()
        finally:
            rejects.close()
        if not rejects.records:
            names = ", ".join(str(mapped.file.path) for mapped in self._files)
            raise EmptyFile(f"{names}: no events; write some or name other files under data.paths")


def open_source(data: DataSettings) -> EventSource:
    """Finds the files of ``data.paths`` and checks that each has the mapped fields. Reads no events yet.

    Raises:
        NoInput, MissingFile, EmptyFile, UnknownFormat, UnknownColumn, UnusableFile: see ``streams.exceptions``.
    """
    if not data.paths:
        raise NoInput("data.paths is empty: name files or a directory there, or set COLDSTREAM__DATA__PATHS")
    mapped = tuple(entry for path in data.paths for entry in _mapped_files(path, data))
    for entry in mapped:
        if data.rejects.path is not None and data.rejects.path.resolve() == entry.file.path.resolve():
            raise SourceError(f"{data.rejects.path}: data.rejects.path is an input and would be overwritten")
        entry.file.check(mapped_fields(entry.schema))
    return EventSource(tuple(_with_own_unit(entry) for entry in mapped), data)


def mapped_fields(schema: EventSchema) -> list[MappedField]:
    """The fields that the settings map, in the order in which a record is checked."""
    fields = [
        MappedField(schema.user_id.field, "data.events.user_id.field"),
        MappedField(schema.item_id.field, "data.events.item_id.field"),
        MappedField(schema.label.field, "data.events.label.field"),
        MappedField(schema.event_time.field, "data.events.event_time.field"),
    ]
    if schema.value is not None:
        fields.append(MappedField(schema.value.field, "data.events.value.field", not schema.value.optional))
    for name, rule in schema.user_features.items():
        fields.append(MappedField(rule.field or name, f"data.events.user_features.{name}"))
    for name, rule in schema.item_features.items():
        fields.append(MappedField(rule.field or name, f"data.events.item_features.{name}"))
    return fields


def _mapped_files(named: Path, data: DataSettings) -> Iterator[_MappedFile]:
    files = find_movielens(named) if data.format in ("auto", "movielens") else None
    if files is not None:
        schema = MOVIELENS_SCHEMA if data.events == EventSchema() else data.events
        yield _MappedFile(SourceFile(files.ratings, "delimited", files.layout(schema.event_time.field)), schema)
        return
    for path in expand(named, "data.paths"):
        plain = (data.events.event_time.field,)
        yield _MappedFile(source_file(path, data, "data", plain), data.events)


def _with_own_unit(entry: _MappedFile) -> _MappedFile:
    time = entry.schema.event_time
    if not entry.file.has_moments(time.field):
        return entry
    in_milliseconds = TimeRule(field=time.field, unit="ms")
    return _MappedFile(entry.file, entry.schema.model_copy(update={"event_time": in_milliseconds}))


def _warn_of_unit(block: EventBlock, mapped: _MappedFile) -> bool:
    """Says once a file that its times lie in 1970, where a wrong unit puts them."""
    if not len(block.events):
        return False
    latest = int(block.events.event_time_ms.max())
    hint = unit_hint(latest, mapped.schema.event_time.unit) if latest < ONE_YEAR_MS else ""
    if hint:
        log.warning("%s: the first events lie in 1970%s", mapped.file.path, hint)
    return True


def _pieces(block: EventBlock) -> Iterator[EventBlock]:
    n = len(block.events)
    if 0 < n <= BATCH_EVENTS:
        yield block
        return
    for first in range(0, n, BATCH_EVENTS):
        rows = slice(first, first + BATCH_EVENTS)
        yield EventBlock(
            block.events.take(rows).pruned(),
            {name: EventFeature(f.codes[rows], f.texts) for name, f in block.user_features.items()},
            {name: EventFeature(f.codes[rows], f.texts) for name, f in block.item_features.items()},
        )
