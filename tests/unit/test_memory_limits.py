"""A process with many partitions stays inside the limits that it was given for all of them together."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from learner.user_state import RowLayout
from state.codec import Progress
from state.rocksdb import StoreMemory
from state.store import RocksUserStore

MIB = 1 << 20
CACHE, BUFFERS, HOT = 8, 16, 8
"""MiB, for all partitions together"""

WRITER = """
import json, sys
from pathlib import Path
import numpy as np
from learner.user_state import RowLayout
from state.hot_rows import HotMemory, HotRows
from state.rocksdb import MEBIBYTE, StoreMemory
from state.store import RocksUserStore

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

directory, cache, buffers, hot_mb = Path(sys.argv[1]), *map(int, sys.argv[2:])
layout = RowLayout("full", 16, 8, 32)
memory = StoreMemory(cache * MEBIBYTE, buffers * MEBIBYTE)
rows = HotMemory(layout, hot_mb * MEBIBYTE // layout.row_bytes)
stores = [RocksUserStore(directory / str(k), layout, memory) for k in range(16)]
hots = [HotRows(store, rows) for store in stores]
before, most_cache, most_buffers, written, peak = resident(), 0, 0, 0, 0
for commit in range(180):
    hot = hots[commit % 16]
    users = [b"%d" % k for k in range(commit // 16 * 600, commit // 16 * 600 + 1000)]
    slots = hot.acquire(users).slots
    rows.rows["events"][slots] += np.uint64(1)
    hot.write(slots, commit, 0)
    written += len(slots) * layout.row_bytes
    if commit % 40 == 39:
        for store in stores[::5]:
            assert sum(1 for _ in store.iterate()) > 0
    most_buffers = max(most_buffers, memory.memtables.get_usage())
    most_cache = max(most_cache, memory.cache.get_usage())
    peak = max(peak, resident())
users = sum(store.progress().users for store in stores)
for store in stores:
    store.close()
print(json.dumps(dict(written=written, cache=most_cache, buffers=most_buffers, grown=peak - before, users=users)))
"""


def test_sixteen_partitions_share_their_limits(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(CACHE), str(BUFFERS), str(HOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["written"] > 180 * MIB
    assert found["users"] == sum(1000 + 600 * (len(range(k, 180, 16)) - 1) for k in range(16))
    assert 0 < found["cache"] <= (CACHE + 1) * MIB
    assert BUFFERS / 4 * MIB < found["buffers"] <= (BUFFERS + 3) * MIB  # the latest batch comes on top: 1.1 MB
    assert found["grown"] < (CACHE + BUFFERS + HOT + 48) * MIB  # rows on their way, and what the walks hold


def test_stores_of_several_threads_share_their_memory_while_they_open_and_close(tmp_path: Path) -> None:
    memory = StoreMemory(1 << 20, 300_000)  # so little that every write asks the others to flush
    layout = RowLayout("full", 16, 8, 32)

    def open_write_close(number: int) -> None:
        for _ in range(4):
            with RocksUserStore(tmp_path / str(number), layout, memory) as store:
                for offset in range(12):
                    users = [f"u{number}-{offset}-{k}".encode() for k in range(20)]
                    store.write_batch(users, np.zeros((20, layout.row_bytes), np.uint8), Progress(offset, 0))

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(open_write_close, number) for number in range(12)]:
            done.result(timeout=120)
