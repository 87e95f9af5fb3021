"""Whatever the history of a partition, its log restores every store to what a dictionary says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.user_state import RowLayout
from state.changelog import Record, committed, restore
from state.codec import Progress
from state.keys import PROGRESS_KEY
from state.memory_store import MemoryUserStore
from state.store import RocksUserStore, UserStore

LAYOUT = RowLayout("gradient", 2, 0, 0)
USERS = [b"", b"a", b"mprogress", b"x" * 300, b"\0"]
TICK_MS = 10

Row = tuple[int, int, int]
"""(events, last offset, ledger)"""


@dataclass
class Partition:
    """A partition's owner: its rows, what it has sent to the log, and what its store was after each commit."""

    rows: dict[bytes, Row] = field(default_factory=dict)
    offset: int = -1
    log: list[Record] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    """When each record was sent"""
    stores: list[tuple[dict[bytes, Row], Progress | None]] = field(default_factory=lambda: [({}, None)])

    def learn(self, users: list[bytes]) -> None:
        for user in users:
            self.offset += 1
            events, _, ledger = self.rows.get(user, (0, 0, 0))
            self.rows[user] = (events + 1, self.offset, 31 * ledger + self.offset + 1)
        self._commit(users, [])

    def erase(self, user: bytes) -> None:
        self.rows.pop(user, None)
        self._commit([], [user])

    def _commit(self, users: list[bytes], deleted: list[bytes]) -> None:
        now = TICK_MS * len(self.stores)
        progress = Progress(self.offset, 0, len(self.rows), sum(row[0] for row in self.rows.values()), now)
        slab = slab_of([self.rows[user] for user in users])
        sent = list(committed(LAYOUT, users, slab, progress, deleted=deleted))
        self.log += sent
        self.times += [now] * len(sent)
        self.stores.append((dict(self.rows), progress))


def slab_of(rows: list[Row]) -> np.ndarray:
    slab = np.zeros((len(rows), LAYOUT.row_bytes), np.uint8)
    for row, (events, offset, ledger) in zip(LAYOUT.rows(slab), rows, strict=True):
        row["events"], row["last_offset"], row["ledger"] = events, offset, ledger
    return slab


def compacted(partition: Partition, clean: int, now: int, retention: int) -> list[Record]:
    """The log after Kafka cleaned its first ``clean`` records: the last of each key there, without old tombstones."""
    last = {record.key: place for place, record in enumerate(partition.log[:clean])}
    kept = []
    for place, (record, time) in enumerate(zip(partition.log, partition.times, strict=False)):
        gone = place < clean and (last[record.key] != place or (record.value is None and now - time >= retention))
        if not gone:
            kept.append(record)
    return kept


def held(store: UserStore) -> dict[bytes, Row]:
    fields = ["events", "last_offset", "ledger"]
    return {user: tuple(LAYOUT.rows(row[None])[fields][0].tolist()) for user, row in store.iterate()}


def fill(store: UserStore, rows: dict[bytes, Row], progress: Progress | None) -> None:
    if progress is not None:
        store.write_batch(list(rows), slab_of(list(rows.values())), progress)


class Cut(Exception):
    pass


def cut_after(records: list[Record], count: int):
    yield from records[:count]
    raise Cut


steps = st.lists(
    st.one_of(
        st.lists(st.sampled_from(USERS), min_size=1, max_size=4, unique=True),
        st.sampled_from(USERS),
    ),
    min_size=1,
    max_size=12,
)


@st.composite
def cases(draw):
    """(partition, its log as it is left, the store to restore, now, retention)"""
    partition = Partition()
    for step in draw(steps):
        if isinstance(step, list):
            partition.learn(step)
        else:
            partition.erase(step)
    now = TICK_MS * len(partition.stores)
    retention = TICK_MS * draw(st.integers(1, len(partition.stores) + 1))
    if draw(st.booleans()):
        partition.log.pop()  # the producer died before the marker
    log = compacted(partition, draw(st.integers(0, len(partition.log))), now, retention)
    old = draw(st.integers(0, len(partition.stores) - 1))
    return partition, log, partition.stores[old], now, retention


def check(store: UserStore, case, chunk_records: int, cuts: list[int]) -> None:
    partition, log, (rows, progress), now, retention = case
    markers = [Progress.decode(record.value).offset for record in log if record.key == PROGRESS_KEY]
    current = progress is not None and now - progress.written_at_ms < retention and progress.written_at_ms > 0
    fill(store, rows, progress)
    options = {"tombstone_retention_ms": retention, "now_ms": now, "chunk_records": chunk_records}
    for cut in cuts:
        with pytest.raises(Cut):
            restore(store, cut_after(log, cut), **options)
        assert store.restoring() or not cut
    for _ in range(2):
        done = restore(store, log, **options)
        assert held(store) == partition.rows
        assert not store.restoring()
        end = store.progress()
        assert end == done.progress
        assert end.offset == max(progress.offset if current else -1, *markers[-1:], -1)
        assert (end.users, end.events) == (len(partition.rows), sum(row[0] for row in partition.rows.values()))


@settings(max_examples=300)
@given(cases(), st.integers(1, 6), st.lists(st.integers(0, 30), max_size=3))
def test_any_store_is_brought_to_the_state_of_the_log(case, chunk_records, cuts):
    with MemoryUserStore(LAYOUT) as store:
        check(store, case, chunk_records, cuts)


@settings(max_examples=15)
@given(cases(), st.integers(1, 6), st.lists(st.integers(0, 30), max_size=1))
def test_rocksdb_is_brought_to_the_state_of_the_log(case, chunk_records, cuts):
    with TemporaryDirectory() as directory, RocksUserStore(Path(directory), LAYOUT) as store:
        check(store, case, chunk_records, cuts)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(USERS[:3]), st.integers(1, 4), st.integers(0, 9)),
            st.sampled_from(USERS[:3]),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(2, 13),
)
def test_how_the_log_is_cut_into_batches_changes_nothing(steps, chunk_records):
    """Even of a log whose producers sent rows again, out of order."""
    log = []
    for step in steps:
        if isinstance(step, bytes):
            log += committed(LAYOUT, [], slab_of([]), None, deleted=[step])
        else:
            user, events, offset = step
            log += committed(LAYOUT, [user], slab_of([(events, offset, events + 100 * offset)]), None)
    ends = []
    for size in (1, chunk_records):
        with MemoryUserStore(LAYOUT) as store:
            restore(store, log, tombstone_retention_ms=1, now_ms=0, chunk_records=size)
            ends.append((held(store), store.progress()))
    assert ends[0] == ends[1]
