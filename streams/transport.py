"""Faust's transport for whole batches: one message is what one poll gave of one partition, and the store says where
a partition begins and what is committed.

Faust stays what it is good at: groups, rebalancing, agents, starting and stopping. Its path for single messages does
11 to 14 thousand events a second of one core, so a batched topic goes around it in some places, all private to
Faust 0.15.3 and held by ``tests/integration/test_transport_contract.py``:

    ``getmany``             hands on one message for each partition and poll; its value is a ``Delivery``
    ``_read_offset``        none: Faust would drop what is read again, and note holes, which end its commits
    ``_new_offset``         what may be committed is the store's matter (``Source.committable``)
    ``_should_commit``      a commit that the brokers refuse is made again
    ``verify_event_path``   health is the worker's matter, and Faust's look at it can end the app
    ``seek_to_committed``   where an assigned partition begins is the store's matter too (``Source.begin``)

Faust drops what it has fetched in some places (a rebalance, a paused partition), and the consumer's position stays
behind it. So deliveries are numbered: whoever takes them sees a missing one, and seeks back (``BatchConsumer.rewind``).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import aiokafka
import faust
from aiokafka.errors import KafkaError
from faust.transport import drivers
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from streams.kafka.chunk import Chunk
from streams.kafka.raw_fetch import fetch_chunks

SCHEME = "coldstream"
"""Of the broker's URL, by which Faust finds this transport"""
_PAUSED_S = 0.5
"""How long one wait for room, or for a partition that is not paused, takes at most: the consumer also has to end"""
WAITING = 2
"""Deliveries that agents have not begun with, above which nothing more is polled"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one poll gave of one partition."""

    chunks: tuple[Chunk, ...]
    """In order, without a hole between them"""
    begun: int
    """How often the partition's position had been set before: an older one was fetched for somebody else"""
    number: int
    """0, 1, 2 … since then; one that is missing was dropped on the way"""


class Source(Protocol):
    """Who owns the batched topics' offsets. Everything is called on the worker's loop."""

    topics: frozenset[str]
    """Which topics come in batches"""
    consumer_options: Mapping[str, Any]
    """What ``aiokafka.AIOKafkaConsumer`` is made with"""

    def begin(self, tp: TP) -> None:
        """The partition is assigned. It stays paused until somebody calls ``BatchConsumer.start_at``."""

    def committable(self, tp: TP) -> int | None:
        """The offset that the group may take as done; None: nothing new."""


class RawBatch(faust.Schema):  # type: ignore[type-arg]
    """Takes keys and values as they are."""

    def loads_key(self, app: Any, message: Any, **options: Any) -> Any:
        """The key."""
        return message.key

    def loads_value(self, app: Any, message: Any, **options: Any) -> Any:
        """The value: a ``Delivery``."""
        return message.value


class _Polled(NamedTuple):
    """What one poll gave of one partition, and how often its position had been set by then."""

    records: list[Any]
    begun: int


class _ConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread of aiokafka's consumer. On it, setting a position and taking what was fetched exclude each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.begun: Counter[TP] = Counter()

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        source: Source = cast(Any, self.app).source
        consumer = aiokafka.AIOKafkaConsumer(**source.consumer_options)
        fetch_chunks(consumer, source.topics)
        return consumer

    async def _fetch_records(self, *arguments: Any, **options: Any) -> Any:
        polled = await super()._fetch_records(*arguments, **options)
        return {tp: _Polled(records, self.begun[tp]) for tp, records in polled.items()}

    async def set_position(self, tp: TP, offset: int) -> None:
        """What was fetched before is dropped by aiokafka, or carries the number of before."""
        self.begun[tp] += 1
        self._ensure_consumer().seek(driver.ensure_aiokafka_TP(tp), offset)


class BatchConsumer(driver.Consumer):
    """Delivers batches of the source's topics; other topics as Faust does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._source: Source = cast(Any, self.app).source
        self._some_active = asyncio.Event()
        self._waiting = 0
        self._room = asyncio.Event()
        self._last: dict[TP, Delivery] = {}
        self._acknowledged: dict[TP, int] = {}
        """The offsets that the group has taken as done since the partitions were assigned"""

    def begun(self, tp: TP) -> int:
        """How often the partition's position was set."""
        return self._batches.begun[tp]

    async def rewind(self, tp: TP, offset: int) -> None:
        """Sets the partition's position; deliveries that are under way are of before (``Delivery.begun``)."""
        await self._batches.call_thread(self._batches.set_position, tp, offset)

    def taken(self) -> None:
        """An agent has begun with a delivery."""
        self._waiting = max(self._waiting - 1, 0)
        if self._waiting <= WAITING:
            self._room.set()

    async def group_offset(self, tp: TP) -> int | None:
        """What the group has committed; None: nothing yet. Raises KafkaError."""
        consumer = self._batches._ensure_consumer()
        offset: int | None = await self._batches.call_thread(consumer.committed, driver.ensure_aiokafka_TP(tp))
        return offset

    async def start_at(self, tp: TP, offset: int) -> None:
        """Ends the pause that came with the partition's assignment."""
        await self.rewind(tp, offset)
        self.resume_partitions({tp})
        self._some_active.set()

    @property
    def _batches(self) -> _ConsumerThread:
        return cast(_ConsumerThread, self._thread)

    def _new_consumer_thread(self) -> _ConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """One message for each partition that has something, of batched topics."""
        generation = self.app.consumer_generation_id
        await self._wait_for_room()
        polled, _ = await self._wait_next_records(timeout)
        if polled is None or self.should_stop:
            return
        if not self.flow_active:  # a rebalance began meanwhile; its end sets all positions
            return
        batches = cast(dict[TP, _Polled], polled)
        messages = [message for tp, found in batches.items() for message in self._messages(tp, found)]
        for tp, message in messages:
            if not self.flow_active or self.app.consumer_generation_id != generation:
                return
            self.app.monitor.track_tp_end_offset(tp, self.highwater(tp))
            if tp.topic in self._source.topics:
                self._waiting += 1
                self._read_offset[tp] = None
            yield tp, message

    async def _wait_for_room(self) -> None:
        """Polls when agents are about to have nothing to do: what comes meanwhile is in fewer, larger deliveries.

        Where every partition is paused, Faust would sleep for a second.
        """
        self._room.clear()
        self._some_active.clear()
        with contextlib.suppress(TimeoutError):
            if self.flow_active and self._waiting > WAITING:
                await asyncio.wait_for(self._room.wait(), _PAUSED_S)
            if self.flow_active and not self._get_active_partitions():
                await asyncio.wait_for(self._some_active.wait(), _PAUSED_S)

    def _messages(self, tp: TP, polled: _Polled) -> list[tuple[TP, ConsumerMessage]]:
        if tp.topic not in self._source.topics:
            return [(tp, self._to_message(tp, record)) for record in polled.records]
        if not polled.records:
            return []
        last = self._last.get(tp)
        number = last.number + 1 if last is not None and last.begun == polled.begun else 0
        delivery = self._last[tp] = Delivery(tuple(polled.records), polled.begun, number)
        value = cast(bytes, delivery)  # Faust hands values on as they are to a schema, which knows this one
        message = ConsumerMessage(
            tp.topic, tp.partition, delivery.chunks[-1].next_offset - 1, 0.0, 0, [], None, value, None, 0, 0, tp,
            generation_id=self.app.consumer_generation_id,
        )  # fmt: skip
        return [(tp, message)]

    def _new_offset(self, tp: TP) -> int | None:
        if tp.topic not in self._source.topics:
            return super()._new_offset(tp)
        self._acked[tp].clear()
        self._acked_index[tp].clear()
        return self._source.committable(tp)

    def _should_commit(self, tp: TP, offset: int) -> bool:
        """Faust takes a commit that was refused for done."""
        if tp.topic not in self._source.topics:
            return bool(super()._should_commit(tp, offset))
        return offset != self._acknowledged.get(tp)

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        """A commit that the broker does not take is made again at the next turn: it only says how far others may read.

        Faust would end the worker for it.
        """
        try:
            ready = {driver.ensure_aiokafka_TP(tp): offset for tp, offset in offsets.items() if tp in self.assignment()}
            if ready:
                await self._batches.call_thread(self._batches._ensure_consumer().commit, ready)
                self._acknowledged.update((TP(*tp), offset) for tp, offset in ready.items())
        except (KafkaError, TimeoutError) as error:
            self.log.warning("offsets were not committed, and will be at the next turn: %r", error)
            return False
        return True

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Nothing: the worker's health says what stands still, and Faust's look ends the app while a position is reset.

        aiokafka asks where a topic begins after records were deleted before they were read.
        """

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Where partitions begin: those of batched topics when their stores are open, whatever the group says."""
        others = any(tp.topic not in self._source.topics for tp in self.assignment())
        offsets = dict(await super().seek_to_committed()) if others else {}
        self._waiting = 0  # Faust has emptied the agents' queues
        for tp in self.assignment():
            if tp.topic in self._source.topics:
                self._batches.begun[tp] += 1
                self._acknowledged.pop(tp, None)
                self.pause_partitions({tp})
                offsets.pop(tp, None)
                self._source.begin(tp)
        return offsets


class Transport(driver.Transport):
    """See the module."""

    Consumer = BatchConsumer


def register() -> None:
    """Makes the transport known to Faust, for URLs ``coldstream://host:port``."""
    drivers.TRANSPORTS.aliases[SCHEME] = f"{Transport.__module__}:{Transport.__qualname__}"
