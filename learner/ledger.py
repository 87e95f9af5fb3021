"""The ledger: a hash chain over a user's applied events, compiled.

Two rows with equal event counts and ledgers applied the same events in the same order, each of them once. Comparing
adaptive parts could not show that: later updates erase the trace of a doubled event.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def _mix(word: np.uint64) -> np.uint64:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014; constants: Stafford's variant 13)."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@njit(cache=True)
def extend_ledger(
    ledger: np.uint64, offset: np.int64, hashed_item: np.uint64, label: np.int8, time_ms: np.int64
) -> np.uint64:
    """The ledger after one more event; 0 is the ledger of none.

    Each event goes through three rounds, so ledgers agree only if the same events were applied in the same order,
    each of them once. It guards against mistakes, not against an adversary.
    """
    ledger = _mix(ledger + np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(offset))
    ledger = _mix(ledger ^ hashed_item)
    return _mix(ledger ^ (np.uint64(time_ms) << np.uint64(1) | np.uint64(label)))
