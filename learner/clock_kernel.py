"""The compiled loop of ``learner.event_clock``."""

from __future__ import annotations

from numba import njit

from learner.event_clock import COUNT, FIRST_EVENTS, LAG, LAG_LIMIT, MOST_LAG, NOW, SINCE, TOLD


@njit(cache=True)
def advance_clock(state, times, step, counted, before, after, since, states):  # type: ignore[no-untyped-def]
    """See ``learner.event_clock.advance``; ``state`` is changed, and the four outputs are filled."""
    for n in range(len(times)):
        settled = state[LAG] < LAG_LIMIT
        before[n] = state[TOLD] if settled else 0
        since[n] = state[SINCE]
        if n >= counted:
            _tick(state, times[n], step, settled)
        after[n] = state[TOLD] if state[LAG] < LAG_LIMIT else 0
        states[n] = state


@njit(cache=True)
def _tick(state, time, step, settled):  # type: ignore[no-untyped-def]
    if state[COUNT] < FIRST_EVENTS:
        state[NOW] = time if state[COUNT] == 0 else min(state[NOW], time)
        state[COUNT] += 1
        return
    ahead = time - state[NOW]
    state[NOW] += min(max(ahead, -step), step)
    state[LAG] = min(state[LAG] + 1, MOST_LAG) if ahead > step else max(state[LAG] - 1, 0)
    if state[LAG] < LAG_LIMIT:
        state[TOLD] = max(state[TOLD], state[NOW])
        if not settled:
            state[SINCE] = state[TOLD]
