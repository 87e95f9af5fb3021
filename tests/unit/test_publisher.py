"""What a store has committed is told in transactions, again if need be, never by one who lost the partition."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiokafka.errors import IllegalOperation, KafkaConnectionError, KafkaTimeoutError, ProducerFenced
from aiokafka.producer.transaction_manager import TransactionManager

from configs.settings import WorkerSettings
from learner.adaptation import Adapted
from learner.interactions import Interactions
from learner.user_state import RowLayout
from state.codec import Progress
from state.keys import LAYOUT_KEY, OWNER_KEY, PROGRESS_KEY, STANDING_KEY, user_key
from state.memory_store import MemoryUserStore
from state.outbox import Outbox, commit, standing
from state.outbox_codec import SESSION_BYTES, Owner, Standing
from state.takeover import Marker
from streams.kafka.batch_reading import read_chunks
from streams.live import publisher
from streams.live.health import Health
from streams.live.metrics import WorkerMetrics
from streams.live.predictions import pack
from streams.live.publisher import Publisher, Topics
from streams.live.watch import Watch

LAYOUT = RowLayout("gradient", 2, 0, 0)
SESSION, OTHER = bytes(range(SESSION_BYTES)), bytes(SESSION_BYTES - 1) + b"x"
DEADLINE_S = 5.0


class Producer:
    """A broker's side of one producer."""

    def __init__(self, desk: Desk, refuse: Exception | None) -> None:
        self.desk, self.refuse = desk, refuse
        self.open: dict[str, list[tuple[bytes, bytes | None]]] = {}
        self._txn_manager = SimpleNamespace(transactional_id="t")

    async def start(self) -> None:
        if self.desk.away:
            self.desk.away -= 1
            raise KafkaConnectionError("away")

    async def stop(self) -> None: ...

    async def begin_transaction(self) -> None:
        self.open = {"changelog": [], "predictions": []}

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future[Any]:
        assert partition == 3
        first = len(self.desk.topics[topic]) + len(self.open[topic])
        for chunk in read_chunks(bytes(batch._build()), topic, partition, 0):
            self.open[topic] += [(chunk.key(k), chunk.value(k)) for k in range(len(chunk))]
        future = asyncio.get_running_loop().create_future()
        future.set_result(SimpleNamespace(offset=first))
        return future

    async def commit_transaction(self) -> None:
        if self.refuse is not None:
            refuse, self.refuse = self.refuse, None
            raise refuse
        for topic, records in self.open.items():
            self.desk.topics[topic] += records


class Desk:
    """A publisher with everything around it."""

    def __init__(self, *refusals: Exception | None, marker: Marker | None = None, told: str | None = None) -> None:
        self.topics: dict[str, list[tuple[bytes, bytes | None]]] = {"changelog": [], "predictions": []}
        self.log = self.topics["changelog"]
        self.refusals = list(refusals)
        self.marker = marker
        self.away = self.silent = 0
        """So many producers do not start; so often the changelog cannot be read"""
        self.store = MemoryUserStore(LAYOUT)
        empty = np.zeros((0, LAYOUT.row_bytes), np.uint8)
        self.store.write_batch([], empty, None, own={STANDING_KEY: Standing(SESSION, 0, 7).encode()})
        self.outbox = Outbox(self.store, SESSION)
        watch = Watch(WorkerMetrics("1", "m"), Health(WorkerSettings(), lambda: 0.0), 60.0)
        self.publisher = Publisher(
            3, self.outbox, LAYOUT, SESSION, Topics("changelog", told), self.new_producer, self.new_producer(),
            self.last_marker, watch,
        )  # fmt: skip

    def new_producer(self) -> Any:
        return Producer(self, self.refusals.pop(0) if self.refusals else None)

    async def last_marker(self) -> tuple[Marker | None, int]:
        if self.silent:
            self.silent -= 1
            raise KafkaTimeoutError("silent")
        return self.marker, 77

    def commits(self, offset: int, *users: bytes, payload: bytes = b"") -> None:
        rows = np.full((len(users), LAYOUT.row_bytes), offset, np.uint8)
        commit(self.store, self.outbox, list(users), rows, Progress(offset, 0), payload=payload)
        self.publisher.wake()

    def play(self, scenario: Callable[[], Awaitable[None]]) -> BaseException | None:
        async def playing() -> BaseException | None:
            running = asyncio.create_task(self.publisher.run())
            async with asyncio.timeout(DEADLINE_S):
                told = asyncio.create_task(scenario())
                await asyncio.wait({running, told}, return_when=asyncio.FIRST_COMPLETED)
            running.cancel()
            if told.done():
                told.result()
                return None
            told.cancel()
            return running.exception()

        return asyncio.run(playing())


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "RETRY_S", 0.0)


def test_rows_then_layout_owner_and_marker_and_then_the_outbox_is_empty() -> None:
    desk = Desk()

    async def scenario() -> None:
        desk.commits(4, b"ann", b"bob")
        desk.commits(6, b"ann")
        await desk.publisher.until_pending(0, 0)

    assert desk.play(scenario) is None
    assert [key for key, _ in desk.log] == [user_key(b"ann"), user_key(b"bob"), LAYOUT_KEY, OWNER_KEY, PROGRESS_KEY]
    assert desk.log[0][1] == desk.store.stored_row(b"ann")
    assert Owner.decode(desk.log[3][1] or b"") == Owner(SESSION, 2)
    assert Progress.decode(desk.log[4][1] or b"").offset == desk.publisher.told_offset == 6
    desk.outbox.trim()
    stands = standing(desk.store)
    assert stands is not None
    assert stands.position == 5


def test_a_transaction_that_failed_is_made_again() -> None:
    desk = Desk(KafkaTimeoutError("slow"))

    async def scenario() -> None:
        desk.commits(4, b"ann")
        await desk.publisher.until_pending(0, 0)

    assert desk.play(scenario) is None
    assert [key for key, _ in desk.log] == [user_key(b"ann"), LAYOUT_KEY, OWNER_KEY, PROGRESS_KEY]


def test_one_whose_answer_was_lost_is_not_made_twice() -> None:
    desk = Desk(KafkaTimeoutError("slow"), marker=Marker(Owner(SESSION, 1), Progress(4, 0)))

    async def scenario() -> None:
        desk.commits(4, b"ann")
        await desk.publisher.until_pending(0, 0)

    assert desk.play(scenario) is None
    assert desk.log == []
    assert desk.publisher.told_offset == 4


@pytest.mark.parametrize(
    ("refusal", "marker"),
    [(ProducerFenced(), None), (KafkaTimeoutError("slow"), Marker(Owner(OTHER, 1), Progress(9, 0)))],
)
def test_whoever_lost_the_partition_tells_nothing(refusal: Exception, marker: Marker | None) -> None:
    desk = Desk(refusal, marker=marker)

    async def scenario() -> None:
        desk.commits(4, b"ann")
        await desk.publisher.until_pending(0, 0)

    assert isinstance(desk.play(scenario), ProducerFenced)
    assert desk.log == []
    assert desk.outbox.pending_commits == 1


@pytest.mark.parametrize(
    ("end", "fenced"),
    [(lambda told: told.fatal_error(ProducerFenced()), True), (lambda told: told.committing_transaction(), False)],
)
def test_a_transaction_that_ended_between_two_sends_says_why(end: Callable[[Any], None], fenced: bool) -> None:
    desk = Desk(told="predictions")
    events = Interactions.from_columns(["ann"], ["i1"], [1], [10], offsets=[4])
    said = Adapted(np.array([0.5], np.float32), np.array([0.6], np.float32), np.ones(1, np.bool_), 0)

    async def scenario() -> None:
        transactions = TransactionManager("t", 1000)
        transactions.set_pid_and_epoch(1, 1)
        transactions.begin_transaction()
        desk.publisher._producer._txn_manager = transactions
        send = desk.publisher._producer.send_batch

        async def send_batch(batch: Any, topic: str, *, partition: int) -> asyncio.Future[Any]:
            if topic == "predictions":
                end(transactions)
                raise IllegalOperation("Can't send messages while not in transaction")
            return await send(batch, topic, partition=partition)

        desk.publisher._producer.send_batch = send_batch
        desk.commits(4, b"ann", payload=pack(events, said, 0))
        await desk.publisher.until_pending(0, 0)

    ended = desk.play(scenario)

    assert isinstance(ended, ProducerFenced) if fenced else ended is None
    assert len(desk.topics["predictions"]) == (0 if fenced else 1)


@pytest.mark.parametrize("told", [None, "predictions"])
def test_predictions_are_told_with_their_rows_where_they_have_a_topic(told: str | None) -> None:
    desk = Desk(KafkaTimeoutError("slow"), told=told)
    events = Interactions.from_columns(["ann", "bob"], ["i1", "i2"], [1, 0], [10, 20], offsets=[4, 5])
    said = Adapted(np.array([0.5, -1], np.float32), np.array([0.6, 0.3], np.float32), np.ones(2, np.bool_), 0)

    async def scenario() -> None:
        desk.commits(5, b"ann", b"bob", payload=pack(events, said, 0))
        await desk.publisher.until_pending(0, 0)

    assert desk.play(scenario) is None
    assert [key for key, _ in desk.topics["predictions"]] == ([b"ann", b"bob"] if told else [])
    assert len(desk.log) == 5


def test_in_an_outage_it_asks_again_until_the_brokers_answer() -> None:
    desk = Desk(KafkaConnectionError("gone"))
    desk.silent = 2

    async def scenario() -> None:
        desk.away = 2
        desk.commits(4, b"ann")
        await desk.publisher.until_pending(0, 0)

    assert desk.play(scenario) is None
    assert (desk.away, desk.silent, len(desk.log)) == (0, 0, 4)


def test_waiting_ends_when_few_enough_commits_of_few_enough_bytes_are_pending() -> None:
    desk = Desk()
    size = LAYOUT.row_bytes + len(b"ann")

    async def scenario() -> None:
        desk.commits(4, b"ann")
        desk.commits(5, b"ann")
        await desk.publisher.until_pending(2, 2 * size)  # so it is
        assert desk.outbox.pending_commits == 2
        await desk.publisher.until_pending(1, 1 << 20)
        assert desk.outbox.pending_commits == 0
        desk.commits(6, b"ann")
        await desk.publisher.until_pending(9, size - 1)
        assert desk.outbox.pending_bytes == 0

    assert desk.play(scenario) is None
    assert desk.publisher.told_offset == 6
