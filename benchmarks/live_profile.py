"""A worker in this process under cProfile, each thread by itself, in CPU seconds: which functions take the time.

    python -m benchmarks.live_profile --out profile.json --config FILE --model DIR --state DIR [--set KEY=VALUE]

runs until SIGTERM, as ``coldstream worker`` does, and writes what was taken between the first SIGUSR1 and the second:
neither start nor end are in it. Profiling itself makes short functions look dearer than they are; what compiled code
takes stands with the Python function that calls it.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import json
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from streams.commands.worker import worker

LOOP = "loop"
"""The main thread"""
MARK = signal.SIGUSR1
WRITTEN_S = 5.0
"""An end without a second mark leaves no file"""

Seconds = Mapping[tuple[str, str], float]
"""(thread, function) -> CPU seconds so far"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one function took in one thread, without the functions it calls."""

    thread: str
    where: str
    """``file.py:17 function``; of what is not written in Python, its name alone"""
    cpu_s: float


class ThreadProfiles:
    """Profiles this thread and every one that begins until ``end``. Threads that have ended keep their figures."""

    def __init__(self) -> None:
        self._profiles: list[tuple[str, cProfile.Profile]] = []
        threading.setprofile(lambda *_: self._begin(threading.current_thread().name))
        self._begin(LOOP)

    def _begin(self, thread: str) -> None:
        sys.setprofile(None)
        profile = cProfile.Profile(time.thread_time)
        self._profiles.append((thread, profile))
        profile.enable()

    def seconds(self) -> Seconds:
        """So far, of calls that have ended. From any thread."""
        found: dict[tuple[str, str], float] = {}
        for thread, profile in list(self._profiles):
            for entry in profile.getstats():
                key = thread, _where(entry.code)
                found[key] = found.get(key, 0.0) + entry.inlinetime
        return found

    def end(self) -> None:
        """Stops for this thread and for those to come."""
        threading.setprofile(None)
        sys.setprofile(None)


def costs_between(before: Seconds, after: Seconds) -> list[Cost]:
    """The dearest first."""
    found = [Cost(*key, cpu_s - before.get(key, 0.0)) for key, cpu_s in after.items()]
    return sorted(found, key=lambda cost: -cost.cpu_s)


def read(path: Path) -> list[Cost]:
    """What a profiled worker has written."""
    return [Cost(**cost) for cost in json.loads(path.read_text(encoding="utf-8"))]


def _where(code: object) -> str:
    name, file, line = (getattr(code, f"co_{part}", "") for part in ("name", "filename", "firstlineno"))
    return f"{Path(file).name}:{line} {name}" if name else str(code).strip("<>")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="A worker under a profiler")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written at the second SIGUSR1")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE")
    options = parser.parse_args()
    importlib.import_module("streams.live.worker")  # the command loads it later, which would be profiled as well
    signal.pthread_sigmask(signal.SIG_BLOCK, {MARK})  # for all threads: one waits for it

    def write_between_marks() -> None:
        signal.sigwait({MARK})
        before = profiles.seconds()
        signal.sigwait({MARK})
        costs = costs_between(before, profiles.seconds())
        options.out.write_text(json.dumps([asdict(cost) for cost in costs]), encoding="utf-8")

    writing = threading.Thread(target=write_between_marks, daemon=True)
    writing.start()
    profiles = ThreadProfiles()
    worker(options.model, options.config, options.set, options.state)
    writing.join(WRITTEN_S)


if __name__ == "__main__":
    main()
