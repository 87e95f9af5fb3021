"""When what was written is forced to the disk."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rocksdict import WriteOptions


@dataclass(frozen=True, slots=True)
class SyncPolicy:
    """When written batches are forced to the disk. kill -9 loses nothing under any of them.

    never: power loss can take back what the system has not written out by itself (Linux: some 30 s).
    interval: at most the batches of the last ``interval_ms``; one sync serves all batches of the interval.
    batch: nothing that was confirmed.
    What is taken back, rows and offset together, is applied again from the stream.
    """

    mode: Literal["never", "interval", "batch"] = "interval"
    interval_ms: int = 1000


class Syncing:
    """Carries a SyncPolicy out: write options for a batch, and one sync an interval for all batches of it."""

    def __init__(self, policy: SyncPolicy, sync: Callable[[], None]) -> None:
        self.write_options = WriteOptions()
        self.write_options.sync = policy.mode == "batch"
        self._interval_s = policy.interval_ms / 1000 if policy.mode == "interval" else None
        self._sync = weakref.WeakMethod(sync)
        self._lock = threading.Lock()
        """Of ``_timer``"""
        self._running = threading.Lock()
        """Held while a sync runs"""
        self._timer: threading.Timer | None = None

    def written(self) -> None:
        """A batch was written: it is synced within the interval."""
        if self._interval_s is None:
            return
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(self._interval_s, self._due)
                self._timer.daemon = True
                self._timer.start()

    def stop(self) -> None:
        """No sync is running or due after this."""
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            timer.join()
        with self._running:
            pass  # one that began before this has ended

    def _due(self) -> None:
        with self._running:
            with self._lock:
                self._timer = None
            sync = self._sync()
            if sync is not None:
                sync()
