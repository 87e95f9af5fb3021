"""One contract for every store of users' rows, and what RocksDB adds to it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rocksdict import Options, Rdict

from learner.user_state import RowLayout
from state.codec import Progress
from state.exceptions import StoreClosed, StoreLocked, StoreMismatch, StoreUnreadable
from state.memory_store import MemoryUserStore
from state.rocksdb import StoreMemory
from state.store import RocksUserStore, UserStore
from tests.models import at, offset_of, sealed

LAYOUT = RowLayout("full", 3, 0, 2)
IDS = [b"zoe", b"adam", b"m", b"u", b"progress", b"layout", "ülker".encode(), b"x" * 300, b""]


def rows_for(ids: list[bytes], salt: int = 0) -> np.ndarray:
    rng = np.random.default_rng([salt, len(ids)])
    return sealed(LAYOUT, ids, rng.integers(0, 256, (len(ids), LAYOUT.row_bytes), dtype=np.uint8))


@pytest.fixture(params=["memory", "rocksdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UserStore]:
    with MemoryUserStore(LAYOUT) if request.param == "memory" else RocksUserStore(tmp_path / "s", LAYOUT) as opened:
        yield opened


# --- the contract -------------------------------------------------------------------------------------------------


def test_a_new_store_knows_nobody_and_no_offset(store):
    rows, found = store.get_many([b"a", b"b"])
    assert found.tolist() == [False, False]
    assert rows.shape == (2, LAYOUT.row_bytes)
    assert not rows.any()
    assert offset_of(store) is None
    assert at(store)[1] is None
    assert list(store.iterate()) == []
    assert store.approximate_count() == 0


def test_asking_for_nobody_gives_no_rows(store):
    rows, found = store.get_many([])
    assert rows.shape == (0, LAYOUT.row_bytes)
    assert found.shape == (0,)


def test_what_was_written_is_read_back_in_the_order_asked(store):
    written = rows_for(IDS)
    store.write_batch(IDS, written, Progress(41, 3))
    asked = [b"u", b"nobody", b"", b"zoe"]
    rows, found = store.get_many(asked)
    assert found.tolist() == [True, False, True, True]
    for row, user in zip(rows[found], (u for u in asked if u != b"nobody"), strict=True):
        np.testing.assert_array_equal(row, written[IDS.index(user)])
    assert not rows[1].any()
    assert at(store) == (41, 3)


def test_a_later_batch_replaces_rows_offset_and_version(store):
    store.write_batch([b"a", b"b"], rows_for([b"a", b"b"]), Progress(1, 0))
    later = rows_for([b"b"], salt=1)
    store.write_batch([b"b"], later, Progress(9, 2))
    np.testing.assert_array_equal(store.get_many([b"b"])[0], later)
    assert at(store) == (9, 2)


def test_a_batch_without_rows_moves_the_offset(store):
    store.write_batch([], np.zeros((0, LAYOUT.row_bytes), np.uint8), Progress(5, 0))
    assert offset_of(store) == 5


def test_rows_read_are_the_readers_own(store):
    written = rows_for([b"a"])
    store.write_batch([b"a"], written, Progress(0, 0))
    store.get_many([b"a"])[0][:] = 0
    np.testing.assert_array_equal(store.get_many([b"a"])[0], written)


def test_rows_written_may_be_reused_by_the_writer(store):
    written = rows_for([b"a"]).copy()
    kept = written.copy()
    store.write_batch([b"a"], written, Progress(0, 0))
    written[:] = 0
    np.testing.assert_array_equal(store.get_many([b"a"])[0], kept)


def test_a_walk_gives_every_user_once_in_order_of_ids(store):
    written = rows_for(IDS)
    store.write_batch(IDS, written, Progress(0, 0))
    walked = list(store.iterate())
    assert [user for user, _ in walked] == sorted(IDS)
    for user, row in walked:
        np.testing.assert_array_equal(row, written[IDS.index(user)])
    assert store.approximate_count() == len(IDS)


def test_a_walk_shows_the_rows_as_they_stood_when_it_began(store):
    store.write_batch([b"a", b"b"], rows_for([b"a", b"b"]), Progress(0, 0))
    walk = store.iterate()
    store.write_batch([b"b", b"c"], rows_for([b"b", b"c"], salt=1), Progress(1, 0))
    walked = dict(walk)
    assert sorted(walked) == [b"a", b"b"]
    np.testing.assert_array_equal(walked[b"b"], rows_for([b"a", b"b"])[1])


def test_rows_of_another_width_are_refused_and_nothing_is_written(store):
    wrong = np.zeros((1, LAYOUT.row_bytes + 8), np.uint8)
    with pytest.raises(ValueError, match=f"this store holds rows of {LAYOUT.row_bytes} bytes"):
        store.write_batch([b"a"], wrong, Progress(7, 0))
    assert offset_of(store) is None


def test_more_ids_than_rows_are_refused_and_nothing_is_written(store):
    with pytest.raises(ValueError, match="2 users and rows of shape"):
        store.write_batch([b"a", b"b"], rows_for([b"a"]), Progress(7, 0))
    assert offset_of(store) is None


USES: list[Callable[[UserStore], object]] = [
    lambda s: s.get_many([b"a"]), lambda s: s.progress(), lambda s: s.sync(), lambda s: s.iterate(),
    lambda s: s.approximate_count(), lambda s: s.write_batch([b"a"], rows_for([b"a"]), Progress(0, 0)),
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_a_closed_store_says_so(store, use):
    store.close()
    store.close()
    with pytest.raises(StoreClosed, match="is closed"):
        use(store)


def test_a_walk_ends_with_its_store(store):
    store.write_batch([b"a", b"b"], rows_for([b"a", b"b"]), Progress(0, 0))
    walk = store.iterate()
    next(walk)
    store.close()
    with pytest.raises(StoreClosed):
        next(walk)


# --- RocksDB ------------------------------------------------------------------------------------------------------


def test_rows_offset_and_version_outlive_the_process(tmp_path):
    program = (
        "import os, sys, numpy as np; from pathlib import Path\n"
        "from learner.user_state import RowLayout; from state.store import RocksUserStore\n"
        "from state.codec import Progress\n"
        "layout = RowLayout('full', 3, 0, 2); store = RocksUserStore(Path(sys.argv[1]), layout)\n"
        "rows = np.full((1, layout.row_bytes), 7, np.uint8)\n"
        "store.write_batch([b'a'], rows, Progress(12, 4)); os.kill(os.getpid(), 9)\n"
    )
    died = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert died.returncode == -9
    with RocksUserStore(tmp_path, LAYOUT) as store:
        rows, found = store.get_many([b"a"])
        assert found.tolist() == [True]
        assert (rows[0, 64:] == 7).all()
        assert at(store) == (12, 4)


def test_a_second_writer_is_refused_by_path(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT), pytest.raises(StoreLocked, match=re.escape(str(tmp_path))):
        RocksUserStore(tmp_path, LAYOUT)


def test_closing_during_a_walk_frees_the_directory(tmp_path):
    store = RocksUserStore(tmp_path, LAYOUT)
    store.write_batch([b"a", b"b"], rows_for([b"a", b"b"]), Progress(0, 0))
    walk = store.iterate()
    next(walk)
    store.close()
    RocksUserStore(tmp_path, LAYOUT).close()
    walk.close()


@pytest.mark.parametrize(
    "other", [RowLayout("full", 4, 0, 2), RowLayout("diagonal", 3, 0, 2), RowLayout("full", 3, 0, 4)]
)
def test_a_store_of_other_rows_is_refused_and_left_alone(tmp_path, other):
    with RocksUserStore(tmp_path, LAYOUT) as store:
        store.write_batch([b"a"], rows_for([b"a"]), Progress(3, 0))
    with pytest.raises(StoreMismatch) as refused:
        RocksUserStore(tmp_path, other)
    message = str(refused.value)
    assert str(tmp_path) in message
    assert LAYOUT.fingerprint in message
    assert other.fingerprint in message
    with RocksUserStore(tmp_path, LAYOUT) as store:
        assert offset_of(store) == 3


def test_a_path_that_cannot_be_a_directory_is_refused_by_name(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreUnreadable, match=re.escape(str(file))):
        RocksUserStore(file, LAYOUT)


def test_a_damaged_store_is_refused_by_path(tmp_path):
    RocksUserStore(tmp_path, LAYOUT).close()
    (tmp_path / "CURRENT").write_text("nonsense\n")
    with pytest.raises(StoreUnreadable, match=re.escape(str(tmp_path))):
        RocksUserStore(tmp_path, LAYOUT)


def test_stores_may_share_their_memory(tmp_path):
    memory = StoreMemory(cache_bytes=1 << 20, memtables_bytes=1 << 20)
    with RocksUserStore(tmp_path / "0", LAYOUT, memory) as zero, RocksUserStore(tmp_path / "1", LAYOUT, memory) as one:
        zero.write_batch([b"a"], rows_for([b"a"]), Progress(1, 0))
        one.write_batch([b"a"], rows_for([b"a"], salt=1), Progress(2, 0))
        assert (offset_of(zero), offset_of(one)) == (1, 2)
        assert (zero.get_many([b"a"])[0] != one.get_many([b"a"])[0]).any()


def test_ids_and_the_stores_own_keys_are_kept_apart_on_disk(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT) as store:
        store.write_batch([b"progress"], rows_for([b"progress"]), Progress(1, 0))
    plain = Rdict(str(tmp_path), Options(raw_mode=True))
    assert sorted(plain.keys()) == [b"mlayout", b"mprogress", b"uprogress"]
    plain.close()
