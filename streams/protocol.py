"""The evaluation protocol: which events are learned from offline, which are streamed, which are scored.

Users are ordered by their first event; T is the first event of the first user of the last ``1 − offline_fraction``.
Offline: events before T of users who began before T. Online: all events of users who began at or after T, in time
order, each predicted before its label is used. (Events after T of offline users belong to neither.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.exceptions import ColdstreamError
from learner.interactions import Interactions
from streams.ordering import OrderedEvents


class ProtocolError(ColdstreamError):
    """The events cannot be split as asked: the message says why and what to change."""


@dataclass(frozen=True, slots=True)
class Split:
    """Where the users and events of one source are cut."""

    cut_time_ms: int
    """T"""
    offline_users: int
    """The first so many of the users in order of arrival are offline, the others online"""
    scored_from: int
    """Only users from this place in the order of arrival on are scored"""

    def is_online(self, ordered: OrderedEvents) -> frozenset[str]:
        """Ids of the online users."""
        return frozenset(ordered.user_ids[self.offline_users :])

    def is_scored(self, ordered: OrderedEvents) -> frozenset[str]:
        """Ids of the users whose predictions count."""
        return frozenset(ordered.user_ids[self.scored_from :])


def split_users(ordered: OrderedEvents, offline_fraction: float, score_last: float | None = None) -> Split:
    """The cut after ``offline_fraction`` of the users; ``score_last`` scores only the last share of all users.

    Raises ProtocolError when either side would be empty, or users would be scored that are not online.
    """
    users = len(ordered.user_ids)
    if users < 2:
        raise ProtocolError(f"the data has {users} user: at least one to learn from and one to stream are needed")
    cut, offline = _cut(ordered.first_event_ms, offline_fraction)
    if offline == 0:
        raise ProtocolError(
            f"no offline users: the first {offline_fraction:.0%} of {users:,} users all began at the same time "
            f"({cut} ms); raise protocol.offline_fraction, or check the time column and its unit"
        )
    if score_last is None:
        return Split(cut, offline, offline)
    _, scored_from = _cut(ordered.first_event_ms, 1 - score_last)
    if scored_from < offline:
        raise ProtocolError(
            f"protocol.score_last {score_last:g} asks for users that are offline under protocol.offline_fraction "
            f"{offline_fraction:g}: it can be at most {1 - offline_fraction:g}"
        )
    return Split(cut, offline, scored_from)


def _cut(first_event_ms: NDArray[np.int64], fraction: float) -> tuple[int, int]:
    first = min(int(len(first_event_ms) * fraction + 1e-9), len(first_event_ms) - 1)
    time = int(first_event_ms[first])
    return time, int(np.searchsorted(first_event_ms, time, side="left"))


def offline_events(ordered: OrderedEvents, split: Split) -> Interactions:
    """The events to learn from, in time order."""
    online = split.is_online(ordered)
    parts = []
    for batch in ordered.batches():
        before = batch.event_time_ms < split.cut_time_ms
        if not before.any():
            break
        parts.append(batch.take(np.flatnonzero(before & ~_of_users(batch, online))).pruned())
    return Interactions.concatenate(parts)


def online_batches(ordered: OrderedEvents, split: Split) -> Iterator[Interactions]:
    """The events to stream, in time order, with their positions in it as offsets.

    The positions, not the source's offsets: a stream's offsets rise with its events, and a source that is not
    sorted by time has others.
    """
    online = split.is_online(ordered)
    position = 0
    for batch in ordered.batches():
        if batch.event_time_ms[-1] >= split.cut_time_ms:
            kept = np.flatnonzero(_of_users(batch, online))
            if len(kept):
                yield batch.take(kept).pruned().with_offsets(position + kept)
        position += len(batch)


def _of_users(batch: Interactions, users: frozenset[str]) -> NDArray[np.bool_]:
    belongs = np.fromiter((u in users for u in batch.user_ids), dtype=np.bool_, count=len(batch.user_ids))
    return belongs[batch.user]
