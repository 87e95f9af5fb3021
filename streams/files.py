"""Which files a source has, how each is laid out, and whether it has the fields that the settings map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Literal

from configs.settings import FileFormat, SourceFormat
from streams.columns import RawBlock
from streams.delimited import DelimitedLayout, column_names, read_delimited
from streams.exceptions import MissingFile, UnknownColumn, UnknownFormat
from streams.json_lines import read_json_lines, read_keys
from streams.parquet import carries_own_unit, parquet_columns, read_parquet

FileKind = Literal["delimited", "jsonl", "parquet"]

KIND_OF_SUFFIX: dict[str, FileKind] = {
    ".csv": "delimited",
    ".tsv": "delimited",
    ".tab": "delimited",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
TAB_SUFFIXES = (".tsv", ".tab")


@dataclass(frozen=True, slots=True)
class MappedField:
    """A field of the settings that a file must have; ``setting`` names it in messages."""

    name: str
    setting: str
    required: bool = True


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file and how to read it."""

    path: Path
    kind: FileKind
    layout: DelimitedLayout = dataclass_field(default_factory=DelimitedLayout)

    def check(self, fields: Sequence[MappedField]) -> None:
        """Raises UnknownColumn for the first required field that the file does not have."""
        columns = self.columns()
        for field in fields:
            # A file of no readable objects says nothing about its keys: its lines are rejected one by one.
            if field.required and field.name not in columns and (columns or self.kind != "jsonl"):
                raise UnknownColumn(str(self.path), field.name, field.setting, columns, self._header_hint())

    def columns(self) -> tuple[str, ...]:
        """The fields of the file (of JSON lines: of its first objects)."""
        if self.kind == "parquet":
            return tuple(parquet_columns(self.path))
        if self.kind == "jsonl":
            return read_keys(self.path, self.layout.encoding)
        return column_names(self.path, self.layout)

    def read(self, fields: Sequence[MappedField]) -> Iterator[RawBlock]:
        """The mapped fields of all records."""
        wanted = list(dict.fromkeys(field.name for field in fields))
        if self.kind == "jsonl":
            return read_json_lines(self.path, self.layout.encoding, wanted)
        columns = self.columns()
        present = [name for name in wanted if name in columns]
        if self.kind == "parquet":
            return read_parquet(self.path, present)
        return read_delimited(self.path, self.layout, present)

    def has_moments(self, column: str) -> bool:
        """Whether the column holds timestamps that carry their own unit."""
        return self.kind == "parquet" and carries_own_unit(parquet_columns(self.path)[column])

    def _header_hint(self) -> str:
        if self.kind == "delimited" and self.layout.header:
            return "; or data.delimiter, or data.header: false with data.columns if the first line is an event"
        return ""


def expand(path: Path, section: str) -> list[Path]:
    """The path, or a directory's files of known suffix in the order of their names.

    Raises:
        MissingFile: the path is not there, or the directory holds no such file.
    """
    if not path.is_dir():
        if not path.exists():
            raise MissingFile(f"{path}: no such file; {section} is relative to {Path.cwd()}")
        return [path]
    inside = sorted(p for p in path.iterdir() if p.suffix.lower() in KIND_OF_SUFFIX and p.is_file())
    if not inside:
        known = ", ".join(["ratings.dat", "u.data", *(f"*{suffix}" for suffix in KIND_OF_SUFFIX)])
        raise MissingFile(f"{path}: the directory holds none of {known}; name the files under {section}")
    return inside


def source_file(path: Path, settings: FileFormat, section: str, plain: tuple[str, ...] = ()) -> SourceFile:
    """How a file that is not MovieLens is read.

    Raises:
        UnknownFormat: ``auto`` does not know the suffix.
    """
    kind = _kind(path, settings.format, section)
    tab = settings.format == "auto" and settings.delimiter == "," and path.suffix.lower() in TAB_SUFFIXES
    delimiter = "\t" if tab else settings.delimiter
    header = settings.columns is None if settings.header is None else settings.header
    layout = DelimitedLayout(delimiter, header, settings.columns, settings.encoding, plain=plain)
    return SourceFile(path, kind, layout)


def _kind(path: Path, named: SourceFormat, section: str) -> FileKind:
    if named == "movielens":
        raise UnknownFormat(
            f"{path}: not MovieLens as published (a directory with ratings.dat or u.data, or one of these files); "
            f"set {section}.format to auto, delimited, jsonl or parquet"
        )
    if named != "auto":
        return named
    if path.suffix.lower() not in KIND_OF_SUFFIX:
        raise UnknownFormat(
            f"{path}: its name does not tell its format; set {section}.format to delimited, jsonl or parquet"
        )
    return KIND_OF_SUFFIX[path.suffix.lower()]
