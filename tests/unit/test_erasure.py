"""An erased user is in no file, in no memory and in no snapshot, and a receipt says so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.user_state import RowLayout
from state.codec import UNKNOWN, Progress
from state.erasure import erase_from_directory, erase_from_snapshot, erase_user
from state.exceptions import ChangelogError, ReceiptError, StoreLocked, StoreWriteFailed
from state.history_codec import Book
from state.hot_rows import HotMemory, HotRows
from state.keys import STANDING_KEY, history_stem, user_key
from state.memory_store import MemoryUserStore
from state.outbox import Outbox, Publication, entries, standing
from state.outbox_codec import SESSION_BYTES, Standing
from state.receipt import BEYOND_REACH, Receipt, Removal, read_receipt, write_receipt
from state.snapshots.snapshot import restore, snapshot
from state.store import RocksReader, RocksUserStore, UserStore
from streams.processor import Processor
from streams.verification import verify_receipt_in_snapshots, verify_store
from tests.histories import Keeper, counted, layout_of, recounted
from tests.models import random_stream, small_model

LAYOUT = RowLayout("full", 3, 0, 6)
NAME = "Zaphod-of-Betelgeuse-1742"
OTHERS = [f"user{k:05}".encode() for k in range(2000)]
BOOK = Book(1 << 32, -1, 1, 12, 2, 32).encode()
EMPTY = np.zeros((0, LAYOUT.row_bytes), np.uint8)
IDS = {
    "in the middle": b"user01000-" + NAME.encode(), "first": b"!" + NAME.encode(), "last": b"\xff\xfe" + NAME.encode(),
    "long": b"user00500" + b"long-winded " * 400, "of text": f"ülker {NAME}".encode(),
    "of any bytes": bytes(range(256)), "empty": b"",
}  # fmt: skip


def rows_for(users: list[bytes], salt: int) -> np.ndarray:
    rng = np.random.default_rng([salt, len(users)])
    slab = rng.integers(0, 256, (len(users), LAYOUT.row_bytes), dtype=np.uint8)
    rows = LAYOUT.rows(slab)
    rows["events"], rows["last_offset"], rows["meta_version"] = 3 + salt, salt, 0
    return slab


def filled(path: Path, user: bytes) -> list[bytes]:
    """A store of several levels with many old rows of the user; returns all rings that the user's rows had."""
    rings = []
    users = [*OTHERS, user]
    with RocksUserStore(path, LAYOUT) as store:
        for salt in range(4):
            slab = rows_for(users, salt)
            rings.append(LAYOUT.rows(slab)["ring"][-1].tobytes())
            store.write_batch(users, slab, Progress(salt, 0, len(users), len(users) * (3 + salt), 1))
            if salt < 3:
                store.compact()
        store.sync()
    return rings


def traces(directory: Path, user: bytes, rings: list[bytes]) -> list[str]:
    """Files below the directory that hold the id (in full, or written in hex) or 16 bytes in a row of a ring."""
    names = [user, user.hex().encode(), user.hex().upper().encode()] if len(user) >= 8 else []
    pieces = [ring[k : k + 16] for ring in rings for k in range(len(ring) - 15)]
    found = []
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = file.read_bytes()
        if any(name in content for name in names) or any(piece in content for piece in pieces):
            found.append(file.name)
    return found


def held(path: Path) -> dict[bytes, bytes]:
    with RocksReader(path) as store:
        return {user: row.tobytes() for user, row in store.iterate()}


def progress_of(path: Path) -> Progress:
    with RocksReader(path) as store:
        progress = store.progress()
    assert progress is not None
    return progress


# --- one store


@pytest.mark.parametrize("user", IDS.values(), ids=IDS)
def test_neither_the_id_nor_any_row_of_the_user_is_left_in_a_file(tmp_path, user):
    rings = filled(tmp_path / "s", user)
    others = {name: row for name, row in held(tmp_path / "s").items() if name != user}
    assert traces(tmp_path / "s", user, rings)
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        assert erase_user(store, user, 7) == Removal(7, True, 6, LAYOUT.row_bytes, 3, 0)
        assert traces(tmp_path / "s", user, rings) == []
        assert store.get_many([user])[1].tolist() == [False]
    assert traces(tmp_path / "s", user, rings) == []
    assert held(tmp_path / "s") == others
    progress = progress_of(tmp_path / "s")
    assert (progress.offset, progress.users, progress.events) == (3, 2000, 12_000)
    assert verify_store(tmp_path / "s").sound


def test_a_user_who_is_the_only_one_leaves_an_empty_store(tmp_path):
    user = NAME.encode()
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        store.write_batch([user], rows_for([user], 0), Progress(5, 0, 1, 3))
        erase_user(store, user, 0)
        assert traces(tmp_path / "s", user, []) == []
        assert list(store.iterate()) == []
        assert store.progress().users == 0


def test_erasing_again_finds_nothing_and_changes_nothing(tmp_path):
    user = NAME.encode()
    filled(tmp_path / "s", user)
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        erase_user(store, user, 0)
        before = store.progress()
        assert erase_user(store, user, 0) == Removal(0, False, 0, 0, 3, 0)
        assert store.progress() == before


def test_a_user_in_a_store_that_has_applied_nothing_is_not_found(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        assert erase_user(store, b"nobody", 0) == Removal(0, False, 0, 0, None, None)
        assert store.progress() is None


def test_an_earlier_deletion_that_is_still_in_the_files_is_cleared_too(tmp_path):
    user = NAME.encode()
    rings = filled(tmp_path / "s", user)
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        store.write_batch([], EMPTY, None, deleted=[user])
        store.sync()
        assert traces(tmp_path / "s", user, rings)
        assert not erase_user(store, user, 0).found
        assert traces(tmp_path / "s", user, rings) == []


def test_a_damaged_row_is_erased_and_the_totals_are_unknown_from_then_on(tmp_path):
    user = NAME.encode()
    filled(tmp_path / "s", user)
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        store._open_db().put(user_key(user), b"not a row")
        assert erase_user(store, user, 0) == Removal(0, True, UNKNOWN, 9, 3, 0)
        progress = store.progress()
    assert (progress.users, progress.events, progress.offset) == (UNKNOWN, UNKNOWN, 3)


def live(store: UserStore, position: int = 0) -> HotRows:
    """The rows of a worker that tells a changelog."""
    session = b"s" * SESSION_BYTES
    own = {STANDING_KEY: Standing(session, position, 1).encode()}
    store.write_batch([], np.zeros((0, store.layout.row_bytes), np.uint8), None, own=own)
    return HotRows(store, HotMemory(store.layout, 4000), Outbox(store, session))


def teller(hot: HotRows, told: list[Publication]):
    """Tells everything, as a worker does."""

    def tell() -> None:
        while publication := hot.log.take(1 << 20):
            told.append(publication)
            hot.log.acknowledged(publication.sequence, len(told))

    return tell


@pytest.mark.parametrize("user", IDS.values(), ids=IDS)
def test_a_worker_tells_the_tombstone_and_leaves_no_trace_in_the_outbox(tmp_path, user):
    rings, told = filled(tmp_path / "s", user), []
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        hot = live(store)
        slots = hot.acquire([user, b"other"]).slots
        hot.write(slots, 4, 0, payload=b"said of " + user)
        removal = erase_user(store, user, 7, hot=hot, tell=teller(hot, told))
        assert removal == Removal(7, True, 6, LAYOUT.row_bytes, 4, 0)
        assert [list(one.rows) for one in told] == [[user, b"other"]]
        assert told[0].rows[user] is None
        assert told[0].progress == store.progress()
        assert standing(store).position == 1
        assert traces(tmp_path / "s", user, rings) == []


def test_a_changelog_that_refuses_leaves_the_tombstone_for_the_next_try(tmp_path):
    user, told = NAME.encode(), []
    filled(tmp_path / "s", user)

    def refuse() -> None:
        raise ConnectionError("no broker")

    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        hot = live(store)
        with pytest.raises(ConnectionError):
            erase_user(store, user, 0, hot=hot, tell=refuse)
        assert store.stored_row(user) is None
        assert [entry.deleted for entry in entries(store)] == [(user,)]
        assert not erase_user(store, user, 0, hot=hot, tell=teller(hot, told)).found
        assert told[0].rows == {user: None}
        assert entries(store) == ()


def test_an_outbox_is_not_left_untold(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        hot = live(store)
        with pytest.raises(ValueError, match="needs a way to tell the changelog"):
            erase_user(store, b"a", 0, hot=hot)
        with pytest.raises(ChangelogError, match="has not acknowledged the tombstone"):
            erase_user(store, b"a", 0, hot=hot, tell=lambda: None)


def test_where_no_changelog_can_be_told_the_outbox_and_the_standing_go_with_the_user(tmp_path):
    user = NAME.encode()
    rings = filled(tmp_path / "s", user)
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        hot = live(store)
        slots = hot.acquire([user, b"other"]).slots
        hot.write(slots, 4, 0, payload=b"said of " + user)
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        assert erase_user(store, user, 0).found
        assert (entries(store), standing(store)) == ((), None)
        assert traces(tmp_path / "s", user, rings) == []


def test_a_standing_without_an_outbox_stays(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        live(store, position=9)
        erase_user(store, b"a", 0)
        assert standing(store).position == 9


def test_an_erasure_that_died_before_the_files_were_written_anew_is_finished_by_the_next(tmp_path):
    class Dying(RocksUserStore):
        def compact(self, first=None, last=None):
            raise StoreWriteFailed("no space")

    user = NAME.encode()
    rings = filled(tmp_path / "s", user)
    with Dying(tmp_path / "s", LAYOUT) as store, pytest.raises(StoreWriteFailed):
        erase_user(store, user, 0)
    assert traces(tmp_path / "s", user, rings)
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        assert not erase_user(store, user, 0).found
    assert traces(tmp_path / "s", user, rings) == []
    assert progress_of(tmp_path / "s").users == 2000


# --- histories


def with_histories(store: RocksUserStore, user: str) -> tuple[Keeper, list[bytes]]:
    """2,000 others and a user with 200 events, over several levels; and all that was ever stored of the user's."""
    keeper, pieces = Keeper(store), []
    others = [f"user{k:05}" for k in range(2000)]
    for k in range(5):
        users = [*others, *[user] * 40]
        keeper.commit(
            Interactions.from_columns(
                users, [f"item {j % 997}" for j in range(len(users))], [j % 2 for j in range(len(users))],
                [10**12 + 10**7 * k + j for j in range(len(users))], offsets=10**4 * k + np.arange(len(users)),
            )
        )  # fmt: skip
        pieces += [v[8:] for key, v in keeper.contents().items() if key.startswith(history_stem(user.encode()))]
        if k < 4:
            store._rewrite(b"", b"\xff")
    return keeper, pieces


@pytest.mark.parametrize("before_the_row", [False, True])
def test_no_event_of_the_user_is_left_in_a_file_that_holds_histories(tmp_path, before_the_row):
    user = NAME.encode()
    with RocksUserStore(tmp_path / "s", layout_of(32)) as store:
        keeper, pieces = with_histories(store, NAME)
        stem = history_stem(user)
        others = {key: value for key, value in keeper.contents().items() if not key.startswith(stem) and key != b"h"}
        store.sync()
        assert traces(tmp_path, user, pieces)
        assert traces(tmp_path, stem[1:], [])
        if before_the_row:  # an earlier deletion, which stands in the files
            keeper.hot.remove([user], 200)
            assert traces(tmp_path, user, pieces)
        assert erase_user(store, user, 0, hot=keeper.hot).found is not before_the_row
        assert traces(tmp_path, user, pieces) == traces(tmp_path, stem[1:], []) == []
        held = keeper.contents()
        assert {key: value for key, value in held.items() if key != b"h"} == others
        assert counted(keeper) == recounted(keeper) == (2000, 10_000, 4000)
        assert verify_store(tmp_path / "s").sound
    assert traces(tmp_path, user, pieces) == traces(tmp_path, stem[1:], []) == []


def test_files_that_hold_histories_alone_are_written_anew_too(tmp_path):
    user = NAME.encode()
    stem, events = history_stem(user), bytes(range(100, 200))
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        for batch in (
            lambda: None,
            lambda: store.write_batch([b"other"], rows_for([b"other"], 0), Progress(1, 0)),
            lambda: store.write_batch([], EMPTY, None, histories={b"h": BOOK, stem: user, stem + bytes(4): events}),
            lambda: store.cut_histories(b"h"),
        ):
            batch()
            store._open_db().flush()  # each into a file of its own
        assert traces(tmp_path, user, [events])
        assert not erase_user(store, user, 0).found
        assert traces(tmp_path, user, [events]) == traces(tmp_path, stem[1:], []) == []


def test_a_worker_with_an_outbox_erases_the_history_too(tmp_path):
    user, told = NAME.encode(), []
    with RocksUserStore(tmp_path / "s", layout_of(32)) as store:
        keeper, pieces = with_histories(store, NAME)
        session = b"s" * SESSION_BYTES
        store.write_batch([], keeper.hot.memory.slab[:0], None, own={STANDING_KEY: Standing(session, 0, 1).encode()})
        hot = HotRows(store, keeper.hot.memory, Outbox(store, session))
        assert erase_user(store, user, 0, hot=hot, tell=teller(hot, told)).found
        assert traces(tmp_path, user, pieces) == traces(tmp_path, history_stem(user)[1:], []) == []
        assert counted(keeper) == recounted(keeper) == (2000, 10_000, 4000)


def test_snapshots_lose_histories_of_an_erased_user(tmp_path):
    user, state = NAME.encode(), tmp_path / "state"
    with RocksUserStore(state / "partition-0", layout_of(32)) as store:
        _, pieces = with_histories(store, NAME)
    snapshot(state, str(tmp_path / "snap"))
    assert traces(tmp_path / "snap", history_stem(user)[1:], [])
    erase_from_directory(state, user, [str(tmp_path / "snap")])
    assert traces(tmp_path, user, pieces) == traces(tmp_path, history_stem(user)[1:], []) == []
    restore(str(tmp_path / "snap"), tmp_path / "again")
    with RocksUserStore(tmp_path / "again" / "partition-0", layout_of(32)) as store:
        assert counted(Keeper(store)) == recounted(Keeper(store)) == (2000, 10_000, 4000)


# --- memory


def test_neither_memory_nor_what_it_gave_up_holds_the_user(tmp_path):
    user = NAME.encode()
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        hot = HotRows(store, HotMemory(LAYOUT, 20))
        slots = hot.acquire([user, b"other"]).slots
        hot.memory.slab[slots] = rows_for([user, b"other"], 0)
        hot.write(slots, 1, 0)
        ring = hot.memory.rows["ring"][slots[0]].tobytes()
        hot.forget([user])
        assert ring in hot.memory.slab.tobytes()
        erase_user(store, user, 0, hot=hot)
        assert ring not in hot.memory.slab.tobytes()
        assert user not in hot.memory.users
        assert hot.acquire([user, b"other"]).unknown.tolist() == [0]


def test_a_processor_starts_an_erased_user_anew_and_never_applies_old_events_again(tmp_path):
    stream = random_stream(200, 6)
    with Processor(
        small_model(), lambda p, layout: RocksUserStore(tmp_path / str(p), layout), StateSettings(ring=4)
    ) as w:
        w.process(0, stream.take(slice(0, 150)))
        before = {user: row.tobytes() for user, row in w.store(0).iterate()}
        assert w.erase(0, "u3").found
        again = w.process(0, stream.take(slice(0, 150)))
        assert not again.applied.any()
        assert {user: row.tobytes() for user, row in w.store(0).iterate()} == {
            user: row for user, row in before.items() if user != b"u3"
        }
        w.process(0, stream.take(slice(150, 200)))
        row = w.layout.rows(w.store(0).get_many([b"u3"])[0])[0]
        progress = w.store(0).progress()
    later = int((stream.user[150:] == stream.user_ids.index("u3")).sum())
    assert row["events"] == later > 0
    assert (progress.users, progress.events) == (6, 200 - (stream.user == stream.user_ids.index("u3")).sum() + later)


def test_a_processor_hands_the_tombstone_to_its_outbox():
    told, layout = [], RowLayout("full", 5, 4, 4)
    store = MemoryUserStore(layout)
    outbox = live(store).log
    work = Processor(small_model(), lambda *_: store, StateSettings(ring=4), log=lambda *_: outbox)
    work.process(0, Interactions.from_columns(["a", "b"], ["i0", "i1"], [1, 0], [1, 2]))
    tell = teller(HotRows(store, HotMemory(layout, 1), outbox), told)
    assert work.erase(0, "a", tell) == Removal(0, True, 1, work.layout.row_bytes, 1, 0)
    assert [sorted(one.rows.items())[0] for one in told] == [(b"a", None)]
    assert [user for user, _ in work.store(0).iterate()] == [b"b"]


# --- a whole directory, snapshots


def test_all_partitions_and_the_named_snapshots_lose_the_user(tmp_path):
    user, state = NAME.encode(), tmp_path / "state"
    rings = [ring for number in (0, 3) for ring in filled(state / f"partition-{number}", user)]
    with RocksUserStore(state / "partition-4", LAYOUT) as store:
        store.write_batch([b"x"], rows_for([b"x"], 0), Progress(9, 2, 1, 3))
    taken = str(tmp_path / "snap")
    snapshot(state, taken)
    assert traces(tmp_path, user, rings)
    receipt = erase_from_directory(state, user, [taken])
    assert traces(tmp_path, user, rings) == []
    assert [(part.partition, part.found, part.events) for part in receipt.partitions] == [
        (0, True, 6), (3, True, 6), (4, False, 0),
    ]  # fmt: skip
    assert [(each.url, [part.found for part in each.partitions]) for each in receipt.snapshots] == [
        (taken, [True, True, False])
    ]
    assert (receipt.offset(0), receipt.offset(4), receipt.offset(1)) == (3, 9, None)
    searched = verify_receipt_in_snapshots("r", receipt)
    assert searched.sound
    assert [note.split(";")[1] for note in searched.notes] == [
        f" 2,000 ids of partition 0 of the snapshot {taken} were searched",
        f" 2,000 ids of partition 3 of the snapshot {taken} were searched",
        f" 1 ids of partition 4 of the snapshot {taken} were searched",
    ]


def test_a_snapshot_with_the_user_in_it_is_found_and_one_that_is_gone_is_noted(tmp_path):
    user = NAME.encode()
    filled(tmp_path / "state" / "partition-0", user)
    taken = str(tmp_path / "snap")
    snapshot(tmp_path / "state", taken)
    removed = [Removal(0, True, 6, 1, 3, 0)]
    receipt = Receipt.of(user, removed, {taken: removed, str(tmp_path / "none"): removed}, published=False)
    searched = verify_receipt_in_snapshots("r", receipt)
    assert [finding.user for finding in searched.findings] == [user]
    assert f"the snapshot {tmp_path}/none was not searched" in searched.notes[-1]
    assert [part.found for part in erase_from_snapshot(taken, user)] == [True]
    assert verify_receipt_in_snapshots("r", receipt).sound


def test_a_store_that_somebody_writes_to_is_not_touched(tmp_path):
    user = NAME.encode()
    filled(tmp_path / "partition-0", user)
    script = (
        "import sys, time; from pathlib import Path; from learner.user_state import RowLayout; "
        "from state.store import RocksUserStore; "
        f"store = RocksUserStore(Path({str(tmp_path / 'partition-0')!r}), RowLayout('full', 3, 0, 6)); "
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as worker:
        assert worker.stdout.readline() == b"open\n"
        with pytest.raises(
            StoreLocked, match=rf"process {worker.pid}.*stop that one first.*an erasure needs the store"
        ):
            erase_from_directory(tmp_path, user)
        worker.stdin.close()
    assert erase_from_directory(tmp_path, user).partitions[0].found


# --- the receipt


@pytest.fixture
def receipt() -> Receipt:
    return Receipt.of(
        b"ann", [Removal(0, True, 6, 100, 3, 0)], {"s3://x/y": [Removal(0, False, 0, 0, 1, 0)]}, published=True
    )


def test_a_receipt_is_read_back_and_names_its_user_and_no_other(tmp_path, receipt):
    write_receipt(tmp_path / "r.json", receipt)
    back = read_receipt(tmp_path / "r.json")
    assert back == receipt
    assert back.names(b"ann")
    assert not back.names(b"bob")
    assert back.beyond_reach == BEYOND_REACH
    assert any("initialization" in matter for matter in back.beyond_reach)


def test_a_receipt_never_holds_the_id_and_two_of_a_user_have_nothing_in_common():
    one, two = (Receipt.of(NAME.encode(), [], {}, published=False) for _ in range(2))
    assert NAME not in json.dumps(one.as_dict())
    assert one.salt != two.salt
    assert one.id_sha256 != two.id_sha256


def test_a_receipt_is_never_overwritten(tmp_path, receipt):
    write_receipt(tmp_path / "r.json", receipt)
    with pytest.raises(FileExistsError):
        write_receipt(tmp_path / "r.json", receipt)


@pytest.mark.parametrize(
    ("field", "value"),
    [("erased_at_ms", 5), ("salt", "00" * 16), ("id_sha256", "00" * 32), ("partitions", []), ("snapshots", []),
     ("tombstone_published", False), ("beyond_reach", []), ("sha256", "00" * 32)],
)  # fmt: skip
def test_a_changed_receipt_is_refused(tmp_path, receipt, field, value):
    (tmp_path / "r.json").write_text(json.dumps(receipt.as_dict() | {field: value}))
    with pytest.raises(ReceiptError, match=r"r\.json was changed since it was written: use the original"):
        read_receipt(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "is no receipt of an erasure"), ("{}", "missing required field"), ("[1]", "is no receipt"),
     ('{"more": 1}', "is no receipt")],
)  # fmt: skip
def test_what_is_no_receipt_is_refused(tmp_path, content, says):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ReceiptError, match=says):
        read_receipt(tmp_path / "r.json")


def test_a_receipt_that_is_not_there_of_another_version_or_with_a_bad_salt_is_refused(tmp_path, receipt):
    with pytest.raises(ReceiptError, match="No such file"):
        read_receipt(tmp_path / "none.json")
    (tmp_path / "r.json").write_text(json.dumps(receipt.as_dict() | {"version": 9}))
    with pytest.raises(ReceiptError, match="of version 9, this program reads"):
        read_receipt(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps(receipt.as_dict() | {"salt": "no hex"}))
    with pytest.raises(ReceiptError, match="is no receipt"):
        read_receipt(tmp_path / "r.json")


def test_a_user_who_came_back_is_found_by_the_receipt(tmp_path):
    filled(tmp_path / "s", NAME.encode())
    receipt = Receipt.of(NAME.encode(), [Removal(0, True, 6, 1, 3, 0)], {}, published=False)
    result = verify_store(tmp_path / "s", receipts={"r.json": receipt})
    assert [(finding.kind, finding.user) for finding in result.findings] == [("erased", NAME.encode())]
    assert re.fullmatch(r"the user of receipt r\.json is in the store: '.*'", result.findings[0].text)


def test_a_receipts_directory_is_made(tmp_path):
    receipt = Receipt.of(b"ann", [], {}, published=False)
    write_receipt(tmp_path / "new" / "r.json", receipt)
    assert read_receipt(tmp_path / "new" / "r.json") == receipt
