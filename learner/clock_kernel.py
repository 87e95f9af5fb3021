"""The compiled loop of ``learner.event_clock``."""

from __future__ import annotations

import numpy as np
from numba import njit

from learner.event_clock import (
    AGREED,
    COUNT,
    FIRST_TURNS,
    HELD,
    IDLE,
    MARKS,
    NOW,
    ODD_TURNS,
    OFFSETS,
    OPEN,
    TIMES,
    TOP,
)


@njit(cache=True)
def advance_clock(state, times, offsets, turns, step, limit, grain, idle):  # type: ignore[no-untyped-def]
    """See ``learner.event_clock.advance``; ``state`` is changed, and ``idle`` is filled. ``turns``: who begins one."""
    for n in range(len(times)):
        idle[n] = state[IDLE]
        if not turns[n]:
            continue
        if state[COUNT] < FIRST_TURNS:
            _start(state, times[n], offsets[n])
        else:
            _tick(state, times[n], offsets[n], step, limit, grain)


@njit(cache=True)
def _start(state, time, offset):  # type: ignore[no-untyped-def]
    state[TIMES + state[COUNT]] = time
    state[COUNT] += 1
    if state[COUNT] == FIRST_TURNS:
        first = state[TIMES : TIMES + FIRST_TURNS]
        state[NOW] = state[TOP] = np.sort(first)[(FIRST_TURNS - 1) // 2]
        state[OPEN] = offset
        first[:] = 0


@njit(cache=True)
def _tick(state, time, offset, step, limit, grain):  # type: ignore[no-untyped-def]
    ahead = time - state[NOW]
    state[NOW] += min(max(ahead, -step), step)
    state[TOP] = max(state[TOP], state[NOW])
    state[AGREED] = max(state[AGREED] - 1, 0) if ahead > step else state[AGREED] + 1
    if state[AGREED] >= ODD_TURNS:
        _mark(state, state[OPEN], state[TOP], grain)
        state[OPEN], state[TOP], state[AGREED] = offset, state[NOW], 0
    while state[HELD] > 0 and state[NOW] - state[TIMES] > limit:
        state[IDLE] = state[OFFSETS]
        _drop_oldest(state)


@njit(cache=True)
def _mark(state, offset, time, grain):  # type: ignore[no-untyped-def]
    """Events up to ``offset`` were at ``time`` or before: a mark of its own, or the latest one goes further."""
    while state[HELD] > 0 and state[TIMES + state[HELD] - 1] > time + grain:
        state[HELD] -= 1  # made when the clock was too far ahead: this one says more
    last = state[HELD] - 1
    if last >= 0 and (state[TIMES + last] >= time or state[HELD] == MARKS):
        state[TIMES + last] = max(state[TIMES + last], time)
        state[OFFSETS + last] = offset
    else:
        state[TIMES + last + 1], state[OFFSETS + last + 1] = time + grain, offset
        state[HELD] += 1


@njit(cache=True)
def _drop_oldest(state):  # type: ignore[no-untyped-def]
    state[HELD] -= 1
    for start in (TIMES, OFFSETS):
        for k in range(start, start + state[HELD]):
            state[k] = state[k + 1]
        state[start + state[HELD]] = 0
