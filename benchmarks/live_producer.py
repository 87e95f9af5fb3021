"""Sends the live benchmarks' events: as fast as the broker takes them, or at a rate, each with the time it was due.

    python -m benchmarks.live_producer --bootstrap HOST:PORT --topic TOPIC --rate 10000 --seconds 30

sends generated events of 100,000 users at a rate, and prints how many as JSON when all are acknowledged. It is a
process of its own, so that whoever measures is not in its way. Batches hold 128 KiB at most, as those of producers that
are tuned for throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvloop
from aiokafka import AIOKafkaProducer
from numpy.typing import NDArray

from benchmarks.live_events import generated, records
from benchmarks.synthetic import uniform_users
from configs.settings import EventSchema, KafkaSettings
from streams.kafka.batch_writing import Spans, encode_spans
from streams.kafka.connection import Connection
from streams.kafka.partitioning import partitions_of
from streams.kafka.prebuilt import send_batch

BATCH_BYTES = 128 << 10
TICK_S = 0.005
"""How often events that are due are sent; it is part of their latency"""
RATE_USERS = 100_000
Records = tuple[Spans, Spans]
"""Keys and values"""


def fill(connection: Connection, topic: str, partitions: int, pieces: Iterable[Records]) -> int:
    """Sends records of now to the partitions of their keys; returns their bytes, keys and values."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_fill(connection, topic, partitions, pieces))


async def _fill(connection: Connection, topic: str, partitions: int, pieces: Iterable[Records]) -> int:
    sent = 0
    async with _sender(connection, topic, partitions) as sender:
        for keys, values in pieces:
            await sender.send(keys, values, np.full(len(keys.start), time.time_ns() // 1_000_000))
            sent += int(keys.length.sum() + values.length.sum())
    return sent


async def play(connection: Connection, topic: str, partitions: int, pieces: Iterable[Records], rate: float) -> int:
    """Sends records at ``rate`` a second; what falls behind is caught up with. Returns how many.

    A record's timestamp is when it was due, not when it was sent: a slow producer does not make a worker look fast.
    """
    first, began_ms = 0, time.time() * 1000
    async with _sender(connection, topic, partitions) as sender:
        for keys, values in pieces:
            n, done = len(keys.start), 0
            while done < n:
                due = min(int((time.time() * 1000 - began_ms) / 1000 * rate) - first, n)
                if due > done:
                    stamps = began_ms + np.arange(first + done, first + due) * (1000 / rate)
                    await sender.send(keys.part(done, due), values.part(done, due), stamps.astype(np.int64))
                    done = due
                await asyncio.sleep(TICK_S)
            first += n
    return first


class _Sender:
    def __init__(self, producer: AIOKafkaProducer, topic: str, partitions: int) -> None:
        self._producer, self._topic, self._partitions = producer, topic, partitions
        self._sent: set[asyncio.Future[Any]] = set()

    async def send(self, keys: Spans, values: Spans, timestamp_ms: NDArray[np.int64]) -> None:
        """Queues records; partitions do not wait for one another. Raises what an earlier batch failed with."""
        owner = partitions_of(keys.data, keys.start, keys.length, self._partitions)
        await asyncio.gather(
            *(
                self._send(partition, keys.take(chosen), values.take(chosen), timestamp_ms[chosen])
                for partition in range(self._partitions)
                if len(chosen := np.flatnonzero(owner == partition))
            )
        )
        done = {future for future in self._sent if future.done()}
        self._sent -= done
        await asyncio.gather(*done)

    async def _send(self, partition: int, keys: Spans, values: Spans, timestamp_ms: NDArray[np.int64]) -> None:
        for batch in encode_spans(keys, values, timestamp_ms, max_bytes=BATCH_BYTES):
            self._sent.add(await send_batch(self._producer, batch, self._topic, partition))

    async def finish(self) -> None:
        """Waits until everything is acknowledged."""
        await asyncio.gather(*self._sent)


@asynccontextmanager
async def _sender(connection: Connection, topic: str, partitions: int) -> AsyncIterator[_Sender]:
    producer = AIOKafkaProducer(**connection.aiokafka(), acks="all", enable_idempotence=True)
    await producer.start()
    try:
        sender = _Sender(producer, topic, partitions)
        yield sender
        await sender.finish()
    finally:
        await producer.stop()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Sends generated events at a rate")
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--rate", type=float, required=True, help="events a second")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    connection = Connection.of(KafkaSettings(bootstrap=tuple(options.bootstrap.split(","))))
    events = generated(uniform_users(round(options.rate * options.seconds), RATE_USERS))
    pieces = list(records(events, EventSchema()))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sent = runner.run(play(connection, options.topic, options.partitions, pieces, options.rate))
    print(json.dumps({"events": sent}))


if __name__ == "__main__":
    main()
