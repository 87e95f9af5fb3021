"""Takes a writer's file descriptors away, at each number that some step of it needs; prints what came of it as JSON.

python -m tests.faults.descriptors DIRECTORY STEP
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from state.exceptions import StoreError, StoreUnreadable, StoreWriteFailed
from state.store import RocksReader
from state.syncing import SyncPolicy
from tests.faults.oracle import EVENTS, TINY, Wrong, check, clean_pass, finish, open_store, processor, stream

MOST = 40
"""More descriptors than a whole run needs at a time"""


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """No more than so many files can be opened on top of those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = next(n for n in range(soft) if n - len([u for u in used if u < n]) == count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, 1), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def told(error: StoreError, path: Path) -> str:
    message = str(error)
    if not isinstance(error, (StoreWriteFailed, StoreUnreadable)) or str(path) not in message or "\n" in message:
        raise Wrong(message)
    if "raise the limit of open files (ulimit -n), then go on" not in message:
        raise Wrong(message)
    return type(error).__name__


def run_out(path: Path, left: int, failed: Counter[str]) -> None:
    """A stream during which the descriptors run out, and come back."""
    store = open_store(path, TINY, SyncPolicy("never"))
    with processor(store, 8) as work:
        work.process(0, stream().take(slice(0, 40)))
        with descriptors_left(left):
            for _ in range(2):
                try:
                    work.process(0, stream())
                    break
                except StoreError as error:
                    failed[f"{told(error, path)} of a writer"] += 1
        work.process(0, stream())
        if check(store) != EVENTS:
            raise Wrong(f"at {store.progress()}")


def open_without(path: Path, left: int, failed: Counter[str]) -> None:
    """A store that is opened, to read and to write, when there are too few."""
    for kind in (RocksReader, open_store):
        try:
            with descriptors_left(left):
                kind(path).close()
        except StoreError as error:
            failed[f"{told(error, path)} when opened {'to read' if kind is RocksReader else 'to write'}"] += 1


def main(directory: Path, step: int) -> None:
    clean_pass()
    failed: Counter[str] = Counter()
    for left in range(0, MOST, step):
        path = directory / f"store-{left}"
        run_out(path, left, failed)
        open_without(path, left, failed)
        store = open_store(path)
        finish(store, check(store))
    print(json.dumps(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
