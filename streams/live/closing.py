"""What every open partition has: it may be told to close, and whoever waits for somebody outside then gives up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

STOP_S = 5.0
"""How long a producer may take to stop: brokers that are away would hold up a rebalance"""

Result = TypeVar("Result")


class Closing(Exception):
    """The partition is to be let go: the step is given up, and its events come again."""


class Closable:
    """``closing`` is set, once, when the partition is to be let go."""

    def __init__(self) -> None:
        self.closing = asyncio.Event()

    async def unless_closing(self, work: Awaitable[Result]) -> Result:
        """The result of ``work``. Raises Closing as soon as the partition is to be let go."""
        task = asyncio.ensure_future(work)
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait({task, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Closing
            return task.result()
        finally:
            closing.cancel()
            if not task.done():
                task.cancel()


async def stop(producer: AIOKafkaProducer) -> None:
    """Lets a producer go, within ``STOP_S``; an open transaction is left to the next owner, who aborts it."""
    with contextlib.suppress(KafkaError, TimeoutError):
        await asyncio.wait_for(producer.stop(), STOP_S)
