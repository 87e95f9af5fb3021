"""What time it is on a stream, by its events: for expiry. No single event, user or wrong device can set this clock.

The inner clock steps towards each event's time, by at most one *step*: a running median, which a minority of odd times
cannot drag away. The clock that is told is the furthest that the inner one has been, so it never goes back. It is told
only while it is *settled*: after its first events, and after a gap in the stream, the inner clock lags behind the
events until it has caught up; meanwhile nobody can be called idle.

It depends on the events in their order alone, not on how they were cut into batches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FIRST_EVENTS = 32
"""The clock starts at the earliest time among these: an odd one that lies behind is caught up with."""
LAG_LIMIT = 32
"""Settled is a clock that fewer than so many recent events, net, were more than a step ahead of."""
MOST_LAG = 64
"""The count of such events stops here, so that settling takes as many events that agree, less LAG_LIMIT."""
NOW, TOLD, SINCE, LAG, COUNT = range(5)
"""Places in the clock's state, (5,) int64: inner clock, told clock, when it last settled, lag, and how many events
came, counted up to FIRST_EVENTS"""


class Ticks(NamedTuple):
    """The clock at N events, in milliseconds."""

    before: NDArray[np.int64]
    """(N,) as it was told before the event; 0 while it is not settled"""
    after: NDArray[np.int64]
    """(N,) after the event; 0 while it is not settled"""
    since: NDArray[np.int64]
    """(N,) when it had last settled before the event"""
    states: NDArray[np.int64]
    """(N, 5) the clock's state after each event"""


def new_clock() -> NDArray[np.int64]:
    """The state before the first event."""
    return np.array([0, 0, 0, MOST_LAG, 0], np.int64)


def advance(state: NDArray[np.int64], times_ms: NDArray[np.int64], step_ms: int, counted: int = 0) -> Ticks:
    """The clock at each event of a batch, from ``state`` on, which is not changed.

    The first ``counted`` events have moved the clock before: they see it as it stands.
    """
    from learner.clock_kernel import advance_clock  # not above: who only reads a clock needs no compiled code

    n = len(times_ms)
    ticks = Ticks(np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, 5), np.int64))
    times = np.array(times_ms, np.int64)
    times.flags.writeable = False
    advance_clock(state.copy(), times, step_ms, counted, *ticks)
    return ticks


def told_ms(state: NDArray[np.int64]) -> int:
    """What the clock says; 0 while it is not settled."""
    return int(state[TOLD]) if state[LAG] < LAG_LIMIT else 0
