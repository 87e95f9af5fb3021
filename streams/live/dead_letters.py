"""Records that are no events: sent to the dead letters' topic, and slowing down a source that has little else."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError

from streams.decoding.decoded import Poison
from streams.kafka.chunk import Chunk
from streams.kafka.exceptions import LetterError
from streams.live.letter import Cause, outgoing
from streams.rejects import Reason

USUAL_LARGEST = 1_000_000
"""Bytes of a record that both aiokafka's producer and a topic take as they come (1,048,576 and 1,048,588)"""
WINDOW = 1_000
"""Latest records of a partition that are judged"""
FEWEST = 100
"""Records seen before a partition is judged: the first record alone would be all of them"""
SHORTEST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
"""Long enough that a source of nothing but poison costs next to nothing, and short enough to notice its end"""


class DeadLetters:
    """Sends letters with a producer that somebody else starts, stops and, if it is transactional, begins and commits.

    ``largest`` is what the topic takes (``max.message.bytes``) or the producer (``max_request_size``), whichever is
    less: what is larger is cut. A letter may be sent twice, if the same chunk is tried again.
    """

    def __init__(self, producer: AIOKafkaProducer, topic: str, worker: str, *, largest: int = USUAL_LARGEST) -> None:
        self.topic = topic
        self.by_reason: Counter[Reason] = Counter()
        """Letters that were acknowledged"""
        self._producer = producer
        self._worker = worker
        self._largest = largest
        self._version = metadata.version("coldstream")

    async def send(self, chunk: Chunk, poison: Sequence[Poison]) -> None:
        """Returns when every letter is acknowledged.

        Raises:
            KafkaError: the brokers did not take them; the same may be sent again.
            LetterError: the topic takes less than ``largest``.
        """
        sent: list[asyncio.Future[Any]] = []
        try:
            for one in poison:
                sent.append(await self._send(chunk, one))
            await asyncio.gather(*sent)
        except MessageSizeTooLargeError as error:
            raise LetterError(
                f"topic {self.topic} refuses a letter of up to {self._largest:,} bytes; give it max.message.bytes="
                f"{self._largest} or more with kafka-configs.sh"
            ) from error
        finally:
            for future in sent:
                future.add_done_callback(_heard)
        self.by_reason.update(one.reason for one in poison)

    async def _send(self, chunk: Chunk, poison: Poison) -> asyncio.Future[Any]:
        k = poison.index
        cause = Cause(
            chunk.topic, chunk.partition, int(chunk.offset[k]), int(chunk.timestamp_ms[k]),
            poison.stage, poison.reason, poison.error, poison.message, self._version, self._worker,
        )  # fmt: skip
        key, value, headers = outgoing(chunk.key(k), chunk.value(k), chunk.headers(k), cause, self._largest)
        sending: asyncio.Future[Any] = await self._producer.send(self.topic, value=value, key=key, headers=headers)
        return sending


def _heard(future: asyncio.Future[Any]) -> None:
    """Takes note of a failure that nobody waits for any more: the first one was raised."""
    if not future.cancelled():
        future.exception()


class PoisonWatch:
    """Judges one partition by its latest records: a source of almost nothing but poison is waited for, not spun on.

    Pure, and of bounded memory.
    """

    def __init__(self, share: float) -> None:
        """``share``: above it a partition is poisoned."""
        self._share = share
        self._latest: deque[tuple[int, int]] = deque()
        """(records, poison) of the latest chunks, which hold WINDOW records, or all that there were"""
        self._records = 0
        self._poison = 0
        self._delay_s = 0.0

    @property
    def share(self) -> float:
        """Poison of the latest records."""
        return self._poison / self._records if self._records else 0.0

    @property
    def red(self) -> bool:
        """Whether the partition is poisoned."""
        return self._records >= FEWEST and self.share > self._share

    def seen(self, records: int, poison: int) -> None:
        """A chunk was done with: so many records, of which so many were poison."""
        if not records:
            return
        self._latest.append((records, poison))
        self._records += records
        self._poison += poison
        while self._records - self._latest[0][0] >= WINDOW:
            old_records, old_poison = self._latest.popleft()
            self._records -= old_records
            self._poison -= old_poison
        if self.red and poison > self._share * records:
            self._delay_s = min(LONGEST_DELAY_S, 2 * self._delay_s) or SHORTEST_DELAY_S
        else:
            self._delay_s = 0.0

    def delay_s(self) -> float:
        """How long to wait before the next chunk: it grows while chunks are poisoned, and a good one ends it."""
        return self._delay_s
