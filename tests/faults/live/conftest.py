"""What live campaigns share: one stage for each test, on the session's broker."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from state.snapshots.manifest import partition_name
from tests.faults.live.judge import Verdict, judged
from tests.faults.live.stage import Stage
from tests.faults.live.workers import WorkerProcess, end_gracefully, owners

Judge = Callable[[Stage, tuple[WorkerProcess, ...]], Verdict]


@pytest.fixture
def judge_all() -> Judge:
    """Ends the workers, and has the judge look at what each partition's last owner left."""

    def look(stage: Stage, workers: tuple[WorkerProcess, ...]) -> Verdict:
        owner = owners(workers, stage.partitions)
        assert owner is not None, "a partition has no owner"
        end_gracefully(workers)
        stores = {number: worker.state / partition_name(number) for number, worker in owner.items()}
        verdict = judged(stage.config, stage.model, stores)
        assert verdict.differences == [], json.dumps(verdict.differences, indent=1)
        return verdict

    return look
