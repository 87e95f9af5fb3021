"""Brokers that end, are killed, or are away for long while a stream is played."""

from __future__ import annotations

import time

import pytest

from tests.faults.live.playing import Player, clicks, ends
from tests.faults.live.stage import staged
from tests.faults.live.workers import WorkerProcess, crew, until_owned, until_settled
from tests.kafka_broker import running_cluster

RATE = 500
USERS = 300
OWNED_S, SETTLED_S = 60.0, 180.0
OUTAGE_S = 60.0
IN_A_ROW = 5


@pytest.mark.parametrize("signal", ["TERM", "KILL"])
def test_brokers_that_end_once_and_five_times_cost_nothing(tmp_path, judge_all, soak, seed, report, signal):
    """In the long campaign there are three brokers, of which one after the other ends."""
    with running_cluster(tmp_path / "cluster", brokers=3 if soak else 1) as cluster:
        with staged(tmp_path, cluster.bootstrap, 4) as stage:
            workers = (WorkerProcess(stage, "static", static=True), WorkerProcess(stage, "dynamic"))
            with crew(*workers):
                with Player(stage.bootstrap, stage.topic, clicks(seed, USERS), RATE) as player:
                    for worker in workers:
                        worker.start()
                    until_owned(workers, 4, OWNED_S, members=2)
                    cluster.kill(cluster.nodes[0], signal)
                    cluster.restart(cluster.nodes[0])
                    until_owned(workers, 4, OWNED_S, members=2)
                    for number in range(IN_A_ROW):
                        node = cluster.nodes[number % len(cluster.nodes)]
                        cluster.kill(node, signal)
                        cluster.restart(node)
                until = ends(stage.bootstrap, stage.topic)
                took = until_settled(workers, until, SETTLED_S)
                verdict = judge_all(stage, workers)
    assert verdict.predictions == verdict.events == sum(until.values())
    assert verdict.repeated == 0
    report(
        f"brokers: SIG{signal} once and {IN_A_ROW} times in a row: all of {verdict.events:,} events as in one pass, "
        f"settled {took:.1f} s after the last ({player.given_up.total()} events of {player.sent:,} that the producer "
        f"gave up); seed {seed}"
    )


def test_an_outage_of_a_minute_is_waited_for(tmp_path, judge_all, soak, seed, report):
    if not soak:
        pytest.skip("takes minutes: make soak")
    with running_cluster(tmp_path / "cluster") as cluster, staged(tmp_path, cluster.bootstrap, 4) as stage:
        workers = (WorkerProcess(stage, "static", static=True), WorkerProcess(stage, "dynamic"))
        with crew(*workers):
            with Player(stage.bootstrap, stage.topic, clicks(seed, USERS), RATE) as player:
                for worker in workers:
                    worker.start()
                until_owned(workers, 4, OWNED_S, members=2)
                cluster.kill(cluster.nodes[0])
                time.sleep(OUTAGE_S)
                cluster.restart(cluster.nodes[0])
                until_owned(workers, 4, OWNED_S, members=2)
            until = ends(stage.bootstrap, stage.topic)
            took = until_settled(workers, until, SETTLED_S)
            verdict = judge_all(stage, workers)
    assert verdict.predictions == verdict.events == sum(until.values())
    assert verdict.repeated == 0
    report(
        f"outage of {OUTAGE_S:g} s: all of {verdict.events:,} events as in one pass, settled {took:.1f} s after the "
        f"producer's end ({player.given_up.total()} events that it gave up)"
    )
