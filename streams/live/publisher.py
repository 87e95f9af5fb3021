"""Tells the brokers what a partition's store has committed: rows to the changelog, predictions to their topic.

One transaction holds the rows of some commits, their predictions and the marker, and it is of a producer whose
transactional id is the partition's: whoever opens the partition next fences it off, and what it had not committed is
void. So a worker that lost a partition without knowing cannot write over its successor's rows. What was not told
before a crash is still in the store's outbox (``state.outbox``).

    store's commit ──► outbox ──► transaction ──► acknowledged: outbox trimmed, group's offset may follow
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, ProducerFenced

from learner.user_state import RowLayout
from state.outbox import Outbox, Publication, columns
from state.takeover import Marker
from streams.kafka.prebuilt import send_batch, transaction
from streams.kafka.record_batch import EncodedBatch, encode_batches
from streams.live.closing import stop
from streams.live.metrics import Stage
from streams.live.predictions import unpack
from streams.live.watch import Watch

TAKEN_BYTES = 8 << 20
"""Rows of one transaction: 9,000 at d = 16; they stay in memory until they are acknowledged"""
GATHER_S = 0.05
"""Between two transactions, unless much waits: each costs the brokers and the loop some milliseconds, however small"""
RETRY_S = 1.0
"""Between two tries of a transaction that the brokers could not take"""


@dataclass(frozen=True, slots=True)
class Topics:
    """Where to."""

    changelog: str
    predictions: str | None


class Publisher:
    """Publishes one partition's commits, in their order, as long as nobody has fenced it off.

    ``run`` is the task that does it. It ends with ``ProducerFenced`` when another worker has opened the partition, and
    goes on through whatever else the brokers say: what is not acknowledged is sent again.
    """

    def __init__(
        self,
        partition: int,
        outbox: Outbox,
        layout: RowLayout,
        session: bytes,
        topics: Topics,
        new_producer: Callable[[], AIOKafkaProducer],
        producer: AIOKafkaProducer,
        last_marker: Callable[[], Awaitable[tuple[Marker | None, int]]],
        watch: Watch,
    ) -> None:
        self._partition = partition
        self._outbox = outbox
        self._layout = layout
        self._session = session
        self._topics = topics
        self._new_producer = new_producer
        self._producer = producer
        self._last_marker = last_marker
        self._watch = watch
        self._work = asyncio.Event()
        self._hurry = asyncio.Event()
        """Somebody waits for an acknowledgement"""
        self._told = asyncio.Condition()
        self._work.set()  # the store may have something from before
        self.told_offset: int | None = None
        """The last source offset whose rows the changelog has"""

    def wake(self) -> None:
        """Something was committed. On the loop's thread."""
        self._work.set()

    async def until_pending(self, commits: int, size: int) -> None:
        """Waits until at most so many commits, of so many bytes, are not acknowledged."""

        def told() -> bool:
            return self._outbox.pending_commits <= commits and self._outbox.pending_bytes <= size

        if told():
            return
        self._hurry.set()
        async with self._told:
            await self._told.wait_for(told)

    async def run(self) -> None:
        """Publishes until it is cancelled. Raises ProducerFenced."""
        while True:
            await self._work.wait()
            self._work.clear()
            while (publication := self._outbox.take(TAKEN_BYTES)) is not None:
                position = await self._tell(publication)
                self._outbox.acknowledged(publication.sequence, position)
                progress = publication.progress
                self.told_offset = None if progress is None else progress.offset
                self._watch.published(self._partition, len(publication.rows), self._outbox.pending_commits, progress)
                async with self._told:
                    self._told.notify_all()
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), GATHER_S)

    async def close(self) -> None:
        """Lets the producer go."""
        await stop(self._producer)

    async def _tell(self, publication: Publication) -> int:
        while True:
            try:
                return await self._transaction(publication)
            except ProducerFenced:
                raise
            except (KafkaError, TimeoutError) as error:
                self._watch.waits(self._partition, Stage.PUBLISH, error)
                await asyncio.sleep(RETRY_S)
                last, end = await self._stands_at()
                owner = None if last is None else last.owner
                if last is not None and (owner is None or owner.session != self._session):
                    raise ProducerFenced("another worker has told of this partition since") from None
                if owner is not None and owner.sequence >= publication.sequence:
                    return end  # it was committed, only the answer was lost

    async def _transaction(self, publication: Publication) -> int:
        """The changelog's offset behind the marker."""
        with self._watch.metrics.timed(Stage.PUBLISH):
            async with transaction(self._producer):
                changelog = _changelog(publication, self._layout, self._session)
                sent = [await self._send(batch, self._topics.changelog) for batch in changelog]
                if self._topics.predictions is not None:
                    told = _predictions(publication, self._partition)
                    sent += [await self._send(batch, self._topics.predictions) for batch in told]
                acknowledged = await asyncio.gather(*sent)
        last = acknowledged[len(changelog) - 1]
        return int(last.offset) + changelog[-1].count

    async def _send(self, batch: EncodedBatch, topic: str) -> asyncio.Future[Any]:
        return await send_batch(self._producer, batch, topic, self._partition)

    async def _stands_at(self) -> tuple[Marker | None, int]:
        """With a new producer: the changelog's last marker, and its end."""
        while True:
            await self._begin_anew()
            try:
                return await self._last_marker()
            except (KafkaError, TimeoutError) as error:
                self._watch.waits(self._partition, Stage.PUBLISH, error)
                await asyncio.sleep(RETRY_S)

    async def _begin_anew(self) -> None:
        """A new producer of the same id: the old one's open transaction is aborted, whatever became of it.

        If another worker has opened the partition meanwhile, this fences that worker off, which then opens it again.
        Whose marker is last decides who goes on.
        """
        await self.close()
        while True:
            self._producer = self._new_producer()
            try:
                await self._producer.start()
                return
            except (KafkaError, TimeoutError) as error:
                self._watch.waits(self._partition, Stage.PUBLISH, error)
                await self.close()
                await asyncio.sleep(RETRY_S)


def _changelog(publication: Publication, layout: RowLayout, session: bytes) -> list[EncodedBatch]:
    keys, values = columns(publication, layout, session)
    return encode_batches(keys, values, timestamp_ms=_now_ms())


def _predictions(publication: Publication, partition: int) -> list[EncodedBatch]:
    keys: list[bytes] = []
    values: list[bytes] = []
    for payload in publication.payloads:
        more = unpack(payload, partition)
        keys += more[0]
        values += more[1]
    return encode_batches(keys, values, timestamp_ms=_now_ms()) if keys else []


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
