"""A partition's store on this worker's disk, brought together with its changelog on the brokers.

The work is done in a thread, which asks the loop for what the brokers have; ``state.takeover`` decides what is done.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import structlog

from configs.settings import StateSettings
from learner.user_state import RowLayout
from state.changelog import Record, Restored
from state.keys import CHANGELOG_KEY
from state.outbox import standing
from state.outbox_codec import NO_SESSION
from state.rocksdb import MEBIBYTE, StoreMemory
from state.snapshots.manifest import partition_name
from state.store import RocksUserStore
from state.syncing import SyncPolicy
from state.takeover import Local, Log, Marker, bring_together, decide, last_marker
from streams.live.exceptions import WorkerError
from streams.live.topic_reader import Span, TopicReader, on_loop, records_of

log = structlog.get_logger("coldstream")

SHOWN_S = 5.0
"""Between two lines of the log about a restore that takes long"""
OnRecords = Callable[[int, int], None]
"""(records read, records there are to read, about)"""


class Recovery:
    """Opens stores of one state directory, each as its changelog has it. For any thread but the loop's."""

    def __init__(
        self,
        directory: Path,
        state: StateSettings,
        layout: RowLayout,
        changelog: TopicReader,
        tombstone_retention_ms: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.tombstone_retention_ms = tombstone_retention_ms
        self._directory = directory
        self._layout = layout
        self._changelog = changelog
        self.loop = loop
        self._memory = StoreMemory(state.block_cache_mb * MEBIBYTE, state.write_buffers_mb * MEBIBYTE)
        self._sync = SyncPolicy(state.sync.mode, state.sync.interval_ms)

    def recovered(
        self,
        partition: int,
        stopped: threading.Event,
        on_records: OnRecords = lambda done, total: None,
        *,
        session: bytes = NO_SESSION,
    ) -> RocksUserStore:
        """The partition's store, open, with all in it that the changelog holds, and ``session``'s from now on.

        Raises Stopped soon after ``stopped`` is set, KafkaError, StoreError, ValueError (a copy has something to tell).
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / partition_name(partition)
        store = RocksUserStore(path, self._layout, self._memory, self._sync, to_restore=True)
        try:
            self._bring_together(store, partition, stopped, on_records, session)
        except BaseException:
            store.close()
            raise
        return store

    def marker(self, partition: int, store: RocksUserStore, stopped: threading.Event) -> tuple[Marker | None, int]:
        """The changelog's last marker since the store's position, and where the changelog ends now."""
        span = self.span(partition)
        stands = standing(store)
        start = span.start if stands is None else max(stands.position, span.start)
        return last_marker(self.records(partition, start, span.end, stopped)), span.end

    def span(self, partition: int) -> Span:
        """What the brokers have of the partition's changelog."""
        return on_loop(self.loop, self._changelog.span(partition))

    def records(self, partition: int, start: int, end: int, stopped: threading.Event) -> Iterator[Record]:
        """The changelog's committed records from ``start`` until before ``end``."""
        return records_of(self._changelog.chunks(partition, start, end, self.loop, stopped.is_set))

    def _bring_together(
        self, store: RocksUserStore, partition: int, stopped: threading.Event, on_records: OnRecords, session: bytes
    ) -> None:
        self._refuse_others(store, partition)
        began, now_ms = time.monotonic(), time.time_ns() // 1_000_000
        span = self.span(partition)

        def read(start: int) -> Iterator[Record]:
            return self.records(partition, start, span.end, stopped)

        shown = began

        def told(done: Restored) -> None:
            nonlocal shown
            on_records(done.records, span.end - span.start)
            if time.monotonic() - shown >= SHOWN_S:
                shown = time.monotonic()
                log.info("restoring", partition=partition, records=done.records, of_about=span.end - span.start)

        local = Local.of(store)
        surveyed = Log.surveyed(local, span.start, span.end, read)
        plan = decide(local, surveyed, tombstone_retention_ms=self.tombstone_retention_ms, now_ms=now_ms)
        done = bring_together(store, plan, read, surveyed, session=session, now_ms=now_ms, on_progress=told)
        log.info(
            "store and changelog are together",
            partition=partition,
            plan=type(plan).__name__.lower(),
            reason=getattr(plan, "reason", None),
            records=done.records,
            offset=None if done.progress is None else done.progress.offset,
            seconds=round(time.monotonic() - began, 3),
        )

    def _refuse_others(self, store: RocksUserStore, partition: int) -> None:
        """A store belongs to one changelog for good: positions in another one would mean nothing."""
        name = f"{self._changelog.topic}/{partition}".encode()
        held = dict(store.own(CHANGELOG_KEY)).get(CHANGELOG_KEY)
        if held is None:
            nothing = np.zeros((0, self._layout.row_bytes), np.uint8)
            store.write_batch([], nothing, None, own={CHANGELOG_KEY: name})
        elif held != name:
            raise WorkerError(
                f"{store.path} is kept with the changelog {held.decode(errors='replace')}, not with {name.decode()}: "
                "give another state directory (--state), or set stream.topics.changelog back"
            )
