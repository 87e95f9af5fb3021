"""However workers die, come back and take over from each other: the log tells every event once, and all stores agree.

The log is a simulated one: transactions all or nothing, fencing by epoch, compaction, tombstones that vanish in time.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.user_state import RowLayout
from state.changelog import Record
from state.exceptions import StoreWriteFailed
from state.expiry import idle_up_to
from state.keys import USER
from state.memory_store import MemoryUserStore
from state.outbox import Outbox, records, standing
from state.outbox_codec import NO_SESSION, SESSION_BYTES
from state.takeover import Local, Log, Plan, Resend, bring_together, decide, follow
from streams.processor import Processor
from tests.models import random_stream, small_model
from tests.property.test_expiry import AFTER_MS, DAY_MS, made

LAYOUT = RowLayout("gradient", 5, 4, 2)
RETENTION_MS = 1000
WORKERS = st.integers(0, 2)
MODEL = small_model("gradient")


class Fenced(Exception):
    """Somebody else publishes now."""


class Killed(Exception):
    """The process is dead."""


class Broker:
    """One partition of a changelog, and what was predicted beside it."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000
        self.log: list[tuple[int, int, Record]] = []
        """(offset, time, record)"""
        self.end = 0
        self.epoch = 0
        self.told: list[bytes] = []

    def fence(self) -> int:
        self.epoch += 1
        return self.epoch

    def publish(self, epoch: int, sent: list[Record], payloads: tuple[bytes, ...]) -> int:
        """One transaction; returns the offset after its end."""
        if epoch != self.epoch:
            raise Fenced
        self.log += [(self.end + k, self.now_ms, record) for k, record in enumerate(sent)]
        self.end += len(sent) + 1
        self.told += payloads
        return self.end

    def compact(self, dirty: int) -> None:
        """Of all but the last ``dirty`` records the latest of each key stays, and no tombstone that is too old."""
        clean = max(len(self.log) - dirty, 0)
        last = {record.key: offset for offset, _, record in self.log[:clean]}
        self.log = [
            (offset, at, record)
            for offset, at, record in self.log[:clean]
            if last[record.key] == offset and (record.value is not None or self.now_ms - at < RETENTION_MS)
        ] + self.log[clean:]

    def read(self, start: int) -> Iterator[Record]:
        return (record for offset, _, record in list(self.log) if offset >= start)

    def rows(self) -> dict[bytes, bytes]:
        """What the log holds of users, idle ones too."""
        latest = {record.key: record.value for _, _, record in self.log if record.key.startswith(USER)}
        return {key[len(USER) :]: value for key, value in latest.items() if value is not None}


class Disk(MemoryUserStore):
    """Survives its worker. Its n-th write from now on fails, whether it became durable or not."""

    left = -1
    durable = False

    def _fails(self) -> bool:
        self.left -= 1
        return self.left == -1

    def write_batch(self, *batch, **more):
        fails = self._fails()
        if fails and not self.durable:
            raise StoreWriteFailed("refused")
        values = super().write_batch(*batch, **more)
        if fails:
            raise StoreWriteFailed("refused, and written all the same")
        return values

    def end_restore(self, *end):
        fails = self._fails()
        if fails and not self.durable:
            raise StoreWriteFailed("refused")
        super().end_restore(*end)
        if fails:
            raise StoreWriteFailed("refused, and written all the same")

    def copied(self) -> Disk:
        """As a snapshot has it."""
        other = copy.copy(self)
        other._rows, other._own, other.left = dict(self._rows), dict(self._own), -1
        return other


class Stream:
    """What is to be learned, and what one clean pass makes of it."""

    def __init__(self, events: Interactions, days: float | None) -> None:
        self.events, self.days = events, days
        self.through = int(events.offset[-1]) + 3
        with self.processor(MemoryUserStore(LAYOUT), 64, None) as work:
            said = work.process(0, events, through=self.through)
            self.logits = said.logit
            self.progress = work.store(0).progress()
            self.rows = held(work.store(0))

    def processor(self, store: MemoryUserStore, commit_events: int, outbox: Outbox | None) -> Processor:
        state = StateSettings(commit_events=commit_events, ring=2, expire_after_days=self.days)
        work = Processor(MODEL, lambda *_: store, state, log=None if outbox is None else lambda *_: outbox)
        work.adopt(0, store)
        return work

    def after(self, offset: int, count: int) -> tuple[Interactions, int]:
        """(the next events after an offset, the offset that is read with them): the gap behind them too, or a part."""
        first = int(np.searchsorted(self.events.offset, offset, side="right"))
        chosen = self.events.take(slice(first, first + count))
        following = first + count
        end = int(self.events.offset[following]) - 1 if following < len(self.events) else self.through
        return chosen, end


@cache
def stream(expiring: bool) -> Stream:
    if not expiring:
        return Stream(random_stream(90, 8, seed=5), None)
    crowd = made(7, [(900, AFTER_MS // 300, 0), (700, AFTER_MS // 300, AFTER_MS)], 0.0, False, True)
    return Stream(crowd.interactions(11), AFTER_MS / DAY_MS)


def held(store: MemoryUserStore) -> dict[bytes, bytes]:
    """The rows of users who are not idle: whether the others are there is up to the sweep."""
    progress = store.progress()
    idle = -1 if progress is None else idle_up_to(progress.clock)
    rows = {user: row.tobytes() for user, row in store.iterate()}
    return {user: row for user, row in rows.items() if int.from_bytes(row[16:24], "little") > idle}


def payload(events: Interactions, adapted) -> bytes:
    assert adapted.applied.all()
    return b"".join(
        offset.tobytes() + logit.tobytes() for offset, logit in zip(events.offset, adapted.logit, strict=True)
    )


class Worker:
    """A machine: its disk, and the process on it while one runs."""

    def __init__(self, broker: Broker, source: Stream) -> None:
        self.broker, self.source = broker, source
        self.disk = Disk(LAYOUT)
        self.kill()

    def kill(self) -> None:
        """What is in memory is gone; the disk stays."""
        self.work: Processor | None = None
        self.outbox: Outbox | None = None

    def joined(self, session: bytes, dies_after: int | None) -> Plan:
        """Brings disk and log together; dies after so many records, or chunks, of the log."""

        def read(start: int) -> Iterator[Record]:
            for count, record in enumerate(self.broker.read(start)):
                if count == dies_after:
                    raise Killed
                yield record

        now, local = self.broker.now_ms, Local.of(self.disk)
        log = Log.surveyed(local, 0, self.broker.end, self.broker.read)
        plan = decide(local, log, tombstone_retention_ms=RETENTION_MS, now_ms=now)
        if session == NO_SESSION and isinstance(plan, Resend) and plan.untold:
            with pytest.raises(ValueError, match="cannot only follow"):
                bring_together(self.disk, plan, read, log, now_ms=now)
            return plan
        bring_together(self.disk, plan, read, log, session=session, now_ms=now, chunk_records=3)
        return plan

    def take_over(self, commit_events: int, dies_after: int | None = None) -> Plan:
        self.kill()
        self.epoch, self.session = self.broker.fence(), secrets.token_bytes(SESSION_BYTES)
        plan = self.joined(self.session, dies_after)
        self.outbox = Outbox(self.disk, self.session)
        self.work = self.source.processor(self.disk, commit_events, self.outbox)
        return plan

    def process(self, count: int) -> bool:
        """The next events; whether there were any offsets left."""
        progress = self.disk.progress()
        offset = -1 if progress is None else progress.offset
        events, through = self.source.after(offset, count)
        if through > offset:
            self.work.process(0, events, through=through, payload=payload)
        return through > offset

    def publish(self, max_bytes: int, *, acknowledge: bool = True) -> bool:
        """What waits; False when nothing did."""
        publication = self.outbox.take(max_bytes)
        if publication is None:
            return False
        sent = list(records(publication, LAYOUT, self.session))
        end = self.broker.publish(self.epoch, sent, publication.payloads)
        if acknowledge:
            self.outbox.acknowledged(publication.sequence, end)
        return True

    def finish(self) -> None:
        """Takes over, and does all that is left."""
        self.disk.left = -1
        self.take_over(50)
        while self.process(1000):
            pass
        while self.publish(1 << 20):
            pass
        assert (self.outbox.pending_commits, self.outbox.pending_bytes) == (0, 0)
        self.outbox.trim()


class Takeovers(RuleBasedStateMachine):
    """Three workers on one partition."""

    @initialize(expiring=st.booleans())
    def begin(self, expiring: bool) -> None:
        self.source = stream(expiring)
        self.broker = Broker()
        self.workers = [Worker(self.broker, self.source) for _ in range(3)]
        self.snapshots: list[Disk] = []
        self.clock = patch("state.outbox._now_ms", lambda: self.broker.now_ms)
        self.clock.start()

    def running(self, worker: int) -> bool:
        return self.workers[worker].work is not None

    @rule(worker=WORKERS, commit_events=st.integers(1, 40), dies_after=st.none() | st.integers(0, 20))
    def take_over(self, worker: int, commit_events: int, dies_after: int | None) -> None:
        """Its own partition after a kill, or another's who may not know it yet."""
        try:
            self.workers[worker].take_over(commit_events, dies_after)
        except (Killed, StoreWriteFailed):
            self.workers[worker].kill()

    @rule(worker=WORKERS, write=st.integers(0, 3), durable=st.booleans())
    def next_writes_fail(self, worker: int, write: int, durable: bool) -> None:
        self.workers[worker].disk.left, self.workers[worker].disk.durable = write, durable

    @rule(worker=WORKERS, count=st.integers(0, 60))
    def process(self, worker: int, count: int) -> None:
        """By the owner or a zombie; a refused write is tried again."""
        if self.running(worker):
            try:
                self.workers[worker].process(count)
            except StoreWriteFailed:
                self.workers[worker].process(count)

    @rule(worker=WORKERS)
    def sweep(self, worker: int) -> None:
        if self.running(worker):
            try:
                self.workers[worker].work.sweep(0, 5)
            except StoreWriteFailed:
                self.workers[worker].kill()

    @rule(worker=WORKERS, max_bytes=st.integers(1, 4000), ends=st.sampled_from(["acknowledged", "killed", "killed"]))
    def publish(self, worker: int, max_bytes: int, ends: str) -> None:
        """The kill comes between the end of the transaction and its acknowledgement."""
        if self.running(worker):
            machine = self.workers[worker]
            try:
                machine.publish(max_bytes, acknowledge=ends == "acknowledged")
            except Fenced:
                machine.kill()
            if ends == "killed":
                machine.kill()

    @rule(worker=WORKERS)
    def kill(self, worker: int) -> None:
        self.workers[worker].kill()

    @rule(worker=WORKERS)
    def close_cleanly(self, worker: int) -> None:
        if self.running(worker):
            machine = self.workers[worker]
            try:
                while machine.publish(2000):
                    pass
                machine.outbox.trim()
            except (Fenced, StoreWriteFailed):
                pass
            machine.kill()

    @rule(worker=WORKERS)
    def wipe(self, worker: int) -> None:
        self.workers[worker].kill()
        self.workers[worker].disk = Disk(LAYOUT)

    @rule(worker=WORKERS)
    def take_snapshot(self, worker: int) -> None:
        self.snapshots.append(self.workers[worker].disk.copied())

    @precondition(lambda self: self.snapshots)
    @rule(worker=WORKERS, data=st.data())
    def put_a_snapshot_back(self, worker: int, data: st.DataObject) -> None:
        """Of any worker's disk: an old copy, or after power loss."""
        self.workers[worker].kill()
        self.workers[worker].disk = data.draw(st.sampled_from(self.snapshots)).copied()

    @rule(worker=WORKERS, dies_after=st.none() | st.integers(0, 20))
    def begin_to_follow(self, worker: int, dies_after: int | None) -> None:
        if not self.running(worker):
            try:
                self.workers[worker].joined(NO_SESSION, dies_after)
            except (Killed, StoreWriteFailed):
                self.workers[worker].kill()

    @rule(worker=WORKERS, count=st.integers(0, 12))
    def follow(self, worker: int, count: int) -> None:
        """Some more of the log, wherever the batch ends."""
        machine, broker = self.workers[worker], self.broker
        stands = standing(machine.disk)
        if self.running(worker) or machine.disk.restoring() or stands is None or stands.session != NO_SESSION:
            return
        if broker.now_ms - stands.known_at_ms >= RETENTION_MS:
            return
        ahead = [entry for entry in broker.log if entry[0] >= stands.position]
        taken = ahead[:count]
        at_end = len(taken) == len(ahead)
        position = broker.end if at_end else taken[-1][0] + 1 if taken else stands.position
        known_at = broker.now_ms if at_end else taken[-1][1] if taken else stands.known_at_ms
        machine.disk.left = -1
        follow(
            machine.disk, [record for _, _, record in taken], position, known_at_ms=known_at, now_ms=broker.now_ms,
            tombstone_retention_ms=RETENTION_MS,
        )  # fmt: skip
        assert standing(machine.disk).position == position

    @rule(dirty=st.integers(0, 30))
    def compact(self, dirty: int) -> None:
        self.broker.compact(dirty)

    @rule(ms=st.sampled_from([1, 400, 1100]))
    def time_passes(self, ms: int) -> None:
        self.broker.now_ms += ms

    def teardown(self) -> None:
        if not hasattr(self, "workers"):
            return
        try:
            for worker in self.workers:
                worker.finish()
                self.check(worker.disk)
            fresh = Worker(self.broker, self.source)
            fresh.finish()
            self.check(fresh.disk)
        finally:
            self.clock.stop()

    def check(self, disk: Disk) -> None:
        """As after one clean pass; everything predicted was told, once."""
        clean, progress = self.source, disk.progress()
        assert held(disk) == clean.rows
        assert (progress.offset, progress.clock) == (clean.progress.offset, clean.progress.clock)
        rows = {user: row.tobytes() for user, row in disk.iterate()}
        events = sum(int.from_bytes(row[8:16], "little") for row in rows.values())
        assert (progress.users, progress.events) == (len(rows), events)
        assert rows == self.broker.rows()
        assert disk.own() == [(b"mstanding", standing(disk).encode())]
        told = np.frombuffer(b"".join(self.broker.told), np.dtype([("offset", "<i8"), ("logit", "<f4")]))
        order = np.argsort(told["offset"], kind="stable")
        assert told["offset"][order].tolist() == clean.events.offset.tolist()
        assert told["logit"][order].tobytes() == clean.logits.tobytes()


Takeovers.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestTakeovers = Takeovers.TestCase
