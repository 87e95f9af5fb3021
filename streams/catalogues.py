"""Catalogues: features of users and items from MovieLens' own files, or from any file that the settings describe."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from configs.settings import CatalogueSettings, DataSettings, FeatureRule, IdRule, RejectSettings
from learner.features import Catalogue, FeatureField
from streams.columns import Encoded, RawBlock, RawColumn
from streams.event_schema import read_feature, read_id
from streams.exceptions import NoInput, UnknownColumn
from streams.files import MappedField, expand, source_file
from streams.movielens import ITEM_FEATURES, USER_FEATURES, Record, find_movielens, read_items, read_users
from streams.rejects import Problem, Rejection, Rejects

log = logging.getLogger(__name__)


def load_catalogues(data: DataSettings) -> tuple[Catalogue, Catalogue]:
    """The features of users and of items; without fields where neither a file nor MovieLens gives any.

    Where an id is given twice, its last row counts.

    Raises:
        SourceError: see ``streams.exceptions``.
    """
    found = map(find_movielens, data.paths if data.format in ("auto", "movielens") else ())
    files = next((f for f in found if f is not None), None)
    users = _from_file(data.users, "data.users", data.rejects)
    if users is None:
        rows = read_users(files) if files else iter(())
        users = _from_movielens(rows, data.users, "data.users", USER_FEATURES, data.events.user_id)
    items = _from_file(data.items, "data.items", data.rejects)
    if items is None:
        rows = read_items(files) if files else iter(())
        items = _from_movielens(rows, data.items, "data.items", ITEM_FEATURES, data.events.item_id)
    return users, items


def _from_movielens(
    rows: Iterator[tuple[str, Record]],
    settings: CatalogueSettings,
    section: str,
    known: Mapping[str, FeatureRule],
    identity: IdRule,
) -> Catalogue:
    """The features that the settings select, all of them where they select none; ids as the events have them."""
    records = dict(rows)
    if not records:
        if settings.features:
            raise NoInput(f"{section}.features names features, but {section}.path names no file")
        return Catalogue()
    rules = settings.features or known
    for name, rule in rules.items():
        if (rule.field or name) not in known:
            raise UnknownColumn("MovieLens", rule.field or name, f"{section}.features.{name}", list(known))
    texts = {
        identity.prefix + entity: tuple(record[rule.field or name] or None for name, rule in rules.items())
        for entity, record in records.items()
    }
    return Catalogue(_fields(rules), texts)


def _from_file(settings: CatalogueSettings, section: str, bounds: RejectSettings) -> Catalogue | None:
    if settings.path is None:
        return None
    if not settings.features:
        raise NoInput(f"{section}.path is given without features; name columns under {section}.features")
    fields = [MappedField(settings.id.field, f"{section}.id.field")]
    fields += [
        MappedField(rule.field or name, f"{section}.features.{name}") for name, rule in settings.features.items()
    ]
    rejects = Rejects(None, bounds.max_share)
    rows: dict[str, tuple[str | None, ...]] = {}
    for path in expand(settings.path, f"{section}.path"):
        file = source_file(path, settings, section)
        file.check(fields)
        for block in file.read(fields):
            rejects.add(block.records, [*block.rejections, *_read_rows(block, settings, rows)])
    rejects.finish()
    if rejects.first is not None:
        first = rejects.first
        log.warning(
            "%s: %d of %d rows cannot be used; first: line %d: %s",
            settings.path, rejects.count, rejects.records, first.line, first.problem.detail,
        )  # fmt: skip
    return Catalogue(_fields(settings.features), rows)


def _read_rows(
    block: RawBlock, settings: CatalogueSettings, rows: dict[str, tuple[str | None, ...]]
) -> list[Rejection]:
    n = len(block.line)
    ids = _values(block.columns.get(settings.id.field), n)
    texts = [
        [read_feature(raw, rule.separator) for raw in _values(block.columns.get(rule.field or name), n)]
        for name, rule in settings.features.items()
    ]
    rejections: list[Rejection] = []
    for row, raw in enumerate(ids):
        entity = read_id(raw, settings.id)
        if isinstance(entity, Problem):
            rejections.append(Rejection(block.path, int(block.line[row]), entity, block.raw_text(row)))
        else:
            rows[entity] = tuple(column[row] for column in texts)
    return rejections


def _values(column: RawColumn | None, n: int) -> list[object]:
    if column is None:
        return [None] * n
    if isinstance(column, Encoded):
        return [column.values[code] for code in column.codes]
    values: list[object] = column.to_pylist()
    return values


def _fields(rules: Mapping[str, FeatureRule]) -> tuple[FeatureField, ...]:
    return tuple(FeatureField(name, rule.kind, rule.separator) for name, rule in rules.items())
