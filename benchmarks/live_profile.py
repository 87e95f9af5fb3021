"""A worker in this process under cProfile, each thread by itself, in CPU seconds: which functions take the time.

    python -m benchmarks.live_profile --out profile.json --config FILE --model DIR --state DIR [--set KEY=VALUE]

runs until SIGTERM, as ``coldstream worker`` does. Profiling itself makes short functions look dearer than they are;
what compiled code takes stands with the Python function that calls it.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import json
import pstats
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from streams.commands.worker import worker

LOOP = "loop"
"""The main thread"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one function took in one thread, without the functions it calls."""

    thread: str
    where: str
    """file:line(function)"""
    cpu_s: float


class ThreadProfiles:
    """Profiles every thread that begins from now on, and this one. Threads that have ended keep their figures."""

    def __init__(self) -> None:
        self._profiles: list[tuple[str, cProfile.Profile]] = []
        threading.setprofile(lambda *_: self._begin(threading.current_thread().name))
        self._begin(LOOP)

    def _begin(self, thread: str) -> None:
        sys.setprofile(None)
        profile = cProfile.Profile(time.thread_time)
        self._profiles.append((thread, profile))
        profile.enable()

    def costs(self) -> list[Cost]:
        """The dearest first. Ends the profile of this thread."""
        threading.setprofile(None)
        sys.setprofile(None)
        found = [cost for thread, profile in self._profiles for cost in _costs(thread, profile)]
        return sorted(found, key=lambda cost: -cost.cpu_s)


def _costs(thread: str, profile: cProfile.Profile) -> Iterator[Cost]:
    profile.create_stats()
    for (file, line, function), (_, _, own_s, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]  # its only way to the figures
        yield Cost(thread, f"{'/'.join(Path(file).parts[-2:])}:{line}({function})", own_s)


def read(path: Path) -> list[Cost]:
    """What a profiled worker has written."""
    return [Cost(**cost) for cost in json.loads(path.read_text(encoding="utf-8"))]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="A worker under a profiler")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written at the end")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE")
    options = parser.parse_args()
    importlib.import_module("streams.live.worker")  # what the command would load later is no part of the profile
    profiles = ThreadProfiles()
    worker(options.model, options.config, options.set, options.state)
    options.out.write_text(json.dumps([asdict(cost) for cost in profiles.costs()]), encoding="utf-8")


if __name__ == "__main__":
    main()
