"""How a store and its changelog are brought together: what is decided, and what is done then."""

from __future__ import annotations

import numpy as np
import pytest

from learner.user_state import RowLayout
from state import codec
from state.changelog import Record, Restored, committed
from state.codec import Progress
from state.exceptions import ChangelogError, RowDamaged
from state.keys import LAYOUT_KEY, OWNER_KEY, PROGRESS_KEY, STANDING_KEY, user_key
from state.memory_store import MemoryUserStore
from state.outbox import Outbox, commit, entries, records, standing
from state.outbox_codec import NO_SESSION, SESSION_BYTES, Entry, Owner, Standing
from state.store import RocksUserStore, UserStore
from state.takeover import (
    LOOK_BACK,
    Apply,
    Local,
    Log,
    Marker,
    Rebuild,
    Resend,
    bring_together,
    decide,
    follow,
    last_marker,
)

LAYOUT = RowLayout("gradient", 2, 0, 0)
MINE, OTHER, NEXT = (bytes([k]) * SESSION_BYTES for k in (1, 2, 3))
EMPTY = np.zeros((0, LAYOUT.row_bytes), np.uint8)
NOW, DAY = 10**12, 86_400_000
ENTRIES = (Entry(4, (b"a",), (), b""), Entry(5, (b"b",), (b"c",), b"said"))


def at(offset: int) -> Progress:
    return Progress(offset, 0, 1, 1, NOW - 5)


def marker(session: bytes, sequence: int, offset: int) -> Marker:
    return Marker(Owner(session, sequence), at(offset))


def local(offset: int | None = 10, position: int | None = 50, *left: Entry, age: int = 5, **more) -> Local:
    stands = None if position is None else Standing(MINE, position, NOW - age)
    return Local(None if offset is None else at(offset), stands, left, **more)


def decided(has: Local, last: Marker | None, start: int = 0, end: int = 100):
    return decide(has, Log(start, end, last), tombstone_retention_ms=DAY, now_ms=NOW)


# --- what is decided


@pytest.mark.parametrize(
    ("has", "last", "plan"),
    [
        (local(), None, Resend((), 0)),
        (local(10, 50, *ENTRIES), None, Resend((), 2)),
        (local(10, 50, *ENTRIES), marker(MINE, 3, 8), Resend((), 2)),
        (local(10, 50, *ENTRIES), marker(MINE, 4, 9), Resend((4,), 1)),
        (local(10, 50, *ENTRIES), marker(MINE, 5, 10), Resend((4, 5), 0)),
        (local(10, 50, *ENTRIES, age=9 * DAY), None, Resend((), 2)),
        (local(None, 50, *ENTRIES), None, Resend((), 2)),
        (local(10, 0), None, Resend((), 0)),
        (local(10, 100), None, Resend((), 0)),
    ],
)
def test_a_store_after_which_nobody_else_told_anything_tells_the_rest(has, last, plan):
    assert decided(has, last) == plan


@pytest.mark.parametrize(
    ("has", "last"),
    [
        (local(10, 50), marker(OTHER, 1, 11)),
        (local(10, 50, *ENTRIES), marker(OTHER, 1, 11)),
        (local(10, 50, *ENTRIES), marker(OTHER, 1, 10)),
        (local(10, 50, *ENTRIES, restoring=True), marker(OTHER, 1, 10)),
        (local(10, 50, *ENTRIES, age=DAY - 1), marker(OTHER, 1, 10)),
        (local(10, 50, *ENTRIES), marker(MINE, 6, 11)),
        (local(10, 50), marker(MINE, 1, 11)),
        (local(10, 50, restoring=True), marker(MINE, 1, 10)),
        (local(10, 50), Marker(None, at(11))),
    ],
)
def test_a_store_that_is_behind_applies_the_log_from_its_position_on(has, last):
    assert decided(has, last) == Apply(50, has.entries)


@pytest.mark.parametrize(
    ("has", "last", "reason"),
    [
        (local(10, 50, *ENTRIES), marker(OTHER, 1, 9), "it is at offset 10, which was never told"),
        (local(10, 50), marker(OTHER, 1, 9), "it is at offset 10, which was never told"),
        (local(10, 50, *ENTRIES), Marker(Owner(OTHER, 1), None), "it is at offset 10, which was never told"),
        (local(10, 50, age=DAY), marker(OTHER, 1, 11), "older than the tombstones"),
        (local(None, 50), marker(OTHER, 1, 11), "it has no rows"),
        (local(10, None), marker(OTHER, 1, 11), "never kept with a changelog"),
        (local(None, None), None, "never kept with a changelog"),
        (local(None, None, restoring=True), marker(OTHER, 1, 11), "never kept with a changelog"),
        (local(10, 101), marker(OTHER, 1, 3), "it stands at 101 of a changelog that holds 0 to 100"),
    ],
)
def test_a_store_that_has_no_place_in_the_log_is_filled_anew(has, last, reason):
    plan = decided(has, last)
    assert isinstance(plan, Rebuild)
    assert reason in plan.reason


def test_a_log_whose_start_is_after_the_position_fills_the_store_anew():
    assert isinstance(decided(local(), marker(OTHER, 1, 11), start=51), Rebuild)
    assert decided(local(), marker(OTHER, 1, 11), start=50) == Apply(50, ())


@pytest.mark.parametrize(
    ("has", "message"),
    [
        (local(10, 101), "the store has rows and stands at its offset 101"),
        (local(10, None), "the store has rows and stands at no offset of it"),
        (local(None, 101, *ENTRIES), "the store has commits to tell and"),
        (local(None, None, restoring=True), "the store has an interrupted restore to end and"),
        (local(10, 50, restoring=True), "the store has an interrupted restore to end and"),
    ],
)
def test_a_log_without_a_marker_takes_nothing_from_a_store_that_has_something(has, message):
    with pytest.raises(ChangelogError, match=rf"\(offsets 0 to 100\) holds no marker, but {message}.*made anew"):
        decided(has, None)


# --- the last marker


def told(session: bytes, sequence: int, offset: int) -> list[Record]:
    return [
        Record(LAYOUT_KEY, LAYOUT.fingerprint.encode()),
        Record(OWNER_KEY, Owner(session, sequence).encode()),
        Record(PROGRESS_KEY, at(offset).encode()),
    ]


def test_the_last_marker_is_the_last_owner_with_its_progress():
    assert last_marker([]) is None
    assert last_marker([*told(MINE, 1, 4), *told(OTHER, 2, 5), Record(user_key(b"a"), None)]) == marker(OTHER, 2, 5)
    assert last_marker(told(MINE, 1, 4)[:2]) == Marker(Owner(MINE, 1), None)


def test_a_progress_whose_owner_is_not_among_the_records_is_nobodys():
    assert last_marker(told(MINE, 1, 4)[2:]) == Marker(None, at(4))
    assert last_marker([*told(MINE, 1, 4)[2:], *told(OTHER, 2, 5)]) == marker(OTHER, 2, 5)


@pytest.mark.parametrize("key", [OWNER_KEY, PROGRESS_KEY])
def test_a_marker_that_cannot_be_read_says_so(key):
    with pytest.raises(ChangelogError, match=r"last marker cannot be used: the .* bytes; check the topic"):
        last_marker([*told(MINE, 1, 4), Record(key, b"x")])


@pytest.mark.parametrize("cut", [[], [Record(PROGRESS_KEY, at(5).encode())]], ids=["nothing", "half a marker"])
@pytest.mark.parametrize(
    ("position", "end", "found_at", "reads"),
    [
        (10, 100 + LOOK_BACK, 99, [100, 10]),
        (10, 1000, 1000 - LOOK_BACK, [1000 - LOOK_BACK]),
        (10, 1000, 10, [1000 - LOOK_BACK, 10]),
        (990, 1000, 990, [990]),
        (2000, 1000, 0, [1000 - LOOK_BACK, 0]),
        (None, 100, 0, [0]),
    ],
)
def test_a_survey_looks_at_the_end_first_and_reads_from_the_position_where_it_must(position, end, found_at, reads, cut):
    starts = []

    def read(start: int) -> list[Record]:
        starts.append(start)
        return told(OTHER, 1, 5) if start <= found_at else cut

    assert Log.surveyed(local(10, position), 0, end, read) == Log(0, end, marker(OTHER, 1, 5))
    assert starts == reads


# --- what is done


class Topic:
    """A changelog without compaction."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def tell(self, outbox: Outbox, session: bytes) -> None:
        publication = outbox.take(1 << 20)
        self.records += records(publication, LAYOUT, session)
        outbox.acknowledged(publication.sequence, len(self.records))

    def read(self, start: int) -> list[Record]:
        return self.records[start:]

    def log(self, store: UserStore) -> Log:
        return Log.surveyed(Local.of(store), 0, len(self.records), self.read)

    def join(self, store: UserStore, session: bytes = NO_SESSION, **more) -> Restored:
        log = self.log(store)
        plan = decide(Local.of(store), log, tombstone_retention_ms=DAY, now_ms=NOW)
        return bring_together(store, plan, self.read, log, session=session, now_ms=NOW, **more)


def rows_for(users: list[bytes], offset: int) -> np.ndarray:
    slab = np.zeros((len(users), LAYOUT.row_bytes), np.uint8)
    rows = LAYOUT.rows(slab)
    rows["events"], rows["last_offset"] = 1, offset
    return slab


def held(store: UserStore) -> dict[bytes, int]:
    return {user: int(LAYOUT.rows(row[None])["last_offset"][0]) for user, row in store.iterate()}


def write(store: UserStore, outbox: Outbox, users: list[bytes], offset: int, deleted: tuple[bytes, ...] = ()) -> None:
    count = len({*held(store), *users} - set(deleted))
    progress = Progress(offset, 0, count, count, NOW)
    commit(store, outbox, users, rows_for(users, offset), progress, deleted=deleted)


@pytest.fixture
def topic() -> Topic:
    """Of a partition with three users, told by another."""
    topic, store = Topic(), MemoryUserStore(LAYOUT)
    topic.join(store, OTHER)
    outbox = Outbox(store, OTHER)
    write(store, outbox, [b"a", b"b", b"c"], 5)
    topic.tell(outbox, OTHER)
    return topic


@pytest.fixture(params=["memory", "rocks"])
def store(request, tmp_path):
    with MemoryUserStore(LAYOUT) if request.param == "memory" else RocksUserStore(tmp_path / "s", LAYOUT) as store:
        yield store


def test_a_new_store_beside_a_new_log_has_applied_nothing(store):
    assert Topic().join(store, MINE) == Restored()
    assert (store.progress(), store.restoring()) == (None, False)
    assert standing(store) == Standing(MINE, 0, NOW)
    assert Outbox(store, MINE).take(1) is None


def test_a_new_store_has_all_of_the_log_afterwards(store, topic):
    done = topic.join(store, MINE)
    assert (done.records, done.written, done.rebuilt) == (6, 3, False)
    assert held(store) == {b"a": 5, b"b": 5, b"c": 5}
    assert standing(store) == Standing(MINE, 6, NOW)
    assert done.progress == store.progress() == Progress(5, 0, 3, 3, NOW)


def test_what_was_not_told_is_told_by_the_next_session(store, topic):
    topic.join(store, MINE)
    write(store, Outbox(store, MINE), [b"a"], 6, (b"c",))
    topic.join(store, NEXT)
    outbox = Outbox(store, NEXT)
    topic.tell(outbox, NEXT)
    assert topic.records[-1] == Record(PROGRESS_KEY, store.progress().encode())
    with MemoryUserStore(LAYOUT) as other:
        topic.join(other, MINE)
        assert held(other) == held(store) == {b"a": 6, b"b": 5}


def test_what_was_told_and_not_acknowledged_is_not_told_again(store, topic):
    topic.join(store, MINE)
    outbox = Outbox(store, MINE)
    for offset in (6, 7):
        write(store, outbox, [b"a"], offset)
    topic.records += records(outbox.take(1), LAYOUT, MINE)
    topic.join(store, NEXT)
    assert [entry.sequence for entry in entries(store)] == [2]
    assert standing(store) == Standing(NEXT, 10, NOW)


def behind(store: UserStore, topic: Topic, other_deletes: bytes, other_writes: list[bytes]) -> None:
    """The store has a commit that it never told; another goes on beyond it."""
    topic.join(store, MINE)
    write(store, Outbox(store, MINE), [b"a", b"new"], 7, (b"c",))
    with MemoryUserStore(LAYOUT) as ahead:
        topic.join(ahead, OTHER)
        outbox = Outbox(ahead, OTHER)
        write(ahead, outbox, other_writes, 9, (other_deletes,))
        topic.tell(outbox, OTHER)


def test_a_store_behind_gives_its_commit_up_and_applies_the_log(store, topic):
    behind(store, topic, b"b", [b"a", b"c"])
    done = topic.join(store, NEXT)
    assert (done.records, done.written, done.deleted) == (6, 2, 1)
    assert held(store) == {b"a": 9, b"c": 9}
    assert (store.progress().offset, store.progress().users, store.progress().events) == (9, 2, 2)
    assert (entries(store), standing(store)) == ((), Standing(NEXT, 12, NOW))


def test_users_it_took_out_whom_the_other_has_not_missed_are_told_once_more(store, topic):
    behind(store, topic, b"b", [b"a"])
    topic.join(store, NEXT)
    assert held(store) == {b"a": 9}
    assert entries(store) == (Entry(2, (), (b"c",), b""),)
    topic.tell(Outbox(store, NEXT), NEXT)
    with MemoryUserStore(LAYOUT) as fresh:
        topic.join(fresh, MINE)
        assert held(fresh) == {b"a": 9}


def test_a_store_with_rows_that_were_never_told_is_emptied_and_filled(store, topic):
    topic.join(store, MINE)
    write(store, Outbox(store, MINE), [b"a", b"new"], 12)
    with MemoryUserStore(LAYOUT) as ahead:
        topic.join(ahead, OTHER)
        outbox = Outbox(ahead, OTHER)
        write(ahead, outbox, [b"b"], 9)
        topic.tell(outbox, OTHER)
    assert topic.join(store, NEXT).rebuilt
    assert held(store) == {b"a": 5, b"b": 9, b"c": 5}
    assert (entries(store), store.progress().offset) == ((), 9)


class Cut(Exception):
    pass


def called_off(_: Restored) -> None:
    raise Cut


def test_a_join_that_was_called_off_is_decided_again_and_ends(store, topic):
    with pytest.raises(Cut):
        topic.join(store, MINE, on_progress=called_off, chunk_records=2)
    assert (store.restoring(), standing(store)) == (True, None)
    topic.join(store, MINE)
    behind(store, topic, b"b", [b"a", b"c"])
    with pytest.raises(Cut):
        topic.join(store, NEXT, on_progress=called_off, chunk_records=2)
    assert store.restoring()
    assert (standing(store).session, len(entries(store))) == (MINE, 1)
    topic.join(store, NEXT)
    assert (held(store), store.restoring()) == ({b"a": 9, b"c": 9}, False)


def test_a_log_of_markers_without_owners_is_applied_to_a_new_store(store):
    topic = Topic()
    topic.records += committed(LAYOUT, [b"a"], rows_for([b"a"], 3), Progress(3, 0, 1, 1, 9))
    topic.join(store, MINE)
    assert (held(store), store.progress().offset) == ({b"a": 3}, 3)


# --- a copy that follows


def followed(store: UserStore, topic: Topic, count: int, **more: int) -> Restored:
    times = {"known_at_ms": NOW, "now_ms": NOW, "tombstone_retention_ms": DAY, **more}
    position = standing(store).position
    new = topic.read(position)[:count]
    return follow(store, new, position + len(new), **times)


@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_a_copy_follows_wherever_the_batches_end_and_is_taken_over_with_what_is_left(store, topic, step):
    topic.join(store)
    assert standing(store) == Standing(NO_SESSION, 6, NOW)
    with MemoryUserStore(LAYOUT) as ahead:
        topic.join(ahead, OTHER)
        outbox = Outbox(ahead, OTHER)
        for offset, users in ((6, [b"a", b"new"]), (9, [b"c"])):
            write(ahead, outbox, users, offset, (b"b",))
            topic.tell(outbox, OTHER)
        while standing(store).position + step < len(topic.records):
            followed(store, topic, step)
        topic.join(store, NEXT)
        assert held(store) == held(ahead) == {b"a": 6, b"c": 9, b"new": 6}
        assert (store.progress().offset, store.progress().users, store.progress().events) == (9, 3, 3)


def test_a_copy_that_is_at_the_end_is_taken_over_as_it_is(store, topic):
    topic.join(store)
    log = topic.log(store)
    assert log.last is None
    assert decide(Local.of(store), log, tombstone_retention_ms=DAY, now_ms=NOW + 9 * DAY) == Resend((), 0)


def test_a_copy_of_an_empty_log_follows_from_its_first_record(store, topic):
    records_told, topic.records = topic.records, []
    topic.join(store)
    topic.records = records_told
    for _ in range(6):
        followed(store, topic, 1)
    assert held(store) == {b"a": 5, b"b": 5, b"c": 5}
    assert (store.progress().offset, store.progress().users, store.progress().events) == (5, 3, 3)


def test_nothing_new_only_says_until_when_the_copy_knows(store, topic):
    topic.join(store)
    before = store.progress()
    followed(store, topic, 9, known_at_ms=NOW + 7)
    assert (standing(store), store.progress()) == (Standing(NO_SESSION, 6, NOW + 7), before)


def test_a_copy_that_has_fallen_back_too_far_does_not_follow(store, topic):
    topic.join(store)
    with pytest.raises(ChangelogError, match="a copy at offset 6 of its changelog is older than the tombstones"):
        followed(store, topic, 9, now_ms=NOW + DAY)


def test_a_store_that_a_session_owns_does_not_follow(store, topic):
    with pytest.raises(ValueError, match="only a copy that was brought together without a session follows"):
        follow(store, [], 0, known_at_ms=NOW, now_ms=NOW, tombstone_retention_ms=DAY)
    topic.join(store, MINE)
    with pytest.raises(ValueError, match="only a copy"):
        followed(store, topic, 9)


def test_a_store_with_something_to_tell_waits_before_it_follows(store, topic):
    topic.join(store, MINE)
    write(store, Outbox(store, MINE), [b"a"], 7)
    with pytest.raises(ValueError, match="cannot only follow: decide again later"):
        topic.join(store)
    assert standing(store).session == MINE


def test_a_damaged_row_stops_a_copy_where_it_was(store, topic):
    topic.join(store)
    row = codec.encode(LAYOUT, [b"a"], rows_for([b"a"], 6))[0]
    topic.records += [Record(user_key(b"b"), None), Record(user_key(b"a"), row[:-1] + b"\xff")]
    with pytest.raises(RowDamaged, match="record 2 of the changelog"):
        followed(store, topic, 2)
    assert (held(store)[b"b"], standing(store).position) == (5, 6)


def test_a_store_says_what_it_is(store):
    store.write_batch([], EMPTY, at(4), own={STANDING_KEY: Standing(MINE, 3, 2).encode()})
    assert Local.of(store) == Local(at(4), Standing(MINE, 3, 2), (), False)
    store.begin_restore(empty=False)
    assert Local.of(store).restoring
