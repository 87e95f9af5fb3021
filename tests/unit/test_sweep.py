"""The sweep: idle rows go, a bounded number at a time, rows and progress in one step."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from learner.event_clock import IDLE, new_clock
from learner.user_state import RowLayout
from state.codec import UNKNOWN, Progress
from state.exceptions import RowDamaged, StoreWriteFailed
from state.expiry import Expiry, idle_up_to, pack_clock, unpack_clock
from state.hot_rows import HotMemory, HotRows
from state.keys import STANDING_KEY, user_key
from state.memory_store import MemoryUserStore
from state.outbox import Outbox, entries
from state.outbox_codec import SESSION_BYTES, Standing
from state.store import RocksUserStore
from state.sweep import Sweeper

LAYOUT = RowLayout("gradient", 2, 0, 2)
USERS = [f"u{k:02}".encode() for k in range(20)]


class Counting(MemoryUserStore):
    """Counts walks and batches, and refuses batches when it is told to."""

    walks = batches = 0
    refuses = False

    def stored(self, after=None):
        self.walks += 1
        return super().stored(after)

    def write_batch(self, users, rows, progress, **more):
        if self.refuses:
            raise StoreWriteFailed("no space")
        self.batches += 1
        return super().write_batch(users, rows, progress, **more)


def clock(idle: int) -> bytes:
    state = new_clock()
    state[IDLE] = idle
    return pack_clock(state)


def filled(store=None, users: int = 20, known: bool = True) -> HotRows:
    """User k has k + 1 events, the latest at offset 10·k."""
    store = Counting(LAYOUT) if store is None else store
    slab = np.zeros((20, LAYOUT.row_bytes), np.uint8)
    rows = LAYOUT.rows(slab)
    rows["events"], rows["last_offset"] = np.arange(1, 21), 10 * np.arange(20)
    totals = (20, 210) if known else (UNKNOWN, UNKNOWN)
    store.write_batch(USERS, slab, Progress(190, 1, *totals, 5, clock(-1)))
    return HotRows(store, HotMemory(LAYOUT, 64))


def set_clock(hot: HotRows, idle: int) -> None:
    before = hot.progress()
    after = Progress(before.offset, before.meta_version, before.users, before.events, 6, clock(idle))
    hot.store.write_batch([], hot.memory.slab[:0], after)


def left(hot: HotRows) -> list[bytes]:
    return [user for user, _ in hot.store.iterate()]


def test_those_up_to_the_clocks_offset_go_and_the_progress_says_so():
    hot = filled()
    set_clock(hot, 45)
    assert Sweeper().sweep(hot) == 5
    assert left(hot) == USERS[5:]
    progress = hot.store.progress()
    assert (progress.users, progress.events, progress.offset, progress.meta_version) == (15, 210 - 15, 190, 1)
    assert progress.clock == clock(45)
    assert progress.written_at_ms > 6


def test_the_offset_itself_is_idle():
    hot = filled()
    set_clock(hot, 40)
    assert Sweeper().sweep(hot) == 5
    set_clock(hot, 49)
    assert Sweeper().sweep(hot) == 0


def test_nothing_is_read_while_nobody_is_idle():
    hot = filled()
    sweeper = Sweeper()
    assert sweeper.sweep(hot) == 0
    assert hot.store.walks == 0


def test_a_new_store_has_nobody_to_sweep():
    assert Sweeper().sweep(HotRows(Counting(LAYOUT), HotMemory(LAYOUT, 4))) == 0


def test_each_step_looks_at_so_many_rows_and_the_next_one_goes_on():
    hot = filled()
    set_clock(hot, 90)
    sweeper = Sweeper()
    assert [sweeper.sweep(hot, 4) for _ in range(6)] == [4, 4, 2, 0, 0, 0]
    assert left(hot) == USERS[10:]


def test_a_pass_that_found_the_end_is_not_made_again_until_more_are_idle():
    hot = filled()
    set_clock(hot, 30)
    sweeper = Sweeper()
    assert sweeper.sweep(hot, 100) == 4
    walks, batches = hot.store.walks, hot.store.batches
    assert [sweeper.sweep(hot, 100) for _ in range(3)] == [0, 0, 0]
    assert (hot.store.walks, hot.store.batches) == (walks, batches)
    set_clock(hot, 40)
    assert sweeper.sweep(hot, 100) == 1


def test_who_becomes_idle_during_a_pass_is_found_by_the_next_one():
    hot = filled()
    set_clock(hot, 0)
    sweeper = Sweeper()
    assert sweeper.sweep(hot, 15) == 1
    set_clock(hot, 30)
    assert sweeper.sweep(hot, 15) == 0  # the end of the pass under way
    assert sweeper.sweep(hot, 15) == 3
    assert left(hot) == USERS[4:]


def test_swept_users_leave_the_memory():
    hot = filled()
    slots = hot.acquire(USERS[:3]).slots
    set_clock(hot, 10)
    hot.progress()
    slots = hot.acquire(USERS[:3]).slots
    hot.memory.slab[slots] = 1
    assert Sweeper().sweep(hot) == 2
    acquired = hot.acquire(USERS[:3])
    assert acquired.unknown.tolist() == [0, 1]
    assert not hot.memory.slab[acquired.slots[:2]].any()
    assert hot.memory.slab[acquired.slots[2]].all()


def with_outbox() -> HotRows:
    hot, session = filled(), secrets.token_bytes(SESSION_BYTES)
    hot.store.write_batch([], hot.memory.slab[:0], None, own={STANDING_KEY: Standing(session, 0, 0).encode()})
    hot.log = Outbox(hot.store, session)
    return hot


def test_tombstones_go_into_the_outbox_in_the_step_in_which_the_rows_go():
    hot = with_outbox()
    set_clock(hot, 10)
    Sweeper().sweep(hot, 100)
    assert [entry.deleted for entry in entries(hot.store)] == [tuple(USERS[:2])]
    told = hot.log.take(1)
    assert (told.rows, told.progress) == (dict.fromkeys(USERS[:2]), hot.store.progress())


def test_tombstones_of_a_step_that_could_not_be_written_are_not_told():
    hot = with_outbox()
    set_clock(hot, 10)
    hot.store.refuses = True
    with pytest.raises(StoreWriteFailed):
        Sweeper().sweep(hot, 100)
    hot.store.refuses = False
    assert (entries(hot.store), hot.log.take(1)) == ((), None)


def test_nothing_is_told_when_nobody_goes():
    hot = with_outbox()
    set_clock(hot, 10)
    sweeper = Sweeper()
    sweeper.sweep(hot, 2)
    sweeper.sweep(hot, 2)
    assert len(entries(hot.store)) == 1


def test_a_step_that_could_not_be_written_is_made_again():
    hot = filled()
    set_clock(hot, 45)
    sweeper = Sweeper()
    hot.store.refuses = True
    with pytest.raises(StoreWriteFailed):
        sweeper.sweep(hot, 3)
    assert len(left(hot)) == 20
    hot.store.refuses = False
    assert sweeper.sweep(hot, 3) == 3
    assert left(hot) == USERS[3:]


def test_totals_that_nobody_counted_stay_unknown():
    hot = filled(known=False)
    set_clock(hot, 45)
    assert Sweeper().sweep(hot) == 5
    progress = hot.store.progress()
    assert (progress.users, progress.events) == (UNKNOWN, UNKNOWN)


@pytest.mark.parametrize("value", [b"short", bytes(LAYOUT.row_bytes)])
def test_a_damaged_row_that_is_to_go_is_an_error_and_nobody_goes(tmp_path, value):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        hot = filled(store)
        set_clock(hot, 45)
        store._open_db().put(user_key(USERS[2]), value)
        with pytest.raises(RowDamaged, match="the row of user 'u02'"):
            Sweeper().sweep(hot)
        assert store.stored_row(USERS[1]) is not None


def test_it_sweeps_a_store_on_disk_and_lets_go_of_it(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        hot = filled(store)
        set_clock(hot, 95)
        sweeper = Sweeper()
        assert [sweeper.sweep(hot, 6) for _ in range(3)] == [6, 4, 0]
        assert left(hot) == USERS[10:]
    with RocksUserStore(tmp_path / "s", LAYOUT) as store:
        assert store.progress().users == 10


# --- what of the clock the progress keeps


def test_a_clock_is_kept_and_read_back():
    state = new_clock()
    state[:] = np.arange(len(state)) - 3
    np.testing.assert_array_equal(unpack_clock(pack_clock(state)), state)
    assert idle_up_to(clock(17)) == 17


def test_no_clock_or_one_of_an_earlier_form_finds_nobody_idle():
    for packed in (b"", bytes(40)):
        assert unpack_clock(packed) is None
        assert idle_up_to(packed) == -1


def test_the_clock_runs_at_a_256th_of_the_time_and_allows_an_eighth_more():
    pace = Expiry(256_000).pace
    assert (pace.step_ms, pace.limit_ms, pace.grain_ms) == (1000, 288_000, 16_000)
    assert Expiry(1).pace.step_ms == 1
