"""The agent of the source topic: decode, drop duplicates, adapt, commit; one partition's events in their order.

A step is one chunk of a partition. Compiled code and RocksDB do its work in a thread of their own, so the loop stays
free for the brokers. What cannot be decoded goes to the dead letters before the store's offset passes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import structlog
from aiokafka.errors import KafkaError

from learner.adaptation import Adapted
from learner.interactions import Interactions
from state.exceptions import StoreWriteFailed
from state.outbox import Outbox
from streams.decoding.decoded import Decoded
from streams.decoding.exceptions import RegistryUnavailable
from streams.kafka.chunk import Chunk
from streams.live.closing import Closable
from streams.live.dead_letters import DeadLetters, PoisonWatch
from streams.live.duplicates import DuplicateWindow
from streams.live.metrics import Stage
from streams.live.predictions import pack
from streams.live.publisher import Publisher
from streams.live.watch import Applied, Watch
from streams.processor import Predictions, Processor

log = structlog.get_logger("coldstream")

RETRY_S = 1.0
"""Between two tries of a step that the disk, the registry or the brokers did not take"""
PENDING_COMMITS, PENDING_BYTES = 64, 8 << 20
"""What may wait for the brokers' acknowledgement before a partition's events wait too"""

Decode = Callable[[Chunk], Decoded]


class AdaptedPartition(Closable):
    """An open partition: ``ownership.Opened`` of the source topic."""

    def __init__(
        self,
        number: int,
        next_offset: int,
        outbox: Outbox,
        publisher: Publisher,
        window: DuplicateWindow | None,
        poison: PoisonWatch,
        release: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__()
        self.number = number
        self.next_offset = next_offset
        self.outbox = outbox
        self.publisher = publisher
        self.window = window
        self.poison = poison
        self._release = release

    async def run(self) -> None:
        """See ``ownership.Opened``."""
        await self.publisher.run()

    def committable(self) -> int | None:
        """See ``ownership.Opened``."""
        told = self.publisher.told_offset
        return None if told is None else told + 1

    async def flush(self, flush_s: float) -> None:
        """See ``ownership.Opened``."""
        try:
            await asyncio.wait_for(self.publisher.until_pending(0, 0), flush_s)
        except TimeoutError:
            log.warning("commits are left in the outbox", partition=self.number, commits=self.outbox.pending_commits)

    async def close(self) -> None:
        """See ``ownership.Opened``."""
        await self.publisher.close()
        await self._release()


@dataclass(frozen=True, slots=True)
class _Step:
    """What became of a chunk."""

    decoded: Decoded
    predictions: Predictions | None
    """None: there is something to set aside first"""
    duplicates: int = 0
    guarded: int = 0
    """Events whose update was refused, since it was not finite"""


class AdaptationAgent:
    """Applies chunks to partitions. ``adapting`` is a single thread: the processor is not for several."""

    def __init__(
        self,
        processor: Processor,
        decode: Decode,
        dead_letters: DeadLetters,
        watch: Watch,
        adapting: Executor,
        *,
        tell_predictions: bool,
    ) -> None:
        self._processor = processor
        self._decode = decode
        self._dead_letters = dead_letters
        self._watch = watch
        self._adapting = adapting
        self._tell_predictions = tell_predictions

    async def apply(self, owned: AdaptedPartition, chunk: Chunk, end: int) -> None:
        """Applies a chunk's events; on return they are durable. ``end`` is the source's, for the lag.

        Raises Closing, StoreError, and StoreRolledBack when the store came back at an earlier offset: the chunk then
        does not follow what it holds.
        """
        step = await self._tried_until_done(owned, chunk)
        owned.next_offset = chunk.next_offset
        owned.publisher.wake()
        owned.poison.seen(len(chunk), len(step.decoded.poison))
        self._watch.poison(owned.number, owned.poison.red)
        if step.predictions is not None:
            applied = Applied(
                int(step.predictions.applied.sum()), len(step.predictions.applied), step.duplicates, step.guarded
            )
            lag = max(end - chunk.next_offset, 0)
            self._watch.applied(owned.number, chunk, applied, lag, owned.outbox.pending_commits)
        await owned.unless_closing(owned.publisher.until_pending(PENDING_COMMITS, PENDING_BYTES))

    async def _tried_until_done(self, owned: AdaptedPartition, chunk: Chunk) -> _Step:
        loop = asyncio.get_running_loop()
        step: _Step | None = None
        set_aside = False
        while True:
            try:
                if step is None:
                    step = await loop.run_in_executor(self._adapting, self._decode_and_adapt, owned, chunk)
                if step.predictions is not None:
                    return step
                if not set_aside:
                    await self._set_aside(owned, chunk, step.decoded)
                    set_aside = True
                return await loop.run_in_executor(self._adapting, self._adapt, owned, chunk, step.decoded)
            except (StoreWriteFailed, RegistryUnavailable, KafkaError, TimeoutError) as error:
                self._watch.waits(owned.number, Stage.ADAPT, error)
                await owned.unless_closing(asyncio.sleep(RETRY_S))

    async def _set_aside(self, owned: AdaptedPartition, chunk: Chunk, decoded: Decoded) -> None:
        with self._watch.metrics.timed(Stage.DEAD_LETTERS):
            await owned.unless_closing(self._dead_letters.send(chunk, decoded.poison))
        self._watch.set_aside(poison.reason for poison in decoded.poison)
        await owned.unless_closing(asyncio.sleep(owned.poison.delay_s()))

    def _decode_and_adapt(self, owned: AdaptedPartition, chunk: Chunk) -> _Step:
        with self._watch.metrics.timed(Stage.DECODE):
            decoded = self._decode(chunk)
        return _Step(decoded, None) if decoded.poison else self._adapt(owned, chunk, decoded)

    def _adapt(self, owned: AdaptedPartition, chunk: Chunk, decoded: Decoded) -> _Step:
        events, duplicates = decoded.events, 0
        if owned.window is not None and decoded.event_id is not None:
            repeated = owned.window.duplicates(events.offset, decoded.event_id)
            duplicates = int(repeated.sum())
            events = events.take(np.flatnonzero(~repeated)) if duplicates else events
        guarded = self._processor.counts.guarded
        with self._watch.metrics.timed(Stage.ADAPT):
            predictions = self._processor.process(
                owned.number, events, through=chunk.next_offset - 1, payload=self._payload
            )
        return _Step(decoded, predictions, duplicates, self._processor.counts.guarded - guarded)

    def _payload(self, events: Interactions, adapted: Adapted) -> bytes:
        return pack(events, adapted, self._processor.model.meta_version) if self._tell_predictions else b""
