"""Every store of users' rows answers as a dictionary would, whatever the ids and the order of calls."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from learner.user_state import RowLayout
from state.codec import Progress
from state.exceptions import StoreLocked, StoreUnreadable
from state.memory_store import MemoryUserStore
from state.rocksdb import StoreMemory, open_for_writing
from state.store import RocksReader, RocksUserStore, UserStore
from tests.models import at, offset_of

LAYOUT = RowLayout("gradient", 2, 0, 0)
WIDTH = 72
PAYLOAD = 64
"""Where the bytes begin that no store sets: the header has version, owner and checksum"""
HOSTILE = [
    b"", b"u", b"m", b"v", b"n", b"progress", b"mprogress", b"layout", b"mlayout", b"uprogress", b"../x", b"/", b"\0",
    b"\0\0", b"a", b"a\0", b"a\0\0", b"\xff" * 9, "😀".encode(), "\u202eabc".encode(), "مستخدم".encode(), b"x" * 65_536,
]  # fmt: skip


def rows_of(*fills: int) -> np.ndarray:
    """One row per number, filled with it."""
    return np.repeat(np.array(fills, np.uint8)[:, None], WIDTH, axis=1)


def held(store: UserStore | RocksReader, after: bytes | None = None) -> list[tuple[bytes, bytes]]:
    return [(user, row[PAYLOAD:].tobytes()) for user, row in store.iterate(after)]


def histories_of(store: UserStore | RocksReader) -> list[tuple[bytes, bytes]]:
    with closing(store.history_cursor()) as cursor:
        entries = iter(cursor.next, None)
        first = cursor.seek(b"")
        return [] if first is None else [first, *entries]


@pytest.fixture(params=["memory", "rocks"])
def store(request, tmp_path):
    with MemoryUserStore(LAYOUT) if request.param == "memory" else RocksUserStore(tmp_path / "s", LAYOUT) as opened:
        yield opened


def test_no_id_is_special(store):
    fills = list(range(1, len(HOSTILE) + 1))
    store.write_batch(HOSTILE, rows_of(*fills), Progress(11, 4))
    rows, found = store.get_many(HOSTILE)
    assert found.all()
    np.testing.assert_array_equal(rows[:, PAYLOAD:], rows_of(*fills)[:, PAYLOAD:])
    assert held(store) == sorted((u, bytes([f]) * (WIDTH - PAYLOAD)) for u, f in zip(HOSTILE, fills, strict=True))
    assert at(store) == (11, 4)


def test_the_stores_own_entries_are_no_users(store):
    store.write_batch([b"a"], rows_of(1), Progress(11, 4))
    _, found = store.get_many([b"progress", b"layout", b"mprogress", b"mlayout", b"ua", b""])
    assert not found.any()
    assert held(store) == [(b"a", bytes([1]) * (WIDTH - PAYLOAD))]


def test_a_user_named_twice_in_a_batch_keeps_its_last_row(store):
    store.write_batch([b"a", b"b"] * 50, rows_of(*range(100)), Progress(0, 0))
    assert held(store) == [(b"a", bytes([98]) * (WIDTH - PAYLOAD)), (b"b", bytes([99]) * (WIDTH - PAYLOAD))]


def test_rows_that_are_not_contiguous_are_written_as_they_read(store):
    wide = np.zeros((4, 2 * WIDTH), np.uint8)
    wide[:, ::2] = rows_of(1, 2, 3, 4)
    store.write_batch([b"a", b"b"], wide[::2, ::2], Progress(0, 0))
    assert held(store) == [(b"a", bytes([1]) * (WIDTH - PAYLOAD)), (b"b", bytes([3]) * (WIDTH - PAYLOAD))]


def test_one_who_is_written_and_deleted_in_one_batch_is_deleted(store):
    store.write_batch([b"a", b"b"], rows_of(1, 2), None, deleted=[b"b", b"nobody"])
    assert held(store) == [(b"a", bytes([1]) * (WIDTH - PAYLOAD))]
    assert store.progress() is None


def test_a_batch_without_progress_leaves_it(store):
    progress = Progress(5, 6, 7, 8, 9, b"clock")
    store.write_batch([b"a"], rows_of(1), progress)
    store.write_batch([b"a"], rows_of(2), None)
    assert store.progress() == progress


def test_progress_that_cannot_be_packed_writes_nothing(store):
    with pytest.raises(struct.error):
        store.write_batch([b"a"], rows_of(1), Progress(2**63, 0))
    assert (held(store), store.progress()) == ([], None)


@pytest.mark.parametrize("after", HOSTILE)
def test_a_walk_goes_on_after_any_id(store, after):
    store.write_batch(HOSTILE, rows_of(*range(len(HOSTILE))), None)
    assert [user for user, _ in held(store, after)] == sorted(user for user in HOSTILE if user > after)


@pytest.mark.parametrize("shape", [(1, WIDTH - 8), (WIDTH,), (2, WIDTH), (0, WIDTH)])
def test_rows_of_another_shape_or_number_are_refused_and_nothing_is_written(store, shape):
    with pytest.raises(ValueError, match=r"1 users and rows of shape .* holds rows of 72 bytes"):
        store.write_batch([b"a"], np.zeros(shape, np.uint8), Progress(0, 0))
    assert (held(store), offset_of(store)) == ([], None)


def test_one_long_id_does_not_cost_its_length_for_every_user(store):
    users = [b"%d" % k for k in range(2_000)] + [b"x" * 65_536]
    rows = np.zeros((len(users), WIDTH), np.uint8)
    tracemalloc.start()
    store.write_batch(users, rows, Progress(0, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000  # 2,001 · 64 KiB would be 131 MB


def test_a_reopened_store_has_every_row_and_counts_its_users(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT) as store:
        store.write_batch(HOSTILE, rows_of(*range(len(HOSTILE))), Progress(41, 2))
        before = held(store)
    with RocksUserStore(tmp_path, LAYOUT) as store:
        assert held(store) == before
        assert (offset_of(store), at(store)[1], store.approximate_count()) == (41, 2, len(HOSTILE))


def test_damage_in_a_directory_called_blocks_is_not_taken_for_a_lock(tmp_path):
    path = tmp_path / "blocks"
    RocksUserStore(path, LAYOUT).close()
    (manifest,) = path.glob("MANIFEST-*")
    manifest.unlink()
    with pytest.raises(StoreUnreadable, match=r"blocks cannot be (opened|read)"):
        RocksUserStore(path, LAYOUT)


KEEP_OPEN = """
import sys, numpy as np
from pathlib import Path
from learner.user_state import RowLayout
from state.codec import Progress
from state.store import RocksUserStore
store = RocksUserStore(Path(sys.argv[1]), RowLayout("gradient", 2, 0, 0))
store.write_batch([b"a"], np.full((1, 72), 5, np.uint8), Progress(3, 1))
print("written", flush=True)
sys.stdin.read()
"""


def test_another_process_keeps_the_lock_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", KEEP_OPEN, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"written\n"
            with pytest.raises(StoreLocked, match=rf"{tmp_path} is open .*\(process {other.pid}: python") as refused:
                open_for_writing(tmp_path, StoreMemory(), lock_wait_s=0.2)
            assert "waited 0.2 s" in str(refused.value)
        finally:
            other.kill()
    with RocksUserStore(tmp_path, LAYOUT) as store:
        assert held(store) == [(b"a", bytes([5]) * (WIDTH - PAYLOAD))]
        assert at(store) == (3, 1)


USERS = st.one_of(st.binary(max_size=3), st.sampled_from(HOSTILE[:-1]))  # hypothesis warns of the longest one's repr
HISTORIES = st.binary(max_size=2).map(b"h".__add__)
INT64 = st.integers(-(2**63), 2**63 - 1)
PROGRESS = st.builds(Progress, INT64, st.integers(0, 2**64 - 1), INT64, INT64, INT64, st.binary(max_size=48))


class StoresAgainstADictionary(RuleBasedStateMachine):
    """Both stores take the same calls; a dictionary says what they must answer."""

    @initialize()
    def open(self) -> None:
        self.directory = TemporaryDirectory()
        self.path = Path(self.directory.name) / "store"
        self.stores: list[UserStore] = [MemoryUserStore(LAYOUT), RocksUserStore(self.path, LAYOUT)]
        self.expected: dict[bytes, int] = {}
        self.histories: dict[bytes, bytes] = {}
        self.progress: Progress | None = None
        self.walks: list[tuple[Iterator[tuple[bytes, np.ndarray]], list[tuple[bytes, bytes]]]] = []

    def teardown(self) -> None:
        for store in getattr(self, "stores", []):
            store.close()
        if hasattr(self, "directory"):
            self.directory.cleanup()

    def rows(self, after: bytes | None = None) -> list[tuple[bytes, bytes]]:
        chosen = sorted((u, fill) for u, fill in self.expected.items() if after is None or u > after)
        return [(user, bytes([fill]) * (WIDTH - PAYLOAD)) for user, fill in chosen]

    @rule(
        batch=st.dictionaries(USERS, st.integers(1, 255), max_size=5),
        deleted=st.lists(USERS, max_size=3),
        progress=st.none() | PROGRESS,
    )
    def put(self, batch: dict[bytes, int], deleted: list[bytes], progress: Progress | None) -> None:
        for store in self.stores:
            store.write_batch(list(batch), rows_of(*batch.values()), progress, deleted=deleted)
        self.expected = {u: fill for u, fill in (self.expected | batch).items() if u not in deleted}
        self.progress = progress or self.progress
        if batch or deleted:
            self.histories = {}

    @rule(
        batch=st.dictionaries(USERS, st.integers(1, 255), max_size=3),
        deleted=st.lists(USERS, max_size=2),
        histories=st.dictionaries(HISTORIES, st.none() | st.binary(max_size=3), max_size=5),
    )
    def put_with_histories(
        self, batch: dict[bytes, int], deleted: list[bytes], histories: dict[bytes, bytes | None]
    ) -> None:
        histories = {**histories, b"h": b"the book"}
        for store in self.stores:
            store.write_batch(list(batch), rows_of(*batch.values()), None, deleted=deleted, histories=histories)
        self.expected = {u: fill for u, fill in (self.expected | batch).items() if u not in deleted}
        self.histories = {k: v for k, v in (self.histories | histories).items() if v is not None}

    @rule(first=HISTORIES, histories=st.dictionaries(HISTORIES, st.binary(max_size=3), max_size=2))
    def cut_histories(self, first: bytes, histories: dict[bytes, bytes]) -> None:
        for store in self.stores:
            store.cut_histories(first, histories)
        self.histories = {k: v for k, v in self.histories.items() if k < first} | histories

    @rule(data=st.data())
    def delete_some_who_are_there(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.expected)))) if self.expected else set()
        self.put({}, sorted(chosen), None)

    @rule(users=st.lists(USERS, max_size=6))
    def get(self, users: list[bytes]) -> None:
        for store in self.stores:
            rows, found = store.get_many(users)
            assert found.tolist() == [user in self.expected for user in users]
            expected = rows_of(*(self.expected.get(user, 0) for user in users))
            np.testing.assert_array_equal(rows[:, PAYLOAD:], expected[:, PAYLOAD:])

    @rule(after=USERS)
    def walk_on_after_an_id(self, after: bytes) -> None:
        for store in self.stores:
            assert held(store, after) == self.rows(after)

    @rule()
    def begin_a_walk(self) -> None:
        for store in self.stores:
            self.walks.append((store.iterate(), self.rows()))

    @rule()
    def end_the_walks(self) -> None:
        for walk, expected in self.walks:
            assert [(user, row[PAYLOAD:].tobytes()) for user, row in walk] == expected
        self.walks = []

    @rule()
    def sync(self) -> None:
        for store in self.stores:
            store.sync()

    @rule()
    def read_beside_the_writer(self) -> None:
        with RocksReader(self.path) as reader:
            assert reader.layout == LAYOUT
            assert held(reader) == self.rows()
            assert reader.progress() == self.progress
            assert histories_of(reader) == sorted(self.histories.items())

    @rule()
    def reopen(self) -> None:
        self.end_the_walks()
        self.stores[1].close()
        self.stores[1] = RocksUserStore(self.path, LAYOUT)

    @rule()
    def die_and_reopen(self) -> None:
        """What a killed process leaves: the files as they are, without a close."""
        self.end_the_walks()
        left = self.path.with_name("left")
        shutil.copytree(self.path, left)
        self.stores[1].close()
        shutil.rmtree(self.path)
        left.rename(self.path)
        self.stores[1] = RocksUserStore(self.path, LAYOUT)

    @invariant()
    def every_row_and_the_progress_are_the_dictionarys(self) -> None:
        for store in getattr(self, "stores", []):
            assert held(store) == self.rows()
            assert store.progress() == self.progress
            assert histories_of(store) == sorted(self.histories.items())


TestStoresAgainstADictionary = StoresAgainstADictionary.TestCase
TestStoresAgainstADictionary.settings = settings(
    max_examples=max(30, settings.default.max_examples // 10), stateful_step_count=16
)
