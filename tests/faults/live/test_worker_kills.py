"""Two workers on four partitions that die again and again while a stream is played: no event is lost or doubled."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter

import numpy as np

from tests.faults.live.playing import Player, clicks, ends
from tests.faults.live.points import POINTS
from tests.faults.live.stage import staged
from tests.faults.live.workers import WorkerProcess, crew, until_settled, wait_until

KILLS, KILLS_SOAK = 20, 500
RATE = 1_500
USERS = 400
ANY_TIME = "any time"
START_S = 60.0
PATIENCE_S = 12.0
"""A worker that has not come to its point so long after its partitions were open is killed where it is"""
ANY_TIME_S = 4.0
SETTLED_S = 90.0
LETTERS = {"before letters are sent", "after letters are sent"}
"""Points that a stream without poison never comes to"""
CHOSEN = [ANY_TIME, *(point for point in POINTS if point not in LETTERS)]


class Victims:
    """Starts workers with a point at which they die, and starts them again when they have."""

    def __init__(self, workers: tuple[WorkerProcess, ...], seed: int) -> None:
        self.died: Counter[str] = Counter()
        self._rng = np.random.default_rng(seed)
        self._workers = workers
        self._point: dict[str, str] = {}
        self._until: dict[str, float] = {}
        """When whoever has not died by then is killed"""
        for worker in workers:
            self._start(worker)

    def look(self) -> None:
        """Kills whoever is due, and starts anew whoever has died."""
        for worker in self._workers:
            name, now = worker.name, time.monotonic()
            if worker.running and self._until[name] == math.inf and _works(worker):
                self._until[name] = now + (float(self._rng.uniform(0, ANY_TIME_S)) if self._any(name) else PATIENCE_S)
            if worker.running and now > self._until[name]:
                worker.kill()
                self._point[name] = ANY_TIME
            if not worker.running:
                assert worker.status == -signal.SIGKILL, f"{name} ended by itself, with {worker.status}"
                self.died[self._point[name]] += 1
                self._start(worker)

    def died_enough(self, kills: int) -> bool:
        """So often, and at every point."""
        return self.died.total() >= kills and self.died.keys() == set(CHOSEN)

    def spare(self) -> None:
        """Every worker starts without a point."""
        for worker in self._workers:
            worker.kill()
            worker.start()

    def _any(self, name: str) -> bool:
        return self._point[name] == ANY_TIME

    def _start(self, worker: WorkerProcess) -> None:
        under_way = Counter(self._point[other.name] for other in self._workers if other.name in self._point)
        point = min(CHOSEN, key=lambda name: (self.died[name] + under_way[name], self._rng.random()))
        self._point[worker.name], self._until[worker.name] = point, math.inf
        if point == ANY_TIME:
            worker.start()
        else:
            worker.start(point, int(self._rng.integers(1, POINTS[point][-1] + 1)))


def _works(worker: WorkerProcess) -> bool:
    return any(told["state"] == "running" for told in worker.partitions().values())


def test_what_killed_workers_leave_is_what_one_pass_leaves(tmp_path, kafka_bootstrap, judge_all, soak, seed, report):
    kills = KILLS_SOAK if soak else KILLS
    with staged(tmp_path, kafka_bootstrap, 4) as stage:
        workers = (WorkerProcess(stage, "static", static=True), WorkerProcess(stage, "dynamic"))
        with crew(*workers):
            with Player(stage.bootstrap, stage.topic, clicks(seed, USERS), RATE) as player:
                victims = Victims(workers, seed)
                wait_until(lambda: victims.look() or victims.died_enough(kills), kills * START_S, lambda: victims.died)
                victims.spare()
            until = ends(stage.bootstrap, stage.topic)
            took = until_settled(workers, until, SETTLED_S)
            verdict = judge_all(stage, workers)
    assert not player.given_up
    assert verdict.events == player.sent == sum(until.values())
    assert verdict.predictions == verdict.events
    assert verdict.repeated == 0
    points = ", ".join(f"{n} {point}" for point, n in sorted(victims.died.items()))
    report(
        f"live kills: {victims.died.total()} of two workers on four partitions ({points}): rows, ledgers, changelog "
        f"and {verdict.predictions:,} predictions of {verdict.events:,} events and {verdict.users} users are those of "
        f"one pass, {verdict.repeated} predictions twice; settled {took:.1f} s after the last start; seed {seed}"
    )
