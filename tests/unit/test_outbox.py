"""What of a partition's commits waits to be told: in the store, in memory, and in bytes."""

from __future__ import annotations

import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.user_state import RowLayout
from state import codec
from state.changelog import Record
from state.codec import Progress
from state.exceptions import StoreDamaged, StoreWriteFailed
from state.keys import LAYOUT_KEY, OWN, OWNER_KEY, PROGRESS_KEY, RESERVED, STANDING_KEY, user_key
from state.memory_store import MemoryUserStore
from state.outbox import Outbox, Publication, commit, entries, entry_key, records, standing
from state.outbox_codec import SESSION_BYTES, Entry, Owner, Standing, encode_entry
from state.store import RocksReader, RocksUserStore, UserStore

LAYOUT = RowLayout("gradient", 2, 0, 0)
SESSION = bytes(range(SESSION_BYTES))
EMPTY = np.zeros((0, LAYOUT.row_bytes), np.uint8)


def rows_for(users: list[bytes], fill: int) -> np.ndarray:
    slab = np.full((len(users), LAYOUT.row_bytes), fill, np.uint8)
    LAYOUT.rows(slab)["last_offset"] = fill
    return slab


def values_of(users: list[bytes], fill: int) -> list[bytes]:
    return codec.encode(LAYOUT, users, rows_for(users, fill))


def claimed(store: UserStore, position: int = 0) -> UserStore:
    store.write_batch([], EMPTY, None, own={STANDING_KEY: Standing(SESSION, position, 7).encode()})
    return store


@pytest.fixture
def store() -> UserStore:
    return claimed(MemoryUserStore(LAYOUT))


def write(store: UserStore, outbox: Outbox, users: list[bytes], offset: int, **more) -> None:
    commit(store, outbox, users, rows_for(users, offset), Progress(offset, 0), **more)


# --- the store's own keys


@pytest.fixture(params=["memory", "rocks"])
def any_store(request, tmp_path):
    with MemoryUserStore(LAYOUT) if request.param == "memory" else RocksUserStore(tmp_path / "s", LAYOUT) as store:
        yield store


def test_own_keys_are_written_and_taken_out_in_one_step_with_the_rows(any_store):
    values = any_store.write_batch(
        [b"b", b"a"], rows_for([b"b", b"a"], 3), Progress(3, 0), own={OWN + b"y": b"2", OWN + b"x": b"1"}
    )
    assert values == values_of([b"b", b"a"], 3)
    assert any_store.own() == [(OWN + b"x", b"1"), (OWN + b"y", b"2")]
    assert any_store.own(OWN + b"y") == [(OWN + b"y", b"2")]
    any_store.write_batch([], EMPTY, None, own={OWN + b"x": None, OWN + b"nothing": None})
    assert any_store.own() == [(OWN + b"y", b"2")]
    assert [user for user, _ in any_store.iterate()] == [b"a", b"b"]


@pytest.mark.parametrize("key", [*sorted(RESERVED), user_key(b"a"), b""])
def test_a_key_that_is_not_for_others_to_write_is_refused_and_nothing_of_the_batch_counts(any_store, key):
    for value in (b"x", None):
        with pytest.raises(ValueError, match="none of the keys that may be written along with a batch"):
            any_store.write_batch([b"a"], rows_for([b"a"], 1), Progress(1, 0), own={key: value})
        with pytest.raises(ValueError, match="none of the keys"):
            any_store.end_restore(Progress(1, 0), {key: value})
    assert (list(any_store.iterate()), any_store.progress()) == ([], None)


def test_own_keys_are_no_users(any_store):
    any_store.write_batch([b"a"], rows_for([b"a"], 1), None, own={entry_key(k): b"x" for k in range(50)})
    assert any_store.approximate_count() == 1
    assert [user for user, _ in any_store.iterate()] == [b"a"]


def test_a_restore_that_empties_takes_them_out_and_its_end_puts_others(any_store):
    any_store.write_batch([], EMPTY, Progress(1, 0), own={OWN + b"x": b"1"})
    any_store.begin_restore(empty=True)
    assert any_store.own() == []
    any_store.end_restore(Progress(2, 0), {OWN + b"y": b"2"})
    assert (any_store.own(), any_store.progress(), any_store.restoring()) == (
        [(OWN + b"y", b"2")], Progress(2, 0), False,
    )  # fmt: skip


def test_a_restore_that_does_not_empty_leaves_them(any_store):
    any_store.write_batch([], EMPTY, Progress(1, 0), own={OWN + b"x": b"1"})
    any_store.begin_restore(empty=False)
    assert any_store.own() == [(OWN + b"x", b"1")]


def test_they_are_there_after_a_crash_and_for_a_reader(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        claimed(store, 12)
        with RocksReader(tmp_path / "s") as reader:
            assert standing(reader) == Standing(SESSION, 12, 7)
        store.checkpoint(tmp_path / "copy")
    with RocksUserStore(tmp_path / "copy", LAYOUT) as copy:
        assert standing(copy) == Standing(SESSION, 12, 7)


# --- commits


def test_a_commit_leaves_an_entry_in_the_step_that_writes_its_rows(store):
    outbox = Outbox(store, SESSION)
    write(store, outbox, [b"a", b"b"], 5, deleted=[b"c"], payload=b"said")
    assert entries(store) == (Entry(1, (b"a", b"b"), (b"c",), b"said"),)
    assert outbox.pending_commits == 1
    assert outbox.pending_bytes == 3 + 2 * LAYOUT.row_bytes + 4


def test_a_refused_commit_leaves_nothing_and_is_not_told(store):
    outbox = Outbox(store, SESSION)
    with pytest.raises(ValueError, match="2 users and rows"):
        commit(store, outbox, [b"a", b"b"], rows_for([b"a"], 1), Progress(1, 0))
    assert (entries(store), outbox.take(1)) == ((), None)
    write(store, outbox, [b"a"], 1)
    assert outbox.take(1).rows == dict(zip([b"a"], values_of([b"a"], 1), strict=True))


@pytest.mark.parametrize("settled_by", ["settle", "next commit", "trim"])
def test_a_commit_that_failed_and_was_written_all_the_same_is_told(settled_by):
    class Lying(MemoryUserStore):
        lies = False

        def write_batch(self, *batch, **more):
            values = super().write_batch(*batch, **more)
            if self.lies:
                self.lies = False
                raise StoreWriteFailed("refused")
            return values

    store = claimed(Lying(LAYOUT))
    outbox = Outbox(store, SESSION)
    store.lies = True
    with pytest.raises(StoreWriteFailed):
        write(store, outbox, [b"a"], 1, payload=b"one")
    if settled_by == "next commit":
        write(store, outbox, [b"b"], 2, payload=b"two")
    else:
        getattr(outbox, settled_by)()
    told = outbox.take(1 << 20)
    assert told.rows[b"a"] == values_of([b"a"], 1)[0]
    assert told.payloads == ((b"one", b"two") if settled_by == "next commit" else (b"one",))
    assert told.progress == store.progress()
    outbox.acknowledged(told.sequence, 9)
    outbox.trim()
    assert entries(store) == ()


# --- telling


def test_commits_are_told_together_the_latest_of_each_user(store):
    outbox = Outbox(store, SESSION)
    write(store, outbox, [b"a", b"b"], 1, payload=b"one")
    write(store, outbox, [b"b", b"c"], 2)
    write(store, outbox, [b"d"], 3, deleted=[b"a"], payload=b"three")
    (b, c), (d,) = values_of([b"b", b"c"], 2), values_of([b"d"], 3)
    assert outbox.take(1 << 20) == Publication(
        {b"a": None, b"b": b, b"c": c, b"d": d}, (b"one", b"three"), Progress(3, 0), 3
    )
    assert outbox.take(1 << 20) is None


def test_a_user_who_comes_back_after_a_tombstone_is_told(store):
    outbox = Outbox(store, SESSION)
    write(store, outbox, [], 1, deleted=[b"a"])
    write(store, outbox, [b"a"], 2)
    assert outbox.take(1 << 20).rows == {b"a": values_of([b"a"], 2)[0]}


def test_as_many_whole_commits_as_fit_are_taken_and_one_at_least(store):
    outbox = Outbox(store, SESSION)
    for offset in range(4):
        write(store, outbox, [b"a"], offset)
    size = 1 + LAYOUT.row_bytes
    assert [outbox.take(most).sequence for most in (2 * size, 0, 2 * size - 1)] == [2, 3, 4]


def test_a_commit_without_rows_is_told_by_its_marker(store):
    outbox = Outbox(store, SESSION)
    write(store, outbox, [], 8)
    assert outbox.take(0) == Publication({}, (), Progress(8, 0), 1)


def test_the_records_of_a_publication_end_with_who_told_it_and_how_far_it_is():
    told = Publication({b"a": b"row", b"b": None}, (b"elsewhere",), Progress(4, 1), 17)
    assert list(records(told, LAYOUT, SESSION)) == [
        Record(user_key(b"a"), b"row"),
        Record(user_key(b"b"), None),
        Record(LAYOUT_KEY, LAYOUT.fingerprint.encode()),
        Record(OWNER_KEY, Owner(SESSION, 17).encode()),
        Record(PROGRESS_KEY, Progress(4, 1).encode()),
    ]


def test_a_publication_of_a_store_that_has_applied_nothing_has_no_marker(store):
    outbox = Outbox(store, SESSION)
    commit(store, outbox, [], EMPTY, None, deleted=[b"a"])
    told = list(records(outbox.take(0), LAYOUT, SESSION))
    assert [record.key for record in told] == [user_key(b"a"), LAYOUT_KEY, OWNER_KEY]


# --- acknowledgement


def test_the_commit_after_an_acknowledgement_takes_the_entries_out_and_moves_the_standing(store, monkeypatch):
    monkeypatch.setattr("state.outbox._now_ms", lambda: 1234)
    outbox = Outbox(store, SESSION)
    for offset in (1, 2):
        write(store, outbox, [b"a"], offset)
    told = outbox.take(1 << 20)
    write(store, outbox, [b"a"], 3)
    outbox.acknowledged(told.sequence, 40)
    assert (outbox.pending_commits, outbox.pending_bytes) == (1, 1 + LAYOUT.row_bytes)
    assert [entry.sequence for entry in entries(store)] == [1, 2, 3]
    write(store, outbox, [b"b"], 4)
    assert [entry.sequence for entry in entries(store)] == [3, 4]
    assert standing(store) == Standing(SESSION, 40, 1234)


def test_the_standing_is_known_from_when_a_publication_was_taken_not_acknowledged(store, monkeypatch):
    times = iter([100, 200])
    monkeypatch.setattr("state.outbox._now_ms", lambda: next(times))
    outbox = Outbox(store, SESSION)
    write(store, outbox, [b"a"], 1)
    first = outbox.take(1)
    write(store, outbox, [b"a"], 2)
    outbox.take(1)
    outbox.acknowledged(first.sequence, 40)
    outbox.trim()
    assert standing(store) == Standing(SESSION, 40, 100)
    assert [entry.sequence for entry in entries(store)] == [2]


def test_an_acknowledgement_of_what_was_not_taken_is_refused(store):
    outbox = Outbox(store, SESSION)
    for offset in (1, 2):
        write(store, outbox, [b"a"], offset)
    outbox.take(1 << 20)
    for sequence in (0, 1, 3):
        with pytest.raises(ValueError, match=f"ends with commit {sequence} waits"):
            outbox.acknowledged(sequence, 4)
    outbox.acknowledged(2, 4)
    with pytest.raises(ValueError, match="ends with commit 2 waits"):
        outbox.acknowledged(2, 4)


def test_a_trim_without_anything_acknowledged_writes_nothing(store):
    outbox = Outbox(store, SESSION)
    write(store, outbox, [b"a"], 1)
    before = store.own()
    store.write_batch = None  # any write would fail
    outbox.trim()
    assert store.own() == before


def test_one_thread_may_commit_while_another_tells(store):
    outbox, told = Outbox(store, SESSION), []
    commits = 300
    done = threading.Event()

    def tell() -> None:
        while not done.is_set() or outbox.pending_commits:
            if publication := outbox.take(100):
                told.append(publication)
                outbox.acknowledged(publication.sequence, publication.sequence)

    teller = threading.Thread(target=tell)
    teller.start()
    for offset in range(commits):
        write(store, outbox, [b"%d" % (offset % 7)], offset % 128, payload=b"%d" % offset)
    done.set()
    teller.join(30)
    assert not teller.is_alive()
    assert [payload for one in told for payload in one.payloads] == [b"%d" % offset for offset in range(commits)]
    assert (outbox.pending_commits, outbox.pending_bytes) == (0, 0)
    outbox.trim()
    assert (entries(store), standing(store).position) == ((), commits)


# --- opened again


def test_what_was_found_is_told_as_one_with_the_rows_as_they_are_now(store):
    outbox = Outbox(store, SESSION)
    write(store, outbox, [b"a", b"b"], 1, payload=b"one")
    write(store, outbox, [b"a"], 2, deleted=[b"b", b"c"], payload=b"two")
    again = Outbox(store, SESSION)
    assert again.pending_commits == 1
    (a,) = values_of([b"a"], 2)
    assert again.take(0) == Publication({b"a": a, b"b": None, b"c": None}, (b"one", b"two"), Progress(2, 0), 2)
    write(store, again, [b"d"], 3)
    assert [entry.sequence for entry in entries(store)] == [1, 2, 3]
    again.acknowledged(2, 30)
    again.trim()
    assert [entry.sequence for entry in entries(store)] == [3]


def test_a_store_that_is_not_this_sessions_has_no_outbox(store):
    for other in (store, MemoryUserStore(LAYOUT)):
        with pytest.raises(ValueError, match="bring_together comes before an outbox"):
            Outbox(other, bytes(SESSION_BYTES))


def test_a_damaged_entry_or_standing_says_so(store):
    store.write_batch([], EMPTY, None, own={entry_key(3): b"damaged", STANDING_KEY: b""})
    with pytest.raises(StoreDamaged, match="entry 3 of the outbox has 7 bytes: remove the store"):
        entries(store)
    with pytest.raises(StoreDamaged, match="the standing has 0 bytes: remove the store"):
        standing(store)


# --- bytes

GOLDEN = {
    "standing": (
        Standing(SESSION, 41, 1_700_000_000_123),
        ("01000000699c4b1c000102030405060708090a0b0c0d0e0f29000000000000007b68e5cf8b010000"),
    ),
    "owner": (Owner(SESSION, 7), ("010000005fd6c106000102030405060708090a0b0c0d0e0f0700000000000000")),
    "entry": (
        Entry(9, (b"ann", b""), (b"bob",), b"payload"),
        ("01000000fea60b190200000001000000030000000000000003000000616e6e626f627061796c6f6164"),
    ),
}


def packed(one: Standing | Owner | Entry) -> bytes:
    return encode_entry(one.users, one.deleted, one.payload) if isinstance(one, Entry) else one.encode()


def unpacked(like: Standing | Owner | Entry, content: bytes) -> Standing | Owner | Entry:
    return Entry.decode(like.sequence, content) if isinstance(like, Entry) else type(like).decode(content)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_bytes_of_this_version(name):
    one, expected = GOLDEN[name]
    assert packed(one).hex() == expected
    assert unpacked(one, bytes.fromhex(expected)) == one


@pytest.mark.parametrize("name", GOLDEN)
def test_every_flipped_bit_and_every_other_length_is_found(name):
    one, _ = GOLDEN[name]
    content = packed(one)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=rf"the {name}|{name} 9"):
            unpacked(one, bytes(flipped))
    for length in range(len(content)):
        with pytest.raises(ValueError, match=rf"the {name}|{name} 9"):
            unpacked(one, content[:length])
    with pytest.raises(ValueError, match="fails its checksum"):
        unpacked(one, content + b"\0")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "has 8 bytes"),
        (struct.pack("<II", 2, 1) + bytes(8), "ends within the lengths of its 3 ids"),
        (struct.pack("<IIII", 1, 1, 2, 3) + b"abcd", "ends within its ids"),
    ],
)
def test_an_entry_that_says_more_than_it_has_is_refused(body, message):
    with pytest.raises(ValueError, match=f"entry 1 of the outbox {message}"):
        Entry.decode(1, struct.pack("<II", 1, zlib.crc32(body)) + body)


@pytest.mark.parametrize("kind", [Standing, Owner])
def test_a_standing_or_owner_of_another_width_is_refused(kind):
    body = bytes(5)
    with pytest.raises(ValueError, match="has 13 bytes, not"):
        kind.decode(struct.pack("<II", 1, zlib.crc32(body)) + body)


def test_a_session_of_another_length_is_refused():
    for one in (Standing(b"short", 0, 0), Owner(b"short", 0)):
        with pytest.raises(ValueError, match="a session has 16 bytes, not 5"):
            one.encode()


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.binary(max_size=5), max_size=4), st.binary())
def test_any_entry_comes_back(users, deleted, payload):
    assert Entry.decode(3, encode_entry(users, deleted, payload)) == Entry(3, tuple(users), tuple(deleted), payload)
