"""Rows as records of a compacted log, and stores restored from them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import restore as benchmark
from learner.user_state import RowLayout
from state.changelog import Record, Restored, committed, restore, tombstone
from state.codec import UNKNOWN, Progress, encode
from state.exceptions import ChangelogError, RowDamaged, StoreUnfinished
from state.keys import LAYOUT_KEY, OWNER_KEY, PROGRESS_KEY, user_key
from state.memory_store import MemoryUserStore
from state.outbox_codec import SESSION_BYTES, Owner
from state.store import RocksUserStore

LAYOUT = RowLayout("gradient", 2, 0, 0)
DAY = 86_400_000
NOW = 100 * DAY


def rows_of(*fields: tuple[int, int]) -> np.ndarray:
    """One row per (events, last offset); the ledger tells them apart."""
    slab = np.zeros((len(fields), LAYOUT.row_bytes), np.uint8)
    rows = LAYOUT.rows(slab)
    for row, (events, offset) in zip(rows, fields, strict=True):
        row["events"], row["last_offset"], row["ledger"] = events, offset, 1000 * events + offset
    return slab


def batch(users: dict[bytes, tuple[int, int]], progress: Progress | None = None, deleted=()) -> list[Record]:
    return list(committed(LAYOUT, list(users), rows_of(*users.values()), progress, deleted=deleted))


def marker(offset: int, users: int, events: int, written_at_ms: int = NOW) -> Progress:
    return Progress(offset, 3, users, events, written_at_ms)


def held(store) -> dict[bytes, tuple[int, int]]:
    return {u: tuple(LAYOUT.rows(row[None])[["events", "last_offset"]][0].tolist()) for u, row in store.iterate()}


def run(store, records, **options) -> Restored:
    return restore(store, records, tombstone_retention_ms=DAY, now_ms=NOW, **options)


@pytest.fixture(params=["memory", "rocks"])
def store(request, tmp_path):
    with MemoryUserStore(LAYOUT) if request.param == "memory" else RocksUserStore(tmp_path / "s", LAYOUT) as opened:
        yield opened


def test_a_batch_becomes_rows_then_tombstones_then_the_layout_and_the_marker():
    progress = marker(9, 1, 2)
    assert batch({b"a": (2, 9), b"mprogress": (1, 8)}, progress, deleted=[b"gone"]) == [
        Record(b"ua", encode(LAYOUT, [b"a"], rows_of((2, 9)))[0]),
        Record(b"umprogress", encode(LAYOUT, [b"mprogress"], rows_of((1, 8)))[0]),
        Record(b"ugone", None),
        Record(LAYOUT_KEY, LAYOUT.fingerprint.encode()),
        Record(PROGRESS_KEY, progress.encode()),
    ]
    assert batch({}, None, deleted=[b"a"]) == [tombstone(b"a")] == [Record(user_key(b"a"), None)]


def test_an_empty_store_is_filled_with_what_the_log_holds(store):
    log = batch({b"a": (1, 0), b"b": (1, 1)}, marker(1, 2, 2)) + batch({b"a": (2, 2), b"": (1, 3)}, marker(3, 3, 4))
    seen = []
    done = run(store, iter(log), on_progress=seen.append, chunk_records=3)
    assert held(store) == {b"": (1, 3), b"a": (2, 2), b"b": (1, 1)}
    assert store.progress() == done.progress == marker(3, 3, 4)
    assert (done.records, done.deleted, done.rebuilt) == (8, 0, False)
    assert [each.records for each in seen] == [3, 6, 8]
    assert not store.restoring()


def test_restoring_twice_changes_nothing(store):
    log = batch({b"a": (1, 0), b"b": (1, 1)}, marker(1, 2, 2)) + batch({}, marker(1, 1, 1), [b"b"])
    run(store, log)
    before = held(store), store.progress()
    again = run(store, log)
    assert (held(store), store.progress()) == before == ({b"a": (1, 0)}, marker(1, 1, 1))
    assert (again.written, again.kept, again.deleted) == (0, 1, 0)


def test_rows_that_the_store_has_or_has_newer_ones_of_are_skipped(store):
    store.write_batch([b"same", b"newer", b"older"], rows_of((3, 5), (4, 9), (1, 2)), marker(9, 3, 8))
    done = run(store, batch({b"same": (3, 5), b"newer": (3, 6), b"older": (2, 7)}, marker(7, 3, 8, NOW - 9)))
    assert held(store) == {b"same": (3, 5), b"newer": (4, 9), b"older": (2, 7)}
    assert (done.written, done.kept) == (1, 2)
    assert store.progress() == marker(9, 3, 9)


@pytest.mark.parametrize("chunk_records", [1, 2, 3, 100])
def test_a_tombstone_deletes_and_a_later_row_brings_the_user_back(store, chunk_records):
    store.write_batch([b"a", b"b"], rows_of((50, 10), (1, 2)), marker(10, 2, 51))
    log = [*batch({b"a": (50, 10)}), tombstone(b"a"), tombstone(b"b"), *batch({b"a": (1, 20)}, marker(20, 1, 1))]
    run(store, log, chunk_records=chunk_records)
    assert held(store) == {b"a": (1, 20)}
    assert store.progress() == marker(20, 1, 1)


@pytest.mark.parametrize("chunk_records", [1, 2, 100])
def test_what_a_restarted_producer_sends_again_does_not_set_a_user_back(store, chunk_records):
    log = batch({b"a": (5, 50)}, marker(50, 1, 5)) + batch({b"a": (3, 30)}, marker(30, 1, 3))
    run(store, log, chunk_records=chunk_records)
    assert held(store) == {b"a": (5, 50)}
    assert store.progress() == marker(30, 1, 5)  # the stream comes again from 30, and the row skips what it has


def test_rows_behind_the_last_marker_are_kept_and_counted(store):
    run(store, batch({b"a": (1, 0)}, marker(0, 1, 1)) + batch({b"a": (3, 5), b"b": (1, 6)}))
    assert held(store) == {b"a": (3, 5), b"b": (1, 6)}
    assert store.progress() == marker(0, 2, 4)


def test_a_log_without_a_marker_begins_before_the_first_offset(store):
    run(store, batch({b"a": (3, 5)}))
    assert held(store) == {b"a": (3, 5)}
    assert store.progress() == Progress(-1, 0, 1, 3, NOW)


def test_a_row_of_a_later_meta_version_replaces_one_of_the_same_events(store):
    rows = rows_of((3, 5))
    store.write_batch([b"a"], rows, marker(5, 1, 3))
    LAYOUT.rows(rows)["meta_version"] = 7
    later = list(committed(LAYOUT, [b"a"], rows, None))
    assert run(store, later).written == 1
    assert run(store, batch({b"a": (3, 5)})).kept == 1
    assert LAYOUT.rows(store.get_many([b"a"])[0])["meta_version"] == [7]


def test_counts_that_were_unknown_stay_unknown_until_the_store_is_rebuilt(store):
    store.write_batch([b"a"], rows_of((3, 5)), Progress(5, 3, written_at_ms=NOW - 5))
    run(store, batch({b"b": (1, 6)}, marker(6, 2, 4)))
    assert store.progress() == marker(6, UNKNOWN, UNKNOWN)


def test_a_user_erased_while_the_store_was_away_does_not_come_back(store):
    store.write_batch([b"erased", b"a"], rows_of((9, 5), (1, 4)), marker(5, 2, 10, NOW - DAY))
    compacted = batch({b"a": (1, 4), b"c": (2, 8)}, marker(8, 2, 3))  # the tombstone's retention is over
    done = run(store, compacted)
    assert done.rebuilt
    assert held(store) == {b"a": (1, 4), b"c": (2, 8)}
    assert store.progress() == marker(8, 2, 3)


def test_a_store_within_the_retention_is_not_rebuilt(store):
    store.write_batch([b"erased", b"a"], rows_of((9, 5), (1, 4)), marker(5, 2, 10, NOW - DAY + 1))
    done = run(store, [tombstone(b"erased"), *batch({b"a": (1, 4)}, marker(5, 1, 1))])
    assert (done.rebuilt, done.kept, done.deleted) == (False, 1, 1)
    assert held(store) == {b"a": (1, 4)}


def test_a_store_of_unknown_age_is_rebuilt(store):
    store.write_batch([b"erased"], rows_of((9, 5)), Progress(5, 3))
    assert run(store, batch({b"a": (1, 4)}, marker(4, 1, 1))).rebuilt
    assert held(store) == {b"a": (1, 4)}


def test_rows_without_any_progress_are_not_trusted(store):
    store.write_batch([b"nobody"], rows_of((9, 5)), None)
    run(store, batch({b"a": (1, 4)}, marker(4, 1, 1)))
    assert held(store) == {b"a": (1, 4)}


def test_an_empty_log_leaves_a_new_store_new_and_a_current_one_as_it_is(store):
    assert run(store, []) == Restored()
    assert store.progress() is None
    store.write_batch([b"a"], rows_of((1, 4)), marker(4, 1, 1))
    assert run(store, []) == Restored(progress=marker(4, 1, 1))


def test_an_empty_log_does_not_empty_an_old_store(store):
    store.write_batch([b"a"], rows_of((1, 4)), marker(4, 1, 1, NOW - DAY))
    with pytest.raises(ChangelogError, match="holds no record, but the store has rows that are too old"):
        run(store, [])
    assert held(store) == {b"a": (1, 4)}


def damaged(record: Record, place: int) -> Record:
    value = bytearray(record.value)
    value[place] ^= 1
    return Record(record.key, bytes(value))


GOOD = batch({b"a": (1, 0), b"b": (1, 1)}, marker(1, 2, 2))
OTHER_LAYOUT = RowLayout("diagonal", 1, 0, 0)
assert OTHER_LAYOUT.row_bytes == LAYOUT.row_bytes


@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        (damaged(GOOD[0], 30), RowDamaged, "record 3 of the changelog: the row of user 'a' fails its checksum"),
        (Record(b"ub", GOOD[0].value), RowDamaged, "record 3 of the changelog: the row of user 'b' is another"),
        (Record(b"ua", b"short"), RowDamaged, "record 3 of the changelog: the row of user 'a' has 5 bytes where"),
        (Record(b"mother", b""), ChangelogError, "record 3 of the changelog, key 'mother', .* nobody knows this key"),
        (Record(b"", b""), ChangelogError, "record 3 of the changelog, key '', .* nobody knows this key"),
        (damaged(GOOD[3], 9), ChangelogError, "record 3 of .*, key 'mprogress', .* fails its checksum"),
        (
            Record(PROGRESS_KEY, None),
            ChangelogError,
            "record 3 .*, key 'mprogress', .* no tombstone may stand",
        ),
        (Record(OWNER_KEY, None), ChangelogError, "record 3 .*, key 'mowner', .* no tombstone may stand"),
        (Record(OWNER_KEY, b"me"), ChangelogError, "record 3 .*, key 'mowner', .* the owner has 2 bytes"),
        (
            Record(LAYOUT_KEY, OTHER_LAYOUT.fingerprint.encode()),
            ChangelogError,
            "record 3 .* head=diagonal .* this",
        ),
    ],
)
@pytest.mark.parametrize("chunk_records", [1, 2, 100])
def test_a_record_that_cannot_be_used_is_named_and_the_store_is_not_taken_for_restored(
    store, bad, error, said, chunk_records
):
    log = [*GOOD[:2], bad, *GOOD[2:], *GOOD[:2]]
    with pytest.raises(error, match=said):
        run(store, log, chunk_records=chunk_records)
    assert store.restoring()
    assert store.progress() is None
    run(store, GOOD)
    assert held(store) == {b"a": (1, 0), b"b": (1, 1)}


def test_who_wrote_a_marker_changes_nothing_of_what_is_restored(store):
    owner = Record(OWNER_KEY, Owner(bytes(SESSION_BYTES), 3).encode())
    done = run(store, [*GOOD[:3], owner, *GOOD[3:]])
    assert (done.records, done.progress.offset) == (5, Progress.decode(GOOD[3].value).offset)
    assert held(store) == {b"a": (1, 0), b"b": (1, 1)}


class Cut(Exception):
    pass


def cut_after(records: list[Record], count: int):
    yield from records[:count]
    raise Cut


LONG = [
    *batch({b"a": (50, 10), b"c": (4, 12)}, marker(12, 3, 55)), tombstone(b"a"), tombstone(b"b"),
    *batch({}, marker(12, 1, 4)), *batch({b"a": (1, 20), b"d": (2, 22)}, marker(22, 3, 7)), *batch({b"d": (3, 30)}),
]  # fmt: skip
"""To a store that has a and b and is at offset 100: a was erased and came back, b was erased"""


@pytest.mark.parametrize("count", range(len(LONG) + 1))
@pytest.mark.parametrize("old", [True, False])
def test_a_restore_interrupted_after_any_record_is_refused_until_one_has_ended(tmp_path, count, old):
    path = tmp_path / "s"
    with RocksUserStore(path, LAYOUT) as store:
        if old:
            store.write_batch([b"a", b"b"], rows_of((51, 11), (1, 2)), marker(100, 2, 52, NOW - 10))
        with pytest.raises(Cut):
            run(store, cut_after(LONG, count), chunk_records=1)
    if count:
        with pytest.raises(StoreUnfinished, match=r"was interrupted, so users may be missing: restore it again"):
            RocksUserStore(path, LAYOUT)
    with RocksUserStore(path, LAYOUT, to_restore=True) as store:
        assert (store.progress() is not None) == old
        run(store, LONG, chunk_records=2)
    with RocksUserStore(path, LAYOUT) as store:
        assert held(store) == {b"a": (1, 20), b"c": (4, 12), b"d": (3, 30)}
        expected = marker(100, 3, 8) if old else marker(22, 3, 8)
        assert store.progress() == expected


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests.unit.test_changelog import *
def records():
    for k in range(3000):
        yield from batch({b"user-%d" % k: (1, k)}, marker(k, k + 1, k + 1))
        if k == 2500:
            os.kill(os.getpid(), signal.SIGKILL)
with RocksUserStore(Path(sys.argv[2]), LAYOUT) as store:
    run(store, records(), chunk_records=64)
"""


def test_a_killed_restore_of_an_empty_store_begins_anew(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    program = "from pathlib import Path\n" + CHILD
    ended = subprocess.run([sys.executable, "-c", program, root, str(tmp_path / "s")], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(StoreUnfinished):
        RocksUserStore(tmp_path / "s", LAYOUT)
    with RocksUserStore(tmp_path / "s", LAYOUT, to_restore=True) as store:
        run(store, batch({b"a": (1, 4)}, marker(4, 1, 1)))
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        assert held(store) == {b"a": (1, 4)}


def test_what_is_written_while_an_emptied_store_is_restored_is_durable_at_its_end(tmp_path):
    program = (
        "from pathlib import Path\n"
        + CHILD.replace("if k == 2500:", "if False:")
        + ("    os.kill(os.getpid(), signal.SIGKILL)\n")
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    ended = subprocess.run([sys.executable, "-c", program, root, str(tmp_path / "s")], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        assert held(store) == {b"user-%d" % k: (1, k) for k in range(3000)}
        assert store.progress() == marker(2999, 3000, 3000)


def test_emptying_a_store_leaves_nothing_of_its_users_on_the_disk(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        store.write_batch([b"a-very-distinct-name"], rows_of((1, 4)), marker(4, 1, 1, NOW - DAY))
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        run(store, batch({b"b": (1, 4)}, marker(4, 1, 1)))
    files = [path for path in (tmp_path / "s").iterdir() if path.suffix in (".sst", ".log")]
    assert files
    assert not [path for path in files if b"a-very-distinct-name" in path.read_bytes()]


def test_a_restore_is_begun_and_ended_in_one_step_each(store):
    store.write_batch([b"a"], rows_of((1, 4)), marker(4, 1, 1))
    store.begin_restore(empty=False)
    assert store.restoring()
    assert (held(store), store.progress()) == ({b"a": (1, 4)}, marker(4, 1, 1))
    store.begin_restore(empty=True)
    assert store.restoring()
    assert (held(store), store.progress()) == ({}, None)
    assert store.approximate_count() == 0
    store.end_restore(marker(5, 0, 0))
    assert not store.restoring()
    assert store.progress() == replace(marker(5, 0, 0))


def test_more_users_than_are_remembered_end_in_the_same_store(store, monkeypatch):
    monkeypatch.setattr("state.changelog.KNOWN_USERS", 3)
    users = {b"user-%d" % k: (1, k) for k in range(9)}
    run(store, [*batch(users), *batch({b"user-2": (2, 20)}, marker(20, 9, 10))], chunk_records=2)
    assert held(store) == {**users, b"user-2": (2, 20)}
    assert store.progress() == marker(20, 9, 10)


@pytest.mark.parametrize("case", benchmark.CASES)
def test_the_benchmark_restores_every_user(case):
    runs = benchmark.restored(case, 300)
    assert {users for users, _, _ in runs} == {300}
