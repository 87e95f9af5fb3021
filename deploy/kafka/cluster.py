"""A cluster of one or more brokers in one directory: its ports, properties, data, logs, and what runs of it.

::

    DIR/cluster.json        what was started, for `stop` and the like: number of brokers, ports, handles (see Broker)
    DIR/broker-1.properties written anew at every start
    DIR/broker-1/           data
    DIR/broker-1.log        the broker's output; kept after `stop`, and added to

Every broker is controller as well (KRaft). All listen on 127.0.0.1 only, on free ports that a restart keeps.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import socket
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deploy.kafka.answering import brokers_known
from deploy.kafka.launchers import BrokerError, Launcher, available_launcher, last_words, launcher_named, wait_until

HOST = "127.0.0.1"
PLAIN = "PLAINTEXT"
"""The listener that every cluster has, without encryption and passwords: brokers talk over it, and so do tests"""
PORTS = range(20_000, 32_000)
"""Below those of outgoing connections (Linux: 32,768 and up), which could take a port while its broker is down"""
READY_S = 90.0
STOP_S = 20.0
"""A broker that has not ended so long after SIGTERM is killed"""
HEAP_MB = 512
KEPT = ("process.roles", "node.id", "controller.quorum.voters", "listeners", "advertised.listeners", "log.dirs")
"""Properties that the cluster itself decides"""


@dataclass(slots=True)
class Broker:
    """One broker as cluster.json has it."""

    node: int
    controller_port: int
    ports: dict[str, int]
    """Listener -> port"""
    handle: str | None = None
    """Its launcher's word for the running process; None: not running"""


@dataclass(slots=True)
class _Record:
    """cluster.json."""

    cluster_id: str
    heap_mb: int
    properties: dict[str, str]
    listeners: dict[str, str]
    brokers: list[Broker] = field(default_factory=list)
    launcher: str = ""


class Cluster:
    """Brokers in a directory. As a context: started, and stopped at its end.

    ``properties`` are added to every broker's own. ``listeners`` are further ones on free ports, name -> SSL,
    SASL_PLAINTEXT, SASL_SSL or PLAINTEXT; what they need (``listener.name.NAME.ssl.keystore.location``,
    ``listener.name.NAME.plain.sasl.jaas.config``; NAME in lower case) are properties.
    A directory that holds a stopped cluster is started again with its data and ports.
    """

    def __init__(
        self,
        directory: Path,
        *,
        brokers: int = 1,
        heap_mb: int = HEAP_MB,
        properties: Mapping[str, str] | None = None,
        listeners: Mapping[str, str] | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self.directory = directory.resolve()
        self._launcher = launcher
        properties, listeners = dict(properties or {}), dict(listeners or {})
        _check(brokers, properties, listeners)
        self._record = _Record(new_cluster_id(), heap_mb, properties, listeners)
        earlier = _read_record(self.directory)
        if earlier is None:
            self._record.brokers = _new_brokers(brokers, (PLAIN, *listeners))
        else:
            if len(earlier.brokers) != brokers or earlier.listeners != listeners:
                raise BrokerError(
                    f"{self.directory} holds a cluster of {len(earlier.brokers)} brokers with listeners "
                    f"{[PLAIN, *earlier.listeners]}; start it as it was, or with --fresh, which drops its data"
                )
            self._record.cluster_id, self._record.brokers = earlier.cluster_id, earlier.brokers
            self._launcher = launcher or launcher_named(earlier.launcher)

    @staticmethod
    def at(directory: Path) -> Cluster | None:
        """The cluster that was started in a directory, running or not."""
        record = _read_record(directory.resolve())
        if record is None:
            return None
        return Cluster(
            directory,
            brokers=len(record.brokers),
            heap_mb=record.heap_mb,
            properties=record.properties,
            listeners=record.listeners,
        )

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def nodes(self) -> tuple[int, ...]:
        """The brokers' numbers, from 1."""
        return tuple(broker.node for broker in self._record.brokers)

    @property
    def bootstrap(self) -> str:
        """``host:port,…`` of the listener without encryption."""
        return self.bootstrap_of(PLAIN)

    def bootstrap_of(self, listener: str) -> str:
        """``host:port,…`` of a listener."""
        return ",".join(f"{HOST}:{broker.ports[listener]}" for broker in self._record.brokers)

    def log(self, node: int) -> Path:
        """A broker's log."""
        return self.directory / f"broker-{node}.log"

    def running(self) -> tuple[int, ...]:
        """The brokers whose process runs."""
        return tuple(broker.node for broker in self._record.brokers if self._alive(broker))

    def start(self) -> None:
        """Starts every broker that does not run, and waits until all know each other.

        Raises:
            BrokerError: Java or Maven is missing, or a broker does not come up (see its log); none is left running.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._launcher = self._launcher or available_launcher()
        missing = [broker for broker in self._record.brokers if not self._alive(broker)]
        try:
            with ThreadPoolExecutor() as threads:  # a JVM each, which mostly waits
                list(threads.map(self._format, missing))
            for broker in missing:
                self._launch(broker)
            for broker in self._record.brokers:
                self._wait(broker, everyone=frozenset(self.nodes))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops every broker: SIGTERM, and SIGKILL for those that do not end. Data and logs are kept."""
        running = [broker for broker in self._record.brokers if self._alive(broker)]
        for broker in running:
            self._send(broker, "TERM")
        wait_until(lambda: not any(self._alive(broker) for broker in running), STOP_S)
        for broker in running:
            self._end(broker, "KILL")

    def kill(self, node: int, signal: str = "KILL") -> None:
        """Sends ``KILL`` or ``TERM`` to a broker and waits until it has ended."""
        broker = self._broker(node)
        if not self._alive(broker):
            raise BrokerError(f"broker {node} does not run; `restart` starts it")
        self._end(broker, signal)

    def restart(self, node: int) -> None:
        """Starts a broker again, stopping it first if it runs, with its ports and data; waits until it answers."""
        broker = self._broker(node)
        if self._alive(broker):
            self._end(broker, "TERM")
        self._launch(broker)
        self._wait(broker, everyone=frozenset((node,)))

    def _broker(self, node: int) -> Broker:
        if node not in self.nodes:
            raise BrokerError(f"there is no broker {node}; this cluster has {', '.join(map(str, self.nodes))}")
        return self._record.brokers[node - 1]

    def _properties_file(self, broker: Broker) -> Path:
        return self.directory / f"broker-{broker.node}.properties"

    def _alive(self, broker: Broker) -> bool:
        if broker.handle is None or self._launcher is None:
            return False
        return self._launcher.alive(broker.handle, self._properties_file(broker))

    def _send(self, broker: Broker, signal: str) -> None:
        if broker.handle is not None and self._launcher is not None:
            self._launcher.send(broker.handle, self._properties_file(broker), signal)

    def _end(self, broker: Broker, signal: str) -> None:
        """Signals a broker until it has ended, and notes that it has."""
        self._send(broker, signal)
        if not wait_until(lambda: not self._alive(broker), STOP_S):
            self._send(broker, "KILL")
            if not wait_until(lambda: not self._alive(broker), STOP_S):
                raise BrokerError(f"broker {broker.node} ({broker.handle}) does not end; see {self.log(broker.node)}")
        if broker.handle is not None and self._launcher is not None:
            self._launcher.forget(broker.handle)
        broker.handle = None
        self._write()

    def _format(self, broker: Broker) -> None:
        assert self._launcher is not None
        path = self._properties_file(broker)
        lines = (f"{key}={value}" for key, value in self._properties(broker).items())
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        data = self.directory / f"broker-{broker.node}"
        if not (data / "meta.properties").exists():
            self._launcher.format(path, self._record.cluster_id, self.log(broker.node))

    def _launch(self, broker: Broker) -> None:
        self._launcher = self._launcher or available_launcher()
        self._record.launcher = self._launcher.name
        broker.handle = self._launcher.start(
            self._properties_file(broker), self.log(broker.node), self._record.heap_mb
        )  # fmt: skip
        self._write()

    def _wait(self, broker: Broker, everyone: frozenset[int]) -> None:
        """Until a broker answers its clients and tells them of ``everyone``."""

        def complete() -> bool:
            return brokers_known(f"{HOST}:{broker.ports[PLAIN]}") >= everyone

        wait_until(lambda: complete() or not self._alive(broker), READY_S)
        if not self._alive(broker):
            raise BrokerError(f"broker {broker.node} has ended; {last_words(self.log(broker.node))}")
        if not complete():
            raise BrokerError(f"broker {broker.node} is not ready after {READY_S:g} s; see {self.log(broker.node)}")

    def _properties(self, broker: Broker) -> dict[str, str]:
        every = self._record.brokers
        replicas = str(min(len(every), 3))
        names = {PLAIN: PLAIN, **self._record.listeners}
        clients = ",".join(f"{name}://{HOST}:{broker.ports[name]}" for name in names)
        return {
            "process.roles": "broker,controller",
            "node.id": str(broker.node),
            "controller.quorum.voters": ",".join(f"{b.node}@{HOST}:{b.controller_port}" for b in every),
            "listeners": f"{clients},CONTROLLER://{HOST}:{broker.controller_port}",
            "advertised.listeners": clients,
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": ",".join(f"{k}:{v}" for k, v in {"CONTROLLER": PLAIN, **names}.items()),
            "inter.broker.listener.name": PLAIN,
            "log.dirs": str(self.directory / f"broker-{broker.node}"),
            # A group begins to work at once instead of waiting three seconds for more members.
            "group.initial.rebalance.delay.ms": "0",
            # Fifty of each are the defaults: files of which one machine needs few.
            "offsets.topic.num.partitions": "8",
            "transaction.state.log.num.partitions": "8",
            "offsets.topic.replication.factor": replicas,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": replicas,
            "share.coordinator.state.topic.min.isr": "1",
            "default.replication.factor": replicas,
            "min.insync.replicas": "1",
            # 128 MB of the heap is the default.
            "log.cleaner.dedupe.buffer.size": str(16 << 20),
            **self._record.properties,
        }

    def _write(self) -> None:
        text = json.dumps(asdict(self._record), indent=1)
        partial = self.directory / "cluster.json.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.directory / "cluster.json")


def remove_cluster(directory: Path) -> None:
    """Removes a stopped cluster's data, logs and notes; the jars beside them stay.

    Raises:
        BrokerError: it runs.
    """
    cluster = Cluster.at(directory)
    if cluster is None:
        return
    if running := cluster.running():
        raise BrokerError(f"{directory}: brokers {', '.join(map(str, running))} run; stop them first")
    for node in cluster.nodes:
        shutil.rmtree(directory / f"broker-{node}", ignore_errors=True)
        for path in directory.glob(f"broker-{node}.*"):
            path.unlink()
    (directory / "cluster.json").unlink()


def _check(brokers: int, properties: Mapping[str, str], listeners: Mapping[str, str]) -> None:
    if brokers < 1:
        raise BrokerError("a cluster has one broker or more")
    if taken := [key for key in KEPT if key in properties]:
        raise BrokerError(f"{', '.join(taken)}: the cluster decides this itself; add a listener with --listener")
    for name, protocol in listeners.items():
        if protocol not in (PLAIN, "SSL", "SASL_PLAINTEXT", "SASL_SSL") or name in (PLAIN, "CONTROLLER"):
            raise BrokerError(f"listener {name}={protocol}: write NAME=SSL, NAME=SASL_PLAINTEXT or NAME=SASL_SSL")


def new_cluster_id() -> str:
    """As Kafka makes it: 16 random bytes as text that does not begin with ``-``, which would look like an option."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        continue
    return text


def _new_brokers(count: int, listeners: tuple[str, ...]) -> list[Broker]:
    ports = iter(free_ports(count * (1 + len(listeners))))
    return [Broker(node, next(ports), {name: next(ports) for name in listeners}) for node in range(1, count + 1)]


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens now."""
    free: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if len(free) == count:
            break
        with socket.socket() as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as Java does: a port left a moment ago is free
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            free.append(port)
    return free


def _read_record(directory: Path) -> _Record | None:
    path = directory / "cluster.json"
    try:
        record = _Record(**json.loads(path.read_text(encoding="utf-8")))
        record.brokers = [Broker(**broker) for broker in json.loads(json.dumps(record.brokers))]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise BrokerError(f"{path} is no cluster's note ({error}); remove {directory} and start anew") from error
    return record
