"""Restoring a partition from its changelog, read from memory: users per second.

    python -m benchmarks.restore [--case changelog] [--json]

Rows of d = 16, full covariance, ring of 32 (928 bytes), one record a user, in no order; a marker every 16,384. Into
an empty RocksDB, closed at the end; into the same store once more, which has it all; and into memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.child import in_child
from benchmarks.command import Options, standalone
from benchmarks.report import Figure
from learner.user_state import RowLayout
from state.changelog import Record, committed, restore
from state.codec import Progress
from state.memory_store import MemoryUserStore
from state.store import RocksUserStore, UserStore

LAYOUT = RowLayout("full", 16, 0, 32)
USERS = 500_000
COMMIT_USERS = 16_384
RUNS = 3
TARGET = 200_000
"""Users per second into an empty RocksDB, on 2 cores"""
CASES = ("into an empty RocksDB", "into a RocksDB that has it all", "into memory")


def run(options: Options) -> Iterator[Figure]:
    """Every kind of store that is asked for."""
    for case in CASES:
        if options.wants(case):
            runs, peak = in_child(restored, case, options.scaled(USERS))
            target = options.target(TARGET) if case == CASES[0] else None
            yield Figure(case, "speed", tuple(users / wall for users, wall, _ in runs), "users/s", target)
            yield Figure(case, "CPU of all threads", tuple(1e6 * cpu / users for users, _, cpu in runs), "µs/user")
            yield Figure(case, "peak memory, the changelog included", (peak / 2**20,), "MiB")


def restored(case: str, users: int) -> list[tuple[int, float, float]]:
    """(users, seconds, seconds of all threads' CPU) of each run."""
    log = changelog(users)
    if case == CASES[2]:
        return [_timed(MemoryUserStore(LAYOUT), log) for _ in range(RUNS)]
    with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder:
        first, *others = (Path(folder, str(run)) for run in range(RUNS))
        runs = [_timed(RocksUserStore(first, LAYOUT), log)]
        if case == CASES[0]:
            return runs + [_timed(RocksUserStore(path, LAYOUT), log) for path in others]
        return [_timed(RocksUserStore(first, LAYOUT), log) for _ in range(RUNS)]


def changelog(users: int) -> list[Record]:
    """The records of users with five events each."""
    rng = np.random.default_rng(0)
    order = rng.permutation(users)
    log: list[Record] = []
    for start in range(0, users, COMMIT_USERS):
        names = [b"user-%08d" % k for k in order[start : start + COMMIT_USERS].tolist()]
        slab = rng.integers(0, 256, (len(names), LAYOUT.row_bytes), dtype=np.uint8)
        rows = LAYOUT.rows(slab)
        rows["events"], rows["last_offset"], rows["meta_version"] = 5, start, 0
        held = start + len(names)
        log += committed(LAYOUT, names, slab, Progress(start, 0, held, 5 * held, written_at_ms=1))
    return log


def _timed(store: UserStore, log: list[Record]) -> tuple[int, float, float]:
    cpu, start = time.process_time(), time.perf_counter()
    done = restore(store, log, tombstone_retention_ms=1 << 40, now_ms=2)
    store.close()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert done.progress is not None
    return done.progress.users, seconds, cpu


if __name__ == "__main__":
    standalone("restore", run, __doc__)
