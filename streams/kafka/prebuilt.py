"""Sends finished record batches through aiokafka's producer: plain, idempotent or transactional.

It leans on what aiokafka 0.14 asks of a batch builder and on the producer's ``_txn_manager``;
``tests/integration/test_raw_fetch.py`` pins both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaProducer
from aiokafka.errors import IllegalOperation, KafkaError
from aiokafka.structs import RecordMetadata

from streams.kafka.batch_header import set_producer
from streams.kafka.batch_writing import EncodedBatch


class PrebuiltBatch:
    """A finished batch in place of ``aiokafka.producer.message_accumulator.BatchBuilder``."""

    def __init__(self, batch: EncodedBatch, transactional: bool) -> None:
        self._batch = batch
        self._transactional = transactional

    def append(self, **record: object) -> None:
        """Takes no more records: it is full, and the producer begins another batch."""

    def close(self) -> None:
        """It always is."""

    def closed(self) -> bool:
        """Nothing can be added."""
        return True

    def size(self) -> int:
        """Bytes."""
        return len(self._batch.data)

    def record_count(self) -> int:
        """How many sequence numbers it takes."""
        return self._batch.count

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        set_producer(self._batch.data, producer_id, producer_epoch, base_sequence, self._transactional)

    def _build(self) -> bytearray:
        return self._batch.data


async def send_batch(
    producer: AIOKafkaProducer, batch: EncodedBatch, topic: str, partition: int
) -> asyncio.Future[RecordMetadata]:
    """Queues a batch, which is the producer's from then on; the future ends with the broker's acknowledgement.

    It waits while another batch for the partition has not left yet: one is on its way and one waits, at most. Batches
    of one caller arrive in the order of the calls. ``max_request_size`` and ``compression_type`` do not apply.

    Raises KafkaError as ``AIOKafkaProducer.send_batch`` does.
    """
    transactions = producer._txn_manager
    transactional = transactions is not None and transactions.transactional_id is not None
    future: asyncio.Future[RecordMetadata] = await producer.send_batch(
        PrebuiltBatch(batch, transactional), topic, partition=partition
    )
    return future


@asynccontextmanager
async def transaction(producer: AIOKafkaProducer) -> AsyncIterator[None]:
    """A transaction around the block. When the block or the commit fails it stays open: begin anew with a new producer.

    Raises KafkaError with the brokers' reason, ProducerFenced for instance, where they have ended the transaction
    while the block was between two sends: aiokafka keeps that reason for the end, and calls the next send misuse.
    """
    try:
        await producer.begin_transaction()
        yield
        await producer.commit_transaction()
    except (IllegalOperation, AssertionError) as error:
        raise _reason(producer) from error


def _reason(producer: AIOKafkaProducer) -> KafkaError:
    ended = producer._txn_manager.wait_for_transaction_end()
    reason = ended.exception() if ended is not None and ended.done() and not ended.cancelled() else None
    return reason if isinstance(reason, KafkaError) else KafkaError("the transaction has ended early")
