"""The pure parts of the live benchmark: what it reads of a worker, when its clock starts and stops, what it sends."""

from __future__ import annotations

import json
import os
import socket
from collections import namedtuple
from itertools import count
from math import inf, isnan
from threading import Thread

import numpy as np
import pytest

from benchmarks.live_ages import ages
from benchmarks.live_events import Events, generated, records
from benchmarks.live_peers import Tally
from benchmarks.live_profile import Cost, ThreadProfiles, costs_between
from benchmarks.live_scrape import Buckets, Look, Scrape, Usage, listener_of, stretch, usage
from configs.settings import EventSchema, LabelRule, TimeRule
from streams.kafka.batch_writing import Spans
from streams.live.metrics import Outcome, Stage, WorkerMetrics
from streams.rejects import Reason

prometheus = pytest.importorskip("prometheus_client")


def scraped(metrics: WorkerMetrics) -> Scrape:
    return Scrape(prometheus.generate_latest(metrics.registry).decode())


def test_a_scrape_reads_what_the_worker_tells():
    metrics = WorkerMetrics("1.0", "abc", clock=count(1.0, 0.25).__next__)
    metrics.owns(2)
    metrics.owns(3)
    metrics.pending_commits(2, 4)
    metrics.pending_commits(3, 1)
    metrics.events(Outcome.APPLIED, 70)
    metrics.changelog_rows(9)
    with metrics.timed(Stage.ADAPT):
        pass
    with metrics.timed(Stage.ADAPT):
        pass

    found = scraped(metrics)

    assert (found.applied, found.pending, found.rows, found.owned) == (70, 5, 9, {"2", "3"})
    assert found.stage_seconds() == {stage.value: 0.5 if stage is Stage.ADAPT else 0.0 for stage in Stage}
    assert found.value("coldstream_nothing") == 0.0
    assert found.otherwise == {}


def test_a_scrape_names_events_that_were_not_applied():
    metrics = WorkerMetrics("1.0", "abc")
    metrics.events(Outcome.DEAD_LETTER, 2)
    metrics.dead_letters(Reason.MALFORMED_RECORD, 2)

    assert scraped(metrics).otherwise == {"dead_letter": 2}


def test_a_histogram_has_its_buckets_in_order_and_none_where_there_is_no_such_series():
    metrics = WorkerMetrics("1.0", "abc")
    for delay in (0.002, 0.002, 0.3):
        metrics.loop_delay(delay)

    found = scraped(metrics).histogram("coldstream_loop_delay_seconds")

    assert found is not None
    assert found.bounds[:3] == (0.001, 0.0025, 0.005)
    assert found.bounds[-1] == inf
    assert found.counts[:2] == (0, 2)
    assert found.counts[-1] == 3
    assert found.total == pytest.approx(0.304)
    assert scraped(metrics).histogram("coldstream_durable_minutes") is None
    assert scraped(metrics).histogram("coldstream_stage_seconds", stage="decode") is None


@pytest.mark.parametrize(("share", "expected"), [(0.125, 0.55), (0.25, 1.0), (0.375, 2.0), (0.5, 3.0), (0.75, inf)])
def test_a_quantile_is_linear_inside_its_bucket(share: float, expected: float):
    buckets = Buckets((0.1, 1.0, 3.0, inf), (0.0, 50.0, 100.0, 200.0), 0.0)

    assert buckets.quantile(share) == pytest.approx(expected)


def test_a_quantile_of_nothing_is_no_number():
    assert isnan(Buckets((1.0, inf), (0.0, 0.0), 0.0).quantile(0.5))


def test_two_moments_of_a_histogram_differ_by_what_came_between():
    after, before = Buckets((1.0, inf), (5.0, 9.0), 12.0), Buckets((1.0, inf), (4.0, 4.0), 2.0)

    assert after - before == Buckets((1.0, inf), (1.0, 5.0), 10.0)


def look(at_s: float, applied: int, pending: int = 0, rows: int = 0) -> Look:
    return Look(at_s, applied, pending, rows, Usage(at_s, 0, 0), 0.0, {})


def test_time_runs_from_before_the_first_event_to_the_last_acknowledgement():
    looks = [
        look(1, 0),
        look(2, 0),
        look(3, 5, 1),
        look(4, 10, 0, 3),
        look(5, 10, 1, 3),
        look(6, 10, 0, 7),
        look(7, 10, 0, 7),
    ]

    began, ended = stretch(looks)

    assert (began.at_s, ended.at_s) == (2, 6)  # at 4 nothing is pending, but a row was still to come


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([look(1, 5), look(2, 10)], id="the first event was missed"),
        pytest.param([look(1, 0), look(2, 10, 1)], id="commits are pending"),
        pytest.param([look(1, 0), look(2, 0)], id="nothing was applied"),
    ],
)
def test_a_run_that_was_not_seen_whole_is_refused(looks: list[Look]):
    with pytest.raises(ValueError, match="not seen from its first event"):
        stretch(looks)


def test_an_event_is_as_old_as_the_first_marker_that_covers_it():
    offset, time_ms = np.array([0, 1, 2, 5]), np.array([1000, 1010, 1020, 1500])

    found = ages(offset, time_ms, covered=np.array([1, 1, 7]), told_ms=np.array([1100, 1200, 1600]))

    np.testing.assert_allclose(found, [0.1, 0.09, 0.58, 0.1])


def test_an_event_that_no_marker_covers_is_an_error():
    with pytest.raises(ValueError, match="does not cover offset 8"):
        ages(np.array([3, 8]), np.array([0, 0]), covered=np.array([7]), told_ms=np.array([1]))
    assert not len(ages(np.array([], np.int64), np.array([], np.int64), np.array([], np.int64), np.array([], np.int64)))


def texts(spans: Spans) -> list[bytes]:
    data = spans.data.tobytes()
    return [data[a : a + n] for a, n in zip(spans.start.tolist(), spans.length.tolist(), strict=True)]


def test_records_are_json_in_the_schemas_fields_keyed_by_user():
    events = Events(np.array([7, 12]), np.array([3, 4]), np.array([5, 1]), np.array([100, 200]))
    schema = EventSchema(label=LabelRule(field="rating", at_least=4), event_time=TimeRule(field="at", unit="s"))

    ((keys, values),) = records(events, schema)

    assert texts(keys) == [b"7", b"12"]
    found = [json.loads(text) for text in texts(values)]
    assert [{name: one[name] for name in ("user_id", "item_id", "rating", "at")} for one in found] == [
        {"user_id": "7", "item_id": "3", "rating": 5, "at": 100},
        {"user_id": "12", "item_id": "4", "rating": 1, "at": 200},
    ]


def test_a_generated_record_has_some_120_bytes():
    ((_, values),) = records(generated(np.arange(1000, dtype=np.int64) + 100_000), EventSchema())

    assert 115 <= values.length.mean() <= 130


def test_repeated_events_are_of_new_users_each_time_and_as_many_as_asked_for():
    events = Events(np.array([1, 2]), np.array([3, 4]), np.array([0, 1]), np.array([10, 20]))

    found = events.repeated(5)

    assert found.user.tolist() == [1, 2, 100_001, 100_002, 200_001]
    assert found.item.tolist() == [3, 4, 3, 4, 3]


def test_the_listener_of_a_port_is_this_process_and_uses_cpu_and_memory():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listener_of(port) == os.getpid()
    before = usage(os.getpid())
    while usage(os.getpid()).cpu_s == before.cpu_s:
        sum(range(10_000))
    assert before.peak >= before.resident > 10**6
    assert listener_of(port) is None


def test_a_tally_counts_from_the_first_record_in_hand():
    tally = Tally()
    assert tally.result().events == 0

    tally.add(3)
    tally.add(4)

    assert tally.result().events == 7
    assert tally.result().seconds > 0


def test_each_threads_functions_have_their_own_cpu_time():
    def busy() -> None:
        for _ in range(300):
            sum(range(10_000))

    profiles = ThreadProfiles()
    before = profiles.moment()
    thread = Thread(target=busy, name="worker bee")
    thread.start()
    thread.join()
    profiles.end()
    costs = costs_between(before, profiles.moment())

    dearest = costs[0]
    assert (dearest.thread, dearest.where) == ("worker bee", "built-in method builtins.sum")
    assert dearest.cpu_s > 0
    line = busy.__code__.co_firstlineno
    assert f"test_live_benchmark.py:{line} busy" in {cost.where for cost in costs if cost.thread == "worker bee"}


def test_costs_are_those_between_two_moments():
    Entry = namedtuple("Entry", ["code", "inlinetime"])
    before = [("loop", [Entry("<a>", 1.0), Entry("<b>", 1.0)])]
    after = [("loop", [Entry("<a>", 1.5), Entry("<b>", 1.0)]), ("adapt", [Entry("<a>", 2.0)])]

    assert costs_between(before, after) == [Cost("adapt", "a", 2.0), Cost("loop", "a", 0.5), Cost("loop", "b", 0.0)]
