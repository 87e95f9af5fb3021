"""Kills writers, at random times and at named points, until so many have died; prints what came of it as JSON.

    python -m tests.faults.kills DIRECTORY KILLS SEED

Each trial is a store of its own. Its writer is killed up to three times; after each kill a reader and the next writer
must find the rows of a clean pass, and the last writer ends the stream. The named points are patched into the writer:
the code under test has none.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import state.store
from state.exceptions import StoreUnreadable
from state.snapshots.snapshot import restore, snapshot_of_open
from state.store import RocksReader, RocksUserStore
from state.syncing import SyncPolicy
from tests.faults.oracle import EVENTS, LARGE, TINY, Wrong, check, clean_pass, open_store, processor, stream
from tests.faults.processes import end_of, forked

POINTS = {
    "any time": 4, "before the batch is written": 1, "after the batch is written": 1, "before a sync": 1,
    "while it opens": 1, "before the snapshot is renamed": 1, "after the snapshot is renamed": 1,
}  # fmt: skip
"""Where writers die, and the shares of the kills"""
PATIENCE = 20
"""Writers per kill: some come to the end before they are killed"""


@dataclass(frozen=True)
class Writer:
    """How one writer works, and where it dies."""

    point: str | None
    """None: nobody kills it"""
    after: int
    """At the named point it dies when it has passed it so often"""
    commit_events: int
    batch_events: int
    memtables: int
    sync: SyncPolicy
    back: int
    """How many applied events it is fed again"""
    snapshot_every: int
    """Batches"""


def draw(rng: np.random.Generator, point: str | None) -> Writer:
    snapshots = "snapshot" in (point or "")
    syncs = [SyncPolicy("never"), SyncPolicy("batch"), SyncPolicy("interval", 1)]
    return Writer(
        point,
        after=int(rng.integers(0, 1 if point == "while it opens" else 2 if snapshots else 12)),
        commit_events=int(rng.integers(1, 17)),
        batch_events=int(rng.integers(8, 60)),
        memtables=int(rng.choice([LARGE, TINY])),
        sync=syncs[2] if point == "before a sync" else syncs[rng.integers(0, 3)],
        back=int(rng.choice([0, 0, 5, EVENTS])),
        snapshot_every=1 if snapshots else int(rng.choice([0, 0, 0, 2])),
    )


def write(directory: Path, writer: Writer) -> None:
    """The stream, from where the store is to its end."""
    arm(writer)
    path = directory / "partition-0"
    seen = look(path)
    store = open_store(path, writer.memtables, writer.sync)
    done = check(store)
    if seen is not None and seen != done:
        raise Wrong(f"a reader saw {seen} events before the store was opened, and the writer sees {done}")
    with processor(store, writer.commit_events) as work:
        for number, start in enumerate(range(max(done - writer.back, 0), EVENTS, writer.batch_events), 1):
            work.process(0, stream().take(slice(start, start + writer.batch_events)))
            if writer.snapshot_every and number % writer.snapshot_every == 0:
                url = directory / "snapshots" / f"{time.time_ns()}"
                snapshot_of_open({0: store}, directory, str(url))
        if check(store) != EVENTS:
            raise Wrong(f"the stream was fed to its end, and the store is at {store.progress()}")


def look(path: Path) -> int | None:
    """What a reader sees of a store that nobody has open; None where there is none yet."""
    try:
        with RocksReader(path) as reader:
            return check(reader)
    except StoreUnreadable:
        return None


def arm(writer: Writer) -> None:
    """Patches this process so that it dies at its point."""
    passed = [0]

    def die_when_due() -> None:
        passed[0] += 1
        if passed[0] > writer.after:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: object, name: str, before: bool) -> None:
        original: Callable[..., object] = getattr(owner, name)

        def patched(*arguments: object, **named: object) -> object:
            if before:
                die_when_due()
            result = original(*arguments, **named)
            if not before:
                die_when_due()
            return result

        setattr(owner, name, patched)

    match writer.point:
        case "before the batch is written":
            around(RocksUserStore, "_write", True)
        case "after the batch is written":
            around(RocksUserStore, "_write", False)
        case "before a sync":
            around(RocksUserStore, "_timed_sync", True)
        case "while it opens":
            around(state.store, "open_for_writing", False)
        case "before the snapshot is renamed":
            around(os, "rename", True)
        case "after the snapshot is renamed":
            around(os, "rename", False)


def check_snapshots(directory: Path) -> int:
    """Every snapshot that has its name is whole; returns how many."""
    found = sorted(p for p in directory.glob("snapshots/*") if ".partial-" not in p.name)
    for place in found:
        with tempfile.TemporaryDirectory() as restored:
            restore(str(place), Path(restored) / "state")
            with RocksReader(Path(restored) / "state" / "partition-0") as reader:
                check(reader)
    return len(found)


def trial(directory: Path, rng: np.random.Generator, died: Counter[str], kills: int, lasts_s: float) -> Counter[str]:
    """One store, from nothing to the end of the stream; counts what happened."""
    counts: Counter[str] = Counter()
    for _ in range(min(int(rng.integers(1, 4)), kills)):
        point = min(POINTS, key=lambda name: (died[name] / POINTS[name], rng.random()))
        writer = draw(rng, point)
        counts["writers"] += 1
        pid = forked(lambda w=writer: write(directory, w))
        if point == "any time":
            time.sleep(float(rng.uniform(0, lasts_s)))
            os.kill(pid, signal.SIGKILL)
        status = end_of(pid)
        if status == -signal.SIGKILL:
            died[point] += 1
        elif status != 0:
            raise Wrong(f"{writer} ended with {status}")
    last = draw(rng, None)
    counts["replayed from an earlier offset"] += last.back > 0
    counts["snapshots found whole"] += forked_count(lambda: check_snapshots(directory))
    if (status := end_of(forked(lambda: write(directory, last)))) != 0:
        raise Wrong(f"{last} ended with {status}")
    return counts


def forked_count(work: Callable[[], int]) -> int:
    """The number that the work returns, which opens RocksDB, so that this process must not do it."""
    reading, writing = os.pipe()
    pid = forked(lambda: os.write(writing, work().to_bytes(4, "little")))
    os.close(writing)
    found = os.read(reading, 4)
    os.close(reading)
    if end_of(pid) != 0:
        raise Wrong("a snapshot is not whole")
    return int.from_bytes(found, "little")


def main(directory: Path, kills: int, seed: int) -> None:
    clean_pass()  # it compiles the kernel too: every fork begins warm
    rng, died, counts = np.random.default_rng(seed), Counter[str](), Counter[str]()
    began = time.monotonic()
    if end_of(forked(lambda: write(directory / "undisturbed", draw(rng, None)))) != 0:
        raise Wrong("a writer that nobody kills does not come to the end")
    lasts_s = time.monotonic() - began
    while sum(died.values()) < kills:
        place = directory / f"trial-{counts['stores']}"
        counts["stores"] += 1
        counts += trial(place, rng, died, kills - sum(died.values()), lasts_s)
        shutil.rmtree(place)
        if counts["writers"] > PATIENCE * kills:
            raise Wrong(f"{counts['writers']} writers, and only {sum(died.values())} of them died: {died}")
    print(json.dumps({"kills": died, "counts": counts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
