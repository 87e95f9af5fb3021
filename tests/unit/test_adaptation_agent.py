"""A chunk is decoded, what is poison set aside once, and the rest applied, however often the disk refuses it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.settings import EventSchema, StreamSettings, WorkerSettings
from learner.interactions import Interactions
from state.exceptions import StoreWriteFailed
from streams.decoding.decoder import decoder_of
from streams.kafka.chunk import Chunk
from streams.live import adaptation
from streams.live.adaptation import AdaptationAgent, AdaptedPartition
from streams.live.closing import Closing
from streams.live.dead_letters import PoisonWatch
from streams.live.duplicates import DuplicateWindow
from streams.live.health import Health
from streams.live.metrics import WorkerMetrics
from streams.live.watch import Watch
from streams.processor import Predictions
from tests.decoding import chunk_of

SCHEMA = EventSchema.model_validate({"event_id": {"field": "id"}})
GOOD = [
    b'{"user_id": "u%d", "item_id": "i", "label": 1, "event_time_ms": 1700000000000, "id": "e%d"}' % (k, k)
    for k in range(4)
]


class Processor:
    """Says what it was given, and refuses so often."""

    def __init__(self, refusals: int, guarded: int) -> None:
        self.counts = SimpleNamespace(guarded=0)
        self.given: list[tuple[list[int], int]] = []
        self._refusals, self._guarded = refusals, guarded

    def process(self, partition: int, events: Interactions, *, through: int, payload: object) -> Predictions:
        if self._refusals:
            self._refusals -= 1
            raise StoreWriteFailed("the disk is full")
        self.given.append((events.offset.tolist(), through))
        self.counts.guarded += self._guarded
        n = len(events)
        return Predictions(np.zeros(n, np.float32), np.zeros(n, np.float32), np.ones(n, np.bool_), np.full(n, -1))


class Letters:
    def __init__(self) -> None:
        self.sent: list[int] = []

    async def send(self, chunk: Chunk, poison: Sequence[Any]) -> None:
        self.sent += [one.index for one in poison]


class Publisher:
    told_offset = None

    def wake(self) -> None: ...

    async def until_pending(self, commits: int, size: int) -> None: ...


class Desk:
    def __init__(self, refusals: int = 0, guarded: int = 0) -> None:
        self.processor, self.letters = Processor(refusals, guarded), Letters()
        self.metrics = WorkerMetrics("1", "m")
        self.watch = Watch(self.metrics, Health(WorkerSettings(), lambda: 0.0), 60.0)

    def apply(self, *values: bytes, closing: bool = False) -> AdaptedPartition:
        async def applying(adapting: ThreadPoolExecutor) -> AdaptedPartition:
            agent = AdaptationAgent(
                self.processor, decoder_of(SCHEMA, StreamSettings()).decode, self.letters, self.watch, adapting,  # type: ignore[arg-type]
                tell_predictions=False,
            )  # fmt: skip
            owned = AdaptedPartition(
                0,
                0,
                SimpleNamespace(pending_commits=1),
                Publisher(),
                DuplicateWindow(100),
                PoisonWatch(0.9),
                released,  # type: ignore[arg-type]
            )
            if closing:
                owned.closing.set()
            await agent.apply(owned, chunk_of(list(values)), len(values))
            return owned

        async def released() -> None: ...

        with ThreadPoolExecutor(1) as adapting:
            return asyncio.run(applying(adapting))

    def outcome(self, name: str) -> float:
        return self.metrics.registry.get_sample_value("coldstream_events_total", {"outcome": name}) or 0.0


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "RETRY_S", 0.0)


def test_the_offset_passes_what_is_no_event_and_what_came_twice() -> None:
    desk = Desk()
    owned = desk.apply(GOOD[0], b"?", GOOD[1], GOOD[0])
    assert desk.processor.given == [([5, 11], 16)]  # every third offset is a record's
    assert owned.next_offset == 17
    assert desk.letters.sent == [1]
    assert [desk.outcome(name) for name in ("applied", "duplicate", "dead_letter")] == [2, 1, 1]


def test_a_disk_that_refuses_is_asked_again_and_letters_are_not_sent_again_for_it() -> None:
    desk = Desk(refusals=3)
    desk.apply(GOOD[0], b"?", GOOD[1])
    assert desk.letters.sent == [1]
    assert [len(given) for given, _ in desk.processor.given] == [2]
    assert [desk.outcome(name) for name in ("applied", "duplicate", "dead_letter")] == [2, 0, 1]


def test_updates_that_were_refused_as_not_finite_are_counted_apart() -> None:
    desk = Desk(guarded=1)
    desk.apply(*GOOD)
    assert [desk.outcome(name) for name in ("applied", "guarded")] == [3, 1]


def test_a_step_that_waits_gives_up_when_the_partition_is_to_be_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "RETRY_S", 60.0)
    desk = Desk(refusals=1)
    with pytest.raises(Closing):
        desk.apply(*GOOD, closing=True)
    assert desk.processor.given == []
