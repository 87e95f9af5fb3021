"""The parts of `make live`: a model, a broker, topics, workers and a producer, each stopped when its block ends."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from aiokafka.admin import AIOKafkaAdminClient

from configs.loading import load_settings
from configs.settings import Settings
from deploy.kafka.broker import ROOT, external
from deploy.kafka.cluster import HOST, Cluster, free_ports, remove_cluster
from deploy.live_view import WorkerFacts
from streams.kafka.connection import Connection
from streams.kafka.topics import ensure_topics, specs_of

PLACE = ROOT / "build" / "live"
COLDSTREAM = Path(sys.executable).with_name("coldstream")
WORKERS = ("worker-1", "worker-2")
PARTITIONS = 4
BROKER_HEAP_MB = 384
STOP_S = 40.0
"""More than ``worker.shutdown_s``"""
ASK_S = 2.0
SHOWN_LINES = 5
"""Of the log of what has failed"""


class LiveError(Exception):
    """It cannot go on: the message says why, and where to look."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where this run's parts are."""

    config: Path
    settings: Settings
    model: Path
    ports: dict[str, int]
    """Worker -> port of its metrics"""
    borrowed: bool
    """The brokers are somebody else's"""

    def state(self, worker: str) -> Path:
        """A worker's rows."""
        return PLACE / worker / "state"

    def log(self, worker: str) -> Path:
        """A worker's output."""
        return PLACE / worker / "log"


def prepare_model() -> None:
    """A generated stream and a model of its past users, unless an earlier run has left them."""
    data, model = PLACE / "data", PLACE / "model"
    if (model / "manifest.json").exists():
        return
    print("generating a stream and learning from its past users: some 15 s, and only once", flush=True)
    command("generate", "--out", data, "--overwrite", "--users", 1500, "--items", 600, "--events", 100_000)
    command("train", "--config", data / "config.yaml", "--out", model)


def command(*arguments: object) -> str:
    """The output of a ``coldstream`` command that has to succeed."""
    done = subprocess.run([COLDSTREAM, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise LiveError(f"coldstream {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def broker() -> Iterator[tuple[str, str]]:
    """(bootstrap, prefix of this run's names): a broker of our own, or the one that KAFKA_BOOTSTRAP names."""
    if there := external():
        yield there, f"live-{secrets.token_hex(3)}-"
        return
    remove_cluster(PLACE / "kafka")
    cluster = Cluster(PLACE / "kafka", heap_mb=BROKER_HEAP_MB)
    try:
        cluster.start()
        yield cluster.bootstrap, ""
    finally:
        with undisturbed():
            cluster.stop()


def set_stage(bootstrap: str, prefix: str) -> Stage:
    """Clears what an earlier run has left, and writes the settings that every command of this run takes."""
    names = {"changelog": "user-state", "predictions": "predictions", "dead_letters": "dead-letters"}
    made: dict[str, Any] = {
        "extends": "data/config.yaml",
        "kafka": {"bootstrap": bootstrap.split(",")},
        "stream": {
            "topic": f"{prefix}interactions",
            "group": f"{prefix}coldstream",
            "topics": {"partitions": PARTITIONS, **{key: prefix + name for key, name in names.items()}},
        },
    }
    for worker in WORKERS:
        shutil.rmtree(PLACE / worker, ignore_errors=True)
        (PLACE / worker).mkdir(parents=True)
    config = PLACE / "config.yaml"
    config.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    ports = dict(zip(WORKERS, free_ports(len(WORKERS)), strict=True))
    return Stage(config, load_settings(str(config)), PLACE / "model", ports, borrowed=bool(prefix))


@contextmanager
def topics(stage: Stage) -> Iterator[None]:
    """This run's topics; removed again where the brokers are somebody else's."""
    connection, specs = Connection.of(stage.settings.kafka), specs_of(stage.settings.stream)
    asyncio.run(ensure_topics(connection, specs, create=True, replication=None))
    try:
        yield
    finally:
        if stage.borrowed:
            with undisturbed():
                asyncio.run(_remove_topics(connection, [spec.name for spec in specs]))


async def _remove_topics(connection: Connection, names: list[str]) -> None:
    admin = AIOKafkaAdminClient(**connection.aiokafka())
    await admin.start()
    try:
        await admin.delete_topics(names)
    finally:
        await admin.close()


@contextmanager
def worker_process(stage: Stage, worker: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker with a port and a directory of its own; its output goes to its log."""
    own = ["--state", stage.state(worker), "--instance", f"{stage.settings.stream.group}-{worker}"]
    port = ["--set", f"worker.metrics_port={stage.ports[worker]}"]
    with (
        stage.log(worker).open("wb") as log,
        _process(
            "worker", "--config", stage.config, "--model", stage.model, *own, *port, out=log, errors=log
        ) as started,
    ):
        yield started


@contextmanager
def player_process(stage: Stage, rate: float, limit: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """The producer, which prints what it has sent as JSON when all is acknowledged."""
    limited = [] if limit is None else ["--limit", limit]
    rated = ["--rate", rate, *limited, "--json"]
    with (
        (PLACE / "play.log").open("wb") as log,
        _process("play", "--config", stage.config, *rated, out=subprocess.PIPE, errors=log) as started,
    ):
        yield started


@contextmanager
def _process(*arguments: object, out: IO[bytes] | int, errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A ``coldstream`` process in a session of its own, so that Ctrl-C reaches only us, who end it in order."""
    started = subprocess.Popen(
        [COLDSTREAM, *map(str, arguments)],
        stdout=out, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    try:
        yield started
    finally:
        with undisturbed():
            started.terminate()
            try:
                started.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                started.kill()
                started.communicate()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Holds Ctrl-C off: what is being stopped is stopped in order, and each wait in it has a bound."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ask(worker: WorkerFacts, port: int) -> None:
    """Takes over what a worker says of itself. One that does not answer is starting, or busy: its facts stay."""
    try:
        worker.state = _get(port, "/readyz")
        worker.read(_get(port, "/metrics"))
    except OSError:
        return


def _get(port: int, path: str) -> str:
    """The answer's text; of ``/readyz`` whether it is ready."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=ASK_S) as answer:
            text: str = answer.read().decode()
            return "ready" if path == "/readyz" else text
    except urllib.error.HTTPError as error:
        with error:
            return "not ready" if error.code == 503 else f"answers {error.code}"


def require_running(process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises LiveError with the end of its log if a process has ended."""
    if process.poll() is not None:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
        said = "\n".join(last)
        raise LiveError(f"a process has ended with {process.returncode}; {log} ends with:\n{said}")
