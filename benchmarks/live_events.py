"""Events of the live benchmarks: columns, and the JSON records that a producer would send of them.

A record is some 120 bytes, two of its fields unknown to the worker, as producers' records have them::

    {"user_id":"17","item_id":"2340","label":1,"event_time_ms":1600000000000,"source":"android","session":"9120…"}

Symbols: N events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from benchmarks.synthetic import FIRST_TIME_MS, ITEMS, Users
from configs.settings import DataSettings, EventSchema
from learner.interactions import Interactions
from streams.kafka.batch_writing import Spans
from streams.sources import open_source

PIECE_EVENTS = 250_000
"""Written at once, some 30 MB"""
SESSIONS = 10**15, 10**16
"""Sixteen digits each"""
ROUND_USERS = 100_000
"""More than any user's number in MovieLens: added to give every repetition users of its own"""
MS_PER_UNIT = {"s": 1_000, "ms": 1}


@dataclass(frozen=True, slots=True)
class Events:
    """N events in the order in which they are sent."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    label: NDArray[np.int64]
    """As the record has it: 0 or 1, or a rating"""
    time: NDArray[np.int64]
    """As the record has it: in the schema's unit"""

    def __len__(self) -> int:
        return len(self.user)

    def part(self, start: int, stop: int) -> Events:
        """Events start … stop-1."""
        cut = slice(start, stop)
        return Events(self.user[cut], self.item[cut], self.label[cut], self.time[cut])

    def repeated(self, events: int) -> Events:
        """So many events: these over and over, each time of other users."""
        rounds = -(-events // len(self))
        shift = np.repeat(np.arange(rounds, dtype=np.int64) * ROUND_USERS, len(self))
        item, label, time = (np.tile(column, rounds) for column in (self.item, self.label, self.time))
        return Events(np.tile(self.user, rounds) + shift, item, label, time).part(0, events)


def generated(users: Users, seed: int = 0) -> Events:
    """Events of these users a second apart, under the default schema; what they mean is random."""
    rng = np.random.default_rng(seed + 1)
    n = len(users)
    return Events(users, rng.integers(0, ITEMS, n), rng.integers(0, 2, n), FIRST_TIME_MS + 1000 * np.arange(n))


def from_source(data: DataSettings) -> Events:
    """A file's events in time order, as its own schema writes them; user and item ids are numbers there."""
    events = Interactions.concatenate(list(open_source(data).batches()))
    order = np.argsort(events.event_time_ms, kind="stable")
    users, items = (np.array(ids, dtype=np.int64) for ids in (events.user_ids, events.item_ids))
    label = events.label if data.events.label.at_least is None else events.value
    time = events.event_time_ms // _ms_per_unit(data.events)
    return Events(
        users[events.user[order]], items[events.item[order]], label[order].astype(np.int64), time[order]
    )  # fmt: skip


def records(events: Events, schema: EventSchema, seed: int = 0) -> Iterator[tuple[Spans, Spans]]:
    """(keys, values) of ``PIECE_EVENTS`` events at a time, in order. A key is the user's id."""
    rng = np.random.default_rng(seed)
    for first in range(0, len(events), PIECE_EVENTS):
        part = events.part(first, first + PIECE_EVENTS)
        user, item, label, time = (_text(column) for column in (part.user, part.item, part.label, part.time))
        session = _text(rng.integers(*SESSIONS, len(part)))
        json = pc.binary_join_element_wise(
            f'{{"{schema.user_id.field}":"', user, f'","{schema.item_id.field}":"', item,
            f'","{schema.label.field}":', label, f',"{schema.event_time.field}":', time,
            ',"source":"android","session":"', session, '"}', "",
        )  # fmt: skip
        yield _spans(user), _spans(json)


def _ms_per_unit(schema: EventSchema) -> int:
    unit = schema.event_time.unit
    if unit not in MS_PER_UNIT:
        raise ValueError(f"times in {unit}: the benchmark's records have them in {' or '.join(MS_PER_UNIT)}")
    return MS_PER_UNIT[unit]


def _text(numbers: NDArray[np.int64]) -> pa.StringArray:
    return pc.cast(pa.array(numbers), pa.string())


def _spans(texts: Any) -> Spans:
    """The array's own buffer, without a copy."""
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    return Spans(np.frombuffer(data, dtype=np.uint8), bounds[:-1], np.diff(bounds))
