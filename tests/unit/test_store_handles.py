"""What a store of rows holds on to: its lock, its files, the thread of its sync; and that it lets go of all of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rocksdict import Options, Rdict

from learner.user_state import RowLayout
from state.codec import Progress
from state.exceptions import RowDamaged, StoreLocked, StoreMismatch, StoreUnreadable
from state.keys import user_key
from state.rocksdb import StoreMemory, open_for_writing
from state.store import RocksReader, RocksUserStore
from state.syncing import SyncPolicy
from tests.models import offset_of

LAYOUT = RowLayout("gradient", 2, 0, 0)
ROOT = Path(__file__).parents[2]
OTHER = """
import sys, numpy as np
from pathlib import Path
from learner.user_state import RowLayout
from state.store import RocksUserStore
with RocksUserStore(Path(sys.argv[1]), RowLayout("gradient", 2, 0, 0)):
    print("open", flush=True)
    sys.stdin.read()
"""
"""Opens a store, says so, and closes it when its input ends"""


def write(store: RocksUserStore, offset: int, users: int = 3) -> None:
    names = [b"%d" % k for k in range(users)]
    store.write_batch(names, np.full((users, LAYOUT.row_bytes), offset % 256, np.uint8), Progress(offset, 0))


@contextmanager
def other_process(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the store open."""
    command = [sys.executable, "-c", OTHER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"open\n"
            yield other
        finally:
            other.kill()


def open_files(path: Path) -> list[str]:
    """What this process has open under a path."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # the listing's own
            continue
        if name.startswith(f"{path}/"):
            found.append(name)
    return found


# --- the lock -----------------------------------------------------------------------------------------------------


def test_a_store_that_another_process_lets_go_of_in_time_is_opened(tmp_path, monkeypatch):
    with other_process(tmp_path) as other:
        waits: list[float] = []

        def wait(seconds: float) -> None:
            waits.append(seconds)
            other.stdin.close()
            assert other.wait(timeout=30) == 0

        monkeypatch.setattr("state.rocksdb.time", SimpleNamespace(monotonic=time.monotonic, sleep=wait))
        RocksUserStore(tmp_path, LAYOUT).close()
        assert waits == [0.05]


def test_the_holder_of_a_lock_is_named_after_the_wait(tmp_path):
    with other_process(tmp_path) as other:
        began = time.monotonic()
        with pytest.raises(StoreLocked) as refused:
            open_for_writing(tmp_path, StoreMemory(), lock_wait_s=0.3)
        assert time.monotonic() - began >= 0.3
        command = f"{Path(sys.executable).name} -c import sys,"
        assert str(refused.value) == (
            f"the store {tmp_path} is open for writing in another process (process {other.pid}: {command}): "
            "stop that one first, or give another directory (waited 0.3 s)"
        )


def test_a_reader_does_not_wait_for_the_lock_and_takes_none(tmp_path):
    with other_process(tmp_path), RocksReader(tmp_path) as reader:
        assert reader.progress() is None
    with RocksReader(tmp_path), other_process(tmp_path):
        pass


def test_a_lock_of_this_process_is_told_at_once(tmp_path, monkeypatch):
    no_wait = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: pytest.fail("it waited"))
    monkeypatch.setattr("state.rocksdb.time", no_wait)
    with RocksUserStore(tmp_path, LAYOUT), pytest.raises(StoreLocked, match="is open already in this process"):
        RocksUserStore(tmp_path, LAYOUT)


# --- files --------------------------------------------------------------------------------------------------------


def use_plainly(path: Path) -> None:
    with RocksUserStore(path, LAYOUT) as store:
        write(store, 1)
        assert open_files(path)


def walk_to_the_end(path: Path) -> None:
    with RocksUserStore(path, LAYOUT) as store:
        write(store, 1)
        KEPT.append(store.iterate())
        assert len(list(KEPT[-1])) == 3


def leave_walks_unfinished(path: Path) -> None:
    with RocksUserStore(path, LAYOUT) as store, RocksReader(path) as reader:
        write(store, 1)
        KEPT.extend([store.iterate(), store.iterate(after=b"1"), reader.iterate()])
        next(KEPT[-3])


def take_a_checkpoint(path: Path) -> None:
    with RocksUserStore(path, LAYOUT) as store:
        write(store, 1)
        store.checkpoint(path.with_name("copy"))
    with RocksReader(path.with_name("copy")) as copy:
        assert copy.progress() == Progress(1, 0)


def fail_to_open(path: Path) -> None:
    use_plainly(path)
    with pytest.raises(StoreMismatch) as refused:
        RocksUserStore(path, RowLayout("full", 2, 0, 0))
    KEPT.append(refused.value)


def fail_to_read_the_layout(path: Path) -> None:
    Rdict(str(path), Options(raw_mode=True)).close()
    for _ in range(2):
        with pytest.raises(StoreUnreadable) as refused:
            RocksReader(path)
        KEPT.append(refused.value)


def read_a_damaged_row(path: Path) -> None:
    use_plainly(path)
    db = open_for_writing(path, StoreMemory())
    db[user_key(b"1")] = b"short"
    db.close()
    with RocksReader(path) as reader:
        for call in (lambda: reader.get_many([b"1"]), lambda: list(reader.iterate())):
            with pytest.raises(RowDamaged) as refused:
                call()
            KEPT.append(refused.value)


def fail_inside_the_context(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RocksUserStore(path, LAYOUT) as store:  # noqa: PT012
        write(store, 1)
        KEPT.append(store.iterate())
        raise ZeroDivisionError


def fail_to_write(path: Path) -> None:
    store = RocksUserStore(path, LAYOUT)
    store._failed = True
    write(store, 1)
    store._failed = True
    store.close()


KEPT: list[object] = []
"""Walks and errors that a caller may hold on to after the store is closed"""
USES = [
    use_plainly, walk_to_the_end, leave_walks_unfinished, take_a_checkpoint, fail_to_open, fail_to_read_the_layout,
    read_a_damaged_row, fail_inside_the_context, fail_to_write,
]  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_no_file_stays_open_after_a_store_is_closed(tmp_path, use: Callable[[Path], None]):
    KEPT.clear()
    threads = set(threading.enumerate())
    use(tmp_path / "store")
    assert open_files(tmp_path) == []
    assert set(threading.enumerate()) <= threads
    db = open_for_writing(tmp_path / "store", StoreMemory(), lock_wait_s=0)
    db.close()


def test_another_process_may_open_what_was_closed_after_all_kinds_of_use(tmp_path):
    for use in (walk_to_the_end, leave_walks_unfinished, fail_to_open, take_a_checkpoint):
        use(tmp_path / "store" if use is not take_a_checkpoint else tmp_path / "other")
    with other_process(tmp_path / "store"), pytest.raises(StoreLocked, match="in another process"):
        open_for_writing(tmp_path / "store", StoreMemory(), lock_wait_s=0)


# --- syncs --------------------------------------------------------------------------------------------------------


class Watched:
    """A database handle that notes which writes are synced and when the log is."""

    def __init__(self, store: RocksUserStore) -> None:
        assert store._db is not None
        self._db = store._db
        store._db = self
        self.synced_writes: list[bool] = []
        self.syncs: list[float] = []
        self.came = threading.Event()
        self.hold = threading.Event()
        self.hold.set()

    def write(self, batch: object, options: object) -> None:
        self.synced_writes.append(options.sync)
        self._db.write(batch, options)

    def flush_wal(self, sync: bool) -> None:
        assert sync
        self.syncs.append(time.monotonic())
        self.came.set()
        assert self.hold.wait(30)
        self._db.flush_wal(sync)

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)


def test_every_batch_is_synced_under_the_policy_batch(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT, sync=SyncPolicy("batch")) as store:
        watched = Watched(store)
        for offset in range(5):
            write(store, offset)
        assert (watched.synced_writes, watched.syncs) == ([True] * 5, [])
        assert store._sync._timer is None


def test_nothing_is_synced_under_the_policy_never_but_when_asked(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT, sync=SyncPolicy("never")) as store:
        watched = Watched(store)
        for offset in range(5):
            write(store, offset)
        assert (watched.synced_writes, watched.syncs) == ([False] * 5, [])
        assert store._sync._timer is None
        store.sync()
        assert len(watched.syncs) == 1


def test_one_sync_serves_all_batches_of_an_interval(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT, sync=SyncPolicy("interval", 700)) as store:
        store._sync.stop()
        watched = Watched(store)
        for round_ in (1, 2):
            watched.came.clear()
            before = time.monotonic()
            write(store, 0)
            assert store._sync._timer.interval == 0.7
            while time.monotonic() < before + 0.3:
                write(store, 1)
            assert watched.came.wait(30)
            assert len(watched.syncs) == round_
            assert watched.syncs[-1] - before >= 0.7
        assert not any(watched.synced_writes)


def test_without_batches_there_is_no_sync_and_no_thread(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT, sync=SyncPolicy("interval", 20)) as store:
        watched = Watched(store)
        write(store, 0)
        assert watched.came.wait(30)
        deadline = time.monotonic() + 30
        while any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
            assert time.monotonic() < deadline
        assert store._sync._timer is None
        store.get_many([b"0"])
        assert store._sync._timer is None


def test_closing_takes_the_timer_with_it(tmp_path):
    store = RocksUserStore(tmp_path, LAYOUT, sync=SyncPolicy("interval", 3_600_000))
    write(store, 0)
    timer = store._sync._timer
    assert timer.is_alive()
    store.close()
    assert not timer.is_alive()


def test_closing_waits_for_a_sync_that_is_under_way(tmp_path):
    store = RocksUserStore(tmp_path, LAYOUT, sync=SyncPolicy("interval", 1))
    store._sync.stop()
    watched = Watched(store)
    watched.hold.clear()
    write(store, 7)
    assert watched.came.wait(30)
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    watched.hold.set()
    closing.join(30)
    assert not closing.is_alive()
    assert store._failed is False
    with RocksUserStore(tmp_path, LAYOUT) as again:
        assert offset_of(again) == 7


def test_a_sync_that_fails_between_two_calls_opens_the_store_again_at_the_next(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT, sync=SyncPolicy("interval", 1)) as store:
        store._sync.stop()
        watched = Watched(store)
        watched._db.close()
        db = open_for_writing(tmp_path, StoreMemory())
        watched._db = db
        watched.flush_wal = lambda _: (watched.came.set(), 1 / 0)
        write(store, 1)
        assert watched.came.wait(30)
        store._sync.stop()
        assert store._failed
        assert offset_of(store) == 1
        assert store._db is not watched


def test_a_store_that_nobody_holds_any_more_is_not_kept_for_its_sync(tmp_path):
    store = RocksUserStore(tmp_path, LAYOUT, sync=SyncPolicy("interval", 3_600_000))
    write(store, 1)
    timer = store._sync._timer
    try:
        del store
        RocksUserStore(tmp_path, LAYOUT).close()
    finally:
        timer.cancel()
        timer.join()
