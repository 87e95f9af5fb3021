"""The batch transport inside Faust, on a real broker: what is delivered, from where, and what the group is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import OffsetResetStrategy
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata
from faust.types import TP

from configs.settings import Settings
from streams.kafka.connection import Connection
from streams.kafka.partitioning import partition_of
from streams.live.app import WorkerApp, build_app, consumer_options
from streams.transport import Delivery
from tests.faults.live.playing import Sent, send
from tests.kafka_broker import create_topic, delete_topics, free_topic

DEADLINE_S = 30.0
PARTITIONS = 2
KEY = b"k"
"""Of all records: they are all in one partition"""
TOO_LARGE = "x" * 5_000
"""Metadata of an offset; brokers take 4,096 bytes"""


class Source:
    """Owns the offsets of one topic, as a test says."""

    def __init__(self, topic: str, options: dict[str, Any]) -> None:
        self.topics = frozenset({topic})
        self.consumer_options = options
        self.assigned: list[TP] = []
        self.done: dict[TP, int] = {}

    def begin(self, tp: TP) -> None:
        self.assigned.append(tp)

    def committable(self, tp: TP) -> int | None:
        return self.done.get(tp)


class Scene:
    """An app that takes part in a group, and what came of the topics."""

    def __init__(self, bootstrap: str, hot: str, plain: str, scratch: Path) -> None:
        settings = Settings.model_validate(
            {
                "kafka": {"bootstrap": bootstrap, "session_timeout_ms": 6000},
                "stream": {"topic": hot, "group": hot},
                "worker": {"commit_ms": 100},
            }
        )
        connection = Connection.of(settings.kafka)
        self.bootstrap, self.hot, self.plain = bootstrap, hot, plain
        self.busy = TP(hot, partition_of(KEY, PARTITIONS))
        self.idle = TP(hot, 1 - self.busy.partition)
        self.taken: list[tuple[TP, Delivery]] = []
        self.records: list[tuple[bytes, bytes]] = []
        self.source = Source(hot, consumer_options(settings, connection))
        self.app = build_app(settings, connection, self.source, {hot: self._take}, scratch)
        self.app.agent(self.app.topic(plain, key_serializer="raw", value_serializer="raw"))(self._read)

    async def _take(self, tp: TP, delivery: Delivery) -> None:
        self.app.batches.taken()
        self.taken.append((tp, delivery))

    async def _read(self, stream: Any) -> None:
        async for event in stream.events():
            self.records.append((event.key, event.value))

    async def send(self, topic: str, *values: str) -> None:
        await asyncio.to_thread(send, self.bootstrap, topic, [Sent(KEY, value.encode()) for value in values])

    async def assigned(self, *tps: TP) -> None:
        await until(lambda: set(self.source.assigned) >= set(tps))

    async def delivered(self, *values: str, since: int = 0) -> list[Delivery]:
        """What came of the busy partition, once it is all of these values, in order."""
        await until(lambda: len(self._values(since)) >= len(values))
        assert self._values(since) == [value.encode() for value in values]
        return [delivery for tp, delivery in self.taken[since:] if tp == self.busy]

    def _values(self, since: int) -> list[bytes | None]:
        chunks = [chunk for tp, delivery in self.taken[since:] if tp == self.busy for chunk in delivery.chunks]
        return [chunk.value(k) for chunk in chunks for k in range(len(chunk))]

    async def group_offset(self, tp: TP) -> int | None:
        return await self.app.batches.group_offset(tp)

    async def until_committed(self, tp: TP, offset: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while await self.group_offset(tp) != offset:
                await asyncio.sleep(0.05)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def topics(kafka_bootstrap: str) -> Iterator[tuple[str, str]]:
    hot = create_topic(kafka_bootstrap, free_topic("transport"), PARTITIONS)
    plain = create_topic(kafka_bootstrap, f"{hot}-plain", 1)
    yield hot, plain
    delete_topics(kafka_bootstrap, hot, plain)


@pytest.fixture
def play(kafka_bootstrap: str, topics: tuple[str, str], tmp_path: Path) -> Callable[..., None]:
    """Plays a scenario with an app that has started and ends with it."""

    @asynccontextmanager
    async def started() -> AsyncIterator[Scene]:
        scene = Scene(kafka_bootstrap, *topics, tmp_path)
        await scene.app.start()
        try:
            yield scene
            assert not scene.app.crashed
        finally:
            await scene.app.stop()

    def playing(scenario: Callable[[Scene], Awaitable[None]]) -> None:
        async def run() -> None:
            async with started() as scene:
                await scenario(scene)

        asyncio.run(run())

    return playing


def test_deliveries_are_numbered_begin_where_they_are_told_and_the_group_is_told_what_is_done(play) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.assigned(scene.busy, scene.idle)
        await scene.send(scene.hot, "a", "b", "c")
        await scene.send(scene.plain, "x", "y", "z")
        await until(lambda: len(scene.records) == 3)
        assert scene.records == [(KEY, b"x"), (KEY, b"y"), (KEY, b"z")]  # one by one
        assert scene.taken == []  # what comes in batches waits for its store

        await scene.app.batches.start_at(scene.idle, 0)
        await scene.app.batches.start_at(scene.busy, 1)
        begun = scene.app.batches.begun(scene.busy)
        await scene.delivered("b", "c")
        await scene.send(scene.hot, "d")
        deliveries = await scene.delivered("b", "c", "d")
        assert [(one.begun, one.number) for one in deliveries] == [(begun, k) for k in range(len(deliveries))]
        assert await scene.group_offset(scene.busy) is None  # taken is not done

        since = len(scene.taken)
        await scene.app.batches.rewind(scene.busy, 0)
        again = await scene.delivered("a", "b", "c", "d", since=since)
        assert [(one.begun, one.number) for one in again] == [(begun + 1, k) for k in range(len(again))]

        scene.source.done[scene.busy] = 2
        await scene.until_committed(scene.busy, 2)
        await scene.until_committed(TP(scene.plain, 0), 3)  # Faust's own: what its agents have taken
        assert await scene.group_offset(scene.idle) is None

    play(scenario)


def test_a_commit_that_the_broker_refuses_is_made_again_though_nothing_new_is_done(play) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.assigned(scene.busy)
        refused = _refuse_first_commit(scene.app)
        await scene.send(scene.hot, "a", "b")
        await scene.app.batches.start_at(scene.busy, 0)
        await scene.delivered("a", "b")
        scene.source.done[scene.busy] = 2
        await scene.until_committed(scene.busy, 2)
        assert refused == ["OffsetMetadataTooLargeError"]
        await scene.send(scene.hot, "c")
        await scene.delivered("a", "b", "c")

    play(scenario)


def test_a_position_that_the_broker_does_not_have_begins_anew_and_the_app_goes_on(play) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.assigned(scene.busy)
        await scene.send(scene.hot, "a", "b")
        await scene.app.batches.start_at(scene.busy, 0)
        await scene.delivered("a", "b")
        since = len(scene.taken)
        await scene.app.batches.rewind(scene.busy, 1_000)
        await scene.delivered("a", "b", since=since)
        await scene.send(scene.hot, "c")
        await scene.delivered("a", "b", "c", since=since)
        await _look_while_the_position_is_reset(scene)

    play(scenario)


async def _look_while_the_position_is_reset(scene: Scene) -> None:
    """As Faust does now and then."""
    thread = scene.app.batches._batches

    async def reset_and_look() -> None:
        fetcher, tp = thread._ensure_consumer()._fetcher, TopicPartition(*scene.busy)
        fetcher._subscriptions.subscription.assignment.state_value(tp).await_reset(OffsetResetStrategy.EARLIEST)
        scene.app.batches.verify_event_path(time.monotonic(), scene.busy)

    await thread.call_thread(reset_and_look)


def _refuse_first_commit(app: WorkerApp) -> list[str]:
    """Has the broker refuse the next commit, for what comes with it; gives the error that came of it."""
    consumer = app.batches._batches._ensure_consumer()
    commit, refused = consumer.commit, []

    async def commits(offsets: dict[Any, int]) -> None:
        if refused:
            await commit(offsets)
            return
        try:
            await commit({tp: OffsetAndMetadata(offset, TOO_LARGE) for tp, offset in offsets.items()})
        except KafkaError as error:
            refused.append(type(error).__name__)
            raise

    consumer.commit = commits
    return refused
