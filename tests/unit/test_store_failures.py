"""A store of rows when RocksDB refuses, loses or damages something."""

from __future__ import annotations

import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from rocksdict import Options, Rdict, WriteBatch

import state.rocksdb
from learner.user_state import RowLayout
from state.codec import UNKNOWN, Progress
from state.exceptions import (
    RowDamaged,
    StoreDamaged,
    StoreLocked,
    StoreRolledBack,
    StoreUnfinished,
    StoreUnreadable,
    StoreWriteFailed,
)
from state.keys import LAYOUT_KEY, PROGRESS_KEY, user_key
from state.reading.following import FollowingReader
from state.rocksdb import ROCKSDICT_SETTINGS, StoreMemory, open_for_writing
from state.store import RocksReader, RocksUserStore
from tests.models import offset_of, sealed

LAYOUT = RowLayout("full", 3, 0, 2)
GOLDEN = Path(__file__).parents[1] / "golden"
NO_SPACE = "IO error: No space left on device: While appending to file: 000004.log: No space left on device"


class Handle:
    """A database handle whose calls may be replaced, one by one."""

    def __init__(self, db: Rdict, **replaced: object) -> None:
        self._db = db
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)


def refuse(*_: object) -> None:
    raise Exception(NO_SPACE)


def rows_for(ids: list[bytes], fill: int = 0) -> np.ndarray:
    return sealed(LAYOUT, ids, np.full((len(ids), LAYOUT.row_bytes), fill, np.uint8))


def write(store: RocksUserStore, offset: int) -> None:
    store.write_batch([b"a", b"%d" % offset], rows_for([b"a", b"%d" % offset], offset), Progress(offset, 0))


def held(store: RocksUserStore | RocksReader) -> dict[bytes, int]:
    return {user: int(row[-1]) for user, row in store.iterate()}


# --- refused writes -----------------------------------------------------------------------------------------------


def test_a_failure_while_an_emptied_store_is_restored_is_not_gone_over(tmp_path):
    row = sealed(LAYOUT, [b"a"], np.zeros((1, LAYOUT.row_bytes), np.uint8))
    with RocksUserStore(tmp_path, LAYOUT) as store:
        store.begin_restore(empty=True)
        store.write_batch([b"a"], row, None)
        store._failed = True  # as a flush that was refused leaves it
        for step in (lambda: store.write_batch([b"b"], row, None), lambda: store.end_restore(Progress(1, 0))):
            with pytest.raises(StoreUnfinished, match="restore it again"):
                step()
    with pytest.raises(StoreUnfinished):
        RocksUserStore(tmp_path, LAYOUT)


@pytest.mark.parametrize("pattern", ["MANIFEST-*", "*.log"])
@pytest.mark.parametrize("last", [False, True])
def test_a_record_that_rocksdb_would_read_for_ever_is_refused_by_every_open(tmp_path, pattern, last):
    with RocksUserStore(tmp_path / "live", LAYOUT) as store:
        for k in range(3):
            store.write_batch([b"a"], sealed(LAYOUT, [b"a"], np.zeros((1, LAYOUT.row_bytes), np.uint8)), Progress(k, 0))
        shutil.copytree(tmp_path / "live", tmp_path / "s")
    file = max((tmp_path / "s").glob(pattern), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    headers, place = [], 0
    while place + 7 <= len(content):
        headers.append(place)
        place += 7 + int.from_bytes(content[place + 4 : place + 6], "little")
    assert len(headers) > 2
    content[headers[-1 if last else 0] + 6] ^= 4
    file.write_bytes(content)
    for opening in (lambda: RocksUserStore(tmp_path / "s", LAYOUT), lambda: RocksReader(tmp_path / "s"),
                    lambda: FollowingReader(tmp_path / "s")):  # fmt: skip
        with pytest.raises(StoreUnreadable, match=rf"{tmp_path}/s is damaged: {file.name} has a record of type 5"):
            opening()


def test_a_refused_write_says_what_to_do_and_may_be_tried_again(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT) as store:
        write(store, 1)
        store._db = Handle(store._db, write=refuse)
        with pytest.raises(StoreWriteFailed) as refused:
            write(store, 2)
        assert str(refused.value) == (
            f"the store {tmp_path} cannot be written: {NO_SPACE}; free space on its disk, then go on; "
            "nothing that was confirmed is lost"
        )
        assert held(store) == {b"a": 1, b"1": 1}
        write(store, 2)
        assert held(store) == {b"a": 2, b"1": 1, b"2": 2}


def test_a_batch_that_became_durable_although_its_write_failed_is_there_after_the_error(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT) as store:
        write(store, 1)
        db = store._db
        store._db = Handle(db, write=lambda batch, options: (db.write(batch, options), refuse()))
        with pytest.raises(StoreWriteFailed):
            write(store, 2)
        assert offset_of(store) == 2
        assert held(store) == {b"a": 2, b"1": 1, b"2": 2}


def test_a_refused_sync_is_told_and_the_store_goes_on(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT) as store:
        write(store, 1)
        store._db = Handle(store._db, flush_wal=refuse)
        with pytest.raises(StoreWriteFailed, match="free space on its disk"):
            store.sync()
        store.sync()
        assert offset_of(store) == 1


def test_a_store_that_cannot_even_close_its_old_handle_opens_a_new_one(tmp_path):
    """RocksDB reports the first error again at close, and the handle is gone all the same."""
    with RocksUserStore(tmp_path, LAYOUT) as store:
        write(store, 1)
        db = store._db
        store._db = Handle(db, write=refuse, close=lambda: (db.close(), refuse()))
        with pytest.raises(StoreWriteFailed):
            write(store, 2)
        write(store, 2)
        assert offset_of(store) == 2


def test_a_store_that_cannot_be_opened_again_yet_is_opened_at_a_later_call(tmp_path):
    path = tmp_path / "store"
    store = RocksUserStore(path, LAYOUT)
    write(store, 1)
    db = store._db
    store._db = Handle(db, write=refuse, close=lambda: (db.close(), path.rename(tmp_path / "away"), path.touch()))
    with pytest.raises(StoreWriteFailed):
        write(store, 2)
    for _ in range(3):
        with pytest.raises(StoreUnreadable, match=re.escape(str(path))):
            store.progress()
    path.unlink()
    (tmp_path / "away").rename(path)
    write(store, 2)
    assert held(store) == {b"a": 2, b"1": 1, b"2": 2}
    store.close()
    RocksUserStore(path, LAYOUT).close()


def test_closing_a_store_that_cannot_be_opened_again_is_no_error(tmp_path):
    path = tmp_path / "store"
    store = RocksUserStore(path, LAYOUT)
    db = store._db
    store._db = Handle(db, write=refuse, close=lambda: (db.close(), shutil.rmtree(path), path.touch()))
    with pytest.raises(StoreWriteFailed):
        write(store, 2)
    with pytest.raises(StoreUnreadable):
        store.progress()
    store.close()
    store.close()


def test_a_store_whose_last_flush_fails_is_closed_and_loses_nothing(tmp_path):
    store = RocksUserStore(tmp_path, LAYOUT)
    write(store, 1)
    store._db = Handle(store._db, flush=refuse)
    store.close()
    with RocksUserStore(tmp_path, LAYOUT) as again:
        assert held(again) == {b"a": 1, b"1": 1}


def test_a_new_store_whose_first_write_fails_lets_go_of_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "state.store.open_for_writing", lambda path, _: Handle(Rdict(str(path), Options(True)), write=refuse)
    )
    with pytest.raises(StoreWriteFailed):
        RocksUserStore(tmp_path, LAYOUT)
    monkeypatch.undo()
    RocksUserStore(tmp_path, LAYOUT).close()


# --- a store that comes back at an earlier offset ------------------------------------------------------------------


def lose(store: RocksUserStore, kept: Path | None) -> None:
    """At the next call the store opens again what ``kept`` holds, as after power loss under a policy that allows it."""
    db, path = store._db, store.path

    def close() -> None:
        db.close()
        shutil.rmtree(path)
        if kept is not None:
            shutil.copytree(kept, path)

    store._db = Handle(db, write=refuse, close=close)
    with pytest.raises(StoreWriteFailed):
        write(store, 9)


@pytest.mark.parametrize(
    "call", [lambda s: s.progress(), lambda s: write(s, 3), lambda s: s.get_many([b"a"]), lambda s: s.sync()]
)
def test_a_store_that_came_back_at_an_earlier_offset_says_so_once(tmp_path, call):
    path, kept = tmp_path / "store", tmp_path / "kept"
    with RocksUserStore(path, LAYOUT) as store:
        write(store, 1)
        shutil.copytree(path, kept)
        write(store, 2)
        lose(store, kept)
        with pytest.raises(StoreRolledBack) as told:
            call(store)
        assert str(told.value) == (
            f"the store {path} came back at offset 1, it had confirmed 2: feed it again from there"
        )
        assert held(store) == {b"a": 1, b"1": 1}
        write(store, 2)
        assert held(store) == {b"a": 2, b"1": 1, b"2": 2}


def test_a_store_that_came_back_empty_says_so(tmp_path):
    with RocksUserStore(tmp_path / "store", LAYOUT) as store:
        write(store, 1)
        lose(store, None)
        with pytest.raises(StoreRolledBack, match="came back at offset none, it had confirmed 1"):
            store.progress()
        assert store.progress() is None


def test_a_store_whose_offset_cannot_be_read_after_a_failure_compares_again_at_the_next_call(tmp_path):
    path, kept = tmp_path / "store", tmp_path / "kept"
    with RocksUserStore(path, LAYOUT) as store:
        write(store, 1)
        shutil.copytree(path, kept)
        write(store, 2)
    for progress in (b"damaged", Progress(1, 0).encode()):
        plain = Rdict(str(kept), Options(raw_mode=True))
        plain[PROGRESS_KEY] = progress
        plain.close()
        shutil.copytree(kept, tmp_path / progress[:1].hex())
    with RocksUserStore(path, LAYOUT) as store:
        lose(store, tmp_path / b"d".hex())
        with pytest.raises(StoreDamaged, match="progress record has 7 bytes"):
            store.progress()
        store._db.close()
        shutil.rmtree(path)
        shutil.copytree(tmp_path / b"\x02".hex(), path)
        with pytest.raises(StoreRolledBack, match="came back at offset 1, it had confirmed 2"):
            store.progress()


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Path, int]:
    """A store of 5,000 rows in one sorted file, of which a byte in the middle is wrong; and a user near it."""
    path = tmp_path_factory.mktemp("damaged") / "store"
    users = [b"%04d" % k for k in range(5_000)]
    with RocksUserStore(path, LAYOUT) as store:
        store.write_batch(users, rows_for(users), Progress(1, 0))
    (table,) = [file for file in path.glob("*.sst") if file.stat().st_size > 100_000]
    content = bytearray(table.read_bytes())
    content[content.index(zlib.crc32(b"2500").to_bytes(4, "little"))] ^= 1
    table.write_bytes(content)
    return path, 2_500


@pytest.mark.parametrize("kind", [RocksReader, lambda path: RocksUserStore(path, LAYOUT)], ids=["reader", "writer"])
def test_a_walk_over_a_damaged_block_raises_and_does_not_end_early(damaged, kind):
    path, _ = damaged
    seen: list[bytes] = []
    with kind(path) as store:
        walk = store.iterate()
        with pytest.raises(StoreUnreadable, match=rf"{path} cannot be read: Corruption: .*; restore a snapshot"):
            seen.extend(user for user, _ in walk)
        assert seen == [b"%04d" % k for k in range(len(seen))]
        assert len(seen) < 2_500
        with pytest.raises(StoreUnreadable, match="Corruption") as kept:
            next(walk)
    open_for_writing(path, StoreMemory(), lock_wait_s=0).close()
    assert "Corruption" in str(kept.value)  # who keeps the error does not keep the lock with it


def test_users_in_a_damaged_block_are_refused_and_others_are_read(damaged):
    path, user = damaged
    with RocksReader(path) as store:
        with pytest.raises(StoreUnreadable, match="Corruption"):
            store.get_many([b"%04d" % user])
        assert store.get_many([b"0000", b"4999"])[1].all()
        assert [user for user, _ in store.iterate(after=b"4989")] == [b"%04d" % k for k in range(4_990, 5_000)]


def plain_store(path: Path, **entries: bytes) -> None:
    """A database with these entries, as another program or a fault may leave it."""
    db, batch = Rdict(str(path), Options(raw_mode=True)), WriteBatch(raw_mode=True)
    for name, value in {"layout": LAYOUT.fingerprint.encode(), **entries}.items():
        batch.put({"layout": LAYOUT_KEY, "progress": PROGRESS_KEY}.get(name, user_key(name.encode())), value)
    db.write(batch)
    db.close()


@pytest.mark.parametrize("kind", [RocksReader, lambda path: RocksUserStore(path, LAYOUT)], ids=["reader", "writer"])
def test_a_row_that_is_not_what_was_written_is_refused_by_path_and_user(tmp_path, kind):
    row = rows_for([b"ann"])[0].tobytes()
    plain_store(tmp_path, ann=row, bob=row, cid=row[:-1] + b"\xff")
    with kind(tmp_path) as store:
        assert store.get_many([b"ann"])[1].all()
        with pytest.raises(RowDamaged, match=rf"^{tmp_path}: the row of user 'bob' is another user's row: restore"):
            store.get_many([b"ann", b"bob"])
        with pytest.raises(
            RowDamaged, match=rf"^{tmp_path}: the row of user 'cid' fails its checksum: restore"
        ) as told:
            store.get_many([b"ann", b"cid"])
        assert told.value.user == b"cid"
        with pytest.raises(RowDamaged, match=rf"^{tmp_path}: the row of user 'bob'"):
            list(store.iterate())


def test_a_damaged_progress_record_is_refused_by_path(tmp_path):
    plain_store(tmp_path, progress=Progress(1, 0).encode()[:-1] + b"\xff")
    with RocksReader(tmp_path) as reader, pytest.raises(StoreDamaged, match=rf"^{tmp_path}: the progress record"):
        reader.progress()
    with pytest.raises(StoreDamaged, match=rf"^{tmp_path}: the progress record fails its checksum: restore"):
        RocksUserStore(tmp_path, LAYOUT)
    Rdict(str(tmp_path), Options(raw_mode=True)).close()


def test_a_store_of_version_1_comes_up_when_it_is_opened_for_writing(tmp_path):
    layout = RowLayout("full", 5, 4, 4)
    old = (GOLDEN / "row-v1-full.bin").read_bytes()
    users = {f"u{k}": old[232 * k : 232 * (k + 1)] for k in range(6)}
    plain_store(tmp_path, layout=layout.fingerprint.replace("v2", "v1").encode(), progress=bytes(16), **users)
    with RocksReader(tmp_path) as reader:
        assert reader.layout == layout
        before = {user: row.tobytes() for user, row in reader.iterate()}
        assert reader.progress() == Progress(0, 0, UNKNOWN, UNKNOWN)
    assert sorted(before) == [user.encode() for user in users]
    with RocksUserStore(tmp_path, layout) as store:
        assert {user: row.tobytes() for user, row in store.iterate()} == before
        store.write_batch([b"u3"], np.frombuffer(before[b"u3"], np.uint8)[None], None)
    plain = Rdict(str(tmp_path), Options(raw_mode=True))
    assert plain[LAYOUT_KEY] == layout.fingerprint.encode()
    assert plain[user_key(b"u3")] == before[b"u3"]
    plain.close()


def test_a_directory_of_another_program_is_refused_and_left_alone(tmp_path):
    plain_store(tmp_path, layout=b"words", ann=b"?")
    with pytest.raises(StoreUnreadable, match="does not say which rows it holds"):
        RocksReader(tmp_path)
    with pytest.raises(Exception, match="holds rows of words, the model needs row-v2") as refused:
        RocksUserStore(tmp_path, LAYOUT)
    assert not isinstance(refused.value, StoreLocked)
    plain = Rdict(str(tmp_path), Options(raw_mode=True))
    assert sorted(plain.items()) == [(LAYOUT_KEY, b"words"), (user_key(b"ann"), b"?")]
    plain.close()


# --- reading where nothing may be written -------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", ["Read-only file system (os error 30)", "No space left on device (os error 28)"])
def test_a_store_is_read_where_nothing_may_be_written(tmp_path, monkeypatch, refusal):
    path, opened = tmp_path / "store", state.rocksdb.opened
    with RocksUserStore(path, LAYOUT) as store:
        for offset in range(40):
            write(store, offset)
            store.flush(wait=True)  # many files: all of them must be open when their links are gone
        write(store, 40)

        def refused(place: Path, *arguments: object) -> Rdict:
            if place == path:
                raise OSError(refusal)
            return opened(place, *arguments)

        monkeypatch.setattr("state.rocksdb.opened", refused)
        monkeypatch.chdir(path.parent)
        for named in (path, Path("store")):
            monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
            with RocksReader(named) as reader:
                assert [p.name for p in tmp_path.iterdir()] == ["store"]
                assert held(reader) == {b"a": 40, **{b"%d" % k: k for k in range(41)}}
                assert reader.get_many([b"%d" % k for k in range(41)])[1].all()


def test_another_refusal_of_the_system_is_told_as_it_is(tmp_path, monkeypatch):
    RocksUserStore(tmp_path, LAYOUT).close()

    def refused(*_: object) -> Rdict:
        raise OSError("Too many open files (os error 24)")

    monkeypatch.setattr("state.rocksdb.opened", refused)
    with pytest.raises(StoreUnreadable, match=rf"{tmp_path} cannot be read: Too many open files .*raise the limit"):
        RocksReader(tmp_path)


def test_what_rocksdict_keeps_beside_the_files_does_not_matter(tmp_path):
    with RocksUserStore(tmp_path, LAYOUT) as store:
        write(store, 1)
    for content in (b"", b"{", b"\xff" * 40, None):
        settings = tmp_path / ROCKSDICT_SETTINGS
        settings.unlink() if content is None else settings.write_bytes(content)
        with RocksReader(tmp_path) as reader:
            assert held(reader) == {b"a": 1, b"1": 1}
        settings.unlink() if content is None else settings.write_bytes(content)
        with RocksUserStore(tmp_path, LAYOUT) as store:
            assert held(store) == {b"a": 1, b"1": 1}
