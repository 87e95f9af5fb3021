"""Disks that are full or read-only: a clear error, nothing corrupt, and it goes on when the cause is gone."""

from __future__ import annotations

from collections import Counter

import pytest

from state.exceptions import StoreError, StoreUnreadable, StoreWriteFailed
from state.snapshots.snapshot import snapshot_of_open
from state.store import RocksReader
from state.syncing import SyncPolicy
from tests.faults.oracle import EVENTS, LARGE, TINY, check, finish, open_store, processor, stream

PAGE = 4096
PATIENCE = 2
"""How often a full disk is tried again before it is freed"""


@pytest.mark.parametrize(("memtables", "sync"), [(LARGE, "never"), (LARGE, "batch"), (TINY, "batch")])
def test_a_disk_that_fills_at_any_step_is_an_error_and_the_same_processor_goes_on(disk, memtables, sync, report, soak):
    """The disk is full after so many pages, at whichever step that is; then it is freed and the stream is fed again."""
    failed: Counter[str] = Counter()
    used = _pages_of_a_whole_run(disk, memtables)
    for pages in range(0, used, 1 if soak else max(used // 12, 1)):
        path = disk.path / f"store-{pages}"
        store = open_store(path, memtables, SyncPolicy(sync))
        with processor(store, 8) as work:
            work.process(0, stream().take(slice(0, 40)))
            disk.leave(pages * PAGE)
            for _ in range(PATIENCE):
                try:
                    work.process(0, stream())
                    break
                except StoreError as error:
                    failed[_told(error, path)] += 1
            disk.clear()
            work.process(0, stream())
            assert check(store) == EVENTS
        _check_reopened(path)
        for file in path.iterdir():
            file.unlink()
    assert failed["StoreWriteFailed"] > 3
    assert sum(failed.values()) > failed["StoreWriteFailed"]
    report(
        f"full disk ({'log only' if memtables == LARGE else 'a file per batch'}, sync {sync}): "
        f"{', '.join(f'{n} {name}' for name, n in sorted(failed.items()))}, all of them resumed to the bit"
    )


def _pages_of_a_whole_run(disk, memtables: int) -> int:
    path, before = disk.path / "whole", disk.free()
    store = open_store(path, memtables)
    with processor(store, 8) as work:
        work.process(0, stream())
        used = (before - disk.free()) // PAGE
    for file in path.iterdir():
        file.unlink()
    return used


def _told(error: StoreError, path) -> str:
    assert isinstance(error, (StoreWriteFailed, StoreUnreadable))
    assert str(path) in str(error)
    assert "free space on its disk, then go on" in str(error)
    assert "\n" not in str(error)
    return type(error).__name__


def _check_reopened(path) -> None:
    store = open_store(path)
    try:
        assert check(store) == EVENTS
    finally:
        store.close()


@pytest.mark.parametrize("memtables", [LARGE, TINY], ids=["log", "files"])
def test_a_processor_closed_on_a_full_disk_lets_go_and_loses_nothing_that_was_confirmed(disk, memtables):
    path = disk.path / "store"
    store = open_store(path, memtables)
    work = processor(store, 8)
    work.process(0, stream().take(slice(0, 100)))
    disk.leave(0)
    with pytest.raises(StoreWriteFailed):
        work.process(0, stream().take(slice(100, EVENTS)))
    work.close()
    disk.clear()
    store = open_store(path)
    done = check(store)
    assert 100 <= done < EVENTS
    finish(store, done)


def test_a_store_is_not_opened_for_writing_on_a_full_disk_but_read(disk):
    path = disk.path / "store"
    store = open_store(path)
    with processor(store, 8) as work:
        work.process(0, stream().take(slice(0, 200)))
    disk.leave(0)
    for _ in range(PATIENCE):
        with pytest.raises(StoreError) as refused:
            open_store(path)
        assert _told(refused.value, path) == "StoreUnreadable"
        with RocksReader(path) as reader:
            assert check(reader) == 200
    disk.clear()
    finish(open_store(path), 200)


def test_a_new_store_on_a_full_disk_is_an_error_and_can_be_made_later(disk):
    path = disk.path / "new" / "store"
    told: list[str] = []
    for pages in range(12):
        disk.leave(pages * PAGE)
        try:
            open_store(path).close()
            break
        except StoreError as error:
            told.append(_told(error, path))
    assert 2 < len(told) < 12
    disk.clear()
    finish(open_store(path), 0)


def test_a_checkpoint_or_a_snapshot_for_which_there_is_no_space_leaves_the_store_as_it_was(disk):
    path = disk.path / "partition-0"
    store = open_store(path)
    work = processor(store, 8)
    work.process(0, stream().take(slice(0, 200)))
    disk.leave(0)
    with pytest.raises(StoreWriteFailed, match="free space on its disk"):
        store.checkpoint(disk.path / "copy")
    with pytest.raises(StoreError) as refused:
        snapshot_of_open({0: store}, disk.path, str(disk.path / "snapshots" / "one"))
    assert "\n" not in str(refused.value)
    disk.clear()
    assert not (disk.path / "snapshots" / "one").exists()
    snapshot_of_open({0: store}, disk.path, str(disk.path / "snapshots" / "two"))
    finish(store, check(store))


def test_a_read_only_disk_is_an_error_for_a_writer_and_none_for_a_reader(disk):
    path = disk.path / "store"
    store = open_store(path)
    with processor(store, 8) as work:
        work.process(0, stream().take(slice(0, 200)))
    before = sorted((file.name, file.read_bytes()) for file in path.iterdir())
    disk.remount("ro")
    try:
        for place in (path, disk.path / "new"):
            with pytest.raises(StoreUnreadable, match=rf"{place} .*Read-only file system.*mount its disk for writing"):
                open_store(place)
        with RocksReader(path) as reader:
            assert check(reader) == 200
    finally:
        disk.remount("rw")
    assert sorted((file.name, file.read_bytes()) for file in path.iterdir()) == before
    finish(open_store(path), 200)
