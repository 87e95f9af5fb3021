"""Generated event files of any size, for benchmarks whose speed does not depend on what the events mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
from numpy.typing import NDArray

CHUNK_EVENTS = 1_000_000
"""Rows written at once, some 40 MB."""
ITEMS = 4_000
"""Like MovieLens 1M."""
FIRST_TIME_MS = 1_600_000_000_000
NAMES = ("user_id", "item_id", "label", "event_time_ms")

Users = NDArray[np.int64]


def uniform_users(events: int, users: int, seed: int = 0) -> Users:
    """(events,) every user as likely as any other."""
    return np.random.default_rng(seed).integers(0, users, events)


def zipf_users(events: int, users: int, exponent: float, seed: int = 0) -> Users:
    """(events,) the user of rank k with probability proportional to k^−exponent; numbers say nothing of ranks."""
    rng = np.random.default_rng(seed)
    cumulated = np.cumsum(np.arange(1, users + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(cumulated, rng.random(events) * cumulated[-1], side="right")
    numbers: Users = rng.permutation(users)[ranks]
    return numbers


def write_csv(path: Path, users: Users, *, items: int = ITEMS, shuffled: bool = False, seed: int = 0) -> None:
    """One event a line, a second apart; ``shuffled`` puts the times in random order."""
    with path.open("wb") as file, pc.CSVWriter(file, _schema()) as writer:
        for batch in _batches(users, items, shuffled, seed):
            writer.write_batch(batch)


def write_jsonl(path: Path, users: Users, *, items: int = ITEMS, seed: int = 0) -> None:
    """The same as JSON lines, in order of time."""
    with path.open("w", encoding="utf-8") as file:
        for batch in _batches(users, items, False, seed):
            columns = (column.to_pylist() for column in batch.columns)
            file.writelines(
                f'{{"user_id":"{user}","item_id":"{item}","label":{label},"event_time_ms":{time}}}\n'
                for user, item, label, time in zip(*columns, strict=True)
            )


def _schema() -> pa.Schema:
    return pa.schema([(name, pa.int64()) for name in NAMES])


def _batches(users: Users, items: int, shuffled: bool, seed: int) -> Iterator[pa.RecordBatch]:
    rng = np.random.default_rng(seed + 1)
    seconds = rng.permutation(len(users)) if shuffled else np.arange(len(users))
    for first in range(0, len(users), CHUNK_EVENTS):
        part = slice(first, first + CHUNK_EVENTS)
        n = len(users[part])
        columns = (users[part], rng.integers(0, items, n), rng.integers(0, 2, n), FIRST_TIME_MS + 1000 * seconds[part])
        yield pa.record_batch([pa.array(column) for column in columns], schema=_schema())
