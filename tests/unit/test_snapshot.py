"""Snapshots: taken at one point in time, verified in every byte, swapped whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from learner.user_state import RowLayout
from state.codec import Progress
from state.exceptions import SnapshotError, StoreLocked
from state.snapshots.copying import checkpoint_idle, copy_beside_writer
from state.snapshots.manifest import MANIFEST, SnapshotProgress, decode_manifest, encode_manifest
from state.snapshots.snapshot import list_snapshots, read_snapshot, restore, rewrite, snapshot, snapshot_of_open
from state.store import RocksReader, RocksUserStore

LAYOUT = RowLayout("gradient", 2, 0, 0)
OTHER = RowLayout("full", 2, 0, 4)
ROOT = Path(__file__).parents[2]


def rows_of(*events: int) -> np.ndarray:
    slab = np.zeros((len(events), LAYOUT.row_bytes), np.uint8)
    LAYOUT.rows(slab)["events"] = events
    return slab


def fill(path: Path, users: dict[bytes, int], offset: int = 9) -> None:
    with RocksUserStore(path, LAYOUT) as store:
        progress = Progress(offset, 4, len(users), sum(users.values()), 1_000, b"clock")
        store.write_batch(list(users), rows_of(*users.values()), progress)


def held(path: Path) -> tuple[dict[bytes, int], Progress | None]:
    with RocksReader(path) as store:
        return {u: int(LAYOUT.rows(row[None])["events"][0]) for u, row in store.iterate()}, store.progress()


FIRST, SECOND = {b"ann": 3, b"\xff/../x": 1}, {b"bob": 5}


@pytest.fixture
def state(tmp_path):
    fill(tmp_path / "state" / "partition-0", FIRST)
    fill(tmp_path / "state" / "partition-12", SECOND, offset=4)
    (tmp_path / "state" / "model.safetensors").write_bytes(b"model")
    (tmp_path / "state" / "notes.txt").write_text("mine")
    return tmp_path / "state"


@pytest.fixture(params=["path", "file", "memory"])
def url(request, tmp_path):
    """Where a snapshot goes: both kinds of places."""
    if request.param == "memory":
        yield f"memory://{tmp_path}/snaps/one"
        fsspec.filesystem("memory").rm("/", recursive=True)
    else:
        yield f"{'file://' if request.param == 'file' else ''}{tmp_path}/snaps/one"


def test_what_is_restored_is_what_was_there(state, url, tmp_path):
    taken = snapshot(state, url)
    back = tmp_path / "back"
    assert restore(url, back) == taken == read_snapshot(url)
    assert held(back / "partition-0") == (FIRST, Progress(9, 4, 2, 4, 1_000, b"clock"))
    assert held(back / "partition-12") == (SECOND, Progress(4, 4, 1, 5, 1_000, b"clock"))
    assert sorted(path.name for path in back.iterdir()) == ["model.safetensors", "partition-0", "partition-12"]
    assert (back / "model.safetensors").read_bytes() == b"model"
    with RocksUserStore(back / "partition-0", LAYOUT) as store:  # and it can be written to
        store.write_batch([b"new"], rows_of(1), Progress(10, 4, 3, 5, 2_000))


def test_the_manifest_says_what_is_in_the_snapshot(state, url):
    taken = snapshot(state, url)
    assert [part.partition for part in taken.partitions] == [0, 12]
    assert taken.partition(0).layout == LAYOUT.fingerprint
    assert taken.partition(0).progress == SnapshotProgress(9, 4, 2, 4, 1_000)
    assert [(file.name, file.bytes) for file in taken.files] == [("model.safetensors", 5)]
    assert abs(taken.created_ms - time.time() * 1000) < 600_000
    with pytest.raises(SnapshotError, match="has no partition 3: it holds 0, 12"):
        taken.partition(3)


def test_nothing_is_left_in_the_state_directory_or_beside_the_snapshot(state, tmp_path):
    before = sorted(path.name for path in state.iterdir())
    snapshot(state, str(tmp_path / "snaps" / "one"))
    assert sorted(path.name for path in state.iterdir()) == before
    assert os.listdir(tmp_path / "snaps") == ["one"]


def test_a_snapshot_shares_no_bytes_with_the_store(state, tmp_path):
    snapshot(state, str(tmp_path / "one"))
    assert {path.stat().st_nlink for path in (tmp_path / "one").rglob("*") if path.is_file()} == {1}


def test_some_partitions_alone(state, url, tmp_path):
    assert [part.partition for part in snapshot(state, url, partitions=[12]).partitions] == [12]
    restore(url, tmp_path / "back", partitions=[12])
    assert held(tmp_path / "back" / "partition-12")[0] == SECOND
    with pytest.raises(SnapshotError, match="has no partition 0: it holds 12"):
        restore(url, tmp_path / "back", partitions=[0])


def test_a_place_that_is_taken_is_refused(state, url):
    snapshot(state, url)
    with pytest.raises(SnapshotError, match="one exists already: give another place, or remove it first"):
        snapshot(state, url)
    assert restore(url, state.parent / "back")


def test_open_stores_are_frozen_where_they_stand(state, tmp_path):
    with RocksUserStore(state / "partition-0", LAYOUT) as store:
        store.write_batch([b"more"], rows_of(7), Progress(20, 4, 3, 11, 3_000))
        snapshot_of_open({0: store}, state, str(tmp_path / "one"))
        store.write_batch([b"later"], rows_of(1), Progress(21, 4, 4, 12, 3_000))
    assert held(tmp_path / "one" / "partition-0") == ({**FIRST, b"more": 7}, Progress(20, 4, 3, 11, 3_000))
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == b"model"


def test_a_store_held_by_this_or_another_process_is_copied_beside_it(state, tmp_path):
    with RocksUserStore(state / "partition-0", LAYOUT) as store:
        store.write_batch([b"more"], rows_of(7), Progress(20, 4, 3, 11, 3_000))
        with pytest.raises(StoreLocked):
            checkpoint_idle(state / "partition-0", tmp_path / "never")
        taken = snapshot(state, str(tmp_path / "one"))
        store.write_batch([b"later"], rows_of(1), Progress(21, 4, 4, 12, 3_000))
    assert taken.partition(0).progress == SnapshotProgress(20, 4, 3, 11, 3_000)
    restore(str(tmp_path / "one"), tmp_path / "back")
    assert held(tmp_path / "back" / "partition-0") == ({**FIRST, b"more": 7}, Progress(20, 4, 3, 11, 3_000))


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from learner.user_state import RowLayout
from state.codec import Progress
from state.rocksdb import StoreMemory
from state.store import RocksUserStore
layout, users = RowLayout("full", 16, 0, 32), 3000
rng = np.random.default_rng(0)
names = [b"user-%05d" % k for k in range(users)]
rows = np.zeros((users, layout.row_bytes), np.uint8)
fields = layout.rows(rows)
fields["last_offset"] = -1
with RocksUserStore(Path(sys.argv[2]), layout, StoreMemory(1 << 20, 1 << 20)) as store:
    for commit in range(1_000_000):
        chosen = rng.choice(users, 200, replace=False)
        fields["events"][chosen] += 1
        fields["last_offset"][chosen] = commit
        fields["ledger"][chosen] = fields["events"][chosen] * 1_000_003
        seen = fields["events"] > 0
        progress = Progress(commit, 0, int(seen.sum()), int(fields["events"].sum()), 1)
        store.write_batch([names[k] for k in chosen], rows[chosen], progress)
        if commit == 50:
            print("ready", flush=True)
"""
"""Commits 200 rows at a time as fast as it can; its memory is so small that RocksDB moves files all the while"""


def test_a_snapshot_beside_a_busy_writer_is_one_point_in_time(tmp_path):
    store = tmp_path / "state" / "partition-0"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(ROOT), str(store)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"ready\n"
        offsets = []
        for number in range(4):
            snapshot(tmp_path / "state", str(tmp_path / f"{number}"))
            with RocksReader(tmp_path / f"{number}" / "partition-0") as copy:
                progress = copy.progress()
                rows = copy.layout.rows(np.stack([row for _, row in copy.iterate()]))
            assert (len(rows), int(rows["events"].sum())) == (progress.users, progress.events)
            assert rows["last_offset"].max() == progress.offset
            np.testing.assert_array_equal(rows["ledger"], rows["events"] * np.uint64(1_000_003))
            offsets.append(progress.offset)
        assert writer.poll() is None
        assert offsets[0] >= 50
        assert sorted(set(offsets)) == offsets
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


def test_a_view_catches_up_again_when_the_writer_moved_its_files_meanwhile(state, tmp_path, monkeypatch):
    states = iter([("MANIFEST-000005", 1), ("MANIFEST-000005", 2), ("MANIFEST-000005", 2), ("MANIFEST-000005", 2)])
    monkeypatch.setattr("state.snapshots.copying.manifest_state", lambda store: next(states))
    copy_beside_writer(state / "partition-0", tmp_path / "copy")
    assert next(states, None) is None
    assert held(tmp_path / "copy")[0] == FIRST


def test_what_killed_runs_left_is_removed_and_what_a_living_one_holds_is_not(state, tmp_path):
    target = tmp_path / "snaps" / "one"
    dead = tmp_path / "snaps" / "one.partial-dead"
    other = tmp_path / "snaps" / "one.more.partial-x"
    for path in (dead, other, state / ".snapshot.partial-dead"):
        path.mkdir(parents=True)
        (path / "file").write_text("left")
    program = (
        "import fcntl, os, sys\nlock = os.open(sys.argv[1], os.O_RDONLY)\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    alive = tmp_path / "snaps" / "one.partial-alive"
    alive.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(alive)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        snapshot(state, str(target))
        assert sorted(os.listdir(tmp_path / "snaps")) == ["one", "one.more.partial-x", "one.partial-alive"]
        holder.stdin.close()
    assert not (state / ".snapshot.partial-dead").exists()
    restore(str(target), tmp_path / "back")


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_what_a_killed_upload_left_gives_way_and_other_files_do_not(state, url):
    fs, path = fsspec.core.url_to_fs(url)
    with fs.open(f"{path}/partition-0/000009.sst", "wb") as left:
        left.write(b"half")
    with pytest.raises(SnapshotError, match=r"is no snapshot: it has no snapshot.json, which is written last"):
        read_snapshot(url)
    snapshot(state, url)
    assert restore(url, state.parent / "back")
    with fs.open(f"{path}2/letter.txt", "wb") as mine:
        mine.write(b"mine")
    with pytest.raises(SnapshotError, match="one2 exists already"):
        snapshot(state, f"{url}2")
    assert fs.cat(f"{path}2/letter.txt") == b"mine"


def test_a_state_directory_without_partitions_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(SnapshotError, match="state holds no partition: name the state directory of a run"):
        snapshot(tmp_path / "state", str(tmp_path / "one"))
    with pytest.raises(SnapshotError, match="nowhere is no directory"):
        snapshot(tmp_path / "nowhere", str(tmp_path / "one"), partitions=[0])
    assert os.listdir(tmp_path) == ["state"]


def test_a_partition_that_is_not_there_is_refused_and_not_made(state, tmp_path):
    with pytest.raises(SnapshotError, match="partition-5 holds no store"):
        snapshot(state, str(tmp_path / "one"), partitions=[0, 5])
    assert not (state / "partition-5").exists()
    assert not (tmp_path / "one").exists()


def test_a_store_whose_rows_and_progress_disagree_is_not_kept(tmp_path):
    with RocksUserStore(tmp_path / "state" / "partition-0", LAYOUT) as store:
        store.write_batch([b"a"], rows_of(3), Progress(9, 4, 2, 3, 1_000))
    with pytest.raises(SnapshotError, match="holds 1 users and 3 events, its progress says 2 users and 3 events"):
        snapshot(tmp_path / "state", str(tmp_path / "one"))
    assert sorted(os.listdir(tmp_path)) == ["state"]


def test_a_store_in_the_middle_of_a_restore_is_not_kept(tmp_path):
    with RocksUserStore(tmp_path / "state" / "partition-0", LAYOUT) as store:
        store.begin_restore(empty=False)
    with pytest.raises(SnapshotError, match="was interrupted: end it first"):
        snapshot(tmp_path / "state", str(tmp_path / "one"))


def test_a_store_that_is_new_or_knows_no_counts_is_kept(tmp_path):
    RocksUserStore(tmp_path / "state" / "partition-0", LAYOUT).close()
    with RocksUserStore(tmp_path / "state" / "partition-1", LAYOUT) as store:
        store.write_batch([b"a"], rows_of(3), Progress(9, 4))
    taken = snapshot(tmp_path / "state", str(tmp_path / "one"))
    assert [part.progress for part in taken.partitions] == [None, SnapshotProgress(9, 4, -1, -1, 0)]
    restore(str(tmp_path / "one"), tmp_path / "back")
    assert held(tmp_path / "back" / "partition-0") == ({}, None)


def edited(path: Path, change) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document, indent=1) + "\n")


def some_table(snap: Path) -> Path:
    return next(path for path in sorted((snap / "partition-0").iterdir()) if path.suffix == ".sst")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "no manifest": (lambda s: (s / MANIFEST).unlink(), "is no snapshot: it has no snapshot.json"),
    "no JSON": (lambda s: (s / MANIFEST).write_bytes(b"{"), "is no snapshot's manifest: .*truncated"),
    "edited": (lambda s: edited(s / MANIFEST, lambda d: d.update(created_ms=1)), "was changed since"),
    "another format": (lambda s: edited(s / MANIFEST, lambda d: d.update(format=2)), "is of format 2, this program"),
    "unknown field": (lambda s: edited(s / MANIFEST, lambda d: d.update(more=2)), "is no snapshot's manifest: .*more"),
    "missing file": (lambda s: some_table(s).unlink(), r"lacks its file partition-0/\d+.sst"),
    "extra file": (lambda s: (s / "partition-0" / "x").touch(), "has a file 'partition-0/x' that its manifest"),
    "longer file": (
        lambda s: some_table(s).write_bytes(some_table(s).read_bytes() + b"x"),
        r"partition-0/\d+.sst .* is not what was written",
    ),
    "one bit": (lambda s: flip(some_table(s)), r"partition-0/\d+.sst .* is not what was written"),
    "model's bit": (lambda s: flip(s / "model.safetensors"), "the file model.safetensors .* is not what was written"),
    "a link": (
        lambda s: (shutil.move(some_table(s), s.parent / "t"), some_table_name(s).symlink_to(s.parent / "t")),
        r"partition-0/\d+.sst .* is not what was written",
    ),
}  # fmt: skip


def some_table_name(snap: Path) -> Path:
    manifest = read_snapshot(str(snap))
    return snap / "partition-0" / next(f.name for f in manifest.partition(0).files if f.name.endswith(".sst"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_snapshot_is_refused_and_nothing_of_it_gets_its_name(state, tmp_path, damage):
    snap = tmp_path / "one"
    snapshot(state, str(snap))
    change, said = DAMAGE[damage]
    change(snap)
    with pytest.raises(SnapshotError, match=said):
        restore(str(snap), tmp_path / "back")
    assert not list(tmp_path.glob("back/*"))


def test_every_bit_of_the_manifest_counts(state, tmp_path):
    snapshot(state, str(tmp_path / "one"))
    sound = (tmp_path / "one" / MANIFEST).read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(sound), 300, replace=False).tolist():
        changed = bytearray(sound)
        changed[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(SnapshotError):
            decode_manifest("here", bytes(changed))


@pytest.mark.parametrize(
    ("name", "files"), [("../../evil.sst", "partition"), ("/etc/000001.sst", "partition"), ("LOCK", "partition"),
                        ("000001.sst\n", "partition"), ("../model.safetensors", "state"), ("passwd", "state")]
)  # fmt: skip
def test_a_manifest_with_a_true_hash_cannot_name_a_path_elsewhere(state, tmp_path, name, files):
    taken = snapshot(state, str(tmp_path / "one"))
    part = taken.partition(0)
    evil = type(part.files[0])(name, 4, "0" * 64)
    if files == "partition":
        forged = type(taken)(taken.url, 1, (type(part)(0, part.layout, part.progress, (evil,)),), ())
    else:
        forged = type(taken)(taken.url, 1, (part,), (evil,))
    (tmp_path / "one" / MANIFEST).write_bytes(encode_manifest(forged))
    with pytest.raises(SnapshotError, match=r"names a file .* that is none of a st"):
        restore(str(tmp_path / "one"), tmp_path / "back")


def test_a_manifest_that_tells_another_progress_than_the_rows_is_refused(state, tmp_path):
    taken = snapshot(state, str(tmp_path / "one"))
    part = taken.partition(0)
    wrong = type(part)(0, part.layout, SnapshotProgress(10, 4, 2, 4, 1_000), part.files)
    forged = type(taken)(taken.url, 1, (wrong, taken.partition(12)), taken.files)
    (tmp_path / "one" / MANIFEST).write_bytes(encode_manifest(forged))
    with pytest.raises(SnapshotError, match=r"partition 0 of .* is at .*offset=9, .* its manifest says .*offset=10"):
        restore(str(tmp_path / "one"), tmp_path / "back")
    assert not list(tmp_path.glob("back/*"))


def test_rows_of_another_layout_are_refused(state, tmp_path):
    snapshot(state, str(tmp_path / "one"))
    with pytest.raises(SnapshotError, match=r"holds rows of row-v2 head=gradient d=2 .*, the model needs .* head=full"):
        restore(str(tmp_path / "one"), tmp_path / "back", layout=OTHER)
    assert restore(str(tmp_path / "one"), tmp_path / "back", layout=LAYOUT)


def test_a_restore_never_overwrites_rows(state, url, tmp_path):
    snapshot(state, url)
    (tmp_path / "back" / "partition-0").mkdir(parents=True)  # empty: may be used
    fill(tmp_path / "back" / "partition-12", {b"mine": 1})
    with pytest.raises(SnapshotError, match="partition-12 is not empty: a restore never overwrites rows"):
        restore(url, tmp_path / "back")
    assert os.listdir(tmp_path / "back" / "partition-0") == []
    assert held(tmp_path / "back" / "partition-12")[0] == {b"mine": 1}
    (tmp_path / "back" / "model.safetensors").write_bytes(b"newer")
    restore(url, tmp_path / "back", partitions=[0])
    assert held(tmp_path / "back" / "partition-0")[0] == FIRST
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == b"newer"


def test_reading_a_snapshot_does_not_spoil_it(state, tmp_path):
    snapshot(state, str(tmp_path / "one"))
    assert held(tmp_path / "one" / "partition-0")[0] == FIRST
    restore(str(tmp_path / "one"), tmp_path / "back")


def test_snapshots_are_listed_the_newest_first(state, url, monkeypatch):
    base = url.rpartition("/")[0]
    for name, now in (("b", 1), ("a", 3), ("c", 2)):
        monkeypatch.setattr("time.time_ns", lambda now=now: now * 1_000_000)
        snapshot(state, f"{base}/{name}")
    found = list_snapshots(base)
    assert [(each.url.rpartition("/")[2], each.created_ms) for each in found] == [("a", 3), ("c", 2), ("b", 1)]
    assert found[0].partition(0).progress.offset == 9
    assert [each.created_ms for each in list_snapshots(f"{base}/b")] == [1]
    assert list_snapshots(f"{base}/nowhere") == []


def test_what_is_half_made_or_no_snapshot_is_not_listed_and_a_damaged_one_is_told(state, tmp_path):
    snapshot(state, str(tmp_path / "snaps" / "one"))
    shutil.copytree(tmp_path / "snaps" / "one", tmp_path / "snaps" / "two.partial-abc")
    (tmp_path / "snaps" / "letters").mkdir()
    assert [Path(each.url).name for each in list_snapshots(str(tmp_path / "snaps"))] == ["one"]
    (tmp_path / "snaps" / "one" / MANIFEST).write_bytes(b"{}")
    with pytest.raises(SnapshotError, match=r"one/snapshot.json is no snapshot's manifest"):
        list_snapshots(str(tmp_path / "snaps"))


def take_out_ann(partition: int, store: RocksUserStore) -> None:
    if partition == 0:
        store.write_batch([], rows_of(), Progress(9, 4, 1, 1, 5_000), deleted=[b"ann"])
        store.compact()


def test_a_rewritten_snapshot_holds_what_the_edit_left(state, url, tmp_path):
    taken = snapshot(state, url)
    written = rewrite(url, take_out_ann)
    assert written == read_snapshot(url)
    assert written.created_ms == taken.created_ms
    assert written.partition(0).progress == SnapshotProgress(9, 4, 1, 1, 5_000)
    restore(url, tmp_path / "back")
    assert held(tmp_path / "back" / "partition-0")[0] == {b"\xff/../x": 1}
    assert held(tmp_path / "back" / "partition-12")[0] == SECOND
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == b"model"
    assert [each.url for each in list_snapshots(url.rpartition("/")[0])] == [url]


def test_nothing_of_what_was_taken_out_is_left_on_the_disk(tmp_path):
    fill(tmp_path / "state" / "partition-0", {b"a-very-distinct-name": 3, b"b": 1})
    snapshot(tmp_path / "state", str(tmp_path / "snaps" / "one"))

    def edit(partition, store):
        store.write_batch([], rows_of(), Progress(9, 4, 1, 1, 5_000), deleted=[b"a-very-distinct-name"])
        store.compact()

    rewrite(str(tmp_path / "snaps" / "one"), edit)
    files = [path for path in (tmp_path / "snaps").rglob("*") if path.is_file()]
    assert any(path.suffix == ".sst" for path in files)
    assert [path.name for path in files if b"a-very-distinct-name" in path.read_bytes()] == []


def test_an_edit_that_fails_leaves_the_snapshot_as_it_is(state, url, tmp_path):
    snapshot(state, url)

    def edit(partition, store):
        take_out_ann(partition, store)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        rewrite(url, edit)
    restore(url, tmp_path / "back")
    assert held(tmp_path / "back" / "partition-0")[0] == FIRST
    assert [each.url for each in list_snapshots(url.rpartition("/")[0])] == [url]


@pytest.mark.parametrize("step", ["first", "second", "third"])
def test_a_swap_that_was_cut_off_is_ended_by_the_next(state, tmp_path, monkeypatch, step):
    """Where the file system cannot exchange two directories in one step."""

    class NoExchange:
        def renameat2(self, *_):
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: NoExchange())
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EINVAL)
    snap, rename, calls = tmp_path / "snaps" / "one", os.rename, []
    snapshot(state, str(snap))
    last = ("first", "second", "third").index(step)

    def cut_off(source, target):
        calls.append((source, target))
        if len(calls) == last + 1:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("os.rename", cut_off)
    with pytest.raises(KeyboardInterrupt):
        rewrite(str(snap), take_out_ann)
    monkeypatch.setattr("os.rename", rename)
    rewrite(str(snap), take_out_ann)
    assert os.listdir(tmp_path / "snaps") == ["one"]
    restore(str(snap), tmp_path / "back")
    assert held(tmp_path / "back" / "partition-0")[0] == {b"\xff/../x": 1}


def test_a_rewrite_of_a_damaged_snapshot_is_refused(state, tmp_path):
    snapshot(state, str(tmp_path / "one"))
    flip(some_table(tmp_path / "one"))
    with pytest.raises(SnapshotError, match="is not what was written"):
        rewrite(str(tmp_path / "one"), take_out_ann)


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from state.exceptions import SnapshotError
from state.snapshots.snapshot import restore, snapshot
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    restore(sys.argv[3], Path(sys.argv[4])) if sys.argv[2] == "restore" else snapshot(Path(sys.argv[3]), sys.argv[4])
except SnapshotError as error:
    print(error)
"""
"""The system refuses every byte of a file after the 20,000th, as a full disk does"""


@pytest.mark.parametrize("command", ["snapshot", "restore"])
def test_a_full_disk_is_told_and_nothing_is_left_behind(tmp_path, command):
    fill(tmp_path / "state" / "partition-0", {b"user-%d" % k: 1 for k in range(500)})
    source, target = tmp_path / "state", tmp_path / "new" / "one"
    if command == "restore":
        snapshot(tmp_path / "state", str(tmp_path / "whole"))
        source = tmp_path / "whole"
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(ROOT), command, str(source), str(target)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "File too large; free space on its disk, or give another place; nothing of it is left behind" in ran.stdout
    assert len(ran.stdout.splitlines()) == 1
    assert not list(tmp_path.rglob("*.partial-*"))
    assert not list(target.glob("*"))
    assert not (target / "partition-0").exists()


def test_a_target_that_cannot_be_written_to_is_told(state, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match=r"a snapshot of .*/state to .*/file/one failed: .*; check the path"):
        snapshot(state, str(tmp_path / "file" / "one"))
    snapshot(state, str(tmp_path / "one"))
    with pytest.raises(SnapshotError, match=r"restoring .* into .*/file/back failed: .*; check the path"):
        restore(str(tmp_path / "one"), tmp_path / "file" / "back")


def test_a_url_that_nobody_knows_is_told(state):
    with pytest.raises(SnapshotError, match=r"the snapshot what://ever cannot be reached: .*; check the URL"):
        snapshot(state, "what://ever")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from state.snapshots.snapshot import restore, snapshot
real, left = os.rename, int(sys.argv[5])
def rename(source, target):
    global left
    left -= 1
    if left == 0 and sys.argv[6] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
restore(sys.argv[3], Path(sys.argv[4])) if sys.argv[2] == "restore" else snapshot(Path(sys.argv[3]), sys.argv[4])
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_snapshot_killed_at_its_rename_is_there_whole_or_not_at_all(state, tmp_path, when):
    target = tmp_path / "snaps" / "one"
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(ROOT), "snapshot", str(state), str(target), "1", when],
        check=False,
        timeout=60,
    )
    assert ran.returncode == -signal.SIGKILL
    assert target.exists() == (when == "after")
    if when == "before":
        snapshot(state, str(target))
    restore(str(target), tmp_path / "back")
    assert held(tmp_path / "back" / "partition-0")[0] == FIRST
    if when == "before":
        assert os.listdir(tmp_path / "snaps") == ["one"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rename", [1, 2, 3])
def test_a_restore_killed_at_any_rename_leaves_whole_partitions_or_none(state, tmp_path, rename, when):
    snapshot(state, str(tmp_path / "one"))
    back = tmp_path / "back"
    arguments = [str(ROOT), "restore", str(tmp_path / "one"), str(back), str(rename), when]
    ran = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, timeout=60)
    assert ran.returncode == -signal.SIGKILL
    for name, users in (("partition-0", FIRST), ("partition-12", SECOND)):
        if (back / name).exists():
            assert held(back / name)[0] == users
        else:
            restore(str(tmp_path / "one"), back, partitions=[int(name.partition("-")[2])])
    assert not list(back.glob("partition-*.partial-*"))
