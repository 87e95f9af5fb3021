"""Which partitions this worker has, and how one is taken over and let go.

A partition is opened when the group assigns it, in this order:

    1. a producer with the partition's transactional id   whoever had it before is fenced off from here on
    2. the store on this worker's disk                     what it holds may be old, or more than was ever told
    3. store and changelog are brought together            ``state.takeover`` decides how
    4. the source is read from the store's offset          never from the group's

and closed when the group takes it away: the step under way ends, what was committed is told, the store is closed. All
of it within a bound; whatever is left undone, the store's outbox or the changelog has it for the next owner.
Everything here runs on the worker's loop, but for the work on stores, which the threads do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
from aiokafka.errors import IllegalStateError, KafkaError, ProducerFenced
from faust.types import TP

from streams.live.watch import Watch
from streams.transport import BatchConsumer

log = structlog.get_logger("coldstream")

FLUSH_S = 5.0
"""How long a closing partition waits for the brokers to acknowledge what it has committed"""
LAG_S = 0.5
"""Between two looks at how far behind the partitions are"""
RETRY_S = 1.0
"""Between two tries to open a partition"""


class Opened(Protocol):
    """An open partition of one kind of source topic."""

    next_offset: int
    """Of the source: what is before it is in the store"""
    closing: asyncio.Event
    """Set when it is to be let go: a step that waits for somebody gives up"""

    async def run(self) -> None:
        """What goes on beside its deliveries. Raises ProducerFenced when somebody else has opened the partition."""

    def committable(self) -> int | None:
        """See ``transport.Source``."""

    async def flush(self, flush_s: float) -> None:
        """Waits until what is committed is told, ``flush_s`` seconds at most; the outbox keeps the rest."""

    async def close(self) -> None:
        """Lets everything go, after ``run`` has ended."""


Open = Callable[[int], Awaitable[Opened]]
"""Opens a partition of a topic; cancelled when the partition is taken away meanwhile."""


@dataclass(slots=True)
class _Held:
    """A partition that the group has given to this worker."""

    opening: asyncio.Task[None] | None = None
    opened: Opened | None = None
    running: asyncio.Task[None] | None = None
    step: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while events are applied"""


class Ownership:
    """The partitions held: ``transport.Source``. ``fail`` is told of what cannot be mended here; it ends the worker.

    A partition that was lost without the group saying so is opened again after ``reopen_s`` seconds.
    """

    consumer: BatchConsumer

    def __init__(
        self,
        kinds: Mapping[str, Open],
        consumer_options: Mapping[str, Any],
        watch: Watch,
        fail: Callable[[BaseException], None],
        *,
        reopen_s: float,
    ) -> None:
        self.topics = frozenset(kinds)
        self.consumer_options = consumer_options
        self._kinds = kinds
        self._counted = next(iter(kinds))
        self._watch = watch
        self._fail = fail
        self._reopen_s = reopen_s
        self._held: dict[TP, _Held] = {}
        self._closing: dict[TP, asyncio.Task[None]] = {}
        """Let go, and not closed yet: it is not opened again before"""
        self._ours: set[TP] | None = None
        """What the group has assigned; None: nothing was said yet"""
        self._stopping = False
        self._later: set[asyncio.Task[None]] = set()

    def begin(self, tp: TP) -> None:
        """See ``transport.Source``."""
        if self._stopping:
            return
        held = self._held.get(tp)
        if held is None:
            held = self._held[tp] = _Held()
        elif held.opened is not None:
            self._soon(self._start(tp, held.opened))
            return
        if held.opening is None:
            held.opening = asyncio.create_task(self._open(tp, held), name=f"open {tp.topic}/{tp.partition}")

    def committable(self, tp: TP) -> int | None:
        """See ``transport.Source``."""
        held = self._held.get(tp)
        return None if held is None or held.opened is None else held.opened.committable()

    def holds(self, partition: int) -> bool:
        """Whether this worker has the partition of the adapted topic, is still closing it, or may be given it now."""
        tp = TP(self._counted, partition)
        return self._ours is None or tp in self._ours or tp in self._held or tp in self._closing

    def reopen(self, tp: TP) -> None:
        """What is open does not fit its store or its source any more: it is closed, and opened as if just assigned."""
        self._soon(self._again(tp, 0.0))

    @contextlib.asynccontextmanager
    async def step(self, tp: TP) -> Any:
        """Holds the partition open for one step; gives None where it is not open."""
        held = self._held.get(tp)
        if held is None or held.opened is None:
            yield None
            return
        async with held.step:
            yield held.opened if self._held.get(tp) is held else None

    async def on_revoked(self, app: Any, *revoked: Any, **_: Any) -> None:
        """Faust's signal."""
        gone = {tp for tp in revoked[0] if tp.topic in self.topics}
        self._ours = (self._ours or set()) - gone
        await self.revoke(gone)

    async def on_assigned(self, app: Any, *assigned: Any, **_: Any) -> None:
        """Faust's signal; ``begin`` follows for each."""
        ours = {tp for tp in assigned[0] if tp.topic in self.topics}
        self._ours = ours
        await self.revoke(set(self._held) - ours)
        self._tell_assignment()

    async def tell_lag(self) -> None:
        """Tells how far behind each open partition is, now and then, until it is cancelled: events may come or not."""
        while True:
            for tp, held in self._held.items():
                end = None if held.opened is None else self.consumer.highwater(tp)
                if held.opened is None or end is None:
                    continue
                lag = max(end - held.opened.next_offset, 0)
                if tp.topic == self._counted:
                    self._watch.lag(tp.partition, lag)
                else:
                    self._watch.routed(f"{tp.topic}/{tp.partition}", held.opened.next_offset, lag)
            await asyncio.sleep(LAG_S)

    async def revoke(self, tps: set[TP], flush_s: float = FLUSH_S) -> None:
        """The group takes these partitions away."""
        if not tps:
            return
        started = time.monotonic()
        await asyncio.gather(*(self._let_go(tp, flush_s) for tp in tps))
        log.info("partitions let go", partitions=sorted(tp.partition for tp in tps), seconds=_since(started))

    async def close(self, flush_s: float) -> None:
        """Lets everything go; nothing is opened any more."""
        self._stopping = True
        await self.revoke(set(self._held) | set(self._closing), flush_s)
        for task in list(self._later):
            task.cancel()
        await asyncio.gather(*self._later, return_exceptions=True)

    def _tell_assignment(self) -> None:
        self._watch.rebalanced({tp.partition for tp in self._ours or () if tp.topic == self._counted})

    async def _open(self, tp: TP, held: _Held) -> None:
        started = time.monotonic()
        if (closing := self._closing.get(tp)) is not None:
            await asyncio.shield(closing)
        while True:
            try:
                opened = await self._kinds[tp.topic](tp.partition)
                break
            except (KafkaError, TimeoutError) as error:
                log.warning("partition cannot be opened yet", topic=tp.topic, partition=tp.partition, error=repr(error))
                await asyncio.sleep(RETRY_S)
            except Exception as error:
                self._fail(error)
                return
        held.opened, held.opening = opened, None
        held.running = asyncio.create_task(self._run(tp, held, opened), name=f"run {tp.topic}/{tp.partition}")
        log.info(
            "partition open", topic=tp.topic, partition=tp.partition, offset=opened.next_offset, seconds=_since(started)
        )
        self._soon(self._start(tp, opened))

    async def _start(self, tp: TP, opened: Opened) -> None:
        try:
            await self.consumer.start_at(tp, opened.next_offset)
        except IllegalStateError:
            log.info("the group has taken the partition away again", topic=tp.topic, partition=tp.partition)

    async def _run(self, tp: TP, held: _Held, opened: Opened) -> None:
        try:
            await opened.run()
        except ProducerFenced:
            log.warning("another worker has opened the partition", topic=tp.topic, partition=tp.partition)
            if tp.topic == self._counted:
                self._watch.fenced(tp.partition)
            if self._held.get(tp) is held:
                self._soon(self._again(tp, self._reopen_s))
        except Exception as error:
            self._fail(error)

    async def _again(self, tp: TP, after_s: float) -> None:
        """Closes it, and opens it again unless the group says meanwhile that it is somebody else's."""
        await self._let_go(tp, 0.0)
        await asyncio.sleep(after_s)
        if self._ours is not None and tp in self._ours and tp not in self._held:
            log.info("opening the partition again", topic=tp.topic, partition=tp.partition)
            self._tell_assignment()
            self.begin(tp)

    async def _let_go(self, tp: TP, flush_s: float) -> None:
        """Returns when it is closed, whoever began that."""
        held = self._held.pop(tp, None)
        if held is not None:
            task = self._closing[tp] = asyncio.create_task(self._closed(tp, held, flush_s))
            task.add_done_callback(lambda done: self._closing.pop(tp, None))
        if (closing := self._closing.get(tp)) is not None:
            await asyncio.shield(closing)

    async def _closed(self, tp: TP, held: _Held, flush_s: float) -> None:
        try:
            await _ended(held.opening)
            if tp.topic == self._counted:
                self._watch.let_go(tp.partition)
            else:
                self._watch.no_longer_routed(f"{tp.topic}/{tp.partition}")
            if held.opened is not None:
                held.opened.closing.set()
                async with held.step:
                    await held.opened.flush(flush_s)
                    await _ended(held.running)
                    await held.opened.close()
        except Exception as error:
            self._fail(error)

    def _soon(self, coroutine: Any) -> None:
        def done(task: asyncio.Task[None]) -> None:
            self._later.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(error)

        task = asyncio.create_task(coroutine)
        self._later.add(task)
        task.add_done_callback(done)


async def _ended(task: asyncio.Task[None] | None) -> None:
    if task is not None and task is not asyncio.current_task():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)
