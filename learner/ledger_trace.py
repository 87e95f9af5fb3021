"""Where a user's ledger left the source: which event was lost, doubled or changed first.

A chain can be followed from both ends: forward from its start, and, since each of its rounds is one to one, backward
from the ledger that a row has. The place where the two meet is the stretch that was left out, or applied twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.ledger import chain, chain_back
from learner.user_state import RowLayout, age_code, age_of, recent_events


@dataclass(frozen=True, slots=True)
class History:
    """All K events of one user in a source, in their order."""

    offsets: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    """``item_hash`` of each item"""
    labels: NDArray[np.int8]
    times_ms: NDArray[np.int64]
    starts: NDArray[np.bool_]
    """(K,) where the user starts anew: at the first event, and after having been idle"""

    def part(self, first: int, last: int) -> History:
        """Events ``first .. last − 1``."""
        part = slice(first, last)
        return History(self.offsets[part], self.hashes[part], self.labels[part], self.times_ms[part], self.starts[part])

    @staticmethod
    def joined(parts: Sequence[History]) -> History:
        """Of parts that follow each other."""
        return History(
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.hashes for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.times_ms for part in parts]),
            np.concatenate([part.starts for part in parts]),
        )

    def chain(self) -> NDArray[np.uint64]:
        """(K + 1,) ledgers of these events as one life."""
        ledgers: NDArray[np.uint64] = chain(self.offsets, self.hashes, self.labels, self.times_ms)
        return ledgers

    def chain_back(self, ledger: np.uint64) -> NDArray[np.uint64]:
        """(K + 1,) ledgers that end as ``ledger`` after these events."""
        ledgers: NDArray[np.uint64] = chain_back(ledger, self.offsets, self.hashes, self.labels, self.times_ms)
        return ledgers


class Divergence(NamedTuple):
    """The first event on which a row and its source disagree."""

    offset: int
    exact: bool
    """False: at this offset or before it"""
    what: str
    """In words, about that offset"""


def trace(history: History, layout: RowLayout, row: np.void, up_to: int) -> Divergence:
    """Compares a row (of ``layout.rows``) that differs with the user's events, of which it must have those ``up_to``.

    ValueError where the source has no event of the user up to there.
    """
    due = int(np.searchsorted(history.offsets, up_to, side="right"))
    lives = np.flatnonzero(history.starts[:due])
    if not len(lives):
        raise ValueError("the source has no event of this user")
    start, ledger = int(lives[-1]), np.uint64(row["ledger"])
    seen = int(np.searchsorted(history.offsets, int(row["last_offset"]), side="right"))
    return (
        _only_the_count(history.part(start, due), ledger)
        or _ended_early(history.part(start, due), ledger)
        or _lost_or_doubled(history.part(start, max(seen, start)), ledger)
        or _not_started_anew(history, lives, seen, ledger)
        or _first_in_the_ring(history.part(start, max(seen, start + 1)), layout, row)
    )


def _only_the_count(life: History, ledger: np.uint64) -> Divergence | None:
    if life.chain()[-1] != ledger:
        return None
    return Divergence(int(life.offsets[-1]), False, "the ledger agrees and the count does not: the count was changed")


def _ended_early(life: History, ledger: np.uint64) -> Divergence | None:
    """The row has the first events and not the last ones."""
    ends = np.flatnonzero(life.chain() == ledger)
    if not len(ends):
        return None
    missing = len(life.offsets) - int(ends[0])
    return Divergence(int(life.offsets[ends[0]]), True, f"{_events(missing)} from there on are missing")


def _lost_or_doubled(life: History, ledger: np.uint64) -> Divergence | None:
    """One stretch was left out, or applied twice, and all others once."""
    _, forward, backward = np.intersect1d(life.chain(), life.chain_back(ledger), return_indices=True)
    if not len(forward):
        return None
    i, j = int(forward[0]), int(backward[0])
    if i < j:
        return Divergence(int(life.offsets[i]), True, f"{_events(j - i)} from there on {_were(j - i)} lost")
    return Divergence(int(life.offsets[j]), True, f"{_events(i - j)} from there on {_were(i - j)} applied twice")


def _not_started_anew(history: History, lives: NDArray[np.int64], seen: int, ledger: np.uint64) -> Divergence | None:
    """The row went on where the user had been idle for too long."""
    for earlier, start in zip(lives[-2::-1].tolist(), lives[:0:-1].tolist(), strict=True):
        if history.part(earlier, seen).chain()[-1] == ledger:
            return Divergence(int(history.offsets[start]), True, "the user was idle and did not start anew there")
    return None


def _first_in_the_ring(life: History, layout: RowLayout, row: np.void) -> Divergence:
    """The first of the latest events that is another one; the two sides are held together at their ends."""
    ring = recent_events(layout, row)
    common = min(len(ring.item), len(life.offsets))
    if not common:
        return Divergence(int(life.offsets[-1]), False, "more than one stretch differs")
    first = int(row["first_time_ms"])
    times = first + 1000 * age_of(age_code((life.times_ms[-common:] - first) // 1000))
    differs = ring.item[-common:] != life.hashes[-common:] >> np.uint64(24)
    differs |= ring.label[-common:] != life.labels[-common:]
    differs |= ring.time_ms[-common:] != times
    k = int(np.argmax(differs)) if differs.any() else 0
    offset = int(life.offsets[-common:][k])
    if k == 0:
        return Divergence(offset, False, "the row's latest events do not reach back to the first that differs")
    return Divergence(offset, True, "the row has another event there")


def _events(count: int) -> str:
    return f"{count:,} event{'s' * (count != 1)}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
