"""What is played to a stage: records made of a seed, and a thread that sends them while workers die."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self

import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

START_MS = 1_600_000_000_000
ITEMS = 15
"""Three more than the model knows"""
TICK_S = 0.02
PIECE = 2_000
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Sent:
    """One record to be produced."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record went."""

    partition: int
    offset: int


def event(user: str, item: str, label: int, time_ms: int, **more: object) -> Sent:
    """A good one, keyed by its user."""
    value = {"user_id": user, "item_id": item, "label": label, "event_time_ms": time_ms, **more}
    return Sent(user.encode(), json.dumps(value).encode())


def clicks(seed: int, users: int, *, hot: float = 0.0) -> Iterator[Sent]:
    """Without end. ``hot``: the share of one user, ``u0``."""
    rng, now = np.random.default_rng(seed), START_MS
    while True:
        user = np.where(rng.random(PIECE) < hot, 0, rng.integers(0, users, PIECE)).tolist()
        item, label = rng.integers(0, ITEMS, PIECE).tolist(), rng.integers(0, 2, PIECE).tolist()
        for u, i, y, gap in zip(user, item, label, rng.integers(0, 60_000, PIECE).tolist(), strict=True):
            now += gap
            yield event(f"u{u}", f"i{i}", y, now)


def send(bootstrap: str, topic: str, records: Iterable[Sent], **options: Any) -> list[Place]:
    """Sends all at once, and waits for all to be acknowledged; ``options`` are the producer's."""

    async def sending() -> list[Place]:
        async with producer(bootstrap, **options) as client:
            futures = [
                await client.send(topic, value=one.value, key=one.key, headers=list(one.headers)) for one in records
            ]
            done = await asyncio.gather(*futures)
        return [Place(one.partition, one.offset) for one in done]

    return asyncio.run(sending())


def producer(bootstrap: str, **options: Any) -> AIOKafkaProducer:
    """One that writes nothing twice of itself."""
    settings: dict[str, Any] = {"acks": "all", "enable_idempotence": True, "linger_ms": 5, **options}
    return AIOKafkaProducer(bootstrap_servers=bootstrap, **settings)


@dataclass
class Player:
    """Sends records at a rate from a thread, as a context. What brokers do not take in time is given up.

    How many reached the topic is for a reader of it to say.
    """

    bootstrap: str
    topic: str
    records: Iterator[Sent]
    rate: float
    sent: int = 0
    given_up: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="player")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends when what was sent is acknowledged or given up. Raises what went wrong."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        try:
            asyncio.run(self._play())
        except BaseException as error:
            self._error = error

    async def _play(self) -> None:
        began, waiting, behind = time.monotonic(), set[asyncio.Future[Any]](), 0
        async with producer(self.bootstrap, request_timeout_ms=20_000) as client:
            while not self._stop.is_set():
                due = int((time.monotonic() - began) * self.rate) - self.sent - behind
                for one in islice(self.records, min(due, PIECE)):
                    await self._send(client, one, waiting)
                behind += max(due - PIECE, 0)  # the brokers were away: what was due then is not made up for
                await asyncio.sleep(TICK_S)
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _send(self, client: AIOKafkaProducer, one: Sent, waiting: set[asyncio.Future[Any]]) -> None:
        self.sent += 1
        try:
            sending = await client.send(self.topic, value=one.value, key=one.key, headers=list(one.headers))
        except KafkaError as error:
            self.given_up[type(error).__name__] += 1
            return
        waiting.add(sending)
        sending.add_done_callback(waiting.discard)
        sending.add_done_callback(self._heard)

    def _heard(self, sending: asyncio.Future[Any]) -> None:
        if not sending.cancelled() and (error := sending.exception()) is not None:
            self.given_up[type(error).__name__] += 1


def ends(bootstrap: str, topic: str) -> dict[int, int]:
    """The offset after the last record of each partition."""

    async def asking() -> dict[int, int]:
        async with AIOKafkaConsumer(topic, bootstrap_servers=bootstrap) as consumer:
            tps = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
            return {tp.partition: end for tp, end in (await consumer.end_offsets(tps)).items()}

    return asyncio.run(asking())


def committed_records(bootstrap: str, *topics: str) -> dict[str, dict[int, list[Any]]]:
    """Every committed record, topic by topic and partition by partition, read once from the start, one by one."""
    return asyncio.run(_committed_records(bootstrap, topics))


async def _committed_records(bootstrap: str, topics: tuple[str, ...]) -> dict[str, dict[int, list[Any]]]:
    async with AIOKafkaConsumer(
        *topics, bootstrap_servers=bootstrap, isolation_level="read_committed", auto_offset_reset="earliest",
        enable_auto_commit=False, max_partition_fetch_bytes=8 << 20,
    ) as consumer:  # fmt: skip
        tps = sorted(
            TopicPartition(topic, number) for topic in topics for number in consumer.partitions_for_topic(topic) or ()
        )
        until = await consumer.end_offsets(tps)
        found: dict[str, dict[int, list[Any]]] = {topic: {} for topic in topics}
        for tp in tps:
            found[tp.topic][tp.partition] = []
        deadline = time.monotonic() + DEADLINE_S
        while any([await consumer.position(tp) < until[tp] for tp in tps]):
            if time.monotonic() > deadline:
                raise AssertionError(f"{topics} were not read to {until} in {DEADLINE_S:g} s")
            for tp, records in (await consumer.getmany(timeout_ms=200, max_records=20_000)).items():
                found[tp.topic][tp.partition] += records
        return found
