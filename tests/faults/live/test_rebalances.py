"""Workers that come, go, fall silent and lose their disks while a stream is played."""

from __future__ import annotations

import shutil
import time

import numpy as np

from tests.faults.live.playing import Player, clicks, ends
from tests.faults.live.stage import SESSION_TIMEOUT_MS, staged
from tests.faults.live.workers import WorkerProcess, crew, until_owned, until_settled, wait_until

MOVES, MOVES_SOAK = 10, 50
SILENCES, SILENCES_SOAK = 2, 20
RATE = 1_000
USERS = 600
OWNED_S, SETTLED_S = 60.0, 90.0
FENCED = "coldstream_fenced_total"


def test_workers_that_join_and_leave_hand_partitions_over_whole(
    tmp_path, kafka_bootstrap, judge_all, soak, seed, report
):
    rng = np.random.default_rng(seed)
    took: list[float] = []
    with staged(tmp_path, kafka_bootstrap, 12) as stage:
        workers = tuple(WorkerProcess(stage, name) for name in ("a", "b", "c"))
        with crew(*workers):
            with Player(stage.bootstrap, stage.topic, clicks(seed, USERS), RATE) as player:
                workers[0].start()
                until_owned(workers, 12, OWNED_S)
                for _ in range(MOVES_SOAK if soak else MOVES):
                    there = [worker for worker in workers if worker.running]
                    away = [worker for worker in workers if not worker.running]
                    if away and (len(there) == 1 or rng.random() < 0.5):
                        away[int(rng.integers(len(away)))].start()
                    else:
                        leaving = there[int(rng.integers(len(there)))]
                        leaving.term()
                        assert leaving.wait() == 0
                    count = sum(worker.running for worker in workers)
                    took.append(until_owned(workers, 12, OWNED_S, members=count))
            until = ends(stage.bootstrap, stage.topic)
            until_settled(workers, until, SETTLED_S)
            verdict = judge_all(stage, workers)
    assert not player.given_up
    assert verdict.predictions == verdict.events == player.sent
    assert verdict.repeated == 0
    report(
        f"joins and leaves: {len(took)} of three workers on twelve partitions, all owned again {max(took):.1f} s later "
        f"at most (a joining worker's start included); all of {verdict.events:,} events as in one pass; seed {seed}"
    )


def test_a_worker_that_wakes_up_after_its_session_writes_nothing_that_counts(
    tmp_path, kafka_bootstrap, judge_all, soak, seed, report
):
    took: list[float] = []
    fenced = 0.0
    with staged(tmp_path, kafka_bootstrap, 4) as stage:
        workers = (WorkerProcess(stage, "sleeper", static=True), WorkerProcess(stage, "dynamic sleeper"))
        with crew(*workers):
            with Player(stage.bootstrap, stage.topic, clicks(seed, USERS), RATE) as player:
                for worker in workers:
                    worker.start()
                until_owned(workers, 4, OWNED_S, members=2)
                for number in range(SILENCES_SOAK if soak else SILENCES):
                    sleeper, awake = workers[number % 2], workers[1 - number % 2]
                    sleeper.freeze()
                    took.append(until_owned((awake,), 4, OWNED_S))
                    sleeper.thaw()
                    until_owned(workers, 4, OWNED_S, members=2)
            until = ends(stage.bootstrap, stage.topic)
            until_settled(workers, until, SETTLED_S)
            fenced = sum(worker.metric(FENCED) for worker in workers)
            verdict = judge_all(stage, workers)
    assert verdict.predictions == verdict.events == player.sent
    assert verdict.repeated == 0
    report(
        f"silent workers: {len(took)} times SIGSTOP until the other had taken over ({max(took):.1f} s at most, session "
        f"timeout {SESSION_TIMEOUT_MS / 1000:g} s), then SIGCONT; partitions found fenced: {fenced:.0f}; all of "
        f"{verdict.events:,} events as in one pass"
    )


def test_a_worker_whose_disk_is_empty_restores_its_partitions_from_the_changelog(
    tmp_path, kafka_bootstrap, judge_all, seed, report
):
    with staged(tmp_path, kafka_bootstrap, 4) as stage:
        workers = (WorkerProcess(stage, "wiped", static=True), WorkerProcess(stage, "whole"))
        wiped = workers[0]
        with crew(*workers):
            with Player(stage.bootstrap, stage.topic, clicks(seed, USERS), RATE) as player:
                for worker in workers:
                    worker.start()
                until_owned(workers, 4, OWNED_S, members=2)
                wait_until(lambda: wiped.metric("coldstream_changelog_rows_total") > 3 * USERS, OWNED_S, "rows told")
                wiped.kill()
                shutil.rmtree(wiped.state)
                began = time.monotonic()
                wiped.start()
                until_owned(workers, 4, OWNED_S, members=2)
                took = time.monotonic() - began
                restored = [told["restored"] for told in wiped.partitions().values()]
                assert min(restored) > 0, restored
            until = ends(stage.bootstrap, stage.topic)
            until_settled(workers, until, SETTLED_S)
            verdict = judge_all(stage, workers)
    assert verdict.predictions == verdict.events == player.sent
    assert verdict.repeated == 0
    report(
        f"empty disk: {len(restored)} partitions, restored from {sum(restored):,} records, run {took:.1f} s after the "
        f"start; all of {verdict.events:,} events as in one pass"
    )
