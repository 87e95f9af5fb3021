"""A worker in this process under cProfile, each thread by itself, in CPU seconds: which functions take the time.

    python -m benchmarks.live_profile --out profile.json --config FILE --model DIR --state DIR [--set KEY=VALUE]

runs until SIGTERM, as ``coldstream worker`` does, and writes what was taken between the first SIGUSR1 and the second:
neither start nor end is in it. Profiling itself makes short functions look dearer than they are; what compiled code
takes stands with the Python function that calls it.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import importlib
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streams.commands.worker import worker

LOOP = "loop"
"""The main thread"""
MARK = signal.SIGUSR1

Moment = Sequence[tuple[str, Sequence[Any]]]
"""(thread, what cProfile has counted in it so far)"""


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

    def moment(self) -> Moment:
        """So far, of calls that have ended. From any thread."""
        gc.disable()  # what it calls would be profiled, and move entries about while they are counted
        try:
            return [(thread, profile.getstats()) for thread, profile in self._profiles]
        finally:
            gc.enable()

    def end(self) -> None:
        """Stops for this thread and for those to come."""
        threading.setprofile(None)
        sys.setprofile(None)


def costs_between(before: Moment, after: Moment) -> list[Cost]:
    """The dearest first."""
    taken: dict[tuple[str, str], float] = {}
    for moment, sign in ((after, 1), (before, -1)):
        for thread, entries in moment:
            for entry in entries:
                key = thread, _where(entry.code)
                taken[key] = taken.get(key, 0.0) + sign * entry.inlinetime
    return sorted((Cost(*key, cpu_s) for key, cpu_s in taken.items()), key=lambda cost: -cost.cpu_s)


def read(path: Path) -> list[Cost]:
    """What a profiled worker has written."""
    return [Cost(**cost) for cost in json.loads(path.read_text(encoding="utf-8"))]


def _where(code: object) -> str:
    name, file, line = (getattr(code, f"co_{part}", "") for part in ("name", "filename", "firstlineno"))
    return f"{Path(file).name}:{line} {name}" if name else str(code).strip("<>")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="A worker under a profiler")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written at the end")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE")
    options = parser.parse_args()
    importlib.import_module("streams.live.worker")  # the command loads it later, which would be profiled as well
    profiles, marks = ThreadProfiles(), list[Moment]()
    signal.signal(MARK, lambda *_: marks.append(profiles.moment()))
    worker(options.model, options.config, options.set, options.state)
    before, after, *_ = marks
    costs = costs_between(before, after)
    options.out.write_text(json.dumps([asdict(cost) for cost in costs]), encoding="utf-8")


if __name__ == "__main__":
    main()
