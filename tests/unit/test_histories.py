"""The history reservoir: its bytes, what of it goes and when, samples, and how stores keep it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from learner.features import SparseRows
from learner.histories import Histories, starts_of
from learner.interactions import Interactions
from state.codec import Progress, owner
from state.exceptions import StoreClosed, StoreDamaged, StoreWriteFailed
from state.histories import HistoryBook, HistoryLimits, without_users
from state.history_codec import ALL_USERS, Book, Head, decode_chunks, encode_chunks
from state.hot_rows import HotMemory, HotRows
from state.keys import first_stem, history_stem
from state.memory_store import MemoryUserStore
from state.store import RocksReader, RocksUserStore
from tests.histories import PLENTY, Keeper, counted, expected, layout_of, random_stream, recounted
from tests.states import visits

LAYOUT = layout_of(32)
NO_ROWS = np.zeros((0, LAYOUT.row_bytes), np.uint8)


@pytest.fixture(params=["memory", "rocks"])
def store(request, tmp_path):
    with MemoryUserStore(LAYOUT) if request.param == "memory" else RocksUserStore(tmp_path / "s", LAYOUT) as opened:
        yield opened


def row_of(users: int = 1) -> np.ndarray:
    return np.ones((users, LAYOUT.row_bytes), np.uint8)


def keys_of(store) -> list[bytes]:
    cursor = store.history_cursor()
    keys, entry = [], cursor.seek(b"")
    while entry is not None:
        keys.append(entry[0])
        entry = cursor.next()
    cursor.close()
    return keys


# --- the arrays


def packed(*lengths: int) -> Histories:
    events = sum(lengths)
    return Histories(
        starts_of(np.array(lengths)), np.arange(events, dtype=np.uint64), np.arange(events).astype(np.int8) % 2,
        np.arange(events, dtype=np.int32) % 5, 10 * np.arange(len(lengths)),
        SparseRows(starts_of(np.arange(len(lengths))), np.arange(sum(range(len(lengths)))),
                   np.ones(sum(range(len(lengths))), np.float32)),
    )  # fmt: skip


def test_users_are_taken_in_any_order_and_more_than_once():
    taken = packed(2, 0, 3).take(np.array([2, 0, 2]))
    assert taken.item.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert (taken.lengths.tolist(), taken.first.tolist(), len(taken), taken.events) == ([3, 2, 3], [20, 0, 20], 3, 8)
    assert taken.features.starts.tolist() == [0, 2, 2, 4]
    assert taken.features.columns.tolist() == [1, 2, 1, 2]


def test_a_cut_keeps_a_part_of_each_and_counts_on():
    cut = packed(2, 0, 3).cut(np.array([1, 0, 0]), np.array([2, 0, 2]))
    assert (cut.item.tolist(), cut.lengths.tolist(), cut.first.tolist()) == ([1, 2, 3], [1, 0, 2], [1, 10, 20])
    assert (cut.label.tolist(), cut.grade.tolist()) == ([1, 0, 1], [1, 2, 3])


@pytest.mark.parametrize(("first", "last"), [(0, 3), (-1, 1), (2, 1)])
def test_a_cut_outside_of_what_there_is_is_refused(first, last):
    with pytest.raises(ValueError, match=rf"user 0 has 2 events here, {first}:{last} is no part of them"):
        packed(2).cut(np.array([first]), np.array([last]))


def test_parts_are_joined_in_order():
    joined = Histories.concatenate([packed(2, 1), Histories.empty(), packed(3)])
    assert (joined.item.tolist(), joined.lengths.tolist()) == ([0, 1, 2, 0, 1, 2], [2, 1, 3])
    assert joined.features.starts.tolist() == [0, 0, 1, 1]
    assert len(Histories.concatenate([])) == Histories.empty().events == 0


def test_arrays_that_do_not_fit_together_are_refused():
    good = packed(2, 1)
    with pytest.raises(ValueError, match="starts end at 3 events, but the columns hold 2"):
        Histories(good.starts, good.item[:2], good.label, good.grade, good.first, good.features)
    with pytest.raises(ValueError, match="histories of 2 users, but first is of 1"):
        Histories(good.starts, good.item, good.label, good.grade, good.first[:1], good.features)


# --- bytes


BOOK = Book(1 << 31, 41, 2, 67, 5, 4096)
BOOK_BYTES = (
    "d9e2fb0c" "0100" "0000" "0000008000000000" "2900000000000000" "0200000000000000" "4300000000000000"
    "0500000000000000" "0010000000000000"
)  # fmt: skip
HEAD = Head(b"ann", np.array([3, 70_000]), np.array([1, -0.5], np.float32))
HEAD_BYTES = "e25605dd01000000030000000200000003000000701101000000803f000000bf616e6e"
CHUNK_BYTES = "b508d6820100020020000007000000002100000700000000"
"""Of version 1: whoever changes them raises it and writes the way up"""


def test_todays_bytes_are_the_golden_ones():
    assert history_stem(b"ann").hex() == "68e72072738d3adf6abf23f3a5"
    assert BOOK.encode().hex() == BOOK_BYTES
    assert HEAD.encode().hex() == HEAD_BYTES
    entries = np.arange(34, dtype=np.uint64) + np.uint64(7 << 24)
    user, chunks = encode_chunks(np.array([34]), np.zeros(34, np.int64), np.arange(34), entries)
    assert user.tolist() == [0, 0]
    assert [len(chunk) for chunk in chunks] == [264, 24]
    assert chunks[1].hex() == CHUNK_BYTES


def test_golden_bytes_are_read_back():
    assert Book.decode(bytes.fromhex(BOOK_BYTES)) == BOOK
    head = Head.decode(bytes.fromhex(HEAD_BYTES))
    assert (head.user, head.columns.tolist(), head.weights.tolist()) == (b"ann", [3, 70_000], [1, -0.5])
    lengths, entries = decode_chunks([bytes.fromhex(CHUNK_BYTES)])
    assert (lengths.tolist(), entries.tolist()) == ([2], [(7 << 24) + 32, (7 << 24) + 33])


@pytest.mark.parametrize("decode", [Book.decode, Head.decode, lambda packed: decode_chunks([packed])])
@pytest.mark.parametrize("golden", [BOOK_BYTES, HEAD_BYTES, CHUNK_BYTES])
def test_no_flipped_bit_and_no_missing_byte_goes_unseen(decode, golden):
    whole = bytes.fromhex(golden)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"histor"):
            decode(bytes(damaged))
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"histor"):
            decode(whole[:length])


def test_a_newer_version_says_so():
    import struct
    import zlib

    body = struct.pack("<HH", 2, 0) + bytes(48)
    with pytest.raises(ValueError, match="the record of the histories is of version 2, this program reads 1"):
        Book.decode(struct.pack("<I", zlib.crc32(body)) + body)


# --- stores


def test_histories_are_written_with_the_rows_and_read_back(store):
    store.write_batch([b"a"], row_of(), Progress(4, 0), histories={b"h": b"book", b"hb": b"2", b"ha": b"1"})
    assert store.histories([b"ha", b"nothing", b"hb"]) == [b"1", None, b"2"]
    store.write_batch([], NO_ROWS, None, histories={b"ha": None, b"hz": None})
    assert keys_of(store) == [b"h", b"hb"]
    assert [user for user, _ in store.iterate()] == [b"a"]
    assert store.own() == []


def test_what_is_no_history_is_refused_and_nothing_is_written(store):
    with pytest.raises(ValueError, match="b'ua' is no key of a history"):
        store.write_batch([b"a"], row_of(), Progress(1, 0), histories={b"ua": b"x"})
    with pytest.raises(ValueError, match="b'm' is no key of a history"):
        store.cut_histories(b"h", {b"m": b"x"})
    assert (store.progress(), list(store.iterate())) == (None, [])


def test_the_end_of_a_range_goes_and_what_is_put_stays(store):
    store.write_batch([], NO_ROWS, Progress(1, 0), histories={b"h" + bytes([k]): b"x" for k in range(9)})
    store.cut_histories(b"h\5", {b"h": b"book"})
    assert keys_of(store) == [b"h", b"h\0", b"h\1", b"h\2", b"h\3", b"h\4"]
    assert store.progress() == Progress(1, 0)
    store.cut_histories(b"")
    assert keys_of(store) == []
    assert store.progress() == Progress(1, 0)


@pytest.mark.parametrize(("users", "deleted"), [([b"a"], ()), ([], (b"a",))])
def test_rows_or_deletions_without_the_book_drop_all_histories(store, users, deleted):
    store.write_batch([b"a"], row_of(), Progress(1, 0), histories={b"h": b"book", b"ha": b"1"})
    store.write_batch([], NO_ROWS, Progress(2, 0))
    assert keys_of(store) == [b"h", b"ha"]
    store.write_batch(users, row_of(len(users)), Progress(3, 0), deleted=deleted)
    assert keys_of(store) == []


def test_rows_without_the_book_drop_histories_after_an_open_and_cost_nothing_where_there_are_none(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        store.write_batch([b"a"], row_of(), Progress(1, 0), histories={b"h": b"book", b"ha": b"1"})
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        store.write_batch([b"a"], row_of(), Progress(2, 0))
        assert keys_of(store) == []
    with RocksUserStore(tmp_path / "t", LAYOUT) as store:
        for k in range(3):
            store.write_batch([b"a"], row_of(), Progress(k, 0))
        assert range_deletions(store) == 0
        store.write_batch([], NO_ROWS, None, histories={b"h": b"book"})
        for k in range(3):
            store.write_batch([b"a"], row_of(), Progress(k, 0))
            assert range_deletions(store) == 1


def test_histories_that_a_failed_write_did_not_drop_are_dropped_by_the_next(tmp_path, monkeypatch):
    write = RocksUserStore._write

    def fail(store, batch):
        monkeypatch.setattr(RocksUserStore, "_write", write)
        store._failed = True
        raise StoreWriteFailed("no space")

    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        store.write_batch([b"a"], row_of(), Progress(1, 0), histories={b"h": b"book", b"ha": b"1"})
        monkeypatch.setattr(RocksUserStore, "_write", fail)
        with pytest.raises(StoreWriteFailed):
            store.write_batch([b"a"], row_of(), Progress(2, 0))
        assert keys_of(store) == [b"h", b"ha"]
        store.write_batch([b"a"], row_of(), Progress(2, 0))
        assert keys_of(store) == []


def range_deletions(store: RocksUserStore) -> int:
    store._open_db().flush()
    said = store._open_db().property_value("rocksdb.aggregated-table-properties")
    found = re.search(r"range deletions ?= ?(\d+)", said or "")
    assert found is not None, said
    return int(found[1])


@pytest.mark.parametrize("empty", [True, False])
def test_a_restore_that_empties_the_store_takes_the_histories_too(store, empty):
    store.write_batch([b"a"], row_of(), Progress(1, 0), histories={b"h": b"book", b"ha": b"1"})
    store.begin_restore(empty=empty)
    assert keys_of(store) == ([] if empty else [b"h", b"ha"])
    store.end_restore(Progress(1, 0))
    store.write_batch([], NO_ROWS, None, histories={b"hb": b"1"})
    assert keys_of(store)[-1] == b"hb"


def test_a_cursor_sees_what_was_there_and_ends_with_the_store(store):
    store.write_batch([], NO_ROWS, None, histories={b"hb": b"2", b"ha": b"1", b"hc": b"3"})
    cursor = store.history_cursor()
    store.write_batch([], NO_ROWS, None, histories={b"hb": None, b"ha": b"new", b"haa": b"x"})
    assert cursor.seek(b"h") == (b"ha", b"1")
    assert cursor.next() == (b"hb", b"2")
    assert cursor.seek(b"hbb") == (b"hc", b"3")
    assert (cursor.next(), cursor.next(), cursor.seek(b"i")) == (None, None, None)
    other = store.history_cursor()
    assert (other.seek(b"ha"), other.next(), other.next()) == ((b"ha", b"new"), (b"haa", b"x"), (b"hc", b"3"))
    other.close()
    for _ in range(2):
        with pytest.raises(StoreClosed):
            other.next()
    store.close()
    with pytest.raises(StoreClosed):
        cursor.seek(b"h")


def test_an_open_cursor_and_walk_do_not_keep_a_closed_store_locked(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        keeper = Keeper(store).commits(random_stream(300, 5), [])
        cursor, walk = store.history_cursor(), keeper.book.walk()
        assert cursor.seek(b"h") is not None
        next(walk)
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        assert len(keys_of(store)) > 5
    with pytest.raises(StoreClosed):
        next(walk)


def test_a_key_that_came_back_is_seen_once(store):
    for value in (b"1", None, b"2"):
        store.write_batch([], NO_ROWS, None, histories={b"ha": value})
        if value == b"1":
            store.history_cursor().close()  # it puts the keys in order
    assert keys_of(store) == [b"ha"]


def test_a_reader_beside_the_writer_reads_histories(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        keeper = Keeper(store).commits(random_stream(300, 5), [100])
        with RocksReader(tmp_path / "s") as reader:
            assert keys_of(reader) == list(keeper.contents())
            assert reader.approximate_count() == store.approximate_count() >= 5


def test_users_are_counted_without_what_is_kept_of_their_histories(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        Keeper(store).commits(random_stream(300, 5), [])
        assert store.approximate_count() == 5


# --- the book


def test_a_ring_that_is_shorter_than_a_chunk_is_refused():
    layout = layout_of(31)
    with pytest.raises(ValueError, match=r"rows keep 31 events, .* 32 .* set state\.ring to at least 32"):
        HistoryBook(MemoryUserStore(layout), layout, PLENTY, 5)


@pytest.mark.parametrize("limits", [(0, 100), (100, 31)])
def test_limits_that_keep_nothing_are_refused(limits):
    with pytest.raises(ValueError, match=r"meta\.histories\.events_per_user at least 32"):
        HistoryLimits(*limits)


def test_a_new_book_keeps_everybody_and_has_nothing(store):
    book = HistoryBook(store, LAYOUT, PLENTY, 5)
    assert book.keeps([b"a", b"b"]).tolist() == [True, True]
    assert book.counts() == Book(ALL_USERS, -1, 0, 0, 0, PLENTY.events_per_user)
    assert len(book.sample(np.random.default_rng(0), 4)) == 0
    assert list(book.walk()) == []
    assert (book.shrink(), keys_of(store)) == (0, [])


def test_histories_that_were_not_written_with_some_rows_begin_again(store):
    stream = visits("ann", 100)
    keeper = Keeper(store).commits(stream.take(slice(0, 40)), [])
    keeper.keep = False
    keeper.commit(stream.take(slice(40, 80)))
    assert keys_of(store) == []
    keeper.keep = True
    keeper.commit(stream.take(slice(80, 100)))
    ((user, _, history),) = keeper.book.walk()
    assert (user, history.first.tolist(), history.lengths.tolist()) == (b"ann", [64], [36])
    assert history.item.tolist() == expected(stream)[b"ann"][0][64:]
    histories, complete = keeper.book.read([b"ann"], np.array([100]))
    assert (histories.first.tolist(), histories.lengths.tolist(), complete.tolist()) == ([64], [36], [False])
    assert counted(keeper) == recounted(keeper) == (1, 36, 3)


def test_a_commit_that_the_store_refuses_changes_no_history(store):
    stream = random_stream(600, 5)
    keeper = Keeper(store).commits(stream.take(slice(0, 300)), [])
    before, write = keeper.contents(), type(store).write_batch

    def refuse(*batch, **more):
        raise StoreWriteFailed("no space")

    store.write_batch = refuse
    with pytest.raises(StoreWriteFailed):
        keeper.commit(stream.take(slice(300, 600)))
    assert keeper.contents() == before
    store.write_batch = lambda *batch, **more: write(store, *batch, **more)
    keeper.commit(stream.take(slice(200, 600)))  # rows skip what they have, and so do histories
    assert keeper.contents() == Keeper().commits(stream, []).contents()


def test_a_commit_of_nobody_who_is_kept_still_says_that_histories_are_kept():
    keeper = Keeper(limits=HistoryLimits(1, 32))
    keeper.commit(visits("ann", 3))
    assert keeper.book.shrink() == 1
    before = keeper.book.counts()
    assert before.threshold <= owner(b"ann") < 2 * before.threshold
    keeper.commit(visits("ann", 3, first_offset=100))
    assert keeper.book.counts() == before
    assert list(keeper.contents()) == [b"h"]
    assert keeper.book.keeps([b"ann"]).tolist() == [False]
    assert keeper.book.read([b"ann"], np.array([6]))[0].events == 0


def test_a_user_who_jumps_over_whole_chunks_in_one_commit_leaves_none_behind(store):
    stream = visits("ann", 500)
    keeper = Keeper(store, HistoryLimits(1000, 40)).commits(stream, [70])
    ((_, _, history),) = keeper.book.walk()
    assert (history.first.tolist(), history.lengths.tolist()) == ([448], [52])
    assert history.item.tolist() == expected(stream)[b"ann"][0][448:]
    assert counted(keeper) == recounted(keeper) == (1, 52, 3)


def test_new_limits_of_a_users_events_count_from_the_next_shrink_on(store):
    stream = random_stream(900, 5)
    Keeper(store).commits(stream.take(slice(0, 600)), [])
    keeper = Keeper(store, HistoryLimits(1000, 50))
    keeper.commit(stream.take(slice(600, 800)))
    assert keeper.held() == expected(stream.take(slice(0, 800)))
    assert keeper.book.shrink() == 0
    at_once = Keeper(limits=HistoryLimits(1000, 50)).commits(stream.take(slice(0, 800)), [])
    assert keeper.contents() == at_once.contents()
    keeper.commit(stream.take(slice(800, 900)))
    at_once.commit(stream.take(slice(800, 900)))
    assert keeper.contents() == at_once.contents()
    wider = Keeper(store, PLENTY)
    assert wider.book.shrink() == 0
    histories, complete = wider.book.read([b"u1"], np.array([len(expected(stream)[b"u1"][0])]))
    assert histories.first[0] > 0
    assert (complete.tolist(), wider.held()) == ([False], keeper.held())


def test_events_that_the_row_does_not_have_are_not_read():
    keeper = Keeper().commits(visits("ann", 40), [])
    for events in (39, 41, 80, 0):
        histories, complete = keeper.book.read([b"ann"], np.array([events]))
        assert (histories.events, complete.tolist()) == (0, [False])


# --- users who go


def removed(keeper: Keeper, users: list[bytes]) -> None:
    rows = LAYOUT.rows(keeper.store.get_many(users)[0])
    keeper.hot.remove(users, int(rows["events"].sum()))


def test_a_user_who_is_taken_out_loses_the_history_in_the_same_step(store):
    stream = random_stream(900, 6)
    keeper = Keeper(store).commits(stream, [300, 600])
    removed(keeper, [b"u1", b"u4"])
    assert keeper.held() == expected(stream, {"u0", "u2", "u3", "u5"})
    assert counted(keeper) == recounted(keeper)
    assert not any(key.startswith((history_stem(b"u1"), history_stem(b"u4"))) for key in keys_of(store))
    assert without_users(store, [b"nobody"]) == {b"h": keeper.contents()[b"h"]}


def test_without_histories_nothing_is_looked_for_and_nothing_written(store):
    hot = HotRows(store, HotMemory(LAYOUT, 8))
    hot.write(hot.acquire([b"a"]).slots, 3, 0)
    store.history_cursor = None  # any look would fail
    assert without_users(store, [b"a"]) == {}
    hot.remove([b"a"], 0)
    assert list(store.iterate()) == []


# --- samples


def many(users: int, events: int = 3) -> Keeper:
    stream = Interactions.from_columns(
        [f"u{k}" for k in range(users)] * events, [f"i{k % 12}" for k in range(users * events)],
        [k % 2 for k in range(users * events)], list(range(users * events)),
    )  # fmt: skip
    return Keeper().commits(stream, [])


def by_features(histories: Histories) -> list[tuple[int, ...]]:
    return [tuple(histories.features.columns[a:b]) for a, b in zip(
        histories.features.starts[:-1].tolist(), histories.features.starts[1:].tolist(), strict=True)]  # fmt: skip


def test_a_sample_has_whole_histories_and_is_the_same_for_the_same_generator(store):
    stream = random_stream(900, 6)
    keeper = Keeper(store).commits(stream, [])
    one = keeper.book.sample(np.random.default_rng(3), 40)
    again = Keeper().commits(stream, [100, 500]).book.sample(np.random.default_rng(3), 40)
    assert len(one) == 40
    for name in ("starts", "item", "label", "grade", "first"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    whole = {tuple(items) for items, _, _ in expected(stream).values()}
    assert {tuple(one.item[a:b].tolist()) for a, b in zip(one.starts[:-1], one.starts[1:], strict=True)} == whole
    assert by_features(one) == by_features(again)


def test_all_users_are_drawn_about_equally_often():
    """A seek alone would draw them as often as the gaps between hashes are wide: twice as uneven, and more."""
    keeper, users, draws = many(400), 400, 40_000
    drawn: list[int] = []

    def note(hashes):
        drawn.extend(hashes.tolist())
        return np.zeros(len(hashes), np.bool_)

    keeper.book.sample(np.random.default_rng(0), draws, skip=note)
    counts = np.unique(np.array(drawn), return_counts=True)[1]
    assert len(counts) == users
    assert counts.std() / counts.mean() < 0.35  # by gaps alone: about 1
    assert counts.max() < 3 * draws / users


def test_users_who_are_skipped_are_never_drawn_and_others_take_their_place():
    keeper = many(100)
    bound = 1 << 31
    sampled = keeper.book.sample(np.random.default_rng(1), 500, skip=lambda hashes: hashes < bound)
    assert len(sampled) == 500
    others = {history.item.tobytes() for _, crc, history in keeper.book.walk() if crc >= bound}
    assert {sampled.item[a:b].tobytes() for a, b in zip(sampled.starts, sampled.starts[1:], strict=False)} <= others
    assert len(keeper.book.sample(np.random.default_rng(1), 5, skip=lambda hashes: hashes >= 0)) == 0


def test_a_walk_is_in_order_of_hashes():
    keeper = many(50)
    found = list(keeper.book.walk())
    assert [crc for _, crc, _ in found] == sorted(owner(user) for user, _, _ in found)
    assert {user for user, _, _ in found} == {f"u{k}".encode() for k in range(50)}


# --- damage


def test_damage_is_told_and_names_the_store(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        keeper = Keeper(store).commits(visits("ann", 70), [])
        good, stem = keeper.contents(), history_stem(b"ann")
        chunk = stem + bytes(4)

        def read():
            return keeper.book.read([b"ann"], np.array([70]))

        for key, bad, reading, said in (
            (stem, good[stem][:-1] + b"x", keeper.held, "the head of a history fails its checksum"),
            (stem, good[stem][:-1] + b"x", read, "the head of a history fails its checksum"),
            (chunk, good[chunk][:-1] + b"\xff", read, "a chunk of a history fails its checksum"),
            (chunk, good[stem + b"\0\0\0\2"], keeper.held, "a history has a gap between two chunks"),
            (stem, HEAD._replace(user=b"bob").encode(), read, "the history of user b'ann' is that of b'bob'"),
            (b"h", b"short", keeper.book.counts, "the record of the histories has 5 bytes"),
        ):
            store.write_batch([], NO_ROWS, None, histories={**good, key: bad})
            with pytest.raises(StoreDamaged, match=rf"{re.escape(str(tmp_path))}.*{said}"):
                reading()


def test_the_first_stem_of_a_hash_is_before_all_users_with_it():
    user = b"ann"
    assert first_stem(owner(user)) < history_stem(user) < first_stem(owner(user) + 1)
    assert first_stem(ALL_USERS) > history_stem(user)
