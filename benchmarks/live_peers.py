"""What one would use instead, doing nothing with the same topic: it reads, parses the JSON, and counts.

    python -m benchmarks.live_peers faust --bootstrap HOST:PORT --topic TOPIC --events 200000 --scratch DIRECTORY

prints events, seconds from the first record in hand to the last, and the CPU time of all threads, as JSON. Both run on
uvloop, as the worker does.

``faust``      stock Faust, its own transport: ``stream.take(1000)`` of JSON values
``aiokafka``   ``getmany`` and ``json.loads``
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

import uvloop

from benchmarks.live_stage import LiveFailure, end, plain_environment

TAKEN = 1000
TAKEN_S = 1.0
POLL_MS = 200
PEER_S = 300.0
"""A peer that needs longer has hung"""


@dataclass(frozen=True, slots=True)
class Counted:
    """What a peer did."""

    events: int
    seconds: float
    cpu_seconds: float


class Tally:
    """Counts events from the first one in hand."""

    def __init__(self) -> None:
        self.events = 0
        self._began: tuple[float, float] | None = None

    def begin(self) -> None:
        """Records are in hand; only the first call counts."""
        self._began = self._began or (time.perf_counter(), time.process_time())

    def add(self, events: int) -> None:
        """So many more are done with."""
        self.begin()
        self.events += events

    def result(self) -> Counted:
        """Until now."""
        wall, cpu = self._began or (time.perf_counter(), time.process_time())
        return Counted(self.events, time.perf_counter() - wall, time.process_time() - cpu)


async def aiokafka_getmany(bootstrap: str, topic: str, group: str, events: int, scratch: str) -> Counted:
    """Reads at least so many; ``scratch`` is not used."""
    from aiokafka import AIOKafkaConsumer

    tally = Tally()
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, group_id=group, auto_offset_reset="earliest", enable_auto_commit=True
    )
    await consumer.start()
    try:
        while tally.events < events:
            for records in (await consumer.getmany(timeout_ms=POLL_MS)).values():
                tally.begin()
                for record in records:
                    json.loads(record.value)
                tally.add(len(records))
        return tally.result()
    finally:
        await consumer.stop()


async def faust_take(bootstrap: str, topic: str, group: str, events: int, scratch: str) -> Counted:
    """Reads at least so many. It is left running: Faust needs seconds to stop. ``scratch``: where it keeps files."""
    import faust

    tally = Tally()
    finished: asyncio.Future[Counted] = asyncio.get_running_loop().create_future()
    app = faust.App(
        group,
        broker=f"kafka://{bootstrap}",
        store="memory://",
        datadir=scratch,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
        autodiscover=False,
    )

    async def nothing(stream: faust.StreamT[object]) -> None:
        async for batch in stream.take(TAKEN, within=TAKEN_S):
            tally.add(len(batch))
            if tally.events >= events and not finished.done():
                finished.set_result(tally.result())

    app.agent(app.topic(topic, key_type=bytes, value_serializer="json"))(nothing)
    await app.start()
    return await finished


PEERS: dict[str, Callable[[str, str, str, int, str], Awaitable[Counted]]] = {
    "aiokafka": aiokafka_getmany,
    "faust": faust_take,
}


def measure(peer: str, bootstrap: str, topic: str, events: int) -> Counted:
    """One peer in a process of its own. Raises LiveFailure where it fails."""
    options = ["--bootstrap", bootstrap, "--topic", topic, "--events", str(events)]
    with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as scratch:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.live_peers", peer, *options, "--scratch", scratch],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            env=plain_environment(),
        )  # fmt: skip
        try:
            told, errors = process.communicate(timeout=PEER_S)
        except subprocess.TimeoutExpired:
            raise LiveFailure(f"{peer} has not read {events} events in {PEER_S:g} s") from None
        finally:
            end(process)
    if process.returncode or not told:
        raise LiveFailure(f"{peer} failed: {errors[-500:]}")
    return Counted(**json.loads(told))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Reads a topic and does nothing with it")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--events", type=int, required=True, help="stop after so many")
    parser.add_argument("--scratch", required=True, help="a directory for files")
    options = parser.parse_args()

    async def run() -> None:
        group = f"bench-{options.peer}-{secrets.token_hex(4)}"
        counted = await PEERS[options.peer](options.bootstrap, options.topic, group, options.events, options.scratch)
        print(json.dumps(asdict(counted)), flush=True)
        os._exit(0)  # nothing is left to do, and Faust would go on for seconds

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
