"""Who has been away for too long: by the partition's event clock alone. Pure: arrays in, arrays out.

A user is idle when the clock (``learner.event_clock``) has moved on by more than the configured time, and an eighth of
it, since the user's latest event; the eighth covers how far odd event times can push the clock ahead. Both ends are
read off the clock: what an event says of its own time neither keeps its user nor drops anyone. Idle users are dropped
when their next event comes, which starts them anew, and a sweep takes out those who do not come back. Which of the
two it was cannot be told from any row.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.event_clock import SINCE, told_ms
from learner.user_state import RowLayout, Slab

STEPS = 256
"""The clock steps by this part of the configured time, so a stream with fewer events in that time expires nobody."""
MARGIN_STEPS = 32
"""What odd events may push the clock ahead: a run of as many of them does not drop a live user."""
_STATE = struct.Struct("<5q")


@dataclass(frozen=True, slots=True)
class Expiry:
    """How long a user may be idle."""

    after_ms: int

    @property
    def step_ms(self) -> int:
        """The clock's step."""
        return max(self.after_ms // STEPS, 1)

    @property
    def limit_ms(self) -> int:
        """Away for longer than this is idle."""
        return self.after_ms + MARGIN_STEPS * self.step_ms

    def idle(
        self, seen_ms: NDArray[np.int64], now_ms: NDArray[np.int64], since_ms: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """(n,) who is idle. 0 in ``seen_ms``: last seen by an unsettled clock, which counts as when it settled since.

        0 in ``now_ms``: the clock is not settled, and nobody is idle.
        """
        seen = np.maximum(np.where(seen_ms > 0, seen_ms, since_ms), 0)
        return (now_ms > 0) & (now_ms - seen > self.limit_ms)

    def idle_now(self, seen_ms: NDArray[np.int64], clock: bytes) -> NDArray[np.bool_]:
        """(n,) who is idle by a partition's packed clock."""
        told, since = clock_times(clock)
        return self.idle(seen_ms, np.full(len(seen_ms), told), np.full(len(seen_ms), since))


def clock_times(packed: bytes) -> tuple[int, int]:
    """(what a packed clock tells, when it last settled), in milliseconds; 0 in the first: it is not settled."""
    state = unpack_clock(packed)
    return (0, 0) if state is None else (told_ms(state), int(state[SINCE]))


def pack_clock(state: NDArray[np.int64]) -> bytes:
    """A clock's state for ``codec.Progress``."""
    return _STATE.pack(*state.tolist())


def unpack_clock(packed: bytes) -> NDArray[np.int64] | None:
    """The other way; None where there is no clock yet."""
    return np.array(_STATE.unpack(packed), np.int64) if packed else None


def seen_ms(layout: RowLayout, slab: Slab, slots: NDArray[np.int32] | slice = slice(None)) -> NDArray[np.int64]:
    """(n,) when the clock last saw the user of each row; 0: by no settled clock."""
    return layout.rows(slab)["seen_s"][slots].astype(np.int64) * 1000


def set_seen(layout: RowLayout, slab: Slab, slots: NDArray[np.int32], seen: NDArray[np.int64]) -> None:
    """Puts down when the clock saw the rows' users, rounded up to the second so that nobody looks idle too early."""
    layout.rows(slab)["seen_s"][slots] = np.clip(-(-seen // 1000), 0, 0xFFFFFFFF)
