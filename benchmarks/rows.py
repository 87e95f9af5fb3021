"""Users' rows: how many a second are read, changed and written durably, and what ten million of them take.

    python -m benchmarks.rows [--case "10,000,000"] [--json]

Rows of d = 16 with the full covariance and a ring of 32 (928 bytes), users drawn uniformly, commits of 16,384 events
through ``HotRows`` into ``RocksUserStore`` with the default settings, in a process of its own. Changing a row is one
event counted, so that what is measured is the state, not the kernel. "Read from disk": the slab holds 1 % of the users,
so all but a few rows of a commit come from RocksDB. "Warm slab": it holds all of them. Each figure is of the whole run,
flushes, compactions and the close included. Drawing the users is not counted.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.child import in_child
from benchmarks.command import Options, standalone
from benchmarks.report import Figure
from configs.settings import StateSettings
from learner.user_state import RowLayout, Slab
from state import codec
from state.hot_rows import HotMemory, HotRows
from state.rocksdb import MEBIBYTE, StoreMemory
from state.store import RocksUserStore

LAYOUT = RowLayout("full", 16, 0, 32)
COMMIT = 16_384
USERS = 1_000_000
MANY = 10_000_000
FEW = 10_000
EVENTS = 4_000_000
CODEC_ROWS = 1_000
READ_TARGET, WARM_TARGET, CODEC_TARGET = 120_000, 180_000, 1_000_000
"""Rows per second"""
DISK_TARGET, MEMORY_TARGET_MB, SHARE_TARGET = 1_200, 1_000, 0.5
"""Bytes a user on disk; peak resident megabytes; the speed at MANY users as a share of that at FEW"""


@dataclass(frozen=True, slots=True)
class Run:
    """One process's work."""

    fill_rate: float
    """Rows per second while every user was written for the first time, in random order"""
    rate: float
    """Rows per second of the uniform stream after that"""
    read_s: float
    write_s: float
    rows: int
    generated_bytes: int
    """On disk when every user had been written once and the store was closed"""
    disk_bytes: int
    """On disk after the last close: rows that replaced others are merged in part"""


def run(options: Options) -> Iterator[Figure]:
    """The codec, a million users from disk and from the slab, ten thousand and ten million users."""
    if options.wants("codec"):
        yield Figure("codec", "decode and encode", (codec_rate(),), "rows/s", options.target(CODEC_TARGET))
    users, events = options.scaled(USERS), options.scaled(EVENTS)
    default = (StateSettings().hot_rows_mb << 20) // LAYOUT.row_bytes
    for case, slots, target in (
        (f"{users:,} users, read from disk", max(users // 100, COMMIT), READ_TARGET),
        (f"{users:,} users, default slab", default, READ_TARGET),
        (f"{users:,} users, warm slab", users, WARM_TARGET),
    ):
        if options.wants(case):
            result, peak = measured(users, events, slots)
            yield from _figures(case, result, peak, options.target(target))
    many, few = options.scaled(MANY), options.scaled(FEW)
    case = f"{many:,} users"
    if options.wants(case):
        small, _ = measured(few, events, default)
        result, peak = measured(many, events, default)
        yield Figure(f"{few:,} users", "speed", (small.rate,), "rows/s")
        yield Figure(case, "speed while generating", (result.fill_rate,), "rows/s")
        yield Figure(case, "speed", (result.rate,), "rows/s")
        share, disk = options.target(SHARE_TARGET), options.target(DISK_TARGET)
        yield Figure(
            case, f"speed while generating, share of {few:,} users'", (result.fill_rate / small.rate,), "", share
        )
        yield Figure(case, f"speed, share of {few:,} users'", (result.rate / small.rate,), "", share)
        yield Figure(case, "disk", (result.generated_bytes / many,), "bytes/user", disk, at_most=True)
        yield Figure(case, "disk after the uniform stream", (result.disk_bytes / many,), "bytes/user")
        yield Figure(case, "peak memory", (peak / 1e6,), "MB", options.target(MEMORY_TARGET_MB), at_most=True)


def measured(users: int, events: int, slots: int) -> tuple[Run, int]:
    """(a run over so many users with so many slots in memory, its peak resident bytes), in a new process."""
    folder = Path(tempfile.mkdtemp(prefix="coldstream-bench-"))
    try:
        return in_child(stream, folder / "store", users, events, slots)
    finally:
        shutil.rmtree(folder)


def stream(path: Path, users: int, events: int, slots: int) -> Run:
    """Writes every user once, opens the store again, then changes rows of users drawn uniformly."""
    rng = np.random.default_rng(0)
    order, offset = rng.permutation(users), 0
    fill = events_s = read_s = write_s = 0.0
    rows = 0
    with _opened(path) as store:
        hot = HotRows(store, HotMemory(LAYOUT, slots))
        for first in range(0, users, COMMIT):
            read, write = _commit(hot, _names(order[first : first + COMMIT]), offset := offset + COMMIT)
            fill += read + write
        started = time.perf_counter()
        store.sync()
        fill += time.perf_counter() - started
    generated = _disk_bytes(path)
    with _opened(path) as store:
        hot = HotRows(store, HotMemory(LAYOUT, slots))
        if slots >= users:
            for first in range(0, users, COMMIT):
                hot.acquire(_names(np.arange(first, min(first + COMMIT, users))))
        for _ in range(events // COMMIT):
            names = _names(np.unique(rng.integers(0, users, COMMIT)))
            read, write = _commit(hot, names, offset := offset + COMMIT)
            read_s, write_s, rows = read_s + read, write_s + write, rows + len(names)
        started = time.perf_counter()
        store.close()
        events_s = read_s + write_s + time.perf_counter() - started
    return Run(users / fill, rows / events_s, read_s, write_s, rows, generated, _disk_bytes(path))


def _disk_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def codec_rate(repeats: int = 200) -> float:
    """Rows a second, decoded from stored values into one array and encoded back."""
    users = [b"user%d" % k for k in range(CODEC_ROWS)]
    slab: Slab = np.random.default_rng(0).integers(0, 256, (CODEC_ROWS, LAYOUT.row_bytes), dtype=np.uint8)
    values = codec.encode(LAYOUT, users, slab)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        values = codec.encode(LAYOUT, users, codec.decode(LAYOUT, users, values))
        best = min(best, time.perf_counter() - started)
    return CODEC_ROWS / best


def _opened(path: Path) -> RocksUserStore:
    settings = StateSettings()
    memory = StoreMemory(settings.block_cache_mb * MEBIBYTE, settings.write_buffers_mb * MEBIBYTE)
    return RocksUserStore(path, LAYOUT, memory)


def _names(users: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[bytes]:
    return [b"u%d" % user for user in users.tolist()]


def _commit(hot: HotRows, users: Sequence[bytes], offset: int) -> tuple[float, float]:
    """(seconds to have the rows, seconds to write them) of one commit."""
    started = time.perf_counter()
    slots, unknown = hot.acquire(users)
    ready = time.perf_counter()
    if len(unknown):  # floats that compress as badly as learned ones
        noise = np.random.default_rng(offset).integers(0, 256, (len(unknown), LAYOUT.row_bytes), dtype=np.uint8)
        hot.memory.slab[slots[unknown]] = noise
        hot.memory.rows["events"][slots[unknown]] = 0
    changing = time.perf_counter()
    hot.memory.rows["events"][slots] += 1
    hot.memory.rows["last_offset"][slots] = offset
    hot.write(slots, offset, 0)
    return ready - started, time.perf_counter() - changing


def _figures(case: str, result: Run, peak: int, target: float | None) -> Iterator[Figure]:
    per_row = 1e6 / result.rows
    yield Figure(case, "speed", (result.rate,), "rows/s", target)
    yield Figure(case, "  read", (result.read_s * per_row,), "µs/row")
    yield Figure(case, "  change and write", (result.write_s * per_row,), "µs/row")
    yield Figure(case, "peak memory", (peak / 1e6,), "MB")


if __name__ == "__main__":
    standalone("rows", run, __doc__)
