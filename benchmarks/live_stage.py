"""Where the live benchmarks take place: a broker, topics of one case, and workers as processes of the real command.

Brokers are those of KAFKA_BOOTSTRAP, else one started for the run (``deploy.kafka``) on the same machine.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from aiokafka.admin import AIOKafkaAdminClient

from benchmarks.command import Skipped
from benchmarks.live_scrape import Look, Scrape, listener_of, now_s, scrape
from configs.loading import ENVIRONMENT_PREFIX, load_settings
from configs.settings import KafkaSettings, Settings
from deploy.kafka.broker import external
from deploy.kafka.cluster import Cluster, free_ports
from deploy.kafka.launchers import BrokerError
from streams.kafka.connection import Connection
from streams.kafka.topics import TopicSpec, ensure_topics, specs_of

PARTITIONS = 4
STOP_S = 40.0
"""More than ``worker.shutdown_s``"""
START_S = 120.0
"""A worker that answers nothing for so long is not coming: the first one compiles"""
SHOWN_LINES = 8
"""Of the log of what has failed"""
COLDSTREAM = Path(sys.executable).with_name("coldstream")

Tree = dict[str, Any]
Result = TypeVar("Result")


class LiveFailure(Exception):
    """What is measured did not work: the message says what, and where its log is."""


@dataclass(frozen=True, slots=True)
class Broker:
    """A cluster of one or more brokers."""

    bootstrap: str
    pid: int | None
    """Of the first broker, where it runs on this machine as a process of ours"""

    @property
    def connection(self) -> Connection:
        """To it."""
        return Connection.of(KafkaSettings(bootstrap=tuple(self.bootstrap.split(","))))


@contextmanager
def broker(folder: Path) -> Iterator[Broker]:
    """Raises Skipped where there is none and none can be started."""
    try:
        there = external()
        if there is not None:
            yield _broker(there)
            return
        cluster = Cluster(folder / "kafka")
        cluster.start()
    except BrokerError as error:
        raise Skipped(str(error)) from error
    try:
        yield _broker(cluster.bootstrap)
    finally:
        cluster.stop()


def _broker(bootstrap: str) -> Broker:
    return Broker(bootstrap, listener_of(int(bootstrap.split(",")[0].rpartition(":")[2])))


@dataclass(frozen=True, slots=True)
class Scene:
    """A worker's settings in a file, and the model that it serves."""

    config: Path
    settings: Settings
    model: Path

    @property
    def topic(self) -> str:
        """The source."""
        return self.settings.stream.topic

    @property
    def connection(self) -> Connection:
        """To the brokers."""
        return Connection.of(self.settings.kafka)


def scene(
    folder: Path, at: Broker, data: Tree, model: Path, topic: str, *, kafka: Tree | None = None, **worker: object
) -> Scene:
    """Settings with topics and a group of their own on ``topic``: a worker begins there without any state.

    Args:
        folder: where the file is written.
        at: the brokers.
        data: what the file has beside the stream: ``extends`` and ``data``.
        model: the model's directory.
        topic: the source.
        kafka: further settings of that section.
        worker: settings of that section.
    """
    own = f"{topic}-{secrets.token_hex(3)}"
    names = {"changelog": f"{own}-user-state", "dead_letters": f"{own}-dead-letters"}
    made: Tree = {
        **data,
        "kafka": {"bootstrap": at.bootstrap.split(","), **(kafka or {})},
        "stream": {"topic": topic, "group": own, "topics": {"partitions": PARTITIONS, **names}},
        "worker": worker,
    }
    config = folder / f"{own}.yaml"
    config.write_text(yaml.safe_dump(made), encoding="utf-8")
    return Scene(config, load_settings(str(config), environ={}), model)


@contextmanager
def source_topic(at: Broker, case: str) -> Iterator[str]:
    """A new topic for events, removed at the end."""
    name = f"bench-{case}-{secrets.token_hex(4)}"
    connection = at.connection
    asyncio.run(_make(connection, [TopicSpec(name, "stream.topic", partitions=PARTITIONS)]))
    try:
        yield name
    finally:
        asyncio.run(_remove(connection, [name]))


@contextmanager
def own_topics(of: Scene) -> Iterator[None]:
    """The scene's topics beside its source, made before the worker looks for them, and removed at the end."""
    specs, connection = specs_of(of.settings.stream), of.connection
    asyncio.run(_make(connection, specs))
    try:
        yield
    finally:
        asyncio.run(_remove(connection, [spec.name for spec in specs if spec.name != of.topic]))


async def _make(connection: Connection, specs: Sequence[TopicSpec]) -> None:
    await ensure_topics(connection, specs, create=True, replication=None)


async def _remove(connection: Connection, names: Sequence[str]) -> None:
    admin = AIOKafkaAdminClient(**connection.aiokafka())
    await admin.start()
    try:
        await admin.delete_topics(list(names))
    finally:
        await admin.close()


class WorkerProcess:
    """A worker, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, broker_pid: int | None) -> None:
        self.process, self.port, self.log = process, port, log
        self.spawned_s = now_s()
        self._broker_pid = broker_pid

    def scrape(self) -> Scrape | None:
        """None: it does not answer yet. Raises LiveFailure if it has ended, or has set events aside."""
        if self.process.poll() is not None:
            raise LiveFailure(f"the worker has ended with {self.process.returncode}{self._last_words()}")
        found = scrape(self.port)
        if found is not None and found.otherwise:
            raise LiveFailure(f"events were not applied: {found.otherwise}{self._last_words()}")
        return found

    def look(self) -> Look | None:
        """None: it does not answer yet."""
        at_s = now_s()
        found = self.scrape()
        return None if found is None else Look.of(found, at_s, self.process.pid, self._broker_pid)

    def until(self, done: Callable[[Scrape], Result | None], within_s: float, every_s: float = 0.02) -> Result:
        """What ``done`` gives, as soon as that is not None. Raises LiveFailure when ``within_s`` seconds are over."""
        deadline = now_s() + within_s
        while now_s() < deadline:
            found = self.scrape()
            if found is not None and (result := done(found)) is not None:
                return result
            time.sleep(every_s)
        raise LiveFailure(f"the worker did not get so far in {within_s:g} s{self._last_words()}")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
        return "\n".join([f"; {self.log} ends with:", *lines])


@contextmanager
def worker(
    of: Scene, state: Path, broker_pid: int | None = None, command: Sequence[str] = ()
) -> Iterator[WorkerProcess]:
    """A worker with a directory of its own, stopped at the end; its log lies beside ``state``.

    ``command``: what takes the worker's options in place of ``coldstream worker``.
    """
    (port,) = free_ports(1)
    log = state.with_suffix(".log")
    options = ["--config", of.config, "--model", of.model, "--state", state, "--set", f"worker.metrics_port={port}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*(command or (str(COLDSTREAM), "worker")), *map(str, options)],
            stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=plain_environment(),
        )  # fmt: skip
    try:
        yield WorkerProcess(process, port, log, broker_pid)
    finally:
        end(process)


def plain_environment() -> Mapping[str, str]:
    """Ours, without settings: the scene's file has them all."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}


def end(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, and SIGKILL where that does not do."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
