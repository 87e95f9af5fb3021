"""A small stream, and what a store must hold after each of its events: the judge of every fault."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.user_state import RowLayout
from state.memory_store import MemoryUserStore
from state.rocksdb import StoreMemory
from state.store import RocksReader, RocksUserStore, UserStore
from state.syncing import SyncPolicy
from streams.processor import Processor
from tests.models import random_stream, small_model

EVENTS, USERS, RING = 320, 24, 4
LAYOUT = RowLayout("full", 5, 4, RING)
LARGE, TINY = 64 << 20, 1 << 10
"""Memtables that hold all of the stream (rows stay in the log), and ones that are flushed at every batch"""


class Wrong(AssertionError):
    """A store holds what no clean pass ever held: the one outcome that no fault may have."""


@cache
def stream() -> Interactions:
    return random_stream(EVENTS, USERS, seed=5)


@cache
def clean_pass() -> dict[int | None, dict[bytes, bytes]]:
    """Offset -> all rows after the event with that offset; None -> none."""
    store = MemoryUserStore(LAYOUT)
    states: dict[int | None, dict[bytes, bytes]] = {None: {}}
    with processor(store, commit_events=1) as work:
        for k in range(EVENTS):
            work.process(0, stream().take(slice(k, k + 1)))
            states[int(stream().offset[k])] = {user: row.tobytes() for user, row in store.iterate()}
    return states


def processor(store: UserStore, commit_events: int) -> Processor:
    """One over a store that is open, and that it closes."""
    state = StateSettings(commit_events=commit_events, ring=RING, hot_rows_mb=1)
    return Processor(small_model("full"), lambda _, __: store, state)


def open_store(path: Path, memtables: int = LARGE, sync: SyncPolicy | None = None) -> RocksUserStore:
    return RocksUserStore(path, LAYOUT, StoreMemory(1 << 20, memtables), sync)


def check(store: RocksUserStore | RocksReader) -> int:
    """How many events the store has applied. Raises Wrong unless it holds the rows of a clean pass of just as many.

    Rows are read by a walk and by their ids: the two ways share no code in RocksDB.
    """
    progress = store.progress()
    expected = clean_pass().get(None if progress is None else progress.offset)
    if expected is None:
        raise Wrong(f"no event has the offset of {progress}")
    _compare("a walk", {user: row.tobytes() for user, row in store.iterate()}, expected)
    users = sorted(clean_pass()[int(stream().offset[-1])])
    rows, found = store.get_many(users)
    read = {user: row.tobytes() for user, row, there in zip(users, rows, found, strict=True) if there}
    _compare("reading by id", read, expected)
    done = events_until(None if progress is None else progress.offset)
    if progress is not None and (progress.users, progress.events) != (len(expected), done):
        raise Wrong(f"{progress} after {done} events of {len(expected)} users")
    return done


def events_until(offset: int | None) -> int:
    """How many of the stream's events come up to an offset."""
    return 0 if offset is None else int((stream().offset <= offset).sum())


def finish(store: UserStore, done: int, commit_events: int = 16) -> None:
    """Streams the rest, and checks that all is as after a clean pass. Closes the store."""
    with processor(store, commit_events) as work:
        work.process(0, stream().take(slice(done, EVENTS)))
        if check(store) != EVENTS:  # type: ignore[arg-type]
            raise Wrong(f"the stream was fed to its end, and the store is at {store.progress()}")


def _compare(how: str, found: dict[bytes, bytes], expected: dict[bytes, bytes]) -> None:
    if found != expected:
        users = sorted(user for user in found.keys() | expected.keys() if found.get(user) != expected.get(user))
        raise Wrong(f"{how} shows {len(found)} users where {len(expected)} are expected; these differ: {users}")
