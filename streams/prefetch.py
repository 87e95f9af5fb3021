"""Runs an iterator ahead in a thread of its own, so that reading overlaps with what is done with the last item."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import Full, Queue
from typing import TypeVar

T = TypeVar("T")
STOP_CHECK_SECONDS = 0.05
"""How soon the thread notices that nobody wants more items."""


def prefetched(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, up to ``depth`` of them read ahead; what the iterator raises is raised here.

    Closing the generator ends the thread; the iterator is used by that thread alone.
    """
    queue: Queue[tuple[str, T | BaseException | None]] = Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[str, T | BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return queue.put(entry, timeout=STOP_CHECK_SECONDS)
            except Full:
                continue

    def run() -> None:
        try:
            for item in items:
                put(("item", item))
                if stopped.is_set():
                    break
        except BaseException as error:
            put(("error", error))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
            put(("end", None))

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, payload = queue.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(payload, BaseException)
                raise payload
            yield payload  # type: ignore[misc]  # an item, by its tag
    finally:
        stopped.set()
        thread.join()
