"""The worker as its users run it: a command, on a real broker. Faults are in ``tests/faults/live``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from state.snapshots.manifest import partition_name
from streams.kafka.partitioning import partition_of
from streams.live.metrics import REBALANCES
from tests.faults.live.judge import judged
from tests.faults.live.playing import START_MS, Sent, committed_records, ends, event, send
from tests.faults.live.stage import Stage, staged
from tests.faults.live.workers import (
    WorkerProcess,
    crew,
    end_gracefully,
    owners,
    until_owned,
    until_settled,
    wait_until,
)
from tests.kafka_broker import create_topic, delete_topics

USERS, EVENTS = 40, 2_000
OWNED_S, SETTLED_S = 60.0, 60.0


def clicks(seed: int, events: int = EVENTS) -> list[Sent]:
    rng = np.random.default_rng(seed)
    return [
        event(f"u{u}", f"i{i}", y, START_MS + 1000 * k)
        for k, (u, i, y) in enumerate(
            zip(
                rng.integers(0, USERS, events).tolist(),
                rng.integers(0, 15, events).tolist(),
                rng.integers(0, 2, events).tolist(),
                strict=True,
            )
        )
    ]


def judge(stage: Stage, workers: tuple[WorkerProcess, ...]):
    owner = owners(workers, stage.partitions)
    end_gracefully(workers)
    verdict = judged(
        stage.config, stage.model, {number: worker.state / partition_name(number) for number, worker in owner.items()}
    )
    assert verdict.differences == []
    return verdict


def test_a_standby_takes_over_from_its_copies(tmp_path, kafka_bootstrap) -> None:
    with staged(tmp_path, kafka_bootstrap, 4) as stage:
        first, spare = WorkerProcess(stage, "first"), WorkerProcess(stage, "spare", options={"worker.standby": "true"})
        with crew(first, spare):
            first.start()
            until_owned((first,), 4, OWNED_S)
            spare.start()
            until_owned((first, spare), 4, OWNED_S, members=2)
            send(stage.bootstrap, stage.topic, clicks(1))
            until_settled((first, spare), ends(stage.bootstrap, stage.topic), SETTLED_S)
            followed = [p for p in range(4) if spare.metric("coldstream_partition_owned", partition=str(p)) == 0]
            assert len(followed) == 2
            wait_until(
                lambda: all(spare.metric("coldstream_standby_lag_records", partition=str(p)) == 0 for p in followed),
                20.0, "the copies lag behind",
            )  # fmt: skip
            first.kill()
            until_owned((spare,), 4, OWNED_S)
            send(stage.bootstrap, stage.topic, clicks(2))
            until_settled((spare,), ends(stage.bootstrap, stage.topic), SETTLED_S)
            for part in ("decode", "adapt", "store", "publish", "restore"):
                assert spare.metric("coldstream_stage_seconds_count", stage=part) > 0, part
            status, answer = spare.probe("/livez")
            assert (status, answer["problems"]) == (200, [])
            log = spare.log.read_text()
            verdict = judge(stage, (spare,))
    assert verdict.events == verdict.predictions == 2 * EVENTS
    assert verdict.repeated == 0
    plans = [json.loads(line) for line in log.splitlines() if "store and changelog are together" in line]
    taken_over = [plan for plan in plans if plan["partition"] in followed][-2:]
    assert {plan["plan"] for plan in taken_over} <= {"apply", "resend"}, taken_over


def test_a_source_that_is_not_keyed_by_user_is_routed(tmp_path, kafka_bootstrap) -> None:
    routed = {"stream": {"keyed_by_user": False}}
    with staged(tmp_path, kafka_bootstrap, 3, sections=routed) as stage:
        by_user = f"{stage.topic}-by-user"
        create_topic(stage.bootstrap, by_user, 4)
        sent = [Sent(b"%d" % (k % 7), one.value, (("trace", b"%d" % k),)) for k, one in enumerate(clicks(3))]
        poison = [Sent(b"p", b"no JSON"), Sent(None, b'{"user_id": "u1"}')]
        worker = WorkerProcess(stage, "router", options={"stream.topics.events_by_user": by_user})
        try:
            with crew(worker):
                worker.start()
                until_owned((worker,), 4, OWNED_S)
                send(stage.bootstrap, stage.topic, sent + poison)
                applied = 'coldstream_events_total{outcome="applied"}'
                wait_until(lambda: worker.metric("coldstream_events_total", outcome="applied") == EVENTS, 40.0, applied)
                end_gracefully((worker,))
            records = committed_records(stage.bootstrap, by_user, stage.dead_letters)
        finally:
            delete_topics(stage.bootstrap, by_user)
    there = [(p, record) for p, found in records[by_user].items() for record in found]
    assert sorted(dict(record.headers)["trace"] for _, record in there) == sorted(b"%d" % k for k in range(EVENTS))
    for partition, record in there:
        assert record.key == json.loads(record.value)["user_id"].encode()
        assert partition == partition_of(record.key, 4)
    letters = [record for found in records[stage.dead_letters].values() for record in found]
    assert sorted(letter.value for letter in letters) == sorted(one.value for one in poison)


def test_an_event_that_comes_again_after_a_restart_is_dropped(tmp_path, kafka_bootstrap) -> None:
    mapped = {"data": {"events": {"event_id": {"field": "id"}}}, "stream": {"duplicate_window": 500}}
    with staged(tmp_path, kafka_bootstrap, 1, sections=mapped) as stage:
        worker = WorkerProcess(stage, "one")
        once = [event("u1", "i1", 1, START_MS + k, id=f"e{k}") for k in range(100)]
        with crew(worker):
            worker.start()
            until_owned((worker,), 1, OWNED_S)
            send(stage.bootstrap, stage.topic, once)
            until_settled((worker,), ends(stage.bootstrap, stage.topic), SETTLED_S)
            worker.term()
            assert worker.wait() == 0
            worker.start()
            until_owned((worker,), 1, OWNED_S)
            send(stage.bootstrap, stage.topic, [*once[50:], event("u1", "i1", 0, START_MS, id="new")])
            until_settled((worker,), ends(stage.bootstrap, stage.topic), SETTLED_S)
            assert worker.metric("coldstream_events_total", outcome="duplicate") == 50
            assert worker.metric("coldstream_events_total", outcome="applied") == 1
            worker.term()
            assert worker.wait() == 0


def test_a_restart_of_a_named_worker_moves_no_partition_and_loses_nothing(tmp_path, kafka_bootstrap) -> None:
    """Within the session timeout, which is longer than a start takes."""
    patient = {"kafka": {"session_timeout_ms": 20_000}}
    with staged(tmp_path, kafka_bootstrap, 4, sections=patient) as stage:
        workers = left, stays = WorkerProcess(stage, "left", static=True), WorkerProcess(stage, "stays", static=True)
        with crew(*workers):
            for worker in workers:
                worker.start()
            until_owned(workers, 4, OWNED_S, members=2)
            before = {worker.name: set(worker.partitions()) for worker in workers}
            rebalances = stays.metric(REBALANCES)
            left.term()
            assert left.wait() == 0
            send(stage.bootstrap, stage.topic, clicks(4))
            left.start()
            until_owned(workers, 4, OWNED_S, members=2)
            until_settled(workers, ends(stage.bootstrap, stage.topic), SETTLED_S)
            assert {worker.name: set(worker.partitions()) for worker in workers} == before
            assert stays.metric(REBALANCES) == rebalances
            verdict = judge(stage, workers)
    assert verdict.events == verdict.predictions == EVENTS
    assert verdict.repeated == 0


def command(stage: Stage, state: Path | None, *options: str) -> subprocess.CompletedProcess[str]:
    """The worker, which is expected to end by itself."""
    where = [] if state is None else ["--state", str(state)]
    return subprocess.run(
        [sys.executable, "-m", "streams.cli", "worker", "--config", str(stage.config), "--model", str(stage.model),
         *where, "--set=worker.metrics_port=0", *(f"--set={option}" for option in options)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a user reads; the log's lines are JSON."""
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_what_a_user_can_mend_is_one_line(tmp_path, kafka_bootstrap) -> None:
    with staged(tmp_path, kafka_bootstrap, 2) as stage:
        assert "--state" in error_of(command(stage, None))
        assert "127.0.0.1:9" in error_of(command(stage, tmp_path / "s", "kafka.bootstrap=127.0.0.1:9"))
        missing = error_of(command(stage, tmp_path / "s", "stream.topics.create=false"))
        assert "kafka-topics.sh --bootstrap-server" in missing
        assert "--create --topic" in missing
        assert stage.changelog in missing
        narrow = create_topic(stage.bootstrap, f"{stage.topic}-narrow", 1, cleanup_policy="compact")
        try:
            said = error_of(command(stage, tmp_path / "s", f"stream.topics.changelog={narrow}"))
        finally:
            delete_topics(stage.bootstrap, narrow)
        assert f"topic {narrow} (stream.topics.changelog) has 1 partitions, but {stage.topic} has 2" in said


@pytest.mark.parametrize("changed", ["changelog", "source"])
def test_a_state_directory_of_another_stream_is_refused(tmp_path, kafka_bootstrap, changed) -> None:
    with staged(tmp_path, kafka_bootstrap, 1) as stage:
        worker, other = WorkerProcess(stage, "one"), f"{stage.topic}-other"
        with crew(worker):
            worker.start()
            until_owned((worker,), 1, OWNED_S)
            send(stage.bootstrap, stage.topic, clicks(5, 100))
            until_settled((worker,), ends(stage.bootstrap, stage.topic), SETTLED_S)
            worker.term()
            assert worker.wait() == 0
        create_topic(stage.bootstrap, other, 1, **({"cleanup.policy": "compact"} if changed == "changelog" else {}))
        try:
            if changed == "changelog":
                said = error_of(command(stage, worker.state, f"stream.topics.changelog={other}"))
                assert f"is kept with the changelog {stage.changelog}/0, not with {other}/0" in said
            else:
                said = error_of(command(stage, worker.state, f"stream.topic={other}", f"stream.group={other}"))
                assert f"partition 0 of {other} ends at offset 0, before 100" in said
        finally:
            delete_topics(stage.bootstrap, other)
