"""When a worker is live, when it is ready, and what its port says."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, RemoteDisconnected
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from configs.exceptions import ColdstreamError
from configs.settings import WorkerSettings
from streams.live.health import ERROR_CHARACTERS, Health
from streams.live.health_server import HealthServer
from streams.live.metrics import Outcome, WorkerMetrics

STALL_S = 60.0


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(WorkerSettings(stall_s=STALL_S, ready_lag=1_000), clock)


def later(health: Health, clock: Clock, seconds: float) -> None:
    """Time passes, and the loop runs."""
    clock.now += seconds
    health.beat()


def assign(health: Health, partition: int) -> None:
    """One more."""
    health.assigned([*map(int, health.partitions()), partition])


def run(health: Health, partition: int, lag: int = 0, offset: int = 0) -> None:
    assign(health, partition)
    health.running(partition)
    health.applied(partition, offset)
    health.lag(partition, lag)


# --- live: the process ---


def test_a_worker_that_has_just_begun_is_live_and_not_ready(health):
    assert health.live() == ()
    assert health.ready() == ("no partitions were assigned yet",)


def test_an_agent_that_has_died_makes_it_not_live_until_it_runs_again(health):
    health.agent_died("adapt", "ValueError: bad\n  thing")
    health.agent_died("route", "KeyError: 'x'")
    assert health.live() == (
        "agent adapt has died: ValueError: bad thing",
        "agent route has died: KeyError: 'x'",
    )
    health.agent_runs("adapt")
    health.agent_runs("route")
    assert health.live() == ()


def test_a_fatal_error_stays_and_the_first_is_the_one_that_is_told(health):
    health.failed_fatally("StoreDamaged: first")
    health.failed_fatally("KafkaError: what followed")
    assert health.live() == ("fatal error: StoreDamaged: first",)


def test_long_error_texts_are_cut(health):
    health.failed_fatally("x" * 10_000)
    (problem,) = health.live()
    assert problem == "fatal error: " + "x" * (ERROR_CHARACTERS - 1) + "…"


def test_a_loop_that_does_not_run_is_not_live_though_nobody_can_tell_a_lag(health, clock):
    run(health, 0)
    clock.now += STALL_S
    assert health.live() == ()
    clock.now += 1
    assert health.live() == ("the event loop has not run for 61 s (worker.stall_s)",)
    health.beat()
    assert health.live() == ()


# --- live: progress ---


def test_a_partition_with_lag_that_does_not_move_is_stalled(health, clock):
    run(health, 3, lag=50)
    later(health, clock, STALL_S)
    assert health.live() == ()
    later(health, clock, 1)
    assert health.live() == ("partition 3: 50 events wait, but nothing has moved for 61 s (worker.stall_s)",)
    health.applied(3, 10)
    assert health.live() == ()


def test_without_lag_nothing_needs_to_move(health, clock):
    run(health, 3)
    later(health, clock, 100 * STALL_S)
    assert health.live() == ()


def test_the_time_counts_from_when_the_lag_came_up(health, clock):
    run(health, 3)
    later(health, clock, 10 * STALL_S)
    health.lag(3, 5)
    later(health, clock, STALL_S)
    assert health.live() == ()
    later(health, clock, 1)
    assert len(health.live()) == 1


def test_telling_the_lag_again_is_no_progress(health, clock):
    run(health, 3, lag=5)
    for lag in (6, 4, 9):
        later(health, clock, 25)
        health.lag(3, lag)
    assert health.live() == ("partition 3: 9 events wait, but nothing has moved for 75 s (worker.stall_s)",)


def test_an_offset_that_does_not_rise_is_no_progress(health, clock):
    run(health, 3, lag=5, offset=10)
    for offset in (10, 10, 9):
        later(health, clock, 25)
        health.applied(3, offset)
    assert health.live() == ("partition 3: 5 events wait, but nothing has moved for 75 s (worker.stall_s)",)
    health.applied(3, 10)  # the store had come back at an earlier offset, and goes on
    assert health.live() == ()


def test_a_stuck_partition_is_not_hidden_by_one_that_runs(health, clock):
    run(health, 0, lag=5)
    run(health, 1, lag=5)
    for step in range(1, 8):
        later(health, clock, 10)
        health.applied(1, step)
    assert health.live() == ("partition 0: 5 events wait, but nothing has moved for 70 s (worker.stall_s)",)


def test_the_last_error_is_told_with_the_stall_and_gone_when_it_moves(health, clock):
    run(health, 0, lag=5)
    health.hindered(0, "StoreWriteFailed: disk full")
    assert health.live() == ()
    later(health, clock, STALL_S + 1)
    assert health.live() == (
        "partition 0: 5 events wait, but nothing has moved for 61 s (worker.stall_s); "
        "last error: StoreWriteFailed: disk full",
    )
    health.applied(0, 1)
    assert health.partitions()["0"]["error"] is None


def test_a_restore_that_reads_on_is_progress_and_one_that_does_not_is_stalled(health, clock):
    assign(health, 0)
    for done in range(1, 11):
        later(health, clock, STALL_S - 1)
        health.restoring(0, done * 100, 1_000)
        assert health.live() == ()
    for _ in range(2):
        later(health, clock, STALL_S / 2 + 1)
        health.restoring(0, 1_000, 1_000)
    assert health.live() == ("partition 0: restoring, but nothing has moved for 62 s (worker.stall_s)",)


def test_a_restore_counts_for_those_that_wait_for_it(health, clock):
    run(health, 0, lag=5)
    assign(health, 1)
    assign(health, 2)
    for done in range(1, 11):
        later(health, clock, STALL_S - 1)
        health.restoring(1, done, 10)
        assert health.live() == ()
    health.running(1)
    later(health, clock, STALL_S)
    assert health.live() == ()
    later(health, clock, 1)
    assert [problem.partition(",")[0] for problem in health.live()] == [
        "partition 0: 5 events wait",
        "partition 2: restoring",
    ]


def test_a_partition_that_is_fenced_for_long_makes_it_not_live_with_or_without_lag(health, clock):
    run(health, 0)
    later(health, clock, 5 * STALL_S)
    health.fenced(0)
    assert health.live() == ()
    later(health, clock, STALL_S + 1)
    assert health.live()[0].startswith("partition 0: fenced, but nothing has moved for 61 s (worker.stall_s)")
    health.restoring(0, 0, 10)
    assert health.live() == ()


def test_a_partition_that_was_revoked_is_judged_no_more_and_begins_anew(health, clock):
    run(health, 0, lag=5)
    later(health, clock, STALL_S + 1)
    health.revoked(0)
    assert health.live() == ()
    health.applied(0, 1)
    health.lag(0, 5)
    health.poison(0, True)
    assert health.partitions() == {}
    assign(health, 0)
    assert health.partitions()["0"]["lag"] is None
    assert health.live() == ()


def test_an_assignment_keeps_what_is_known_and_drops_what_it_does_not_name(health, clock):
    run(health, 0, lag=5)
    run(health, 1, lag=5)
    later(health, clock, STALL_S + 1)
    health.assigned([1, 2])
    assert health.live() == ("partition 1: 5 events wait, but nothing has moved for 61 s (worker.stall_s)",)
    assert [(number, p["state"]) for number, p in health.partitions().items()] == [("1", "running"), ("2", "restoring")]


# --- ready ---


def test_a_worker_that_is_given_nothing_is_ready(health):
    health.assigned(())
    assert health.ready() == ()


def test_it_is_ready_when_all_it_has_is_restored_and_nearly_up_to_date(health):
    assign(health, 0)
    assert health.ready() == ("partition 0: restoring, 0 of an unknown number of records",)
    health.restoring(0, 20, 50)
    assert health.ready() == ("partition 0: restoring, 20 of 50 records",)
    health.running(0)
    assert health.ready() == ("partition 0: its lag is not known yet",)
    health.lag(0, 1_001)
    assert health.ready() == ("partition 0: 1001 events behind (worker.ready_lag is 1000)",)
    health.lag(0, 1_000)
    assert health.ready() == ()


def test_poison_makes_it_not_ready_and_leaves_it_live(health):
    run(health, 0)
    health.poison(0, True)
    assert health.ready() == (
        "partition 0: nearly all of its latest events cannot be used; see the dead letters (worker.poison_share)",
    )
    assert health.live() == ()
    health.poison(0, False)
    assert health.ready() == ()


def test_a_fenced_partition_makes_it_not_ready_at_once(health):
    run(health, 0)
    run(health, 1)
    health.fenced(0)
    assert health.ready() == ("partition 0: fenced: another worker owns it",)
    health.running(0)
    assert health.ready() == ()


def test_a_source_of_nearly_all_poison_makes_its_router_not_ready_and_leaves_it_live(health):
    run(health, 0)
    health.source_poison("clicks/3", True)
    assert health.ready() == (
        "source clicks/3: nearly all of its latest events cannot be used; see the dead letters (worker.poison_share)",
    )
    assert health.live() == ()
    health.source_poison("clicks/3", False)
    assert health.ready() == ()


def test_what_is_not_live_is_not_ready(health):
    run(health, 0)
    health.agent_died("adapt", "x")
    assert health.ready() == ("agent adapt has died: x",)


def test_a_worker_that_stops_is_live_to_the_end_and_not_ready(health, clock):
    run(health, 0, lag=5)
    health.stopping()
    health.agent_died("adapt", "cancelled")
    clock.now += 10 * STALL_S
    assert health.live() == ()
    assert health.ready() == ("stopping",)
    health.failed_fatally("StoreWriteFailed: disk full")
    assert health.live() == ("fatal error: StoreWriteFailed: disk full",)


def test_what_is_known_of_a_partition(health, clock):
    run(health, 11, lag=7, offset=40)
    run(health, 2)
    clock.now += 1.5
    assert list(health.partitions()) == ["2", "11"]
    assert health.partitions()["11"] == {
        "state": "running",
        "lag": 7,
        "offset": 40,
        "restored": 0,
        "to_restore": None,
        "waiting_s": 1.5,
        "poison": False,
        "error": None,
    }
    assert health.partitions()["2"]["waiting_s"] == 0


# --- the port ---


class Answer(NamedTuple):
    status: int
    kind: str
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        parsed: dict[str, object] = json.loads(self.body)
        return parsed


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics("1", "m")


@pytest.fixture
def server(metrics: WorkerMetrics, health: Health) -> Iterator[HealthServer]:
    with HealthServer(health, metrics.registry, "127.0.0.1", 0) as running:
        yield running


def ask(server: HealthServer, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = HTTPConnection(server.host, server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return Answer(response.status, response.getheader("Content-Type", ""), response.read())
    finally:
        connection.close()


def test_probes_get_a_status_and_the_reasons(server, health):
    answer = ask(server, "/livez")
    assert answer.status == 200
    assert answer.kind == "application/json; charset=utf-8"
    assert answer.json == {"status": "live", "problems": [], "partitions": {}}
    run(health, 0, lag=5_000)
    answer = ask(server, "/readyz?verbose=1")
    assert answer.status == 503
    assert answer.json == {
        "status": "not ready",
        "problems": ["partition 0: 5000 events behind (worker.ready_lag is 1000)"],
        "partitions": health.partitions(),
    }
    health.lag(0, 0)
    assert ask(server, "/readyz").json["status"] == "ready"
    health.failed_fatally("x")
    assert ask(server, "/livez").status == 503
    assert ask(server, "/livez").json["status"] == "not live"


@pytest.mark.parametrize("accept", ["text/plain;version=0.0.4", "application/openmetrics-text; version=1.0.0"])
def test_prometheus_reads_the_metrics(server, metrics, accept):
    metrics.events(Outcome.APPLIED, 3)
    answer = ask(server, "/metrics", Accept=accept)
    assert answer.status == 200
    assert answer.kind.startswith(accept.partition(";")[0])
    samples = {s.name: s for f in text_string_to_metric_families(answer.body.decode()) for s in f.samples}
    assert samples["coldstream_build_info"].labels == {"version": "1", "model": "m"}
    assert b'coldstream_events_total{outcome="applied"} 3.0' in answer.body


def test_head_has_no_body(server):
    answer = ask(server, "/livez", "HEAD")
    assert (answer.status, answer.body) == (200, b"")


def test_other_paths_are_not_found(server):
    answer = ask(server, "/livez/x")
    assert answer.status == 404
    assert answer.json == {"status": "not found", "problems": ["no such path; there are /livez, /readyz, /metrics"]}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_refused(server, method):
    assert ask(server, "/livez", method).status == 501


def test_it_answers_while_the_event_loop_is_blocked(server):
    answers: list[Answer] = []
    asked = threading.Event()

    def probe() -> None:
        answers.append(ask(server, "/livez"))
        asked.set()

    async def blocked() -> None:
        threading.Thread(target=probe).start()
        assert asked.wait(10)  # holds the loop

    asyncio.run(blocked())
    assert answers[0].status == 200


def test_a_client_that_says_nothing_or_goes_away_holds_up_nobody(server, capfd):
    with socket.create_connection((server.host, server.port)) as silent:
        assert ask(server, "/livez").status == 200
        silent.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    for _ in range(20):
        assert ask(server, "/livez").status == 200
    assert capfd.readouterr() == ("", "")


def test_an_error_of_ours_is_logged_and_the_port_lives_on(metrics):
    class Broken(Health):
        def live(self) -> tuple[str, ...]:
            raise ZeroDivisionError

    broken = Broken(WorkerSettings(), time.monotonic)
    with capture_logs() as logs, HealthServer(broken, metrics.registry, "127.0.0.1", 0) as server:
        with pytest.raises(RemoteDisconnected):
            ask(server, "/livez")
        assert ask(server, "/metrics").status == 200
    assert [line["event"] for line in logs] == ["a request to the health server failed"]


def test_a_port_in_use_is_an_error_that_says_which(server, health, metrics):
    with pytest.raises(ColdstreamError) as caught:
        HealthServer(health, metrics.registry, "127.0.0.1", server.port)
    assert str(caught.value) == (
        f"worker.metrics_host 127.0.0.1, worker.metrics_port {server.port}: cannot listen there: Address already in "
        "use; set another worker.metrics_port (0 takes a free one), or end what listens there"
    )


def test_an_address_that_is_not_this_machines_is_an_error(health, metrics):
    with pytest.raises(ColdstreamError, match=r"^worker\.metrics_host 192\.0\.2\.1, .*: cannot listen there: "):
        HealthServer(health, metrics.registry, "192.0.2.1", 0)


def test_closing_ends_the_thread_and_frees_the_port(health, metrics):
    server = HealthServer(health, metrics.registry, "127.0.0.1", 0)
    server.close()
    server.close()
    assert "health server" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ConnectionRefusedError):
        ask(server, "/livez")
    with HealthServer(health, metrics.registry, "127.0.0.1", server.port) as again:
        assert ask(again, "/livez").status == 200


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_it_listens_on_ipv6(health, metrics):
    try:
        server = HealthServer(health, metrics.registry, "::1", 0)
    except ColdstreamError:
        pytest.skip("this machine has no IPv6 loopback address")
    with server:
        assert ask(server, "/livez").status == 200
