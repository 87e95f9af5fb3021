"""What comes of the transport, in its order and without a hole, goes to the partition's agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog
from aiokafka.errors import ProducerFenced
from faust.types import TP

from state.exceptions import StoreRolledBack
from streams.kafka.chunk import Chunk
from streams.live.closing import Closing
from streams.live.ownership import Ownership
from streams.transport import BatchConsumer, Delivery

log = structlog.get_logger("coldstream")

Apply = Callable[[Any, Chunk, int], Awaitable[None]]
"""Applies a chunk to an open partition; the number is the end of the source."""


class Intake:
    """Takes deliveries for open partitions. Those that were fetched for another beginning are dropped."""

    consumer: BatchConsumer

    def __init__(self, owned: Ownership, agents: Mapping[str, Apply], fail: Callable[[BaseException], None]) -> None:
        self._owned = owned
        self._agents = agents
        self._fail = fail
        self._expected: dict[TP, tuple[int, int]] = {}
        """(how often the position had been set, the number that comes next)"""

    async def take(self, tp: TP, delivery: Delivery) -> None:
        """Never raises: a body of Faust's agents that does loses what it was given."""
        self.consumer.taken()
        try:
            async with self._owned.step(tp) as opened:
                if opened is not None and delivery.begun == self.consumer.begun(tp):
                    await self._next(tp, opened, delivery)
        except (Closing, ProducerFenced):
            pass  # the events come again, here or elsewhere
        except Exception as error:
            self._fail(error)

    async def _next(self, tp: TP, opened: Any, delivery: Delivery) -> None:
        begun, number = self._expected.get(tp, (-1, 0))
        if delivery.number != (number if begun == delivery.begun else 0):
            log.info("a delivery was dropped on the way, reading it again", topic=tp.topic, partition=tp.partition)
            await self.consumer.rewind(tp, opened.next_offset)
            return
        self._expected[tp] = (delivery.begun, delivery.number + 1)
        end = self.consumer.highwater(tp) or 0
        try:
            for chunk in delivery.chunks:
                if len(chunk) and chunk.offset[0] < opened.next_offset:
                    log.error("the source begins anew", topic=tp.topic, partition=tp.partition)
                    self._owned.reopen(tp)
                    return
                await self._agents[tp.topic](opened, chunk, end)
        except StoreRolledBack as error:
            log.warning("the store came back at an earlier offset", partition=tp.partition, error=str(error))
            self._owned.reopen(tp)
