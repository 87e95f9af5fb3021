"""Each event of a source is written once on the topic that is keyed by user, whatever fails and whoever routes it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError, KafkaTimeoutError, ProducerFenced
from faust.types import TP

from configs.settings import EventSchema, StreamSettings, WorkerSettings
from streams.decoding.decoded import Decoded, Decoder
from streams.decoding.decoder import decoder_of
from streams.decoding.exceptions import RegistryUnavailable
from streams.kafka.batch_reading import read_chunks
from streams.kafka.chunk import Chunk
from streams.kafka.partitioning import partition_of
from streams.live import router
from streams.live.closing import Closing
from streams.live.dead_letters import PoisonWatch
from streams.live.health import Health
from streams.live.metrics import WorkerMetrics
from streams.live.router import RoutedPartition, Router
from streams.live.watch import Watch

SOURCE, GROUP, TARGET, PARTITIONS = TP("source", 2), "group", "by-user", 3
DEADLINE_S = 5.0
Told = list[tuple[int, bytes, int]]
"""(partition, key, number of the event)"""


class Brokers:
    """What is committed, for readers of committed records, and who may write."""

    def __init__(self) -> None:
        self.told: Told = []
        self.group: int | None = None
        self.epoch = 0
        self.refusals: list[tuple[Exception, bool]] = []
        """(error of a commit, whether it was made all the same)"""
        self.away = 0
        """So many producers do not start"""

    async def started(self) -> Any:
        if self.away:
            self.away -= 1
            raise KafkaConnectionError("away")
        self.epoch += 1
        return Producer(self, self.epoch)

    async def committed(self) -> int | None:
        return self.group


class Producer:
    """One that holds its transaction back until it is committed."""

    def __init__(self, brokers: Brokers, epoch: int) -> None:
        self._brokers, self._epoch = brokers, epoch
        self._open: Told = []
        self._offset = 0
        self._txn_manager = SimpleNamespace(transactional_id="t")

    async def begin_transaction(self) -> None:
        self._open = []

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future[Any]:
        assert topic == TARGET
        for chunk in read_chunks(bytes(batch._build()), topic, partition, 0):
            for k in range(len(chunk)):
                self._open.append((partition, chunk.key(k) or b"", json.loads(chunk.value(k) or b"")["event_time_ms"]))
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    async def send_offsets_to_transaction(self, offsets: dict[TopicPartition, int], group: str) -> None:
        assert group == GROUP
        ((tp, self._offset),) = offsets.items()
        assert tuple(tp) == SOURCE

    async def commit_transaction(self) -> None:
        if self._epoch != self._brokers.epoch:
            raise ProducerFenced
        error, made = self._brokers.refusals.pop(0) if self._brokers.refusals else (None, True)
        if made:
            self._brokers.told += self._open
            self._brokers.group = self._offset
        if error is not None:
            raise error

    async def stop(self) -> None:
        self._open = []


class Letters:
    def __init__(self) -> None:
        self.offsets: list[int] = []

    async def send(self, chunk: Chunk, poison: Sequence[Any]) -> None:
        self.offsets += [int(chunk.offset[one.index]) for one in poison]


class Desk:
    """A router with everything around it."""

    def __init__(self) -> None:
        self.brokers, self.letters = Brokers(), Letters()
        self.metrics = WorkerMetrics("1", "m")
        self.health = Health(WorkerSettings(), lambda: 0.0)
        self.watch = Watch(self.metrics, self.health, 60.0)
        self.decode: Callable[[Chunk], Decoded] = JSON.decode

    async def open(self, next_offset: int = 0) -> RoutedPartition:
        producer = await self.brokers.started()
        return RoutedPartition(
            SOURCE, next_offset, producer, self.brokers.started, self.brokers.committed, PoisonWatch(0.5)
        )

    def play(self, scenario: Callable[[Router], Awaitable[None]]) -> None:
        async def playing(decoding: ThreadPoolExecutor) -> None:
            routes = Router(
                TARGET, PARTITIONS, GROUP, lambda chunk: self.decode(chunk), self.letters, self.watch,  # type: ignore[arg-type]
                decoding,
            )  # fmt: skip
            async with asyncio.timeout(DEADLINE_S):
                await scenario(routes)

        with ThreadPoolExecutor(1) as decoding:
            asyncio.run(playing(decoding))


JSON: Decoder = decoder_of(EventSchema(), StreamSettings())


def user_of(number: int) -> str:
    return f"u{number % 5}"


def value_of(number: int) -> bytes:
    event = {"user_id": user_of(number), "item_id": "i", "label": 1, "event_time_ms": number}
    return json.dumps(event).encode()


def chunk_of(first: int, stop: int, poison: int | None = None) -> Chunk:
    """The source from one offset to before another: event n at offset n."""
    records = [
        SimpleNamespace(key=b"other", value=b"?" if k == poison else value_of(k), offset=k, timestamp=0, headers=())
        for k in range(first, stop)
    ]
    return Chunk.of_records(SOURCE.topic, SOURCE.partition, records, stop)


def once(*numbers: int) -> Told:
    """These events where they belong, each once."""
    keys = [(user_of(number).encode(), number) for number in numbers]
    return sorted((partition_of(key, PARTITIONS), key, number) for key, number in keys)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "RETRY_S", 0.0)


def test_a_chunk_is_one_transaction_with_its_offset_and_poison_is_set_aside() -> None:
    desk = Desk()

    async def scenario(routes: Router) -> None:
        opened = await desk.open()
        await routes.apply(opened, chunk_of(0, 8, poison=3), 8)
        assert (opened.next_offset, opened.committable()) == (8, None)

    desk.play(scenario)
    assert sorted(desk.brokers.told) == once(0, 1, 2, 4, 5, 6, 7)
    of_one_user = [number for _, key, number in desk.brokers.told if key == b"u1"]
    assert of_one_user == [1, 6]
    assert (desk.brokers.group, desk.letters.offsets) == (8, [3])


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("away", [0, 2])
def test_a_transaction_that_failed_or_whose_answer_was_lost_is_there_once(made: bool, away: int) -> None:
    """In an outage too: producers that do not start are made again."""
    desk = Desk()
    desk.brokers.refusals = [(KafkaTimeoutError("slow"), made)]

    async def scenario(routes: Router) -> None:
        opened = await desk.open()
        desk.brokers.away = away
        await routes.apply(opened, chunk_of(0, 6), 6)
        await routes.apply(opened, chunk_of(6, 9), 9)
        assert opened.next_offset == 9

    desk.play(scenario)
    assert sorted(desk.brokers.told) == once(*range(9))
    assert desk.brokers.group == 9


def test_after_a_failure_only_what_the_group_lacks_is_written() -> None:
    """Another router had the partition meanwhile, and cut the source elsewhere."""
    desk = Desk()
    desk.brokers.refusals = [(KafkaTimeoutError("slow"), False)]

    async def scenario(routes: Router) -> None:
        opened = await desk.open()
        desk.brokers.group = 4
        await routes.apply(opened, chunk_of(0, 6), 6)

    desk.play(scenario)
    assert sorted(desk.brokers.told) == once(4, 5)


def test_a_chunk_that_comes_again_is_not_written_again() -> None:
    desk = Desk()

    async def scenario(routes: Router) -> None:
        opened = await desk.open(next_offset=6)
        await routes.apply(opened, chunk_of(0, 6), 6)
        await routes.apply(opened, chunk_of(2, 8), 8)
        assert opened.next_offset == 8

    desk.play(scenario)
    assert sorted(desk.brokers.told) == once(6, 7)


def test_whoever_is_fenced_off_writes_nothing_and_says_so() -> None:
    desk = Desk()

    async def scenario(routes: Router) -> None:
        opened = await desk.open()
        await desk.open()
        with pytest.raises(ProducerFenced):
            await routes.apply(opened, chunk_of(0, 3), 3)
        with pytest.raises(ProducerFenced):
            await opened.run()

    desk.play(scenario)
    assert (desk.brokers.told, desk.brokers.group) == ([], None)


def test_a_partition_that_is_let_go_is_not_waited_for() -> None:
    desk = Desk()
    desk.brokers.refusals = [(KafkaTimeoutError("slow"), False)] * 1_000

    async def scenario(routes: Router) -> None:
        opened = await desk.open()
        routing = asyncio.create_task(routes.apply(opened, chunk_of(0, 3), 3))
        while len(desk.brokers.refusals) > 998:
            await asyncio.sleep(0)
        opened.closing.set()
        with pytest.raises(Closing):
            await routing
        assert opened.next_offset == 0

    desk.play(scenario)
    assert desk.brokers.told == []


def test_a_registry_that_gives_no_answer_is_asked_again() -> None:
    desk = Desk()
    answers: list[Exception | None] = [RegistryUnavailable("no answer"), RegistryUnavailable("no answer"), None]

    def decode(chunk: Chunk) -> Decoded:
        if (answer := answers.pop(0)) is not None:
            raise answer
        return JSON.decode(chunk)

    async def scenario(routes: Router) -> None:
        desk.decode = decode
        await routes.apply(await desk.open(), chunk_of(0, 3), 3)

    desk.play(scenario)
    assert sorted(desk.brokers.told) == once(0, 1, 2)
    assert desk.brokers.epoch == 1  # the producer is not to blame


def test_a_source_of_nothing_but_poison_is_slowed_down_and_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, waited = Desk(), []

    async def waits(seconds: float) -> None:
        waited.append(seconds)

    async def scenario(routes: Router) -> None:
        opened = await desk.open()
        monkeypatch.setattr(opened.poison, "delay_s", lambda: 0.25 if opened.poison.red else 0.0)
        monkeypatch.setattr(router.asyncio, "sleep", waits)
        for first in range(0, 300, 100):
            await routes.apply(opened, chunk_of_poison(first, first + 100), 300)

    desk.play(scenario)
    assert waited == [0.0, 0.25, 0.25]
    assert [problem for problem in desk.health.ready() if problem.startswith("source source/2: nearly all")]


def chunk_of_poison(first: int, stop: int) -> Chunk:
    records = [SimpleNamespace(key=None, value=b"?", offset=k, timestamp=0, headers=()) for k in range(first, stop)]
    return Chunk.of_records(SOURCE.topic, SOURCE.partition, records, stop)
