"""Who has been away for too long, by a stream's own events: for expiry. No single event decides it.

What time it is. The clock hears the first event of each *turn*, which is a run of events of one user, and steps towards
its time, by at most one step: a running median, which a minority of odd times cannot drag away. It may lag (after a gap
in the stream it needs as many turns as the gap has steps), and odd times may push it ahead, by a step each.

When a user was last here. Not by any time, but by the offset of the user's latest event. The clock keeps *marks*: (an
offset, a time), saying that the events up to that offset were at that time or before. A mark is made with hindsight, as
soon as enough later turns show that the clock does not lag. Once the clock is ahead of a mark by more than the limit,
all users whose latest event came at or before the mark's offset are idle. That offset never goes back, so who is idle
stays idle until the next event, whenever it is asked.

What holds while odd turns never outnumber the honest ones by ODD_TURNS in any stretch of the stream, honest events
being in the order of their times: the clock is ahead of the honest time by less than ODD_TURNS steps, and no mark is
earlier than the honest time at its offset. So who is idle has been away for longer than the limit, less ODD_TURNS
steps.

All depends on the events in their order alone, not on how they were cut into batches.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from learner.interactions import Interactions

ODD_TURNS = 32
"""So many turns more that agree with the clock than are ahead of it cannot all be odd: they make a mark."""
FIRST_TURNS = 32
"""The clock starts at the median of the times of so many turns. If most of them are odd it starts far off, and needs as
many turns as there are steps to come back; until then nobody is idle."""
MARKS = 32
"""Marks held at most. They are at least a grain apart, so that a limit of 18 grains needs some 20."""
FARTHEST_MS = 1 << 60
"""Times beyond it count as this (36 million years): sums and differences then fit 64 bits."""

NOW, COUNT, OPEN, TOP, AGREED, IDLE, HELD, USER = range(8)
"""Places in the clock's state: the clock, turns so far (up to FIRST_TURNS), the offset that the next mark will have,
the furthest that the clock was since then, turns since then that agree (net), the offset up to which users are idle,
how many marks are held, and a hash of the id of the latest event's user"""
TIMES = 8
"""Where the marks' times begin, the oldest first; until the clock has started, the first turns' times stand here"""
OFFSETS = TIMES + MARKS
"""Where the marks' offsets begin"""
STATE_WIDTH = OFFSETS + MARKS
NOBODY = -1
"""The offset up to which users are idle when nobody is"""
_NO_USER = -1
"""No id has this hash"""


class Pace(NamedTuple):
    """How the clock runs, in milliseconds."""

    step_ms: int
    """The most that one turn moves the clock"""
    limit_ms: int
    """Users away for longer are idle"""
    grain_ms: int
    """How far marks are apart: users may be found idle so much later"""


class Ticks(NamedTuple):
    """The clock at N events."""

    idle: NDArray[np.int64]
    """(N,) before each event: users whose latest event has this offset or an earlier one are idle"""
    state: NDArray[np.int64]
    """(STATE_WIDTH,) after the last event"""


def new_clock() -> NDArray[np.int64]:
    """(STATE_WIDTH,) the state before the first event."""
    state = np.zeros(STATE_WIDTH, np.int64)
    state[IDLE], state[USER] = NOBODY, _NO_USER
    return state


def advance(state: NDArray[np.int64], events: Interactions, pace: Pace) -> Ticks:
    """The clock at each of N events, from ``state`` on, which is not changed. Their offsets rise."""
    from learner.clock_kernel import advance_clock  # not above: who only reads a clock needs no compiled code

    n = len(events)
    ticks = Ticks(np.empty(n, np.int64), state.copy())
    if n:
        first, last = (_hash(events.user_ids[events.user[k]]) for k in (0, -1))
        turns = np.append(first != state[USER], events.user[1:] != events.user[:-1])
        times = np.clip(events.event_time_ms, -FARTHEST_MS, FARTHEST_MS)
        advance_clock(ticks.state, times, np.array(events.offset), turns, *pace, ticks.idle)
        ticks.state[USER] = last
    return ticks


def _hash(user_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(user_id.encode(), digest_size=8).digest(), "little", signed=True)
