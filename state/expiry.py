"""How long users may be away, and what of it a partition's progress keeps. Pure: numbers and bytes.

Who is idle is decided by ``learner.event_clock`` alone: the stream's events give it an offset, and every user whose
latest event has that offset or an earlier one is idle. Idle users are dropped when their next event comes, which
starts them anew, and a sweep (``state.sweep``) takes out those who do not come back. The offset never goes back, so
the two agree: which of them it was cannot be told from any prediction or row.

A user who was away for no longer than the configured time is never idle (what that rests on, the clock's module
says). Who was away for half as long again is idle where the stream has a thousand turns of users or more in the
configured time, with two exceptions: after a gap in the stream the clock takes as many turns to catch up as the gap has
steps, and who came in the last hundred turns before a gap counts as having come after it. With fewer turns it takes
longer; with fewer than STEPS in the configured time it may never happen.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.event_clock import IDLE, NOBODY, ODD_TURNS, STATE_WIDTH, Pace

STEPS = 256
"""The clock steps by this part of the configured time."""
GRAIN_STEPS = 16
"""Marks are so far apart, a 16th of the configured time: so rarely does a sweep find anything new."""
_STATE = struct.Struct(f"<{STATE_WIDTH}q")


@dataclass(frozen=True, slots=True)
class Expiry:
    """How long a user may be away."""

    after_ms: int

    @property
    def pace(self) -> Pace:
        """The clock's: its limit is an eighth longer, by as much as odd times may push the clock ahead."""
        step = max(self.after_ms // STEPS, 1)
        return Pace(step, self.after_ms + ODD_TURNS * step, GRAIN_STEPS * step)


def idle_up_to(packed: bytes) -> int:
    """The offset at or before which a user's latest event makes that user idle; NOBODY where there is no clock yet."""
    state = unpack_clock(packed)
    return NOBODY if state is None else int(state[IDLE])


def pack_clock(state: NDArray[np.int64]) -> bytes:
    """A clock's state for ``codec.Progress``."""
    return _STATE.pack(*state.tolist())


def unpack_clock(packed: bytes) -> NDArray[np.int64] | None:
    """The other way; None where there is no clock yet, or one of an earlier form: a new one finds nobody idle early."""
    return np.array(_STATE.unpack(packed), np.int64) if len(packed) == _STATE.size else None
