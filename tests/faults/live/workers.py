"""Workers as processes of their own: started by the command that users start, watched over HTTP, killed by their id."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.kafka.cluster import HOST, free_ports
from tests.faults.live.stage import Stage

ROOT = Path(__file__).parents[3]
LOOK_S = 0.1
ANSWER_S = 2.0
"""A probe's answer; a stopped process gives none"""
END_S = 30.0
LOG_SHOWN = 6_000
"""Characters of each worker's log that a failure shows"""
PENDING = "coldstream_changelog_pending_commits"
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class WorkerProcess:
    """One worker on its own state directory; it may be started again after it has ended."""

    def __init__(
        self, stage: Stage, name: str, *, static: bool = False, options: Mapping[str, object] | None = None
    ) -> None:
        """``static``: with an instance name, so that the group knows it again. ``options``: as ``--set`` takes them."""
        self.name = name
        self.state = stage.directory / name / "state"
        self.log = stage.directory / name / "log"
        self._stage = stage
        self._static = static
        self._options = dict(options or {})
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.state.parent.mkdir(parents=True, exist_ok=True)

    def start(self, point: str | None = None, passes: int = 1) -> None:
        """Starts it. With ``point``, it dies when it has passed that place so often (``tests.faults.live.points``)."""
        assert not self.running, f"{self.name} runs already"
        self._port = free_ports(1)[0]
        program = ["streams.cli"] if point is None else ["tests.faults.live.points", point, str(passes)]
        options = [f"--set={key}={value}" for key, value in self._options.items()]
        command = [
            sys.executable, "-m", *program, "worker", "--config", str(self._stage.config),
            "--model", str(self._stage.model), "--state", str(self.state), f"--set=worker.metrics_port={self._port}",
            *(["--instance", self.name] if self._static else []), *options,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def status(self) -> int | None:
        """Exit status, or less than 0, the signal that ended it; None: it runs, or never did."""
        return None if self._process is None else self._process.poll()

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self._signal(signal.SIGKILL)
        self.wait()

    def term(self) -> None:
        """SIGTERM; see ``wait``."""
        self._signal(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def wait(self, deadline_s: float = END_S) -> int:
        """Its exit status, once it has ended."""
        assert self._process is not None
        return self._process.wait(deadline_s)

    def probe(self, path: str = "/readyz") -> tuple[int, dict[str, Any]] | None:
        """Status and content of an answer; None where there is none."""
        answer = self._get(path)
        return None if answer is None else (answer[0], json.loads(answer[1]))

    def partitions(self) -> dict[int, dict[str, Any]]:
        """What it says of the partitions that it has; nothing where it does not answer."""
        answer = self.probe()
        return {} if answer is None else {int(number): told for number, told in answer[1]["partitions"].items()}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 where there are none."""
        answer = self._get("/metrics")
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        return sum(
            float(value)
            for found, told, value in _SAMPLE.findall("" if answer is None else answer[1])
            if found == name and wanted <= set(told.split(","))
        )

    def _get(self, path: str) -> tuple[int, str] | None:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=ANSWER_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, number)


@contextmanager
def crew(*workers: WorkerProcess) -> Iterator[None]:
    """None of the workers outlives the block; if it fails, their logs are told."""
    try:
        yield
    except BaseException as error:
        for worker in workers:
            error.add_note(f"--- {worker.name} (status {worker.status}) ---\n{_last_words(worker)}")
        raise
    finally:
        for worker in workers:
            if worker.running:
                worker.kill()


def wait_until(condition: Callable[[], object], deadline_s: float, what: Callable[[], object] | str) -> float:
    """Looks until the condition holds; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > deadline_s:
            raise AssertionError(f"not so within {deadline_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(LOOK_S)
    return time.monotonic() - began


def owners(workers: tuple[WorkerProcess, ...], partitions: int) -> dict[int, WorkerProcess] | None:
    """Who has each partition; None while one has nobody, or more than one."""
    held = [(number, worker) for worker in workers if worker.running for number in worker.partitions()]
    owner = dict(held)
    return owner if len(owner) == len(held) == partitions else None


def until_owned(workers: tuple[WorkerProcess, ...], partitions: int, deadline_s: float, *, members: int = 1) -> float:
    """Waits until each partition runs at exactly one worker, and ``members`` of them have some; returns the seconds."""

    def owned() -> bool:
        held = [worker.partitions() for worker in workers if worker.running]
        numbers = sorted(number for partitions in held for number in partitions)
        running = all(told["state"] == "running" for partitions in held for told in partitions.values())
        return running and numbers == list(range(partitions)) and sum(map(bool, held)) == members

    return wait_until(owned, deadline_s, lambda: _told(workers))


def until_settled(workers: tuple[WorkerProcess, ...], until: Mapping[int, int], deadline_s: float) -> float:
    """Waits until each partition has one owner who is ready, applied everything and told of it; returns the seconds."""

    def settled() -> bool:
        told = {n: p for worker in workers if worker.running for n, p in worker.partitions().items()}
        return (
            {n: _next_offset(p) for n, p in told.items()} == dict(until)
            and owners(workers, len(until)) is not None
            and all(not p["lag"] for p in told.values())
            and all((worker.probe() or (0,))[0] == 200 for worker in workers if worker.running)
            and sum(worker.metric(PENDING) for worker in workers if worker.running) == 0
        )

    return wait_until(settled, deadline_s, lambda: f"offsets {dict(until)}; {_told(workers)}")


def end_gracefully(workers: tuple[WorkerProcess, ...]) -> None:
    """SIGTERM to all that run; each ends by itself, with 0."""
    running = [worker for worker in workers if worker.running]
    for worker in running:
        worker.term()
    statuses = {worker.name: worker.wait() for worker in running}
    assert set(statuses.values()) <= {0}, statuses


def _next_offset(told: Mapping[str, Any]) -> int:
    return 0 if told["offset"] is None else int(told["offset"]) + 1


def _told(workers: tuple[WorkerProcess, ...]) -> str:
    return "; ".join(f"{worker.name} (status {worker.status}): {worker.probe()}" for worker in workers)


def _last_words(worker: WorkerProcess) -> str:
    return worker.log.read_text("utf-8", "replace")[-LOG_SHOWN:] if worker.log.exists() else "(no log)"
