"""`make live`: a broker, a stream of new users at a set rate, and two workers that adapt to it while you watch.

Everything is under build/live; what was started is stopped, however it ends. Where KAFKA_BOOTSTRAP is set, that cluster
is used, and the topics made there are removed in the end. By hand, from the repository: ``python -m deploy.live``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from itertools import cycle

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from rich.console import Console
from rich.live import Live

from configs.exceptions import ColdstreamError
from deploy.kafka.broker import ROOT
from deploy.kafka.launchers import BrokerError
from deploy.live_parts import (
    PARTITIONS,
    PLACE,
    WORKERS,
    LiveError,
    Stage,
    ask,
    broker,
    command,
    player_process,
    prepare_model,
    require_running,
    set_stage,
    topics,
    worker_process,
)
from deploy.live_view import Scores, View, WorkerFacts
from streams.kafka.connection import Connection
from streams.kafka.partitioning import partition_of
from streams.live.predictions import Prediction

READY_S = 90.0
"""For workers to start; the first time they compile"""
CAUGHT_UP_S = 60.0
"""For what was played to be applied"""
LOOK_S = 0.5
LINE_S = 2.0
"""Between lines where there is no terminal"""
RATE_OVER_S = 3.0
POISON_EVERY_S = 2.0
POISON = (
    b"",
    b"not JSON at all",
    b'{"user_id": "u1", "item_id": "i1", "label": NaN, "event_time_ms": 1700000000000}',
    b'{"user_id": "u1", "label": 1, "event_time_ms": 1700000000000}',
    b'{"user_id": "\xff", "item_id": "i1", "label": 1, "event_time_ms": 1700000000000}',
)
"""What producers really send now and then: each must end in the dead letters and cost its neighbours nothing"""


def main() -> int:
    """Runs it all: 0 when every event was applied exactly once, 1 interrupted, 2 with the reason."""
    parser = argparse.ArgumentParser(prog="make live", description="A live stream, two workers, and what they learn.")
    parser.add_argument("--rate", type=float, default=1_000.0, help="events a second; %(default)g")
    parser.add_argument("--events", type=int, help="stop after so many; all of the new users' if left out")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            run(stack, options.rate, options.events)
        return 0
    except (LiveError, BrokerError, ColdstreamError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: everything is stopped", file=sys.stderr)
        return 1


def run(stack: ExitStack, rate: float, limit: int | None) -> None:
    """Starts the parts one after another; the stack stops them in the opposite order."""
    prepare_model()
    stage = set_stage(*stack.enter_context(broker()))
    stack.enter_context(topics(stage))
    whose = "not ours: its topics are removed in the end" if stage.borrowed else "started"
    say(f"broker at {stage.settings.kafka.bootstrap[0]} ({whose}), settings in {stage.config.relative_to(ROOT)}")
    say("starting two workers")
    workers = {worker: stack.enter_context(worker_process(stage, worker)) for worker in WORKERS}
    asyncio.run(Watch(stage, workers).run(rate, limit))
    say("stopping")


class Watch:
    """Plays the stream and looks on until every event has come to its end."""

    def __init__(self, stage: Stage, workers: dict[str, subprocess.Popen[bytes]]) -> None:
        self._stage, self._workers = stage, workers
        self._facts = [WorkerFacts(worker) for worker in workers]
        self._scores = Scores()
        self._speed = Speed()

    async def run(self, rate: float, limit: int | None) -> None:
        """Raises LiveError when a part ends too early, or an event is lost or doubled."""
        await self._until_ready()
        connection = Connection.of(self._stage.settings.kafka)
        async with _predictions(self._stage, connection) as predictions, _poisoner(self._stage, connection) as poisoner:
            with player_process(self._stage, rate, limit) as player, shown() as show:
                sent = await self._until_sent(player, predictions, poisoner, show)
                view = await self._until_applied(sent, poisoner.sent, predictions, show)
        self._conclude(view, sent, poisoner.sent)

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while not all(worker.state == "ready" for worker in self._facts):
            if time.monotonic() > deadline:
                raise LiveError(f"the workers are not ready after {READY_S:g} s; see {PLACE}/worker-*/log")
            await self._look()
            await asyncio.sleep(LOOK_S)

    async def _until_sent(
        self, player: subprocess.Popen[bytes], predictions: AIOKafkaConsumer, poisoner: Poisoner, show: Show
    ) -> int:
        """How many events the producer has sent, once it has."""
        while player.poll() is None:
            await poisoner.send_if_due()
            show(await self._moment(predictions))
        if player.returncode:
            require_running(player, PLACE / "play.log")
        out, _ = player.communicate()
        return int(json.loads(out)["events"])

    async def _until_applied(self, sent: int, poison: int, predictions: AIOKafkaConsumer, show: Show) -> View:
        deadline = time.monotonic() + CAUGHT_UP_S
        while True:
            view = await self._moment(predictions)
            show(view)
            if view.handled >= sent + poison and view.predictions >= view.applied and not view.lag:
                return view
            if time.monotonic() > deadline:
                raise LiveError(f"{sent} events and {poison} others were sent, but: {view.line()}; see {PLACE}")

    async def _moment(self, predictions: AIOKafkaConsumer) -> View:
        """How it stands after ``LOOK_S`` more."""
        until = time.monotonic() + LOOK_S
        while (left := until - time.monotonic()) > 0:
            for records in (await predictions.getmany(timeout_ms=max(1, round(left * 1_000)))).values():
                self._scores.add(msgspec.json.decode(record.value, type=Prediction) for record in records)
        await self._look()
        applied = sum(worker.outcomes["applied"] for worker in self._facts)
        return View(self._facts, len(self._scores), self._scores.auc(), self._speed.of(applied))

    async def _look(self) -> None:
        for worker in self._facts:
            require_running(self._workers[worker.name], self._stage.log(worker.name))
            await asyncio.to_thread(ask, worker, self._stage.ports[worker.name])

    def _conclude(self, view: View, sent: int, poison: int) -> None:
        """Says how it ended; raises LiveError if that is not as it must be."""
        say(view.line())
        scores = self._scores
        if (view.applied, len(scores), scores.repeated, view.reasons.total()) != (sent, sent, 0, poison):
            raise LiveError(
                f"{sent} events and {poison} others were sent, {view.applied} applied, {len(scores)} predicted, "
                f"{scores.repeated} predicted twice, {view.reasons.total()} are dead letters"
            )
        say(f"each of {sent:,} events of {len(scores.users):,} new users was applied and predicted exactly once")
        user, _ = scores.users.most_common(1)[0]
        partition = partition_of(user.encode(), PARTITIONS)
        owner = next(worker.name for worker in self._facts if partition in worker.partitions)
        state = self._stage.state(owner).relative_to(ROOT)
        show_command("query", user, "--state", state, "--partition", partition, "--top", 5)
        show_command("dead-letters", "list", "--config", self._stage.config.relative_to(ROOT), "--limit", len(POISON))


class Speed:
    """Events a second over the last ``RATE_OVER_S``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, applied: int) -> float:
        """The speed, now that so many are applied."""
        now = self._clock()
        self._seen.append((now, applied))
        while len(self._seen) > 2 and self._seen[1][0] <= now - RATE_OVER_S:
            self._seen.popleft()
        then, before = self._seen[0]
        return (applied - before) / (now - then) if now > then else 0.0


class Poisoner:
    """Sends what is no event, now and then."""

    def __init__(self, producer: AIOKafkaProducer, topic: str) -> None:
        self.sent = 0
        self._producer, self._topic = producer, topic
        self._values = cycle(POISON)
        self._next = time.monotonic()

    async def send_if_due(self) -> None:
        """One, if the last one was ``POISON_EVERY_S`` ago."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + POISON_EVERY_S
            await self._producer.send_and_wait(self._topic, next(self._values))
            self.sent += 1


Show = Callable[[View], None]


@contextmanager
def shown() -> Iterator[Show]:
    """Shows a view: a table that changes in place on a terminal, a line now and then elsewhere."""
    console = Console()
    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            yield lambda view: live.update(view.table(), refresh=True)
        return
    last = [0.0]

    def line(view: View) -> None:
        if time.monotonic() - last[0] >= LINE_S:
            last[0] = time.monotonic()
            say(view.line())

    yield line


def show_command(*arguments: object) -> None:
    """Runs a command, and shows it with its output."""
    say(f"\n$ coldstream {' '.join(map(str, arguments))}\n{command(*arguments).rstrip()}")


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


@asynccontextmanager
async def _predictions(stage: Stage, connection: Connection) -> AsyncIterator[AIOKafkaConsumer]:
    """A reader of every partition of the predictions, from the beginning, of committed ones only."""
    topic = stage.settings.stream.topics.predictions
    consumer = AIOKafkaConsumer(**connection.aiokafka(), isolation_level="read_committed", auto_offset_reset="earliest")
    consumer.assign([TopicPartition(topic, partition) for partition in range(PARTITIONS)])
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


@asynccontextmanager
async def _poisoner(stage: Stage, connection: Connection) -> AsyncIterator[Poisoner]:
    producer = AIOKafkaProducer(**connection.aiokafka())
    await producer.start()
    try:
        yield Poisoner(producer, stage.settings.stream.topic)
    finally:
        await producer.stop()


if __name__ == "__main__":
    sys.exit(main())
