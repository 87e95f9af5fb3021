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


@njit(cache=True)
def extend_ledgers(user, item, label, times, offsets, hashes, idle, floor, events, ledgers, last):  # type: ignore[no-untyped-def]
    """Enters N events into the ledgers of U users, in place; see ``learner.tally``.

    ``hashes`` is by item, ``idle`` by event; ``floor``, ``events``, ``ledgers`` and ``last`` (offset) are by user.
    """
    for n in range(len(user)):
        u = user[n]
        if offsets[n] <= floor[u]:
            continue
        if events[u] > 0 and last[u] <= idle[n]:
            events[u], ledgers[u] = 0, np.uint64(0)
        ledgers[u] = extend_ledger(ledgers[u], offsets[n], hashes[item[n]], label[n], times[n])
        events[u] += 1
        last[u] = offsets[n]


@njit(cache=True)
def chain(offsets, hashes, labels, times):  # type: ignore[no-untyped-def]
    """(K + 1,) the ledger before the first of K events, and after each."""
    ledgers = np.zeros(len(offsets) + 1, np.uint64)
    for k in range(len(offsets)):
        ledgers[k + 1] = extend_ledger(ledgers[k], offsets[k], hashes[k], labels[k], times[k])
    return ledgers


@njit(cache=True)
def chain_back(ledger, offsets, hashes, labels, times):  # type: ignore[no-untyped-def]
    """(K + 1,) the ledger before each of K events that ends as ``ledger`` after the last: each round is one to one."""
    ledgers = np.zeros(len(offsets) + 1, np.uint64)
    ledgers[-1] = ledger
    for k in range(len(offsets) - 1, -1, -1):
        before = _unmix(ledgers[k + 1]) ^ (np.uint64(times[k]) << np.uint64(1) | np.uint64(labels[k]))
        before = _unmix(_unmix(before) ^ hashes[k]) ^ np.uint64(offsets[k])
        ledgers[k] = before - np.uint64(0x9E3779B97F4A7C15)
    return ledgers


_INVERSES = tuple(np.uint64(pow(factor, -1, 1 << 64)) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@njit(cache=True)
def _unmix(word: np.uint64) -> np.uint64:
    """The word that ``_mix`` made this of."""
    first, second = _INVERSES
    word = (word ^ (word >> np.uint64(31)) ^ (word >> np.uint64(62))) * second
    word = (word ^ (word >> np.uint64(27)) ^ (word >> np.uint64(54))) * first
    return word ^ (word >> np.uint64(30)) ^ (word >> np.uint64(60))
