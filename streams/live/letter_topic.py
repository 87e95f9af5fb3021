"""Reads the dead letters' topic, up to where it ended when the reading began, and sends letters back to their topics.

A replay is exactly once: what is sent back and the receipt for it are one transaction, letters with a receipt are
passed over, and a second replay that begins meanwhile ends the first one.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, ProducerFenced

from streams.kafka.connection import Connection
from streams.kafka.exceptions import BrokerUnreachable, LetterError
from streams.live.letter import Letter, read_letter, read_receipt, receipt

POLL_MS = 500
SILENCE_S = 30.0
"""Brokers that send nothing for so long, with records to come, do not answer"""
LETTERS_AT_ONCE = 500
"""Of one transaction"""
BYTES_AT_ONCE = 8 << 20
"""Of one transaction; one letter may be larger"""
LARGEST = 100 << 20
"""The most that a broker takes in one request by itself: whether a record is too large is for its topic to say"""

Place = tuple[int, int]
"""Partition and offset of a letter in its topic"""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which letters are meant. Of what is given all must hold."""

    reasons: frozenset[str] = frozenset()
    """Empty: any"""
    since_ms: int | None = None
    """When it failed, or later"""
    partition: int | None = None
    """Of the topic that the record came from"""
    offset: int | None = None

    def has(self, letter: Letter) -> bool:
        """Whether a letter is meant."""
        cause = letter.cause
        return (
            (not self.reasons or cause.reason in self.reasons)
            and (self.since_ms is None or letter.failed_ms >= self.since_ms)
            and (self.partition is None or cause.partition == self.partition)
            and (self.offset is None or cause.offset == self.offset)
        )


@dataclass(slots=True)
class Replayed:
    """What a replay did."""

    sent: Counter[str] = field(default_factory=Counter)
    """By topic"""
    done_before: int = 0
    """Passed over: they have a receipt"""
    not_whole: int = 0
    """Passed over: something of them was cut when they were set aside"""


class LetterTopic:
    """The dead letters' topic of these brokers."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.name = name
        self._connection = connection

    async def letters(self, choice: Choice) -> AsyncGenerator[Letter, None]:
        """The chosen letters, each partition's in their order.

        Raises:
            LetterError: there is no such topic.
            BrokerUnreachable: the brokers do not answer.
        """
        async with aclosing(self._records(choice.since_ms)) as records:
            async for record in records:
                letter = read_letter(record)
                if letter is not None and choice.has(letter):
                    yield letter

    async def replay(
        self, choice: Choice, *, to: str | None = None, again: bool = False, dry: bool = False
    ) -> Replayed:
        """Sends the chosen letters to the topics that they came from, or ``to``; the key decides the partition.

        Args:
            choice: which letters.
            to: the topic to send all of them to.
            again: those that were replayed before too.
            dry: only counts.

        Raises:
            LetterError: a topic is not there or refuses a record, or another replay began.
            BrokerUnreachable: the brokers do not answer. What was sent until then has its receipts.
        """
        done = Replayed()
        topics = await self._topics()
        async with self._producer(dry) as producer:  # first: it ends an earlier one's transaction, which may be open
            replayed = set() if again else await self._receipts()
            transaction = _Transaction(producer, self.name, done)
            async with aclosing(self.letters(choice)) as letters:
                async for letter in letters:
                    if (letter.partition, letter.offset) in replayed:
                        done.done_before += 1
                    elif not letter.whole:
                        done.not_whole += 1
                    elif (target := to or letter.cause.topic) not in topics:
                        raise LetterError(f"topic {target} does not exist; name the topic to send to with --to")
                    else:
                        await transaction.add(letter, target)
            await transaction.commit()
        return done

    async def _topics(self) -> dict[str, int]:
        """Each topic's number of partitions. A consumer that asks for a topic by its name may make it."""
        admin = AIOKafkaAdminClient(**self._connection.aiokafka())
        async with _answering(self._connection):
            try:
                await admin.start()
                return {topic["topic"]: len(topic["partitions"]) for topic in await admin.describe_topics()}
            finally:
                await admin.close()

    async def _receipts(self) -> set[Place]:
        async with aclosing(self._records(None)) as records:
            return {place async for record in records for place in read_receipt(record)}

    async def _records(self, since_ms: int | None) -> AsyncGenerator[Any, None]:
        """Every committed record from ``since_ms`` until the end as it is now."""
        count = (await self._topics()).get(self.name)
        if count is None:
            raise LetterError(
                f"topic {self.name} does not exist; nothing was set aside yet, or set stream.topics.dead_letters"
            )
        async with _answering(self._connection), self._consumer() as consumer:
            left = await _begin(consumer, [TopicPartition(self.name, number) for number in range(count)], since_ms)
            heard = time.monotonic()
            while left:
                polled = await consumer.getmany(timeout_ms=POLL_MS)
                for tp, records in polled.items():
                    for record in records:
                        if record.offset < left.get(tp, 0):
                            yield record
                before, left = left, {tp: end for tp, end in left.items() if await consumer.position(tp) < end}
                if polled or len(left) < len(before):
                    heard = time.monotonic()
                elif time.monotonic() - heard > SILENCE_S:
                    raise BrokerUnreachable(
                        f"topic {self.name}: no record came for {SILENCE_S:g} s; see the brokers' logs"
                    )

    @asynccontextmanager
    async def _consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(
            **self._connection.aiokafka(),
            isolation_level="read_committed", enable_auto_commit=False, auto_offset_reset="earliest",
        )  # fmt: skip
        try:
            await consumer.start()
            yield consumer
        finally:
            await consumer.stop()

    @asynccontextmanager
    async def _producer(self, dry: bool) -> AsyncIterator[AIOKafkaProducer | None]:
        """A transactional one; none for a dry run."""
        if dry:
            yield None
            return
        producer = AIOKafkaProducer(
            **self._connection.aiokafka(), transactional_id=f"{self.name}-replay", max_request_size=LARGEST
        )
        async with _answering(self._connection):
            try:
                await producer.start()
                yield producer
            finally:
                await producer.stop()


async def _begin(
    consumer: AIOKafkaConsumer, partitions: list[TopicPartition], since_ms: int | None
) -> dict[TopicPartition, int]:
    """Assigns the partitions that have something to read, each at its start; they map to where they end."""
    starts = await consumer.beginning_offsets(partitions)
    ends = await consumer.end_offsets(partitions)
    if since_ms is not None:
        found = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
        starts = {tp: ends[tp] if at is None else at.offset for tp, at in found.items()}
    left = {tp: end for tp, end in ends.items() if starts[tp] < end}
    if left:
        consumer.assign(list(left))
        for tp in left:
            consumer.seek(tp, starts[tp])
    return left


@asynccontextmanager
async def _answering(connection: Connection) -> AsyncIterator[None]:
    """What the clients say of the brokers, as one line."""
    try:
        yield
    except (KafkaError, TimeoutError) as error:
        brokers = ", ".join(connection.bootstrap)
        raise BrokerUnreachable(f"{brokers}: the brokers refused or did not answer ({error}); try again") from error


class _Transaction:
    """Letters on their way, up to a transaction's bounds."""

    def __init__(self, producer: AIOKafkaProducer | None, receipts: str, done: Replayed) -> None:
        self._producer = producer
        self._receipts = receipts
        self._done = done
        self._letters: list[tuple[Letter, str]] = []
        self._bytes = 0

    async def add(self, letter: Letter, topic: str) -> None:
        self._letters.append((letter, topic))
        self._bytes += letter.value_bytes or 0
        if len(self._letters) >= LETTERS_AT_ONCE or self._bytes >= BYTES_AT_ONCE:
            await self.commit()

    async def commit(self) -> None:
        if self._producer is not None and self._letters:
            try:
                async with self._producer.transaction():
                    await self._send_all(self._producer)
            except ProducerFenced as error:
                raise LetterError("another replay of this topic began and ended this one; wait for it") from error
        self._done.sent.update(topic for _, topic in self._letters)
        self._letters, self._bytes = [], 0

    async def _send_all(self, producer: AIOKafkaProducer) -> None:
        sent = [await producer.send(topic, **letter.replayed()._asdict()) for letter, topic in self._letters]
        told = receipt(letter for letter, _ in self._letters)
        sent.append(await producer.send(self._receipts, **told._asdict()))
        answers = await asyncio.gather(*sent, return_exceptions=True)
        for (letter, topic), answer in zip(self._letters, answers, strict=False):
            if isinstance(answer, MessageSizeTooLargeError):
                raise LetterError(
                    f"letter {letter.partition}/{letter.offset}: topic {topic} refuses a record of its size; raise the "
                    "topic's max.message.bytes, or choose other letters"
                ) from answer
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
