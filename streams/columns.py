"""The columnar path: raw columns of a block to one batch of interactions and the rejections of that block.

Each ``read_*`` reference of ``streams.event_schema`` is applied to a column's distinct values; whole-number times
and numeric columns, whose values are mostly distinct, are read as arrays where every row is plain, and row by
row through the reference where one is not.

Symbols: N records of the block, K distinct values of a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.settings import EventSchema, FeatureRule, IdRule, LabelRule, TimeRule
from learner.interactions import NO_VALUE, FeatureColumn, Interactions
from streams.event_schema import (
    LARGEST_VALUE,
    LAST_TIME_MS,
    UNITS_PER_SECOND,
    WHOLE_NUMBER_DIGITS,
    read_feature,
    read_id,
    read_label,
    read_time_ms,
    read_value,
)
from streams.rejects import Problem, Rejection

NO_FEATURE = -1
"""Code of an event that does not carry the feature."""
TIMESTAMP_TO_MS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1_000), "ns": (1, 1_000_000)}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A raw column by distinct values: row n holds ``values[codes[n]]``. Values may repeat."""

    codes: NDArray[np.int32]
    values: Sequence[object]

    def __len__(self) -> int:
        return len(self.codes)


RawColumn: TypeAlias = Any
"""A ``pyarrow.Array`` or an ``Encoded``; pyarrow comes without types."""


@dataclass(frozen=True, slots=True)
class RawBlock:
    """N parsed records of one file, and the lines of the block that could not be parsed."""

    path: str
    columns: Mapping[str, RawColumn]
    """(N,) each; a mapped field that no record has is absent"""
    position: NDArray[np.int64]
    """(N,) index among the file's records, unparsable ones included"""
    line: NDArray[np.int64]
    """(N,) line number, from 1"""
    raw_text: Callable[[int], str]
    """The text of parsed record n."""
    records: int
    """N and the unparsable ones"""
    rejections: tuple[Rejection, ...] = ()


@dataclass(frozen=True, slots=True)
class EventFeature:
    """A feature carried inside the events."""

    codes: NDArray[np.int32]
    """(N,) index into ``texts``, or ``NO_FEATURE``"""
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EventBlock:
    """Events with their features kept per event, so that they can be reordered."""

    events: Interactions
    """Without features."""
    user_features: dict[str, EventFeature] = field(default_factory=dict)
    item_features: dict[str, EventFeature] = field(default_factory=dict)

    def interactions(self) -> Interactions:
        """The events with each id's features as its first event has them."""
        e = self.events
        if not self.user_features and not self.item_features:
            return e
        users = {name: at_first(f, e.user, len(e.user_ids)) for name, f in self.user_features.items()}
        items = {name: at_first(f, e.item, len(e.item_ids)) for name, f in self.item_features.items()}
        return Interactions(
            e.user_ids, e.item_ids, e.user, e.item, e.label, e.value, e.event_time_ms, e.offset, users, items
        )


def at_first(feature: EventFeature, entity: NDArray[np.int32], count: int) -> FeatureColumn:
    """(count,) the feature's text at each entity's first event; None for an entity without events."""
    codes = np.full(count, NO_FEATURE, dtype=np.int32)
    codes[entity[::-1]] = feature.codes[::-1]
    return tuple(feature.texts[k] if k != NO_FEATURE else None for k in codes)


def decode_block(block: RawBlock, schema: EventSchema, first_offset: int) -> tuple[EventBlock, list[Rejection]]:
    """The events of a block, and its rejections in line order.

    An event's offset is ``first_offset`` plus its record's position in the file.
    """
    problems: dict[int, Problem] = {}
    n = len(block.line)
    time = _times(_column(block, schema.event_time.field), schema.event_time, problems)
    value = np.full(n, NO_VALUE, dtype=np.float32)
    if schema.value is not None:
        value = _values(_column(block, schema.value.field), schema.value.field, problems)
    label = _labels(_column(block, schema.label.field), schema.label, problems)
    item_ids, item = _ids(_column(block, schema.item_id.field), schema.item_id, problems)
    user_ids, user = _ids(_column(block, schema.user_id.field), schema.user_id, problems)
    events = Interactions(user_ids, item_ids, user, item, label, value, time, block.position + first_offset)
    user_features, item_features = _features(block, schema.user_features), _features(block, schema.item_features)
    if problems:
        kept = np.delete(np.arange(n), np.fromiter(problems, dtype=np.int64))
        events = events.take(kept).pruned()
        user_features = {k: EventFeature(f.codes[kept], f.texts) for k, f in user_features.items()}
        item_features = {k: EventFeature(f.codes[kept], f.texts) for k, f in item_features.items()}
    rejections = [
        Rejection(block.path, int(block.line[row]), problem, block.raw_text(row)) for row, problem in problems.items()
    ]
    rejections = sorted([*block.rejections, *rejections], key=lambda r: r.line)
    return EventBlock(events, user_features, item_features), rejections


def encode(column: RawColumn) -> Encoded:
    """A column by distinct values, in order of first appearance."""
    if isinstance(column, Encoded):
        return column
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode(null_encoding="encode")
    codes, values = column.indices, column.dictionary.to_pylist()
    if codes.null_count:
        values = [*values, None]
        codes = codes.fill_null(len(values) - 1)
    return Encoded(codes.to_numpy(zero_copy_only=False).astype(np.int32, copy=False), values)


def _column(block: RawBlock, name: str) -> RawColumn:
    """The named column; one of None where no record has it."""
    return block.columns.get(name, Encoded(np.zeros(len(block.line), dtype=np.int32), (None,)))


# Each reader below adds the problems of its rows to `problems`; called in reverse order of the schema, the
# earlier field's problem replaces the later one's, as in `decode_record`.


def _ids(column: RawColumn, rule: IdRule, problems: dict[int, Problem]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    encoded = encode(column)
    if isinstance(column, pa.Array) and _are_plain_ids(encoded.values):
        return tuple(f"{rule.prefix}{text}" for text in encoded.values), encoded.codes
    ids: dict[str, int] = {}
    recoded = np.empty(len(encoded.values), dtype=np.int32)
    bad: dict[int, Problem] = {}
    for code, raw in enumerate(encoded.values):
        text = read_id(raw, rule)
        if isinstance(text, Problem):
            bad[code] = text
            text = ""
        recoded[code] = ids.setdefault(text, len(ids))
    _spread(encoded.codes, bad, problems)
    return tuple(ids), encoded.codes if len(ids) == len(encoded.values) else recoded[encoded.codes]


def _are_plain_ids(values: Sequence[Any]) -> bool:
    """Whether all are text and none is blank: then they are ids as they stand."""
    return set(map(type, values)) == {str} and "" not in values and not any(map(str.isspace, values))


def _labels(column: RawColumn, rule: LabelRule, problems: dict[int, Problem]) -> NDArray[np.int8]:
    return _looked_up(encode(column), lambda raw: read_label(raw, rule), problems).astype(np.int8)


def _values(column: RawColumn, name: str, problems: dict[int, Problem]) -> NDArray[np.float32]:
    if isinstance(column, pa.Array) and column.null_count == 0 and pa.types.is_floating(column.type):
        numbers = column.to_numpy(zero_copy_only=False).astype(np.float64)
        if bool((np.abs(numbers) <= LARGEST_VALUE).all()):
            plain: NDArray[np.float32] = numbers.astype(np.float32)
            return plain
    return _looked_up(encode(column), lambda raw: read_value(raw, name), problems).astype(np.float32)


def _times(column: RawColumn, rule: TimeRule, problems: dict[int, Problem]) -> NDArray[np.int64]:
    times, plain = _plain_times(column, rule)
    rest = np.flatnonzero(~plain)
    if len(rest):
        encoded = _rows(column, rest)
        own: dict[int, Problem] = {}
        read = _looked_up(encoded, lambda raw: read_time_ms(raw, rule), own, np.int64)
        times[rest] = read
        problems.update({int(rest[row]): problem for row, problem in own.items()})
    return times


def _rows(column: RawColumn, rows: NDArray[np.int64]) -> Encoded:
    if isinstance(column, Encoded):
        return Encoded(column.codes[rows], column.values)
    return encode(column.take(pa.array(rows)))


def _plain_times(column: RawColumn, rule: TimeRule) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(N,) milliseconds, and (N,) which of them are sure; the others are for the reference."""
    n = len(column)
    if rule.unit == "iso" or isinstance(column, Encoded):
        return np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.bool_)
    if pa.types.is_string(column.type):
        numbers, plain = _whole_numbers(column)
        return _scaled(numbers, plain, rule.unit)
    if pa.types.is_integer(column.type) and column.type != pa.uint64():
        plain = _valid(column)
        return _scaled(column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64), plain, rule.unit)
    if pa.types.is_floating(column.type):
        floats = column.fill_null(np.nan).to_numpy(zero_copy_only=False).astype(np.float64)
        with np.errstate(over="ignore"):
            scaled = np.rint(floats * (1000.0 / UNITS_PER_SECOND[rule.unit]))
        plain = (scaled >= 0) & (scaled < LAST_TIME_MS)
        return np.where(plain, scaled, 0).astype(np.int64), plain
    return np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.bool_)


def _scaled(
    numbers: NDArray[np.int64], plain: NDArray[np.bool_], unit: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    factor, divisor = TIMESTAMP_TO_MS[unit]
    plain &= (numbers >= 0) & (numbers < LAST_TIME_MS // factor * divisor)
    times = numbers * factor
    return times if divisor == 1 else times // divisor, plain


def _valid(column: pa.Array) -> NDArray[np.bool_]:
    valid: NDArray[np.bool_] = pc.is_valid(column).to_numpy(zero_copy_only=False)
    return valid.copy()


def _whole_numbers(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    numbers, plain = np.zeros(len(column), dtype=np.int64), np.zeros(len(column), dtype=np.bool_)
    _, offsets, data = column.buffers()
    if data is not None and len(column):
        starts = np.frombuffer(offsets, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
        _parse_digits(np.frombuffer(data, dtype=np.uint8), starts, numbers, plain)
    return numbers, plain


@numba.njit(cache=True, nogil=True)
def _parse_digits(
    data: NDArray[np.uint8], starts: NDArray[np.int32], numbers: NDArray[np.int64], plain: NDArray[np.bool_]
) -> None:
    """Rows of 1 to 18 ASCII digits become numbers; other rows stay 0 and not plain."""
    for row in range(len(numbers)):
        first, end = starts[row], starts[row + 1]
        if not 1 <= end - first <= WHOLE_NUMBER_DIGITS:
            continue
        number = np.int64(0)
        strays = 0
        for k in range(first, end):
            digit = np.int64(data[k]) - 48
            if digit < 0 or digit > 9:
                strays += 1
            number = number * 10 + digit
        if not strays:
            numbers[row] = number
            plain[row] = True


def _looked_up(
    encoded: Encoded,
    read: Callable[[object], float | Problem],
    problems: dict[int, Problem],
    dtype: type[np.generic] = np.float64,
) -> NDArray[Any]:
    """(N,) ``read`` of each row, done once per distinct value; 0 where it is a problem."""
    table = np.zeros(len(encoded.values), dtype=dtype)
    bad: dict[int, Problem] = {}
    for code, raw in enumerate(encoded.values):
        result = read(raw)
        if isinstance(result, Problem):
            bad[code] = result
        else:
            table[code] = result
    _spread(encoded.codes, bad, problems)
    return table[encoded.codes]


def _spread(codes: NDArray[np.int32], bad: Mapping[int, Problem], problems: dict[int, Problem]) -> None:
    if bad:
        for row in np.flatnonzero(np.isin(codes, np.fromiter(bad, dtype=np.int32))):
            problems[int(row)] = bad[int(codes[row])]


def _features(block: RawBlock, rules: Mapping[str, FeatureRule]) -> dict[str, EventFeature]:
    features: dict[str, EventFeature] = {}
    for name, rule in rules.items():
        encoded = encode(_column(block, rule.field or name))
        texts: dict[str, int] = {}
        table = np.empty(len(encoded.values), dtype=np.int32)
        for code, raw in enumerate(encoded.values):
            text = read_feature(raw, rule.separator)
            table[code] = NO_FEATURE if text is None else texts.setdefault(text, len(texts))
        features[name] = EventFeature(table[encoded.codes], tuple(texts))
    return features
