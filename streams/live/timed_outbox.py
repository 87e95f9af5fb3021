"""An outbox that tells how long the store took to write each commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from state.outbox import Outbox
from state.store import UserStore


class TimedOutbox(Outbox):
    """``took`` is told the seconds between a commit's note and its end: the store's atomic write."""

    def __init__(self, store: UserStore, session: bytes, took: Callable[[float], None]) -> None:
        super().__init__(store, session)
        self._took = took
        self._began = 0.0

    def note(self, *commit: Any) -> Mapping[bytes, bytes | None]:
        """See ``CommitLog``."""
        own = super().note(*commit)
        self._began = time.perf_counter()
        return own

    def committed(self, *commit: Any) -> None:
        """See ``CommitLog``."""
        self._took(time.perf_counter() - self._began)
        super().committed(*commit)
