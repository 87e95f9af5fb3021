"""Rounds over partitions that lag, repeat themselves and crash: each event counts once, and no crash shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from state.changelog import Record
from state.lineage import Span
from streams.meta.aggregator import Aggregator, Round
from streams.meta.contributor import Findings
from streams.meta.messages import Contribution, records
from streams.meta.replica import Replica
from streams.meta.reporting import Reporter
from tests.unit.test_meta_aggregator import (
    assert_follows,
    assert_same_tensors,
    compacted,
    gradient,
    recovered,
    replica,
    rises,
    scores,
)
from tests.unit.test_meta_aggregator import settings as meta_settings

RESEND_S, STEP_S = 40.0, 10.0
EVERY = 8


@dataclass
class Worker:
    """One partition: its events, what it sends, and how far it has read ``meta-versions``."""

    partition: int
    partitions: int
    follower: Replica = field(init=False)
    reporter: Reporter = field(init=False)
    applied: int = 0
    """Events so far; offsets are 0 to applied − 1"""
    read: int = 0
    told_anchors: bool = False
    on_its_way: deque[Record] = field(default_factory=deque)

    def start(self, log: Sequence[Record]) -> None:
        """As a worker that takes the partition over: it knows its store and the log alone."""
        self.follower, self.read, self.told_anchors = replica(log), len(log), False
        self.reporter = Reporter(
            self.partition, self.partitions, EVERY, self.follower.consumed, resend_s=RESEND_S
        )  # fmt: skip
        self.reporter.observed(self.applied - 1, self.applied - 1 - self.reporter.consumed)

    def apply(self, events: int) -> None:
        self.applied += events
        self.reporter.observed(self.applied - 1, events)

    def follow(self, log: Sequence[Record]) -> None:
        for marker in self.follower.follow(log[self.read :]):
            if self.reporter.marker(marker.consumed).outcome == "over":
                self.told_anchors = True
        self.read = len(log)

    def report(self, now_s: float) -> None:
        span = self.reporter.due(now_s)
        if span is None or self.follower.marker is None:
            return
        self.on_its_way += records(self._made(span))
        self.reporter.sent(span, now_s)

    def _made(self, span: Span) -> Contribution:
        follower, p = self.follower, self.partition
        marker = follower.marker
        assert marker is not None
        findings = []
        for stage, model in follower.open_versions:
            number = model.meta_version
            rise = 0.4 if number % 5 == 3 else -0.01
            on_anchors = scores(number, p, rise) if stage == "shadow" else None
            findings.append(Findings(number, on_anchors, rises(rise)))
        summed = None
        if follower.task is not None:
            summed = gradient(follower, 1000 * marker.sequence + p, new=marker.sequence % 2 == 1)
        current = scores(follower.current.meta_version, p)
        base = None if self.told_anchors else scores(0, p)
        return Contribution(
            marker.sequence, follower.head, span, span.last - span.first + 1, summed, tuple(findings), current, base
        )


class World:
    """The two topics, the aggregator and the workers. What was committed is there, what was not never was."""

    def __init__(self, partitions: int) -> None:
        self.log: list[Record] = []
        self.gradients: list[Record] = []
        self.position = 0
        self.now_s = 0.0
        self.rounds: list[list[Contribution]] = []
        self.settings = meta_settings(events=EVERY)
        self.workers = [Worker(p, partitions) for p in range(partitions)]
        self.restart()
        self.commit(self.aggregator.begin())
        for worker in self.workers:
            worker.start(self.log)

    def restart(self) -> None:
        """Another aggregator, from the log; it reads on where the last transaction says."""
        self.aggregator: Aggregator = recovered(self.log, self.settings)
        self.next = self.position

    def commit(self, made: Round | None) -> None:
        assert made is not None
        self.log += made.versions
        if made.position is not None:
            self.position = made.position

    def deliver(self, p: int, count: int) -> None:
        way = self.workers[p].on_its_way
        for _ in range(min(count, len(way))):
            self.gradients.append(way.popleft())

    def repeat(self, p: int) -> None:
        """A record of the partition, once more: its producer tried again, or a zombie comes back late."""
        mine = [record for record in self.gradients if record.key == b"%d" % p]
        if mine:
            self.workers[p].on_its_way.append(mine[-1 - len(mine) // 2])

    def aggregate(self, crash: str = "") -> None:
        """Reads all that was delivered; a round if it is due, with a crash at one of its points."""
        for offset in range(self.next, len(self.gradients)):
            key, value = self.gradients[offset]
            self.aggregator.receive(offset, key, value, self.now_s)
        self.next = len(self.gradients)
        if not self.aggregator.due(self.now_s):
            return
        accepted = [each.contribution for each in self.aggregator._waiting.values()]
        made = self.aggregator.round()
        if crash == "before publish":
            self.restart()
            return
        self.commit(made)
        self.rounds.append(accepted)
        if crash == "after publish":
            self.restart()

    def drain(self) -> None:
        """Until every event has been consumed."""
        for worker in self.workers:
            worker.apply(EVERY)  # so that the last ones are enough to be reported
        for _ in range(60):
            if all(self.aggregator.consumed.get(w.partition, -1) == w.applied - 1 for w in self.workers):
                return
            self.now_s += STEP_S
            for worker in self.workers:
                worker.follow(self.log)
                worker.report(self.now_s)
                self.deliver(worker.partition, 9)
            self.aggregate()
        raise AssertionError("spans are left over")


moves = st.lists(
    st.one_of(
        st.tuples(st.just("events"), st.integers(0, 3), st.integers(1, 5)),
        st.tuples(st.just("report"), st.integers(0, 3)),
        st.tuples(st.just("deliver"), st.integers(0, 3), st.integers(1, 2)),
        st.tuples(st.just("repeat"), st.integers(0, 3)),
        st.tuples(st.just("follow"), st.integers(0, 3)),
        st.tuples(st.just("restart"), st.integers(0, 3)),
        st.tuples(st.just("aggregate"), st.sampled_from(["", "", "before publish", "after publish"])),
        st.tuples(st.just("crash")),
        st.tuples(st.just("time")),
        st.tuples(st.just("everybody"), st.sampled_from(["", "", "before publish", "after publish"])),
    ),
    min_size=8, max_size=40,
)  # fmt: skip


def play(world: World, steps: Sequence[tuple]) -> None:
    for what, *how in steps:
        worker = world.workers[how[0] % len(world.workers)] if how and isinstance(how[0], int) else world.workers[0]
        match what:
            case "events":
                worker.apply(how[1])
            case "report":
                worker.report(world.now_s)
            case "deliver":
                world.deliver(worker.partition, how[1])
            case "repeat":
                world.repeat(worker.partition)
            case "follow":
                worker.follow(world.log)
            case "restart":
                worker.start(world.log)
            case "aggregate":
                world.aggregate(how[0])
            case "crash":
                world.restart()
            case "time":
                world.now_s += STEP_S
            case "everybody":
                for each in world.workers:
                    each.apply(EVERY)
                    each.follow(world.log)
                    each.report(world.now_s)
                    world.deliver(each.partition, 9)
                world.aggregate(how[0])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(partitions=st.integers(2, 4), steps=moves, cut=st.integers(0, 1 << 16))
def test_each_event_counts_once_and_crashes_leave_no_trace(partitions, steps, cut):
    world = World(partitions)
    play(world, steps)
    world.drain()
    # spans: each partition's follow one another from its first event to its last
    for worker in world.workers:
        spans = [c.span for round_ in world.rounds for c in round_ if c.partition == worker.partition]
        firsts = [0, *(span.last + 1 for span in spans)]
        assert [span.first for span in spans] == firsts[:-1]
        assert firsts[-1] == worker.applied
    assert world.aggregator.events == sum(worker.applied for worker in world.workers)
    versions = world.aggregator.versions
    assert [version.number for version in versions] == list(range(len(versions)))
    # the same rounds without a crash
    other = recovered((), world.settings)
    other.begin()
    for round_ in world.rounds:
        for each in round_:
            assert other.take(replace(each), 0.0) is None
        other.round()
    assert_same_tensors(world.aggregator.line.model.tensors(), other.line.model.tensors())
    assert world.aggregator.line.model.item_ids == other.line.model.item_ids
    assert world.aggregator.line.head == other.line.head
    assert [v.decisions for v in versions] == [v.decisions for v in other.versions]
    # whoever reads the log, however compacted, is where the aggregator is
    for worker in world.workers:
        worker.follow(world.log)
        assert_follows(worker.follower, world.aggregator)
    place = cut % (len(world.log) + 1)
    assert_follows(replica(compacted(world.log[:place]) + world.log[place:]), world.aggregator)


def test_many_rounds_reach_every_stage_and_every_refusal():
    world = World(3)
    for k in range(16):
        steps = [("time",), ("everybody", ("", "before publish", "after publish", "")[k % 4]), ("repeat", k)]
        if k % 3 == 1:  # one comes too late for the round, and one starts anew
            steps += [("follow", 0), ("events", 0, EVERY), ("report", 0)]
            for p in (1, 2):
                steps += [("follow", p), ("events", p, EVERY), ("report", p), ("deliver", p, 9)]
            steps += [("aggregate", ""), ("deliver", 0, 9), ("aggregate", ""), ("restart", 1)]
        play(world, steps)
    world.drain()
    stages = {version.stage for version in world.aggregator.versions}
    assert {"initial", "promoted", "rejected"} <= stages
    assert {"span", "version"} <= set(world.aggregator.line.refused)
    assert len(world.aggregator.versions) > 8
    assert world.aggregator.line.model.item_ids[12:]
    for worker in world.workers:
        worker.follow(world.log)
        assert_follows(worker.follower, world.aggregator)
    np.testing.assert_equal(world.aggregator.line.state().matrix.versions[0], 0)
