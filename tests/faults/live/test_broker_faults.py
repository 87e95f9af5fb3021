"""Brokers that end, are killed, or are away for long while a stream is played."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import pytest

from deploy.kafka.cluster import Cluster
from tests.faults.live.conftest import Judge
from tests.faults.live.judge import Verdict
from tests.faults.live.playing import Player, clicks, ends
from tests.faults.live.stage import Stage, staged
from tests.faults.live.workers import WorkerProcess, crew, until_owned, until_settled
from tests.kafka_broker import running_cluster

RATE = 500
USERS = 300
OWNED_S, SETTLED_S = 60.0, 180.0
OUTAGE_S = 60.0
IN_A_ROW = 5
SIGNALS = ("TERM", "KILL")

Workers = tuple[WorkerProcess, ...]


@contextmanager
def playing(directory: Path, seed: int, *, brokers: int = 1) -> Iterator[tuple[Cluster, Stage, Workers, Player]]:
    """A cluster of its own, two workers on four partitions that run, and a stream that is played to them."""
    with (
        running_cluster(directory / "cluster", brokers=brokers) as cluster,
        staged(directory, cluster.bootstrap, 4) as stage,
    ):
        workers = (WorkerProcess(stage, "static", static=True), WorkerProcess(stage, "dynamic"))
        with crew(*workers), Player(stage.bootstrap, stage.topic, clicks(seed, USERS), RATE) as player:
            for worker in workers:
                worker.start()
            until_owned(workers, 4, OWNED_S, members=2)
            yield cluster, stage, workers, player


def test_brokers_that_end_once_and_five_times_cost_nothing(tmp_path, judge_all, soak, seed, report):
    """SIGTERM and SIGKILL once each, then five times in a row: in turns, or in the long campaign five times each.

    There are three brokers in the long campaign, of which one after the other ends.
    """
    with playing(tmp_path, seed, brokers=3 if soak else 1) as (cluster, stage, workers, player):
        for signal in SIGNALS:
            cluster.kill(cluster.nodes[0], signal)
            cluster.restart(cluster.nodes[0])
            until_owned(workers, 4, OWNED_S, members=2)
        row = (
            [signal for signal in SIGNALS for _ in range(IN_A_ROW)] if soak else list(islice(cycle(SIGNALS), IN_A_ROW))
        )
        for number, signal in enumerate(row):
            node = cluster.nodes[number % len(cluster.nodes)]
            cluster.kill(node, signal)
            cluster.restart(node)
        verdict, took = _judged(stage, workers, player, judge_all)
    report(
        f"brokers: {len(cluster.nodes)}, ended by SIGTERM and SIGKILL once and {len(row)} times in a row: all of "
        f"{verdict.events:,} events as in one pass, settled {took:.1f} s after the stream's end "
        f"({player.given_up.total()} events of {player.sent:,} that the producer gave up); seed {seed}"
    )


def test_an_outage_of_a_minute_is_waited_for(tmp_path, judge_all, soak, seed, report):
    if not soak:
        pytest.skip("takes minutes: make soak")
    with playing(tmp_path, seed) as (cluster, stage, workers, player):
        cluster.kill(cluster.nodes[0])
        time.sleep(OUTAGE_S)
        cluster.restart(cluster.nodes[0])
        until_owned(workers, 4, OWNED_S, members=2)
        verdict, took = _judged(stage, workers, player, judge_all)
    report(
        f"outage of {OUTAGE_S:g} s: all of {verdict.events:,} events as in one pass, settled {took:.1f} s after the "
        f"stream's end ({player.given_up.total()} events of {player.sent:,} that the producer gave up)"
    )


def _judged(stage: Stage, workers: Workers, player: Player, judge_all: Judge) -> tuple[Verdict, float]:
    player.stop()
    until = ends(stage.bootstrap, stage.topic)
    took = until_settled(workers, until, SETTLED_S)
    verdict = judge_all(stage, workers)
    assert verdict.predictions == verdict.events == sum(until.values())
    assert verdict.repeated == 0
    return verdict, took
