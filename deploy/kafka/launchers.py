"""The two ways to run a broker on this machine: Docker's image, or Kafka's own jars under Java.

Both run the same properties file, which lies at the same path inside and outside of a container. A launcher knows no
cluster: it formats, starts, signals and watches one broker.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
JARS = ROOT / "build" / "kafka" / "lib"
"""Kept between clusters: some 45 MB"""
LEAST_JAVA = 17
"""What a broker of Kafka 4 asks for"""
DOCKER_ANSWERS_S = 10.0
DOWNLOAD_S = 600.0
FORMAT_S = 120.0
"""Seconds; on two busy cores a JVM has been seen to take ten of them to start"""
INSTALL = "Debian: apt-get install -y openjdk-17-jre-headless maven; or start Docker, or set KAFKA_BOOTSTRAP"


class BrokerError(Exception):
    """A broker cannot be run: one line says what, where and what to do."""


def kafka_version() -> str:
    """The version that pom.xml names."""
    found = re.search(r"<kafka\.version>(.+?)</kafka\.version>", (HERE / "pom.xml").read_text(encoding="utf-8"))
    assert found is not None
    return found.group(1)


def docker_image() -> str:
    """Apache's own image, of the same version as the jars."""
    return f"apache/kafka:{kafka_version()}"


class Launcher(Protocol):
    """Runs single brokers. A handle names a running one, also for another process that reads it from a file."""

    name: ClassVar[str]

    def format(self, properties: Path, cluster_id: str, log: Path) -> None:
        """Makes the broker's directory of data ready for its first start."""

    def start(self, properties: Path, log: Path, heap_mb: int) -> str:
        """Starts a broker that writes to the end of ``log``, and returns its handle."""

    def send(self, handle: str, properties: Path, name: str) -> None:
        """Sends a signal (``TERM``, ``KILL``) to a broker; one that has ended is left alone."""

    def alive(self, handle: str, properties: Path) -> bool:
        """Whether the broker that was started from ``properties`` still runs."""

    def forget(self, handle: str) -> None:
        """Frees what an ended broker leaves behind."""


def available_launcher() -> Docker | Jars:
    """Docker where its daemon answers and has, or gets, the image; else Java. Downloads what is missing.

    Raises:
        BrokerError: neither is there; says what to install.
    """
    if Docker.answers() and Docker.has_image():
        return Docker()
    java_with_kafka()
    return Jars()


def launcher_named(name: str) -> Docker | Jars:
    """The launcher that a cluster was started with."""
    return Docker() if name == Docker.name else Jars()


class Jars:
    """Kafka's jars, fetched by Maven, under Java 17 or newer. A handle is a process id."""

    name: ClassVar[str] = "jars"

    def __init__(self, *, end_with_me: bool = False) -> None:
        """``end_with_me``: the kernel kills the brokers when the thread that started them ends, however it ends."""
        self._prefix = ["setpriv", "--pdeathsig", "KILL"] if end_with_me and shutil.which("setpriv") else []
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def format(self, properties: Path, cluster_id: str, log: Path) -> None:
        """Makes the broker's directory of data ready for its first start."""
        tool = ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(properties), "--ignore-formatted"]
        quick = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx128m"]
        with log.open("ab") as out:
            done = subprocess.run(
                [*java_with_kafka(), *quick, *tool],
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=FORMAT_S, check=False,
            )  # fmt: skip
        if done.returncode:
            raise BrokerError(f"{properties}: Kafka's StorageTool refused it; {last_words(log)}")

    def start(self, properties: Path, log: Path, heap_mb: int) -> str:
        """Starts a broker in a session of its own: Ctrl-C in the terminal does not reach it."""
        # The flags of Kafka's own start script.
        flags = [f"-Xmx{heap_mb}m", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-XX:InitiatingHeapOccupancyPercent=35"]
        settings = [f"-Dlog4j2.configurationFile={HERE / 'log4j2.properties'}", "-Djava.awt.headless=true"]
        with log.open("ab") as out:
            child = subprocess.Popen(
                [*self._prefix, *java_with_kafka(), *flags, *settings, "kafka.Kafka", str(properties)],
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._children[str(child.pid)] = child
        return str(child.pid)

    def send(self, handle: str, properties: Path, name: str) -> None:
        """Sends a signal to the process, if it still is the one that was started."""
        if self.alive(handle, properties):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(handle), signal.Signals[f"SIG{name}"])

    def alive(self, handle: str, properties: Path) -> bool:
        """Whether that process runs and is this broker, and not a later one that got the same id."""
        if child := self._children.get(handle):
            return child.poll() is None
        try:
            state = Path(f"/proc/{handle}/stat").read_text().rpartition(")")[2].split()[0]
            arguments = Path(f"/proc/{handle}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return state != "Z" and os.fsencode(properties) in arguments

    def forget(self, handle: str) -> None:
        """Takes the exit status of a child."""
        if child := self._children.pop(handle, None):
            child.wait()


class Docker:
    """The image of Apache Kafka on the host's own network. A handle is a container's id. Linux only."""

    name: ClassVar[str] = "docker"
    _bin = "/opt/kafka/bin"

    def __init__(self) -> None:
        self._image = docker_image()

    @staticmethod
    def answers() -> bool:
        """Whether there is a daemon to talk to."""
        if shutil.which("docker") is None:
            return False
        try:
            return _docker("info", timeout_s=DOCKER_ANSWERS_S).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    @staticmethod
    def has_image() -> bool:
        """Whether the image is here, or could be pulled."""
        image = docker_image()
        return _docker("image", "inspect", image).returncode == 0 or _docker("pull", image).returncode == 0

    def format(self, properties: Path, cluster_id: str, log: Path) -> None:
        """Makes the broker's directory of data ready for its first start."""
        tool = [f"{self._bin}/kafka-storage.sh", "format", "-t", cluster_id, "-c", str(properties)]
        done = _docker("run", "--rm", *self._place(properties), *tool, "--ignore-formatted", timeout_s=FORMAT_S)
        with log.open("a", encoding="utf-8") as out:
            out.write(done.stdout)
        if done.returncode:
            raise BrokerError(f"{properties}: Kafka's StorageTool refused it; {last_words(log)}")

    def start(self, properties: Path, log: Path, heap_mb: int) -> str:
        """Starts a container; the shell in it sends the broker's output to ``log`` and then becomes the broker."""
        heap = ["--env", f"KAFKA_HEAP_OPTS=-Xmx{heap_mb}m"]
        script = f'exec {self._bin}/kafka-server-start.sh "$0" >>"$1" 2>&1'
        done = _docker(
            "run", "--detach", *heap, *self._place(properties, "sh"), "-c", script, str(properties), str(log)
        )  # fmt: skip
        if done.returncode:
            raise BrokerError(f"docker cannot run {self._image}: {done.stdout.strip()}")
        return done.stdout.strip().splitlines()[-1]

    def send(self, handle: str, properties: Path, name: str) -> None:
        """Sends a signal to the container's broker."""
        if self.alive(handle, properties):
            _docker("kill", "--signal", name, handle)

    def alive(self, handle: str, properties: Path) -> bool:
        """Whether the container runs."""
        return _docker("inspect", "--format", "{{.State.Running}}", handle).stdout.strip() == "true"

    def forget(self, handle: str) -> None:
        """Removes the container."""
        _docker("rm", "--force", handle)

    def _place(self, properties: Path, entrypoint: str = "env") -> list[str]:
        """Options and image: the cluster's directory at its own path, files owned by who starts it."""
        directory = properties.parent
        user = f"{os.getuid()}:{os.getgid()}"
        mount = ["--volume", f"{directory}:{directory}", "--env", f"LOG_DIR={directory}/gc"]
        return ["--network", "host", "--user", user, *mount, "--entrypoint", entrypoint, self._image]


def _docker(*arguments: str, timeout_s: float = DOWNLOAD_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


@functools.cache
def java_with_kafka() -> tuple[str, ...]:
    """The command of Java with Kafka's classes; fetches them the first time.

    Raises:
        BrokerError: Java or Maven is missing; says what to install.
    """
    return find_java(), "-cp", f"{fetched_jars()}/*"


def find_java() -> str:
    """The command of Java 17 or newer: that of JAVA_HOME, or the one on PATH.

    Raises:
        BrokerError: there is none; says what to install.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    if java is None:
        raise BrokerError(f"no java {f'in JAVA_HOME ({home})' if home else 'on PATH'}: a broker needs it; {INSTALL}")
    told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False).stderr
    version = re.search(r'version "(\d+)', told)
    if version is None or int(version.group(1)) < LEAST_JAVA:
        first = told.splitlines()[0] if told else "which tells no version"
        raise BrokerError(f"{java} is {first}: Kafka {kafka_version()} needs Java {LEAST_JAVA} or newer; {INSTALL}")
    return java


def fetched_jars() -> Path:
    """The directory of Kafka's jars; Maven fetches them the first time, for one process while others wait.

    Raises:
        BrokerError: there is no Maven, or it failed.
    """
    done = JARS / f"{kafka_version()}.complete"
    if done.exists():
        return JARS
    maven = shutil.which("mvn")
    if maven is None:
        raise BrokerError(f"no mvn on PATH: it fetches Kafka {kafka_version()}; {INSTALL}")
    JARS.mkdir(parents=True, exist_ok=True)
    with (JARS.parent / "lib.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            for old in JARS.glob("*"):
                old.unlink()
            goal = [f"-DoutputDirectory={JARS}", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies"]
            fetched = subprocess.run(
                [maven, "-q", "-B", *goal], capture_output=True, text=True, timeout=DOWNLOAD_S, check=False
            )
            if fetched.returncode:
                said = (fetched.stdout + fetched.stderr).strip().splitlines() or ["it said nothing"]
                raise BrokerError(f"mvn could not fetch Kafka {kafka_version()}: {said[0]}; is there a network?")
            done.touch()
    return JARS


def last_words(log: Path) -> str:
    """What a log ends with, for an error's message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    telling = [line for line in lines[-50:] if "ERROR" in line or "Exception" in line or "FATAL" in line]
    return f"{log} says: {(telling or lines or ['nothing'])[-1][:300]}"


def wait_until(condition: Callable[[], bool], deadline_s: float, pause_s: float = 0.1) -> bool:
    """Whether the condition becomes true within so many seconds."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True
