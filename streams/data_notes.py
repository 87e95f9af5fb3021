"""What a report must state about copies of public data that are not quite the published ones."""

from __future__ import annotations

import numpy as np

from configs.settings import DataSettings
from streams.movielens import find_movielens
from streams.ordering import OrderedEvents

ML_1M_RATINGS = 1_000_209
"""Ratings of MovieLens 1M as GroupLens publishes it (its README)."""
REBUILT_STEP_MS = 6_000
"""Copies whose clock was lost space a user's events six seconds apart."""
LOOKED_AT = 65_536
"""Events that are enough to tell a rebuilt clock from a real one."""


def data_notes(data: DataSettings, ordered: OrderedEvents) -> tuple[str, ...]:
    """Notes on a MovieLens 1M copy with missing ratings or a rebuilt clock; none for other data."""
    copies = [find_movielens(path) for path in data.paths]
    if len(copies) != 1 or copies[0] is None or copies[0].ratings.name != "ratings.dat":
        return ()
    notes = []
    missing = ML_1M_RATINGS - ordered.events
    if 0 < missing < ML_1M_RATINGS // 100:
        notes.append(f"The ratings are the published ones of MovieLens 1M less {missing} rows.")
    if _has_rebuilt_clock(ordered):
        notes.append(
            "The clock is an estimate: this copy's timestamps were rebuilt, a user's events follow each other six "
            "seconds apart in file order; the order in which users arrive is real."
        )
    return tuple(notes)


def _has_rebuilt_clock(ordered: OrderedEvents) -> bool:
    batch = next(ordered.batches(last=LOOKED_AT))
    order = np.argsort(batch.user, kind="stable")
    same_user = np.diff(batch.user[order]) == 0
    steps = np.diff(batch.event_time_ms[order])[same_user]
    return bool(len(steps)) and float((steps == REBUILT_STEP_MS).mean()) > 0.99
