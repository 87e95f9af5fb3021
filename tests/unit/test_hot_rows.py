"""Rows in memory: what they hold, what they give up, and that nothing is wrong after an error."""

from __future__ import annotations

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.adaptation import Adaptation
from learner.interactions import Interactions
from learner.user_state import RowLayout
from state.codec import UNKNOWN, Progress
from state.exceptions import StoreWriteFailed
from state.hot_rows import HotMemory, HotRows
from state.memory_store import MemoryUserStore
from streams.processor import Counts, Processor
from tests.models import HEADS, random_stream, small_model

LAYOUT = RowLayout("gradient", 2, 0, 0)


def names(*numbers: int) -> list[bytes]:
    return [b"%d" % k for k in numbers]


def learn(hot: HotRows, users: list[bytes], offset: int, events: int = 1) -> None:
    """One commit in which each user applies so many events."""
    slots = hot.acquire(users).slots
    hot.memory.rows["events"][slots] += np.uint64(events)
    hot.memory.rows["last_offset"][slots] = offset
    hot.write(slots, offset, 0)


def events_of(store: MemoryUserStore) -> dict[bytes, int]:
    return {user: int(LAYOUT.rows(row[None])["events"][0]) for user, row in store.iterate()}


@pytest.fixture
def hot() -> HotRows:
    return HotRows(MemoryUserStore(LAYOUT), HotMemory(LAYOUT, 4))


def test_a_user_whom_the_store_does_not_know_gets_an_empty_row_and_is_named(hot):
    hot.store.write_batch([b"b"], np.full((1, LAYOUT.row_bytes), 7, np.uint8), None)
    acquired = hot.acquire([b"c", b"b", b"a"])
    assert sorted(acquired.unknown.tolist()) == [0, 2]
    assert not hot.memory.slab[acquired.slots[[0, 2]]].any()
    assert (hot.memory.slab[acquired.slots[1], 64:] == 7).all()


def test_rows_are_read_once_and_then_found_in_memory(hot):
    learn(hot, names(1, 2), 0)
    hot.store.get_many = None  # any read would fail
    acquired = hot.acquire(names(2, 1))
    assert acquired.unknown.tolist() == []
    assert hot.memory.rows["events"][acquired.slots].tolist() == [1, 1]


def test_a_written_row_and_its_progress_are_in_the_store(hot):
    learn(hot, names(1, 2), 5, events=3)
    learn(hot, names(2, 3), 9)
    assert events_of(hot.store) == {b"1": 3, b"2": 4, b"3": 1}
    progress = hot.store.progress()
    assert (progress.offset, progress.users, progress.events) == (9, 3, 8)
    assert hot.progress() == progress


def test_users_and_events_of_a_store_of_version_1_stay_unknown():
    store = MemoryUserStore(LAYOUT)
    store.write_batch([], np.zeros((0, LAYOUT.row_bytes), np.uint8), Progress(3, 0))
    hot = HotRows(store, HotMemory(LAYOUT, 4))
    learn(hot, names(1), 5)
    progress = store.progress()
    assert (progress.offset, progress.users, progress.events) == (5, UNKNOWN, UNKNOWN)


def test_memory_never_holds_more_than_its_capacity(hot):
    for k in range(50):
        learn(hot, names(k, k + 1, (k * 7) % 13 + 100), k)
        assert hot.memory._held.sum() <= 4
        assert len(hot._index) <= 4
    assert hot.store.progress().users == len(events_of(hot.store)) == 51 + 13
    assert hot.store.progress().events == 150


def test_a_row_in_use_often_is_kept_while_others_come_and_go(hot):
    learn(hot, names(0), 0)
    reads: list[bytes] = []
    read = hot.store.get_many
    hot.store.get_many = lambda users: (reads.extend(users), read(users))[1]
    for k in range(1, 30):
        learn(hot, names(0, k), k)
    assert b"0" not in reads


def test_rows_of_the_current_commit_are_not_given_up(hot):
    learn(hot, names(1, 2, 3, 4), 0)
    acquired = hot.acquire(names(1, 5, 6, 2))
    assert len(set(acquired.slots.tolist())) == 4
    assert [hot.memory.users[k] for k in acquired.slots.tolist()] == names(1, 5, 6, 2)


def test_a_commit_of_more_users_than_fit_is_refused_and_costs_no_room(hot):
    learn(hot, names(1, 2), 0)
    for _ in range(10):
        with pytest.raises(
            ValueError, match=r"more than the 4 rows that fit .*: raise state.hot_rows_mb, or lower state"
        ):
            hot.acquire(names(1, 2, 3, 4, 5))
    assert events_of(hot.store) == {b"1": 1, b"2": 1}
    learn(hot, names(5, 6, 7, 8), 1)
    learn(hot, names(1, 2, 8, 9), 2)
    assert events_of(hot.store) == {b"1": 2, b"2": 2, **dict.fromkeys(names(5, 6, 7, 9), 1), b"8": 2}


def test_so_it_is_when_other_partitions_fill_the_memory():
    memory = HotMemory(LAYOUT, 4)
    one, two = (HotRows(MemoryUserStore(LAYOUT), memory) for _ in range(2))
    learn(one, names(1, 2, 3), 0)
    learn(two, names(1, 2, 3, 4), 0, events=10)
    with pytest.raises(ValueError, match="more than the 4 rows"):
        one.acquire(names(1, 2, 3, 4, 5))
    learn(one, names(1, 2, 3, 4), 1)
    assert events_of(one.store) == {b"1": 2, b"2": 2, b"3": 2, b"4": 1}
    assert events_of(two.store) == dict.fromkeys(names(1, 2, 3, 4), 10)


def test_partitions_share_memory_and_see_only_their_own_rows():
    memory = HotMemory(LAYOUT, 3)
    hots = [HotRows(MemoryUserStore(LAYOUT), memory) for _ in range(3)]
    for k in range(12):
        for partition, hot in enumerate(hots):
            learn(hot, [b"same", b"%d" % (k % 2)], k, events=partition + 1)
    for partition, hot in enumerate(hots):
        assert events_of(hot.store) == {
            b"same": 12 * (partition + 1),
            b"0": 6 * (partition + 1),
            b"1": 6 * (partition + 1),
        }


def test_forgotten_users_are_read_from_the_store_again(hot):
    learn(hot, names(1, 2), 0)
    hot.store.write_batch(names(1), np.full((1, LAYOUT.row_bytes), 9, np.uint8), None)
    hot.forget(names(1, 7))
    slots = hot.acquire(names(1, 2)).slots
    assert (hot.memory.slab[slots[0], 64:] == 9).all()
    assert hot.memory.rows["events"][slots[1]] == 1


def test_a_store_that_was_set_back_counts_and_not_what_memory_remembers(hot):
    learn(hot, names(1), 0)
    rows, progress = dict(hot.store._rows), hot.store._progress
    learn(hot, names(1), 1)
    hot.store._rows, hot.store._progress = rows, progress
    learn(hot, names(1), 1, events=4)
    assert events_of(hot.store) == {b"1": 5}
    assert hot.store.progress().events == 5


# --- errors during a commit ---------------------------------------------------------------------------------------

EVENTS, COMMIT = 150, 16


class Refusing(MemoryUserStore):
    """Refuses its n-th write, which is durable all the same when ``written``: an error does not tell."""

    left = -1
    written = False

    def write_batch(self, users, rows, progress, **more):
        self.left -= 1
        if self.left != -1:
            return super().write_batch(users, rows, progress, **more)
        if self.written:
            super().write_batch(users, rows, progress, **more)
        raise StoreWriteFailed("the store in memory refuses")


def stream() -> Interactions:
    return random_stream(EVENTS, 20, seed=11)


def run(kind: str, store: MemoryUserStore, **state: object) -> Processor:
    settings = StateSettings(commit_events=COMMIT, ring=4, **state)
    return Processor(small_model(kind), lambda _, layout: store, settings)


def held(store: MemoryUserStore) -> tuple[dict[bytes, bytes], Progress]:
    progress = store.progress()
    at_zero = Progress(progress.offset, progress.meta_version, progress.users, progress.events, 0, progress.clock)
    return {user: row.tobytes() for user, row in store.iterate()}, at_zero


def layout_of(kind: str) -> RowLayout:
    return RowLayout(kind, 5, 4, 4)


@pytest.fixture(scope="module")
def clean() -> dict[str, tuple[dict[bytes, bytes], Progress]]:
    found = {}
    for kind in HEADS:
        store = MemoryUserStore(layout_of(kind))
        run(kind, store).process(0, stream())
        found[kind] = held(store)
    return found


@pytest.mark.parametrize("written", [False, True], ids=["lost", "written-all-the-same"])
@pytest.mark.parametrize("kind", HEADS)
def test_after_any_refused_write_the_same_records_end_as_a_clean_pass_does(kind, written, clean):
    for n in range(-(-EVENTS // COMMIT)):
        store = Refusing(layout_of(kind))
        store.left, store.written = n, written
        work = run(kind, store)
        with pytest.raises(StoreWriteFailed):
            work.process(0, stream())
        assert work._hot[0]._index == {}
        again = work.process(0, stream())
        durable = min(COMMIT * (n + written), EVENTS)
        assert again.applied.tolist() == [False] * durable + [True] * (EVENTS - durable)
        assert held(store) == clean[kind]
        assert not work._memory._held[work._memory._free].any()


@pytest.mark.parametrize("kind", HEADS)
def test_after_an_error_inside_the_walk_they_do_too(kind, clean, monkeypatch):
    learn_rows = Adaptation.learn
    for n in range(-(-EVENTS // COMMIT)):
        left = [n]

        def failing(self, slab, events, items, left=left):
            adapted = learn_rows(self, slab, events, items)
            left[0] -= 1
            if left[0] == -1:
                raise MemoryError
            return adapted

        store = MemoryUserStore(layout_of(kind))
        work = run(kind, store)
        monkeypatch.setattr(Adaptation, "learn", failing)
        with pytest.raises(MemoryError):
            work.process(0, stream())
        work.process(0, stream())
        assert held(store) == clean[kind]


def test_an_interrupt_during_the_write_leaves_nothing_half_done(clean):
    class Interrupted(Refusing):
        def write_batch(self, users, rows, progress, **more):
            try:
                return super().write_batch(users, rows, progress, **more)
            except StoreWriteFailed:
                raise KeyboardInterrupt from None

    store = Interrupted(layout_of("full"))
    store.left = 3
    work = run("full", store)
    with pytest.raises(KeyboardInterrupt):
        work.process(0, stream())
    work.process(0, stream())
    assert held(store) == clean["full"]


def test_a_user_who_expired_in_a_refused_commit_is_counted_once(monkeypatch):
    monkeypatch.setattr(Processor, "sweep", lambda *_: 0)  # it would take the user out before
    minute = 60_000
    users = [f"q{k % 30}" for k in range(2_000)]
    users[100] = users[-1] = "back"  # nearly seven days apart, in a stream of one event each five minutes
    coming_back = Interactions.from_columns(users, ["i1"] * 2_000, [1] * 2_000, [5 * minute * k for k in range(2_000)])
    found = []
    for refused in (False, True):
        store = Refusing(layout_of("full"))
        work = run("full", store, expire_after_days=1)
        work.process(0, coming_back.take(slice(0, 1_999)))
        last = coming_back.take(slice(1_999, 2_000))
        if refused:
            store.left = 0
            with pytest.raises(StoreWriteFailed):
                work.process(0, last)
        work.process(0, last)
        found.append((work.counts, held(store)))
    assert found[0] == found[1]
    assert found[0][0] == Counts(events=2_000, users_created=31, users_expired=1)


@pytest.mark.parametrize("kind", HEADS)
def test_a_tiny_memory_gives_the_bits_of_a_large_one(kind, clean, monkeypatch):
    for capacity in (COMMIT, COMMIT + 1, 20):
        monkeypatch.setattr("streams.processor.HotMemory", lambda layout, _, rows=capacity: HotMemory(layout, rows))
        store = MemoryUserStore(layout_of(kind))
        work = run(kind, store)
        work.process(0, stream())
        assert work._memory.capacity == capacity
        assert held(store) == clean[kind]


def test_so_it_does_for_partitions_in_turn(clean, monkeypatch):
    monkeypatch.setattr("streams.processor.HotMemory", lambda layout, _: HotMemory(layout, COMMIT))
    stores = [MemoryUserStore(layout_of("full")) for _ in range(3)]
    settings = StateSettings(commit_events=COMMIT, ring=4)
    with Processor(small_model("full"), lambda partition, _: stores[partition], settings) as work:
        for start in range(0, EVENTS, 25):
            for partition in range(3):
                work.process(partition, stream().take(slice(start, start + 25)))
        assert [held(store) for store in stores] == [clean["full"]] * 3


def test_a_processor_whose_store_was_set_back_applies_again_what_the_store_lost(clean):
    store = MemoryUserStore(layout_of("full"))
    work = run("full", store)
    work.process(0, stream().take(slice(0, 60)))
    rows, progress = dict(store._rows), store._progress
    work.process(0, stream().take(slice(60, 120)))
    store._rows, store._progress = rows, progress
    work.process(0, stream().take(slice(60, EVENTS)))
    assert held(store) == clean["full"]


def test_a_wiped_user_is_not_in_the_copy_of_the_latest_commit_either():
    layout = RowLayout("gradient", 2, 0, 0)
    memory = HotMemory(layout, 4)
    slots = memory.take([b"a"], {})
    memory.slab[slots] = 7
    assert memory.gathered(slots).all()
    memory.wipe(b"a")
    assert not memory._copy.any()
