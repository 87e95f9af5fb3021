"""Plays a source's events to a topic, at a set rate, as JSON that a worker with the same settings reads the same.

``EventWriter`` is the inverse of decoding. ``play`` sends what it writes: keyed by user, each user's events in order.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from configs.exceptions import ColdstreamError
from configs.settings import EventSchema, FeatureRule, IdRule, LabelRule, Settings, TimeRule
from learner.interactions import FeatureColumn, Interactions
from streams.kafka.connection import Connection
from streams.kafka.partitioning import partition_of
from streams.kafka.reaching import reach
from streams.kafka.topics import TopicSpec, ensure_topics
from streams.protocol import online_batches, split_users
from streams.sources import open_source, time_ordered

PIECE_EVENTS = 2_000
"""The most that is written before the brokers get their turn: some 10 ms"""
TICK_S = 0.01
"""How often it is looked whether events are due"""
BATCH_BYTES = 128 << 10
"""Of one partition, in one request"""
UNACKNOWLEDGED = 64
"""Batches on their way; the oldest of more than these is waited for, so that memory is bounded before a slow broker"""
EPOCH = datetime(1970, 1, 1)

Record = tuple[str, bytes]
"""User id and JSON"""


class PlayError(ColdstreamError):
    """Events cannot be played: the message says what to change."""


@dataclass(slots=True)
class Played:
    """What was sent and acknowledged."""

    topic: str
    events: int = 0
    users: int = 0
    seconds: float = 0.0
    offsets: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Partition -> the first offset written, and the one behind the last"""


class EventWriter:
    """Writes events in a schema's own fields. Decoding them under the same schema gives the same events.

    A label whose rule compares with a number is written as a number that the rule takes for it; where the graded value
    has the same field, as that value. Event ids, if mapped, are the events' offsets.
    """

    def __init__(self, schema: EventSchema) -> None:
        self._schema = schema
        self._labels = label_texts(schema.label)

    def records(self, events: Interactions) -> Iterator[Record]:
        """(user id, JSON) of each event, in order."""
        schema, encode = self._schema, msgspec.json.Encoder().encode
        users = _own_fields(events.user_ids, schema.user_id, events.user_features, schema.user_features)
        items = _own_fields(events.item_ids, schema.item_id, events.item_features, schema.item_features)
        for user, item, label, value, time_ms, offset in zip(
            events.user.tolist(), events.item.tolist(), events.label.tolist(), _shortest(events.value),
            events.event_time_ms.tolist(), events.offset.tolist(), strict=True,
        ):  # fmt: skip
            record = {**users[user], **items[item], schema.label.field: self._labels[label]}
            if schema.value is not None and value is not None:
                record[schema.value.field] = value
            record[schema.event_time.field] = time_text(time_ms, schema.event_time)
            if schema.event_id is not None:
                record[schema.event_id.field] = str(offset)
            yield events.user_ids[user], encode(record)


def label_texts(rule: LabelRule) -> tuple[object, object]:
    """What the rule reads as 0, and as 1."""
    if rule.at_least is not None:
        return _below(rule.at_least), _plain(rule.at_least)
    if rule.at_most is not None:
        return -_below(-rule.at_most), _plain(rule.at_most)
    if rule.equals is not None:
        return f"not {rule.equals}", rule.equals
    return 0, 1


def time_text(time_ms: int, rule: TimeRule) -> object:
    """A time in the rule's unit: a whole number where it is one, or ISO 8601 text."""
    match rule.unit:
        case "iso":
            return f"{(EPOCH + timedelta(milliseconds=time_ms)).isoformat(timespec='milliseconds')}Z"
        case "s":
            return time_ms / 1000 if time_ms % 1000 else time_ms // 1000
        case "ms":
            return time_ms
        case "us":
            return time_ms * 1_000
        case "ns":
            return time_ms * 1_000_000


@contextmanager
def events_to_play(settings: Settings, *, everything: bool) -> Iterator[Iterator[Interactions]]:
    """The events of ``data`` in time order: those of the protocol's online users, or all. Offsets are positions in it.

    Raises:
        SourceError, ProtocolError: the source cannot be read, or not be split.
    """
    with ExitStack() as stack:
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coldstream-spool-")))
        ordered = stack.enter_context(time_ordered(open_source(settings.data), spool))
        if everything:
            yield _at_positions(ordered.batches())
        else:
            yield online_batches(ordered, split_users(ordered, settings.protocol.offline_fraction))


async def play(
    settings: Settings,
    batches: Iterable[Interactions],
    *,
    rate: float = 0.0,
    limit: int | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Played:
    """Sends events to ``stream.topic``, which is made if it is missing and ``stream.topics.create`` allows it.

    Args:
        settings: where to, and the fields' names.
        batches: the events, in the order in which they are sent.
        rate: events a second; 0: as fast as the brokers take them. What falls behind is caught up with.
        limit: stop after so many; None: play them all.
        on_progress: called with the number of events sent so far.

    Raises:
        KafkaProblem: no broker can be reached, or the topic is missing and may not be made.
        PlayError: the topic's format is not JSON, or a broker refuses the events.
    """
    stream = settings.stream
    if stream.format != "json":
        raise PlayError(f"stream.format is {stream.format}: events are played as JSON only; set it to json")
    connection = Connection.of(settings.kafka)
    await reach(connection)
    spec = TopicSpec(stream.topic, "stream.topic", partitions=stream.topics.partitions)
    topics = await ensure_topics(
        connection, [spec], create=stream.topics.create, replication=stream.topics.replication
    )  # fmt: skip
    writer = EventWriter(settings.data.events)
    records = islice((record for batch in batches for record in writer.records(batch)), limit)
    producer = AIOKafkaProducer(
        **connection.aiokafka(), acks="all", enable_idempotence=True, max_batch_size=BATCH_BYTES
    )  # fmt: skip
    await producer.start()
    try:
        return await _paced(
            _Sender(producer, stream.topic, topics[stream.topic].partitions), records, rate, on_progress
        )
    except KafkaError as error:
        raise PlayError(f"topic {stream.topic} takes no more events: {error!r}; see the broker's log") from error
    finally:
        await producer.stop()


async def _paced(sender: _Sender, records: Iterator[Record], rate: float, on_progress: Callable[[int], None]) -> Played:
    began = time.monotonic()
    while True:
        due = due_events(time.monotonic() - began, rate, sender.played.events)
        if not due:
            await asyncio.sleep(TICK_S)
            continue
        piece = list(islice(records, min(due, PIECE_EVENTS)))
        if not piece:
            break
        await sender.send(piece)
        on_progress(sender.played.events)
    await sender.finish()
    sender.played.seconds = time.monotonic() - began
    return sender.played


def due_events(elapsed_s: float, rate: float, sent: int) -> int:
    """How many events are due now: the first at once, the next after ``1 / rate`` seconds; rate 0 is never behind."""
    return int(elapsed_s * rate) + 1 - sent if rate > 0 else PIECE_EVENTS


class _Sender:
    """Puts records into batches by partition, and keeps count of what the brokers have acknowledged."""

    def __init__(self, producer: AIOKafkaProducer, topic: str, partitions: int) -> None:
        self.played = Played(topic)
        self._producer, self._partitions = producer, partitions
        self._partition_of: dict[str, int] = {}
        self._unacknowledged: deque[tuple[int, int, Any]] = deque()

    async def send(self, records: Sequence[Record]) -> None:
        """Hands over records in order; waits while too many batches are on their way."""
        parts: dict[int, list[Record]] = {}
        for record in records:
            parts.setdefault(self._partition(record[0]), []).append(record)
        for partition, part in parts.items():
            await self._send_part(partition, part)
        self.played.events += len(records)
        self.played.users = len(self._partition_of)

    async def finish(self) -> None:
        """Waits until everything is acknowledged."""
        while self._unacknowledged:
            await self._acknowledge()

    def _partition(self, user_id: str) -> int:
        if (partition := self._partition_of.get(user_id)) is None:
            partition = self._partition_of[user_id] = partition_of(user_id.encode(), self._partitions)
        return partition

    async def _send_part(self, partition: int, part: Sequence[Record]) -> None:
        now_ms, sent = time.time_ns() // 1_000_000, 0
        while sent < len(part):
            batch, first = self._producer.create_batch(), sent
            while sent < len(part):
                user_id, value = part[sent]
                if batch.append(timestamp=now_ms, key=user_id.encode(), value=value) is None:
                    break  # the batch is full; the record goes into the next
                sent += 1
            if sent == first:
                raise PlayError(f"an event of user {part[sent][0]!r} is larger than {BATCH_BYTES:,} bytes")
            batch.close()
            future = await self._producer.send_batch(batch, self.played.topic, partition=partition)
            self._unacknowledged.append((partition, sent - first, future))
        while len(self._unacknowledged) > UNACKNOWLEDGED:
            await self._acknowledge()

    async def _acknowledge(self) -> None:
        partition, count, future = self._unacknowledged.popleft()
        offset = (await future).offset
        first, _ = self.played.offsets.get(partition, (offset, 0))
        self.played.offsets[partition] = first, offset + count


def _own_fields(
    ids: Sequence[str], rule: IdRule, features: Mapping[str, FeatureColumn], rules: Mapping[str, FeatureRule]
) -> list[dict[str, object]]:
    """The fields of each user, or item: its id without the prefix, and the features that it has."""
    fields: list[dict[str, object]] = [{} for _ in ids]
    for name, column in features.items():
        key = rules[name].field or name
        for own, text in zip(fields, column, strict=True):
            if text is not None:
                own[key] = text
    for own, text in zip(fields, ids, strict=True):
        own[rule.field] = text.removeprefix(rule.prefix)
    return fields


def _at_positions(batches: Iterator[Interactions]) -> Iterator[Interactions]:
    position = 0
    for batch in batches:
        yield batch.with_offsets(np.arange(position, position + len(batch), dtype=np.int64))
        position += len(batch)


def _shortest(values: np.ndarray[Any, np.dtype[np.float32]]) -> list[float | int | None]:
    """Each 32-bit float as the shortest number that gives it back; None where there is none."""
    distinct, inverse = np.unique(values, return_inverse=True)
    numbers = [None if math.isnan(value) else _plain(float(str(value))) for value in distinct]
    return [numbers[k] for k in inverse.reshape(-1).tolist()]


def _plain(number: float) -> float | int:
    """4 rather than 4.0."""
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _below(number: float) -> float | int:
    """One less, or the next smaller number where that is the same."""
    return _plain(number - 1 if number - 1 < number else math.nextafter(number, -math.inf))
