"""What one would use instead, doing nothing with the same topic: it reads, parses the JSON, and counts.

    python -m benchmarks.live_peers faust --bootstrap HOST:PORT --topic TOPIC --events 200000

prints seconds from the first record in hand to the last of so many, and the CPU time of all threads, as JSON. Both run
on uvloop, as the worker does.

``faust``      stock Faust, its own transport: ``stream.take(1000)`` of JSON values
``aiokafka``   ``getmany`` and ``json.loads``
"""

from __future__ import annotations

import argparse
import asyncio
import json
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


@dataclass(slots=True)
class Counted:
    """What a peer did."""

    events: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _began: tuple[float, float] | None = None

    def begin(self) -> None:
        """Records are in hand; only the first call counts."""
        self._began = self._began or (time.perf_counter(), time.process_time())

    def add(self, events: int) -> None:
        """So many more are done with."""
        self.begin()
        assert self._began is not None
        self.events += events
        self.seconds, self.cpu_seconds = time.perf_counter() - self._began[0], time.process_time() - self._began[1]


async def aiokafka_getmany(bootstrap: str, topic: str, group: str, events: int) -> Counted:
    """Reads at least so many."""
    from aiokafka import AIOKafkaConsumer

    counted = Counted()
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, group_id=group, auto_offset_reset="earliest", enable_auto_commit=True
    )
    await consumer.start()
    try:
        while counted.events < events:
            for records in (await consumer.getmany(timeout_ms=POLL_MS)).values():
                counted.begin()
                for record in records:
                    json.loads(record.value)
                counted.add(len(records))
    finally:
        await consumer.stop()
    return counted


async def faust_take(bootstrap: str, topic: str, group: str, events: int) -> Counted:
    """Reads at least so many. It is left running: Faust needs seconds to stop."""
    import faust

    counted, done = Counted(), asyncio.Event()
    app = faust.App(
        group,
        broker=f"kafka://{bootstrap}",
        store="memory://",
        datadir=tempfile.mkdtemp(prefix="coldstream-bench-faust-"),
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
        autodiscover=False,
    )

    @app.agent(app.topic(topic, key_type=bytes, value_serializer="json"))
    async def nothing(stream: faust.StreamT[object]) -> None:
        async for batch in stream.take(TAKEN, within=TAKEN_S):
            counted.add(len(batch))
            if counted.events >= events:
                done.set()

    await app.start()
    await done.wait()
    return counted


PEERS: dict[str, Callable[[str, str, str, int], Awaitable[Counted]]] = {
    "aiokafka": aiokafka_getmany,
    "faust": faust_take,
}


def measure(peer: str, bootstrap: str, topic: str, events: int) -> Counted:
    """One peer in a process of its own. Raises LiveFailure where it fails."""
    options = ["--bootstrap", bootstrap, "--topic", topic, "--events", str(events)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.live_peers", peer, *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=plain_environment(),
    )  # fmt: skip
    try:
        told, errors = process.communicate(timeout=PEER_S)
    except subprocess.TimeoutExpired:
        raise LiveFailure(f"{peer} has not read {events} events after {PEER_S:g} s") from None
    finally:
        end(process)
    if process.returncode or not told:
        raise LiveFailure(f"{peer} failed: {errors[-500:]}")
    return Counted(**json.loads(told))
