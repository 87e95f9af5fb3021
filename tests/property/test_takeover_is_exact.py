"""However workers die, come back and take over from each other: the log tells every event once, and all stores agree.

The log is a simulated one: transactions all or nothing, fencing by epoch, compaction, tombstones that vanish in time.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.user_state import RowLayout
from state.changelog import Record
from state.exceptions import StoreWriteFailed
from state.expiry import idle_up_to
from state.keys import STANDING_KEY, USER
from state.memory_store import MemoryUserStore
from state.outbox import Outbox, records, standing
from state.outbox_codec import NO_SESSION, SESSION_BYTES
from state.takeover import Apply, Local, Log, Plan, Rebuild, Resend, bring_together, decide, follow
from streams.processor import Processor
from tests.models import random_stream, small_model
from tests.property.test_expiry import AFTER_MS, DAY_MS, made

LAYOUT = RowLayout("gradient", 5, 4, 2)
RETENTION_MS = 1000
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


class SeldomSwept(Processor):
    """Sweeps only when it is told to, so that workers differ in whom they still have."""

    def sweep(self, partition: int, rows: int = 0) -> int:
        return super().sweep(partition, rows) if rows else 0


class Stream:
    """What is to be learned, and what one clean pass makes of it."""

    def __init__(self, events: Interactions, days: float | None) -> None:
        self.events, self.days = events, days
        self.step = max(len(events) // 6, 2)
        self.through = int(events.offset[-1]) + 3
        with self.processor(Processor, MemoryUserStore(LAYOUT), 64, None) as work:
            said = work.process(0, events, through=self.through)
            self.logits = said.logit
            self.progress = work.store(0).progress()
            self.rows = held(work.store(0))
            assert (work.counts.users_swept > 30) == (days is not None)

    def processor(
        self, made: type[Processor], store: MemoryUserStore, commit_events: int, outbox: Outbox | None
    ) -> Processor:
        state = StateSettings(commit_events=commit_events, ring=2, expire_after_days=self.days, hot_rows_mb=1)
        work = made(MODEL, lambda *_: store, state, log=None if outbox is None else lambda *_: outbox)
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
    crowd = made(7, [(4000, AFTER_MS // 600, 0)], 0.0, False, True)
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
        self.disk = self.earlier = Disk(LAYOUT)
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

    def take_over(self, commit_events: int, dies_after: int | None = None, made: type[Processor] = SeldomSwept) -> Plan:
        self.kill()
        self.epoch, self.session = self.broker.fence(), secrets.token_bytes(SESSION_BYTES)
        plan = self.joined(self.session, dies_after)
        self.outbox = Outbox(self.disk, self.session)
        self.work = self.source.processor(made, self.disk, commit_events, self.outbox)
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


class Partition:
    """Three workers on one partition, and what befalls them. Each method is one thing that may happen."""

    def __init__(self, source: Stream, rng: np.random.Generator) -> None:
        self.source, self.rng = source, rng
        self.broker = Broker()
        self.workers = [Worker(self.broker, source) for _ in range(3)]
        self.snapshots: list[Disk] = []
        self.plans: list[Plan] = []

    def below(self, limit: int) -> int:
        return int(self.rng.integers(limit))

    def dies_after(self) -> int | None:
        return self.below(20) if self.below(4) == 0 else None

    # --- a machine without a process

    def take_over(self, machine: Worker) -> None:
        """Its own partition after a kill, or that of another who may not know it yet."""
        try:
            self.plans.append(
                machine.take_over(
                    1 + self.below(self.source.step), self.dies_after(), (Processor, SeldomSwept)[self.below(2)]
                )
            )
        except (Killed, StoreWriteFailed):
            machine.kill()

    def follow(self, machine: Worker) -> None:
        """Begins to, or applies some more of the log, wherever the batch ends."""
        broker, stands, machine.disk.left = self.broker, standing(machine.disk), -1
        away = stands is None or stands.session != NO_SESSION or broker.now_ms - stands.known_at_ms >= RETENTION_MS
        if away or machine.disk.restoring():
            with suppress(Killed):
                machine.joined(NO_SESSION, self.dies_after())
            return
        ahead = [entry for entry in broker.log if entry[0] >= stands.position]
        taken = ahead[: self.below(12)]
        position, known_at = stands.position, stands.known_at_ms
        if len(taken) == len(ahead):
            position, known_at = broker.end, broker.now_ms
        elif taken:
            position, known_at = taken[-1][0] + 1, taken[-1][1]
        follow(
            machine.disk, [record for _, _, record in taken], position, known_at_ms=known_at, now_ms=broker.now_ms,
            tombstone_retention_ms=RETENTION_MS,
        )  # fmt: skip
        assert standing(machine.disk).position == position

    def wipe(self, machine: Worker) -> None:
        machine.disk = Disk(LAYOUT)

    def put_a_snapshot_back(self, machine: Worker) -> None:
        """Of any worker's disk."""
        if self.snapshots:
            machine.disk = self.snapshots[self.below(len(self.snapshots))].copied()

    def lose_power(self, machine: Worker) -> None:
        """What the disk had at an earlier time is left, maybe of the very session that ends here."""
        machine.disk = machine.earlier.copied()

    # --- a machine with one, the owner or a zombie

    def process(self, machine: Worker) -> None:
        """A refused write is tried again."""
        count = self.below(self.source.step)
        try:
            machine.process(count)
        except StoreWriteFailed:
            machine.process(count)

    def publish(self, machine: Worker) -> None:
        try:
            machine.publish(1 + self.below(4000))
        except Fenced:
            machine.kill()

    def publish_and_die(self, machine: Worker) -> None:
        """Between the end of the transaction and its acknowledgement."""
        with suppress(Fenced):
            machine.publish(1 + self.below(4000), acknowledge=False)
        machine.kill()

    def sweep(self, machine: Worker) -> None:
        try:
            machine.work.sweep(0, 5)
        except StoreWriteFailed:
            machine.kill()

    def kill(self, machine: Worker) -> None:
        machine.kill()

    def close_cleanly(self, machine: Worker) -> None:
        with suppress(Fenced, StoreWriteFailed):
            while machine.publish(2000):
                pass
            machine.outbox.trim()
        machine.kill()

    # --- any

    def a_later_write_fails(self, machine: Worker) -> None:
        machine.disk.left, machine.disk.durable = self.below(4), bool(self.below(2))

    def take_snapshot(self, machine: Worker) -> None:
        machine.earlier = machine.disk.copied()
        self.snapshots.append(machine.earlier)

    def time_passes(self, _: Worker) -> None:
        self.broker.now_ms += (1, 400, 1100)[self.below(3)]

    def compact(self, _: Worker) -> None:
        self.broker.compact(self.below(30) * self.below(2))

    def step(self) -> None:
        """One thing happens to one of them."""
        machine = self.workers[self.below(3)]
        own = RUNNING if machine.work is not None else IDLE
        choices = [action for action, weight in (own | ANY).items() for _ in range(weight)]
        choices[self.below(len(choices))](self, machine)


IDLE = {
    Partition.take_over: 12,
    Partition.follow: 12,
    Partition.wipe: 1,
    Partition.put_a_snapshot_back: 2,
    Partition.lose_power: 4,
}
RUNNING = {
    Partition.process: 16, Partition.publish: 10, Partition.publish_and_die: 3, Partition.sweep: 2, Partition.kill: 3,
    Partition.close_cleanly: 2,
}  # fmt: skip
ANY = {
    Partition.a_later_write_fails: 1, Partition.take_snapshot: 4, Partition.time_passes: 3, Partition.compact: 4,
}  # fmt: skip
"""What may happen, and how often beside the others"""


def check(disk: Disk, broker: Broker, clean: Stream) -> None:
    """The store is as after one clean pass and as the log says; everything predicted was told, once."""
    progress = disk.progress()
    assert held(disk) == clean.rows
    assert (progress.offset, progress.clock) == (clean.progress.offset, clean.progress.clock)
    rows = {user: row.tobytes() for user, row in disk.iterate()}
    events = sum(int.from_bytes(row[8:16], "little") for row in rows.values())
    assert (progress.users, progress.events) == (len(rows), events)
    assert rows == broker.rows()
    assert disk.own() == [(STANDING_KEY, standing(disk).encode())]
    told = np.frombuffer(b"".join(broker.told), np.dtype([("offset", "<i8"), ("logit", "<f4")]))
    order = np.argsort(told["offset"], kind="stable")
    assert told["offset"][order].tolist() == clean.events.offset.tolist()
    assert told["logit"][order].tobytes() == clean.logits.tobytes()


def run(source: Stream, seed: int) -> list[Plan]:
    """Lets 80 things happen, then every worker, and a new one, takes over and ends the stream; returns the plans."""
    partition = Partition(source, np.random.default_rng(seed))
    with patch("state.outbox._now_ms", lambda: partition.broker.now_ms):
        for _ in range(80):
            partition.step()
        for worker in [*partition.workers, Worker(partition.broker, source)]:
            worker.finish()
            check(worker.disk, partition.broker, source)
    return partition.plans


def kind(plan: Plan) -> str:
    """What tells plans apart."""
    match plan:
        case Resend(told, untold):
            return f"resend, {'some' if told else 'nothing'} told, {'some' if untold else 'nothing'} untold"
        case Apply(_, left):
            return f"apply, {'some' if left else 'nothing'} given up"
        case Rebuild(reason):
            return re.sub(r"\d+", "#", f"rebuild, {reason}")


@pytest.mark.parametrize("expiring", [False, True])
def test_whatever_happens_the_log_and_all_stores_end_as_after_one_clean_pass(expiring, soak, seed, report):
    runs = range(10_000 * seed, 10_000 * seed + (3000 if soak else 60))
    plans = Counter(kind(plan) for one in runs for plan in run(stream(expiring), one))
    report(f"takeovers{' with expiry' if expiring else ''}: {sum(plans.values())}, of {len(plans)} kinds")
    assert set(plans) == {
        "resend, nothing told, nothing untold",
        "resend, nothing told, some untold",
        "resend, some told, nothing untold",
        "resend, some told, some untold",
        "apply, nothing given up",
        "apply, some given up",
        "rebuild, it has no rows",
        "rebuild, it was never kept with a changelog",
        "rebuild, it is older than the tombstones that its changelog keeps",
        "rebuild, it is at offset #, which was never told, and its changelog goes on from before",
    }
