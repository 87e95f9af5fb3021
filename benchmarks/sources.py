"""How fast events are read from files, and how much memory ordering a shuffled file takes.

    python -m benchmarks.sources [--data DIRECTORY] [--case shuffled] [--json]

Ten million CSV lines in random order of time are spooled in time order and read back once, in a process of their
own. The ``ratings.dat`` of MovieLens 1M is left out without ``--data``. Needs some 1 GB of temporary disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.child import in_child
from benchmarks.command import Options, Skipped, standalone
from benchmarks.report import Figure
from benchmarks.synthetic import uniform_users, write_csv, write_jsonl
from configs.settings import DataSettings
from streams.sources import open_source, time_ordered

SHUFFLED_EVENTS = 10_000_000
SHUFFLED_USERS, SHUFFLED_ITEMS = 200_000, 20_000
PLAIN_EVENTS = 1_000_000
PLAIN_USERS = 100_000
TARGET_PEAK_BYTES = 1.5e9


def run(options: Options) -> Iterator[Figure]:
    """Decoding by format, then the ordering of a shuffled file."""
    with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder:
        yield from _decoding(options, Path(folder))
        n = options.scaled(SHUFFLED_EVENTS)
        case = f"{n:,} shuffled CSV lines"
        if options.wants(case):
            path = Path(folder, "shuffled.csv")
            write_csv(path, uniform_users(n, SHUFFLED_USERS), items=SHUFFLED_ITEMS, shuffled=True)
            yield from ordering(case, path, Path(folder), options.target(TARGET_PEAK_BYTES))


def _decoding(options: Options, folder: Path) -> Iterator[Figure]:
    n = options.scaled(PLAIN_EVENTS)
    for name, write in (("csv", write_csv), ("jsonl", write_jsonl)):
        case = f"{n:,} events, {name}"
        if options.wants(case):
            path = folder / f"plain.{name}"
            write(path, uniform_users(n, PLAIN_USERS))
            yield decoding(case, path)
    if options.wants("ratings.dat"):
        try:
            yield decoding("ratings.dat", options.dataset("ml-1m") / "ratings.dat")
        except Skipped as reason:
            options.progress(f"ratings.dat: skipped, {reason}")


def decoding(case: str, path: Path) -> Figure:
    """Events per second of ``open_source(...).batches()``, validation and encoding included."""
    source = open_source(DataSettings(paths=(path,)))
    start = time.perf_counter()
    events = sum(len(batch) for batch in source.batches())
    return Figure(case, "decoding", (events / (time.perf_counter() - start),), "events/s")


def ordering(case: str, path: Path, folder: Path, target: float | None = None) -> Iterator[Figure]:
    """Seconds, speed and peak memory of ordering a file by time and reading it back."""
    (events, ordered, read), peak = in_child(order, path, folder / "spool")
    yield Figure(case, "ordering", (events / ordered,), "events/s")
    yield Figure(case, "reading back", (events / read,), "events/s")
    yield Figure(case, "peak memory", (peak / 1e6,), "MB", None if target is None else target / 1e6, at_most=True)


def order(path: Path, spool: Path) -> tuple[int, float, float]:
    """(events, seconds to put them in order on disk, seconds to read them back)"""
    start = time.perf_counter()
    with time_ordered(open_source(DataSettings(paths=(path,))), spool) as ordered:
        spooled = time.perf_counter()
        events = sum(len(batch) for batch in ordered.batches())
        return events, spooled - start, time.perf_counter() - spooled


if __name__ == "__main__":
    standalone("sources", run, __doc__)
