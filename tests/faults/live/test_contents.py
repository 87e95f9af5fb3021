"""Streams that are unusual and legal: one user with half of all events, a burst of new ones, repetitions, disorder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from state.snapshots.manifest import partition_name
from tests.faults.live.judge import Verdict, judged
from tests.faults.live.playing import START_MS, Sent, clicks, ends, event, send
from tests.faults.live.stage import Stage, staged
from tests.faults.live.workers import WorkerProcess, crew, end_gracefully, owners, until_owned, until_settled

PARTITIONS = 4
WINDOW = 2_000
"""Offsets within which an event's id counts once"""
OWNED_S, SETTLED_S = 60.0, 120.0
BURST = 100_000
EVENTS = "coldstream_events_total"


@dataclass
class Scene:
    """Two workers that run, and what the judge found so far."""

    stage: Stage
    workers: tuple[WorkerProcess, ...]
    last: Verdict

    def play(self, records: list[Sent]) -> tuple[float, Verdict, Verdict]:
        """Sends them, and has everything judged beside the workers: (seconds, verdict, the one before)."""
        send(self.stage.bootstrap, self.stage.topic, records)
        took = until_settled(self.workers, ends(self.stage.bootstrap, self.stage.topic), SETTLED_S)
        owner = owners(self.workers, PARTITIONS)
        assert owner is not None
        stores = {number: worker.state / partition_name(number) for number, worker in owner.items()}
        before, self.last = self.last, judged(self.stage.config, self.stage.model, stores)
        assert self.last.differences == []
        assert self.last.repeated == 0
        assert self.last.predictions == self.last.events
        assert self.last.events + self.last.duplicates == before.events + before.duplicates + len(records)
        return took, self.last, before


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, kafka_bootstrap: str) -> Iterator[Scene]:
    sections = {
        "data": {"events": {"event_id": {"field": "event_id"}}},
        "stream": {"duplicate_window": WINDOW},
        "state": {"commit_events": 4_000},
        "worker": {"fetch_kb": 256},
    }
    with staged(tmp_path_factory.mktemp("contents"), kafka_bootstrap, PARTITIONS, sections=sections) as stage:
        workers = (WorkerProcess(stage, "one"), WorkerProcess(stage, "other"))
        with crew(*workers):
            for worker in workers:
                worker.start()
            until_owned(workers, PARTITIONS, OWNED_S, members=2)
            yield Scene(stage, workers, Verdict())
            end_gracefully(workers)


def test_one_user_with_half_of_all_events(scene, seed, report):
    took, now, before = scene.play(list(islice(clicks(seed, 5_000, hot=0.5), 20_000)))
    report(f"hot user: half of {now.events - before.events:,} events are one user's; all applied {took:.1f} s later")


def test_events_out_of_order_in_time_are_applied_in_the_order_of_their_offsets(scene, seed, report):
    rng = np.random.default_rng(seed)
    times = START_MS + rng.permutation(4_000) * 1_000
    late = [event(f"u{k % 50}", f"i{k % 12}", k % 2, time) for k, time in enumerate(times.tolist())]
    _, now, before = scene.play(late)
    report(
        f"disorder: {now.events - before.events:,} events in a random order of their times, applied by their offsets"
    )


def test_what_a_producer_sends_again_within_the_window_counts_once(scene, seed, report):
    """Across a kill -9 of a worker too: whoever takes over has read the window again."""
    rng = np.random.default_rng(seed)
    events = [_named(k, f"id-{k}") for k in range(3_000)]
    soon = [events[k] for k in sorted({*rng.integers(2_700, 3_000, 200).tolist()})]
    nameless = [_named(k, None) for k in range(200)] * 2
    _, first, before = scene.play(events + soon + nameless)
    assert first.duplicates - before.duplicates == len(soon)
    told = sum(worker.metric(EVENTS, outcome="duplicate") for worker in scene.workers)
    assert told == len(soon)
    scene.workers[0].kill()
    scene.workers[0].start()
    _, second, first = scene.play(soon)
    assert second.duplicates - first.duplicates == len(soon), "repeated again, beside a kill"
    filling = [_named(k, None) for k in range(12 * WINDOW)]
    _, third, second = scene.play(filling + soon)
    assert third.duplicates == second.duplicates, "outside the window"
    report(
        f"duplicates: {third.duplicates - before.duplicates} dropped within {WINDOW:,} offsets, also beside a kill -9, "
        f"{len(soon)} counted again outside of them"
    )


def test_a_burst_of_new_users(scene, report):
    burst = [event(f"new-{k}", f"i{k % 12}", k % 2, START_MS + k) for k in range(BURST)]
    took, now, before = scene.play(burst)
    assert now.users - before.users == BURST
    report(f"burst: {BURST:,} new users, all applied {took:.1f} s after the last was sent")


def _named(number: int, name: str | None) -> Sent:
    return event(f"u{number % 300}", f"i{number % 12}", number % 2, START_MS + number, event_id=name)
