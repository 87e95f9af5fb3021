"""What time it is on a stream, and up to which offset its users are idle."""

from __future__ import annotations

import numpy as np
import pytest

from learner.event_clock import (
    AGREED,
    COUNT,
    FARTHEST_MS,
    FIRST_TURNS,
    HELD,
    IDLE,
    MARKS,
    NOBODY,
    NOW,
    ODD_TURNS,
    OFFSETS,
    OPEN,
    STATE_WIDTH,
    TIMES,
    Pace,
    advance,
    new_clock,
)
from learner.interactions import Interactions

PACE = Pace(step_ms=10, limit_ms=3000, grain_ms=160)


def stream(times, first_offset=0, users=None) -> Interactions:
    """Each event is a turn of its own unless ``users`` says otherwise."""
    n = len(times)
    users = [f"u{(first_offset + k) % 2}" for k in range(n)] if users is None else users
    offsets = first_offset + np.arange(n)
    return Interactions.from_columns(users, ["i"] * n, [0] * n, np.asarray(times, np.int64), offsets=offsets)


def run(times, state=None, first_offset=0, pace=PACE, users=None):
    return advance(new_clock() if state is None else state, stream(times, first_offset, users), pace)


def clock(times, **more):
    return run(times, **more).state


def marks(state) -> list[tuple[int, int]]:
    held = int(state[HELD])
    return list(zip(state[TIMES : TIMES + held].tolist(), state[OFFSETS : OFFSETS + held].tolist(), strict=True))


def steady(count: int, start: int = 0, every: int = 1) -> np.ndarray:
    return start + every * np.arange(count, dtype=np.int64)


def test_a_new_clock_has_seen_nothing_and_nobody_is_idle():
    state = new_clock()
    assert state.shape == (STATE_WIDTH,)
    assert (state[COUNT], state[HELD], state[IDLE]) == (0, 0, NOBODY)


def test_it_starts_at_the_median_of_the_first_events():
    first = [0] * 15 + [7] * 2 + [10**15] * 15
    assert clock(first)[NOW] == 7
    assert clock(first[:-1])[COUNT] == FIRST_TURNS - 1
    assert not clock(first)[TIMES:].any()


def test_each_event_moves_it_by_a_step_at_most():
    start = clock(steady(32, 1000, 0))
    assert clock([1007], state=start)[NOW] == 1007
    assert clock([5000], state=start)[NOW] == 1010
    assert clock([994], state=start)[NOW] == 994
    assert clock([0, 0], state=start)[NOW] == 980


def test_odd_times_as_far_as_they_go_move_it_by_a_step():
    start = clock(steady(32, 1000, 0))
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    assert clock([most], state=start)[NOW] == 1010
    assert clock([least], state=start)[NOW] == 990
    assert clock([most] * 40)[NOW] == FARTHEST_MS


def test_events_that_agree_make_a_mark_at_the_offset_where_they_began():
    started = clock(steady(32, 5, 0))
    assert started[OPEN] == 31
    unmarked = clock(steady(31, 6), state=started, first_offset=32)
    assert (marks(unmarked), unmarked[AGREED]) == ([], 31)
    marked = clock(steady(32, 6), state=started, first_offset=32)
    assert marks(marked) == [(6 + 31 + PACE.grain_ms, 31)]
    assert (marked[OPEN], marked[AGREED]) == (63, 0)


def test_a_mark_goes_further_until_the_clock_has_passed_it_by():
    assert marks(clock(steady(65))) == [(64 + 160, 31)]
    assert marks(clock(steady(225))) == [(224, 192)]
    assert marks(clock(steady(257))) == [(224, 192), (256 + 160, 224)]


def test_events_ahead_of_it_by_more_than_a_step_speak_against_a_mark():
    started = clock(steady(32, 0, 0))
    ahead = [10**6] * 100
    lagging = clock(ahead, state=started)
    assert (lagging[NOW], lagging[AGREED], lagging[HELD]) == (1000, 0, 0)
    mixed = [0, 10**6] * 100  # half of them honest, and none of the two can be told to be it
    assert clock(mixed, state=started)[HELD] == 0


def test_a_mark_is_not_earlier_than_the_clock_was_at_any_time_since_its_offset():
    started = clock(steady(32, 1000, 0))
    state = clock([1005] * 20 + [0] * 12, state=started, first_offset=32)
    assert state[NOW] == 1005 - 12 * 10
    assert marks(state) == [(1005 + 160, 31)]


def test_an_event_just_a_step_ahead_agrees():
    started = clock(steady(32, 0, 0))
    assert clock([10], state=started)[AGREED] == 1
    assert clock([11], state=started)[AGREED] == 0


def test_nobody_is_idle_until_the_clock_is_past_a_mark_by_more_than_the_limit():
    idle = run(steady(8000)).idle
    first = 224 + PACE.limit_ms + 2  # the clock stands at 3225 once event 3225 came, and is asked before the next
    assert set(idle[:first]) == {NOBODY}
    assert idle[first] == 192
    asked = np.arange(first, 8000)
    away = asked - idle[first:]
    assert (away.min(), away.max()) == (3034, 3225)


def test_who_is_idle_stays_idle():
    rng = np.random.default_rng(5)
    times = np.cumsum(rng.integers(0, 8, 20_000))
    times[rng.random(20_000) < 0.3] = rng.integers(0, 10**7)
    idle = run(times).idle
    assert idle[-1] > 0
    assert (np.diff(idle) >= 0).all()


def test_after_a_gap_it_catches_up_and_the_first_to_come_back_are_not_idle():
    before, gap = 1000, 9000
    times = np.concatenate([steady(before), before + gap + steady(8000)])
    idle = run(times).idle
    caught_up = before + gap // (PACE.step_ms - 1)
    assert run(times[: caught_up - 10]).state[NOW] < times[caught_up - 11]
    assert run(times[: caught_up + 10]).state[NOW] == times[caught_up + 9]
    assert (idle[: before + 200] == NOBODY).all()
    assert (idle[caught_up + 100 : before + 3000] < before).all()
    assert (idle[caught_up + 100 : before + 3000] > before - 100).all()  # the last ones count as after the gap
    back = np.flatnonzero(idle >= before)
    away = times[back] - times[idle[back]]
    assert (away.min(), away.max()) == (3034, 3225)


def test_a_clock_that_was_set_too_far_ahead_comes_back_and_finds_its_users_again():
    far = 50_000
    state = clock(np.concatenate([steady(32, far, 0), steady(100, far)]))
    assert marks(state)[-1][0] > far
    times = steady(30_000)
    ticks = run(times, state=state, first_offset=132)
    assert ticks.state[NOW] == times[-1]
    assert 132 + 30_000 - 3300 < ticks.idle[-1] < 132 + 30_000 - 3000
    wrong = ticks.idle[ticks.idle > 131] - 132
    asked = np.flatnonzero(ticks.idle > 131)
    assert (asked - wrong > PACE.limit_ms - ODD_TURNS * PACE.step_ms).all()


@pytest.mark.parametrize("cuts", [(1, 2, 3), (31, 32, 33), (500,), tuple(range(0, 4000, 7))])
def test_it_does_not_depend_on_how_the_events_are_cut(cuts):
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.integers(0, 12, 4000))
    times[rng.random(4000) < 0.2] = 10**12
    whole = run(times)
    state, found = new_clock(), []
    for first, last in zip((0, *cuts), (*cuts, 4000), strict=True):
        ticks = run(times[first:last], state=state, first_offset=first)
        state = ticks.state
        found.append(ticks.idle)
    np.testing.assert_array_equal(np.concatenate(found), whole.idle)
    np.testing.assert_array_equal(state, whole.state)


def test_advancing_changes_neither_the_state_nor_the_events_it_is_given():
    state, events = new_clock(), stream(steady(100))
    for column in (events.event_time_ms, events.offset, events.user):
        column.flags.writeable = False
    advance(state, events, PACE)
    np.testing.assert_array_equal(state, new_clock())


def test_no_events_leave_the_clock_as_it_was():
    state = clock(steady(100))
    ticks = run([], state=state)
    assert ticks.idle.shape == (0,)
    np.testing.assert_array_equal(ticks.state, state)


def test_more_marks_than_there_is_room_for_become_one_that_is_later():
    tight = Pace(step_ms=10, limit_ms=10**9, grain_ms=1)
    times = steady(32 * 60, 0, 1)
    state = clock(times, pace=tight)
    held = marks(state)
    assert len(held) == MARKS
    assert held[-1][1] == state[OPEN] - 32
    assert held[-1][0] >= times[held[-1][1]]


def test_offsets_may_have_holes():
    dense = stream(steady(8000))
    ticks = advance(new_clock(), dense.with_offsets(5 * dense.offset + 3), PACE)
    idle = run(steady(8000)).idle
    np.testing.assert_array_equal(ticks.idle, np.where(idle == NOBODY, NOBODY, 5 * idle + 3))


def test_of_a_users_turn_only_the_first_event_is_heard():
    start = clock(steady(32, 1000, 0))
    assert clock([1003, 5000, 5000], state=start, users=["a", "a", "b"])[NOW] == 1013
    one_device = clock([1003] + [10**9] * 500, state=start, users=["a"] * 501)
    assert one_device[NOW] == 1003
    assert clock([2000] * 500, state=start, users=["a"] * 500)[NOW] == 1010
    assert clock([7] * 100, users=["a"] * 100)[COUNT] == 1


def test_a_turn_goes_on_across_batches():
    whole = run([1, 9, 9, 4, 4], users=["a", "a", "a", "b", "b"])
    state = new_clock()
    for k, user in enumerate("aaabb"):
        state = run([(1, 9, 9, 4, 4)[k]], state=state, first_offset=k, users=[user]).state
    np.testing.assert_array_equal(state, whole.state)
    assert whole.state[COUNT] == 2
