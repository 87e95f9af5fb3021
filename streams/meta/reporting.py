"""When a partition reports, of which span, and what became of it. Pure; one for each partition that a worker has.

    events applied ─► enough of them, and nothing is outstanding ─► a contribution is due, of the span since the last
    one that was consumed ─► sent ─► a marker of ``meta-versions`` says how far the partition is consumed:
        as far as the span goes      it is over
        not so far                   it was refused, lost, or left out of a round: due again, of all events until now
        further, or in between       somebody else reported the partition meanwhile: what is beyond is still to be told

A contribution is always made of the last marker's head. One that no marker answers is made again after a while: should
both arrive, the second is refused by its span.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from state.lineage import Span

Outcome = Literal["nothing", "over", "in part", "again"]


@dataclass(frozen=True, slots=True)
class Reported:
    """What a marker has made of a span that was sent."""

    outcome: Outcome
    """``nothing`` was outstanding; ``in part``: its events up to ``consumed`` are over, by another's contribution"""
    consumed: int
    """Last offset of the partition's that a round has consumed: what was seen up to there is over"""


class _Cut(NamedTuple):
    last: int
    """Offset"""
    events: int


class _Sent(NamedTuple):
    span: Span
    at_s: float


class Reporter:
    """Starts with nothing outstanding. Tell it every batch, every marker and every contribution sent, in order."""

    def __init__(
        self, partition: int, partitions: int, every_events: int, consumed: Mapping[int, int], *, resend_s: float
    ) -> None:
        """``partitions`` of the stream; ``every_events`` of it make a round; ``consumed``: the last marker's.

        ``resend_s``: after so long without any marker a contribution counts as lost. ValueError below 0.
        """
        if partitions < 1 or every_events < 1 or resend_s < 0:
            raise ValueError(f"{partitions} partitions, {every_events} events, {resend_s} s: nothing comes of that")
        self.partition = partition
        self._threshold = -(-every_events // partitions)
        self._resend_s = resend_s
        self._consumed = consumed.get(partition, -1)
        self._cuts: deque[_Cut] = deque()
        self._events = 0
        self._sent: _Sent | None = None

    @property
    def events(self) -> int:
        """Seen, and not known to be consumed."""
        return self._events

    @property
    def consumed(self) -> int:
        """The last offset known to be consumed; −1: none."""
        return self._consumed

    def observed(self, last: int, events: int) -> None:
        """A batch was applied that ends at this offset; what was consumed before is left out.

        Whoever takes a partition over tells first how far its store is, with as many events as that may be.
        """
        if last > self._consumed and events > 0:
            self._cuts.append(_Cut(last, events))
            self._events += events

    def due(self, now_s: float) -> Span | None:
        """The span that a contribution is to be made of now, from the offset after the last consumed; None: wait."""
        if self._events < self._threshold:
            return None
        if self._sent is not None and now_s - self._sent.at_s < self._resend_s:
            return None
        return Span(self.partition, self._consumed + 1, self._cuts[-1].last)

    def sent(self, span: Span, now_s: float) -> None:
        """A contribution of the span ``due`` gave is on its way."""
        self._sent = _Sent(span, now_s)

    def marker(self, consumed: Mapping[int, int]) -> Reported:
        """A marker was read: all that is outstanding is answered by it."""
        sent, self._sent = self._sent, None
        self._consumed = max(self._consumed, consumed.get(self.partition, -1))
        while self._cuts and self._cuts[0].last <= self._consumed:
            self._events -= self._cuts.popleft().events
        if sent is None:
            return Reported("nothing", self._consumed)
        if self._consumed >= sent.span.last:
            return Reported("over", self._consumed)
        return Reported("in part" if self._consumed >= sent.span.first else "again", self._consumed)
